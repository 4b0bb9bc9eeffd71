"""What passes over a merchant's own socket, between its node and its worker; light.

A request holds one message as it came: its type, and its content in Flower's encoding. A reply
holds the content of the answer, or the text of an error that may be told to the coordinator.
The shim in the app bundle, which can import nothing of ours, has a copy of this.

    request  length of the type (2 bytes, big-endian) | type (UTF-8) | content
    reply    0 | content        or        1 | text (UTF-8)
"""

import struct
from dataclasses import dataclass

HANDLE = "/hansa.Worker/Handle"
HEALTH = "/hansa.Worker/Health"  # empty -> JSON: state, since_s, pid, merchant, contract
BUDGET = "/hansa.Worker/Budget"  # empty -> JSON: epsilon, cap, delta
UNAVAILABLE = "worker unavailable"  # how an error starts after which a message may be sent again

MAX_BYTES = 64 * 1024 * 1024  # of a request or a reply
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BYTES),
    ("grpc.max_send_message_length", MAX_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
SOCKET_PATH_BYTES = 107  # the longest that the kernel takes

_LENGTH = struct.Struct(">H")


@dataclass(frozen=True)
class Answer:
    """What a worker made of a message: the content of a reply, or an error."""

    content: bytes
    error: str | None = None


def request_bytes(kind: str, content: bytes) -> bytes:
    r"""Return a request.

    >>> request_bytes("query.attest", b"...")
    b'\x00\x0cquery.attest...'
    """
    name = kind.encode()
    return _LENGTH.pack(len(name)) + name + content


def parse_request(request: bytes) -> tuple[str, bytes]:
    """Return the type and the content of a request; raises `ValueError` if it is none."""
    if len(request) < _LENGTH.size:
        raise ValueError("a request is shorter than its own head")
    (length,) = _LENGTH.unpack_from(request)
    name, content = request[_LENGTH.size :][:length], request[_LENGTH.size + length :]
    if len(name) < length:
        raise ValueError("a request is shorter than its own head")
    return name.decode(), content


def reply_bytes(answer: Answer) -> bytes:
    """Return a reply."""
    return b"\0" + answer.content if answer.error is None else b"\1" + answer.error.encode()


def parse_reply(reply: bytes) -> Answer:
    """Read a reply; raises `ValueError` if it is none.

    >>> parse_reply(reply_bytes(Answer(b"", "refused")))
    Answer(content=b'', error='refused')
    """
    if reply[:1] == b"\0":
        return Answer(reply[1:])
    if reply[:1] == b"\1":
        return Answer(b"", reply[1:].decode())
    raise ValueError("a reply is neither an answer nor an error")


def address_of(socket: str) -> str:
    """Return what gRPC calls a Unix socket."""
    return f"unix:{socket}"
