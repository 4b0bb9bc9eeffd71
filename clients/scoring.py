"""A published network applied to customers by the million, on the merchant's own machine.

Layers and exponentials are onnxruntime's, in float32 as the bundle holds the parameters; segments
and probabilities are put together here, one segment a row, which numpy and Arrow's columns like.
Every block has one shape, the last one is filled up, and one thread does it all, so that nothing is
rounded by how many customers there are. BLAS would still round a customer by the place in the
block; onnxruntime does not, and tests hold it to that. What a run *releases* asks for more, a
proof, and uses `common.network.row_by_row`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt

from common.errors import BundleError
from common.network import Network
from common.onnx_model import onnx_exponential_bytes, onnx_logits_bytes, onnx_session

_BLOCK_NUMBERS = 1 << 20  # of the widest layer: much larger blocks leave the processor's cache
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 256, 16_384


@dataclass(frozen=True)
class Scores:
    """What a network says of R customers, for S segments.

    Attributes:
        segment_ids: The most probable segment; of equal ones the first.
        probabilities: One segment a row, one customer a column.
    """

    segment_ids: UInt[np.ndarray, " R"]
    probabilities: Float32[np.ndarray, "S R"]


class Scorer:
    """A network with room for one block of customers; not for two threads at once."""

    def __init__(self, network: Network, theta: Float[np.ndarray, " P"]) -> None:
        self._segments = network.dims[-1]
        fitting = 1 << (_BLOCK_NUMBERS // max(network.dims)).bit_length() - 1
        self.block_rows = min(max(fitting, _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS)
        self._layers = onnx_session(onnx_logits_bytes(network, theta))
        self._exponential = onnx_session(onnx_exponential_bytes())
        self._below = np.empty((self._segments - 1, self.block_rows), dtype=np.uint8)
        self._filled = np.empty((self.block_rows, network.dims[0]), dtype=np.float32)
        self._row = np.empty(self.block_rows, dtype=np.float32)

    def score(self, x: Float32[np.ndarray, "R F"]) -> Scores:
        """Return every customer's segment and probabilities.

        Args:
            x: Encoded customers (`clients.features.encode`).

        Raises:
            BundleError: The network's numbers are too large for float32.

        Guarantee: segments are those of the float64 network, but where its two most probable
        segments are closer than rounding to float32 can tell.
        """
        scores = Scores(
            np.empty(len(x), np.min_scalar_type(self._segments)),
            np.empty((self._segments, len(x)), np.float32),
        )
        for start in range(0, len(x), self.block_rows):
            part = slice(start, start + self.block_rows)
            found = Scores(scores.segment_ids[part], scores.probabilities[:, part])
            self._score_block(x[part], found)
        return scores

    def _score_block(self, block: Float32[np.ndarray, "R F"], out: Scores) -> None:
        rows = len(block)
        logits = self._layers.run(None, {"inputs": self._whole(block)})[0]
        self._compare(logits)
        below, ids = self._below[:, :rows], out.segment_ids
        np.add.reduce(below, axis=0, dtype=ids.dtype, out=ids)
        np.subtract(logits, self._row, out=logits)
        parts = self._exponential.run(None, {"numbers": logits})[0]
        np.add.reduce(parts, axis=0, out=self._row)
        np.divide(parts[:, :rows], self._row[:rows], out=out.probabilities)

    def _whole(self, block: Float32[np.ndarray, "R F"]) -> Float32[np.ndarray, "B F"]:
        if len(block) == self.block_rows:
            return block
        self._filled[: len(block)] = block
        self._filled[len(block) :] = 0.0
        return self._filled

    def _compare(self, logits: Float32[np.ndarray, "S B"]) -> None:
        """Mark the segments before the first of the largest; leave that one in `_row`."""
        np.maximum.reduce(logits, axis=0, out=self._row)
        if not np.isfinite(self._row).all():
            raise BundleError(
                "the model's numbers are too large for float32; do not use it, and ask the "
                "coordinator"
            )
        below = self._below
        np.less(logits[:-1], self._row, out=below.view(bool))
        for segment in range(1, len(below)):
            np.bitwise_and(below[segment - 1], below[segment], out=below[segment])


def largest_and_margin(
    probabilities: Float32[np.ndarray, "S R"],
) -> tuple[Float32[np.ndarray, " R"], Float32[np.ndarray, " R"]]:
    """Return the largest probability of each column and its distance to the second largest.

    >>> largest, margin = largest_and_margin(np.array([[0.25], [0.5], [0.25]], dtype=np.float32))
    >>> largest.tolist(), margin.tolist()
    ([0.5], [0.25])
    """
    largest = probabilities[0].copy()
    second = np.zeros_like(largest)
    lower = np.empty_like(largest)
    for row in probabilities[1:]:
        np.minimum(largest, row, out=lower)
        np.maximum(second, lower, out=second)
        np.maximum(largest, row, out=largest)
    return largest, largest - second
