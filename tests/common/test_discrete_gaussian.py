"""Tests of the discrete Gaussian: exact probabilities, look-ups, plans, samples.

Streams are seeded, so every run gives the same answer; the stated false-alarm rates are those
of the tests before the seed was fixed.
"""

import doctest
import math
from bisect import bisect_right
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import common.discrete_gaussian
from common.discrete_gaussian import (
    MAX_STDDEV,
    MIN_STDDEV,
    Plan,
    Table,
    Words,
    base_samples,
    base_table,
    choose_plan,
    samples,
)
from common.errors import AccountingError
from common.noise import NoiseSource

ALARM = 1e-6
COUNT = 400_000
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")
STDDEVS = [20.0, 300.0, 1000.5, 3150.7, 1e6]


def thresholds(table: Table) -> list[int]:
    """Return the table's cumulative probabilities in units of 2^-128."""
    return [
        (high << 64) + low
        for high, low in zip(table.high.tolist(), table.low.tolist(), strict=True)
    ]


def probabilities(table: Table) -> list[int]:
    """Return what the table gives -reach .. reach, in units of 2^-128."""
    ends = [0, *thresholds(table), 2**128]
    return [end - start for start, end in pairwise(ends)]


def reference(variance: Fraction, reach: int) -> list[Decimal]:
    """Return the discrete Gaussian of -reach .. reach to 70 digits, one exponential each.

    The sum over all integers is sqrt(2 pi variance) by Poisson's formula; for a variance of 400
    the next term is exp(-7895) of it.
    """
    with localcontext(Context(prec=70)):
        exact = Decimal(variance.numerator) / Decimal(variance.denominator)
        total = (2 * PI * exact).sqrt()
        half = [(-(k * k) / (2 * exact)).exp() / total for k in range(reach + 1)]
        return [*reversed(half[1:]), *half]


def looked_up(table: Table, uniforms: list[int]) -> list[int]:
    """Return what 128-bit uniforms become, one at a time, their bits given out as asked for."""
    return [_looked_up(table, uniform) for uniform in uniforms]


def _looked_up(table: Table, uniform: int) -> int:
    rest = [(uniform >> 64) % 2**48 << 16, uniform % 2**64]

    def words(count: int) -> np.ndarray:
        assert count == 1
        return np.array([rest.pop(0)], dtype=np.uint64)

    return int(base_samples(table, np.array([uniform >> 112], dtype=np.uint16), words)[0])


def no_words(count: int) -> np.ndarray:
    """Give nothing out."""
    raise AssertionError(f"{count} words were asked for")


def stream(seed: int, count: int) -> tuple[np.ndarray, Words]:
    """Return random prefixes, and where further words come from."""
    generator = np.random.default_rng(seed)
    prefixes = generator.integers(0, 2**16, count, dtype=np.uint16)
    return prefixes, lambda more: generator.integers(0, 2**64, more, dtype=np.uint64)


def distance(counts: list[int], unit: int, expected: list[Decimal]) -> Decimal:
    """Return the total variation between counts of 1 / unit and probabilities."""
    with localcontext(Context(prec=70)):
        gaps = [
            abs(Decimal(count) / unit - one) for count, one in zip(counts, expected, strict=True)
        ]
        return (sum(gaps) + 1 - sum(expected)) / 2


def chi_square(numbers: np.ndarray, stddev: float) -> float:
    """Return the p-value of a chi-square test against the exact law.

    About 100 bins, some sixteenth of `stddev` wide, over six deviations; less likely ones are
    put together with the tails.
    """
    width = max(1, round(stddev / 16))
    reach = width * 100
    law = np.exp(-0.5 * (np.arange(-reach, reach) / stddev) ** 2) / (stddev * math.tau**0.5)
    binned = law.reshape(-1, width).sum(axis=1)
    places = (numbers + reach) // width
    inside = places[(places >= 0) & (places < binned.size)]
    seen = np.bincount(inside, minlength=binned.size)
    likely = binned * numbers.size >= 20
    expected = np.append(binned[likely], 1 - binned[likely].sum()) * numbers.size
    observed = np.append(seen[likely], numbers.size - seen[likely].sum())
    return float(stats.chisquare(observed, expected).pvalue)


def residues(numbers: np.ndarray, modulus: int) -> float:
    """Return the p-value of a chi-square test for uniform remainders."""
    return float(stats.chisquare(np.bincount(numbers % modulus, minlength=modulus)).pvalue)


def drawn(stddev: float, *labels: str | int) -> np.ndarray:
    """Return seeded samples."""
    return NoiseSource.seeded(1, "discrete", *labels).discrete_gaussian(COUNT, stddev)


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.discrete_gaussian).failed == 0


class TestTable:
    """base_table: 128-bit probabilities."""

    @pytest.mark.parametrize("stddev", [20.0, 300.0, 512.0])
    def test_probabilities(self, stddev: float) -> None:
        """The total variation from the exact law is what the plan says, below 2^-115."""
        table = base_table(stddev)
        expected = reference(Fraction(stddev) ** 2, table.reach)
        off = distance(probabilities(table), 2**128, expected)
        assert off <= Plan(stddev, ()).distance <= 2.0**-115
        with localcontext(Context(prec=70)):
            assert abs(sum(expected) - 1) < 2.0**-120

    @pytest.mark.parametrize("stddev", [20.0, 300.0, 512.0])
    def test_every_probability(self, stddev: float) -> None:
        """Beside the middle no probability is off by more than half a unit."""
        table = base_table(stddev)
        expected = reference(Fraction(stddev) ** 2, table.reach)
        with localcontext(Context(prec=70)):
            off = [
                abs(count - one * 2**128)
                for count, one in zip(probabilities(table), expected, strict=True)
            ]
        assert max(off[: table.reach]) <= Decimal("0.5000001")
        assert off[table.reach] <= 14 * stddev

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_wrong_scale_is_seen(self, wrong: float) -> None:
        """The same distance refuses two thirds and one and a half."""
        table = base_table(20.0)
        expected = reference(Fraction(20 * wrong) ** 2, table.reach)
        assert distance(probabilities(table), 2**128, expected) > 0.1

    def test_rounded_gaussian_is_seen(self) -> None:
        """A rounded Gaussian of the same scale is another law."""
        table = base_table(20.0)
        rounded = np.diff(stats.norm.cdf((np.arange(-table.reach, table.reach + 2) - 0.5) / 20))
        expected = [Decimal(float(one)) for one in rounded]
        assert distance(probabilities(table), 2**128, expected) > 1e-5

    @pytest.mark.parametrize("stddev", [20.0, 256.0, 300.5, 512.0])
    def test_shape(self, stddev: float) -> None:
        """The law is symmetric, leaves nothing out, and ends where less than 2^-129 is left."""
        table = base_table(stddev)
        counts = probabilities(table)
        assert counts == counts[::-1]
        assert min(counts) > 0
        assert 12.5 < table.reach / stddev < 13.1

    def test_shared_table_is_read_only(self) -> None:
        """Nobody can change the table that others draw from."""
        with pytest.raises(ValueError, match="read-only"):
            base_table(20.0).low[0] = 0


class TestLookup:
    """base_samples: words to integers."""

    @pytest.mark.parametrize("stddev", [20.0, 300.0])
    def test_next_to_every_threshold(self, stddev: float) -> None:
        """One below, at and above each threshold, all 128 bits count; high words tie."""
        table = base_table(stddev)
        ends = thresholds(table)
        near = {end + shift for end in ends for shift in (-1, 0, 1)}
        uniforms = sorted(near - {2**128})  # one past the greatest uniform
        expected = [bisect_right(ends, uniform) - table.reach for uniform in uniforms]
        assert looked_up(table, uniforms) == expected

    def test_several_thresholds_share_a_high_word(self) -> None:
        """In the tails the low word alone tells many thresholds apart."""
        table = base_table(20.0)
        shared = np.flatnonzero(table.high == 0)
        assert shared.size > 50
        expected = (shared + 1 - table.reach).tolist()
        assert looked_up(table, table.low[shared].tolist()) == expected

    def test_no_more_bits_than_needed(self) -> None:
        """A prefix between two thresholds asks for no word."""
        table = base_table(300.0)
        settled = np.flatnonzero(table.guide >= 0).astype(np.uint16)
        assert 0.9 * 2**16 < settled.size < 2**16
        base_samples(table, settled, no_words)

    def test_ends(self) -> None:
        """The least and the greatest uniform give the two ends of the table."""
        table = base_table(300.0)
        assert looked_up(table, [0, 2**128 - 1]) == [-table.reach, table.reach]

    @pytest.mark.parametrize("stddev", [20.0, 411.7, 512.0])
    def test_random_words(self, stddev: float) -> None:
        """Random uniforms, many at once, give what a search by integers gives."""
        table = base_table(stddev)
        ends = thresholds(table)
        prefixes, words = stream(0, 20_000)
        given: list[int] = []

        def recorded(count: int) -> np.ndarray:
            more = words(count)
            given.extend(more.tolist())
            return more

        found = base_samples(table, prefixes, recorded).tolist()
        expected = []
        for prefix in prefixes.tolist():
            uniform = prefix << 112
            if table.guide[prefix] < 0:
                uniform += given.pop(0) >> 16 << 64
            expected.append(bisect_right(ends, uniform) - table.reach)
        assert found == expected
        assert not given


class TestPlan:
    """choose_plan: tables and multipliers."""

    @given(
        st.floats(MIN_STDDEV, 600.0) | st.floats(math.log(20.0), math.log(2.0**48)).map(math.exp)
    )
    def test_laws(self, stddev: float) -> None:
        """At least the target, at most 1e-9 above, s3 at least 4, a table of the right size."""
        stddev = min(max(stddev, MIN_STDDEV), MAX_STDDEV)
        plan = choose_plan(stddev)
        assert stddev <= plan.stddev <= stddev * (1 + 1e-9)
        assert Fraction(stddev) ** 2 <= plan.variance
        assert (Fraction(plan.stddev)) ** 2 <= plan.variance
        variance = Fraction(plan.base_stddev) ** 2
        for multiplier in plan.multipliers:
            assert multiplier >= 1
            assert variance / (1 + multiplier**2) >= 16
            variance *= 1 + multiplier**2
        assert variance == plan.variance
        assert (256 if plan.multipliers else MIN_STDDEV) <= plan.base_stddev <= 512
        assert plan.draws <= 8
        assert plan.distance <= 2.0**-112

    @pytest.mark.parametrize(
        ("stddev", "draws"),
        [(20.0, 1), (512.0, 1), (513.0, 2), (65000.0, 2), (65600.0, 4), (1e9, 4), (2.0**48, 8)],
    )
    def test_draws(self, stddev: float, draws: int) -> None:
        """A number takes one, two, four or eight samples of the table."""
        assert choose_plan(stddev).draws == draws

    @pytest.mark.parametrize(
        "stddev",
        [math.nan, math.inf, -math.inf, -30.0, 0.0, 19.999, math.nextafter(2.0**48, math.inf)],
    )
    def test_refused(self, stddev: float) -> None:
        """What is no number, too fine or too coarse is refused."""
        with pytest.raises(AccountingError, match="expected a noise stddev from 20 to"):
            choose_plan(stddev)


def convolved(table: Table, multiplier: int) -> list[int]:
    """Return the exact law of z1 + multiplier * z2, in units of 2^-256."""
    counts = probabilities(table)
    total = [0] * ((2 * table.reach) * (1 + multiplier) + 1)
    for place, one in enumerate(counts):
        for other_place, other in enumerate(counts):
            total[other_place + multiplier * place] += one * other
    return total


class TestSum:
    """Samples: z1 + c z2."""

    @pytest.mark.parametrize("multiplier", [1, 2, 4])
    def test_law(self, multiplier: int) -> None:
        """The law of a sum, convolved exactly, is the discrete Gaussian."""
        plan, table = Plan(20.0, (multiplier,)), base_table(20.0)
        counts = convolved(table, multiplier)
        middle = len(counts) // 2
        expected = reference(plan.variance, middle)
        assert distance(counts, 2**256, expected) <= plan.distance
        near = round(8 * plan.stddev)
        for place in range(middle - near, middle + near + 1):
            assert abs(counts[place] / (Fraction(expected[place]) * 2**256) - 1) < 1e-15

    def test_too_large_a_multiplier_is_seen(self) -> None:
        """With s3 near 1 instead of 4 the same comparison fails: smoothing is needed."""
        plan, table = Plan(20.0, (19,)), base_table(20.0)
        counts = convolved(table, 19)
        expected = reference(plan.variance, len(counts) // 2)
        assert distance(counts, 2**256, expected) > 1e-10

    def test_order(self) -> None:
        """Neighbours are put together first, the second of each pair times the multiplier."""
        plan, table = Plan(300.0, (5, 70)), base_table(300.0)
        prefixes, words = stream(1, 12)
        z = base_samples(table, prefixes, words).tolist()
        expected = [
            (z[i] + 5 * z[i + 3]) + 70 * (z[i + 6] + 5 * z[i + 9]) for i in range(3)
        ]  # three numbers, of which each has a column
        assert samples(plan, *_columns(1)).tolist() == expected

    def test_largest(self) -> None:
        """The largest sample of the largest parameter is below 37 of it: no overflow."""
        plan = choose_plan(MAX_STDDEV)
        prefixes = np.full((plan.draws, 1), 2**16 - 1, dtype=np.uint16)
        largest = samples(plan, prefixes, lambda n: np.full(n, 2**64 - 1, dtype=np.uint64))
        assert 2.0**51 < largest[0] < 37 * MAX_STDDEV


def _columns(seed: int) -> tuple[np.ndarray, Words]:
    prefixes, words = stream(seed, 12)
    return prefixes.reshape(4, 3), words


class TestSamples:
    """NoiseSource.discrete_gaussian against the exact law."""

    @pytest.mark.parametrize("stddev", STDDEVS)
    def test_fits(self, stddev: float) -> None:
        """Frequencies are those of the law; false-alarm rate 1e-6 each."""
        assert chi_square(drawn(stddev), stddev) > ALARM

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    @pytest.mark.parametrize("stddev", STDDEVS)
    def test_wrong_scale_is_seen(self, stddev: float, wrong: float) -> None:
        """The same test refuses two thirds and one and a half."""
        assert chi_square(drawn(stddev), stddev * wrong) < ALARM

    def test_truncated_gaussian_is_seen(self) -> None:
        """The same test refuses floor(normal), which is half a step off, at 20 steps."""
        floor = np.floor(np.random.default_rng(0).standard_normal(COUNT) * 20).astype(np.int64)
        assert chi_square(floor, 20.0) < ALARM

    @pytest.mark.parametrize("stddev", STDDEVS)
    def test_fine_structure(self, stddev: float) -> None:
        """Remainders are uniform, modulo the multipliers too; false-alarm rate 1e-6 each."""
        numbers = drawn(stddev)
        for modulus in (2, 16, *choose_plan(stddev).multipliers):
            if 1 < modulus <= stddev:  # where every remainder is as likely, to 1e-8
                assert residues(numbers, modulus) > ALARM

    def test_missing_fine_structure_is_seen(self) -> None:
        """The same test refuses samples rounded to even, and multiples of the multiplier."""
        (multiplier,) = choose_plan(3150.7).multipliers
        numbers = drawn(3150.7)
        assert residues(numbers // 2 * 2, 16) < ALARM
        assert residues(numbers // multiplier * multiplier, multiplier) < ALARM

    @pytest.mark.parametrize("stddev", STDDEVS)
    def test_neighbours_are_independent(self, stddev: float) -> None:
        """Consecutive numbers and their squares are uncorrelated; false-alarm rate 1e-6 each."""
        numbers = drawn(stddev) / stddev
        for values in (numbers, numbers**2):
            assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4.9 / COUNT**0.5

    def test_variance_of_a_sum(self) -> None:
        """Twenty-five shares have 25 times the variance; false-alarm rate 1e-6, wrong ones seen."""
        total = sum(drawn(300.5, "share", share) for share in range(25))
        ratio = np.var(total) / (25 * 300.5**2)
        margin = 4.9 * (2 / COUNT) ** 0.5
        assert abs(ratio - 1) < margin
        for wrong in (2 / 3, 3 / 2):
            assert abs(ratio / wrong**2 - 1) > margin
        assert chi_square(np.asarray(total), 5 * 300.5) > ALARM


class TestOpenDP:
    """The exact sampler of OpenDP (Canonne, Kamath, Steinke) as a second opinion."""

    @pytest.mark.slow
    @pytest.mark.parametrize("stddev", [31.5, 1000.5, 1e6])
    def test_same_law(self, stddev: float) -> None:
        """Two samples cannot be told apart; false-alarm rate 1e-6 each, fresh every time."""
        opendp = pytest.importorskip("opendp.prelude")
        opendp.enable_features("contrib")
        integers = opendp.vector_domain(opendp.atom_domain(T="i64"))
        gaussian = opendp.m.make_gaussian(integers, opendp.l2_distance(T=float), scale=stddev)
        theirs = np.array(gaussian([0] * 50_000))
        ours = drawn(stddev)
        assert stats.ks_2samp(theirs, ours).pvalue > ALARM
        for wrong in (2 / 3, 3 / 2):
            assert stats.ks_2samp(theirs, drawn(stddev * wrong)).pvalue < ALARM
        tables = [np.bincount(numbers % 16, minlength=16) for numbers in (theirs, ours)]
        assert stats.chi2_contingency(tables).pvalue > ALARM
