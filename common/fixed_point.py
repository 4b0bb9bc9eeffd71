"""Numbers on a lattice, summed in a ring: what leaves a merchant is a vector of integers.

Integers add up exactly and in any order, so a sum over merchants is the same whoever adds
first, and the low-order bits of floating point tell nothing (Mironov 2012).

Lattice: every merchant rounds its clipped sum to multiples of one step and adds its share of the
noise, drawn as integers (`common.discrete_gaussian`). What rounding costs is sensitivity: see
`lattice_sensitivity`. docs/privacy-model.md has the proof.

Ring: the integers travel modulo 2^32 or 2^64. A merchant's own number may wrap around; the sum
is right as long as the sum itself fits, which `ring_steps` and `local_lattice` see to.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt

from common.errors import AccountingError, WireError

STEPS_PER_UNIT = 2**20  # lattice steps in one sensitivity, where the ring has room for them
MIN_NOISE_STEPS = 50.0  # below this the argument of the docs is not made
SMOOTHING_STEPS = 5.0  # of the noise, given away to make integers as good as real numbers
SUMMATION_ERROR = 15.0 * 2.0**-20  # of float64 sums with and without a customer, sensitivities
BLOCK_ROWS = 8192  # rows that are summed at once
TILE_ROWS = 64  # rows that a float32 number is a sum over
TILES_AT_ONCE = 4  # of which as many are added up in float32
MAX_SUMMANDS = 7_000_000  # customers of one merchant that the slack covers
MAX_NOISE_STEPS = 2.0**47
NOISE_REACH = 20.0  # standard deviations for which a ring keeps room
TOO_LARGE = "the vector holds a value that is not finite or too large to be sent"
_LOCAL_BOUND = {32: 64.0, 64: 2.0**20}  # of one merchant's change of a parameter
_LOCAL_BITS = 30  # after the point, where the ring has room for them
_LOCAL_NOISE_STEPS = 60_000.0
_FEWEST_LOCAL_STEPS = 2**14
LIMIT = 2.0**52  # integers that float64 holds exactly, with room to spare in int64 sums


def to_lattice(values: Float[np.ndarray, " P"], step: float) -> Int[np.ndarray, " P"]:
    """Round to multiples of `step` and return the multiples (int64).

    Raises:
        WireError: A value is not finite or too large for the lattice.
    """
    scaled = np.rint(values / step)
    if scaled.size and not (scaled.max() < LIMIT and scaled.min() > -LIMIT):
        raise WireError(TOO_LARGE)
    return scaled.astype(np.int64)


def from_lattice(multiples: Int[np.ndarray, " P"], step: float) -> Float[np.ndarray, " P"]:
    """Return the real values of multiples of `step`."""
    return multiples.astype(np.float64) * step


def lattice_step(sensitivity: float, steps: int = STEPS_PER_UNIT) -> float:
    """Return the step that goes with a sensitivity (both in the unit of the sum)."""
    return sensitivity / steps


def lattice_sensitivity(
    sensitivity: float, length: int, steps: int = STEPS_PER_UNIT, error: float = 0.0
) -> float:
    """Bound in L2 what one customer adds to a rounded sum of `length` numbers.

    Adding one customer moves the exact sum by at most `sensitivity`. Rounding moves each
    number by at most half a step with and without the customer, one step together. Float64
    summation adds `SUMMATION_ERROR`: n customers, summed in blocks of B = 8192 rows, are off by
    at most (n B + n^2 / B) 2^-53 sensitivities a number (Higham 2002, section 4.2), which is
    below 7.5 * 2^-20, with and without the customer, for n up to `MAX_SUMMANDS`.

    Args:
        sensitivity: L2 sensitivity of the exact sum.
        length: Numbers in the sum.
        steps: Lattice steps in one sensitivity.
        error: Relative error where gradients are computed in float32: `float32_error`.
    """
    lattice = math.sqrt(length) * (1.0 / steps + SUMMATION_ERROR)
    return sensitivity * (1.0 + error + lattice)


def float32_error(dims: tuple[int, ...]) -> float:
    """Bound what float32 adds to the sensitivity of a sum of clipped gradients, relative to it.

    With u = 2^-24, T = `TILE_ROWS` and q = `TILES_AT_ONCE`; proof in docs/privacy-model.md:

    - a gradient's norm is computed to (W + 2 L + 16) u, with W the widest layer's inputs and L
      the number of layers; taken twice;
    - a sum over T rows is off by at most (T + 1) T u clip norms in L2, a sum of q of those by
      (q - 1) q T u more. Rows come in a random order, in which one customer more changes the rows
      of two tiles; with and without it that is four times both.

    Args:
        dims: Layer sizes from inputs to segments.
    """
    norm = 2.0 * (max(dims) + 8 + 2 * len(dims) + 16)
    tiles = 4.0 * (TILE_ROWS + 1) * TILE_ROWS
    groups = 4.0 * (TILES_AT_ONCE - 1) * TILES_AT_ONCE * TILE_ROWS
    return 1.001 * (norm + tiles + groups) * 2.0**-24  # 1.001 for what is of second order


def ring_steps(ring_bits: int, max_customers: int, noise_multiplier: float, spread: float) -> int:
    """Return the lattice steps in one sensitivity for which every sum fits into the ring.

    A number of the exact sum is at most `max_customers` sensitivities. The noise is kept room
    for up to `NOISE_REACH` standard deviations; more happens with chance below 1e-80. So
    (max_customers + reach) * steps <= 2^(ring_bits - 1).

    Args:
        ring_bits: 32 or 64.
        max_customers: Public bound on the customers in a sum.
        noise_multiplier: Of the sum, with as many shares as it holds at least.
        spread: Root of the largest over the smallest number of shares in a sum.

    Raises:
        AccountingError: The ring has no room for one step a sensitivity.
    """
    room = 2.0 ** (ring_bits - 1) / (max_customers + NOISE_REACH * noise_multiplier * spread)
    if room < 1:
        raise AccountingError(
            f"aggregation.max_customers = {max_customers} does not fit into a ring of {ring_bits} "
            "bits; lower it, or set aggregation.ring_bits = 64"
        )
    return int(min(STEPS_PER_UNIT, 2 ** math.floor(math.log2(room))))


def local_steps(noise_multiplier: float) -> int:
    """Return the lattice steps in one sensitivity of a sum that stays with its merchant.

    A power of two. Nothing has to fit into a ring; noise of up to `_LOCAL_NOISE_STEPS` takes two
    look-ups in a table, wider noise four (`common.discrete_gaussian`).
    """
    fine = 2.0 ** math.floor(math.log2(_LOCAL_NOISE_STEPS / max(noise_multiplier, 1e-9)))
    return int(min(max(fine, _FEWEST_LOCAL_STEPS), STEPS_PER_UNIT))


@dataclass(frozen=True)
class Lattice:
    """How the numbers of one kind of sum travel."""

    step: float  # in the unit of the sum
    ring_bits: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Return numpy's type of the ring."""
        return np.uint32 if self.ring_bits == 32 else np.uint64

    def to_ring(self, multiples: Int[np.ndarray, " P"]) -> UInt[np.ndarray, " P"]:
        """Return multiples of the step modulo 2^ring_bits."""
        return multiples.astype(np.int64).view(np.uint64).astype(self.dtype)

    def from_ring(self, total: UInt[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """Return the multiples of the step that a sum in the ring stands for (int64)."""
        signed = np.int32 if self.ring_bits == 32 else np.int64
        return total.view(signed).astype(np.int64)


def local_lattice(ring_bits: int, merchants: int) -> tuple[Lattice, float]:
    """Return the lattice of local model updates, and the bound they are clipped to.

    Both are post-processing of updates that are private by themselves. The sum of `merchants`
    of them fits: merchants * bound / step < 2^(ring_bits - 1).
    """
    bound = _LOCAL_BOUND[ring_bits]
    bits = math.ceil(math.log2(2.0 ** (ring_bits - 1) / (merchants * bound))) - 1
    if bits < 0:
        raise AccountingError(
            f"local updates of {merchants} merchants do not fit into a ring of {ring_bits} bits"
        )
    return Lattice(2.0 ** -min(bits, _LOCAL_BITS), ring_bits), bound
