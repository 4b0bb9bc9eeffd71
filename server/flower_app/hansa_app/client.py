"""The merchant's side, for those who run Flower's own `flower-supernode`: a shim.

Every message goes to the merchant's own worker, over the Unix socket that the merchant names in
`--node-config 'worker="/path/run/worker.sock"'`; the answer comes back. Nothing is imported but
Flower and gRPC, and nothing is decided here: this code comes from the operator, so the worker
trusts it no more than the operator. What passes over the socket is described in
`common/worker_wire.py` of Hansa.
"""

import struct
import time
from typing import Any

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordsProto

HANDLE = "/hansa.Worker/Handle"
OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
)
PATIENCE_S = 30.0  # for a worker that is being started again
PAUSE_S = 0.5


class Shim(ClientApp):
    """Hands every message on, whatever its type."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the worker's answer.

        Raises:
            RuntimeError: The worker's error, or why there is no answer.
        """
        socket = context.node_config.get("worker")
        if not socket:
            raise RuntimeError(
                "this node names no worker: start flower-supernode with "
                "--node-config 'worker=\"/path/run/worker.sock\"'"
            )
        kind = message.metadata.message_type.encode()
        content = recorddict_to_proto(message.content).SerializeToString()
        reply = ask(str(socket), struct.pack(">H", len(kind)) + kind + content, left(message))
        if reply[:1] != b"\0":
            raise RuntimeError(reply[1:].decode())
        return Message(recorddict_from_proto(RecordsProto.FromString(reply[1:])), reply_to=message)


def left(message: Message) -> float:
    """Return for how many seconds an answer is still of use."""
    return message.metadata.created_at + message.metadata.ttl - time.time()


def ask(socket: str, request: bytes, timeout_s: float) -> bytes:
    """Return the worker's reply; one that is being started again is waited for."""
    end = time.monotonic() + timeout_s
    unreached = time.monotonic() + PATIENCE_S
    with grpc.insecure_channel(f"unix:{socket}", options=OPTIONS) as channel:
        handle: Any = channel.unary_unary(HANDLE)
        while True:
            try:
                reply = handle(request, timeout=max(end - time.monotonic(), 0.0))
            except grpc.RpcError as error:
                gone = error.code() is grpc.StatusCode.UNAVAILABLE
                if not gone or time.monotonic() > min(end, unreached):
                    raise RuntimeError("worker unavailable: it cannot be reached") from None
            else:
                return bytes(reply)
            time.sleep(PAUSE_S)


app = Shim()
