"""Messages that are lost or answered with an error, anywhere: a sound result, or a RunError."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from simulations.federation import Federation, assemble
from simulations.result import SimulationResult
from simulations.run import simulate

STAGES = {
    "query.attest": 1,
    "query.census": 1,
    "train.update": 2,
    "evaluate.confusion": 2,
    "query.profile": 1,
}
NODES = range(2, 6)
NEEDED = 3

Fault = Callable[[Message], str | None]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate four merchants."""
    return load("synthetic", preset="smoke", merchants=4)


@pytest.fixture(scope="module")
def contract(dataset: Dataset) -> Contract:
    """Give a contract of two rounds that can do without one merchant."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.001},
        model={"family": "linear"},
        training={"rounds": 2, "spare_rounds": 1},
        aggregation={"min_survivors": NEEDED},
        publication={"evaluate_every": 1},
    )


@pytest.fixture(scope="module")
def federation(
    dataset: Dataset, contract: Contract, tmp_path_factory: pytest.TempPathFactory
) -> Federation:
    """Assemble the merchants once; every run gets ledgers of its own."""
    return assemble(dataset, contract, tmp_path_factory.mktemp("ledgers"), 1)


def run_faulty(federation: Federation, fault: Fault, folder: Path) -> SimulationResult | str:
    """Simulate with new ledgers; return the result, or the text of the RunError."""
    for member in federation.members:
        budget = member.worker.ledger.budget
        member.worker.ledger = Ledger(folder / "ledgers" / f"{member.merchant}.sqlite", budget)
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
        entries = member.worker.ledger.entries()
        spent[member.merchant] = epsilon([e.event for e in entries if e.kind == "charge"], delta)
        member.worker.ledger.close()
    assert max(spent.values()) <= cap * (1 + 1e-9)
    if isinstance(found, str):
        assert "merchants" in found or "epsilon" in found
        return
    assert {m.id: m.epsilon for m in found.merchants} == pytest.approx(spent)
    assert found.epsilon == max(spent.values())
    assert all(record.cohort >= NEEDED for record in found.rounds)
    told = (folder / "out" / "bundle" / "privacy.json").read_text()
    assert f'"run": "{found.run}"' in told
    assert np.isfinite(read_bundle(folder / "out" / "bundle").parameters).all()


@pytest.mark.parametrize("fate", ["silent", "the node has left"])
@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.parametrize("fate", ["silent", "the node has left"])
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "query.profile"])
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
    check_sound(federation, found, tmp_path)


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


fates = st.lists(
    st.sampled_from([None, None, None, None, None, None, None, "silent", "gone"]),
    min_size=60,
    max_size=60,
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fates=fates)
def test_whatever_is_lost_the_books_are_right(
    federation: Federation, fates: list[str | None]
) -> None:
    """Random losses end in a sound result or a RunError, never in anything else."""
    left = iter(fates)
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = run_faulty(federation, lambda _message: next(left, None), folder)
        check_sound(federation, found, folder)


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
