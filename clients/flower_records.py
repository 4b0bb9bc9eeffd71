"""A message's content as bytes, in Flower's own encoding; light."""

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordsProto

from common.errors import WireError


def content_to_bytes(content: RecordDict) -> bytes:
    """Return a message's content as bytes."""
    encoded: bytes = recorddict_to_proto(content).SerializeToString()
    return encoded


def content_from_bytes(encoded: bytes) -> RecordDict:
    """Read a message's content.

    Raises:
        WireError: It is not Flower's encoding.
    """
    try:
        return recorddict_from_proto(RecordsProto.FromString(encoded))
    except Exception:  # noqa: BLE001  # protobuf's and Flower's own, of many kinds
        raise WireError("the message's content cannot be read; is the sender Flower?") from None
