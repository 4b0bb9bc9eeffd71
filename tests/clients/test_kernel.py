"""The kernel: equal to Opacus' hooks, rows alone, one model like many."""

import doctest
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import clients.kernel
from clients.kernel import Kernel, Precision
from clients.own_optimizers import OwnOptimizer
from common.contract import ADAM_DECAYS, Training
from common.fixed_point import float32_error
from common.network import Network

SHAPES = [(5, 3), (5, 4, 3), (5, 1, 2), (16, 32, 16, 5), (26, 9, 4), (3, 4, 6, 3, 17)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
REFUSED = (ValueError, TypeCheckError)  # the second one where tests check types, too
OPTIMIZERS = {
    "sgd": Training(mode="local"),
    "momentum": Training(mode="local", local_momentum=0.9, local_learning_rate=0.3),
    "adam": Training(mode="local", local_optimizer="adam", local_learning_rate=0.01),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(network: Network, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return parameters, inputs and labels."""
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=network.size) * 0.7,
        generator.uniform(-1, 1, (rows, network.dims[0])),
        generator.integers(0, network.dims[-1], rows),
    )


def kernel_sum(
    kernel: Kernel, theta: np.ndarray, x: np.ndarray, y: np.ndarray, clip_norm: float
) -> np.ndarray:
    """Return the flat sum of one model."""
    return kernel.sums(theta[None], [kernel.table(x, y)], [None], clip_norm)[0]


def module_of(network: Network, theta: np.ndarray, dtype: torch.dtype) -> nn.Sequential:
    """Return a torch module with these parameters."""
    layers: list[nn.Module] = []
    for weights in network.layers(theta):
        if layers:
            layers.append({"relu": nn.ReLU, "tanh": nn.Tanh}[network.activation]())
        layer = nn.Linear(weights.shape[1] - 1, weights.shape[0], dtype=dtype)
        layer.weight.data.copy_(torch.from_numpy(weights[:, :-1].copy()))
        layer.bias.data.copy_(torch.from_numpy(weights[:, -1].copy()))
        layers.append(layer)
    return nn.Sequential(*layers)


def flat(parameters: list[torch.Tensor]) -> np.ndarray:
    """Return weights and biases of layers in the flat layout, float64."""
    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    return np.concatenate(
        [torch.cat([w, b[:, None]], dim=1).double().numpy().ravel() for w, b in pairs]
    )


class Hooks:
    """Opacus as its users have it: hooks, per-sample gradients, DPOptimizer without noise."""

    def __init__(
        self,
        network: Network,
        theta: np.ndarray,
        clip_norm: float,
        batch: float,
        training: Training = OPTIMIZERS["sgd"],
    ) -> None:
        self.dtype = torch.float64
        self.module = GradSampleModule(module_of(network, theta, self.dtype), loss_reduction="sum")
        self.optimizer = DPOptimizer(
            self._optimizer(training),
            noise_multiplier=0.0,
            max_grad_norm=clip_norm,
            expected_batch_size=batch,
            loss_reduction="mean",
        )

    def _optimizer(self, training: Training) -> torch.optim.Optimizer:
        parameters, rate = self.module.parameters(), training.local_learning_rate
        if training.local_optimizer == "adam":
            return torch.optim.Adam(parameters, lr=rate, betas=ADAM_DECAYS, eps=1e-8)
        return torch.optim.SGD(parameters, lr=rate, momentum=training.local_momentum)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take one step on the clipped sum over the batch."""
        self.optimizer.zero_grad()
        logits = self.module(torch.from_numpy(x).requires_grad_())
        nn.functional.cross_entropy(logits, torch.from_numpy(y), reduction="sum").backward()
        self.optimizer.step()

    @property
    def theta(self) -> np.ndarray:
        """Return the flat parameters."""
        return flat([parameter.detach() for parameter in self.module.parameters()])


def adam_steps(
    network: Network, theta: np.ndarray, x: np.ndarray, y: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return least and most that Adam's first step makes of gradients right to a tolerance.

    The step is -rate g / (|g| + 1e-8), which falls with g.
    """
    exact = Hooks(network, theta, 0.5, 1.0, Training(mode="local", local_learning_rate=1.0))
    exact.step(x, y)
    gradient, rate = theta - exact.theta, OPTIMIZERS["adam"].local_learning_rate
    error = tolerance * np.abs(gradient).max()
    ends = gradient + error, gradient - error
    least, most = (theta - rate * end / (np.abs(end) + 1e-8) for end in ends)
    return least, most


class TestAgainstOpacus:
    """The kernel and Opacus' own hooks and optimizer."""

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 31, 33, 200])
    @pytest.mark.parametrize("clip_norm", [0.1, 100.0])
    def test_one_step(
        self,
        precision: Precision,
        activation: str,
        dims: tuple[int, ...],
        rows: int,
        clip_norm: float,
    ) -> None:
        """Every component, relative to the largest, to 1e-5 in float32 and 1e-12 in float64."""
        network = Network(dims, activation)
        theta, x, y = problem(network, rows)
        hooks = Hooks(network, theta, clip_norm, 1.0)
        hooks.step(x, y)
        expected = theta - hooks.theta
        found = kernel_sum(Kernel(network, precision), theta, x, y, clip_norm)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[precision] * scale)

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", [(5, 3), (5, 4, 3), (16, 32, 16, 5)], ids=str)
    @pytest.mark.parametrize("training", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_fifty_steps(
        self, precision: Precision, activation: str, dims: tuple[int, ...], training: Training
    ) -> None:
        """In all of fifty steps, with empty batches and single customers, parameters agree.

        After each step relative to the largest parameter, in the end relative to the largest
        change. Adam divides each number by its own size, so that a number near 0 is as wrong as
        its gradient is in float32: after one step Opacus in float32 is off by 1e-4 of the change.
        """
        network = Network(dims, activation)
        theta, x, y = problem(network, 300)
        hooks = Hooks(network, theta, 0.5, 60.0, training)
        kernel = Kernel(network, precision)
        table, optimizer = kernel.table(x, y), OwnOptimizer(training, theta[None])
        generator = np.random.default_rng(1)
        for step in range(50):
            chosen = np.flatnonzero(generator.random(300) < 0.2)
            chosen = chosen[: {3: 0, 5: 1}.get(step % 10, 300)]
            optimizer.step(kernel.sums(optimizer.theta, [table], [chosen], 0.5) / 60.0)
            hooks.step(x[chosen], y[chosen])
            found, expected = optimizer.theta[0], hooks.theta
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[precision] * scale)
        scale = np.abs(expected - theta).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[precision] * scale)

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("training", OPTIMIZERS.values(), ids=OPTIMIZERS)
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 33])
    def test_first_step(
        self, precision: Precision, training: Training, dims: tuple[int, ...], rows: int
    ) -> None:
        """Of every shape and optimizer, nobody and one customer included.

        Relative to the largest change. Adam takes a gradient's sign, nearly: in float32, what it
        makes of gradients that are right to 1e-5 is allowed, too (with Opacus' own
        float32, in 24 of 60 such problems a number near 0 is off by more than 1e-5 of the change).
        """
        network = Network(dims)
        theta, x, y = problem(network, rows)
        hooks = Hooks(network, theta, 0.5, 1.0, training)
        hooks.step(x, y)
        kernel = Kernel(network, precision)
        optimizer = OwnOptimizer(training, theta[None])
        optimizer.step(kernel.sums(optimizer.theta, [kernel.table(x, y)], [None], 0.5))
        allowed = TOLERANCE[precision] * max(np.abs(hooks.theta - theta).max(), 1e-9)
        least = most = hooks.theta
        if training is OPTIMIZERS["adam"] and precision == "float32":
            least, most = adam_steps(network, theta, x, y, TOLERANCE[precision])
        assert (optimizer.theta[0] >= least - allowed).all()
        assert (optimizer.theta[0] <= most + allowed).all()


class TestRowsAreAlone:
    """A customer's gradient is the same number in any company."""

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    def test_alone_and_in_company(
        self, precision: Precision, activation: str, dims: tuple[int, ...]
    ) -> None:
        """The sum of one row alone is that of the row among others that add exactly nothing.

        A row whose norm no float holds adds nothing; so the others are made such.
        """
        network = Network(dims, activation)
        kernel = Kernel(network, precision)
        theta, x, y = problem(network, 197)
        alone = kernel_sum(kernel, theta, x[:1], y[:1], 1.0)
        huge = 1e30 if precision == "float32" else 1e305
        for place in (0, 1, 2, 3, 40, 62, 63, 64, 95, 130, 193, 195, 196):
            company = np.full_like(x, huge)
            company[place] = x[0]
            labels = y.copy()
            labels[place] = y[0]
            assert np.array_equal(kernel_sum(kernel, theta, company, labels, 1.0), alone)

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from(SHAPES), st.integers(1, 300), st.integers(0, 2**32))
    def test_one_more_customer(
        self, precision: Precision, dims: tuple[int, ...], rows: int, seed: int
    ) -> None:
        """A customer taken from the middle moves the sum by no more than is allowed for."""
        network = Network(dims)
        kernel = Kernel(network, precision)
        theta, x, y = problem(network, rows, seed)
        gone = seed % rows
        order = np.array([k for k in range(rows) if k != gone], dtype=np.int64)
        table, thetas = kernel.table(x, y), theta[None] * 10.0 ** (seed % 5)
        without = kernel.sums(thetas, [table], [order], 1.0)
        # as the proof has it: the customer takes somebody's place, who goes to the end
        whole = np.append(order, gone)
        whole[[gone, -1]] = whole[[-1, gone]]
        moved = np.linalg.norm(kernel.sums(thetas, [table], [whole], 1.0) - without)
        allowed = float32_error(dims) if precision == "float32" else 1e-9
        assert moved <= 1.0 + allowed

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_edge_of_a_relu(self, precision: Precision) -> None:
        """Parameters under which rounding decides a relu gain a server nothing."""
        network = Network((26, 8, 4))
        kernel = Kernel(network, precision)
        for seed in range(6):
            theta, x, _ = problem(network, 1, seed)
            theta = theta.astype(np.float32).astype(np.float64)
            x = x.astype(np.float32).astype(np.float64)
            layers = network.layers(theta)
            layers[0][:, -1] = -(x @ layers[0][:, :-1].T)[0]
            layers[-1][:] *= 100
            for rows in (2, 33, 257):
                many, labels = np.tile(x, (rows, 1)), np.zeros(rows, dtype=np.int64)
                whole = kernel_sum(kernel, theta, many, labels, 1.0)
                without = kernel_sum(kernel, theta, many[1:], labels[1:], 1.0)
                assert np.linalg.norm(whole - without) <= 1.0 + 1e-5


class TestManyModels:
    """K models at once."""

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    def test_each_like_alone(
        self, precision: Precision, activation: str, dims: tuple[int, ...]
    ) -> None:
        """Row k is, to the last bit, what model k gets alone; customers are ragged, some none."""
        network = Network(dims, activation)
        sizes = [0, 1, 31, 32, 33, 700, 5, 2500]
        many, one = Kernel(network, precision), Kernel(network, precision)
        problems = [problem(network, size, seed) for seed, size in enumerate(sizes)]
        thetas = np.stack([theta for theta, _, _ in problems])
        tables = [many.table(x, y) for _, x, y in problems]
        generator = np.random.default_rng(0)
        chosen = [generator.permutation(size)[: size * 9 // 10] for size in sizes]
        sums = many.sums(thetas, tables, chosen, 0.7)
        for k in range(len(sizes)):
            alone = one.sums(thetas[k : k + 1], [tables[k]], [chosen[k]], 0.7)
            assert np.array_equal(sums[k], alone[0])
        assert not sums[0].any()

    @pytest.mark.parametrize("rows", [511, 2048, 2049, 8191, 8192, 8193, 20_000])
    def test_all_rows_once(self, rows: int) -> None:
        """However many passes a table takes, every row counts once."""
        network = Network((3, 2, 2))
        theta, x, y = problem(network, 40)
        kernel = Kernel(network)
        times = -(-rows // 40)
        whole = kernel_sum(
            kernel, theta, np.tile(x, (times, 1))[:rows], np.tile(y, times)[:rows], 0.5
        )
        once = [kernel_sum(kernel, theta, x[k : k + 1], y[k : k + 1], 0.5) for k in range(40)]
        counts = np.bincount(np.arange(rows) % 40)
        np.testing.assert_allclose(whole, counts @ once, atol=1e-12 * rows)


class TestTables:
    """What a kernel takes, and what it refuses."""

    @pytest.mark.parametrize("label", [-1, 3])
    def test_no_such_segment(self, label: int) -> None:
        """A label that the network does not have is refused."""
        with pytest.raises(IndexError, match="from 0 to 2"):
            Kernel(Network((5, 3))).table(np.zeros((1, 5)), np.array([label]))

    def test_other_shapes(self) -> None:
        """Arrays that are too short are refused: loops would read and write behind them."""
        kernel, labels = Kernel(Network((5, 3))), np.zeros(4, dtype=np.int64)
        for x in (np.zeros((3, 5)), np.zeros((4, 4)), np.zeros((4, 1)), np.zeros((4, 6))):
            with pytest.raises(REFUSED):
                kernel.table(x, labels)
        table, good = kernel.table(np.zeros((4, 5)), labels), np.zeros((1, 18))
        for bad in (np.zeros((1, 17)), np.zeros((2, 18)), np.zeros((1, 18), dtype=np.float32)):
            with pytest.raises(REFUSED):
                kernel.sums(bad, [table], [None], 1.0)
            with pytest.raises(REFUSED):
                kernel.sums(good, [table], [None], 1.0, out=bad)

    def test_a_table_is_a_copy(self) -> None:
        """Labels that were checked cannot become others."""
        x, labels = np.zeros((2, 5)), np.zeros(2, dtype=np.int64)
        table = Kernel(Network((5, 3))).table(x, labels)
        labels[:], x[:] = 99, 99.0
        assert not table.labels.any()
        assert not table.inputs.any()

    @pytest.mark.parametrize("row", [-1, 5, 2**40])
    def test_no_such_row(self, row: int) -> None:
        """A row that the table does not have is refused, and nothing is summed."""
        kernel, out = Kernel(Network((5, 3))), np.full((1, 18), 7.0)
        table = kernel.table(np.zeros((5, 5)), np.zeros(5, dtype=np.int64))
        with pytest.raises(IndexError, match="not in the table"):
            kernel.sums(np.zeros((1, 18)), [table], [np.array([0, row])], 1.0, out=out)
        assert (out == 7.0).all()

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_rows_that_no_float_holds(self, precision: Precision) -> None:
        """They add nothing, and take nothing from the others."""
        network = Network((4, 6, 3))
        kernel = Kernel(network, precision)
        theta, x, y = problem(network, 8)
        expected = kernel_sum(kernel, theta, x[:4], y[:4], 1.0)
        x[4:] = [[1e38], [-1e37], [1e39], [1e36]] if precision == "float32" else [[1e308]] * 4
        with np.errstate(over="ignore"):
            found = kernel_sum(kernel, theta, x, y, 1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_parameters_that_no_gradient_survives(precision: Precision) -> None:
    """Where a gradient overflows on its way back, its row adds nothing, and nobody else is hurt.

    Whether a merchant answers must not depend on whether such a customer is there.
    """
    large = 1e6 if precision == "float32" else 1e50
    network = Network((1, *[4] * 9, 2))
    theta = np.zeros(network.size)
    first, *hidden, last = network.layers(theta)
    first[:] = [[1, 0], [1, 0], [1, 0], [0, -1]]  # two that will cancel out, one to carry, one dead
    for layer in hidden:
        layer[:2] = [[large, -large, 1, large, 0], [-large, large, 1, large, 0]]
        layer[2, 2], layer[3, 4] = 1, -1
    last[:, :2] = [[large, -large], [-large, large]]
    kernel = Kernel(network, precision)

    def summed(*inputs: float) -> np.ndarray:
        labels = np.zeros(len(inputs), dtype=np.int64)
        return kernel_sum(kernel, theta, np.array(inputs)[:, None], labels, 1.0)

    assert summed(0.0).any()  # nothing but the last layer's bias, since all units are dead
    assert not summed(1.0).any()
    assert np.array_equal(summed(0.0, 1.0, 0.0), summed(0.0, 0.0))


NARROW = """
import sys
import numpy as np
from clients.kernel_loops import COLUMNS, STRIP
from tests.clients.test_kernel import sums_of_many_shapes
assert (STRIP, COLUMNS) == (4, 6)
np.savez(sys.argv[1], *sums_of_many_shapes())
"""


def sums_of_many_shapes() -> list[np.ndarray]:
    """Return sums by kernels of all shapes, of both precisions, over several tiles."""
    found = []
    for shape in SHAPES:
        network = Network(shape)
        for precision in TOLERANCE:
            kernel = Kernel(network, precision)  # type: ignore[arg-type]
            found += [kernel_sum(kernel, *problem(network, rows), 0.5) for rows in (1, 63, 300)]
    return found


@pytest.mark.slow
def test_other_registers(tmp_path: Path) -> None:
    """A processor with few, short registers multiplies in other strips, and finds the same."""
    environment = {**os.environ, "NUMBA_ENABLE_AVX": "0", "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    subprocess.run(
        [sys.executable, "-c", NARROW, str(tmp_path / "sums.npz")],
        cwd=Path(__file__).parents[2],
        env=environment,
        check=True,
    )
    with np.load(tmp_path / "sums.npz") as narrow:
        for one, other in zip(sums_of_many_shapes(), narrow.values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_float32_error() -> None:
    """Little more than a thousandth for the networks of the benchmarks."""
    assert 0.001 < float32_error((128, 256, 128, 16)) < 0.0013
    assert math.isclose(
        float32_error((5, 3)), 1.001 * (2 * 33 + 4 * 65 * 64 + 4 * 3 * 4 * 64) * 2.0**-24
    )


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(clients.kernel).failed == 0
