"""A merchant's own DP-SGD steps: alone as among many, and with the noise that is charged for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clients.kernel import Kernel, Precision
from clients.local_steps import Task, local_updates
from common.contract import Training
from common.events import GaussianSum, PoissonGaussianSum
from common.fixed_point import float32_error, lattice_step, local_steps
from common.network import MAX_PARAMETER, Network
from common.noise import NoiseSource
from common.plan import UPDATE, Release

NETWORK = Network((16, 32, 16, 5))
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"local_momentum": 0.9},
    {"local_optimizer": "adam", "local_learning_rate": 0.01},
]
ALARM = 1e-6  # chance that a right noise fails a test, before the seed was fixed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training_of(**changes: Any) -> Training:
    """Return settings of mode local."""
    return Training(**{"mode": "local", "local_steps": 4, "sampling_rate": 0.1, **changes})


def release_of(training: Training, sigma: float = 1.0, clip_norm: float = 0.7) -> Release:
    """Return a release of as many steps."""
    event: GaussianSum | PoissonGaussianSum
    if training.sampling_rate == 1.0:
        event = GaussianSum(sigma, clip_norm, training.local_steps)
    else:
        event = PoissonGaussianSum(sigma, clip_norm, training.sampling_rate, training.local_steps)
    error = float32_error(NETWORK.dims)
    return Release(UPDATE, event, NETWORK.size, 1, local_steps(sigma), error)


def task_of(kernel: Kernel, seed: int, rows: int) -> Task:
    """Return a merchant with some customers."""
    generator = np.random.default_rng(seed)
    table = kernel.table(
        generator.uniform(-1, 1, (rows, NETWORK.dims[0])),
        generator.integers(0, NETWORK.dims[-1], rows),
    )
    start = generator.normal(size=NETWORK.size) * 0.3
    return Task(table, start, 20.0 + seed, NoiseSource.seeded(1, "shop", seed))


class TestManyAtOnce:
    """Row k of many is the one alone."""

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
    @pytest.mark.parametrize(
        "changes", [{}, {"sampling_rate": 1.0}, {"proximal": 0.1, "local_steps": 7}], ids=str
    )
    def test_bit_for_bit(
        self, precision: Precision, optimizer: dict[str, Any], changes: dict[str, Any]
    ) -> None:
        """Ragged customers, Poisson batches, noise on: the very same bits."""
        training = training_of(**optimizer, **changes)
        release = release_of(training)
        sizes = [0, 3, 150, 1000, 77]
        many, one = Kernel(NETWORK, precision), Kernel(NETWORK, precision)
        together = local_updates(
            many, [task_of(many, k, size) for k, size in enumerate(sizes)], training, release
        )
        for k, size in enumerate(sizes):
            alone = local_updates(one, [task_of(one, k, size)], training, release)
            assert np.array_equal(together[k], alone[0])


class TestNoise:
    """What is added to each step, seen where no customer is."""

    STEPS = 5

    def numbers(self, sigma: float) -> np.ndarray:
        """Return the noise of steps without customers, in clip norms."""
        training = training_of(local_steps=1)
        kernel = Kernel(NETWORK, "float32")
        tasks = [task_of(kernel, seed, 0) for seed in range(self.STEPS)]
        changes = local_updates(kernel, tasks, training, release_of(training, sigma))
        batches = np.array([[task.batch] for task in tasks])
        numbers: np.ndarray = changes * batches / (-training.local_learning_rate * 0.7)
        return numbers.ravel()

    @pytest.mark.parametrize("sigma", [0.6, 1.0, 8.0])
    def test_scale(self, sigma: float) -> None:
        """Kolmogorov and Smirnov accept the scale, and refuse two thirds and one and a half."""
        release = release_of(training_of(), sigma)
        scale = sigma * release.sensitivity / release.event.sensitivity
        assert sigma < scale < 1.01 * sigma
        numbers = self.numbers(sigma)
        assert stats.kstest(numbers, stats.norm(scale=scale).cdf).pvalue > ALARM
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(numbers, stats.norm(scale=wrong * scale).cdf).pvalue < ALARM

    def test_lies_on_the_lattice(self) -> None:
        """Each number is a multiple of the step, so that no low-order bit tells anything."""
        release = release_of(training_of())
        multiples = self.numbers(1.0) * 0.7 / lattice_step(0.7, release.steps)
        np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-6)

    def test_fresh_at_every_step_and_merchant(self) -> None:
        """Numbers of different merchants, and of one merchant's steps, are uncorrelated."""
        training = training_of(local_steps=1)
        kernel = Kernel(NETWORK, "float32")
        task = task_of(kernel, 0, 0)  # its stream goes on
        steps = [local_updates(kernel, [task], training, release_of(training))[0] for _ in range(3)]
        other = local_updates(kernel, [task_of(kernel, 1, 0)], training, release_of(training))[0]
        correlations = np.corrcoef(np.stack([*steps, other]))[np.triu_indices(4, 1)]
        assert np.abs(correlations).max() < stats.norm.isf(ALARM / 12) / NETWORK.size**0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("rate", [1e9, 1e5, 1e-3])
@pytest.mark.parametrize("batch", [20.0, 5e-324, 1e308])
def test_never_diverges(optimizer: dict[str, Any], rate: float, batch: float) -> None:
    """However absurd the learning rate and the divisor, parameters stay within the bound."""
    training = training_of(**{**optimizer, "local_learning_rate": rate, "local_steps": 20})
    kernel = Kernel(NETWORK, "float32")
    task = replace(task_of(kernel, 0, 200), batch=batch)
    change = local_updates(kernel, [task], training, release_of(training))[0]
    assert np.isfinite(change).all()
    assert np.abs(task.start + change).max() <= MAX_PARAMETER * (1 + 1e-12)


def test_wide_noise_takes_a_finer_lattice_only_where_it_is_cheap() -> None:
    """Steps are a power of two between 2^14 and 2^20, fewer for more noise."""
    assert [local_steps(sigma) for sigma in (0.01, 0.5, 1.0, 2.0, 1000.0)] == [
        2**20, 2**16, 2**15, 2**14, 2**14,
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_noise_does_not_depend_on_customers(optimizer: dict[str, Any], rate: float) -> None:
    """With another number of customers, of whom none learns anything, the noise is the same."""
    training = training_of(sampling_rate=rate, local_steps=9, **optimizer)
    kernel = Kernel(NETWORK, "float32")
    changes = []
    for rows in (0, 1, 70):
        task = task_of(kernel, 0, 5)
        idle = kernel.table(np.full((rows, NETWORK.dims[0]), 1e30), np.zeros(rows, dtype=np.int64))
        alone = Task(idle, task.start, task.batch, NoiseSource.seeded(1, "idle"))
        changes.append(local_updates(kernel, [alone], training, release_of(training))[0])
    assert np.array_equal(changes[0], changes[1])
    assert np.array_equal(changes[0], changes[2])
