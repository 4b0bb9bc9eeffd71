"""Clipped gradient sums of one or many models at once, in tiles of a fixed number of rows.

The per-customer gradient is never materialised: for a fully connected layer with inputs a and
output gradients d, a customer's gradient is the outer product of d and (a, 1), its squared norm
is |d|^2 (|a|^2 + 1), and the clipped sum is one weighted matrix product a layer ("book-keeping",
Bu et al. 2023, "Differentially private optimization on large model at small cost").

Rows do not know each other. A matrix product chooses its kernel, hence its rounding, by its
shape; one more customer would then move everybody's gradient, and a hostile choice of parameters
blows that up (docs/privacy-model.md). Here every product on the way to a gradient has a multiple
of 32 rows, filled up with nothing, of a width that keeps all rows aligned alike. On the libraries
at hand a row is then rounded alike in every place of every such product. That is not taken on
trust: `Kernel` tries all shapes that it may use, with its own buffers, before its first sum.
Where it does not hold, it takes products of one single shape; where those are no better, it goes
number by number. For the same reason the K-th of many models gets the very numbers that it would
get alone.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64

from common.fixed_point import BLOCK_ROWS, CHUNK_ROWS, TILE_ROWS, TILES_AT_ONCE
from common.network import Network, row_by_row

Precision = Literal["float32", "float64"]

_TORCH = {"float32": torch.float32, "float64": torch.float64}
_LARGEST = {"float32": 2.0**30, "float64": 2.0**300}  # norm of a layer's inputs
_STABILISER = 1e-6  # Opacus': the factor is min(1, C / (norm + 1e-6))
_ALIGNED = (16, 64)  # bytes that rows are filled up to: what does here, and a cache line
_VECTOR = 32  # bytes
_GRAIN = 32  # rows; products have multiples of it
_CACHE = 2**20  # bytes of the numbers that one pass works on


@dataclass(frozen=True, eq=False)
class Table:
    """A merchant's customers as a kernel takes them.

    Attributes:
        inputs: [R, W], in the kernel's precision: F features, a one, and zeros to fill up.
        labels: [R].
    """

    inputs: Float[np.ndarray, "R W"]
    labels: Int64[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class _Block:
    """Where the products of at most `BLOCK_ROWS` rows of a model are summed.

    The first block is summed where the whole sum is wanted, each further one by itself first.
    """

    total: torch.Tensor
    partial: torch.Tensor  # for a further block
    rows: int = 0
    first: bool = True
    empty: bool = True

    def add(self, product: torch.Tensor) -> None:
        target = self.total if self.first else self.partial
        if self.empty:
            target.copy_(product)
        else:
            target += product
        self.empty = False

    def begin_another(self) -> None:
        if not (self.first or self.empty):
            self.total += self.partial
        self.rows, self.first, self.empty = 0, False, True

    def finish(self) -> None:
        if self.first and self.empty:
            self.total.zero_()  # no customers
        self.begin_another()


@dataclass(frozen=True)
class _Chunk:
    """Some rows of one model, next to each other in the buffers."""

    model: int
    first: int  # row of the buffers
    rows: int
    filled: int  # rows, with those that are filled up with nothing
    table: Table
    chosen: Int[np.ndarray, " _"] | slice


class Kernel:
    """Sums of clipped gradients for up to `models` models of one shape.

    Args:
        network: Shape of the models.
        models: K.
        precision: Of everything up to a tile's sum; what comes after is float64.

    Guarantee: one customer moves the exact sum of the gradients as computed by at most
    `clip_norm` in L2, and the computed sum by no more than
    `common.fixed_point.lattice_sensitivity` allows for, whatever the parameters. In float32 the
    rows must come in a secret random order.
    """

    def __init__(self, network: Network, models: int = 1, precision: Precision = "float64") -> None:
        self.network, self.models, self.precision = network, models, precision
        self._type = _TORCH[precision]
        self._tile = TILE_ROWS if precision == "float32" else BLOCK_ROWS
        self._depth = len(network.dims) - 1
        self._lock = threading.Lock()
        self._steps: int | None = None  # rows of a product: any; or so many; 0: number by number
        for aligned in _ALIGNED:
            self._lay_out(aligned)
            for self._steps in (None, _GRAIN):
                if self._rows_are_alone():
                    return
        self._steps = 0

    @cached_property
    def padding(self) -> Int64[np.ndarray, " _"]:
        """Places of a packed vector that are no parameters, but fill it up."""
        return np.flatnonzero(self.pack(np.ones((1, self.network.size)))[0] == 0)

    @property
    def size(self) -> int:
        """Numbers of a packed vector, Q: parameters in the kernel's layout, filled up with 0."""
        return self._weights.shape[1]

    @property
    def form(self) -> tuple[Precision, int]:
        """What tables of this kernel look like: kernels of one form share them."""
        return self.precision, self._widths[0][0]

    def table(self, x: Float[np.ndarray, "R F"], y: Int[np.ndarray, " R"]) -> Table:
        """Make a table of model inputs and segment ids.

        Raises:
            IndexError: A segment id is not one of the network's.
        """
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.network.dims[-1]:
            raise IndexError(f"segment ids must lie from 0 to {self.network.dims[-1] - 1}")
        inputs = np.zeros((len(x), self._widths[0][0]), dtype=self.precision)
        inputs[:, : x.shape[1]] = x
        inputs[:, x.shape[1]] = 1.0
        return Table(inputs, np.asarray(y, dtype=np.int64))

    def pack(self, vectors: Float64[np.ndarray, "N P"]) -> Float64[np.ndarray, "N Q"]:
        """Return flat vectors in the kernel's layout: a matrix [in, out] a layer, filled up."""
        packed = torch.zeros(len(vectors), self.size, dtype=torch.float64)
        for own, layer in self._matched(packed, torch.from_numpy(np.ascontiguousarray(vectors))):
            own.copy_(layer)
        return packed.numpy()

    def unpack(self, packed: Float64[np.ndarray, "N Q"]) -> Float64[np.ndarray, "N P"]:
        """Return packed vectors as flat ones."""
        vectors = torch.empty(len(packed), self.network.size, dtype=torch.float64)
        for own, layer in self._matched(torch.from_numpy(packed), vectors):
            layer.copy_(own)
        return vectors.numpy()

    @torch.inference_mode()
    def sums(
        self,
        thetas: Float64[np.ndarray, "K Q"],
        tables: Sequence[Table],
        chosen: Sequence[Int[np.ndarray, " _"] | None],
        clip_norm: float,
        *,
        out: Float64[np.ndarray, "K Q"] | None = None,
    ) -> Float64[np.ndarray, "K Q"]:
        """Sum, for each model, its customers' cross-entropy gradients, clipped to `clip_norm`.

        Args:
            thetas: Packed parameters, one model a row; K may be less than `models`.
            tables: Of each model.
            chosen: For each model the rows to take, in this order; None for all.
            clip_norm: L2 bound C, in the unit of the gradient.
            out: Where the sums go; None for an array of the caller's own.

        Returns:
            One packed sum a row; zero where no customer is chosen.
        """
        sums = np.empty_like(thetas) if out is None else out
        with self._lock:
            self._weights[: len(thetas)] = torch.from_numpy(thetas)
            rows = zip(torch.from_numpy(sums), self._partial, strict=False)
            blocks = [_Block(total, partial) for total, partial in rows]
            for chunks in self._passes(tables, chosen):
                self._pass(chunks, blocks, clip_norm)
            for block in blocks:
                block.finish()
        return sums

    def _lay_out(self, aligned: int) -> None:
        """Make the models' padded weights, and room for two tiles."""
        unit = aligned // self._type.itemsize
        self._widths = [
            (-(-(inp + 1) // unit) * unit, -(-out // unit) * unit)
            for inp, out in pairwise(self.network.dims)
        ]
        vector = _VECTOR // self._type.itemsize  # a softmax over less takes five times as long
        wide, high = self._widths[-1]
        self._widths[-1] = wide, -(-high // vector) * vector
        size = sum(wide * high for wide, high in self._widths)
        self._weights = torch.zeros(self.models, size, dtype=self._type)
        self._partial = torch.zeros(self.models, size, dtype=torch.float64)
        self._product, self._other = torch.zeros(2, size, dtype=self._type)
        layers = self._layers(self._weights)
        self._forward = [list(layer) for layer in layers]
        self._backward = [
            [model[: self._widths[n - 1][1]].T for model in layers[n]] if n else []
            for n in range(self._depth)
        ]
        self._products = [layer[0] for layer in self._layers(self._product[None])]
        self._more = [layer[0] for layer in self._layers(self._other[None])]
        width = sum(map(sum, self._widths)) * self._type.itemsize
        fitting = _CACHE // width // TILE_ROWS * TILE_ROWS
        self._most = min(max(fitting, TILE_ROWS), CHUNK_ROWS)  # rows of a chunk, and of a pass
        self._buffers = _Buffers(self.network.dims, self._widths, self._type, self._most)
        self._views: dict[int, _Views] = {}
        self._parts: dict[tuple[int, int], _Part] = {}

    def _layers(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices [K, in, out] of each layer as views into packed vectors."""
        return _split(packed, self._widths)

    def _matched(
        self, packed: torch.Tensor, flat: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pair the parameters of packed vectors with those of flat ones, layer by layer."""
        shapes = [(out, inp + 1) for inp, out in pairwise(self.network.dims)]
        return [
            (own[:, : layer.shape[2], : layer.shape[1]].transpose(1, 2), layer)
            for own, layer in zip(self._layers(packed), _split(flat, shapes), strict=True)
        ]

    def _passes(
        self, tables: Sequence[Table], chosen: Sequence[Int[np.ndarray, " _"] | None]
    ) -> Iterator[list[_Chunk]]:
        """Put chunks together that fit into the cache.

        How a model's rows are divided depends on their number alone: a sum must be the same
        whoever else is summed.
        """
        chunks: list[_Chunk] = []
        used = 0
        for model, (table, rows) in enumerate(zip(tables, chosen, strict=True)):
            count = len(table) if rows is None else len(rows)
            for start in range(0, count, self._most):
                size = min(count - start, self._most)
                filled = -(-size // _GRAIN) * _GRAIN
                if used + filled > self._most:
                    yield chunks
                    chunks, used = [], 0
                stop = start + size
                part = slice(start, stop) if rows is None else rows[start:stop]
                chunks.append(_Chunk(model, used, size, filled, table, part))
                used += filled
        if chunks:
            yield chunks

    def _pass(self, chunks: list[_Chunk], blocks: "list[_Block]", clip_norm: float) -> None:
        for chunk in chunks:
            self._fill(chunk)
        views = self._views_of(chunks[-1].first + chunks[-1].filled)
        parts = [self._part_of(chunk.first, chunk.filled) for chunk in chunks]
        factor = self._clipped(views, parts, [chunk.model for chunk in chunks], clip_norm)
        for chunk in chunks:
            factor[chunk.first + chunk.rows : chunk.first + chunk.filled] = 0.0
        for deltas in views.deltas:
            deltas.mul_(views.factor)
        for chunk, part in zip(chunks, parts, strict=True):
            block = blocks[chunk.model]
            if block.rows + self._most > BLOCK_ROWS:
                block.begin_another()
            for tiles in part.tiles:
                self._sum(tiles)
                block.add(self._product)
            block.rows += chunk.filled

    def _sum(self, tiles: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """Add up some tiles' products, layer by layer."""
        for number, layers in enumerate(tiles):
            target = self._more if number else self._products
            for (inputs, deltas), product in zip(layers, target, strict=True):
                torch.mm(inputs, deltas, out=product)
            if number:
                self._product += self._other

    def _fill(self, chunk: _Chunk) -> None:
        end, stop = chunk.first + chunk.rows, chunk.first + chunk.filled
        inputs, labels = self._buffers.input_rows, self._buffers.label_rows
        if isinstance(chunk.chosen, slice):
            inputs[chunk.first : end] = chunk.table.inputs[chunk.chosen]
            labels[chunk.first : end] = chunk.table.labels[chunk.chosen]
        else:  # "clip" spares numpy a copy
            rows = chunk.chosen
            np.take(chunk.table.inputs, rows, 0, out=inputs[chunk.first : end], mode="clip")
            np.take(chunk.table.labels, rows, 0, out=labels[chunk.first : end], mode="clip")
        inputs[end:stop] = 0.0
        labels[end:stop] = 0

    def _clipped(
        self,
        views: "_Views",
        parts: Sequence["_Part"],
        owners: Sequence[int],
        clip_norm: float,
    ) -> Float[np.ndarray, " _"]:
        """Fill inputs and output gradients of all layers; return each row's clipping factor."""
        self._go_forward(views, parts, owners)
        self._go_backward(views, parts, owners)
        for layer in range(self._depth):
            torch.linalg.vector_norm(views.inputs[layer], dim=1, out=views.input_norms[layer])
            torch.linalg.vector_norm(views.deltas[layer], dim=1, out=views.delta_norms[layer])
        tame = views.norm_numbers.max() <= _LARGEST[self.precision]
        views.delta_norms.mul_(views.input_norms)
        torch.sum(views.delta_norms.mul_(views.delta_norms), 0, out=views.norm)
        factor = views.factor_numbers
        np.sqrt(factor, out=factor)
        factor += _STABILISER
        np.divide(clip_norm, factor, out=factor)
        np.minimum(factor, 1.0, out=factor)
        if not (tame and factor.min() > 0.0):
            self._leave_out(views)
        return factor

    def _leave_out(self, views: "_Views") -> None:
        """Take rows out whose gradient this number format cannot hold; each by itself."""
        kept = (views.norm > 0.0) & (views.input_norms <= _LARGEST[self.precision]).all(dim=0)
        views.norm[~kept] = 0.0
        for numbers in (*views.inputs, *views.deltas):
            numbers[~kept] = 0.0
        for inputs, width in zip(views.inputs, self.network.dims, strict=False):
            inputs[:, width] = 1.0

    def _go_forward(self, views: "_Views", parts: Sequence["_Part"], owners: Sequence[int]) -> None:
        for layer, weights in enumerate(self._forward):
            for part, model in zip(parts, owners, strict=True):
                self._multiply(part.inputs[layer], weights[model], part.before[layer])
            if layer == self._depth - 1:
                break
            if self.network.activation == "relu":
                torch.clamp_min(views.before[layer], 0.0, out=views.hidden[layer])
            else:
                torch.tanh(views.before[layer], out=views.hidden[layer])
        if views.no_segments is not None:
            views.no_segments.fill_(-math.inf)
        torch.softmax(views.logits, 1, out=views.deltas[-1])
        views.deltas[-1].scatter_add_(1, views.labels, views.minus)

    def _go_backward(
        self, views: "_Views", parts: Sequence["_Part"], owners: Sequence[int]
    ) -> None:
        for layer in range(self._depth - 1, 0, -1):
            weights = self._backward[layer]
            for part, model in zip(parts, owners, strict=True):
                self._multiply(part.deltas[layer], weights[model], part.deltas[layer - 1])
            hidden, delta = views.hidden[layer - 1], views.before[layer - 1]
            if self.network.activation == "relu":
                torch.ops.aten.threshold_backward.grad_input(delta, hidden, 0, grad_input=delta)
            else:
                torch.ops.aten.tanh_backward.grad_input(delta, hidden, grad_input=delta)
            spare = views.spare[layer - 1]
            if spare is not None:
                spare.zero_()  # what the bias's row left there

    def _multiply(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply a chunk's rows with its model's weights."""
        if self._steps is None:
            torch.mm(rows, weights, out=out)
        elif self._steps:
            for start in range(0, len(rows), self._steps):
                part = slice(start, start + self._steps)
                torch.mm(rows[part], weights, out=out[part])
        else:
            matrix = np.zeros((weights.shape[1], weights.shape[0] + 1))
            matrix[:, :-1] = weights.T.numpy()
            product = row_by_row(rows.numpy().astype(np.float64), matrix)
            out.copy_(torch.from_numpy(np.ascontiguousarray(product)))

    def _views_of(self, rows: int) -> "_Views":
        """Return views of the first so many rows."""
        if rows not in self._views:
            self._views[rows] = _Views(self._buffers, rows)
        return self._views[rows]

    def _part_of(self, first: int, rows: int) -> "_Part":
        """Return views of a chunk."""
        if (first, rows) not in self._parts:
            self._parts[first, rows] = _Part(self._buffers, first, first + rows, self._tile)
        return self._parts[first, rows]

    @torch.inference_mode()
    def _rows_are_alone(self) -> bool:
        """Try whether a row's numbers are the same at every place of every size, and in company.

        Operations on one shape do the same whatever the numbers are, so that a difference shows
        with nearly any numbers.
        """
        generator = np.random.default_rng(0)
        features, sizes = self.network.dims[0], range(_GRAIN, self._most + 1, _GRAIN)
        inputs, labels = self._buffers.input_rows[:, :features], self._buffers.label_rows
        for scale in (1.0, 3.0):
            theta = generator.normal(size=self.network.size) * scale
            packed = torch.from_numpy(self.pack(theta[None]))
            self._weights.copy_(packed.expand(self.models, -1))
            row = generator.uniform(-1, 1, features)
            inputs[:], labels[:] = row, generator.integers(self.network.dims[-1])
            everywhere = self._numbers(self._most)
            if not all((self._numbers(size) == everywhere[0]).all() for size in sizes):
                return False
            company = generator.uniform(-1, 1, inputs.shape)
            for size in {sizes[0], sizes[len(sizes) // 2], sizes[-1]}:
                inputs[:] = company
                places = [size - _GRAIN + generator.integers(_GRAIN), generator.integers(size)]
                inputs[places] = row
                if not (self._numbers(size)[places] == everywhere[0]).all():
                    return False
        return True

    def _numbers(self, size: int) -> Float[np.ndarray, "_ _"]:
        """Return all numbers of each row that enter a sum."""
        views = self._views_of(size)
        factor = self._clipped(views, [self._part_of(0, size)], [0], 1.0)
        parts = [part.numpy() for part in (*views.inputs[1:], *views.deltas)]
        return np.concatenate([*parts, factor[:, None]], axis=1)


class _Buffers:
    """The numbers of all rows in a pass, layer by layer, filled up to aligned widths."""

    def __init__(
        self,
        dims: tuple[int, ...],
        widths: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        rows: int,
    ) -> None:
        self.dims, self.rows = dims, rows
        self.inputs = [torch.zeros(rows, wide, dtype=dtype) for wide, _ in widths]
        for inputs, width in zip(self.inputs, dims, strict=False):
            inputs[:, width] = 1.0
        self.deltas = [torch.zeros(rows, high, dtype=dtype) for _, high in widths]
        self.logits = torch.zeros_like(self.deltas[-1])
        self.labels = torch.zeros(rows, 1, dtype=torch.int64)
        self.minus = torch.full((rows, 1), -1.0, dtype=dtype)
        self.norms = torch.zeros(2, len(widths), rows, dtype=dtype)
        self.factor = torch.zeros(rows, dtype=dtype)
        self.input_rows = self.inputs[0].numpy()
        self.label_rows = self.labels.numpy()[:, 0]


class _Part:
    """A chunk's rows; kept, since making views takes longer than small products."""

    def __init__(self, buffers: _Buffers, first: int, stop: int, tile: int) -> None:
        self.inputs = [inputs[first:stop] for inputs in buffers.inputs]
        self.deltas = [deltas[first:stop] for deltas in buffers.deltas]
        self.before = [*self.deltas[:-1], buffers.logits[first:stop]]
        tiles = [
            [
                (inputs[start : min(start + tile, stop)].T, deltas[start : min(start + tile, stop)])
                for inputs, deltas in zip(buffers.inputs, buffers.deltas, strict=True)
            ]
            for start in range(first, stop, tile)
        ]
        self.tiles = [tiles[n : n + TILES_AT_ONCE] for n in range(0, len(tiles), TILES_AT_ONCE)]


class _Views:
    """The first so many rows of buffers."""

    def __init__(self, buffers: _Buffers, rows: int) -> None:
        dims = buffers.dims
        self.inputs = [inputs[:rows] for inputs in buffers.inputs]
        self.deltas = [deltas[:rows] for deltas in buffers.deltas]
        self.before = [
            deltas[:, :width] for deltas, width in zip(self.deltas, dims[1:-1], strict=False)
        ]
        self.hidden = [
            inputs[:, :width] for inputs, width in zip(self.inputs[1:], dims[1:-1], strict=True)
        ]
        self.spare = [
            deltas[:, width:] if width < deltas.shape[1] else None
            for deltas, width in zip(self.deltas, dims[1:-1], strict=False)
        ]
        self.logits = buffers.logits[:rows]
        filled_up = dims[-1] < self.logits.shape[1]
        self.no_segments = self.logits[:, dims[-1] :] if filled_up else None
        self.labels, self.minus = buffers.labels[:rows], buffers.minus[:rows]
        self.input_norms, self.delta_norms = buffers.norms[:, :, :rows]
        self.norm_numbers = self.input_norms.numpy()
        self.norm = buffers.factor[:rows]  # which the factor takes the place of
        self.factor, self.factor_numbers = self.norm[:, None], self.norm.numpy()


def _split(flat: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return matrices [K, high, wide] one after the other as views into [K, P]."""
    ends = list(accumulate(high * wide for high, wide in shapes))
    return [
        flat[:, end - high * wide : end].view(len(flat), high, wide)
        for end, (high, wide) in zip(ends, shapes, strict=True)
    ]


@lru_cache(maxsize=16)
def kernel_of(network: Network, models: int, precision: Precision) -> Kernel:
    """Return a kernel of this process; its buffers and its trial are shared."""
    return Kernel(network, models, precision)
