"""Tests of the audit's statistics. Everything random is seeded."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from audit import statistics
from audit.one_run import lower_bound
from common import accounting
from common.noise import NoiseSource

DELTA = 1e-5
ALPHA = 0.05 / 4  # four numbers of guesses


def perfect(canaries: int) -> float:
    """Return the bound that perfect guesses give."""
    best = 0.0
    for share in (50, 10, 4, 2):
        guesses = 2 * (canaries // share)
        mu = statistics.gaussian_mu(canaries, guesses, guesses, ALPHA)
        best = max(best, statistics.gaussian_epsilon(mu, DELTA))
    return best


class TestScale:
    """scale_p_value."""

    def test_is_the_chi_square_test(self) -> None:
        """The upper tail is that of chi-square; two-sided doubles it."""
        assert statistics.scale_p_value(4 * 18.307, 10, 2.0) == pytest.approx(0.1, rel=1e-3)

    def test_p_values_are_uniform(self) -> None:
        """Under the hypothesis every p-value is as likely as any other."""
        noise = np.random.default_rng(0).normal(scale=3.0, size=(2000, 50))
        found = [statistics.scale_p_value(float((row**2).sum()), 50, 3.0) for row in noise]
        assert stats.kstest(found, "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("wrong", [0.97, 1.03])
    def test_three_per_cent_are_seen(self, wrong: float) -> None:
        """Sixty thousand numbers tell 3 % beyond any doubt, and pass without them."""
        noise = NoiseSource.seeded(0).discrete_gaussian(60_000, 100.0).astype(np.float64)
        squares = float((noise**2).sum())
        assert statistics.scale_p_value(squares, noise.size, 100.0) > 1e-3
        assert statistics.scale_p_value(squares, noise.size, 100.0 * wrong) < 1e-15


class TestShape:
    """shape_p_value."""

    @pytest.mark.parametrize("stddev", [50.0, 1000.0, 1e6])
    def test_right_noise_fits(self, stddev: float) -> None:
        """The sampler's numbers fit, on coarse and fine lattices."""
        numbers = NoiseSource.seeded(1).discrete_gaussian(60_000, stddev)
        assert statistics.shape_p_value(numbers, stddev) > 1e-3

    def test_another_shape_is_seen(self) -> None:
        """Laplace noise of the same variance does not fit."""
        random = np.random.default_rng(0)
        numbers = np.rint(random.laplace(scale=1000 / math.sqrt(2), size=60_000)).astype(np.int64)
        assert statistics.shape_p_value(numbers, 1000.0) < 1e-50


class TestCorrelation:
    """correlation_p_value and cosines."""

    def test_p_values_are_uniform(self) -> None:
        """The law of the cosine of two normal vectors is exact, also for few numbers."""
        random = np.random.default_rng(1)
        found = []
        for _ in range(2000):
            cosine = statistics.cosines(random.normal(size=(2, 9)))[0, 1]
            found.append(statistics.correlation_p_value(float(cosine), 9))
        assert stats.kstest(found, "uniform").pvalue > 1e-3

    def test_equal_vectors(self) -> None:
        """Nothing is as unlikely as the same noise twice."""
        assert statistics.correlation_p_value(1.0, 9, pairs=1000) == 0.0

    def test_single_numbers_tell_nothing(self) -> None:
        """Two numbers are always in line."""
        assert statistics.correlation_p_value(-1.0, 1) == 1.0

    def test_several_pairs_pay(self) -> None:
        """The best of ten pairs is ten times as likely."""
        one = statistics.correlation_p_value(0.5, 50)
        assert statistics.correlation_p_value(0.5, 50, pairs=10) == pytest.approx(10 * one)


class TestBinomial:
    """binomial_p_value."""

    @given(st.integers(0, 60), st.floats(0.05, 0.95))
    def test_never_below_the_tails(self, count: int, chance: float) -> None:
        """It is twice the smaller tail, at most one."""
        law = stats.binom(60, chance)
        tail = min(law.cdf(count), law.sf(count - 1))
        assert statistics.binomial_p_value(count, 60, chance) == pytest.approx(min(1, 2 * tail))


class TestBounds:
    """Lower bounds from guesses."""

    @pytest.mark.parametrize(
        ("canaries", "ceiling"), [(200, 7.5), (500, 9.0), (1000, 10.0), (2000, 11.1)]
    )
    def test_perfect_guesses(self, canaries: int, ceiling: float) -> None:
        """So much can be shown at all; jax-privacy 2.0 gives the same to two digits."""
        assert perfect(canaries) == pytest.approx(ceiling, abs=0.06)

    def test_perfect_guesses_without_assumption(self) -> None:
        """The bound for any algorithm reaches 5.4 with a thousand canaries."""
        found = statistics.distribution_free_epsilon(1000, 1000, 1000, DELTA, ALPHA)
        few = statistics.distribution_free_epsilon(1000, 500, 500, DELTA, ALPHA)
        assert max(found, few) == pytest.approx(5.4, abs=0.05)

    @pytest.mark.parametrize(
        ("canaries", "guesses", "right", "mu", "epsilon"),
        [
            (1000, 500, 400, 0.4396, 1.1330),
            (1000, 40, 38, 0.4759, 1.4297),
            (2000, 1000, 900, 0.6913, 1.9586),
        ],
    )
    def test_as_measured_elsewhere(
        self, canaries: int, guesses: int, right: int, mu: float, epsilon: float
    ) -> None:
        """An independent implementation that agrees with jax-privacy gives these numbers."""
        found = statistics.gaussian_mu(canaries, guesses, right, ALPHA)
        assert found == pytest.approx(mu, abs=2e-4)
        found = statistics.distribution_free_epsilon(canaries, guesses, right, DELTA, ALPHA)
        assert found == pytest.approx(epsilon, abs=3e-4)

    @given(st.integers(100, 2000), st.floats(0.02, 1.0))
    def test_half_right_shows_nothing(self, canaries: int, share: float) -> None:
        """Guesses as good as a coin refute no epsilon."""
        guesses = max(2, int(share * canaries))
        assert statistics.gaussian_mu(canaries, guesses, guesses // 2, ALPHA) == 0.0
        free = statistics.distribution_free_epsilon(canaries, guesses, guesses // 2, DELTA, ALPHA)
        assert free == 0.0

    @settings(max_examples=20)
    @given(st.integers(10, 200), st.data())
    def test_more_right_guesses_never_show_less(self, guesses: int, data: st.DataObject) -> None:
        """Both bounds rise with the number of right guesses."""
        right = data.draw(st.integers(guesses // 2, guesses - 1))
        low, high = (
            statistics.gaussian_mu(1000, guesses, found, ALPHA) for found in (right, right + 1)
        )
        assert low <= high + 1e-4
        low, high = (
            statistics.distribution_free_epsilon(1000, guesses, found, DELTA, ALPHA)
            for found in (right, right + 1)
        )
        assert low <= high + 1e-4

    def test_guesses(self) -> None:
        """The highest scores are guessed in, the lowest out."""
        included = np.array([True, False, True, False])
        assert statistics.right_guesses(np.array([3.0, 1.0, 4.0, 2.0]), included, 2) == 4
        assert statistics.right_guesses(np.array([1.0, 3.0, 2.0, 4.0]), included, 2) == 0

    @pytest.mark.parametrize(
        ("epsilon", "audits"),
        [(1.0, 5), (4.0, 5), (8.0, 5), pytest.param(1.0, 200, marks=pytest.mark.slow)],
    )
    def test_an_ideal_mechanism_is_never_refuted(self, epsilon: float, audits: int) -> None:
        """In audits of exact Gaussian noise the bound stays below the truth.

        At most one in twenty may be above by the confidence; the bounds are not that tight.
        """
        random, mu = np.random.default_rng(0), accounting.mu_for(epsilon, DELTA)
        for _ in range(audits):
            included = random.random(1000) < 0.5
            scores = mu * included + random.normal(size=1000)
            bound = lower_bound(scores, included, DELTA)
            assert bound.epsilon < epsilon
            assert bound.distribution_free < epsilon

    def test_power(self) -> None:
        """Against an ideal mechanism with epsilon 8 the bound shows more than 3."""
        random, mu = np.random.default_rng(0), accounting.mu_for(8.0, DELTA)
        included = random.random(2000) < 0.5
        scores = mu * included + random.normal(size=2000)
        assert lower_bound(scores, included, DELTA).epsilon > 3.0


class TestGaussianEpsilon:
    """gaussian_epsilon."""

    @given(st.floats(0.05, 8.0), st.sampled_from([1e-3, 1e-5, 1e-9]))
    def test_agrees_with_accounting_from_below(self, mu: float, delta: float) -> None:
        """Accounting rounds up, the audit rounds down; they are written apart."""
        theirs, ours = (
            accounting.gaussian_epsilon(mu, delta),
            statistics.gaussian_epsilon(mu, delta),
        )
        assert theirs - 1e-3 <= ours <= theirs

    def test_no_mu(self) -> None:
        """Without any leak epsilon is zero."""
        assert statistics.gaussian_epsilon(0.0, DELTA) == 0.0
