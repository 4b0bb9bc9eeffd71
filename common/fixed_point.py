"""Numbers on a lattice: what leaves a merchant is a vector of integers.

Integers add up exactly and in any order, so a sum over merchants is the same whoever adds
first, and the low-order bits of floating point tell nothing (Mironov 2012).

Noise on the lattice. Let every merchant round its clipped sum and, separately, its Gaussian
noise share to multiples of one step, and add the two integers. The sum over merchants is then
an integer vector plus m rounded Gaussians. With standard deviations of at least 1000 steps and
up to a million merchants, that law is within 10^-2,000,000 in total variation of (one Gaussian
plus independent uniforms, rounded), which is post-processing of the Gaussian; docs/
privacy-model.md has the proof. What rounding costs is sensitivity: see `lattice_sensitivity`.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from common.errors import WireError

STEPS_PER_UNIT = 2**20  # lattice steps in one sensitivity
MIN_NOISE_STEPS = 1000.0  # below this the argument above is not made
SLACK_STEPS = 16.0  # rounding and float64 summation error of one number, in steps
BLOCK_ROWS = 8192  # rows that are summed at once
MAX_SUMMANDS = 7_000_000  # customers of one merchant that the slack covers
MAX_NOISE_STEPS = 2.0**48  # ten standard deviations of it still fit
_LIMIT = 2**52  # integers that float64 holds exactly, with room to spare in int64 sums


def to_lattice(values: Float[np.ndarray, " P"], step: float) -> Int[np.ndarray, " P"]:
    """Round to multiples of `step` and return the multiples (int64).

    Raises:
        WireError: A value is not finite or too large for the lattice.
    """
    scaled = np.rint(values / step)
    if not np.all(np.abs(scaled) < _LIMIT):
        raise WireError("the vector holds a value that is not finite or too large to be sent")
    return scaled.astype(np.int64)


def from_lattice(multiples: Int[np.ndarray, " P"], step: float) -> Float[np.ndarray, " P"]:
    """Return the real values of multiples of `step`."""
    return multiples.astype(np.float64) * step


def lattice_step(sensitivity: float) -> float:
    """Return the step that goes with a sensitivity (both in the unit of the sum)."""
    return sensitivity / STEPS_PER_UNIT


def lattice_sensitivity(sensitivity: float, length: int) -> float:
    """Bound in L2 what one customer adds to a rounded sum of `length` numbers.

    Adding one customer moves the exact sum by at most `sensitivity`. Rounding moves each
    number by at most half a step with and without the customer, one step together. The other
    15 of `SLACK_STEPS` cover float64 summation: n customers, summed in blocks of B = 8192 rows,
    are off by at most (n B + n^2 / B) 2^-53 sensitivities a number (Higham 2002, section 4.2),
    which is below 7.5 steps, with and without the customer, for n up to `MAX_SUMMANDS`.
    """
    return sensitivity * (1.0 + SLACK_STEPS * math.sqrt(length) / STEPS_PER_UNIT)
