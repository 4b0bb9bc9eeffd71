"""The loops of `clients.kernel`: one model's clipped gradient sum, without anything in between.

Rows do not know each other. A number of a row is a chain of fused multiplications and additions
over the row's own numbers, in an order that is written down here and the same at every place of
every size; IEEE 754 fixes each of them. (The order in which a norm's squares are added is the
compiler's, for rows of this length.) No library chooses anything by the number of rows.

Buffers are flat; `layers` says where each layer's numbers begin, `LAYER` what it holds. Matrices
that are multiplied from the right lie in panels of `lanes` columns: [panel, row, lane].
"""

import math
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from common.compiled import compiled

LINE = 64  # bytes of a panel's row: a cache line
# AVX-512 has 32 registers of a cache line each, whose sums take four cycles; others have 16 of
# half a line. No row's numbers depend on it, nor does a sum's.
_WIDE = "+avx512f" in cast("Any", get_host_cpu_features)().split(",")
STRIP = 8 if _WIDE else 4  # rows of a batch that are multiplied at once; divides a tile's
COLUMNS = 8 if _WIDE else 6  # of a batch, of which products are summed at once
_STABILISER = 1e-6  # Opacus': the factor is min(1, C / (norm + 1e-6))

LAYER = np.dtype(
    [
        ("inputs", np.int64),  # without the one
        ("outputs", np.int64),
        ("panels", np.int64),  # of the outputs
        ("given", np.int64),  # where the rows of inputs begin: [tile rows, given_width]
        ("given_width", np.int64),
        ("delta", np.int64),  # where the rows of output gradients begin
        ("delta_width", np.int64),
        ("forward", np.int64),  # where the weights begin: [panels, inputs + 1, lanes]
        ("backward", np.int64),  # transposed: [panels of the inputs, outputs, lanes]
        ("product", np.int64),  # where the sum of outer products begins: [_, product_width]
        ("product_width", np.int64),
        ("bias", np.int64),  # where the sum of output gradients begins
        ("spare", np.int64),  # as much room again
        ("theta", np.int64),  # where the flat parameters begin: [outputs, inputs + 1]
    ]
)


def _products(rows: int) -> Any:  # an intrinsic of numba's
    """Return `rows` times a cache line of sums of products, as one loop over registers.

    `(a, at, step, next, w, from, wide, count, out, to, apart, new)`: for row r and lane v,
    out[to + r apart + v] becomes the sum over k below `count`, in order, of
    a[at + r step + k next] w[from + k wide + v]; is added to it unless `new`.
    """

    @intrinsic
    def product(  # noqa: PLR0913, PLR0917
        _: Any,
        a: Any,
        at: Any,
        step: Any,
        next_: Any,
        w: Any,
        from_: Any,
        wide: Any,
        count: Any,
        out: Any,
        to: Any,
        apart: Any,
        new: Any,
    ) -> Any:
        place = types.intp
        signature = types.void(
            a, place, place, place, w, place, place, place, out, place, place, types.boolean
        )
        return signature, lambda *context: _emit(rows, *context)

    return product


def _emit(rows: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Write the loop of `_products` in LLVM's language."""
    kinds = signature.args
    a, at, step, next_, w, from_, wide, count, out, to, apart, new = arguments
    number = context.get_value_type(kinds[0].dtype)
    size = kinds[0].dtype.bitwidth // 8
    lanes = LINE // size
    vector, index = ir.VectorType(number, lanes), ir.IntType(64)
    kind = ir.FunctionType(vector, [vector] * 3)
    fma = builder.module.globals.get(name := f"llvm.fma.v{lanes}f{size * 8}")
    fma = fma or ir.Function(builder.module, kind, name)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    nothing = vector(ir.Undefined)

    def pointer(kind: Any, array: Any, offset: Any) -> Any:
        return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])

    def line(start: Any) -> Any:
        return builder.bitcast(start, vector.as_pointer())

    def row(offset: Any, number: int, distance: Any) -> Any:
        return builder.add(offset, builder.mul(index(number), distance))

    left = [pointer(kinds[0], a, row(at, number, step)) for number in range(rows)]
    right = pointer(kinds[4], w, from_)
    targets = [line(pointer(kinds[8], out, row(to, number, apart))) for number in range(rows)]

    before = builder.basic_block
    loop, after = (builder.function.append_basic_block(name) for name in ("sum", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    done, along, down = (builder.phi(index) for _ in range(3))
    sums = [builder.phi(vector) for _ in range(rows)]
    weights = builder.load(line(builder.gep(right, [down])), align=size)
    totals = []
    for start, sum_ in zip(left, sums, strict=True):
        factor = builder.insert_element(
            nothing, builder.load(builder.gep(start, [along])), ir.IntType(32)(0)
        )
        factor = builder.shuffle_vector(factor, nothing, everywhere)
        totals.append(builder.call(fma, [factor, weights, sum_]))
    counted = builder.add(done, index(1))
    steps = [
        (done, index(0), counted),
        (along, index(0), builder.add(along, next_)),
        (down, index(0), builder.add(down, wide)),
    ]
    steps += [(sum_, vector(None), total) for sum_, total in zip(sums, totals, strict=True)]
    for variable, first, following in steps:
        variable.add_incoming(first, before)
        variable.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", counted, count), loop, after)
    builder.position_at_end(after)
    for target, total in zip(targets, totals, strict=True):
        added = builder.fadd(builder.load(target, align=size), total)
        builder.store(builder.select(new, total, added), target, align=size)
    return context.get_dummy_value()


_strip_product = _products(STRIP)
_column_product = _products(COLUMNS)


@compiled
def gradient_sum(  # noqa: PLR0913, PLR0917  # numba's functions take nothing by name
    theta: Any,
    layers: Any,
    sizes: Any,
    inputs: Any,
    labels: Any,
    chosen: Any,
    clip_norm: float,
    largest: float,
    tanh: bool,
    values: Any,
    weights: Any,
    product: Any,
    partial: Any,
    out: Any,
) -> None:
    """Write the sum of the chosen rows' clipped gradients into `out`.

    Args:
        theta: [P] flat parameters, float64.
        layers: [L] of `LAYER`.
        sizes: Rows of a tile, of tiles that are added up in this precision, and of a block.
        inputs: [R, F] model inputs.
        labels: [R] segment ids.
        chosen: [N] rows, in the order in which they are summed.
        clip_norm: C.
        largest: Square of the norm of a layer's inputs that a row may have.
        tanh: The activation; else relu.
        values: Room for the rows of a tile.
        weights: Room for the parameters in panels, zeros where there is none.
        product: Room for a sum of tiles.
        partial: The same for a block of rows, in float64.
        out: [P] float64.

    Raises:
        IndexError: A chosen row is not below R.
    """
    count = len(chosen)
    tile_rows, group_rows, block_rows = sizes
    _check(chosen, len(labels))
    _spread(theta, layers, weights)
    if count == 0:
        out[:] = 0.0
    for block in range(0, count, block_rows):
        stop = min(block + block_rows, count)
        for group in range(block, stop, group_rows):
            end = min(group + group_rows, stop)
            for tile in range(group, end, tile_rows):
                rows = min(tile_rows, end - tile)
                _fill(layers[0], inputs, chosen[tile : tile + rows], values)
                _go_forward(layers, rows, tanh, weights, values)
                _compare(layers[-1], labels, chosen[tile : tile + rows], values)
                _go_backward(layers, rows, tanh, weights, values)
                _clip(layers, rows, clip_norm, largest, values)
                _multiply(layers, rows, tile == group, values, product)
            if stop - block > group_rows:
                _add(product, group == block, partial)
        if stop - block > group_rows:
            _collect(layers, partial, block == 0, out)
        else:
            _collect(layers, product, block == 0, out)


@compiled
def _check(chosen: Any, known: int) -> None:
    for place in range(len(chosen)):
        if not 0 <= chosen[place] < known:
            raise IndexError("a chosen row is not in the table")


@compiled
def _spread(theta: Any, layers: Any, weights: Any) -> None:
    """Write flat parameters into panels."""
    lanes = LINE // weights.itemsize
    for number in range(len(layers)):
        layer = layers[number]
        width = layer.inputs + 1
        for output in range(layer.outputs):
            panel, lane = divmod(output, lanes)
            own = theta[layer.theta + output * width : layer.theta + (output + 1) * width]
            start = layer.forward + panel * width * lanes + lane
            column = weights[start : start + width * lanes : lanes]
            for place in range(width):
                column[place] = own[place]
            if number:
                for first in range(0, layer.inputs, lanes):
                    part = own[first : min(first + lanes, layer.inputs)]
                    start = layer.backward + first * layer.outputs + output * lanes
                    row = weights[start : start + len(part)]
                    for place in range(len(part)):
                        row[place] = part[place]


@compiled
def _fill(layer: Any, inputs: Any, chosen: Any, values: Any) -> None:
    """Copy rows, and put the one behind them that the bias is multiplied with."""
    features = layer.inputs
    for row in range(len(chosen)):
        to = layer.given + row * layer.given_width
        own, copy = inputs[chosen[row]], values[to : to + features]
        for place in range(features):
            copy[place] = own[place]
        values[to + features] = 1.0


@compiled
def _go_forward(layers: Any, rows: int, tanh: bool, weights: Any, values: Any) -> None:
    """Compute the inputs of all layers, and the logits in the place of their gradients."""
    lanes = LINE // weights.itemsize
    last = len(layers) - 1
    for number in range(last + 1):
        layer = layers[number]
        width = layer.inputs + 1
        to, apart = layer.delta, layer.delta_width
        if number < last:
            to, apart = layers[number + 1].given, layers[number + 1].given_width
        for panel in range(layer.panels):
            for row in range(0, rows, STRIP):
                _strip_product(
                    values, layer.given + row * layer.given_width, layer.given_width, 1,
                    weights, layer.forward + panel * width * lanes, lanes, width,
                    values, to + row * apart + panel * lanes, apart, True,
                )  # fmt: skip
        if number < last:
            _activate(layers[number + 1], rows, tanh, values)


@compiled
def _activate(layer: Any, rows: int, tanh: bool, values: Any) -> None:
    """Turn what the layer below gave into the inputs of this one."""
    zero, one, two = values.dtype.type(0.0), values.dtype.type(1.0), values.dtype.type(2.0)
    for row in range(rows):
        start = layer.given + row * layer.given_width
        hidden = values[start : start + layer.inputs]
        if tanh:
            for place in range(len(hidden)):
                # a third of the time of libm's, to within one unit of 1
                hidden[place] = one - two / (math.exp(two * hidden[place]) + one)
        else:
            for place in range(len(hidden)):
                # a product, since a branch would be guessed wrong half of the time
                hidden[place] *= values.dtype.type(hidden[place] > zero)
        values[start + layer.inputs] = 1.0


@compiled
def _compare(layer: Any, labels: Any, chosen: Any, values: Any) -> None:
    """Turn logits into the gradient of the cross-entropy: softmax less the right answer."""
    segments = layer.outputs
    for row in range(len(chosen)):
        start = layer.delta + row * layer.delta_width
        scores = values[start : start + segments]
        highest = scores[0]
        for place in range(1, segments):
            highest = max(highest, scores[place])
        total = values.dtype.type(0.0)
        for place in range(segments):
            scores[place] = math.exp(scores[place] - highest)
            total += scores[place]
        for place in range(segments):
            scores[place] /= total
        scores[labels[chosen[row]]] -= values.dtype.type(1.0)


@compiled
def _go_backward(layers: Any, rows: int, tanh: bool, weights: Any, values: Any) -> None:
    """Compute the gradients of all layers' outputs."""
    lanes = LINE // weights.itemsize
    zero, one = values.dtype.type(0.0), values.dtype.type(1.0)
    for number in range(len(layers) - 1, 0, -1):
        layer, below = layers[number], layers[number - 1]
        for panel in range(below.panels):
            for row in range(0, rows, STRIP):
                _strip_product(
                    values, layer.delta + row * layer.delta_width, layer.delta_width, 1,
                    weights, layer.backward + panel * layer.outputs * lanes, lanes, layer.outputs,
                    values, below.delta + row * below.delta_width + panel * lanes,
                    below.delta_width, True,
                )  # fmt: skip
        for row in range(rows):
            start = layer.given + row * layer.given_width
            hidden = values[start : start + layer.inputs]
            start = below.delta + row * below.delta_width
            delta = values[start : start + layer.inputs]
            if tanh:
                for place in range(len(delta)):
                    delta[place] *= one - hidden[place] * hidden[place]
            else:
                for place in range(len(delta)):
                    delta[place] *= values.dtype.type(hidden[place] > zero)


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _square(values: Any, start: int, count: int) -> Any:
    """Return the squared norm of some numbers; the order in which it adds is `count`'s alone."""
    numbers = values[start : start + count]
    total = values.dtype.type(0.0)
    for place in range(len(numbers)):
        total += numbers[place] * numbers[place]
    return total


@compiled
def _clip(layers: Any, rows: int, clip_norm: float, largest: float, values: Any) -> None:
    """Scale each row's gradient to the clip norm; leave those out that no number holds."""
    for row in range(rows):
        norm, held = values.dtype.type(0.0), True
        for number in range(len(layers)):
            layer = layers[number]
            given = _square(values, layer.given + row * layer.given_width, layer.inputs + 1)
            delta = _square(values, layer.delta + row * layer.delta_width, layer.outputs)
            held = held and given <= largest
            norm += given * delta
        held = held and norm < math.inf  # which NaN is not either
        factor = values.dtype.type(min(1.0, clip_norm / (math.sqrt(float(norm)) + _STABILISER)))
        held = held and factor > 0.0
        for number in range(len(layers)):
            layer = layers[number]
            start = layer.delta + row * layer.delta_width
            delta = values[start : start + layer.outputs]
            if held:
                for place in range(len(delta)):
                    delta[place] *= factor
            else:
                delta[:] = 0.0
                start = layer.given + row * layer.given_width
                values[start : start + layer.inputs + 1] = 0.0


@compiled
def _multiply(layers: Any, rows: int, new: bool, values: Any, product: Any) -> None:
    """Sum the rows' outer products of output gradients and inputs, and of the one apart."""
    lanes = LINE // values.itemsize
    for number in range(len(layers)):
        layer = layers[number]
        for column in range(0, layer.outputs, COLUMNS):
            for first in range(0, layer.inputs, lanes):
                _column_product(
                    values, layer.delta + column, 1, layer.delta_width,
                    values, layer.given + first, layer.given_width, rows,
                    product, layer.product + column * layer.product_width + first,
                    layer.product_width, new,
                )  # fmt: skip
        tile = product[layer.spare : layer.spare + layer.outputs]
        tile[:] = 0.0
        for row in range(rows):
            start = layer.delta + row * layer.delta_width
            delta = values[start : start + layer.outputs]
            for place in range(len(tile)):
                tile[place] += delta[place]
        bias = product[layer.bias : layer.bias + layer.outputs]
        for place in range(len(tile)):
            bias[place] = tile[place] if new else bias[place] + tile[place]


@compiled
def _add(product: Any, new: bool, partial: Any) -> None:
    if new:
        for place in range(len(partial)):
            partial[place] = product[place]
    else:
        for place in range(len(partial)):
            partial[place] += product[place]


@compiled
def _collect(layers: Any, summed: Any, new: bool, out: Any) -> None:
    """Write, or add, sums into the flat layout of parameters."""
    for number in range(len(layers)):
        layer = layers[number]
        for output in range(layer.outputs):
            start = layer.theta + output * (layer.inputs + 1)
            own, bias = out[start : start + layer.inputs], start + layer.inputs
            start = layer.product + output * layer.product_width
            row, one = summed[start : start + layer.inputs], summed[layer.bias + output]
            if new:
                for place in range(len(own)):
                    own[place] = row[place]
                out[bias] = one
            else:
                for place in range(len(own)):
                    own[place] += row[place]
                out[bias] += one
