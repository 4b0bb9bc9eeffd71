"""The one place where noise is added: an exact sum becomes something that may leave.

The caller has charged the ledger before it computes the sum; see `clients.worker`.
"""

import math

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from clients.step_loops import add_noise
from common.errors import AccountingError, WireError
from common.fixed_point import (
    LIMIT,
    MAX_NOISE_STEPS,
    MIN_NOISE_STEPS,
    SMOOTHING_STEPS,
    STEPS_PER_UNIT,
    TOO_LARGE,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)
from common.noise import NoiseSource
from common.plan import Release

_BLOCK = 2**16  # numbers that stay in the processor's cache


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
    moved = lattice_sensitivity(sensitivity, exact.size, steps, error)
    share = _share(moved * noise_multiplier, sensitivity, contributors, steps)
    rounded = to_lattice(exact, lattice_step(sensitivity, steps))
    rounded += noise.discrete_gaussian(exact.size, share)
    return rounded


def noise_of_steps(
    release: Release, length: int, steps: int, noise: NoiseSource
) -> Int64[np.ndarray, "S length"]:
    """Draw the noise of some steps of mode `local` at once, which is cheaper than one by one.

    Args:
        release: The planned release.
        length: Numbers in a sum.
        steps: Of which this merchant takes at least one, and its budget pays for all; S.
        noise: Stream that this release draws from.

    Returns:
        Lattice steps; each row serves one step. As many steps as fit into the processor's cache.

    Raises:
        AccountingError: As in `noisy_sum`.
    """
    event = release.event
    moved = lattice_sensitivity(event.sensitivity, length, release.steps, release.error)
    share = _share(moved * event.noise_multiplier, event.sensitivity, 1, release.steps)
    several = -(-steps // -(-steps * length // _BLOCK))  # no small rest, which would cost more
    return noise.discrete_gaussian(several * length, share).reshape(several, length)


def make_noisy(
    values: Float64[np.ndarray, " P"],
    release: Release,
    noise: Int64[np.ndarray, " P"],
    scale: float,
) -> None:
    """Turn a sum that stays here into a noisy one, in place: multiples of its lattice step.

    The same as `noisy_sum` with this merchant's noise alone, as floats that hold integers, which
    are then multiplied by `scale`.

    Args:
        values: The exact sum.
        release: The planned release.
        noise: Of this step alone: a row of `noise_of_steps`.
        scale: Of the result, which hides nothing: it may not depend on customers.

    Raises:
        WireError: A value is not finite or too large for the lattice.
    """
    inverse = 1.0 / lattice_step(release.event.sensitivity, release.steps)
    if not add_noise(values, inverse, LIMIT, noise, scale):
        raise WireError(TOO_LARGE)


def _share(stddev: float, sensitivity: float, contributors: int, steps: int) -> float:
    """Return the parameter of a merchant's share of the noise, in lattice steps."""
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
    return share
