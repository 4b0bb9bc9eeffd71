"""Tests of the clipped gradient sum: equal to Opacus, bounded by the clip norm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.training import clipped_gradient_sum
from clients.training_opacus import clipped_gradient_sum_opacus
from common.network import Network

SHAPES = [(5, 3), (5, 4, 3), (5, 1, 3), (5, 4, 6, 3), (5, 4, 3, 6, 3)]


def problem(network: Network, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return parameters, inputs and labels."""
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=network.size),
        generator.uniform(-1, 1, (rows, network.dims[0])),
        generator.integers(0, network.dims[-1], rows),
    )


def loss(network: Network, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the summed cross-entropy."""
    return float(-np.log(network.probabilities(theta, x)[np.arange(len(y)), y]).sum())


class TestAgainstOpacus:
    """The kernel and Opacus' per-sample gradients."""

    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 2, 60])
    @pytest.mark.parametrize("clip_norm", [0.1, 1.0, 100.0])
    def test_same_sum(
        self, dims: tuple[int, ...], activation: str, rows: int, clip_norm: float
    ) -> None:
        """Both give the same sum to 1e-12, clipped or not."""
        network = Network(dims, activation)
        arguments = (network, *problem(network, rows), clip_norm)
        np.testing.assert_allclose(
            clipped_gradient_sum(*arguments),
            clipped_gradient_sum_opacus(*arguments),
            rtol=1e-12,
            atol=1e-12 * max(rows, 1),
        )

    @pytest.mark.parametrize("rows", [8191, 8192, 8193, 16400])
    def test_same_sum_over_blocks(self, rows: int) -> None:
        """More rows than a block holds are all counted, once."""
        network = Network((3, 2, 2))
        theta, x, y = problem(network, 40)
        times = -(-rows // 40)
        x, y = np.tile(x, (times, 1))[:rows], np.tile(y, times)[:rows]
        once = [
            clipped_gradient_sum_opacus(network, theta, x[k : k + 1], y[k : k + 1], 0.5)
            for k in range(40)
        ]
        counts = np.bincount(np.arange(rows) % 40)
        np.testing.assert_allclose(
            clipped_gradient_sum(network, theta, x, y, 0.5), counts @ once, atol=1e-12 * rows
        )


class TestGradient:
    """clipped_gradient_sum without clipping is the gradient."""

    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("dims", SHAPES, ids=str)
    def test_finite_differences(self, dims: tuple[int, ...], activation: str) -> None:
        """Every component equals the loss's central difference."""
        network = Network(dims, activation)
        theta, x, y = problem(network, 7)
        ours = clipped_gradient_sum(network, theta, x, y, 1e9)
        for number in range(network.size):
            step = np.zeros(network.size)
            step[number] = 1e-6
            up, down = (loss(network, theta + s * step, x, y) for s in (1, -1))
            assert ours[number] == pytest.approx((up - down) / 2e-6, abs=1e-6)

    def test_inputs_are_left_alone(self) -> None:
        """Neither parameters, rows nor labels are changed."""
        network = Network((3, 4, 2))
        arrays = problem(network, 5)
        before = [array.copy() for array in arrays]
        clipped_gradient_sum(network, *arrays, 1.0)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))

    def test_no_customers(self) -> None:
        """No customers give the zero vector."""
        network = Network((3, 4, 2))
        assert not clipped_gradient_sum(network, *problem(network, 0), 1.0).any()


class TestSensitivity:
    """One customer moves the sum by at most the clip norm."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple),
        st.sampled_from(["relu", "tanh"]),
        st.floats(1e-3, 1e3),
        st.sampled_from([1e-9, 1.0, 1e3, 9.9e5]),
        st.integers(0, 2**32),
    )
    def test_one_customer_alone(
        self, dims: tuple[int, ...], activation: str, clip_norm: float, size: float, seed: int
    ) -> None:
        """Whatever the parameters, one customer's part is finite and within the clip norm."""
        network = Network(dims, activation)
        theta, x, y = problem(network, 1, seed)
        total = clipped_gradient_sum(network, theta * size, x, y, clip_norm)
        assert np.linalg.norm(total) <= clip_norm * (1 + 1e-12)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
        st.integers(1, 40),
        st.integers(0, 2**32),
    )
    def test_one_more_customer(self, dims: tuple[int, ...], rows: int, seed: int) -> None:
        """Adding a customer anywhere in the table moves the sum within the clip norm."""
        network = Network(dims)
        theta, x, y = problem(network, rows, seed)
        gone = seed % rows
        without = clipped_gradient_sum(
            network, theta, np.delete(x, gone, axis=0), np.delete(y, gone), 1.0
        )
        moved = clipped_gradient_sum(network, theta, x, y, 1.0) - without
        assert np.linalg.norm(moved) <= 1.0 + 1e-9

    @pytest.mark.parametrize("dims", [(26, 8, 4), (26, 1, 4), (5, 1, 2), (26, 1, 1, 3)], ids=str)
    @pytest.mark.parametrize("rows", [2, 4, 8, 33, 257])
    def test_parameters_on_the_edge_of_a_relu(self, dims: tuple[int, ...], rows: int) -> None:
        """A malicious server cannot let rounding decide what everybody else contributes.

        Many customers are alike and the hidden unit is zero for them but for rounding; matrix
        products round differently for another number of rows, which moved the sum by up to
        360 clip norms in a first version.
        """
        network = Network(dims)
        for seed in range(8):
            theta, x, _ = problem(network, 1, seed)
            layers = network.layers(theta)
            layers[0][:, -1] = -(x[:1] @ layers[0][:, :-1].T)[0]
            layers[-1][:] *= 100
            x, y = np.tile(x, (rows, 1)), np.zeros(rows, dtype=np.int64)
            whole = clipped_gradient_sum(network, theta, x, y, 1.0)
            without = clipped_gradient_sum(network, theta, x[1:].copy(), y[1:], 1.0)
            assert np.linalg.norm(whole - without) <= 1.0 + 1e-9

    @pytest.mark.parametrize("dims", [(4, *[64] * 8, 3), (4096, 4, 3)], ids=str)
    def test_largest_parameters(self, dims: tuple[int, ...]) -> None:
        """The largest network and parameters that a worker accepts overflow nothing."""
        network = Network(dims)
        theta = np.full(network.size, 999_999.0)
        x, y = np.ones((3, dims[0])), np.array([0, 1, 2])
        total = clipped_gradient_sum(network, theta, x, y, 2.0)
        assert np.linalg.norm(total) <= 6.0 + 1e-9


def test_repeatable() -> None:
    """The same customers give the same bits, again and again, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network = Network((26, 32, 4))
        arguments = (network, *problem(network, 500), 1.0)
        sums = {clipped_gradient_sum(*arguments).tobytes() for _ in range(5)}
    finally:
        torch.set_num_threads(threads)
    assert len(sums) == 1
