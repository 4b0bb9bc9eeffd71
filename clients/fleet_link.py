"""A node's side of Flower's Fleet API: log in, take messages, give answers.

Flower's own client classes make and sign the requests. What is different from Flower's own node:
the app bundle is never asked for; nothing that the server says ends this process; redirections
are not followed, so that the server cannot have this machine ask something of its neighbours.
"""

import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from clients.fleet_troubles import ONLINE_S, FleetTrouble, trouble_of
from clients.flower_records import content_from_bytes, content_to_bytes
from common.errors import IdentityError
from common.worker_wire import UNAVAILABLE, Answer

INTERVAL_S = 10.0  # the shortest that Flower allows; a killed node is let in again after twice that
_BEAT_S = 6.0
_AGAIN_S = 2.0  # after a sign of life that did not arrive
_HTTP_S = 8.0  # shorter than what makes a supervisor think that the node hangs
_MOST_OBJECTS = 64  # of a message; ours have six
_PULL_S = 8.0
_AT_ONCE = 4  # objects
_TIDY = 5  # messages at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Pulled:
    """A message that came, without what it holds."""

    message: Message
    tree: ObjectTree

    @property
    def seconds_left(self) -> float:
        """Return how long an answer is still of use."""
        metadata = self.message.metadata
        return metadata.created_at + metadata.ttl - time.time()


class _Version:
    """Tells Flower's version; unlike Flower's own it never ends the process."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> "object":
        context.request.headers.update(self._headers)
        return call_next(context)


class _Open:
    """Counts the requests under way: Flower's own threads outlive the call that began them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._closed = False

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> "object":
        with self._changed:
            if self._closed:
                raise FleetTrouble("this connection was ended")
            self._count += 1
        try:
            return call_next(context)
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let no request begin any more, and wait for those that have, as long as one may take."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._count, _HTTP_S)


class FleetLink:
    """One node's connection.

    Args:
        url: The gateway, `https://host:port`.
        ca_pem: The certificate authorities that are trusted, and no others.
        key: The node's private key.
    """

    def __init__(self, url: str, ca_pem: str, key: ec.EllipticCurvePrivateKey) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca_pem)
        self._public = public_key_to_bytes(key.public_key())
        self._open = _Open()
        self._client = FleetHttpClient(
            url,
            interceptors=[self._open, _Version(), NodeAuthHttpInterceptor(key, key.public_key())],  # type: ignore[list-item]
            verify=context,
            timeout=_HTTP_S,
        )
        self._client._client.follow_redirects = False
        self.node_id = 0
        self._lost: FleetTrouble | None = None
        self._seen_at = 0.0
        self._fetched: list[tuple[int, str]] = []  # (run, object) of messages to be tidied away
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def public(self) -> bytes:
        """Return the public half of the node's key, PEM."""
        return self._public

    def activate(self) -> None:
        """Log in, and stay so by a sign of life every few seconds; raises `FleetTrouble`."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=INTERVAL_S)
        self.node_id = self._try(lambda: self._client.ActivateNode(request)).node_id
        self._seen_at = time.monotonic()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def is_registered(self, node_id: int) -> bool:
        """Tell whether this key still is that node's; raises `FleetTrouble` if nobody answers."""
        request = GetRunRequest(node=NodeProto(node_id=node_id), run_id=0)
        try:
            self._try(lambda: self._client.GetRun(request))
        except FleetTrouble as trouble:
            if trouble.rejected:
                return False
            if not trouble.over:  # a run that is not there is refused to those it knows alone
                raise
        return True

    def check(self) -> None:
        """Raise `FleetTrouble` where this node has to log in again."""
        if self._lost is not None:
            raise self._lost
        if time.monotonic() - self._seen_at > ONLINE_S:
            raise FleetTrouble("the server was away for longer than it keeps a place")

    def pull(self) -> Pulled | None:
        """Take the next message, if there is one; raises `FleetTrouble`."""
        request = PullMessagesRequest(node=self._node)
        response = self._try(lambda: self._client.PullMessages(request))
        if not response.messages_list:
            return None
        message = self._try(lambda: message_from_proto(response.messages_list[0]))
        return Pulled(message, response.message_object_trees[0])

    def content_of(self, pulled: Pulled) -> bytes:
        """Fetch what a message holds; raises `FleetTrouble`."""
        metadata = pulled.message.metadata
        if len(pulled.tree.children) != 1:
            raise FleetTrouble("a message holds nothing")
        if sum(1 for _ in iterate_object_tree(pulled.tree)) > _MOST_OBJECTS:
            raise FleetTrouble("a message has more parts than any of Hansa's")
        content = self._try(
            lambda: pull_and_inflate_object_from_tree(
                pulled.tree.children[0],  # what the message itself says came with the answer
                make_pull_object_fn_protobuf(self._client.PullObject, self._node, metadata.run_id),
                lambda _: None,
                return_type=RecordDict,
                max_concurrent_pulls=_AT_ONCE,
                max_time=_PULL_S,
                initial_backoff=0.05,
                backoff_cap=0.5,
            )
        )
        self._fetched.append((metadata.run_id, pulled.tree.object_id))
        return content_to_bytes(content)

    def tidy(self) -> None:
        """Let the server forget messages that came; called while there is nothing better to do.

        Each takes the server as long as another question, and a run that ends tidies up anyway.
        """
        for run_id, object_id in self._fetched[:_TIDY]:
            confirm = make_confirm_message_received_fn_protobuf(
                self._client.ConfirmMessageReceived, self._node, run_id
            )
            with suppress(FleetTrouble):
                self._try(lambda confirm=confirm, object_id=object_id: confirm(object_id))  # type: ignore[misc]
        del self._fetched[:_TIDY]

    def reply(self, pulled: Pulled, answer: Answer) -> Message:
        """Return the reply to a message."""
        reply_to = pulled.message
        if answer.error is None:
            reply = Message(content_from_bytes(answer.content), reply_to=reply_to)
        else:
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            if answer.error.startswith(UNAVAILABLE):
                code = ErrorCode.NODE_UNAVAILABLE
            reply = Message(Error(code, answer.error), reply_to=reply_to)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def push(self, reply: Message, seconds: float) -> None:
        """Give a reply; may be done again after `FleetTrouble`."""
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],  # what it holds travels as objects
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            response = self._try(lambda: self._client.PushMessages(request))
            send = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, reply.metadata.run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            self._try(
                lambda: push_objects(
                    objects,
                    send,
                    object_ids_to_push=wanted,
                    keep_objects=True,
                    max_concurrent_pushes=_AT_ONCE,
                )
            )

    def close(self, *, leave: bool = False) -> None:
        """End the connection; where this merchant leaves, the server is told."""
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
            if leave and self._lost is None:
                request = DeactivateNodeRequest(node_id=self.node_id)
                with suppress(FleetTrouble):  # otherwise it finds out by itself
                    self._try(lambda: self._client.DeactivateNode(request))
        self._open.close()
        self._client.close()

    @property
    def _node(self) -> NodeProto:
        return NodeProto(node_id=self.node_id)

    def _beat(self) -> None:
        """Give a sign of life every few seconds until the end."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=INTERVAL_S)
        pause = _BEAT_S
        while not self._ended.wait(pause):
            try:
                known = self._try(lambda: self._client.SendNodeHeartbeat(request)).success
            except FleetTrouble as trouble:
                self._lost, pause = trouble if trouble.rejected else None, _AGAIN_S
            else:
                self._seen_at, pause = time.monotonic(), _BEAT_S
                if not known:
                    self._lost = FleetTrouble("the server has forgotten this node", rejected=True)
            if self._lost is not None:
                return

    def _try(self, call: Callable[[], T]) -> T:
        """Do something; raises `FleetTrouble` for whatever goes wrong."""
        try:
            return call()
        except Exception as error:  # the server must not end this process
            raise trouble_of(error) from error


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node's private key.

    Raises:
        IdentityError: It is missing, can be read by others, or is none.
    """
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
        key = serialization.load_ssh_private_key(content, None)
    except FileNotFoundError:
        raise IdentityError(f"{path}: there is no node key; hansa merchant init makes it") from None
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise IdentityError(f"{path}: is no private key in the format of OpenSSH") from None
    if mode & 0o077:
        raise IdentityError(f"{path}: others can read this key; run chmod 600 on it")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: is no key on an elliptic curve")
    return key
