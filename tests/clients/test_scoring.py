"""A network applied in float32 blocks: like the float64 one, like ONNX, and everywhere alike."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.scoring import Scorer, largest_and_margin
from common.errors import BundleError
from common.network import Network
from common.onnx_model import onnx_bytes

NETWORKS = [
    Network((7, 4)),
    Network((1, 2)),
    Network((16, 64, 8), "relu"),
    Network((7, 16, 4), "tanh"),
    Network((7, 9, 5, 3), "relu"),
    Network((7, 9, 5, 3), "tanh"),
]
EPSILON = float(np.finfo(np.float32).eps)
networks = st.builds(
    Network,
    st.lists(st.integers(1, 12), min_size=1, max_size=3).flatmap(
        lambda sizes: st.integers(2, 9).map(lambda segments: (*sizes, segments))
    ),
    st.sampled_from(["relu", "tanh"]),
)


def drawn(network: Network, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Draw parameters, as float32 numbers."""
    return np.random.default_rng(seed).normal(0.0, scale, network.size).astype(np.float32)


def inputs_of(network: Network, rows: int, seed: int = 1) -> np.ndarray:
    """Draw encoded customers."""
    shape = (rows, network.dims[0])
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def logit_error(network: Network, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bound what float32 can change at any logit of a row: (R,)."""
    size = np.abs(x.astype(np.float64))
    for layer in network.layers(np.abs(theta.astype(np.float64))):
        size = size @ layer[:, :-1].T + layer[:, -1]
    steps = sum(network.dims[:-1]) + 4 * len(network.dims)
    return np.asarray(steps * EPSILON * size.max(axis=1))


class TestScore:
    """Scorer.score."""

    @given(
        network=networks,
        seed=st.integers(0, 2**32 - 1),
        scale=st.floats(1e-3, 30.0),
        rows=st.integers(1, 400),
    )
    def test_agrees_with_the_float64_network(
        self, network: Network, seed: int, scale: float, rows: int
    ) -> None:
        """Another segment only where the two are closer than rounding can tell."""
        theta, x = drawn(network, seed, scale), inputs_of(network, rows, seed)
        scores = Scorer(network, theta).score(x)
        exact = network.probabilities(theta.astype(np.float64), x.astype(np.float64))
        ids = network.predictions(theta.astype(np.float64), x.astype(np.float64))
        error = logit_error(network, theta, x)
        every = np.arange(rows)
        with np.errstate(divide="ignore"):
            gap = np.log(exact[every, ids]) - np.log(exact[every, scores.segment_ids])
        assert (gap <= 2 * error).all()
        difference = np.abs(scores.probabilities.T - exact).max(axis=1)
        assert (difference <= 2 * error + 1e-6).all()

    def test_the_bound_of_agreement_is_tight_enough_to_notice_another_model(self) -> None:
        """A network with one weight changed a little fails the test above."""
        network = NETWORKS[2]
        theta, x = drawn(network, scale=0.3), inputs_of(network, 5000)
        other = theta.copy()
        other[3] += 0.1
        exact = network.probabilities(other.astype(np.float64), x.astype(np.float64))
        difference = np.abs(Scorer(network, theta).score(x).probabilities.T - exact).max(axis=1)
        assert (difference > 2 * logit_error(network, theta, x) + 1e-6).any()

    @pytest.mark.parametrize("network", NETWORKS, ids=str)
    def test_agrees_with_onnxruntime(self, network: Network) -> None:
        """The same probabilities as the published model.onnx, and the same segments."""
        theta, x = drawn(network), inputs_of(network, 20_000)
        model = onnx_bytes(network, theta.astype(np.float64))
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        expected = session.run(None, {"inputs": x})[0]
        scores = Scorer(network, theta).score(x)
        np.testing.assert_allclose(scores.probabilities.T, expected, atol=1e-5)
        largest, margin = largest_and_margin(expected.T.copy())
        sure = margin > 1e-5
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(scores.segment_ids[sure], expected.argmax(axis=1)[sure])
        np.testing.assert_array_equal(largest, expected.max(axis=1))

    @pytest.mark.parametrize("network", NETWORKS, ids=str)
    def test_a_row_is_the_same_in_every_place(self, network: Network) -> None:
        """To the last bit: in every place of a full block, and of one that is filled up."""
        scorer, row = Scorer(network, drawn(network)), inputs_of(network, 1, seed=3)
        alone = scorer.score(row)
        many = scorer.score(np.repeat(row, 2 * scorer.block_rows + 77, axis=0))
        assert (many.probabilities == alone.probabilities).all()
        assert (many.segment_ids == alone.segment_ids).all()

    @given(network=networks, seed=st.integers(0, 2**32 - 1), before=st.integers(0, 20_000))
    def test_a_row_does_not_depend_on_the_others(
        self, network: Network, seed: int, before: int
    ) -> None:
        """To the last bit, whoever comes before and after."""
        scorer, x = Scorer(network, drawn(network, seed)), inputs_of(network, 50, seed)
        others = inputs_of(network, before, seed + 1)
        found = scorer.score(np.concatenate([others, x, others[:9]]))
        alone = scorer.score(x)
        here = slice(before, before + 50)
        assert found.probabilities[:, here].tobytes() == alone.probabilities.tobytes()
        assert found.segment_ids[here].tobytes() == alone.segment_ids.tobytes()

    def test_of_equal_segments_the_first(self) -> None:
        """As argmax does, where all are equally probable too."""
        network = Network((1, 4))
        theta = np.array([0, 1, 0, 2, 0, 2, 0, 1], dtype=np.float32)
        x = np.zeros((3, 1), dtype=np.float32)
        assert Scorer(network, theta).score(x).segment_ids.tolist() == [1, 1, 1]
        nothing = np.zeros(8, dtype=np.float32)
        assert Scorer(network, nothing).score(x).segment_ids.tolist() == [0, 0, 0]

    def test_many_segments(self) -> None:
        """More of them than a byte can count."""
        network = Network((2, 300))
        theta, x = drawn(network), inputs_of(network, 1000)
        expected = network.predictions(theta.astype(np.float64), x.astype(np.float64))
        assert expected.max() > 255
        np.testing.assert_array_equal(Scorer(network, theta).score(x).segment_ids, expected)

    def test_wide_layers_take_smaller_blocks(self) -> None:
        """So that a block's numbers stay within a few MiB."""
        assert Scorer(Network((4, 8)), drawn(Network((4, 8)))).block_rows == 16_384
        wide = Network((4, 4096, 2))
        assert Scorer(wide, drawn(wide)).block_rows == 256

    def test_no_rows(self) -> None:
        """Nobody is assigned."""
        network = NETWORKS[0]
        scores = Scorer(network, drawn(network)).score(inputs_of(network, 0))
        assert scores.probabilities.shape == (4, 0)
        assert scores.segment_ids.shape == (0,)

    @pytest.mark.parametrize(("dims", "number"), [((2, 2, 2), 3e38), ((2, 2), -3e38)])
    def test_numbers_too_large_are_refused(self, dims: tuple[int, ...], number: float) -> None:
        """A model that float32 cannot hold gives no segments at all."""
        network = Network(dims)
        theta = np.full(network.size, number, dtype=np.float32)
        with pytest.raises(BundleError, match="too large for float32"):
            Scorer(network, theta).score(np.ones((1, 2), dtype=np.float32))


class TestLargestAndMargin:
    """largest_and_margin."""

    @given(segments=st.integers(2, 9), rows=st.integers(0, 20), seed=st.integers(0, 1000))
    def test_equals_sorting(self, segments: int, rows: int, seed: int) -> None:
        """The largest of each column, and its distance to the second."""
        drawn = np.random.default_rng(seed).integers(0, 5, (segments, rows)) / np.float32(8)
        values = drawn.astype(np.float32)
        largest, margin = largest_and_margin(values)
        ordered = np.sort(values, axis=0)
        np.testing.assert_array_equal(largest, ordered[-1])
        np.testing.assert_array_equal(margin, ordered[-1] - ordered[-2])
