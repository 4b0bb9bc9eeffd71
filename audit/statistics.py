"""Exact statistics of the empirical audit: p-values, and lower bounds from guesses.

Tests of the mechanism give p-values under the hypothesis that the code does what it says.
Bounds of the one-run audit give the largest epsilon that a number of right guesses refutes:

- `distribution_free_epsilon`: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1)
  training run", arXiv 2305.08846, Theorem 5.2. Holds for any (epsilon, delta)-DP algorithm.
- `gaussian_mu`: Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one
  run", arXiv 2410.22235, Algorithm 3, for the trade-off curve of a Gaussian mechanism. Tighter;
  refutes "this is mu-GDP".
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special, stats

_BINS = 50
_LARGEST = 64.0  # epsilon or mu beyond which no bound is looked for


def scale_p_value(sum_of_squares: float, count: int, stddev: float) -> float:
    """Return the two-sided chance of such a sum of squares of `count` centred normal numbers.

    Chi-square with `count` degrees of freedom; for a discrete Gaussian of 50 steps or more the
    difference is below 1e-8 of the variance.
    """
    ratio = sum_of_squares / stddev**2
    return float(min(1.0, 2 * min(stats.chi2.cdf(ratio, count), stats.chi2.sf(ratio, count))))


def shape_p_value(numbers: Int[np.ndarray, " N"], stddev: float) -> float:
    """Return the chance of so bad a fit of integers to the discrete Gaussian (chi-square, 50 bins).

    Edges lie between integers, where the normal distribution function equals the discrete one
    up to 1e-4 of a probability for 20 steps or more.
    """
    quantiles = stats.norm.ppf(np.arange(1, _BINS) / _BINS) * stddev
    edges = np.unique(np.round(quantiles)) + 0.5
    chances = np.diff(stats.norm.cdf(edges / stddev), prepend=0.0, append=1.0)
    counts = np.bincount(np.searchsorted(edges, numbers), minlength=len(chances))
    expected = chances * numbers.size
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(chances) - 1))


def correlation_p_value(correlation: float, length: int, pairs: int = 1) -> float:
    """Return the chance that one of `pairs` correlations is so far from 0.

    For independent centred normal vectors the squared cosine has distribution
    Beta(1/2, (length - 1) / 2), exactly; several pairs pay Bonferroni.
    """
    if length < 2:
        return 1.0  # two single numbers are always in line
    square = min(correlation**2, 1.0)
    return float(min(1.0, pairs * stats.beta.sf(square, 0.5, (length - 1) / 2)))


def cosines(vectors: Float[np.ndarray, "K P"]) -> Float[np.ndarray, "K K"]:
    """Return the cosine of every pair of vectors; a vector without any noise is in line with all.

    >>> cosines(np.array([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    norms = np.linalg.norm(vectors, axis=1)
    products = vectors @ vectors.T
    scales = np.outer(norms, norms)
    return np.asarray(np.divide(products, scales, out=np.ones_like(products), where=scales > 0))


def binomial_p_value(count: int, trials: int, chance: float) -> float:
    """Return the two-sided chance of such a count (twice the smaller tail, at most 1).

    >>> round(binomial_p_value(50, 100, 0.5), 2), binomial_p_value(0, 100, 0.5) < 1e-29
    (1.0, True)
    """
    law = stats.binom(trials, chance)
    return float(min(1.0, 2 * min(law.cdf(count), law.sf(count - 1))))


def right_guesses(
    scores: Float[np.ndarray, " m"], included: Bool[np.ndarray, " m"], each: int
) -> int:
    """Guess "in" for the `each` highest scores, "out" for the `each` lowest; count right ones.

    >>> right_guesses(np.array([0.1, 0.9, 0.8, 0.2]), np.array([False, True, False, False]), 2)
    3
    """
    order = np.argsort(scores, kind="stable")
    return int(included[order[len(order) - each :]].sum() + (~included[order[:each]]).sum())


def distribution_free_p_value(
    canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Bound the chance that an (epsilon, delta)-DP algorithm allows so many right guesses.

    Source: Steinke, Nasr and Jagielski 2023, Theorem 5.2: with W ~ Binomial(guesses,
    e^epsilon / (1 + e^epsilon)), P(W >= right) plus 2 m delta times the largest slope
    P(right > W >= right - i) / i.
    """
    law = stats.binom(guesses, special.expit(epsilon))
    tail = float(law.sf(right - 1))
    if delta == 0 or right == 0:
        return min(1.0, tail)
    i = np.arange(1, right + 1)
    slope = float(np.max((law.sf(right - 1 - i) - tail) / i))
    return min(1.0, tail + 2 * canaries * delta * slope)


def distribution_free_epsilon(
    canaries: int, guesses: int, right: int, delta: float, alpha: float
) -> float:
    """Return the largest epsilon that so many right guesses refute, at level `alpha`."""

    def refuted(epsilon: float) -> bool:
        return distribution_free_p_value(canaries, guesses, right, epsilon, delta) < alpha

    return _last(refuted)


def is_gaussian_refuted(canaries: int, guesses: int, right: int, mu: float, alpha: float) -> bool:
    """Tell whether so many right guesses refute that the algorithm is mu-GDP.

    Source: Mahloujifar, Melis and Chaudhuri 2024, Algorithm 3 with two choices a canary. If
    P(at least `right` of `guesses` are right) were `alpha`, `h` and `r` bound from below what
    wrong and right guesses weigh with i right ones or more, walking down from `right`; the
    curve is refuted where the weights exceed the share of canaries that are guessed.
    """

    def inverse_blow_up(weight: float) -> float:  # the smallest set that mu-GDP can make `weight`
        return float(special.ndtr(special.ndtri(min(weight, 1.0)) - mu))

    r, h = alpha * right / canaries, alpha * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        higher = max(h, inverse_blow_up(r))
        r += i / (guesses - i) * (higher - h)
        if r >= 1.0:
            return True
        h = higher
    return r + h > guesses / canaries


def gaussian_mu(canaries: int, guesses: int, right: int, alpha: float) -> float:
    """Return the largest mu for which "mu-GDP" is refuted at level `alpha`; 0 if none is."""
    return _last(lambda mu: is_gaussian_refuted(canaries, guesses, right, max(mu, 1e-9), alpha))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of a Gaussian mechanism with parameter mu, rounded down.

    Source: Balle and Wang 2018, Theorem 8. Written apart from `common.accounting`, so that the
    audit does not rest on what it audits.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """

    def too_much(epsilon: float) -> bool:
        if mu <= 0:
            return False
        first = special.log_ndtr(mu / 2 - epsilon / mu)
        second = epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
        return bool(math.exp(first) - math.exp(min(second, first)) > delta)

    return _last(too_much, largest=4096.0)


def _last(holds: Callable[[float], bool], largest: float = _LARGEST) -> float:
    """Return the largest number for which something that ends somewhere still holds, or 0."""
    if not holds(0.0):
        return 0.0
    high = 1.0
    while holds(high):
        high *= 2
        if high >= largest:
            return largest
    sign = optimize.bisect(lambda x: 1.0 if holds(x) else -1.0, 0.0, high, xtol=1e-4)
    return max(0.0, float(sign) - 1e-4)
