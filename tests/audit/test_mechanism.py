"""Tests of the mechanism tests: the real code passes, every planted fault does not."""

from collections.abc import Iterator

import numpy as np
import pytest

from audit.bench import FALSE_ALARM, PER_TEST, Bench, Check, certain_check, random_check
from audit.mechanism import (
    COLUMNS,
    adam_test,
    encoding_tests,
    mechanism_tests,
    ring_tests,
    sampling_tests,
    sensitivity_tests,
)
from audit.noise import release_tests
from audit.subject import twin
from benchmarks.audit_faults import (
    DISTRIBUTED,
    FAULTS,
    LOCAL,
    SAMPLED,
    Fault,
    audited,
    contract_of,
    tried,
)
from clients.own_optimizers import OwnOptimizer
from common.contract import Contract
from simulations.audited import RealSubject

SMALL = contract_of(
    model={"family": "linear"}, training={"rounds": 4}, publication={"profiles": False}
)
BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def subject() -> Iterator[RealSubject]:
    """Give the real code."""
    with RealSubject() as real:
        yield real


def bench_of(subject: RealSubject, contract: Contract, seed: int = 1) -> Bench:
    """Return a bench with the contract's steps as they are."""
    return Bench(subject, twin(contract, COLUMNS), seed, np.random.default_rng(seed))


def failed(checks: list[Check]) -> set[str]:
    """Return the names of the tests that failed."""
    return {check.name for check in checks if not check.passed}


class TestHonestCode:
    """The code as it is."""

    @pytest.mark.slow
    def test_passes(self, subject: RealSubject) -> None:
        """Every test passes, and names what it found."""
        checks = mechanism_tests(subject, SMALL, seed=1)
        assert not failed(list(checks)), [c for c in checks if not c.passed]
        assert len({check.name for check in checks}) == len(checks)
        assert sum(check.false_alarm_rate for check in checks) <= FALSE_ALARM

    def test_is_repeatable(self, subject: RealSubject) -> None:
        """The same seed finds the same numbers."""
        one, two = (Bench(subject, twin(SMALL, 8), 1, np.random.default_rng(1)) for _ in range(2))
        assert release_tests(one, one.update) == release_tests(two, two.update)
        assert ring_tests(one) == ring_tests(two)
        assert encoding_tests(one) == encoding_tests(two)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "contract",
        [
            DISTRIBUTED,
            LOCAL,
            SAMPLED,
            contract_of(training={"engine": "opacus"}),
            contract_of(training={"engine": "opacus"}, model={"family": "linear"}),
            contract_of(model={"hidden": [16, 8], "activation": "tanh"}),
            contract_of(training={"mode": "local", "local_steps": 3, "proximal": 0.1}),
            contract_of(training={"mode": "local", "local_steps": 3, "local_momentum": 0.9}),
            contract_of(training={"mode": "local", "local_steps": 3, "local_optimizer": "adam",
                                  "local_learning_rate": 0.01}),
            contract_of(federation={"name": "two", "min_merchants": 2}),
            contract_of(federation={"name": "many", "min_merchants": 106}),
            contract_of(aggregation={"ring_bits": 64, "colluders": 2}),
            contract_of(aggregation={"max_customers": 300}),
            contract_of(federation={"name": "one", "min_merchants": 1},
                        aggregation={"secure": False}),
        ],
    )  # fmt: skip
    def test_passes_whatever_the_contract(self, contract: Contract) -> None:
        """Modes, engines, models, rings and numbers of merchants; the real source of noise."""
        found = audited(contract)
        assert found.verdict == "PASS", found.failures

    @pytest.mark.slow
    def test_again_and_again(self) -> None:
        """The false-alarm rate lets no honest audit fail; the benchmark does it 100 times."""
        assert [audited(SMALL).failures for _ in range(25)] == [()] * 25


ADAM = LOCAL.revised(training={"local_optimizer": "adam", "local_learning_rate": 0.01})


def test_what_is_tried_shows_its_noisy_sums() -> None:
    """Own steps are plain SGD's, whatever the contract's optimizer makes of their sums."""
    for contract in (ADAM, LOCAL.revised(training={"local_momentum": 0.9})):
        training = twin(contract, 4).training
        assert (training.local_optimizer, training.local_momentum) == ("sgd", 0.0)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_adam(subject: RealSubject, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """Its step follows from the noisy sum; one that is made of something else is caught."""
    bench = bench_of(subject, ADAM.revised(training={"sampling_rate": rate}))
    assert adam_test(bench).passed
    step = OwnOptimizer.step

    def without_most_noise(self: OwnOptimizer, gradient: np.ndarray) -> None:
        if self._training.local_optimizer == "adam":
            gradient[np.abs(gradient) < np.abs(gradient).max() / 2] = 0.0
        step(self, gradient)

    monkeypatch.setattr(OwnOptimizer, "step", without_most_noise)
    assert not adam_test(bench).passed


class TestFaults:
    """Planted faults."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "caught_by"),
        [
            ("noise x 0.97", "update: noise scale"),
            ("same noise every step", "update: fresh noise"),
            ("same noise at two merchants", "update: merchants apart"),
            ("accountant misses steps", "update: charges"),
            ("noise shares for all merchants", "update: noise scale"),
        ],
    )
    def test_noise(self, subject: RealSubject, name: str, caught_by: str) -> None:
        """Tests of the noise see what is wrong with it."""
        bench = bench_of(subject, SMALL)
        with BY_NAME[name].plant():
            checks, _ = release_tests(bench, bench.update)
        assert caught_by in failed(checks)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["batch clipping", "clip norm 5 % too large"])
    def test_sensitivity(self, subject: RealSubject, name: str) -> None:
        """Planted extremes see what is wrong with clipping."""
        fine = SMALL.revised(aggregation={"ring_bits": 64})
        with BY_NAME[name].plant():
            checks = sensitivity_tests(bench_of(subject, fine), "64 bits")
        assert failed(checks) == {"update: sensitivity, 64 bits"}

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
    def test_every_fault_is_caught(self, fault: Fault) -> None:
        """The mechanism tests alone say FAIL, with the real source of noise."""
        assert tried(fault)["caught"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "caught_by"),
        [
            ("sampling rate under-reported", "sampling: rate"),
            ("shuffled instead of Poisson", "sampling: sizes vary"),
            ("same batch every step", "sampling: steps apart"),
        ],
    )
    def test_sampling(self, subject: RealSubject, name: str, caught_by: str) -> None:
        """Tests of the sampling see what is wrong with it."""
        single = SAMPLED.revised(training={"local_steps": 1})
        with BY_NAME[name].plant():
            assert caught_by in failed(sampling_tests(bench_of(subject, single)))


class TestChecks:
    """random_check and certain_check."""

    def test_random(self) -> None:
        """A p-value below the stated rate fails."""
        assert random_check("n", 1.0, 1.0, 2 * PER_TEST, "s").passed
        assert not random_check("n", 1.0, 1.0, PER_TEST / 2, "s").passed

    def test_certain(self) -> None:
        """What is above the most fails, and never by chance."""
        assert certain_check("n", 1.0, 1.0, "s").passed
        assert not certain_check("n", 1.001, 1.0, "s").passed
        assert certain_check("n", 1.0, 1.0, "s").false_alarm_rate == 0.0

    def test_not_a_number_fails(self) -> None:
        """What cannot be computed is no pass."""
        assert not certain_check("n", float("nan"), 1.0, "s").passed
        assert not random_check("n", 0.0, 0.0, float("nan"), "s").passed
