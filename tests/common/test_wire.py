"""Tests of messages: round trips through Flower's protobuf, and hostile ones."""

import math
from dataclasses import replace
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import WireError
from common.wire import (
    PROTOCOL,
    Advertise,
    Advertised,
    Attest,
    Attested,
    Confirm,
    Confirmed,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
    WireMessage,
    fingerprint,
    pack,
    unpack,
)
from tests.wire_fields import closed, opened

texts = st.text(st.characters(codec="utf-8"), max_size=20)
wholes = st.integers(0, 2**31 - 1)
lengths = st.integers(0, 9)
floats = arrays.arrays(np.float64, lengths, elements=st.floats(allow_nan=False))
rings = st.sampled_from([np.uint32, np.uint64]).flatmap(lambda d: arrays.arrays(d, lengths))
averages = st.floats(0, 1e12)
raw = st.binary(max_size=40)
MESSAGES = st.one_of(
    st.builds(Attest, texts, texts),
    st.builds(Attested, texts, texts, st.booleans(), wholes),
    st.builds(Advertise, texts, texts, wholes, raw),
    st.builds(Advertised, texts, raw, raw),
    st.builds(Share, texts, texts, wholes, raw, st.lists(raw, max_size=5)),
    st.builds(Shared, texts, raw, raw),
    st.builds(
        SumRequest,
        texts,
        texts,
        texts,
        wholes,
        wholes,
        averages,
        wholes,
        wholes,
        raw,
        raw,
        raw,
        floats,
    ),
    st.builds(SumAnswer, texts, texts, st.booleans(), raw, raw, rings),
    st.builds(Confirm, wholes, wholes, raw),
    st.builds(Confirmed, texts, raw),
    st.builds(Reveal, wholes, wholes, raw, raw),
    st.builds(Revealed, texts, raw),
)
PARAMETERS = np.array([1.0, 2.0, 3.0])
REQUEST = SumRequest(
    "run", "c" * 64, "update", 3, 1, 40.5, 2, 5, b"\x07", b"box", b"seen", PARAMETERS
)
PLAIN = SumRequest("run", "c" * 64, "update", 3, 1, 40.5, 0, 0, b"", b"", b"seen", PARAMETERS)
ANSWER = SumAnswer("shop", "", False, b"escrow", b"head", np.array([1, 2, 3], dtype=np.uint32))
WIDE = SumAnswer("shop", "", False, b"", b"head", np.array([1, 2, 2**64 - 1], dtype=np.uint64))
SHARE = Share("r", "c", 1, b"seen", [b"one", b"two"])
ONE_OF_EACH = [
    Attest("r", "c"),
    Attested("m", "", False, 3),
    Advertise("r", "c", 1, b"seen"),
    Advertised("m", b"keys", b"head"),
    SHARE,
    Shared("m", b"shares", b"head"),
    REQUEST,
    PLAIN,
    ANSWER,
    WIDE,
    Confirm(1, 2, b"\x03"),
    Confirmed("m", b"codes"),
    Reveal(1, 2, b"\x03", b"codes"),
    Revealed("m", b"shares"),
]


def carried(content: RecordDict) -> RecordDict:
    """Carry a record through Flower's protobuf bytes."""
    raw = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(Proto.FromString(raw))


def changed(message: Any, **fields: Any) -> RecordDict:
    """Pack a message and change fields of it; None takes one away."""
    found = {**opened(pack(message)), **fields}
    return carried(closed({name: value for name, value in found.items() if value is not None}))


def with_vector(raw: Any, dtype: Any = "uint32") -> RecordDict:
    """Pack an answer around other bytes of a vector; None takes a field away."""
    return changed(ANSWER, vector=raw, vector_dtype=dtype)


@settings(deadline=None)
@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    """Every message comes back from Flower's bytes as it was."""
    back = unpack(type(message), carried(pack(message)))
    for name, value in vars(message).items():
        found = getattr(back, name)
        np.testing.assert_array_equal(found, value)
        assert type(found) is type(value)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype


def test_every_kind_is_tested() -> None:
    """A message that is added to the protocol is added here."""
    assert {type(message) for message in ONE_OF_EACH} == set(get_args(WireMessage))


def test_vector_is_writable_and_its_own() -> None:
    """A received vector can be worked on in place."""
    vector = unpack(SumAnswer, carried(pack(ANSWER))).vector
    vector += 1
    assert vector.tolist() == [2, 3, 4]


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
class TestEveryMessage:
    """Faults that any message may have."""

    @pytest.mark.parametrize("version", [PROTOCOL - 1, PROTOCOL + 1])
    def test_version(self, message: Any, version: int) -> None:
        """Another protocol version is told apart from everything else."""
        with pytest.raises(WireError, match="field 'protocol'"):
            unpack(type(message), changed(message, protocol=version))

    def test_type(self, message: Any) -> None:
        """A message of another type is refused."""
        with pytest.raises(WireError, match="field 'type'"):
            unpack(type(message), changed(message, type="Other"))

    def test_missing_field(self, message: Any) -> None:
        """Every field is needed, and the missing one is named."""
        for name, value in vars(message).items():
            if not isinstance(value, np.ndarray):
                with pytest.raises(WireError, match=f"field '{name}'"):
                    unpack(type(message), changed(message, **{name: None}))

    def test_mistyped_field(self, message: Any) -> None:
        """A field of another type is named, and its value is not repeated."""
        for name, value in vars(message).items():
            if not isinstance(value, np.ndarray):
                wrong: Any = "secret" if isinstance(value, bytes | list) else b"secret"
                with pytest.raises(WireError, match=f"field '{name}'") as caught:
                    unpack(type(message), changed(message, **{name: wrong}))
                assert "secret" not in str(caught.value)

    def test_not_from_hansa(self, message: Any) -> None:
        """Another app's record is refused in words."""
        with pytest.raises(WireError, match="is the sender Hansa"):
            unpack(type(message), RecordDict({"metrics": ConfigRecord({"x": 1})}))

    def test_record_of_another_kind(self, message: Any) -> None:
        """A record of the right name and the wrong kind is refused."""
        with pytest.raises(WireError, match="is the sender Hansa"):
            unpack(type(message), RecordDict({"hansa": MetricRecord()}))

    @pytest.mark.parametrize(
        "fields",
        [None, "text", 3, [b"x"], b"", b"\xc1", b"\x80\x80", b"\x91" * 9999, msgpack.packb([1])],
        ids=lambda fields: repr(fields)[:12],
    )
    def test_fields_that_are_none(self, message: Any, fields: Any) -> None:
        """What is not MessagePack, not whole, or no map, holds no fields."""
        config = {"protocol": PROTOCOL, **({} if fields is None else {"fields": fields})}
        with pytest.raises(WireError, match="field 'fields'"):
            unpack(type(message), carried(RecordDict({"hansa": ConfigRecord(config)})))


class TestNumbers:
    """Ranges of numbers."""

    @pytest.mark.parametrize("name", ["round", "attempt", "session", "step"])
    @pytest.mark.parametrize("value", [-1, 2**31, 1.0, True, "1"])
    def test_wholes(self, name: str, value: Any) -> None:
        """Rounds, attempts, sessions and steps are whole numbers from 0 to 2**31."""
        with pytest.raises(WireError, match=f"field '{name}'"):
            unpack(SumRequest, changed(REQUEST, **{name: value}))

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1, "1"])
    def test_average(self, value: Any) -> None:
        """The average number of customers is a finite number."""
        with pytest.raises(WireError, match="customers_per_merchant"):
            unpack(SumRequest, changed(REQUEST, customers_per_merchant=value))


def ring(*numbers: int) -> np.ndarray:
    """Return ring integers."""
    return np.array(numbers, dtype=np.uint32)


def test_endless_text() -> None:
    """A text longer than any that the protocol needs is refused before it is stored."""
    with pytest.raises(WireError, match="field 'run': expected at most 1000"):
        unpack(SumRequest, changed(REQUEST, run="x" * 1001))


@pytest.mark.parametrize(
    "inner",
    [[[]], [{}], {"a": {}}, [[[]] * 10_000] * 100, [{"a": [1]}] * 10_000, {"a": [{}]}, {"a": [[]]}],
)
def test_lists_in_lists(inner: Any) -> None:
    """Nothing that the protocol knows is so deep; a few bytes of it would fill the memory."""
    message = Share("run", "contract", 1, b"", [b"advert"])
    content = closed({**opened(pack(message)), "roster": inner})
    with pytest.raises(WireError, match="field 'fields'"):
        unpack(Share, content)


def test_endless_bytes() -> None:
    """So are bytes, alone and in a list, and lists."""
    with pytest.raises(WireError, match="field 'boxes': expected at most 1048576"):
        unpack(SumRequest, changed(REQUEST, boxes=bytes(2**20 + 1)))
    with pytest.raises(WireError, match="field 'roster': expected at most 1048576"):
        unpack(Share, changed(SHARE, roster=[b"", bytes(2**20 + 1)]))
    with pytest.raises(WireError, match="field 'roster': expected a list of at most 1000"):
        unpack(Share, changed(SHARE, roster=[b""] * 1001))
    with pytest.raises(WireError, match="field 'fields'"):
        unpack(Share, changed(SHARE, roster=[b""] * 10_001))
    with pytest.raises(WireError, match="field 'fields'"):
        unpack(Share, changed(SHARE, **{f"f{n}": True for n in range(100)}))


@pytest.mark.parametrize("value", [["one", "two"], [1, 2], [1.0], b"one"], ids=str)
def test_a_list_of_something_else(value: Any) -> None:
    """A roster is a list of bytes."""
    with pytest.raises(WireError, match="field 'roster'"):
        unpack(Share, changed(SHARE, roster=value))


class TestVectors:
    """Vectors that are not what their description says."""

    @pytest.mark.parametrize(
        "array",
        [
            np.array([1.0, 2.0]),
            np.array([1, 2]),
            np.array([1, 2], dtype=np.int32),
            np.array([1, 2], dtype=np.uint16),
            np.array([[1, 2]], dtype=np.uint32),
            np.array(1, dtype=np.uint64),
            np.array([True]),
        ],
        ids=lambda array: f"{array.dtype.str}{array.shape}",
    )
    def test_dtype_and_axes(self, array: np.ndarray) -> None:
        """Only one axis of ring integers is an answer."""
        with pytest.raises(WireError, match="field 'vector'"):
            unpack(SumAnswer, carried(pack(replace(ANSWER, vector=array))))

    def test_byte_order(self) -> None:
        """Numbers travel with the lowest byte first, whatever the sender's machine."""
        other = replace(ANSWER, vector=np.array([1, 2**24], dtype=">u4"))
        content = carried(pack(other))
        assert opened(content)["vector"] == b"\1\0\0\0\0\0\0\1"
        assert unpack(SumAnswer, content).vector.tolist() == [1, 2**24]

    @pytest.mark.parametrize("dtype", ["float32", "uint32", "int64"])
    def test_parameters(self, dtype: str) -> None:
        """A model is of 64-bit floats."""
        content = changed(REQUEST, vector=bytes(24), vector_dtype=dtype)
        with pytest.raises(WireError, match="one axis of float64"):
            unpack(SumRequest, content)

    @pytest.mark.parametrize("missing", ["vector", "vector_dtype"])
    def test_missing(self, missing: str) -> None:
        """An answer without a vector, or with one that is not described, is refused."""
        with pytest.raises(WireError, match="field 'vector'"):
            unpack(SumAnswer, changed(ANSWER, **{missing: None}))

    @pytest.mark.parametrize(
        "dtype",
        [
            "",
            "u4",
            "<u4",
            "uint32 ",
            "object",
            "O",
            "V4",
            "str",
            "float64",
            3,
            1.0,
            True,
            b"uint32",
        ],
    )
    def test_other_descriptions(self, dtype: Any) -> None:
        """A description is compared with those that are known, never made sense of."""
        with pytest.raises(WireError, match="field 'vector'"):
            unpack(SumAnswer, with_vector(bytes(12), dtype))

    @pytest.mark.parametrize("raw", [b"123", bytes(13), "text", 3, 1.0, True, [b"1234"], [1, 2]])
    def test_other_bytes(self, raw: Any) -> None:
        """Bytes that are no whole numbers, or no bytes, are refused."""
        with pytest.raises(WireError, match="field 'vector'"):
            unpack(SumAnswer, with_vector(raw))

    def test_a_vector_is_ours(self) -> None:
        """It can be written to, and no other message's bytes change with it."""
        content = pack(ANSWER)
        vector = unpack(SumAnswer, content).vector
        vector[0] = 99
        assert unpack(SumAnswer, content).vector.tolist() == [1, 2, 3]


class TestFuzz:
    """Random changes of packed messages."""

    @settings(max_examples=400, deadline=None)
    @given(MESSAGES, st.data())
    def test_bytes(self, message: Any, data: st.DataObject) -> None:
        """A mutated message is an error that we name, or a valid message; nothing else."""
        content = carried(pack(message))
        raw = bytearray(recorddict_to_proto(content).SerializeToString())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        try:
            mutated = recorddict_from_proto(Proto.FromString(bytes(raw)))
        except Exception:  # noqa: BLE001  # Flower refused it before us
            return
        try:
            back = unpack(type(message), mutated)
        except WireError:
            return
        assert type(back) is type(message)

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=40), st.sampled_from(["uint32", "uint64", "float64", "int32"]))
    def test_vector_bytes(self, raw: bytes, dtype: str) -> None:
        """Any bytes are refused, or are numbers and nothing else."""
        try:
            answer = unpack(SumAnswer, with_vector(raw, dtype))
        except WireError:
            return
        assert answer.vector.tobytes() == raw


class TestFingerprint:
    """What tells one question from another."""

    @given(MESSAGES, MESSAGES)
    @settings(deadline=None)
    def test_equal_for_equal_messages_only(self, one: WireMessage, other: WireMessage) -> None:
        """Also after both went over the wire; a countersignature makes no difference."""
        kind = type(one)
        assert fingerprint(unpack(kind, carried(pack(one)))) == fingerprint(one)
        same = repr(without_countersignature(one)) == repr(without_countersignature(other))
        assert (fingerprint(one) == fingerprint(other)) == same

    @pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
    def test_every_field_counts(self, message: Any) -> None:
        """All but the countersignature, which changes when a question is asked again."""
        for name, value in vars(message).items():
            if isinstance(value, np.ndarray):
                others: list[Any] = [value + value.dtype.type(1), value[:-1], value[:0]]
            elif isinstance(value, list):
                others = [value[::-1], [b"".join(value)], [*value, b""], []]
            elif isinstance(value, bool):
                others = [not value]
            elif isinstance(value, bytes | str):
                others = [value + ("x" if isinstance(value, str) else b"x")]
            else:
                others = [value + 1]
            for other in others:
                changed_one = replace(message, **{name: other})
                assert (fingerprint(changed_one) == fingerprint(message)) == (
                    name == "countersigned"
                ), name


def without_countersignature(message: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return kind and fields of a message, arrays as bytes with their type."""
    fields = [
        (name, (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value)
        for name, value in vars(message).items()
        if name != "countersigned"
    ]
    return type(message).__name__, fields
