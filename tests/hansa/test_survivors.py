"""The coordinator's count of merchants in a sum, against what every merchant noted itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message

from common.contract import Contract
from common.errors import RunError
from server.outcome import Outcome
from simulations import run as running
from simulations.datasets import Dataset, load
from simulations.federation import assemble
from simulations.members import Federation
from simulations.result import SimulationResult

Change = Callable[[Outcome], object]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate five merchants."""
    return load("synthetic", preset="smoke", merchants=5)


@pytest.fixture
def contract(dataset: Dataset) -> Contract:
    """Give a contract of three rounds for which three of five merchants are enough."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.02},
        model={"family": "linear"},
        training={"rounds": 3},
        aggregation={"min_survivors": 3},
        publication={"evaluate_every": 2},
    )


@pytest.fixture
def simulated(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimulationResult]:
    """Give the function that simulates; `change` may alter what the coordinator says."""

    def run(
        contract: Contract,
        change: Change = lambda _outcome: None,
        fault: Callable[[Message], str | None] | None = None,
    ) -> SimulationResult:
        honest = running.run_rounds

        def dishonest(federation: Federation, *arguments: object) -> Outcome:
            outcome: Outcome = honest(federation, *arguments)  # type: ignore[arg-type]
            change(outcome)
            return outcome

        monkeypatch.setattr(running, "run_rounds", dishonest)
        federation = assemble(dataset, contract, tmp_path, 3)
        return running.simulate(federation, tmp_path, lambda _record, _rounds: None, fault)

    return run


def claims(index: int, count: int) -> Change:
    """Return what makes the coordinator claim a count for one sum."""
    return lambda outcome: outcome.survivors.__setitem__(index, count)


@pytest.mark.slow
def test_an_honest_count_is_confirmed(
    simulated: Callable[..., SimulationResult], contract: Contract
) -> None:
    """All five in every sum; the result tells it."""
    result = simulated(contract)
    assert (result.achieved.survivors_min, result.achieved.survivors_max) == (5, 5)
    assert result.achieved.epsilon < result.epsilon
    assert [told.colluders for told in result.colluders] == [0, 1]
    assert all(merchant.accuracy is None for merchant in result.merchants)


@pytest.mark.parametrize(
    ("index", "where"),
    [(0, "census of round 0"), (3, "evaluation of round 2"), (-1, "profile of round 3")],
)
def test_a_count_above_a_merchants_own_note_ends_the_run(
    simulated: Callable[..., SimulationResult],
    contract: Contract,
    tmp_path: Path,
    index: int,
    where: str,
) -> None:
    """Nothing is claimed, nothing is published."""
    with pytest.raises(RunError, match=f"{where}: the coordinator counts 6 .* confirmed 5"):
        simulated(contract, claims(index, 6))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_sum_that_nobody_confirmed_is_not_counted(
    simulated: Callable[..., SimulationResult], contract: Contract
) -> None:
    """An invented one ends the run."""

    def invented(outcome: Outcome) -> None:
        stage, number, attempt = outcome.occasions[-1]
        outcome.events.append(outcome.events[-1])
        outcome.occasions.append((stage, number, attempt + 1))
        outcome.survivors[-1:] = [None, 5]

    with pytest.raises(RunError, match="counts 5 merchants in the sum, nobody confirmed it"):
        simulated(contract, invented)


@pytest.mark.slow
def test_a_smaller_claim_than_confirmed_is_no_lie(
    simulated: Callable[..., SimulationResult], contract: Contract
) -> None:
    """Who counts less noise than there was promises less."""
    assert simulated(contract, claims(2, 4)).achieved.survivors_min == 4


@pytest.mark.slow
def test_lost_messages_and_second_attempts_keep_their_places(
    simulated: Callable[..., SimulationResult], contract: Contract
) -> None:
    """A failed update is asked for again; notes and counts still meet."""
    fates = iter(["error"] * 3)  # three of five in the first update: too few are left

    def fault(message: Message) -> str | None:
        kind = message.metadata.message_type
        return next(fates, None) if kind == "train.update" else None

    seen: list[Outcome] = []
    result = simulated(contract, seen.append, fault)
    assert None in seen[0].survivors
    assert result.achieved.survivors_min == 3
    occasions = seen[0].occasions
    assert occasions[1:3] == [("update", 1, 0), ("update", 1, 1)]
    assert len(set(occasions)) == len(occasions)


@pytest.mark.slow
def test_plain_sums_are_not_confirmed_by_anybody(
    simulated: Callable[..., SimulationResult], contract: Contract
) -> None:
    """Merchants note nothing there, and each one's accuracy is known to the server."""
    result = simulated(contract.revised(aggregation={"secure": False}))
    assert not result.secure
    assert result.epsilon_server > result.epsilon
