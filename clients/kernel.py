"""Clipped gradient sums of one or many models at once, in tiles of a fixed number of rows.

The per-customer gradient is never materialised: for a fully connected layer with inputs a and
output gradients d, a customer's gradient is the outer product of d and (a, 1), its squared norm
is |d|^2 (|a|^2 + 1), and the clipped sum is one weighted matrix product a layer ("book-keeping",
Bu et al. 2023, "Differentially private optimization on large model at small cost").

Rows do not know each other. A matrix product chooses its kernel, hence its rounding, by its
shape; one more customer would then move everybody's gradient, and a hostile choice of parameters
blows that up (docs/privacy-model.md). So every product on the way to a gradient has one shape, a
tile of `tile` rows, filled up with nothing, of a width that keeps every row aligned alike. Of one
shape a library rounds every row alike, which is not taken on trust: `Kernel` tries it with its
own buffers before its first sum, and without that goes number by number. For the same reason the
K-th of many models gets the very numbers that it would get alone.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int

from common.fixed_point import BLOCK_ROWS
from common.network import Network, row_by_row

_LARGEST = {torch.float32: 2.0**30, torch.float64: 2.0**300}  # norm of a layer's inputs
_STABILISER = 1e-6  # Opacus': the factor is min(1, C / (norm + 1e-6))
_TRIALS = 3
_ALIGNED = (16, 64)  # bytes to which rows are filled up: what suffices here, and what a cache line is


@dataclass(frozen=True, eq=False)
class Table:
    """A merchant's customers as a kernel takes them.

    Attributes:
        inputs: [R, F].
        labels: [R], int64.
    """

    inputs: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(
        cls, x: Float[np.ndarray, "R F"], y: Int[np.ndarray, " R"], dtype: torch.dtype
    ) -> "Table":
        """Make a table of model inputs and segment ids."""
        return cls(torch.from_numpy(x).to(dtype), torch.from_numpy(y.astype(np.int64)))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Segment:
    """Rows of one model in one pass: the first `rows` of its tiles."""

    model: int
    first: int  # tile
    tiles: int
    rows: int
    table: Table
    chosen: torch.Tensor | slice


class Kernel:
    """Sums of clipped gradients for `models` models of one shape.

    Args:
        network: Shape of the models.
        models: K.
        dtype: torch.float32 or torch.float64, of everything up to a tile's sum.
        tile: Rows of a tile, T.

    Guarantee: one customer moves the exact sum of the gradients as computed by at most
    `clip_norm` in L2, and the computed sum by no more than
    `common.fixed_point.lattice_sensitivity` allows for, whatever the parameters.
    """

    def __init__(
        self,
        network: Network,
        models: int = 1,
        dtype: torch.dtype = torch.float64,
        tile: int = 64,
    ) -> None:
        self.network, self.models, self.dtype, self.tile = network, models, dtype, tile
        self._lock = threading.Lock()
        self._depth = len(network.dims) - 1
        for self._aligned in _ALIGNED:
            self._lay_out()
            if self._rows_are_alone():
                return
        self._by_tiles = False

    def _lay_out(self) -> None:
        """Make the models' padded weights, and room for two tiles."""
        network = self.network
        self._widths = [(self._padded(i + 1), self._padded(o)) for i, o in pairwise(network.dims)]
        size = sum(wide * high for wide, high in self._widths)
        self._weights = torch.zeros(self.models, size, dtype=self.dtype)
        self._total = torch.zeros(self.models, size, dtype=torch.float64)
        self._partial = torch.zeros(self.models, size, dtype=torch.float64)
        self._product = torch.zeros(size, dtype=self.dtype)
        self._products = [product[0] for product in self._layers(self._product[None])]
        layers = self._layers(self._weights)
        self._forward = [[model.T for model in layer] for layer in layers]
        self._backward = [
            [model[:, : self._widths[n - 1][1]] for model in layers[n]] if n else []
            for n in range(self._depth)
        ]
        self._by_tiles = True
        self._tiles = 0
        self._make_room(2)

    def _padded(self, width: int) -> int:
        unit = self._aligned // (4 if self.dtype == torch.float32 else 8)
        return -(-width // unit) * unit

    def _layers(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return padded matrices [K, out, in] of each layer as views into flat ones."""
        sizes = [wide * high for wide, high in self._widths]
        return [
            part.unflatten(1, (high, wide))
            for part, (wide, high) in zip(flat.split(sizes, dim=1), self._widths, strict=True)
        ]

    def _load(self, thetas: torch.Tensor) -> None:
        """Take over the models' parameters, [K, P]."""
        for padded, layer in zip(
            self._layers(self._weights), _layers(self.network, thetas), strict=True
        ):
            padded[:, : layer.shape[1], : layer.shape[2]] = layer

    @torch.inference_mode()
    def sums(
        self,
        thetas: Float64[np.ndarray, "K P"],
        tables: Sequence[Table],
        chosen: Sequence[Int[np.ndarray, " _"] | None],
        clip_norm: float,
    ) -> Float64[np.ndarray, "K P"]:
        """Sum, for each model, its customers' cross-entropy gradients, clipped to `clip_norm`.

        Args:
            thetas: Flat parameters, one model a row.
            tables: Of each model.
            chosen: For each model the rows to take, in this order; None for all.
            clip_norm: L2 bound C, in the unit of the gradient.

        Returns:
            One sum a row; zero where no customer is chosen. The caller's own.
        """
        with self._lock:
            self._load(torch.from_numpy(np.ascontiguousarray(thetas)))
            self._total.zero_()
            for segments in self._passes(tables, chosen):
                self._pass(segments, clip_norm)
            sums = torch.empty(self.models, self.network.size, dtype=torch.float64)
            for padded, layer in zip(
                self._layers(self._total), _layers(self.network, sums), strict=True
            ):
                layer.copy_(padded[:, : layer.shape[1], : layer.shape[2]])
            return sums.numpy()

    def _passes(
        self, tables: Sequence[Table], chosen: Sequence[Int[np.ndarray, " _"] | None]
    ) -> Iterator[list[_Segment]]:
        """Divide all chosen rows into passes of at most `BLOCK_ROWS` rows, models in order."""
        most = max(BLOCK_ROWS // self.tile, 1)
        segments: list[_Segment] = []
        used = 0
        for model, (table, rows) in enumerate(zip(tables, chosen, strict=True)):
            count = len(table) if rows is None else len(rows)
            start = 0
            while start < count:
                tiles = min(-(-(count - start) // self.tile), most - used)
                stop = min(start + tiles * self.tile, count)
                part = slice(start, stop) if rows is None else torch.from_numpy(rows[start:stop])
                segments.append(_Segment(model, used, tiles, stop - start, table, part))
                used, start = used + tiles, stop
                if used == most:
                    yield segments
                    segments, used = [], 0
        if segments:
            yield segments

    def _pass(self, segments: list[_Segment], clip_norm: float) -> None:
        tiles = segments[-1].first + segments[-1].tiles
        self._make_room(tiles)
        for segment in segments:
            self._fill(segment)
        owners = [segment.model for segment in segments for _ in range(segment.tiles)]
        factor = self._clipped(owners, clip_norm)
        for segment in segments:
            first = segment.first * self.tile
            factor[first + segment.rows : first + segment.tiles * self.tile] = 0.0
        for deltas in self._deltas:
            deltas[: tiles * self.tile].mul_(factor[:, None])
        self._partial.zero_()
        if self.dtype == torch.float64:
            for segment in segments:
                rows = slice(
                    segment.first * self.tile, (segment.first + segment.tiles) * self.tile
                )
                for inputs, deltas, product in zip(
                    self._inputs, self._deltas, self._products, strict=True
                ):
                    torch.mm(deltas[rows].T, inputs[rows], out=product)
                self._partial[segment.model] += self._product
        else:
            for number, model in enumerate(owners):
                for parts, product in zip(self._sum_tiles, self._products, strict=True):
                    torch.mm(*parts[number], out=product)
                self._partial[model] += self._product
        self._total += self._partial

    def _fill(self, segment: _Segment) -> None:
        first = segment.first * self.tile
        end, stop = first + segment.rows, first + segment.tiles * self.tile
        inputs, features = self._inputs[0], self.network.dims[0]
        inputs[first:end, :features] = segment.table.inputs[segment.chosen]
        inputs[end:stop, :features] = 0.0
        self._labels[first:end, 0] = segment.table.labels[segment.chosen]
        self._labels[end:stop] = 0

    def _clipped(self, owners: Sequence[int], clip_norm: float) -> torch.Tensor:
        """Fill inputs and output gradients of all layers; return each row's clipping factor."""
        count = len(owners) * self.tile
        self._go_forward(owners, count)
        self._go_backward(owners, count)
        squares = torch.zeros(count, dtype=self.dtype)
        tame = True
        for inputs, deltas in zip(self._inputs, self._deltas, strict=True):
            norm = torch.linalg.vector_norm(inputs[:count], dim=1)
            tame = tame and bool(norm.max() <= _LARGEST[self.dtype])
            norm.mul_(torch.linalg.vector_norm(deltas[:count], dim=1))
            squares.addcmul_(norm, norm)
        factor = (clip_norm / (squares.sqrt_() + _STABILISER)).clamp_(max=1.0)
        if not (tame and bool(factor.min() > 0.0)):
            self._leave_out(count, factor)
        return factor

    def _leave_out(self, count: int, factor: torch.Tensor) -> None:
        """Take rows out whose gradient this number format cannot hold; each by itself."""
        kept = torch.isfinite(factor) & (factor > 0.0)
        for inputs in self._inputs:
            kept &= torch.linalg.vector_norm(inputs[:count], dim=1) <= _LARGEST[self.dtype]
        factor[~kept] = 0.0
        for numbers in (*self._inputs, *self._deltas):
            numbers[:count][~kept] = 0.0
        for inputs, width in zip(self._inputs, self.network.dims, strict=False):
            inputs[:count, width] = 1.0

    def _go_forward(self, owners: Sequence[int], count: int) -> None:
        last = self._depth - 1
        for layer in range(self._depth):
            out = self._logits if layer == last else self._deltas[layer]
            self._products_of(self._inputs, out, self._forward[layer], layer, owners)
            if layer == last:
                break
            width = self.network.dims[layer + 1]
            before, hidden = out[:count, :width], self._inputs[layer + 1][:count, :width]
            if self.network.activation == "relu":
                torch.clamp_min(before, 0.0, out=hidden)
            else:
                torch.tanh(before, out=hidden)
        segments = self.network.dims[-1]
        delta = self._deltas[last][:count]
        delta[:, :segments] = torch.softmax(self._logits[:count, :segments], 1)
        delta.scatter_add_(1, self._labels[:count], self._minus[:count])

    def _go_backward(self, owners: Sequence[int], count: int) -> None:
        for layer in range(self._depth - 1, 0, -1):
            out = self._deltas[layer - 1]
            self._products_of(self._deltas, out, self._backward[layer], layer, owners)
            width = self.network.dims[layer]
            hidden, delta = self._inputs[layer][:count, :width], out[:count, :width]
            out[:count, width:] = 0.0  # what the bias's column left there
            if self.network.activation == "relu":
                torch.ops.aten.threshold_backward.grad_input(delta, hidden, 0, grad_input=delta)
            else:
                torch.ops.aten.tanh_backward.grad_input(delta, hidden, grad_input=delta)

    def _products_of(
        self,
        sources: list[torch.Tensor],
        out: torch.Tensor,
        weights: list[torch.Tensor],
        layer: int,
        owners: Sequence[int],
    ) -> None:
        """Multiply each tile's rows with its model's weights."""
        rows, results = self._cut[id(sources[layer])], self._cut[id(out)]
        if self._by_tiles:
            for number, model in enumerate(owners):
                torch.mm(rows[number], weights[model], out=results[number])
            return
        for number, model in enumerate(owners):
            matrix = np.zeros((weights[model].shape[1], weights[model].shape[0] + 1))
            matrix[:, :-1] = weights[model].T.numpy()
            product = row_by_row(rows[number].double().numpy(), matrix)
            results[number].copy_(torch.from_numpy(np.ascontiguousarray(product)))

    def _make_room(self, tiles: int) -> None:
        """Have buffers for so many tiles."""
        if tiles <= self._tiles:
            return
        self._tiles = max(tiles, 2 * self._tiles)
        rows, dims = self._tiles * self.tile, self.network.dims
        self._inputs = [torch.zeros(rows, wide, dtype=self.dtype) for wide, _ in self._widths]
        for inputs, width in zip(self._inputs, dims, strict=False):
            inputs[:, width] = 1.0
        self._deltas = [torch.zeros(rows, high, dtype=self.dtype) for _, high in self._widths]
        self._logits = torch.zeros_like(self._deltas[-1])
        self._labels = torch.zeros(rows, 1, dtype=torch.int64)
        self._minus = torch.full((rows, 1), -1.0, dtype=self.dtype)
        self._cut = {
            id(buffer): buffer.split(self.tile)
            for buffer in (*self._inputs, *self._deltas, self._logits)
        }
        self._sum_tiles = [
            [(d.T, a) for d, a in zip(self._cut[id(d)], self._cut[id(a)], strict=True)]
            for d, a in zip(self._deltas, self._inputs, strict=True)
        ]

    @torch.inference_mode()
    def _rows_are_alone(self) -> bool:
        """Try whether a row's numbers are the same at every place of both tiles, in any company.

        Operations on one shape do the same whatever the numbers are, so that a difference shows
        with nearly any numbers.
        """
        generator = np.random.default_rng(0)
        for trial in range(_TRIALS):
            theta = generator.normal(size=(1, self.network.size)) * 3.0**trial
            self._load(torch.from_numpy(theta).expand(self.models, -1))
            rows, features = 2 * self.tile, self.network.dims[0]
            row = torch.from_numpy(generator.uniform(-1, 1, features))
            self._inputs[0][:rows, :features] = row
            self._labels[:rows] = int(generator.integers(self.network.dims[-1]))
            everywhere = self._numbers(2)
            if not bool((everywhere == everywhere[0]).all()):
                return False
            company = torch.from_numpy(generator.uniform(-1, 1, (rows, features)))
            for place in (0, 1, self.tile // 2 + 1, self.tile - 1):
                self._inputs[0][:rows, :features] = company
                self._inputs[0][place, :features] = row
                for tiles in (1, 2):
                    if not torch.equal(self._numbers(tiles)[place], everywhere[0]):
                        return False
        return True

    def _numbers(self, tiles: int) -> torch.Tensor:
        """Return all numbers of each row that enter a sum."""
        factor = self._clipped([0] * tiles, 1.0)
        rows = tiles * self.tile
        parts = [part[:rows] for part in (*self._inputs[1:], *self._deltas)]
        return torch.cat([*parts, factor[:, None]], dim=1)


def _layers(network: Network, thetas: torch.Tensor) -> list[torch.Tensor]:
    """Return the layers' matrices [K, out, in + 1] as views into flat vectors [K, P]."""
    sizes = [out * (inp + 1) for inp, out in pairwise(network.dims)]
    return [
        part.unflatten(1, (out, inp + 1))
        for part, (inp, out) in zip(
            thetas.split(sizes, dim=1), pairwise(network.dims), strict=True
        )
    ]
