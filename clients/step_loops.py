"""Loops over a model's parameters that a private step takes beside the gradient."""

from typing import Any

import numpy as np

from common.compiled import compiled


@compiled
def add_noise(values: Any, inverse: float, limit: float, noise: Any, scale: float) -> bool:
    """Turn `values` into multiples of a lattice step, in place, add `noise`, multiply by `scale`.

    Args:
        values: [P] float64.
        inverse: Of the lattice step.
        limit: What a multiple must stay below.
        noise: [P] multiples, int64.
        scale: Of the results.

    Returns:
        Whether all multiples stay below the limit.
    """
    held = True
    for place in range(len(values)):
        multiple = np.rint(values[place] * inverse)
        held &= abs(multiple) < limit
        values[place] = (multiple + noise[place]) * scale
    return held


@compiled
def move(theta: Any, gradient: Any, rate: float, bound: float) -> None:
    """Move `theta` against `gradient`, in place, and keep it within a bound; both [K, P]."""
    for model in range(len(theta)):
        own, slope = theta[model], gradient[model]
        for place in range(len(own)):
            own[place] = max(min(own[place] - slope[place] * rate, bound), -bound)
