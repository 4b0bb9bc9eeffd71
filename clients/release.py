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
    STEPS_PER_UNIT,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)
from common.noise import NoiseSource


def noisy_sum(
    exact: Float[np.ndarray, " P"],
    *,
    sensitivity: float,
    noise_multiplier: float,
    contributors: int,
    noise: NoiseSource,
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

    Returns:
        Multiples of `lattice_step(sensitivity)`.

    Guarantee: the sum of at least `contributors` such vectors is a Gaussian mechanism with at
    least `noise_multiplier` (see `common.fixed_point` for the rounding).

    Raises:
        AccountingError: The noise would be too fine or too coarse for the lattice argument.
    """
    stddev = noise_multiplier * lattice_sensitivity(sensitivity, exact.size)
    share_steps = stddev / math.sqrt(contributors) / lattice_step(sensitivity)
    if not share_steps >= MIN_NOISE_STEPS:
        raise AccountingError(
            f"a noise share of {share_steps:.3g} lattice steps is too fine: at least "
            f"{MIN_NOISE_STEPS:.0f} of {STEPS_PER_UNIT} steps a sensitivity are needed"
        )
    if not share_steps <= MAX_NOISE_STEPS:
        raise AccountingError(
            f"a noise share of {share_steps:.3g} lattice steps is too coarse: at most "
            f"{MAX_NOISE_STEPS:.3g} steps can be sent"
        )
    shares = to_lattice(noise.normal(exact.size) * share_steps, 1.0)
    rounded = to_lattice(exact, lattice_step(sensitivity))
    rounded += shares
    return rounded
