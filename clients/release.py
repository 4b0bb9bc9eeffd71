"""The one place where noise is added: an exact sum becomes something that may leave.

The caller has charged the ledger before it computes the sum; see `clients.worker`.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from common.errors import AccountingError
from common.fixed_point import (
    MAX_NOISE_STEPS,
    MIN_NOISE_STEPS,
    SMOOTHING_STEPS,
    STEPS_PER_UNIT,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)
from common.noise import NoiseSource


def noisy_sum(  # noqa: PLR0913  # all but one by name
    exact: Float[np.ndarray, " P"],
    *,
    sensitivity: float,
    noise_multiplier: float,
    contributors: int,
    noise: NoiseSource,
    steps: int = STEPS_PER_UNIT,
    error: float = 0.0,
) -> Int[np.ndarray, " P"]:
    """Round a sum to the lattice and add this merchant's share of the noise.

    Args:
        exact: Sum over this merchant's customers; one customer moves it by at most
            `sensitivity` in L2.
        sensitivity: L2 sensitivity, in the unit of the sum.
        noise_multiplier: Noise of the sum over all merchants, in sensitivities.
        contributors: Shares that the sum holds at least (m); 1 if this merchant's noise must
            do alone.
        noise: Stream that this release draws from; no other release may use it.
        steps: Lattice steps in one sensitivity.
        error: Of float32, relative to the sensitivity (`common.fixed_point.float32_error`).

    Returns:
        Multiples of `lattice_step(sensitivity, steps)`.

    Guarantee: the sum of at least `contributors` such vectors, and a single one with respect to
    its own share, is as good as a Gaussian mechanism with `noise_multiplier` (of the sum), up to
    a delta that never matters: docs/privacy-model.md, "Integer noise".

    Raises:
        AccountingError: The noise would be too fine or too coarse for the lattice argument.
    """
    stddev = noise_multiplier * lattice_sensitivity(sensitivity, exact.size, steps, error)
    needed = stddev / math.sqrt(contributors) / lattice_step(sensitivity, steps)
    share = math.hypot(needed, SMOOTHING_STEPS)
    if not (needed > 0 and share >= MIN_NOISE_STEPS):
        raise AccountingError(
            f"a noise share of {share:.3g} lattice steps is too fine: at least "
            f"{MIN_NOISE_STEPS:.0f} of {steps} steps a sensitivity are needed"
        )
    if not share <= MAX_NOISE_STEPS:
        raise AccountingError(
            f"a noise share of {share:.3g} lattice steps is too coarse: at most "
            f"{MAX_NOISE_STEPS:.3g} steps can be sent"
        )
    rounded = to_lattice(exact, lattice_step(sensitivity, steps))
    rounded += noise.discrete_gaussian(exact.size, share)
    return rounded
