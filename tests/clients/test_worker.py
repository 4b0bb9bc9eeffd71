"""Tests of the worker, asked the way a malicious server would ask."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import clients.worker
from clients.release import noise_of_steps, noisy_sum
from clients.secure_party import SecureParty
from clients.session_store import MemoryStore
from clients.training import clipped_gradient_sum
from clients.worker import Customers, Worker, confusion_counts, profile_sums, seeded_noise
from common.accounting import epsilon
from common.budget import Budget
from common.chain import Head
from common.contract import Contract, Training, parse_contract
from common.errors import (
    BudgetRefusal,
    DataError,
    LedgerError,
    PolicyError,
    SecureSumError,
    WireError,
    WitnessRefusal,
)
from common.fixed_point import (
    from_lattice,
    lattice_sensitivity,
    lattice_step,
    local_lattice,
    to_lattice,
)
from common.identity import Identity, Members
from common.network import initial_parameters, network_of, parameters_sha256
from common.noise import NoiseSource
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE, Release, lattice_of, plan_of
from common.session import occasion_hash, session_context
from common.wire import Advertise, Attest, Confirm, Reveal, Share, SumAnswer, SumRequest
from server.secure_sum import CoordinatorSession
from tests.witnessed import charges_of, entries_of, latest, ledger_at, reserved, seen

STAGES = {CENSUS: 0, UPDATE: 1, EVALUATION: 10, PROFILE: 20}
BASE: dict[str, Any] = {
    "federation": {"name": "test", "min_merchants": 4},
    "features": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    "segments": {"names": ["x", "y"]},
    "model": {"hidden": [4]},
    "training": {"rounds": 20},
    "privacy": {"epsilon": 5.0, "delta": 1e-5, "clip_norm": 1.5},
    "aggregation": {"secure": False},
}
SECURE: dict[str, Any] = {"secure": True, "min_survivors": 2}


def contract_of(**sections: Any) -> Contract:
    """Build a small contract with plain sums; keywords replace sections."""
    return parse_contract({**BASE, **sections}, source="test")


def release_of(contract: Contract, stage: str) -> Release:
    """Return what a stage releases."""
    release = plan_of(contract).release_of(stage, STAGES[stage], 20)
    assert release is not None
    return release


def multiples(worker: Worker, answer: SumAnswer, stage: str = UPDATE) -> np.ndarray:
    """Return an answer's multiples of the lattice step, with their signs."""
    contract = worker.contract
    return lattice_of(release_of(contract, stage), contract).from_ring(answer.vector)


def some_customers(count: int = 40, seed: int = 0) -> Customers:
    """Return customers of whom a quarter is held out and one in ten has no label."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    labels[::10] = -1
    return Customers(generator.uniform(-1, 1, (count, 3)), labels, np.arange(count) % 4 == 0)


def without(customers: Customers, number: int) -> Customers:
    """Return the neighbouring table that lacks one customer."""
    fields = (customers.inputs, customers.labels, customers.held_out)
    return Customers(*(np.delete(field, number, axis=0) for field in fields))


MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(tmp_path: Path) -> MakeWorker:
    """Give a function that makes workers, each with a ledger of its own."""
    made = 0

    def make(
        contract: Contract | None = None,
        customers: Customers | None = None,
        *,
        cap: float = 50.0,
        accept: bool = True,
        noise_for: Any = seeded_noise(1, "shop"),  # noqa: B008
        secure: SecureParty | None = None,
    ) -> Worker:
        nonlocal made
        made += 1
        identity = secure.identity if secure else Identity.generate("shop")
        path = tmp_path / str(made) / "ledger.sqlite"
        ledger = ledger_at(path, identity, Budget(cap, 1e-5))
        contract = contract or contract_of()
        customers = some_customers() if customers is None else customers
        return Worker(
            identity.merchant,
            contract,
            customers,
            ledger,
            accept_unmasked_sums=accept,
            secure=secure,
            noise_for=noise_for,
        )

    return make


def ask(worker: Worker, stage: str = UPDATE, **changes: Any) -> SumRequest:
    """Return a proper request; keywords change fields. For plain sums the run is reserved."""
    contract = worker.contract
    number, parameters = STAGES.get(stage, 1), initial_parameters(contract)
    if not contract.aggregation.secure and "countersigned" not in changes:
        changes["countersigned"] = reserved(worker, changes.get("run", "run"))
    request = SumRequest(
        "run", contract.sha256, stage, number, 0, 7.0, 0, 0, b"", b"", b"", parameters
    )
    return replace(request, **changes)


def refused(worker: Worker, request: SumRequest) -> str:
    """Return why an answer was refused, after checking that it holds nothing else."""
    answer = worker.answer(request)
    assert answer.refusal
    assert answer.vector.size == 0
    assert answer.head == answer.escrow == b""
    assert answer.merchant == worker.merchant
    return answer.refusal


class TestAttest:
    """Worker.attest."""

    def test_takes_part(self, make_worker: MakeWorker) -> None:
        """The pinned contract within the cap is answered without a refusal."""
        worker = make_worker(cap=5.0)
        assert worker.attest(Attest("run", worker.contract.sha256)).refusal == ""

    def test_says_that_noise_is_repeatable(self, make_worker: MakeWorker) -> None:
        """Seeded noise is admitted; the operating system's is not called seeded."""
        message = Attest("run", contract_of().sha256)
        assert make_worker().attest(message).repeatable
        real = make_worker(noise_for=clients.worker.os_noise)
        assert not real.attest(message).repeatable

    def test_other_contract(self, make_worker: MakeWorker) -> None:
        """Another contract's hash is refused."""
        assert "pinned contract" in make_worker().attest(Attest("run", "0" * 64)).refusal

    def test_cap(self, make_worker: MakeWorker) -> None:
        """A plan beyond the cap is refused before anything is computed, and written down once."""
        worker = make_worker(cap=4.9)
        for _ in range(2):
            assert "its cap is 4.9" in worker.attest(Attest("run", worker.contract.sha256)).refusal
        opened, refusal = (entry.document for entry in worker.ledger.entries())
        assert (opened["kind"], refusal["kind"], refusal["stage"]) == ("open", "refuse", "reserve")

    def test_reserves_nothing(self, make_worker: MakeWorker) -> None:
        """To take part costs nothing yet."""
        worker = make_worker()
        worker.attest(Attest("run", worker.contract.sha256))
        assert [entry.document["kind"] for entry in worker.ledger.entries()] == ["open"]

    def test_unmasked_sums(self, make_worker: MakeWorker) -> None:
        """A merchant that does not accept unmasked sums does not take part."""
        worker = make_worker(accept=False)
        answer = worker.attest(Attest("run", worker.contract.sha256))
        assert "without secure aggregation" in answer.refusal


class TestRefusals:
    """Requests that get nothing."""

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"contract": "0" * 64}, "field 'contract'"),
            ({"contract": ""}, "field 'contract'"),
            ({"stage": "gradient"}, "field 'stage'"),
            ({"stage": ""}, "field 'stage'"),
            ({"round": 21}, "field 'round'"),
            ({"round": 2**31 - 1}, "field 'round'"),
            ({"parameters": np.zeros(0)}, "field 'vector'"),
            ({"parameters": np.zeros(25)}, "field 'vector'"),
            ({"parameters": np.zeros((26, 1))}, "field 'vector'"),
            ({"parameters": np.full(26, np.nan)}, "field 'vector'"),
            ({"parameters": np.full(26, np.inf)}, "field 'vector'"),
            ({"parameters": np.full(26, 1.0000001e6)}, "field 'vector'"),
            ({"parameters": np.full(26, -1e300)}, "field 'vector'"),
        ],
    )
    def test_wrong_field(self, make_worker: MakeWorker, changes: dict[str, Any], says: str) -> None:
        """A wrong field is named, nothing is charged and nothing is sent."""
        worker = make_worker()
        request = ask(worker, **changes)
        before = worker.ledger.entries()
        assert says in refused(worker, request)
        assert worker.ledger.entries() == before

    def test_long_stage_is_cut(self, make_worker: MakeWorker) -> None:
        """A server cannot make a merchant repeat endless text."""
        worker = make_worker()
        assert len(refused(worker, ask(worker, stage="x" * 10**6))) < 200

    def test_unmasked_sums(self, make_worker: MakeWorker) -> None:
        """Who does not accept unmasked sums reserves and answers nothing, whatever was attested."""
        worker = make_worker(accept=False)
        with pytest.raises(WireError, match="secure aggregation"):
            reserved(worker)
        for stage in STAGES:
            assert "secure aggregation" in refused(worker, ask(worker, stage, countersigned=b""))
        assert [entry.document["kind"] for entry in worker.ledger.entries()] == ["open"]

    @pytest.mark.parametrize("stage", STAGES)
    def test_replay(self, make_worker: MakeWorker, stage: str) -> None:
        """The same request gets the same answer; with other parameters it gets none."""
        worker = make_worker()
        request = ask(worker, stage)
        first, second = worker.answer(request), worker.answer(request)
        assert first.refusal == ""
        assert second.vector.tobytes() == first.vector.tobytes()
        other = ask(worker, stage, parameters=np.ones(26))
        assert "released before" in refused(worker, other)
        assert list(charges_of(worker.ledger)) == [(stage, STAGES[stage], 0)]

    def test_profile_that_is_not_planned(self, make_worker: MakeWorker) -> None:
        """What the contract does not publish cannot be asked for."""
        worker = make_worker(contract_of(publication={"profiles": False}))
        assert "no stage 'profile'" in refused(worker, ask(worker, PROFILE))

    @pytest.mark.parametrize("stage", STAGES)
    def test_nothing_without_a_reservation(self, make_worker: MakeWorker, stage: str) -> None:
        """A server that does not ask first gets nothing; another run's word does not help it."""
        worker = make_worker()
        other = reserved(worker, "other")
        for countersigned in (b"", other):
            refusal = refused(worker, ask(worker, stage, countersigned=countersigned))
            assert "needs a reservation" in refusal
        assert charges_of(worker.ledger, "run") == {}

    @pytest.mark.parametrize("stage", STAGES)
    def test_nothing_before_the_witness_countersigned(
        self, make_worker: MakeWorker, stage: str
    ) -> None:
        """Neither no countersignature will do, nor one from before, nor another witness's."""
        worker = make_worker()
        earlier = reserved(worker, "earlier")
        worker.advertise(Advertise("run", worker.contract.sha256, 0, earlier))
        for countersigned, says in (
            (b"", "did not countersign"),
            (earlier, "did not countersign"),
            (earlier[:-1] + b" ", "not signed by the pinned witness"),
            (b"countersigned", "field 'countersigned'"),
        ):
            assert says in refused(worker, ask(worker, stage, countersigned=countersigned))
        assert charges_of(worker.ledger, "run") == {}
        assert worker.answer(ask(worker, stage)).refusal == ""

    @pytest.mark.parametrize("stage", STAGES)
    def test_endless_attempts(self, make_worker: MakeWorker, stage: str) -> None:
        """A run beyond the merchant's cap is not reserved, and asking for ever gets nothing."""
        worker = make_worker(cap=3.0)
        with pytest.raises(BudgetRefusal, match="its cap is 3"):
            reserved(worker)
        for attempt in range(10):
            request = ask(worker, stage, attempt=attempt, countersigned=latest(worker.ledger))
            assert "needs a reservation" in refused(worker, request)
        assert charges_of(worker.ledger) == {}

    @pytest.mark.parametrize("stage", STAGES)
    def test_one_run_ends_at_its_contract(self, make_worker: MakeWorker, stage: str) -> None:
        """However much the merchant's cap would allow, a run never passes its own epsilon."""
        worker = make_worker(cap=50.0)
        request = ask(worker, stage)
        for attempt in range(3000):
            answer = worker.answer(replace(request, attempt=attempt))
            if answer.refusal:
                break
        assert "would pass what this run reserved" in answer.refusal
        charged = [charge.event for charge in charges_of(worker.ledger).values()]
        assert len(charged) == attempt
        assert 4.0 < epsilon(charged, 1e-5) <= 5.0 + 1e-8
        assert worker.answer(ask(worker, stage, run="another")).refusal == ""

    def test_new_runs_start_with_what_is_left(self, make_worker: MakeWorker) -> None:
        """A server gains nothing by calling the run anew."""
        worker, runs = make_worker(cap=11.0), list[str]()
        for number in range(300):
            try:
                request = ask(worker, EVALUATION, run=str(number))
            except BudgetRefusal as refusal:
                assert "its cap is 11" in str(refusal)  # noqa: PT017
                break
            assert worker.answer(request).refusal == ""
            runs.append(str(number))
        account = worker.ledger.account()
        assert list(account.runs) == runs
        assert 1 < len(runs) < 300
        charged = [charge.event for run in account.runs.values() for charge in run.charged]
        assert 5.0 * 2**0.5 < epsilon(charged, 1e-5) <= 11.0 + 1e-8
        beyond = ask(worker, EVALUATION, run=str(len(runs)), countersigned=latest(worker.ledger))
        assert "needs a reservation" in refused(worker, beyond)


class TestCharges:
    """Nothing leaves, and nothing is computed, without an entry."""

    @pytest.mark.parametrize("mode", ["distributed", "local"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_charged_before_noise_is_drawn(
        self, make_worker: MakeWorker, stage: str, mode: str
    ) -> None:
        """When the noise is asked for, the ledger on disk already holds the planned event."""
        kinds: list[str] = []

        def noise(*_: object) -> NoiseSource:
            connection = sqlite3.connect(worker.ledger.path)
            rows = connection.execute("SELECT body FROM entry ORDER BY seq").fetchall()
            kinds.extend(json.loads(body)["kind"] for (body,) in rows)
            connection.close()
            return NoiseSource.fresh()

        worker = make_worker(contract_of(training={"rounds": 20, "mode": mode}), noise_for=noise)
        request = ask(worker, stage)
        worker.answer(request)
        assert kinds == ["open", "reserve", "release"]
        release = plan_of(worker.contract).release_of(stage, STAGES[stage], 20)
        assert release is not None
        (charge,) = charges_of(worker.ledger).values()
        assert (charge.stage, charge.event) == (stage, release.event)
        (entry,) = entries_of(worker.ledger, "release")
        assert entry["parameters"] == parameters_sha256(request.parameters)

    def test_answer_shows_the_ledger_with_the_release(self, make_worker: MakeWorker) -> None:
        """The witness can follow the ledger from what it countersigned to the answer's head."""
        worker = make_worker()
        answer = worker.answer(ask(worker))
        assert Head.from_bytes(answer.head).link == worker.ledger.entries()[-1].link
        assert seen(worker.ledger, answer.head)

    @pytest.mark.parametrize("engine", ["fused", "opacus"])
    def test_charged_before_customers_are_read(self, make_worker: MakeWorker, engine: str) -> None:
        """If the computation fails, the charge stays."""
        customers = some_customers()
        broken = replace(customers, labels=np.where(customers.labels >= 0, 7, -1))  # no segment 7
        worker = make_worker(contract_of(training={"rounds": 20, "engine": engine}), broken)
        with pytest.raises(IndexError):
            worker.answer(ask(worker))
        assert len(charges_of(worker.ledger)) == 1

    def test_no_ledger_no_answer(self, make_worker: MakeWorker) -> None:
        """A ledger that cannot be written stops every release."""
        worker = make_worker()
        request = ask(worker)
        worker.ledger.close()
        worker.ledger.path.write_bytes(b"\x00" * 8192)
        assert "ledger" in refused(worker, request)

    def test_towards_server(self, make_worker: MakeWorker) -> None:
        """The entry says how little noise the single message holds: sigma / sqrt(m)."""
        worker = make_worker()
        worker.answer(ask(worker))
        (charge,) = charges_of(worker.ledger).values()
        ratio = charge.event.noise_multiplier / charge.towards_server.noise_multiplier
        assert ratio == pytest.approx(worker.contract.noise_contributors**0.5)


class TestNeighbours:
    """Two tables that differ by one customer, same seeded noise."""

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("scale", [0.0, 1.0, 1e5])
    @pytest.mark.parametrize("engine", ["fused", "opacus"])
    def test_differ_by_the_sensitivity(
        self, make_worker: MakeWorker, stage: str, scale: float, engine: str
    ) -> None:
        """Whoever is missing and whatever the parameters, answers differ by the sensitivity."""
        contract = contract_of(training={"rounds": 20, "engine": engine})
        customers, theta = some_customers(), np.random.default_rng(3).normal(size=26) * scale
        release = release_of(contract, stage)
        unit, steps = release.event.sensitivity, release.steps
        worker = make_worker(contract, customers)
        whole = multiples(worker, worker.answer(ask(worker, stage, parameters=theta)), stage)
        for gone in (0, 1, 4, 7, 39):
            other = make_worker(contract, without(customers, gone))
            answer = other.answer(ask(other, stage, parameters=theta))
            moved = multiples(other, answer, stage) - whole
            distance = np.linalg.norm(from_lattice(moved, lattice_step(unit, steps)))
            assert distance <= lattice_sensitivity(unit, len(whole), steps)

    @pytest.mark.parametrize("stage", STAGES)
    def test_no_customers(self, make_worker: MakeWorker, stage: str) -> None:
        """A merchant without any customer answers noise of the same length."""
        empty = Customers(np.zeros((0, 3)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
        worker, full = make_worker(customers=empty), make_worker()
        answer = worker.answer(ask(worker, stage))
        assert answer.vector.shape == full.answer(ask(full, stage)).vector.shape

    def test_fresh_noise_differs(self, make_worker: MakeWorker) -> None:
        """Two attempts of one round never share their noise."""
        worker = make_worker(noise_for=clients.worker.os_noise)
        one, other = (worker.answer(ask(worker, attempt=k)).vector for k in range(2))
        assert np.sum(one == other) < 3  # chance below 1e-8


class TestSplit:
    """Training and held-out customers."""

    @pytest.mark.parametrize("mode", ["distributed", "local"])
    @pytest.mark.parametrize("stage", [CENSUS, UPDATE, EVALUATION])
    def test_the_other_side_has_no_influence(
        self, make_worker: MakeWorker, stage: str, mode: str
    ) -> None:
        """Held-out customers never train, and training customers never evaluate."""
        contract = contract_of(training={"rounds": 20, "mode": mode})
        customers, theta = some_customers(), np.random.default_rng(0).normal(size=26)
        other_side = ~customers.held_out if stage == EVALUATION else customers.held_out
        changed = replace(
            customers,
            inputs=np.where(other_side[:, None], -customers.inputs[::-1], customers.inputs),
            labels=np.where(other_side, 1 - customers.labels, customers.labels),
        )
        one, other = make_worker(contract, customers), make_worker(contract, changed)
        answers = [worker.answer(ask(worker, stage, parameters=theta)) for worker in (one, other)]
        assert answers[0].refusal == answers[1].refusal == ""
        assert np.array_equal(answers[0].vector, answers[1].vector)

    @pytest.mark.parametrize("stage", [CENSUS, UPDATE, EVALUATION])
    def test_unlabelled_customers_have_no_influence(
        self, make_worker: MakeWorker, stage: str
    ) -> None:
        """Who has no label neither trains nor evaluates."""
        customers = some_customers()
        inputs = np.where((customers.labels < 0)[:, None], 0.99, customers.inputs)
        one, other = make_worker(), make_worker(customers=replace(customers, inputs=inputs))
        theta = np.ones(26)
        answers = [worker.answer(ask(worker, stage, parameters=theta)) for worker in (one, other)]
        assert answers[0].refusal == answers[1].refusal == ""
        assert np.array_equal(answers[0].vector, answers[1].vector)


class TestLocalMode:
    """A merchant's own DP-SGD steps."""

    LOCAL: ClassVar[dict[str, Any]] = {"rounds": 20, "mode": "local", "local_learning_rate": 0.5}

    def expected(self, worker: Worker, batch: float, steps: int, proximal: float) -> np.ndarray:
        """Replay the steps from the noisy sums alone, with the optimizers of torch."""
        contract, clip_norm = worker.contract, 1.5
        release = plan_of(contract).update
        noise = NoiseSource.seeded(1, "shop", UPDATE, 1, 0)
        start = initial_parameters(contract)
        theta = torch.from_numpy(start.copy())
        stepper = self.stepper(contract.training, theta)
        x, y = some_customers().part(held_out=False)
        noise.spawn()  # whose stream says who is chosen: here all
        drawn = [*noise_of_steps(release, start.size, steps, noise)]
        assert len(drawn) == steps
        for _ in range(steps):
            exact = clipped_gradient_sum(network_of(contract), theta.numpy(), x, y, clip_norm)
            noisy = to_lattice(exact, lattice_step(clip_norm, release.steps)) + drawn.pop(0)
            gradient = noisy * lattice_step(clip_norm, release.steps) / batch
            theta.grad = torch.from_numpy(gradient + proximal * (theta.numpy() - start))
            stepper.step()
        return theta.numpy() - start

    def stepper(self, training: Training, theta: torch.Tensor) -> torch.optim.Optimizer:
        """Return torch's optimizer of the same settings."""
        rate = training.local_learning_rate
        if training.local_optimizer == "adam":
            return torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.99), eps=1e-8)
        return torch.optim.SGD([theta], lr=rate, momentum=training.local_momentum)

    def rounding(self, worker: Worker, batch: float, steps: int) -> float:
        """Return how far float32 may be off: a lattice step a sum, and the update's own."""
        release = plan_of(worker.contract).update
        return (
            0.5 * steps * lattice_step(1.5, release.steps) / batch + local_lattice(32, 200)[0].step
        )

    @pytest.mark.parametrize(("steps", "proximal"), [(1, 0.0), (3, 0.0), (3, 0.2)])
    @pytest.mark.parametrize(
        "optimizer", [{}, {"local_momentum": 0.9}, {"local_optimizer": "adam"}], ids=str
    )
    def test_is_made_of_noisy_sums(
        self, make_worker: MakeWorker, optimizer: dict[str, Any], steps: int, proximal: float
    ) -> None:
        """The update is what anybody could compute from the noisy sums."""
        training = {**self.LOCAL, **optimizer, "local_steps": steps, "proximal": proximal}
        worker = make_worker(contract_of(training=training))
        lattice, _ = local_lattice(32, 200)
        update = from_lattice(multiples(worker, worker.answer(ask(worker))), lattice.step)
        expected = self.expected(worker, 7.0, steps, proximal)
        np.testing.assert_allclose(update, expected, atol=self.rounding(worker, 7.0, steps))

    @pytest.mark.parametrize(
        "optimizer", [{}, {"local_momentum": 0.9}, {"local_optimizer": "adam"}], ids=str
    )
    def test_opacus_takes_the_same_steps(
        self, make_worker: MakeWorker, optimizer: dict[str, Any]
    ) -> None:
        """With Opacus' gradients the update follows from the noisy sums as well."""
        training = {**self.LOCAL, **optimizer, "local_steps": 3, "proximal": 0.2}
        worker = make_worker(contract_of(training={**training, "engine": "opacus"}))
        lattice, _ = local_lattice(32, 200)
        update = from_lattice(multiples(worker, worker.answer(ask(worker))), lattice.step)
        contract, release = worker.contract, plan_of(worker.contract).update
        noise = NoiseSource.seeded(1, "shop", UPDATE, 1, 0)
        noise.spawn()
        start = initial_parameters(contract)
        theta = torch.from_numpy(start.copy())
        stepper = self.stepper(contract.training, theta)
        x, y = some_customers().part(held_out=False)
        for _ in range(3):
            sums = noisy_sum(
                clipped_gradient_sum(network_of(contract), theta.numpy(), x, y, 1.5),
                sensitivity=1.5,
                noise_multiplier=release.event.noise_multiplier,
                contributors=1,
                noise=noise,
                steps=release.steps,
            )
            gradient = from_lattice(sums, lattice_step(1.5, release.steps)) / 7.0
            theta.grad = torch.from_numpy(gradient + 0.2 * (theta.numpy() - start))
            stepper.step()
        expected = theta.numpy() - start
        np.testing.assert_allclose(update, expected, atol=self.rounding(worker, 7.0, 3))

    def test_divides_by_the_noisy_average(self, make_worker: MakeWorker) -> None:
        """The step is divided by the request's noisy number, not by the exact one."""
        training = self.LOCAL
        one, other = (make_worker(contract_of(training=training)) for _ in range(2))
        small = multiples(one, one.answer(ask(one, customers_per_merchant=10.0)))
        large = multiples(other, other.answer(ask(other, customers_per_merchant=20.0)))
        np.testing.assert_allclose(small, 2 * large, atol=2)

    @pytest.mark.parametrize("average", [0.0, 1e-300, 1.0])
    def test_never_divides_by_nothing(self, make_worker: MakeWorker, average: float) -> None:
        """An average below one counts as one."""
        worker = make_worker(contract_of(training=self.LOCAL))
        update = multiples(worker, worker.answer(ask(worker, customers_per_merchant=average)))
        expected = self.expected(worker, 1.0, 1, 0.0)
        lattice, bound = local_lattice(32, 200)
        assert np.all(np.abs(expected) < bound)
        np.testing.assert_allclose(
            from_lattice(update, lattice.step), expected, atol=self.rounding(worker, 1.0, 1)
        )

    @pytest.mark.parametrize("average", [0.0, 1e308])
    def test_any_average_gives_an_answer(self, make_worker: MakeWorker, average: float) -> None:
        """However absurd the average, an update within the public bound comes back."""
        training = {**self.LOCAL, "local_learning_rate": 1e5, "local_steps": 5}
        worker = make_worker(contract_of(training=training))
        update = multiples(worker, worker.answer(ask(worker, customers_per_merchant=average)))
        lattice, bound = local_lattice(32, 200)
        assert np.all(np.abs(update) <= bound / lattice.step)
        assert np.any(np.abs(update) == bound / lattice.step) == (average == 0.0)

    @pytest.mark.slow
    def test_sampled(self, make_worker: MakeWorker) -> None:
        """With Poisson sampling the charged event is the sampled one, and is charged first."""
        training = {**self.LOCAL, "sampling_rate": 0.5, "local_steps": 2}
        worker = make_worker(contract_of(training=training))
        answer = worker.answer(ask(worker))
        assert answer.refusal == ""
        (charge,) = charges_of(worker.ledger).values()
        assert charge.event == plan_of(worker.contract).update.event

    @pytest.mark.slow
    def test_sampled_plan_can_be_spent(self, make_worker: MakeWorker) -> None:
        """A cap that is the contract's epsilon pays for every sampled round, one by one."""
        training = {**self.LOCAL, "rounds": 5, "sampling_rate": 0.3}
        worker = make_worker(contract_of(training=training), cap=5.0)
        for stage, number in ((CENSUS, 0), *((UPDATE, k) for k in range(1, 6)), (PROFILE, 5)):
            assert worker.answer(ask(worker, stage, round=number)).refusal == ""


def test_more_customers_than_the_proof_covers(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merchant too large for the bound on summation error is refused before any run."""
    monkeypatch.setattr(clients.worker, "MAX_SUMMANDS", 39)
    with pytest.raises(DataError, match="40 customers are more than the 39"):
        make_worker()


def test_more_customers_than_the_contract_has_room_for(make_worker: MakeWorker) -> None:
    """A merchant that alone could overflow the ring is refused before any run."""
    make_worker(contract_of(aggregation={"secure": False, "max_customers": 40}))
    with pytest.raises(DataError, match="max_customers = 39"):
        make_worker(contract_of(aggregation={"secure": False, "max_customers": 39}))


Shops = tuple[list[Worker], CoordinatorSession]


@pytest.fixture
def shops(make_worker: MakeWorker) -> Callable[..., Shops]:
    """Give a function that makes two workers and a session of theirs that is set up."""

    def make(contract: Contract | None = None, *, cap: float = 50.0) -> Shops:
        contract = contract or contract_of(aggregation=SECURE)
        identities = [Identity.generate(name) for name in ("one", "two")]
        enrolled = Members({identity.merchant: identity.public for identity in identities})
        workers = [
            make_worker(
                contract,
                cap=cap,
                accept=False,
                secure=SecureParty(identity, enrolled, 2, MemoryStore()),
            )
            for identity in identities
        ]
        return workers, set_up(workers, enrolled, 1)

    return make


def set_up(workers: list[Worker], enrolled: Members, number: int) -> CoordinatorSession:
    """Set up a session of some workers."""
    sha256 = workers[0].contract.sha256
    server = CoordinatorSession(session_context("run", number, sha256), enrolled, 2)
    for worker in workers:
        answer = worker.advertise(Advertise("run", sha256, number, latest(worker.ledger)))
        seen(worker.ledger, answer.head)
        server.take_advert(answer.advert, answer.merchant)
    roster = server.close_roster()
    for position, worker in enumerate(workers):
        shared = worker.share(Share("run", sha256, number, latest(worker.ledger), roster))
        seen(worker.ledger, shared.head)
        server.take_escrow(position, shared.escrow)
    return server


def begin(
    workers: list[Worker], server: CoordinatorSession, stage: str = UPDATE, **changes: Any
) -> list[SumRequest]:
    """Begin a step; return what each worker is asked. Keywords change what all are asked."""
    request = ask(workers[0], stage, session=1, **changes)
    occasion = occasion_hash(
        stage,
        request.round,
        request.attempt,
        request.customers_per_merchant,
        request.parameters,
    )
    step = server.begin(occasion, release_of(workers[0].contract, stage).length, np.uint32)
    requests = []
    for position in range(len(workers)):
        active, boxes = server.request(position)
        requests.append(replace(request, step=step, active=active, boxes=boxes))
    return requests


class TestSecureSums:
    """The worker where the contract's sums are secure."""

    def test_needs_an_identity(self, make_worker: MakeWorker) -> None:
        """No worker can send unmasked what was to be masked."""
        with pytest.raises(PolicyError, match="needs its identity"):
            make_worker(contract_of(aggregation=SECURE))

    @pytest.mark.parametrize("stage", STAGES)
    def test_masked_sum(
        self, shops: Callable[..., Shops], make_worker: MakeWorker, stage: str
    ) -> None:
        """Unmasked, the sum is that of two plain answers with the same noise, bit for bit."""
        workers, server = shops()
        theta = np.linspace(-1, 1, 26)
        requests = begin(workers, server, stage, parameters=theta)
        for position, (worker, request) in enumerate(zip(workers, requests, strict=True)):
            answer = worker.answer(request)
            assert answer.refusal == ""
            server.take_masked(position, answer.vector, answer.escrow)
        survivors = server.close_sum()
        for position, worker in enumerate(workers):
            found = worker.confirm(Confirm(1, 1, survivors)).confirmations
            server.take_confirmations(position, found)
        for position, worker in enumerate(workers):
            shares = worker.reveal(Reveal(1, 1, *server.confirmations_for(position))).shares
            server.take_shares(position, shares)
        plain = make_worker(contract_of(aggregation={**SECURE, "secure": False}))
        single = plain.answer(ask(plain, stage, parameters=theta)).vector
        assert np.array_equal(server.total(), single + single)

    @pytest.mark.parametrize(
        "changes",
        [
            {"session": 0},
            {"session": 2},
            {"step": 0},
            {"step": 2},
            {"run": "another"},
            {"active": b""},
            {"active": b"\x01"},
            {"active": b"\x02"},
            {"active": b"\x07"},
            {"active": b"\x03\x00"},
            {"boxes": b""},
            {"boxes": bytes(80)},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_bad_session_part_charges_nothing(
        self, shops: Callable[..., Shops], stage: str, changes: dict[str, Any]
    ) -> None:
        """It is an error and no refusal, and the right request is answered afterwards."""
        workers, server = shops()
        request, _ = begin(workers, server, stage)
        before = workers[0].ledger.entries()
        with pytest.raises(SecureSumError):
            workers[0].answer(replace(request, **changes))
        assert workers[0].ledger.entries() == before
        assert workers[0].answer(request).refusal == ""
        assert len(charges_of(workers[0].ledger)) == 1

    @pytest.mark.parametrize(
        "changes", [{"contract": "0" * 64}, {"round": 21}, {"parameters": np.full(26, np.nan)}]
    )
    def test_wrong_field(self, shops: Callable[..., Shops], changes: dict[str, Any]) -> None:
        """What has nothing to do with the session is refused as in a plain sum."""
        workers, server = shops()
        request, _ = begin(workers, server)
        before = workers[0].ledger.entries()
        assert "field '" in refused(workers[0], replace(request, **changes))
        assert workers[0].ledger.entries() == before

    def test_replay(self, shops: Callable[..., Shops]) -> None:
        """A step is taken once, and one occasion is paid once, in whatever session."""
        workers, server = shops()
        request, _ = begin(workers, server)
        first, second = workers[0].answer(request), workers[0].answer(request)
        assert first.refusal == ""
        assert (first.escrow, first.head) == (second.escrow, second.head)
        assert first.vector.tobytes() == second.vector.tobytes()
        with pytest.raises(SecureSumError, match="an old step is never taken up again"):
            workers[0].answer(replace(request, parameters=np.ones(26)))
        party = workers[0]._secure
        assert party is not None
        again = set_up(workers, party.members, 2)
        request, _ = (replace(r, session=2) for r in begin(workers, again))
        assert "released before" in refused(workers[0], request)
        assert len(charges_of(workers[0].ledger)) == 1

    def test_endless_attempts(self, shops: Callable[..., Shops]) -> None:
        """Steps that are never unmasked are paid all the same, up to what the run reserved."""
        workers, server = shops()
        for attempt in range(100):
            requests = begin(workers, server, attempt=attempt)
            answers = [w.answer(request) for w, request in zip(workers, requests, strict=True)]
            if answers[0].refusal:
                break
            for position, answer in enumerate(answers):
                server.take_masked(position, answer.vector, answer.escrow)
        assert "would pass what this run reserved" in answers[0].refusal
        charged = [charge.event for charge in charges_of(workers[0].ledger).values()]
        assert len(charged) == attempt > 0
        assert 4.0 < epsilon(charged, 1e-5) <= 5.0 + 1e-8

    def test_a_cap_that_is_too_low_is_no_session(self, shops: Callable[..., Shops]) -> None:
        """A run that cannot be reserved gets no keys."""
        with pytest.raises(BudgetRefusal, match="its cap is 3"):
            shops(cap=3.0)

    def test_nothing_before_the_witness_countersigned(self, shops: Callable[..., Shops]) -> None:
        """A roster is joined, and a step taken, after a countersignature of the reservation."""
        workers, _ = shops()
        party, sha256 = workers[0]._secure, workers[0].contract.sha256
        roster = [w.advertise(Advertise("another", sha256, 1, b"")).advert for w in workers]
        for worker in workers:
            with pytest.raises(WitnessRefusal, match="did not countersign"):
                worker.share(Share("another", sha256, 1, latest(worker.ledger), roster))
            assert len(entries_of(worker.ledger, "join")) == 1
            assert charges_of(worker.ledger, "another") == {}
        assert party is not None
        set_up(workers, party.members, 2)
        assert [entry["session"] for entry in entries_of(workers[0].ledger, "join")] == [1, 2]

    def test_towards_server(self, shops: Callable[..., Shops]) -> None:
        """Who sees sums only, and that is the coordinator too, sees the whole noise."""
        workers, server = shops()
        workers[0].answer(begin(workers, server)[0])
        (charge,) = charges_of(workers[0].ledger).values()
        assert charge.towards_server == charge.event

    def test_plain_contract_has_no_sessions(self, make_worker: MakeWorker) -> None:
        """A server cannot begin one: what is reserved comes without keys, and nobody joins."""
        worker = make_worker()
        sha256 = worker.contract.sha256
        assert worker.advertise(Advertise("run", sha256, 1, b"")).advert == b""
        for action in (
            lambda: worker.share(Share("run", sha256, 1, b"", [])),
            lambda: worker.confirm(Confirm(1, 1, b"\x03")),
            lambda: worker.reveal(Reveal(1, 1, b"\x03", b"")),
        ):
            with pytest.raises(WireError, match="has no secure sums"):
                action()

    def test_another_contract_has_no_sessions(self, shops: Callable[..., Shops]) -> None:
        """An advert, a reservation and a roster are for the pinned contract only."""
        workers, _ = shops()
        before = workers[0].ledger.entries()
        with pytest.raises(WireError, match="field 'contract'"):
            workers[0].advertise(Advertise("run", "0" * 64, 2, b""))
        with pytest.raises(WireError, match="field 'contract'"):
            workers[0].share(Share("run", "0" * 64, 1, b"", []))
        assert workers[0].ledger.entries() == before


class TestCounts:
    """confusion_counts and profile_sums."""

    def test_confusion(self) -> None:
        """Rows are true segments, columns predicted ones."""
        counts = confusion_counts(np.array([0, 1, 1, 2]), np.array([0, 2, 2, 0]), 3)
        assert counts.reshape(3, 3).tolist() == [[1, 0, 0], [0, 0, 2], [1, 0, 0]]

    def test_profile_of_one(self) -> None:
        """One customer adds at most 1 in L2, in one segment, even outside of [-1, 1]."""
        sums = profile_sums(np.array([[9.0, -9.0, 1.0]]), np.array([1]), 2).reshape(2, 4)
        assert not sums[0].any()
        assert np.linalg.norm(sums[1]) == pytest.approx(1.0, abs=1e-15)

    def test_profile_decodes(self) -> None:
        """Counts and means come back from the sums."""
        x = np.array([[0.5, -0.5], [0.1, 0.3], [1.0, 1.0]])
        sums = profile_sums(x, np.array([0, 0, 1]), 2).reshape(2, 3)
        counts = sums[:, 0] / np.sqrt(0.5)
        means = sums[:, 1:] / np.sqrt(0.5 / 2) / counts[:, None]
        np.testing.assert_allclose(counts, [2, 1])
        np.testing.assert_allclose(means, [[0.3, -0.1], [1, 1]])


def test_locked_ledger_is_a_refusal(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that another process holds is no reason to answer without a charge."""
    worker = make_worker()
    request = ask(worker)
    worker.ledger.close()
    holder = sqlite3.connect(worker.ledger.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("common.sqlite_file._PATIENCE_S", 0.01)
    assert refused(worker, request) == (
        "the merchant's ledger cannot be used; its own log says why"
    )
    with pytest.raises(LedgerError):
        worker.ledger.entries()
    holder.execute("ROLLBACK")
    holder.close()


def test_a_worker_needs_no_torch() -> None:
    """Where Opacus does not train, torch is not imported: seconds and 180 MiB a merchant."""
    code = "import sys, clients.joining, clients.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
