"""The classifier's shape, its flat parameter vector and its forward pass, in numpy.

Layout of the flat vector, layer after layer: a matrix [out, in + 1], row-major, whose last
column is the bias. Both rooms use it; torch is not needed to hold, send or apply a model.
"""

import hashlib
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from common.contract import Contract

_LAST_HASHED = deque([(b"", hashlib.sha256().hexdigest())], maxlen=1)
MAX_PARAMETER = 1e6  # of a model that merchants accept, and of one that they send
_BLOCK_ROWS = 2048  # keeps the temporaries of `row_by_row` in the processor's cache


@dataclass(frozen=True)
class Network:
    """Layer sizes from inputs to segments, and the activation of the hidden layers."""

    dims: tuple[int, ...]
    activation: str = "relu"

    @cached_property
    def size(self) -> int:
        """Number of parameters, P."""
        return sum(out * (inp + 1) for inp, out in zip(self.dims, self.dims[1:], strict=False))

    def layers(self, theta: Float[np.ndarray, " P"]) -> list[Float[np.ndarray, "_ _"]]:
        """Return the layers' matrices as views into the flat vector."""
        views, start = [], 0
        for inp, out in zip(self.dims, self.dims[1:], strict=False):
            stop = start + out * (inp + 1)
            views.append(theta[start:stop].reshape(out, inp + 1))
            start = stop
        return views

    def probabilities(
        self, theta: Float[np.ndarray, " P"], x: Float[np.ndarray, "R F"]
    ) -> Float[np.ndarray, "R S"]:
        """Return each row's segment probabilities (softmax over the last layer)."""
        return softmax(self._logits(theta, x))

    def predictions(
        self, theta: Float[np.ndarray, " P"], x: Float[np.ndarray, "R F"]
    ) -> Int[np.ndarray, " R"]:
        """Return each row's most probable segment id, which no other row has a part in."""
        return np.asarray(self._logits(theta, x).argmax(axis=1))

    def _logits(
        self, theta: Float[np.ndarray, " P"], x: Float[np.ndarray, "R F"]
    ) -> Float[np.ndarray, "R S"]:
        *hidden, last = self.layers(theta)
        for layer in hidden:
            x = row_by_row(x, layer)
            x = np.maximum(x, 0.0) if self.activation == "relu" else np.tanh(x)
        return row_by_row(x, last)


def softmax(logits: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R S"]:
    """Turn logits into probabilities, in place, each row whatever the others are."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    total = np.zeros(len(logits))
    for column in logits.T:  # numpy adds up eight and more in another order for a single row
        total += column
    logits /= total[:, None]
    return logits


def row_by_row(
    x: Float[np.ndarray, "R inp"], layer: Float[np.ndarray, "out inp_1"]
) -> Float[np.ndarray, "R out"]:
    """Return `x @ weights.T + bias`, each row to the last bit whatever the other rows are.

    A matrix product chooses its kernel, hence its rounding, by the number of rows. Where the
    result decides something (a relu, the most probable segment), a rounding that changes with
    one more customer would let that customer move everybody else's part of a sum. Here every
    number is a chain of single multiplications and additions, which IEEE 754 fixes.
    """
    z = np.empty((len(layer), len(x)))
    for start in range(0, len(x), _BLOCK_ROWS):
        columns = np.ascontiguousarray(x[start : start + _BLOCK_ROWS].T)
        block = np.repeat(layer[:, -1:], columns.shape[1], axis=1)
        product = np.empty_like(block)
        for weights, column in zip(layer.T[:-1], columns, strict=True):
            np.multiply(weights[:, None], column, out=product)
            block += product
        z[:, start : start + _BLOCK_ROWS] = block
    return z.T


def network_of(contract: Contract) -> Network:
    """Return the network that a contract asks for."""
    hidden = contract.model.hidden if contract.model.family == "mlp" else ()
    dims = (contract.inputs, *hidden, len(contract.segments.names))
    return Network(dims, contract.model.activation)


def initial_parameters(contract: Contract) -> Float[np.ndarray, " P"]:
    """Return the starting point that every member can compute from the contract alone.

    Hidden layers are uniform within 1 / sqrt(fan-in) (torch's default for linear layers); the
    last layer starts at zero, so that all segments are equally likely at first.
    """
    network = network_of(contract)
    seed = int.from_bytes(hashlib.sha256(f"init {contract.sha256}".encode()).digest(), "big")
    generator = np.random.Generator(np.random.PCG64(seed))
    theta = np.zeros(network.size)
    for layer in network.layers(theta)[:-1]:
        bound = 1.0 / np.sqrt(layer.shape[1] - 1)
        layer[:] = generator.uniform(-bound, bound, layer.shape)
    return theta


def parameters_sha256(theta: Float[np.ndarray, " P"]) -> str:
    """Return SHA-256 of a model's parameters as little-endian float64.

    That of the last model is kept: a merchant asks for it twice or three times in a sum, and all
    merchants of a simulation for the same.
    """
    raw = np.ascontiguousarray(theta, dtype="<f8").tobytes()
    known, digest = _LAST_HASHED[0]
    if raw != known:
        digest = hashlib.sha256(raw).hexdigest()
        _LAST_HASHED.append((raw, digest))  # both at once: other threads may ask
    return digest
