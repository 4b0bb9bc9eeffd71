"""Tests of the network in numpy: layout, forward pass, starting point, one row at a time."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.contract import Contract, parse_contract
from common.network import Network, initial_parameters, network_of, row_by_row, softmax


def contract_of(**sections: object) -> Contract:
    """Build a small contract; keywords replace sections."""
    document = {
        "federation": {"name": "test"},
        "features": [{"name": "a"}, {"name": "b", "kind": "flag", "missing": "indicator"}],
        "segments": {"names": ["x", "y", "z"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract({**document, **sections}, source="test")


class TestLayout:
    """Network.size and .layers."""

    def test_size(self) -> None:
        """Weights and one bias an output: 2*(3+1) + 4*(2+1)."""
        assert Network((3, 2, 4)).size == 20

    def test_layers_are_views(self) -> None:
        """Writing into a layer writes into the flat vector, row-major, bias last."""
        network = Network((2, 1, 2))
        theta = np.zeros(network.size)
        network.layers(theta)[1][1, -1] = 5.0
        assert theta.tolist() == [0, 0, 0, 0, 0, 0, 5.0]

    def test_of_contract(self) -> None:
        """A contract's widths become the layers' sizes; a linear model has no hidden ones."""
        assert network_of(contract_of()).dims == (3, 32, 3)
        linear = contract_of(model={"family": "linear"})
        assert network_of(linear).dims == (3, 3)


class TestForward:
    """Network.probabilities and .predictions."""

    def test_by_hand(self) -> None:
        """One relu unit and two segments, worked out by hand."""
        network = Network((1, 1, 2))
        theta = np.array([2.0, -1.0, 0.0, 0.0, 1.0, 0.0])  # h = relu(2x - 1); logits (0, h)
        odds = np.exp([0.0, 1.0])
        expected = [[0.5, 0.5], list(odds / odds.sum())]
        np.testing.assert_allclose(
            network.probabilities(theta, np.array([[0.0], [1.0]])), expected, rtol=1e-15
        )

    def test_large_logits(self) -> None:
        """A million as a parameter overflows nothing."""
        network = Network((2, 3))
        result = network.probabilities(np.full(network.size, 1e6), np.ones((1, 2)))
        np.testing.assert_allclose(result, 1 / 3)

    def test_input_is_left_alone(self) -> None:
        """Neither rows nor parameters are changed."""
        network, generator = Network((3, 4, 2)), np.random.default_rng(0)
        theta, x = generator.normal(size=network.size), generator.normal(size=(5, 3))
        before = theta.copy(), x.copy()
        network.probabilities(theta, x)
        assert np.array_equal(theta, before[0])
        assert np.array_equal(x, before[1])

    def test_no_rows(self) -> None:
        """A merchant without customers gets an empty answer."""
        network = Network((3, 4, 2))
        assert network.predictions(np.zeros(network.size), np.zeros((0, 3))).shape == (0,)


class TestRowByRow:
    """row_by_row."""

    @given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 6), st.integers(0, 2**32))
    def test_is_the_matrix_product(self, inp: int, out: int, rows: int, seed: int) -> None:
        """The result is x @ weights.T + bias."""
        generator = np.random.default_rng(seed)
        x, layer = generator.normal(size=(rows, inp)), generator.normal(size=(out, inp + 1))
        np.testing.assert_allclose(
            row_by_row(x, layer), x @ layer[:, :-1].T + layer[:, -1], rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("rows", [2, 3, 41, 2048, 2049, 4100])
    @pytest.mark.parametrize("out", [1, 2, 8])
    def test_rows_do_not_know_each_other(self, rows: int, out: int) -> None:
        """Taking away any one row leaves every other row the same to the last bit."""
        generator = np.random.default_rng(rows)
        x, layer = generator.normal(size=(rows, 13)), generator.normal(size=(out, 14))
        whole = row_by_row(x, layer)
        for gone in (0, rows // 2, rows - 1):
            assert np.array_equal(
                np.delete(whole, gone, axis=0), row_by_row(np.delete(x, gone, axis=0), layer)
            )

    @pytest.mark.parametrize("rows", [2, 3, 8, 41])
    def test_ties_are_broken_alike(self, rows: int) -> None:
        """Where logits differ by rounding alone, a further customer changes nobody's segment."""
        generator = np.random.default_rng(rows)
        for _ in range(20):
            network = Network((26, 2))
            theta = np.zeros(network.size)
            x = np.tile(generator.uniform(-1, 1, (1, 26)), (rows, 1))
            layer = network.layers(theta)[0]
            layer[0, :-1] = generator.normal(size=26)
            layer[0, -1] = -float(x[0] @ layer[0, :-1])
            one, other = network.predictions(theta, x[1:]), network.predictions(theta, x)[1:]
            assert np.array_equal(one, other)


class TestSoftmax:
    """softmax."""

    @pytest.mark.parametrize("segments", [2, 7, 8, 9, 40])
    def test_rows_do_not_know_each_other(self, segments: int) -> None:
        """A row's probabilities are the same to the last bit in any company."""
        generator = np.random.default_rng(segments)
        layer, x = generator.normal(size=(segments, 5)), generator.normal(size=(300, 4))
        whole = softmax(row_by_row(x, layer))
        for rows in (1, 2, 3, 17):
            assert np.array_equal(softmax(row_by_row(x[:rows], layer)), whole[:rows])


class TestInitialParameters:
    """initial_parameters."""

    def test_starts_undecided(self) -> None:
        """At first all segments are equally likely for everybody."""
        contract = contract_of()
        x = np.random.default_rng(0).uniform(-1, 1, (9, 3))
        network = network_of(contract)
        assert np.all(network.probabilities(initial_parameters(contract), x) == 1 / 3)

    def test_bound(self) -> None:
        """Hidden weights lie within 1 / sqrt(fan-in) and are not all alike."""
        contract = contract_of()
        hidden = network_of(contract).layers(initial_parameters(contract))[0]
        assert np.abs(hidden).max() <= 1 / 3**0.5
        assert len(np.unique(hidden)) == hidden.size

    def test_same_in_every_process(self) -> None:
        """Two processes with different hash seeds compute the same start and the same hash."""
        code = (
            "from tests.common.test_network import contract_of\n"
            "from common.network import initial_parameters\n"
            "c = contract_of(); print(c.sha256, initial_parameters(c).tobytes().hex())"
        )
        answers = {
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            ).stdout
            for seed in ("1", "2")
        }
        contract = contract_of()
        own = f"{contract.sha256} {initial_parameters(contract).tobytes().hex()}\n"
        assert answers == {own}

    def test_other_contract_other_start(self) -> None:
        """The start depends on the whole contract."""
        one = initial_parameters(contract_of())
        other = initial_parameters(contract_of(federation={"name": "other"}))
        assert not np.array_equal(one, other)
