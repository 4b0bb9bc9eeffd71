"""The clipped gradient sum of a merchant's customers.

The per-customer gradient is never materialised: for a fully connected layer with inputs a
and output gradients d, a customer's gradient is the outer product of d and (a, 1), its squared
norm is |d|^2 (|a|^2 + 1), and the clipped sum is one weighted matrix product a layer
("book-keeping", Bu et al. 2023, "Differentially private optimization on large model at small
cost"). float64 throughout, so that rounding to the lattice is the only rounding that counts.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from common.fixed_point import BLOCK_ROWS
from common.network import Network, row_by_row, softmax
from common.noise import NoiseSource

# (network, theta, inputs, labels, clip_norm) -> sum of clipped gradients
GradientSum = Callable[
    [
        Network,
        Float[np.ndarray, " P"],
        Float[np.ndarray, "R F"],
        Int[np.ndarray, " R"],
        float,
    ],
    Float[np.ndarray, " P"],
]


@torch.inference_mode()
def clipped_gradient_sum(
    network: Network,
    theta: Float[np.ndarray, " P"],
    x: Float[np.ndarray, "R F"],
    y: Int[np.ndarray, " R"],
    clip_norm: float,
) -> Float[np.ndarray, " P"]:
    """Sum each customer's cross-entropy gradient, clipped to L2 norm `clip_norm`.

    Guarantee: one customer moves the exact sum by at most `clip_norm` in L2 (the clipping factor
    is Opacus' `min(1, C / (norm + 1e-6))`), and the computed one by no more than
    `common.fixed_point.lattice_sensitivity` allows for, whatever the parameters. No customers
    give the zero vector.

    Args:
        network: Shape of the model.
        theta: Flat parameters.
        x: Model inputs, one customer a row.
        y: Segment ids.
        clip_norm: L2 bound C, in the unit of the gradient.
    """
    total = np.zeros(network.size)
    sums = [torch.from_numpy(layer) for layer in network.layers(total)]
    weights = network.layers(theta)
    for start in range(0, len(x), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        backward = _backward(network, weights, x[start:stop], y[start:stop])
        inputs, deltas = (list(map(torch.from_numpy, arrays)) for arrays in backward)
        squares = sum(
            d.square().sum(1) * (a.square().sum(1) + 1.0)
            for a, d in zip(inputs, deltas, strict=True)
        )
        factor = (clip_norm / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp_(max=1.0)
        for a, d, layer in zip(inputs, deltas, sums, strict=True):
            clipped = d.mul_(factor[:, None])
            layer[:, :-1] += clipped.T @ a
            layer[:, -1] += clipped.sum(0)
    return total


def _backward(
    network: Network,
    weights: list[Float[np.ndarray, "_ _"]],
    x: Float[np.ndarray, "B F"],
    y: Int[np.ndarray, " B"],
) -> tuple[list[Float[np.ndarray, "B _"]], list[Float[np.ndarray, "B _"]]]:
    """Return every layer's inputs and output gradients, each row whatever the others are.

    Parameters come from the coordinator. It can choose them so that a customer's true gradient
    cancels and what is left is the rounding of a matrix product, blown up layer by layer; since
    a product's rounding changes with the number of rows, one more customer would then move
    everybody's clipped gradient. So every product here goes row by row.
    """
    relu = network.activation == "relu"
    inputs = [x]
    for layer in weights[:-1]:
        z = row_by_row(inputs[-1], layer)
        inputs.append(np.maximum(z, 0.0, out=z) if relu else np.tanh(z, out=z))
    delta = softmax(row_by_row(inputs[-1], weights[-1]))
    delta[np.arange(len(y)), y] -= 1.0
    deltas = [delta]
    for layer, out in zip(weights[:0:-1], inputs[:0:-1], strict=True):
        backwards = np.zeros((layer.shape[1] - 1, len(layer) + 1))  # [inp, out + 1], no bias
        backwards[:, :-1] = layer[:, :-1].T
        back = row_by_row(deltas[-1], backwards)
        back *= (out > 0) if relu else 1.0 - out * out
        deltas.append(back)
    deltas.reverse()
    return inputs, deltas


def sampled(count: int, sampling_rate: float, noise: NoiseSource) -> Bool[np.ndarray, " R"] | slice:
    """Choose the customers of one step: all, or each with chance `sampling_rate` (Poisson)."""
    return slice(None) if sampling_rate == 1.0 else noise.chosen(count, sampling_rate)
