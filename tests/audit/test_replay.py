"""Tests of the replay: the auditor's own optimizers, and whole runs of the real coordinator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.codes import Notebook
from audit.replay import Model, Replay, replay, sha256_of, stepped
from audit.runs import RecordedSum, RunRecord, read_record
from audit.verify import verify
from common.contract import Contract, Training
from common.events import GaussianSum
from common.fixed_point import from_lattice
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE
from server.optimizers import Optimizer
from tests.audit.evidence_world import Document, World, decoded, small_contract

TRAININGS: dict[str, Document] = {
    "adam": {"optimizer": "adam"},
    "yogi": {"optimizer": "yogi", "averaging": 0.5},
    "sgd": {"optimizer": "sgd", "averaging": 0.0},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.3},
    "local": {"mode": "local", "optimizer": "adam"},
    "local average": {"mode": "local", "optimizer": "sgd", "learning_rate": 1.0},
}
numbers = st.floats(-1e6, 1e6, allow_subnormal=True)


@pytest.fixture(scope="module", params=TRAININGS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Give the record of a run whose models are those of the coordinator's optimizer."""
    world = World.founded(small_contract(training=TRAININGS[request.param]))
    world.run("run-1", tmp_path_factory.mktemp("bundle"))
    files = world.server_files()
    prefix = "runs/run-1/"
    return read_record(
        "run-1", {n.removeprefix(prefix): c for n, c in files.items() if n.startswith(prefix)}
    )


class TestOptimizers:
    """Written twice, from the papers; equal to the last bit."""

    @given(st.sampled_from(sorted(TRAININGS)), st.lists(st.lists(numbers, min_size=3, max_size=3)))
    def test_same_as_the_coordinators(self, name: str, gradients: list[list[float]]) -> None:
        """Whatever the gradients, every model and every published one is the same."""
        training = Training(**TRAININGS[name])
        start = np.array([0.1, -2.0, 0.0])
        theirs, ours = Optimizer(training, start), Model.begin(start)
        assert np.array_equal(theirs.published, ours.published(training.averaging))
        for gradient in gradients:
            theirs.step(np.array(gradient))
            ours = stepped(ours, np.array(gradient), training)
            assert theirs.theta.tobytes() == ours.weights.tobytes()
            assert theirs.published.tobytes() == ours.published(training.averaging).tobytes()

    def test_plain_steps_by_hand(self) -> None:
        """Gradient descent with momentum, worked out by hand."""
        training = Training(optimizer="sgd", momentum=0.5, learning_rate=0.1, averaging=0.5)
        one = stepped(Model.begin(np.array([1.0])), np.array([2.0]), training)
        two = stepped(one, np.array([1.0]), training)
        assert one.weights[0] == pytest.approx(0.8)
        assert two.weights[0] == pytest.approx(0.8 - 0.1 * (0.5 * 2.0 + 1.0))
        assert two.published(0.5)[0] == pytest.approx((0.8 + 2 * 0.6) / 3)

    def test_adam_by_hand(self) -> None:
        """The first step of Adam has the size of the learning rate, whatever the gradient."""
        training = Training(optimizer="adam", learning_rate=0.1)
        for gradient in (1e-3, 5.0, -700.0):
            one = stepped(Model.begin(np.zeros(1)), np.array([gradient]), training)
            assert one.weights[0] == pytest.approx(-0.1 * np.sign(gradient), rel=1e-4)


def changed(record: RunRecord, number: int, **fields: Any) -> RunRecord:
    """Return a record with fields of one sum replaced."""
    sums = list(record.sums)
    sums[number] = replace(sums[number], **fields)
    return replace(record, sums=tuple(sums))


def replayed(record: RunRecord) -> Replay:
    """Replay a record."""
    return replay(record.contract, record.first, record.sums)


def place(record: RunRecord, stage: str, number: int) -> int:
    """Return where the sum of a stage and round that came about is."""
    (found,) = [
        i
        for i, one in enumerate(record.sums)
        if (one.stage, one.round) == (stage, number) and one.total is not None
    ]
    return found


class TestReplay:
    """From recorded sums to every model of a run."""

    def test_honest(self, recorded: RunRecord) -> None:
        """Every sum follows from those before it, and the end from all."""
        found = replayed(recorded)
        assert found.problem == ""
        assert found.rounds == len(recorded.sums)
        assert found.model.steps == 3
        averaging = recorded.contract.training.averaging
        assert sha256_of(found.model.published(averaging)) == recorded.end

    @pytest.mark.parametrize(
        ("stage", "number", "blames"),
        [
            (CENSUS, 0, "update of round 1"),
            (UPDATE, 1, "update of round 2"),
            (UPDATE, 2, "evaluation of round 2"),
            (UPDATE, 3, "evaluation of round 3"),
        ],
    )
    def test_one_step_of_one_number(
        self, recorded: RunRecord, stage: str, number: int, blames: str
    ) -> None:
        """The smallest change of any sum shows in a later model; the first round is named.

        The very first step of Adam and Yogi has one size whatever the gradient: there it may
        show a round later.
        """
        at = place(recorded, stage, number)
        total = recorded.sums[at].total
        assert total is not None
        plain = recorded.contract.training.optimizer == "sgd"
        for index in range(len(total)):
            edited = total.copy()
            edited[index] += 1
            problem = replayed(changed(recorded, at, total=edited)).problem
            assert problem.startswith(blames if plain or stage == CENSUS else "")
            assert problem

    def test_number_of_merchants(self, recorded: RunRecord) -> None:
        """A sum is divided by the merchants in it: another number gives another model."""
        for stage, number in ((CENSUS, 0), (UPDATE, 1)):
            at = place(recorded, stage, number)
            edited = changed(recorded, at, merchants=("shop-0", "shop-1"))
            assert replayed(edited).problem

    @pytest.mark.parametrize("fields", [{"parameters": "00" * 32}, {"customers_per_merchant": 1.5}])
    def test_what_was_shown(self, recorded: RunRecord, fields: Document) -> None:
        """What merchants were shown is what the sums give, in every single sum."""
        for at, one in enumerate(recorded.sums):
            problem = replayed(changed(recorded, at, **fields)).problem
            assert problem.startswith(f"{one.stage} of round {one.round} ")

    def test_order(self, recorded: RunRecord) -> None:
        """Sums that are left out, doubled or moved do not follow."""
        sums = recorded.sums
        for at, one in enumerate(sums):
            doubled = replace(recorded, sums=(*sums[: at + 1], *sums[at:]))
            if one.stage in {CENSUS, UPDATE} and one.total is not None:
                assert replayed(doubled).problem
                assert replayed(replace(recorded, sums=(*sums[:at], *sums[at + 1 :]))).problem
        late = replace(recorded, sums=(*sums[1:], sums[0]))
        assert replayed(late).problem

    def test_sums_that_nothing_came_of(self, recorded: RunRecord) -> None:
        """They change no model, and were asked for with the same one."""
        failed = [one for one in recorded.sums if one.total is None]
        assert [(one.stage, one.round) for one in failed] == [(UPDATE, 2)]
        without = tuple(one for one in recorded.sums if one.total is not None)
        ends = [
            r.model.weights.tobytes()
            for r in (replayed(recorded), replayed(replace(recorded, sums=without)))
        ]
        assert ends[0] == ends[1]

    @pytest.mark.parametrize("stage", ["gossip", "", PROFILE, EVALUATION, UPDATE])
    @pytest.mark.parametrize("number", [0, 1, 2**52])
    def test_nonsense(self, recorded: RunRecord, stage: str, number: int) -> None:
        """A record may hold anything; the replay ends, with words."""
        nonsense = RecordedSum(
            line=1,
            stage=stage,
            round=number,
            attempt=0,
            event=GaussianSum(1.0, 1.0),
            customers_per_merchant=0.0,
            parameters="",
            asked=(),
            merchants=(),
            fewest=0,
            lattice_step=1e300,
            total=np.full(7, 2**62),
        )
        assert replay(recorded.contract, recorded.first, [nonsense]).problem
        assert replay(recorded.contract, recorded.first, [*recorded.sums[:2], nonsense]).problem
        huge = changed(recorded, 1, lattice_step=1e308)
        assert replayed(huge).problem

    def test_nothing(self, recorded: RunRecord) -> None:
        """A run without sums is its first model."""
        found = replay(recorded.contract, recorded.first, [])
        assert (found.problem, found.rounds, found.model.steps) == ("", 0, 0)

    def test_values_are_multiples(self, recorded: RunRecord) -> None:
        """A recorded total times its step is what the coordinator decoded."""
        one = recorded.sums[0]
        assert one.total is not None
        assert np.array_equal(one.values, from_lattice(one.total, one.lattice_step))


@pytest.mark.slow
class TestRealRuns:
    """Runs of the real coordinator with real merchants, as the simulator writes evidence."""

    @pytest.mark.parametrize(
        "training",
        [
            {"rounds": 2},
            {"rounds": 2, "mode": "local", "optimizer": "yogi", "local_steps": 2},
        ],
        ids=["distributed", "local"],
    )
    def test_passes(self, tmp_path: Path, training: Document) -> None:
        """Everything is checked, replayed to the last bit, and nothing is found."""
        from simulations.datasets import load
        from simulations.federation import assemble
        from simulations.run import simulate

        dataset = load("synthetic", preset="smoke", merchants=3)
        contract: Contract = dataset.contract.revised(training=training, model={"family": "linear"})
        federation = assemble(dataset, contract, tmp_path / "out", None)
        simulate(federation, tmp_path / "out", lambda _record, _rounds: None)
        audit = verify([tmp_path / "out" / "evidence"])
        assert audit.findings == ()
        (run,) = audit.runs
        assert run.replayed
        assert len(run.matched) == 3
        assert audit.checks["sums replayed"] >= 5


def test_notebook_knows_its_codes() -> None:
    """A finding whose code nobody listed is a mistake of the audit itself."""
    with pytest.raises(KeyError):
        Notebook().add("no-such-code", "here", "told")


def test_records_are_read_as_they_were_written() -> None:
    """Base64 of little-endian 64-bit numbers."""
    assert decoded("AQAAAAAAAAD//////////w==").tolist() == [1, -1]
