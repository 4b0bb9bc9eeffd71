"""The discrete Gaussian: integers k with probability proportional to exp(-k^2 / (2 s^2)).

Pure mathematics: random bits come in, integers go out. No floating-point number is touched
between the two, so there are no low-order bits to tell anything (Mironov 2012).

Up to s = 512 a sample is one look-up of a 128-bit uniform in a table of cumulative
probabilities. Of the uniform only those bits are drawn that the look-up depends on (Knuth, Yao
1976): 16 settle more than nine in ten, 64 nearly all of the others. Larger ones are put
together: if z1 and z2 are independent with parameter s', then z1 + c z2 has parameter
s' sqrt(1 + c^2), up to a relative error in every probability of less than 1e-136.
With w = 1 + c^2,

    (k - c j)^2 + j^2 = k^2 / w + w (j - c k / w)^2,

so P(k) is exp(-k^2 / (2 w s'^2)) times the sum over j of a Gaussian with deviation
s3 = s' / sqrt(w) around c k / w. By Poisson's summation formula that sum hardly depends on its
centre: it is sqrt(2 pi) s3 (1 +- E) with E = 2 (exp(-2 pi^2 s3^2) + exp(-8 pi^2 s3^2) + ...).
Every probability is right to 2 E / (1 - E), hence the total variation to E / (1 - E). Plans
keep s3 >= 4, where E < 1.4e-137.

Sources: Canonne, Kamath, Steinke 2020 (the discrete Gaussian and its privacy); Peikert 2010
(the convolution theorem); Micciancio, Walter 2017 (wide ones from narrow ones, as here).

Not claimed: constant time. How long a look-up takes depends a little on what is drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from jaxtyping import Int, Int16, Int32, Int64, UInt16, UInt64

from common.errors import AccountingError
from common.noise_loops import add_multiple, look_up, settle

MIN_STDDEV = 20.0  # below this, sums of samples are no longer as good as one Gaussian
MAX_STDDEV = 2.0**48  # the largest sample, 37 of it, fits into int64 800 times
_LARGEST_TABLE = 512  # parameter up to which one table does; three times its reach fits into int16
_SMALLEST_BASE = 256  # parameter that a table in a plan with multipliers has at least
_SMOOTHING = 4  # s3 of the module's docstring
_STEPS = 2**32  # table parameters are multiples of 1 / _STEPS
_BITS = 128  # resolution of a table's probabilities
_PRECISION = 60  # decimal digits; 2^-128 takes 39, the recurrence loses 8
_NEGLIGIBLE = Decimal("1e-50")  # weights below this are left out of the normalising sum
_GUIDE_BITS = 16
_ONES = np.uint64(2**64 - 1)

# count -> so many uniform 64-bit words, each of which is given out once
Words = Callable[[int], UInt64[np.ndarray, " count"]]


@dataclass(frozen=True)
class Plan:
    """How samples with one parameter are put together.

    Attributes:
        base_stddev: Parameter s0 of the table.
        multipliers: The integers c, innermost first: two samples of one level, z1 and z2,
            make z1 + c z2 of the next. Empty: the table does alone.
    """

    base_stddev: float
    multipliers: tuple[int, ...]

    @property
    def draws(self) -> int:
        """Samples of the table, of 128 bits each, that one number takes."""
        return 1 << len(self.multipliers)

    @property
    def variance(self) -> Fraction:
        """The square of the parameter that is achieved, exactly."""
        base = Fraction(self.base_stddev)
        return base * base * math.prod(1 + c * c for c in self.multipliers)

    @property
    def stddev(self) -> float:
        """The parameter that is achieved, rounded down."""
        root = math.sqrt(self.variance)
        while Fraction(root) ** 2 > self.variance:
            root = math.nextafter(root, 0.0)
        return root

    @property
    def distance(self) -> float:
        """Bound on the total variation from the discrete Gaussian with `variance`, a number.

        A table with s0 is off by at most 14 s0 2^-128 (see `base_table`), and one sum of two
        by 1e-136. Total variation adds up over the tree.
        """
        return self.draws * 14.0 * self.base_stddev * 2.0**-_BITS + (self.draws - 1) * 1e-136


@dataclass(frozen=True, eq=False)
class Table:
    """Cumulative probabilities of -reach .. reach - 1, times 2^128, in two words each.

    Attributes:
        reach: Largest magnitude that is ever drawn.
        high: Upper 64 bits, ascending.
        low: Lower 64 bits.
        ends: Of the upper 64 bits those that follow the first 16, from the top; 16 zeros below.
            Beside it the same of the next threshold, if it begins with the same 16 bits; else ones.
        guide: For the first 16 bits of a uniform, how many thresholds do not exceed it. Where
            that depends on the bits that follow, -1 less how many it is at least.
    """

    reach: int
    high: UInt64[np.ndarray, " T"]
    low: UInt64[np.ndarray, " T"]
    ends: UInt64[np.ndarray, "T 2"]
    guide: Int16[np.ndarray, " G"]


@lru_cache(maxsize=64)
def choose_plan(stddev: float) -> Plan:
    """Choose a table and multipliers for a parameter.

    What is achieved is at least `stddev` and at most 1.2e-11 of it larger. All arithmetic is
    exact. Up to 512 there is no multiplier, up to some 65,000 one, up to some 10^9 two, and three
    up to 2^48.

    Raises:
        AccountingError: `stddev` is not a number from 20 to 2^48.

    >>> choose_plan(1000.5)
    Plan(base_stddev=316.38587990007363, multipliers=(3,))
    """
    if not MIN_STDDEV <= stddev <= MAX_STDDEV:
        raise AccountingError(
            f"expected a noise stddev from {MIN_STDDEV:g} to {MAX_STDDEV:.4g} lattice steps, "
            f"got {stddev:g}"
        )
    variance = Fraction(stddev) ** 2
    multipliers: list[int] = []
    while variance > _LARGEST_TABLE**2:
        # s3 >= 4 means 1 + c^2 <= s / 4; s' >= 256 means 1 + c^2 <= (s / 256)^2
        smooth = math.isqrt(math.floor(variance / _SMOOTHING**2))
        large = math.floor(variance / _SMALLEST_BASE**2)
        multipliers.insert(0, math.isqrt(min(smooth, large) - 1))
        variance /= 1 + multipliers[0] ** 2
    return Plan(_root_up(variance), tuple(multipliers))


def _root_up(variance: Fraction) -> float:
    """Return the square root, rounded up to a multiple of 2^-32 (exact in a float)."""
    below = math.isqrt(math.ceil(variance * _STEPS**2) - 1)
    return (below + 1) / _STEPS


@lru_cache(maxsize=8)
def base_table(stddev: float) -> Table:
    """Tabulate the discrete Gaussian with this parameter, to 2^-128 a probability.

    Args:
        stddev: From 20 to 512.

    Returns:
        Thresholds of an exactly symmetric distribution. `T` is 2 * reach, some 26 stddev.

    Guarantee: total variation from the discrete Gaussian of at most 14 stddev 2^-128, so never
    above 2^-115: each of the 2 * reach probabilities beside the middle is off by at most half
    of 2^-128 and the middle by their sum, and what lies beyond the reach has less than stddev
    2^-128 together.
    """
    counts = _counts(stddev)
    middle = 2**_BITS - 2 * sum(counts)
    thresholds = list(accumulate([*reversed(counts), middle, *counts]))[:-1]
    packed = b"".join(threshold.to_bytes(_BITS // 8, "big") for threshold in thresholds)
    words = np.frombuffer(packed, dtype=">u8").astype(np.uint64).reshape(-1, 2)
    high, low = np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
    prefixes = high >> np.uint64(64 - _GUIDE_BITS)
    ends = np.full((high.size, 2), _ONES)
    ends[:, 0] = high << np.uint64(_GUIDE_BITS)
    alike = np.flatnonzero(prefixes[1:] == prefixes[:-1])
    ends[alike, 1] = ends[alike + 1, 0]
    guide = _guide(prefixes)
    for shared in (high, low, ends, guide):
        shared.setflags(write=False)  # every caller gets this table
    return Table(len(counts), high, low, ends, guide)


def _counts(stddev: float) -> list[int]:
    """Return the probabilities of 1, 2, 3, ... in units of 2^-128, up to the last above 0."""
    with localcontext(Context(prec=_PRECISION)):
        square = Decimal(stddev) ** 2
        ratio, shrink = (-1 / (2 * square)).exp(), (-1 / square).exp()
        weights = [Decimal(1)]
        while weights[-1] > _NEGLIGIBLE:
            weights.append(weights[-1] * ratio)
            ratio *= shrink
        unit = 2**_BITS / (2 * sum(weights) - 1)
        rounded = (int((weight * unit).to_integral_value()) for weight in weights[1:])
        return [count for count in rounded if count > 0]


def _guide(prefixes: UInt64[np.ndarray, " T"]) -> Int16[np.ndarray, " G"]:
    starts = np.arange(2**_GUIDE_BITS, dtype=np.uint64)
    least = np.searchsorted(prefixes, starts, side="left")
    most = np.searchsorted(prefixes, starts, side="right")
    return np.where(least == most, least, -1 - least).astype(np.int16)


def base_samples(
    table: Table, prefixes: UInt16[np.ndarray, " N"], words: Words
) -> Int16[np.ndarray, " N"]:
    """Turn uniform bits into samples of a table.

    Args:
        table: What to sample.
        prefixes: The first 16 bits of a uniform below 2^128 for each sample.
        words: Gives more. A word's upper 48 bits are those that follow a prefix; a further word
            follows where 64 bits do not settle it.

    Returns:
        How many thresholds do not exceed each uniform, less the reach.
    """
    places = np.empty(prefixes.size, dtype=np.int16)
    unsure = np.empty(prefixes.size, dtype=np.int32)
    unsure = unsure[: look_up(table.guide, prefixes, table.reach, places, unsure)]
    if unsure.size:
        _settle(table, prefixes, unsure, words, places)
    return places


def _settle(
    table: Table,
    prefixes: UInt16[np.ndarray, " N"],
    unsure: Int32[np.ndarray, " U"],
    words: Words,
    places: Int16[np.ndarray, " N"],
) -> None:
    """Write the samples that the first 16 bits leave open."""
    drawn, tied = words(unsure.size), np.empty(unsure.size, dtype=np.int32)
    count = settle(table.ends, table.high, prefixes, unsure, drawn, table.reach, places, tied)
    for tie in tied[:count]:  # chance 2^-50 a sample, or less
        sample = unsure[tie]
        upper = _upper(prefixes[sample], drawn[tie])
        start, end = (np.searchsorted(table.high, upper, side) for side in ("left", "right"))
        rivals = table.low[start:end]
        passed = start + np.searchsorted(rivals, words(1)[0], side="right")
        places[sample] = passed - table.reach


def _upper(prefix: np.uint16, word: np.uint64) -> np.uint64:
    """Return the upper 64 bits of a uniform."""
    return np.uint64(prefix) << np.uint64(64 - _GUIDE_BITS) | word >> np.uint64(_GUIDE_BITS)


def samples(
    plan: Plan,
    prefixes: UInt16[np.ndarray, "draws count"],
    words: Words,
    out: Int64[np.ndarray, " count"] | None = None,
) -> Int64[np.ndarray, " count"]:
    """Turn uniform bits into samples with the plan's parameter.

    Args:
        plan: From `choose_plan`.
        prefixes: A column for each number, of `plan.draws` prefixes as in `base_samples`.
        words: As in `base_samples`.
        out: Where the numbers go; None for an array of the caller's own.

    Returns:
        One number for every column. None exceeds 37 `plan.stddev`.

    Guarantee: total variation of at most `plan.distance` a number from the discrete Gaussian
    whose parameter squared is `plan.variance`, if the bits are uniform.
    """
    numbers = np.empty(prefixes.shape[1], dtype=np.int64) if out is None else out
    drawn = base_samples(base_table(plan.base_stddev), prefixes.ravel(), words)
    rows: list[Int[np.ndarray, " count"]] = [*drawn.reshape(prefixes.shape)]
    for multiplier in plan.multipliers[:-1]:
        rows = [_summed(*pair, multiplier) for pair in zip(rows[0::2], rows[1::2], strict=True)]
    if plan.multipliers:
        one, other = rows
        add_multiple(one, other, plan.multipliers[-1], numbers)
    else:
        numbers[:] = rows[0]
    return numbers


def _summed(
    one: Int[np.ndarray, " count"], other: Int[np.ndarray, " count"], multiplier: int
) -> Int64[np.ndarray, " count"]:
    total = np.empty(one.size, dtype=np.int64)
    add_multiple(one, other, multiplier, total)
    return total
