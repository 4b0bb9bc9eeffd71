"""A Flower `Grid` in this process: the real ServerApp and ClientApp, no Ray, no SuperLink.

Every message is serialised to Flower's protobuf and back, both ways, so that what works here
works on the wire. A client app's exception becomes the error reply that a SuperNode would send.

Messages of one type that are pulled at once can be answered together (`together`), which is how
a whole cohort's gradients become one computation.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 2  # id of node 0; 0 and 1 mean other things to Flower
Fault = Callable[[Message], str | None]  # None: deliver; "silent": lose it; else: error text
# (message type, context and content of each) -> functions that return a reply's content or raise
Together = Callable[[str, list[tuple[Context, RecordDict]]], list[Callable[[], RecordDict]]]


class InProcessGrid(Grid):
    """Deliver messages to one `ClientApp`, one context a node.

    Args:
        client_app: Answers every message.
        nodes: Number of nodes; node k has `partition-id` k in its configuration.
        run_config: Run configuration that every context carries.
        fault: Decides the fate of each message, for tests of survival.
        together: Answers messages of one type at once, instead of the client app.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: dict[str, Any],
        fault: Fault | None = None,
        together: Together | None = None,
    ) -> None:
        self._client_app = client_app
        self._fault = fault
        self._together = together
        self._run = Run.create_empty(run_id=secrets.randbits(62))
        # Flower's Message constructor asks this process-wide identity who is speaking.
        TaskIdentity.run_id, TaskIdentity.task_id = self._run.run_id, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self.contexts = {
            node + FIRST_NODE: Context(
                self._run.run_id,
                node + FIRST_NODE,
                {"partition-id": node, "num-partitions": nodes},
                RecordDict(),
                dict(run_config),
            )
            for node in range(nodes)
        }
        self._waiting: dict[str, bytes | Message] = {}

    def set_run(self, run: Run) -> None:
        """Replace the run (Flower's interface)."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node (Flower's older interface)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; each is answered when its reply is pulled."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the given messages; lost ones have none."""
        waiting = [self._waiting.pop(message_id, None) for message_id in message_ids]
        delivered = self._answered([one for one in waiting if isinstance(one, bytes)])
        replies = [next(delivered) if isinstance(one, bytes) else one for one in waiting]
        return [reply for reply in replies if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull at once; nothing can arrive later, so `timeout` is not waited for."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _push(self, message: Message) -> str:
        message_id = secrets.token_hex(16)
        message.metadata.__dict__["_message_id"] = message_id
        fate = self._fault(message) if self._fault else None
        if fate is None:
            self._waiting[message_id] = message_to_proto(message).SerializeToString()
        elif fate != "silent":
            error = Error(ErrorCode.NODE_UNAVAILABLE, fate)
            self._waiting[message_id] = Message(error, reply_to=message)
        return message_id

    def _answered(self, waiting: list[bytes]) -> Iterator[Message]:
        """Carry messages through the app across a real serialisation boundary."""
        messages = [message_from_proto(MessageProto.FromString(raw)) for raw in waiting]
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.metadata.message_id
        together = self._together
        if together is None:
            for message in messages:
                yield self._reply(message, partial(self._answer_of_app, message))
            return
        for kind, group in groupby(messages, key=lambda message: message.metadata.message_type):
            asked = list(group)
            contents = [(self.contexts[m.metadata.dst_node_id], m.content) for m in asked]
            for message, give in zip(asked, together(kind, contents), strict=True):
                yield self._reply(message, partial(_wrapped, message, give))

    def _answer_of_app(self, message: Message) -> Message:
        return self._client_app(message, self.contexts[message.metadata.dst_node_id])

    def _reply(self, message: Message, answer: Callable[[], Message]) -> Message:
        """Return an answer, or the error reply that a SuperNode would send."""
        try:
            reply = answer()
        except Exception as error:  # noqa: BLE001  # what a SuperNode does with any exception
            reply = error_reply(message, error)
        return message_from_proto(
            MessageProto.FromString(message_to_proto(reply).SerializeToString())
        )


def error_reply(message: Message, error: Exception) -> Message:
    """Return what a SuperNode replies where its client app raised an exception."""
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _wrapped(message: Message, give: Callable[[], RecordDict]) -> Message:
    return Message(give(), reply_to=message)


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    nodes: int,
    run_config: dict[str, Any],
    fault: Fault | None = None,
    together: Together | None = None,
) -> None:
    """Run a ServerApp against a ClientApp to its end, in this process."""
    grid = InProcessGrid(client_app, nodes, run_config, fault, together)
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(run_config))
    server_app(grid=grid, context=context)
