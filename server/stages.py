"""One stage of the protocol: a message to every member, their answers, and who stayed silent.

Over `Grid.push_messages` and `Grid.pull_messages`; Flower's `send_and_receive` sleeps three
seconds between polls and waits for ever by default.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

UNAVAILABLE = "worker unavailable"  # how a node's error begins whose worker did not answer

_POLL_S, _LONGEST_POLL_S, _SLOWER = 0.05, 0.5, 1.3
_WAIT_S = 2.0  # between two calls of `on_wait`
_PASSING = frozenset(  # errors after which the same message may find its merchant again
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)


class Grid(Protocol):
    """What a coordinator uses of Flower's `Grid`."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids, empty where one was not taken."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""


@dataclass(frozen=True)
class Patience:
    """How long a stage waits for answers, and whether it asks again meanwhile.

    Attributes:
        timeout_s: Who has not answered by then is silent.
        resend_s: Ask again whoever has not answered for so long, or whose node or worker was
            away: merchants give the same answer to the same question. None: ask once.
    """

    timeout_s: float
    resend_s: float | None = None


@dataclass
class StageResult:
    """What came back, by node id."""

    contents: dict[int, RecordDict] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # node -> what Flower reported
    silent: set[int] = field(default_factory=set)


@dataclass
class _Stage:
    grid: Grid
    message_type: str
    contents: Mapping[int, RecordDict]
    patience: Patience
    result: StageResult = field(default_factory=StageResult)
    waiting: dict[str, int] = field(default_factory=dict)  # id of a message -> node
    due: dict[int, float] = field(default_factory=dict)  # node -> when it is asked (again)
    open: set[int] = field(default_factory=set)  # nodes that may still answer

    def ask(self, now: float) -> None:
        """Send their message to all that are due."""
        nodes = [node for node, due in self.due.items() if due <= now]
        ttl = self.patience.timeout_s + 30
        messages = [
            Message(self.contents[node], dst_node_id=node, message_type=self.message_type, ttl=ttl)
            for node in nodes
        ]
        for node, message_id in zip(nodes, self.grid.push_messages(messages), strict=True):
            if not message_id:
                self.fail(node, "Flower did not accept the message", now, passing=True)
                continue
            self.waiting[message_id] = node
            if self.patience.resend_s is None:
                self.due.pop(node)
            else:
                self.due[node] = now + self.patience.resend_s

    def take(self, now: float) -> None:
        """Collect what came back."""
        for reply in self.grid.pull_messages(list(self.waiting)):
            # errors made by the SuperLink do not carry the node's id: match by the question
            node = self.waiting.pop(reply.metadata.reply_to_message_id, -1)
            if node == -1 or node not in self.open:
                continue
            if reply.has_error():
                code, reason = reply.error.code, reply.error.reason or ""
                passing = code in _PASSING or UNAVAILABLE in reason
                self.fail(node, f"{code}: {reason}", now, passing=passing)
            else:
                self.result.contents[node] = reply.content
                self.result.errors.pop(node, None)
                self._close(node)

    def fail(self, node: int, reason: str, now: float, *, passing: bool) -> None:
        """Note an error; ask again, a little later, if it may pass."""
        self.result.errors[node] = reason
        if passing and self.patience.resend_s is not None:
            self.due[node] = now + min(1.0, self.patience.resend_s)
        else:
            self._close(node)

    def _close(self, node: int) -> None:
        self.open.discard(node)
        self.due.pop(node, None)


def run_stage(
    grid: Grid,
    message_type: str,
    contents: Mapping[int, RecordDict],
    patience: Patience,
    on_wait: Callable[[], object] = lambda: None,
) -> StageResult:
    """Send each node its message and collect answers until all are in or time is up.

    Args:
        grid: Where the nodes are reached.
        message_type: Of all messages.
        contents: Node -> content.
        patience: How long to wait, and whether to ask again.
        on_wait: Called every other second; what it raises ends the stage.
    """
    start = time.monotonic()
    stage = _Stage(grid, message_type, contents, patience)
    stage.due, stage.open = dict.fromkeys(contents, start), {*contents}
    for now in _moments(start + patience.timeout_s, on_wait):
        stage.ask(now)
        stage.take(now)
        if not stage.open:
            break
    result = stage.result
    result.silent = {node for node in stage.open if node not in result.errors}
    return result


def _moments(end: float, on_wait: Callable[[], object]) -> Iterator[float]:
    """Yield the time now and then, at least twice, until it is up."""
    pause, called = _POLL_S, time.monotonic()
    while True:
        now = time.monotonic()
        yield now
        if now >= end:
            return
        if now - called >= _WAIT_S:
            on_wait()
            called = now
        time.sleep(min(pause, max(end - now, 0.0)))
        pause = min(pause * _SLOWER, _LONGEST_POLL_S)
