"""What the operator asks of its own SuperLink, through Flower's control API on loopback.

The only module that knows Flower's control messages. They go over TLS to 127.0.0.1, with the
operator's own authority; the gateway shows this API to nobody.
"""

import hashlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from common.errors import EnrolmentError, SuperLinkError
from server.certificates import trusted
from server.settings import Settings

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

TIMEOUT_S = 15.0
GONE = "unregistered"  # Flower's word for the status of a node that was taken off
_KEY_IN_USE, _NO_SUCH_NODE, _OVER = 23, 24, 18  # flwr.supercore.error

Answer = TypeVar("Answer")
Value = str | int | float | bool


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink knows it."""

    node: int
    name: str
    status: str
    public_key: bytes  # PEM
    online_until: float  # seconds since 1970; 0: never was


def register_node(settings: Settings, public_key: bytes, name: str) -> int:
    """Let a node in and return its id; a key that is in already keeps its id.

    Args:
        settings: Of the federation.
        public_key: PEM, on a NIST curve.
        name: The merchant's id, for people.

    Raises:
        SuperLinkError: The SuperLink does not answer, or refuses the key.
        EnrolmentError: The key was taken off before.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest

    try:
        answer = _ask(
            settings,
            lambda client: client.RegisterNode(
                RegisterNodeRequest(public_key=public_key, name=name)
            ),
        )
    except _RefusedError as refusal:
        if refusal.code != _KEY_IN_USE:
            raise
        return _registered(settings, public_key)
    if not answer.node_id:
        raise SuperLinkError("the SuperLink registered no node; try again")
    return int(answer.node_id)


def _registered(settings: Settings, public_key: bytes) -> int:
    for node in list_nodes(settings):
        if node.public_key == public_key and node.status != GONE:
            return node.node
    raise EnrolmentError(
        "this node key was registered and withdrawn before, and Flower takes no key twice: the "
        "merchant moves its node.key away and runs hansa merchant init again"
    )


def unregister_node(settings: Settings, node_id: int) -> None:
    """Let a node in no longer; one that the SuperLink does not know is fine.

    Raises:
        SuperLinkError: The SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    try:
        _ask(settings, lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))
    except _RefusedError as refusal:
        if refusal.code != _NO_SUCH_NODE:
            raise


def list_nodes(settings: Settings) -> list[Node]:
    """Return every node, those that were taken off included.

    Raises:
        SuperLinkError: The SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import ListNodesRequest

    answer = _ask(settings, lambda client: client.ListNodes(ListNodesRequest()))
    return [
        Node(
            int(info.node_id),
            info.name,
            info.status,
            bytes(info.public_key),
            float(info.online_until),
        )
        for info in answer.nodes_info
    ]


def start_run(settings: Settings, fab: bytes, config: Mapping[str, Value]) -> int:
    """Start a run of an app bundle and return Flower's id of it.

    Args:
        settings: Of the federation.
        fab: The bundle, as `flwr build` makes it.
        config: Overrides of keys that the bundle's own configuration has.

    Raises:
        SuperLinkError: The SuperLink does not answer, or refuses the bundle.
    """
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    bundle = Fab(hashlib.sha256(fab).hexdigest(), fab, {})
    request = StartRunRequest(
        fab=fab_to_proto(bundle), override_config=user_config_to_proto(dict(config))
    )
    answer = _ask(settings, lambda client: client.StartRun(request))
    if not answer.HasField("run_id"):
        raise SuperLinkError("the SuperLink started no run: is the app bundle too large?")
    return int(answer.run_id)


def stop_run(settings: Settings, run_id: int) -> None:
    """Stop a run; one that is over is fine.

    Raises:
        SuperLinkError: The SuperLink does not answer, or knows no such run.
    """
    from flwr.proto.control_pb2 import StopRunRequest

    try:
        _ask(settings, lambda client: client.StopRun(StopRunRequest(run_id=run_id)))
    except _RefusedError as refusal:
        if refusal.code != _OVER:
            raise


def run_status(settings: Settings, run_id: int) -> str:
    """Return `pending`, `starting`, `running`, or `finished:` and `completed`, `failed`, `stopped`.

    Raises:
        SuperLinkError: The SuperLink does not answer, or knows no such run.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    answer = _ask(settings, lambda client: client.ListRuns(ListRunsRequest(run_id=run_id)))
    status = answer.run_dict[run_id].status
    return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)


class _RefusedError(SuperLinkError):
    """An answer of the SuperLink that says no, with Flower's number for the reason."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def _ask(settings: Settings, question: "Callable[[ControlHttpClient], Answer]") -> Answer:
    """Put one question to the SuperLink."""
    import httpx
    from flwr.supercore.control import ControlHttpClient

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=trusted(settings.tls))
    client = ControlHttpClient(f"https://{settings.superlink}", verify=context, timeout=TIMEOUT_S)
    client._client.close()  # it would send what is for 127.0.0.1 through a proxy
    client._client = httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=False)
    try:
        return question(client)
    except httpx.HTTPStatusError as error:
        raise _refusal(error.response.status_code, error.response.text) from None
    except httpx.HTTPError as error:
        raise SuperLinkError(
            f"the SuperLink at {settings.superlink} does not answer "
            f"({type(error).__name__}); start it with hansa server start"
        ) from None
    except ValueError:  # of another version, or no SuperLink at all
        raise SuperLinkError(f"what answers at {settings.superlink} is no SuperLink") from None
    finally:
        client.close()


def _refusal(status: int, body: str) -> _RefusedError:
    from flwr.supercore.error import FlowerError

    known = FlowerError.from_json(body)
    if known is None:
        return _RefusedError(f"the SuperLink refused (HTTP {status})", 0)
    details = f" ({known.public_details})" if known.public_details else ""
    return _RefusedError(f"the SuperLink refused: {known.message}{details}", known.code)
