"""A merchant that lies: left out with a reason, never counted, and never the end of the program."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import create_app
from common.contract import Contract
from common.errors import RunError
from common.wire import (
    Advertised,
    Attested,
    Confirmed,
    Revealed,
    Shared,
    SumAnswer,
    SumRequest,
    pack,
    unpack,
)
from server.archive import open_archive
from server.coordinator import Coordinator
from server.outcome import Outcome
from simulations.datasets import Dataset, load
from simulations.federation import assemble
from simulations.grid import InProcessGrid
from simulations.members import Federation
from tests.wire_fields import closed, opened
from tests.witnessed import charges_of, entries_of

NAMES = [f"merchant-{number:04d}" for number in range(4)]
LIAR = 1  # number of the merchant that lies

only_plain = pytest.mark.parametrize("secure", [False], ids=["plain"], indirect=True)
only_secure = pytest.mark.parametrize("secure", [True], ids=["secure"], indirect=True)

Content = Callable[[RecordDict], RecordDict]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate four merchants."""
    return load("synthetic", preset="smoke", merchants=4)


@pytest.fixture(params=[False, True], ids=["plain", "secure"])
def secure(request: pytest.FixtureRequest) -> bool:
    """Say whether sums are secure; both in turn."""
    return bool(request.param)


@pytest.fixture
def contract(dataset: Dataset, secure: bool) -> Contract:
    """Give a contract of one round that can do without one merchant."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.02},
        model={"family": "linear"},
        training={"rounds": 1},
        aggregation={
            "min_survivors": 3,
            "secure": secure,
            "max_customers": 1_000_000,
            "ring_bits": 32,
        },
    )


@pytest.fixture
def federation(dataset: Dataset, contract: Contract, tmp_path: Path) -> Federation:
    """Assemble the merchants."""
    return assemble(dataset, contract, tmp_path, 1)


def run_with(federation: Federation, lie: Content, kind: str = "train.update") -> Outcome:
    """Run the coordinator while one merchant's answers of a kind are replaced."""
    honest = create_app(lambda c: federation.members[int(c.node_config["partition-id"])].worker)

    def client(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        lies = context.node_config["partition-id"] == LIAR and message.metadata.message_type == kind
        return Message(lie(reply.content), reply_to=message) if lies else reply

    grid = InProcessGrid(client, len(federation.members), {})  # type: ignore[arg-type]
    archive = open_archive(federation.server)
    return Coordinator(
        grid, federation.contract, lambda _report: None, federation.enrolled, archive
    ).run()


def with_vector(vector: np.ndarray, **others: Any) -> Content:
    """Answer with another vector."""

    def lie(content: RecordDict) -> RecordDict:
        return pack(replace(unpack(SumAnswer, content), vector=vector, **others))

    return lie


def with_bytes(data: Any, dtype: Any = "uint32") -> Content:
    """Answer with a vector whose bytes are not what their description says."""

    def lie(content: RecordDict) -> RecordDict:
        return closed({**opened(content), "vector": data, "vector_dtype": dtype})

    return lie


def full(value: float, length: int = 56, dtype: str = "uint32") -> np.ndarray:
    """Fill a vector."""
    return np.full(length, value, dtype=dtype)


LIES: dict[str, Content] = {
    "too short": with_vector(full(1, 55)),
    "too long": with_vector(full(1, 57)),
    "empty": with_vector(full(1, 0)),
    "two axes": with_vector(np.zeros((7, 8), dtype=np.uint32)),
    "signed": with_vector(full(-1, dtype="int32")),
    "signed and wide": with_vector(full(-(2**63), dtype="int64")),
    "a wider ring": with_vector(full(2**64 - 1, dtype="uint64")),
    "a narrower ring": with_vector(full(1, dtype="uint16")),
    "not a number": with_vector(full(np.nan, dtype="float64")),
    "floats": with_vector(full(1.0, dtype="float64")),
    "complex": with_vector(full(1, dtype="complex128")),
    "another's name": with_vector(full(1), merchant=NAMES[0]),
    "nobody's name": with_vector(full(1), merchant=""),
    "no record": lambda _content: RecordDict(),
    "another record": lambda _content: RecordDict({"x": ConfigRecord({"y": 1})}),
    "another message": lambda _content: pack(Attested(NAMES[LIAR], "", False, 0)),
    "another protocol": lambda content: closed({**opened(content), "protocol": 99}),
    "a name of numbers": lambda content: closed({**opened(content), "merchant": 3}),
    "garbage": with_bytes(b"\x00\xff" * 100),
    "no bytes": with_bytes(b""),
    "half a number": with_bytes(bytes(4 * 56 - 1)),
    "an archive": with_bytes(b"PK\x03\x04" + bytes(200)),
    "a pickle": with_bytes(b"\x80\x04K\x01."),
    "a text": with_bytes("1" * 224),
    "a list": with_bytes([1] * 56),
    "a description of objects": with_bytes(bytes(4 * 56), "object"),
    "a description that numpy would read": with_bytes(bytes(4 * 56), "<u4"),
    "a description of a record": with_bytes(bytes(4 * 56), "u2,u2"),
    "a description that is none": with_bytes(bytes(4 * 56), 4),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_is_left_out_with_a_reason(federation: Federation, lie: Content) -> None:
    """The others' sum goes on without it."""
    outcome = run_with(federation, lie)
    assert outcome.cohorts == [3]
    assert outcome.failures[NAMES[LIAR]]
    assert np.isfinite(outcome.parameters).all()


@pytest.mark.parametrize("kind", ["query.census", "evaluate.confusion", "query.profile"])
def test_a_lie_in_another_stage_is_left_out_too(
    federation: Federation, kind: str, secure: bool
) -> None:
    """Every sum is checked."""
    outcome = run_with(federation, with_vector(full(2**31, 99)), kind)
    assert NAMES[LIAR] in outcome.failures
    assert outcome.profile is not None
    assert (
        NAMES[LIAR]
        not in {
            "query.census": outcome.profile.merchants if secure else (),
            "evaluate.confusion": outcome.evaluations[-1].merchants,
            "query.profile": outcome.profile.merchants,
        }[kind]
    )


@pytest.mark.parametrize(
    "lie",
    [
        lambda _content: RecordDict(),
        lambda content: pack(SumAnswer(NAMES[LIAR], "", False, b"", b"", full(1))),
        lambda content: RecordDict({"hansa": ConfigRecord({"type": "Attested"})}),
    ],
)
def test_an_attestation_that_is_none_keeps_a_node_out(federation: Federation, lie: Content) -> None:
    """It is noted under its node, because it has no name yet."""
    outcome = run_with(federation, lie, "query.attest")
    assert NAMES[LIAR] not in outcome.merchants
    assert list(outcome.failures) == ["node 3"]


def test_two_nodes_cannot_share_a_name(federation: Federation) -> None:
    """The second is left out, so that nobody is counted twice."""
    stolen = Attested(NAMES[0], "", False, 0)
    outcome = run_with(federation, lambda _c: pack(stolen), "query.attest")
    assert outcome.merchants == [NAMES[0], NAMES[2], NAMES[3]]
    assert "a second node called itself" in outcome.failures["node 3"]
    assert outcome.cohorts == [3]


@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 2**32 - 1])
def test_a_huge_but_admitted_vector_does_not_break_the_run(
    federation: Federation, value: int
) -> None:
    """The sum is exact, the step is bounded by Adam, and what is published is finite."""
    outcome = run_with(federation, with_vector(full(value)))
    assert outcome.cohorts == [4]
    assert np.abs(outcome.parameters).max() < 1.0


@only_plain
@pytest.mark.parametrize("value", [2**30, 2**31, 2**32 - 1])
def test_a_false_census_does_not_break_the_run(federation: Federation, value: int) -> None:
    """Customers are never counted as fewer than one."""
    outcome = run_with(federation, with_vector(full(value, 1)), "query.census")
    assert outcome.customers >= 1.0
    assert np.isfinite(outcome.parameters).all()


@only_plain
def test_a_census_beyond_the_contract_ends_the_run(federation: Federation) -> None:
    """Sums could be larger than the ring, so nobody is asked for a further one."""
    with pytest.raises(RunError, match="room for 1,000,000 customers"):
        run_with(federation, with_vector(full(3 * 2**29, 1)), "query.census")
    assert charged(federation, 0) == [("census", 0)]


HEADS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _honest: b"",
    "one byte less": lambda honest: honest[:-1],
    "one byte more": lambda honest: honest + b"\x00",
    "zeros": lambda honest: bytes(len(honest)),
    "another number": lambda honest: honest[:7] + bytes([honest[7] ^ 1]) + honest[8:],
    "another link": lambda honest: honest[:16] + bytes([honest[16] ^ 1]) + honest[17:],
    "another signature": lambda honest: honest[:48] + bytes([honest[48] ^ 1]) + honest[49:],
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", ["query.advertise", "train.update"])
def test_a_false_head_is_left_out_with_a_reason(
    federation: Federation, kind: str, change: Callable[[bytes], bytes]
) -> None:
    """Who does not show its ledger to the witness is in no sum."""

    def lie(content: RecordDict) -> RecordDict:
        answer = unpack(Advertised if kind == "query.advertise" else SumAnswer, content)
        return pack(replace(answer, head=change(answer.head)))

    outcome = run_with(federation, lie, kind)
    assert "field 'head'" in outcome.failures[NAMES[LIAR]]
    assert outcome.cohorts == [3]


SESSION = {
    "query.advertise": (Advertised, "advert"),
    "query.share": (Shared, "escrow"),
    "train.update": (SumAnswer, "escrow"),
    "query.confirm": (Confirmed, "confirmations"),
    "query.reveal": (Revealed, "shares"),
}
SESSION_LIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _honest: b"",
    "one byte less": lambda honest: honest[:-1],
    "one byte more": lambda honest: honest + b"\x00",
    "another size": lambda _honest: bytes(7),
}


def with_field(kind: str, change: Callable[[bytes], bytes], **others: Any) -> Content:
    """Answer with other bytes in the field that the session needs."""
    message, name = SESSION[kind]

    def lie(content: RecordDict) -> RecordDict:
        honest = unpack(message, content)
        return pack(replace(honest, **{name: change(getattr(honest, name))}, **others))

    return lie


@only_secure
@pytest.mark.parametrize("change", SESSION_LIES.values(), ids=SESSION_LIES.keys())
@pytest.mark.parametrize("kind", SESSION)
def test_a_malformed_part_of_a_session_is_left_out_with_a_reason(
    federation: Federation, kind: str, change: Callable[[bytes], bytes]
) -> None:
    """Three of four set up, add and unmask without it."""
    outcome = run_with(federation, with_field(kind, change), kind)
    assert "field '" in outcome.failures[NAMES[LIAR]]
    assert outcome.cohorts == [4 if kind in {"query.confirm", "query.reveal"} else 3]
    assert np.isfinite(outcome.parameters).all()


@only_secure
@pytest.mark.parametrize("kind", SESSION)
def test_nobody_speaks_for_another_in_a_session(federation: Federation, kind: str) -> None:
    """An answer in another's name is no answer."""
    outcome = run_with(federation, with_field(kind, lambda x: x, merchant=NAMES[0]), kind)
    assert "differs from what the node attested" in outcome.failures[NAMES[LIAR]]


def flipped(raw: bytes) -> bytes:
    """Change every byte."""
    return bytes(byte ^ 0xFF for byte in raw)


@only_secure
def test_false_shares_are_told_and_passed_over(
    federation: Federation, dataset: Dataset, tmp_path: Path
) -> None:
    """Three good shares restore every secret and the right sum; who lied is named."""
    outcome = run_with(federation, with_field("query.reveal", flipped), "query.reveal")
    assert outcome.cohorts == [4]
    assert any(NAMES[LIAR] in name for name in outcome.failures)
    again = assemble(dataset, federation.contract, tmp_path / "again", 1)
    honest = run_with(again, lambda content: content)
    assert not honest.failures
    assert outcome.parameters.tobytes() == honest.parameters.tobytes()


def charged(federation: Federation, number: int) -> list[tuple[str, int]]:
    """Return stage and attempt of all that a merchant was charged for."""
    ledger = federation.members[number].worker.ledger
    assert entries_of(ledger, "refuse") == []
    return [(stage, attempt) for stage, _, attempt in charges_of(ledger)]


@only_secure
def test_bad_boxes_cost_the_liar_and_one_attempt(federation: Federation) -> None:
    """Nobody else is charged for it; the next session leaves the liar out; the run ends well."""
    outcome = run_with(federation, with_field("query.share", flipped), "query.share")
    assert outcome.cohorts == [3]
    assert outcome.survivors[:2] == [None, 3]
    assert outcome.profile is not None
    assert NAMES[LIAR] not in outcome.profile.merchants
    assert any(f"'{NAMES[LIAR]}' left a box" in reason for reason in outcome.failures.values())
    assert charged(federation, LIAR) == [("census", 0)]
    for number in {*range(4)} - {LIAR}:
        assert charged(federation, number) == [
            ("census", 1),
            ("update", 0),
            ("evaluation", 0),
            ("profile", 0),
        ]


@only_secure
def test_wrong_confirmations_cost_the_liar_only(federation: Federation) -> None:
    """The sum that it is in is unmasked without its word, and all others are without it."""
    outcome = run_with(federation, with_field("query.confirm", flipped), "query.confirm")
    assert outcome.survivors == [4, 3, 3, 3]
    assert outcome.cohorts == [3]
    assert outcome.profile is not None
    assert NAMES[LIAR] not in outcome.profile.merchants
    assert any(f"'{NAMES[LIAR]}' did not confirm" in r for r in outcome.failures.values())
    assert charged(federation, LIAR) == [("census", 0)]
    for number in {*range(4)} - {LIAR}:
        assert [attempt for _, attempt in charged(federation, number)] == [0, 0, 0, 0]


def test_a_refusal_of_many_lines_is_kept_out_of_control(federation: Federation) -> None:
    """What a stranger writes cannot move the terminal's cursor when the run ends in an error."""
    lie = with_vector(full(0, 0), refusal="\x1b[2J\x1b]0;pwned\x07\nhansa: all is well")
    federation = replace(federation, members=federation.members[:3])
    with pytest.raises(RunError) as error:
        run_with(federation, lie)
    assert "pwned" in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_liar_cannot_make_others_pay_twice(federation: Federation) -> None:
    """Its lies leave the sum with enough parts, so no attempt is repeated."""
    run_with(federation, LIES["garbage"])
    stages = [stage for stage, _ in charged(federation, 0)]
    assert stages == ["census", "update", "evaluation", "profile"]


def test_replayed_answers_are_those_of_another_stage(federation: Federation) -> None:
    """An answer of the census sent as an update has the wrong size."""
    kept: list[RecordDict] = []

    def remember(content: RecordDict) -> RecordDict:
        kept.append(content)
        return content

    run_with(federation, remember, "query.census")
    assert unpack(SumAnswer, kept[0]).vector.shape == (1,)
    with pytest.raises(Exception, match="SumRequest"):
        unpack(SumRequest, kept[0])
