"""Messages that are lost or answered with an error, anywhere: a sound result, or a RunError."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.accounting import epsilon
from common.bundle import read_bundle
from common.contract import Contract
from common.errors import RunError
from common.ledger import Ledger
from simulations.datasets import Dataset, load
from simulations.federation import assemble
from simulations.members import Federation
from simulations.result import SimulationResult
from simulations.run import simulate
from tests.witnessed import charges_of, entries_of

STAGES = ["query.attest", "query.census", "train.update", "evaluate.confusion", "query.profile"]
SESSION = ["query.advertise", "query.share", "query.confirm", "query.reveal"]
EVERYWHERE = [("plain", stage) for stage in [*STAGES, "query.advertise"]] + [
    ("secure", stage) for stage in [*STAGES, *SESSION]
]
NEEDED = 3

Fault = Callable[[Message], str | None]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate four merchants."""
    return load("synthetic", preset="smoke", merchants=4)


@pytest.fixture(scope="module", params=["plain", "secure"])
def contract(dataset: Dataset, request: pytest.FixtureRequest) -> Contract:
    """Give a contract of two rounds that can do without one merchant; both kinds of sums."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.001},
        model={"family": "linear"},
        training={"rounds": 2, "spare_rounds": 1},
        aggregation={"min_survivors": NEEDED, "secure": request.param == "secure"},
        publication={"evaluate_every": 1},
    )


@pytest.fixture(scope="module")
def federation(
    dataset: Dataset, contract: Contract, tmp_path_factory: pytest.TempPathFactory
) -> Federation:
    """Assemble the merchants once; every run gets ledgers of its own."""
    return assemble(dataset, contract, tmp_path_factory.mktemp("ledgers"), 1)


def new_coordinator(federation: Federation, folder: Path) -> Path:
    """Give the federation's coordinator a folder without a memory: its key alone."""
    (folder / "server").mkdir()
    return Path(shutil.copy(federation.server / "identity.key", folder / "server")).parent


def run_faulty(federation: Federation, fault: Fault, folder: Path) -> SimulationResult | str:
    """Simulate with new ledgers; return the result, or the text of the RunError."""
    for member in federation.members:
        party = member.worker._secure
        assert party is not None
        member.worker.ledger = Ledger(
            folder / "ledgers" / f"{member.merchant}.sqlite",
            member.worker.ledger.budget,
            party.identity,
            party.members.witness,
        )
    federation = replace(federation, server=new_coordinator(federation, folder))
    out = folder / "out"
    out.mkdir()
    try:
        return simulate(federation, out, lambda _record, _rounds: None, fault)
    except RunError as error:
        assert not (out / "bundle").exists()
        return str(error)
    finally:
        for member in federation.members:
            member.worker.ledger.close()


def check_sound(federation: Federation, found: SimulationResult | str, folder: Path) -> None:
    """Check that nothing was spent beyond what is told, and nothing counted below the minimum."""
    cap, delta = federation.contract.privacy.epsilon, federation.contract.privacy.delta
    spent = {}
    for member in federation.members:
        ledger = member.worker.ledger
        charges = charges_of(ledger)
        spent[member.merchant] = epsilon([charge.event for charge in charges.values()], delta)
        assert len(entries_of(ledger, "release")) == len(charges)  # no occasion twice
        assert ledger.account().spent() <= cap * (1 + 1e-9)
        ledger.close()
    assert max(spent.values()) <= cap * (1 + 1e-9)
    if isinstance(found, str):
        assert re.search(r"merchants take part|too few merchants|the contract promises", found)
        return
    assert {m.id: m.epsilon for m in found.merchants} == pytest.approx(spent)
    assert found.epsilon == max(spent.values())
    assert all(record.cohort >= NEEDED for record in found.rounds)
    told = (folder / "out" / "bundle" / "privacy.json").read_text()
    assert f'"run": "{found.run}"' in told
    assert np.isfinite(read_bundle(folder / "out" / "bundle").parameters).all()


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["silent", "the node has left"])
@pytest.mark.parametrize(("contract", "stage"), EVERYWHERE, indirect=["contract"])
def test_one_merchant_lost_in_a_stage_is_survived(
    federation: Federation, tmp_path: Path, stage: str, fate: str
) -> None:
    """Three of four are enough, in every stage."""

    def fault(message: Message) -> str | None:
        lost = message.metadata.dst_node_id == 3 and message.metadata.message_type == stage
        return fate if lost else None

    found = run_faulty(federation, fault, tmp_path)
    assert isinstance(found, SimulationResult)
    check_sound(federation, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["silent", "the node has left"])
@pytest.mark.parametrize(
    ("contract", "stage"),
    [(kind, stage) for kind, stage in EVERYWHERE if stage != "query.profile"],
    indirect=["contract"],
)
def test_two_merchants_lost_in_a_stage_end_the_run(
    federation: Federation, tmp_path: Path, stage: str, fate: str
) -> None:
    """Two of four are too few, and the error says for what and why."""

    def fault(message: Message) -> str | None:
        lost = message.metadata.dst_node_id < 4 and message.metadata.message_type == stage
        return fate if lost else None

    found = run_faulty(federation, fault, tmp_path)
    assert isinstance(found, str)
    assert "min_survivors" in found or "the contract promises" in found
    assert ("no answer within" if fate == "silent" else fate) in found
    if stage in {"query.attest", "query.advertise", "query.share"}:
        assert all(charges_of(member.worker.ledger) == {} for member in federation.members)
    if stage == "query.attest":
        assert all(not member.worker.ledger.account().runs for member in federation.members)
    check_sound(federation, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["silent", "the node has left"])
def test_a_run_can_do_without_profiles(federation: Federation, tmp_path: Path, fate: str) -> None:
    """The model is published, its segments without shares, and a note says why."""

    def fault(message: Message) -> str | None:
        lost = message.metadata.dst_node_id < 4
        return fate if lost and message.metadata.message_type == "query.profile" else None

    found = run_faulty(federation, fault, tmp_path)
    assert isinstance(found, SimulationResult)
    assert all(segment.share is None and not segment.profile for segment in found.segments)
    assert any(note.startswith("profile of round") for note in found.notes)
    check_sound(federation, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["silent", "the node has left"])
def test_everybody_lost_ends_the_run(federation: Federation, tmp_path: Path, fate: str) -> None:
    """Nobody was asked for anything, so nobody paid."""
    found = run_faulty(federation, lambda _message: fate, tmp_path)
    assert isinstance(found, str)
    assert "0 of 4 merchants take part" in found
    check_sound(federation, found, tmp_path)


@pytest.mark.parametrize("stage", ["query.census", "train.update", "query.profile"])
def test_one_failed_attempt_is_survived_and_told(
    federation: Federation, tmp_path: Path, stage: str
) -> None:
    """The second attempt counts; both are charged and among the events where they were asked."""
    waiting = {2, 3}

    def fault(message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == stage and node in waiting:
            waiting.discard(node)
            return "silent"
        return None

    found = run_faulty(federation, fault, tmp_path)
    assert isinstance(found, SimulationResult)
    spent = {merchant.id: merchant.epsilon for merchant in found.merchants}
    assert spent["merchant-0002"] == spent["merchant-0003"] > spent["merchant-0000"]
    check_sound(federation, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["secure"], indirect=True)
@pytest.mark.parametrize(
    "stage",
    [
        "query.advertise",
        "query.share",
        "query.confirm",
        "query.reveal",
    ],
)
def test_one_session_that_fails_is_survived_and_told(
    federation: Federation, tmp_path: Path, stage: str
) -> None:
    """A session that loses two is set up anew; who paid for a sum that is lost pays again."""
    waiting = {2, 3}

    def fault(message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == stage and node in waiting:
            waiting.discard(node)
            return "silent"
        return None

    found = run_faulty(federation, fault, tmp_path)
    assert isinstance(found, SimulationResult)
    spent = {merchant.epsilon for merchant in found.merchants}
    assert len(spent) == 1
    occasions = charges_of(federation.members[0].worker.ledger)
    paid_twice = stage in {"query.confirm", "query.reveal"}
    attempts = [attempt for stage, _, attempt in occasions if stage == "census"]
    assert attempts == ([0, 1] if paid_twice else [1])
    check_sound(federation, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["query.census", "train.update"])
def test_who_is_left_gives_the_same_model_in_either_kind_of_sum(
    federation: Federation, dataset: Dataset, tmp_path: Path, stage: str
) -> None:
    """Masks of the merchant that is missing come off; the model is that of the others' sum."""
    parameters = []
    for secure in (True, False):
        contract = federation.contract.revised(aggregation={"secure": secure})
        folder = tmp_path / str(secure)
        folder.mkdir()
        other = assemble(replace(dataset, contract=contract), contract, folder / "own", 1)
        kinds = {"query.census", "train.update"} if stage == "query.census" else {stage}
        found = run_faulty(
            other,
            lambda m, kinds=kinds: (
                "silent"
                if m.metadata.dst_node_id == 4 and m.metadata.message_type in kinds
                else None
            ),
            folder,
        )
        assert isinstance(found, SimulationResult)
        assert [record.cohort for record in found.rounds] == [3, 3]
        parameters.append(read_bundle(folder / "out" / "bundle").parameters)
    np.testing.assert_array_equal(*parameters)


LOSSES = {"few": ["silent", "gone", *[None] * 48], "many": ["silent", "gone", *[None] * 7]}


@pytest.mark.slow
@pytest.mark.parametrize("losses", LOSSES)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(random=st.randoms(use_true_random=False))
def test_whatever_is_lost_the_books_are_right(
    federation: Federation, losses: str, random: Random
) -> None:
    """Random losses, in any stage, end in a sound result or a RunError, never in anything else."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = run_faulty(federation, lambda _message: random.choice(LOSSES[losses]), folder)
        check_sound(federation, found, folder)


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["secure"], indirect=True)
@pytest.mark.parametrize("stage", [*STAGES[1:], *SESSION])
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(random=st.randoms(use_true_random=False), victim=st.integers(2, 5))
def test_losing_one_now_and_then_is_survived(
    federation: Federation, stage: str, random: Random, victim: int
) -> None:
    """As long as enough merchants are left, a run with secure sums ends well."""

    def fault(message: Message) -> str | None:
        lost = message.metadata.dst_node_id == victim and message.metadata.message_type == stage
        return "silent" if lost and random.random() < 0.7 else None

    with TemporaryDirectory() as name:
        folder = Path(name)
        found = run_faulty(federation, fault, folder)
        assert isinstance(found, SimulationResult), found
        check_sound(federation, found, folder)


@pytest.mark.slow
def test_a_merchant_that_never_answers_is_not_shown_as_taking_part(
    federation: Federation, tmp_path: Path
) -> None:
    """Its record says why it did not."""
    found = run_faulty(
        federation, lambda m: "silent" if m.metadata.dst_node_id == 3 else None, tmp_path
    )
    assert isinstance(found, SimulationResult)
    record = next(m for m in found.merchants if m.id == "merchant-0001")
    assert record.epsilon == 0.0
    assert record.refused


def test_a_seed_gives_the_same_model_after_the_same_faults(
    federation: Federation, tmp_path: Path
) -> None:
    """Losses are part of what is repeated."""
    models = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run_faulty(
            replace(federation, seed=1),
            lambda m: "silent" if m.metadata.dst_node_id == 4 else None,
            tmp_path / name,
        )
        models.append((tmp_path / name / "out/bundle/model.safetensors").read_bytes())
    assert models[0] == models[1]
