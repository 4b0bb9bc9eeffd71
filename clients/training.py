"""The clipped gradient sum of one merchant's customers, at given parameters."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from clients.kernel import kernel_of
from common.network import Network

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


def clipped_gradient_sum(
    network: Network,
    theta: Float[np.ndarray, " P"],
    x: Float[np.ndarray, "R F"],
    y: Int[np.ndarray, " R"],
    clip_norm: float,
) -> Float[np.ndarray, " P"]:
    """Sum each customer's cross-entropy gradient, clipped to L2 norm `clip_norm`, in float64.

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
    kernel = kernel_of(network, "float64")
    total: Float[np.ndarray, " P"] = kernel.sums(
        np.array(theta[None]), [kernel.table(x, y)], [None], clip_norm
    )[0]
    return total
