"""Clipped gradient sums of one or many models, in tiles of a fixed number of rows.

The per-customer gradient is never materialised: for a fully connected layer with inputs a and
output gradients d, a customer's gradient is the outer product of d and (a, 1), its squared norm
is |d|^2 (|a|^2 + 1), and the clipped sum is one weighted matrix product a layer ("book-keeping",
Bu et al. 2023, "Differentially private optimization on large model at small cost").

Rows do not know each other. A library's matrix product chooses its kernel, hence its rounding, by
its shape; one more customer would then move everybody's gradient, and a hostile choice of
parameters blows that up (docs/privacy-model.md). Here every product is a loop of our own in which
a row's numbers are computed alike at every place (`clients.kernel_loops`). For the same reason
the K-th of many models gets the very numbers that it would get alone.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from clients.kernel_loops import COLUMNS, LAYER, LINE, gradient_sum
from common.fixed_point import BLOCK_ROWS, TILE_ROWS, TILES_AT_ONCE
from common.network import Network

Precision = Literal["float32", "float64"]

_SIZES = TILE_ROWS, TILE_ROWS * TILES_AT_ONCE, BLOCK_ROWS
_LARGEST = {"float32": 2.0**60, "float64": 2.0**600}  # squared norm of a layer's inputs


@dataclass(frozen=True, eq=False)
class Table:
    """A merchant's customers as a kernel takes them.

    Attributes:
        inputs: [R, F], in the kernel's precision.
        labels: [R].
    """

    inputs: Float[np.ndarray, "R F"]
    labels: Int64[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.labels)


class Kernel:
    """Sums of clipped gradients for models of one shape.

    Args:
        network: Shape of the models.
        precision: Of everything up to a few tiles' sum; what comes after is float64.

    Guarantee: one customer moves the exact sum of the gradients as computed by at most
    `clip_norm` in L2, and the computed sum by no more than
    `common.fixed_point.lattice_sensitivity` allows for, whatever the parameters. In float32 the
    rows must come in a secret random order.
    """

    def __init__(self, network: Network, precision: Precision = "float64") -> None:
        self.network, self.precision = network, precision
        self._lock = threading.Lock()
        self._layers, values, weights, product = _laid_out(network.dims, precision)
        self._values = np.zeros(values, dtype=precision)
        self._weights = np.zeros(weights, dtype=precision)
        self._product = np.zeros(product, dtype=precision)
        self._partial = np.zeros(product)

    def table(self, x: Float[np.ndarray, "R F"], y: Int[np.ndarray, " R"]) -> Table:
        """Make a table of model inputs and segment ids.

        Raises:
            ValueError: There is not one label for each row, or not one input for each feature.
            IndexError: A segment id is not one of the network's.
        """
        if x.shape != (len(y), self.network.dims[0]):
            raise ValueError(f"expected {len(y)} rows of {self.network.dims[0]}, got {x.shape}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.network.dims[-1]:
            raise IndexError(f"segment ids must lie from 0 to {self.network.dims[-1] - 1}")
        return Table(np.array(x, dtype=self.precision, order="C"), np.array(y, dtype=np.int64))

    def sums(
        self,
        thetas: Float64[np.ndarray, "K P"],
        tables: Sequence[Table],
        chosen: Sequence[Int64[np.ndarray, " _"] | None],
        clip_norm: float,
        *,
        out: Float64[np.ndarray, "K P"] | None = None,
    ) -> Float64[np.ndarray, "K P"]:
        """Sum, for each model, its customers' cross-entropy gradients, clipped to `clip_norm`.

        Args:
            thetas: Flat parameters, one model a row.
            tables: Of each model.
            chosen: For each model the rows to take, in this order; None for all.
            clip_norm: L2 bound C, in the unit of the gradient.
            out: Where the sums go; None for an array of the caller's own.

        Returns:
            One flat sum a row; zero where no customer is chosen.

        Raises:
            ValueError: Arrays have another shape or type than said here.
            IndexError: A chosen row is not in its table.
        """
        sums = np.empty_like(thetas) if out is None else out
        for given in (thetas, sums):  # loops do not look how long they are
            if given.shape != (len(tables), self.network.size) or given.dtype != np.float64:
                raise ValueError(
                    f"expected float64 numbers, {len(tables)} times {self.network.size}; "
                    f"got {given.dtype}, {given.shape}"
                )
        with self._lock:
            for theta, table, rows, own in zip(thetas, tables, chosen, sums, strict=True):
                gradient_sum(
                    theta,
                    self._layers,
                    _SIZES,
                    table.inputs,
                    table.labels,
                    np.arange(len(table)) if rows is None else rows,
                    clip_norm,
                    _LARGEST[self.precision],
                    self.network.activation == "tanh",
                    self._values,
                    self._weights,
                    self._product,
                    self._partial,
                    own,
                )
        return sums


def _laid_out(dims: Sequence[int], precision: Precision) -> tuple[np.ndarray, int, int, int]:
    """Return where each layer's numbers lie in the buffers, and the buffers' sizes."""
    lanes = LINE // np.dtype(precision).itemsize
    layers = np.zeros(len(dims) - 1, dtype=LAYER)
    values = weights = product = theta = 0
    for layer, (inputs, outputs) in zip(layers, pairwise(dims), strict=True):
        below, wide, high = (_filled(n, lanes) for n in (inputs, inputs + 1, outputs))
        columns = _filled(outputs, COLUMNS)
        layer["inputs"], layer["outputs"], layer["panels"] = inputs, outputs, high // lanes
        layer["given"], layer["given_width"] = values, wide
        values += TILE_ROWS * wide
        layer["delta"], layer["delta_width"] = values, max(high, columns)
        values += TILE_ROWS * max(high, columns)
        layer["forward"] = weights
        weights += high * (inputs + 1)
        layer["backward"] = weights
        weights += below * outputs
        layer["product"], layer["product_width"] = product, below
        product += columns * below
        layer["bias"], layer["spare"] = product, product + outputs
        product += 2 * outputs
        layer["theta"] = theta
        theta += outputs * (inputs + 1)
    return layers, values, weights, product


def _filled(count: int, unit: int) -> int:
    """Return the next multiple."""
    return -(-count // unit) * unit


@lru_cache(maxsize=16)
def kernel_of(network: Network, precision: Precision) -> Kernel:
    """Return a kernel of this process; its buffers are shared."""
    return Kernel(network, precision)
