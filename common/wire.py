"""Typed, versioned messages <-> Flower records. The only place that knows record keys.

A message's fields are one value of a Flower record, encoded as MessagePack: Flower checks and
encodes every value by itself, four times on the way, which for a dozen of them took longer than
everything else that is done with a message.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import msgpack
import numpy as np
from flwr.app import ConfigRecord, RecordDict

from common.errors import WireError

PROTOCOL = 5
_MAX_TEXT = 1000
_MAX_BYTES = 2**20  # of one field; the largest, an escrow, has 136 bytes a merchant
_MAX_PARTS = 1000  # of a list
_MOST_DECODED = {"max_map_len": 100, "max_array_len": 10 * _MAX_PARTS}  # a few bytes make a lot
_CONFIG, _FIELDS, _VECTOR, _DTYPE = "hansa", "fields", "vector", "vector_dtype"

Parameters = np.ndarray[Any, np.dtype[np.float64]]  # of a model
RingVector = np.ndarray[Any, np.dtype[np.uint32]]  # or uint64: lattice steps modulo the ring
Record = RecordDict
_DTYPES: dict[Any, tuple[str, ...]] = {Parameters: ("float64",), RingVector: ("uint32", "uint64")}


@dataclass(frozen=True)
class Attest:
    """Coordinator to merchant: will you take part in this run of this contract?"""

    run: str
    contract: str  # SHA-256


@dataclass(frozen=True)
class Attested:
    """The merchant's answer; `refusal` is empty when it takes part."""

    merchant: str
    refusal: str
    repeatable: bool  # its noise is seeded, for a simulation: whoever knows the seed knows it
    members: int  # version of the list of members that it pinned; 0 where lists have none


@dataclass(frozen=True)
class Advertise:
    """Coordinator to merchant: reserve what the run may cost; begin a session of secure sums."""

    run: str
    contract: str  # SHA-256
    session: int  # 0: the run's sums are plain
    countersigned: bytes  # the last entry of the merchant's ledger that the witness saw


@dataclass(frozen=True)
class Advertised:
    """The merchant's keys for the session."""

    merchant: str
    advert: bytes  # empty where sums are plain
    head: bytes  # of its ledger, with the run's reservation


@dataclass(frozen=True)
class Share:
    """Coordinator to merchant: everybody's keys; deal your shares."""

    run: str
    contract: str  # SHA-256
    session: int
    countersigned: bytes
    roster: list[bytes]  # adverts, in order


@dataclass(frozen=True)
class Shared:
    """What the merchant leaves with the others for the first step."""

    merchant: str
    escrow: bytes
    head: bytes


@dataclass(frozen=True)
class SumRequest:
    """Coordinator to merchant: your part of one noisy sum."""

    run: str
    contract: str  # SHA-256
    stage: str
    round: int
    attempt: int
    customers_per_merchant: float  # from the census, noisy; 0 before it
    session: int  # the last four are of a secure sum; 0 and empty for a plain one
    step: int
    active: bytes
    boxes: bytes
    countersigned: bytes
    parameters: Parameters


@dataclass(frozen=True)
class SumAnswer:
    """The merchant's noisy part in lattice steps, or why there is none."""

    merchant: str
    refusal: str
    again: bool  # after a refusal: this merchant may be asked for another sum
    escrow: bytes  # for the next step of a session; empty for a plain sum
    head: bytes  # of its ledger, with this release; empty where there is none
    vector: RingVector


@dataclass(frozen=True)
class Confirm:
    """Coordinator to merchant: whose vectors are in the sum."""

    session: int
    step: int
    survivors: bytes


@dataclass(frozen=True)
class Confirmed:
    """The merchant's confirmations for the other survivors."""

    merchant: str
    confirmations: bytes


@dataclass(frozen=True)
class Reveal:
    """Coordinator to merchant: the others' confirmations; reveal your shares."""

    session: int
    step: int
    confirmed: bytes
    confirmations: bytes


@dataclass(frozen=True)
class Revealed:
    """The merchant's shares of the step's secrets."""

    merchant: str
    shares: bytes


WireMessage = (
    Attest | Attested | Advertise | Advertised | Share | Shared
    | SumRequest | SumAnswer | Confirm | Confirmed | Reveal | Revealed
)  # fmt: skip
M = TypeVar(
    "M", Attest, Attested, Advertise, Advertised, Share, Shared,
    SumRequest, SumAnswer, Confirm, Confirmed, Reveal, Revealed,
)  # fmt: skip


_HINTS: dict[str, dict[str, Any]] = {
    kind.__name__: get_type_hints(kind) for kind in get_args(WireMessage)
}


def pack(message: WireMessage) -> RecordDict:
    """Return the message as a Flower record.

    A vector is bytes among the other fields, not one of Flower's arrays: an array is three
    objects more that each travel in two requests of their own.
    """
    fields: dict[str, Any] = {"type": type(message).__name__}
    for name, value in vars(message).items():
        if isinstance(value, np.ndarray):
            fields[_DTYPE] = value.dtype.name if value.ndim == 1 else f"{value.ndim} axes"
            fields[_VECTOR] = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        else:
            fields[name] = value
    config = ConfigRecord({"protocol": PROTOCOL, _FIELDS: msgpack.packb(fields)})
    return RecordDict({_CONFIG: config})


def unpack(kind: type[M], content: RecordDict) -> M:
    """Read a message of one kind.

    Raises:
        WireError: Another protocol version, a missing field, a wrong type, size or value; names
            the field.
    """
    fields = _fields(content, kind.__name__)
    values: dict[str, Any] = {}
    for name, hint in _HINTS[kind.__name__].items():
        dtypes = _DTYPES.get(hint)
        values[name] = _vector(fields, dtypes) if dtypes else _READERS[hint](fields.get(name), name)
    return kind(**values)


def fingerprint(message: WireMessage) -> str:
    """Return what tells a message from every other one, as 64 hexadecimal digits.

    What the witness countersigned is left out: it changes when the same question is asked again.
    """
    digest = hashlib.sha256(type(message).__name__.encode())
    for name, value in vars(message).items():
        if name == "countersigned":
            continue
        if isinstance(value, np.ndarray):
            parts = [value.dtype.str.encode(), value.tobytes()]
        elif isinstance(value, list):
            parts = list(value)
        else:
            parts = [value if isinstance(value, bytes) else repr(value).encode()]
        for part in (name.encode(), len(parts).to_bytes(4, "big"), *parts):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def _fields(content: RecordDict, expected: str) -> dict[str, Any]:
    config = content.get(_CONFIG)
    if not isinstance(config, ConfigRecord):
        raise WireError(f"field '{_CONFIG}': the message has no such record; is the sender Hansa?")
    if config.get("protocol") != PROTOCOL:
        raise WireError(
            f"field 'protocol': this side speaks version {PROTOCOL}, the message has another; "
            "install the same version of hansa on both sides"
        )
    fields = _decoded(config.get(_FIELDS))
    if fields.get("type") != expected:
        raise WireError(f"field 'type': expected {expected}")
    return fields


def _decoded(encoded: object) -> dict[str, Any]:
    fields: object = None
    if isinstance(encoded, bytes):
        with suppress(ValueError):  # all that it raises for bytes that are not MessagePack's
            fields = msgpack.unpackb(
                encoded, list_hook=_flat, object_hook=_of_flat, **_MOST_DECODED
            )
    if not isinstance(fields, dict):
        raise WireError(f"field '{_FIELDS}': expected names and values as MessagePack")
    return fields


def _flat(values: list[Any]) -> list[Any]:
    """Return a list without lists or maps in it: a few bytes of those would make a lot."""
    if any(isinstance(value, list | dict) for value in values):
        raise ValueError("a list in a list")
    return values


def _of_flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a map without maps in it."""
    if any(isinstance(value, dict) for value in fields.values()):
        raise ValueError("a map in a map")
    return fields


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise WireError(f"field '{name}': expected a text")
    if len(value) > _MAX_TEXT:
        raise WireError(f"field '{name}': expected at most {_MAX_TEXT} characters")
    return value


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise WireError(f"field '{name}': expected a whole number >= 0")
    return value


def _number(value: object, name: str) -> float:
    if not isinstance(value, float) or not 0 <= value < float("inf"):
        raise WireError(f"field '{name}': expected a finite number >= 0")
    return value


def _truth(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise WireError(f"field '{name}': expected true or false")
    return value


def _bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise WireError(f"field '{name}': expected bytes")
    if len(value) > _MAX_BYTES:
        raise WireError(f"field '{name}': expected at most {_MAX_BYTES} bytes")
    return value


def _parts(value: object, name: str) -> list[bytes]:
    if not isinstance(value, list) or len(value) > _MAX_PARTS:
        raise WireError(f"field '{name}': expected a list of at most {_MAX_PARTS}")
    return [_bytes(part, name) for part in value]


_READERS: dict[Any, Any] = {
    str: _text,
    int: _whole,
    float: _number,
    bool: _truth,
    bytes: _bytes,
    list[bytes]: _parts,
}


def _vector(fields: dict[str, Any], dtypes: tuple[str, ...]) -> np.ndarray:
    """Read a vector: little-endian numbers, one behind the other."""
    name, raw = fields.get(_DTYPE), fields.get(_VECTOR)
    if name not in dtypes:
        raise WireError(f"field '{_VECTOR}': expected one axis of {' or '.join(dtypes)}")
    dtype = np.dtype(name).newbyteorder("<")
    if not isinstance(raw, bytes) or len(raw) % dtype.itemsize:
        raise WireError(f"field '{_VECTOR}': expected whole numbers of type {name}, as bytes")
    return np.frombuffer(raw, dtype=dtype).astype(np.dtype(name))
