"""Typed, versioned messages <-> Flower records. The only place that knows record keys."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from jaxtyping import Float, Int

from common.errors import WireError

PROTOCOL = 1
_MAX_TEXT = 1000
_CONFIG, _ARRAYS, _VECTOR = "hansa", "hansa.arrays", "vector"


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


@dataclass(frozen=True)
class SumRequest:
    """Coordinator to merchant: your part of one noisy sum."""

    run: str
    contract: str  # SHA-256
    stage: str
    round: int
    attempt: int
    customers_per_merchant: float  # from the census, noisy; 0 before it
    parameters: Float[np.ndarray, " P"]


@dataclass(frozen=True)
class SumAnswer:
    """The merchant's noisy part in lattice steps, or why there is none."""

    merchant: str
    refusal: str
    vector: Int[np.ndarray, " P"]


def pack(message: Attest | Attested | SumRequest | SumAnswer) -> RecordDict:
    """Return the message as a Flower record."""
    config: dict[str, str | int | float] = {"protocol": PROTOCOL, "type": type(message).__name__}
    arrays: dict[str, Array] = {}
    for name, value in vars(message).items():
        if isinstance(value, np.ndarray):
            arrays[_VECTOR] = Array(value)
        else:
            config[name] = value
    records = RecordDict({_CONFIG: ConfigRecord(config)})  # type: ignore[arg-type]
    if arrays:
        records[_ARRAYS] = ArrayRecord(arrays)
    return records


def unpack_attest(content: RecordDict) -> Attest:
    """Read an `Attest`.

    Raises:
        WireError: Another protocol version, a missing field or a wrong type; names the field.
    """
    config = _config(content, "Attest")
    return Attest(_text(config, "run"), _text(config, "contract"))


def unpack_attested(content: RecordDict) -> Attested:
    """Read an `Attested`; raises `WireError` like `unpack_attest`."""
    config = _config(content, "Attested")
    repeatable = config.get("repeatable")
    if not isinstance(repeatable, bool):
        raise WireError("field 'repeatable': expected true or false")
    return Attested(_text(config, "merchant"), _text(config, "refusal"), repeatable)


def unpack_sum_request(content: RecordDict) -> SumRequest:
    """Read a `SumRequest`; raises `WireError` like `unpack_attest`."""
    config = _config(content, "SumRequest")
    per_merchant = config.get("customers_per_merchant")
    if not isinstance(per_merchant, float) or not 0 <= per_merchant < float("inf"):
        raise WireError("field 'customers_per_merchant': expected a finite number >= 0")
    return SumRequest(
        _text(config, "run"),
        _text(config, "contract"),
        _text(config, "stage"),
        _whole(config, "round"),
        _whole(config, "attempt"),
        per_merchant,
        _vector(content, "float64"),
    )


def unpack_sum_answer(content: RecordDict) -> SumAnswer:
    """Read a `SumAnswer`; raises `WireError` like `unpack_attest`."""
    config = _config(content, "SumAnswer")
    return SumAnswer(_text(config, "merchant"), _text(config, "refusal"), _vector(content, "int64"))


def _config(content: RecordDict, expected: str) -> dict[str, Any]:
    record = content.get(_CONFIG)
    if not isinstance(record, ConfigRecord):
        raise WireError(f"the message has no '{_CONFIG}' record; is the sender Hansa?")
    config = dict(record)
    if config.get("protocol") != PROTOCOL:
        raise WireError(
            f"field 'protocol': this side speaks version {PROTOCOL}, the message has another; "
            "install the same version of hansa on both sides"
        )
    if config.get("type") != expected:
        raise WireError(f"field 'type': expected {expected}")
    return config


def _text(config: dict[str, Any], name: str) -> str:
    value = config.get(name)
    if not isinstance(value, str):
        raise WireError(f"field '{name}': expected a text")
    if len(value) > _MAX_TEXT:
        raise WireError(f"field '{name}': expected at most {_MAX_TEXT} characters")
    return value


def _whole(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise WireError(f"field '{name}': expected a whole number >= 0")
    return value


def _vector(content: RecordDict, dtype: str) -> np.ndarray:
    record = content.get(_ARRAYS)
    if not isinstance(record, ArrayRecord) or list(record) != [_VECTOR]:
        raise WireError(f"field '{_VECTOR}': expected one array")
    array = record[_VECTOR]
    if array.dtype != dtype or len(array.shape) != 1 or array.stype != "numpy.ndarray":
        raise WireError(f"field '{_VECTOR}': expected one axis of {dtype}")
    length = array.shape[0]
    header = _npy_header(length, dtype)
    if len(array.data) != len(header) + 8 * length or not array.data.startswith(header):
        raise WireError(f"field '{_VECTOR}': the bytes and their description differ")
    return np.frombuffer(array.data, dtype=dtype, offset=len(header)).copy()


def _npy_header(length: int, dtype: str) -> bytes:
    """Return how numpy starts a vector's file: hostile headers are compared, never parsed."""
    header = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()
