"""Three accountants for one composition: Renyi, dp-accounting's PLD, Opacus' PRV.

Each takes what `common.accounting` made of the events: `mu` of all sums over all customers,
and the Poisson-sampled sums as (noise multiplier, sampling rate, count). Each returns an upper
bound on epsilon, or raises. None of them decides: `common.accounting.assess` does.

* `renyi_epsilon` is our own formula. Looser than the others (by 5 to 20 % as a rule), but
  without a grid that can be too coarse, and quick: it can run inside a transaction.
* `pld_epsilon` composes dp-accounting's pessimistic privacy-loss distributions, in both
  directions of the add-or-remove relation (Doroshenko et al. 2022, "Connect the Dots").
* `prv_epsilon` asks Opacus' PRV accountant for its upper bound (Gopi et al. 2021). It knows
  one direction only, the one in which the customer is in the first table.

Opacus' Gaussian-DP accountant is an approximation from below (by up to 2.6 times) and is used
nowhere.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from common.errors import AccountingError

Sampled = tuple[tuple[float, float, int], ...]  # (noise multiplier, sampling rate, count), sorted

PRV_ERROR = 0.01  # what Opacus' PRV adds to epsilon by design, at most, up to epsilon 1
_ROUNDING = 1e-15  # probability that a step's Fourier transforms may get wrong, at most
_MOST_POINTS = 2**21  # of a grid: a second or two, and tens of megabytes
_MOST_STEPS = 10**6  # dp-accounting raises a whole number to this power
_LARGEST = 700.0  # privacy loss that Opacus can hold
_LEAST_NOISE = 0.1  # below it, sampling is given no credit in the Renyi bound
_FINE = 0.08  # grid interval of a step's privacy loss, in its standard deviations


def _orders() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    below = 1.0 + np.geomspace(0.02, 0.98, 24)
    between = np.concatenate([np.arange(2.1, 6.0, 0.1), np.arange(6.5, 16.0, 0.5)])
    fractions = np.concatenate([below, between[np.abs(between - np.rint(between)) > 1e-6]])
    whole = np.unique(np.rint(np.concatenate([np.arange(2, 65), np.geomspace(66, 16384, 48)])))
    return fractions, whole


_FRACTIONS, _WHOLE = _orders()
ORDERS = np.concatenate([_FRACTIONS, _WHOLE])


def renyi_epsilon(mu: float, sampled: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return an upper bound on epsilon from Renyi divergences at a fixed grid of orders.

    Source: Mironov, Talwar and Zhang 2019, "Renyi differential privacy of the sampled Gaussian
    mechanism", Theorems 4 and 5 (the curve, and that it holds in both directions); Canonne,
    Kamath and Steinke 2020, Proposition 12 (curve to epsilon); Bretagnolle and Huber 1979
    (where delta alone covers the total variation).
    """
    with np.errstate(over="ignore"):
        curve = ORDERS * (mu * mu / 2)
        for sigma, rate, count in sampled:
            curve = curve + count * _step_curve(sigma, rate)
    if -math.expm1(-float(curve.min())) <= delta * delta:
        return 0.0
    values = curve + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(float(values.min()) * (1 + 1e-12), 0.0)


@lru_cache(maxsize=1024)
def _step_curve(sigma: float, rate: float) -> np.ndarray[Any, Any]:
    """Return the Renyi divergence of one sampled sum at every order, rounded up."""
    with np.errstate(over="ignore", invalid="ignore"):
        curve = ORDERS / 2 / sigma / sigma  # sampling never costs more than no sampling
        if rate < 1 and sigma >= _LEAST_NOISE:
            moments = np.concatenate([_by_quadrature(sigma, rate), _by_binomials(sigma, rate)])
            slack = 1e-14 * (ORDERS + 10)  # what log-gamma and the sums can be wrong by
            sampled = (np.maximum(moments, 0.0) * (1 + 1e-12) + slack) / (ORDERS - 1)
            curve = np.fmin(curve, sampled)
    curve.setflags(write=False)
    return np.asarray(curve)


def _by_binomials(sigma: float, rate: float) -> np.ndarray[Any, Any]:
    """Return log E[(1 - q + q e^loss)^a] at whole orders a, as a finite sum."""
    from scipy.special import gammaln, logsumexp

    moments = []
    for order in _WHOLE:
        k = np.arange(order + 1)
        choose = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        chance = k * math.log(rate) + (order - k) * math.log1p(-rate)
        moments.append(logsumexp(choose + chance + k * (k - 1) / 2 / sigma / sigma))
    return np.array(moments)


def _by_quadrature(sigma: float, rate: float) -> np.ndarray[Any, Any]:
    """Return the same at fractional orders, by the trapezoid rule.

    The integrand is analytic to a distance pi sigma^2 from the real line, so the rule's error
    falls like exp(-2 pi^2 sigma^2 / step): below 1e-40 for a step of sigma min(sigma, 1) / 5.
    """
    from scipy.special import logsumexp

    step = min(1.0, sigma) / 5  # in units of sigma
    z = np.arange(-14.0, 14.0 + _FRACTIONS[-1] / sigma + step, step)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + z / sigma - 0.5 / sigma / sigma)
    weight = -z * z / 2 + math.log(step) - 0.5 * math.log(2 * math.pi)
    return np.asarray(logsumexp(_FRACTIONS[:, None] * loss + weight, axis=1))


def pld_epsilon(mu: float, sampled: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return epsilon by dp-accounting's privacy-loss distributions, from above.

    Raises:
        AccountingError: `delta` is so small, or the steps are so many, that rounding would
            decide; or there are more than a million steps.
    """
    if not (mu or sampled):
        _without_rounding(mu, sampled, delta)
        return 0.0
    return GrowingLoss(mu, sampled).epsilon(mu, sampled, delta)


class GrowingLoss:
    """The same while sampled sums become more: what was composed is not composed again.

    Args:
        mu: Of the sums over all customers that are planned.
        sampled: The sampled sums that are planned; they fix the grid.
    """

    def __init__(self, mu: float, sampled: Sequence[tuple[float, float, int]]) -> None:
        self._interval = _interval(mu, sampled)
        # how many sampled sums of each kind, mu, and what they compose to
        self._known: tuple[dict[tuple[float, float], int], float, Any] = {}, 0.0, None

    def epsilon(
        self, mu: float, sampled: Sequence[tuple[float, float, int]], delta: float
    ) -> float:
        """Return an upper bound on epsilon.

        Args:
            mu: Of the sums over all customers.
            sampled: The sampled sums, of which no kind is fewer than before.
            delta: At which epsilon is told.

        Raises:
            AccountingError: As `pld_epsilon`, or some of what was composed is not there.
        """
        usable = _without_rounding(mu, sampled, delta)
        now: dict[tuple[float, float], int] = {}
        for sigma, rate, count in sampled:
            now[sigma, rate] = now.get((sigma, rate), 0) + count
        counts, known, whole = self._known
        if any(now.get(kind, 0) < count for kind, count in counts.items()):
            raise AccountingError("sampled sums that were composed are not there any more")
        if mu != known:
            counts, whole = {}, None
        for kind, count in now.items():
            more = count - counts.get(kind, 0)
            if more:
                whole = _together(whole, _steps(*kind, more, self._interval))
        if mu != known and mu:
            whole = _together(whole, _steps(1 / mu, 1.0, 1, self._interval))
        self._known = now, mu, whole  # all at once: what fails on the way loses no step
        return 0.0 if whole is None else float(whole.get_epsilon_for_delta(usable))


def _together(one: Any, other: Any) -> Any:
    return other if one is None else one.compose(other)


def _without_rounding(
    mu: float, sampled: Sequence[tuple[float, float, int]], delta: float
) -> float:
    """Return `delta` less the probability that Fourier transforms may get wrong."""
    steps = sum(count for _, _, count in sampled) + (mu > 0)
    rounding = _ROUNDING * (steps + 10)
    if rounding > delta / 2:
        raise AccountingError(
            f"delta {delta:.3g} is too small for {steps} steps in double precision"
        )
    if steps > _MOST_STEPS:
        raise AccountingError(f"{steps} steps are more than {_MOST_STEPS}")
    return delta - rounding


def _interval(mu: float, sampled: Sequence[tuple[float, float, int]]) -> float:
    """Return the grid interval of the privacy loss: a power of two, so that it is found again.

    Rounding to a grid of interval h adds a variance of about h^2 / 6 a step. The interval is
    small against the standard deviation q / sigma of a step's loss, so this is below a
    thousandth of the total, and the points needed grow with the root of the steps only. A
    single step with a very long tail gets a coarser grid; the rounding stays pessimistic.
    """
    steps = sum(count for _, _, count in sampled) + (mu > 0)
    squares = ((rate / sigma) * (rate / sigma) * n for sigma, rate, n in sampled)
    variance = mu * mu + math.fsum(squares)
    if not variance < math.inf:
        raise AccountingError("there is too little noise for a privacy loss that a float holds")
    fine = min(2.0 ** math.floor(math.log2(_FINE * math.sqrt(variance / steps))), 0.125)
    widest = max((_range(sigma, rate) for sigma, rate, _ in sampled), default=0.0)
    coarse = 32 * max(widest, 10 * mu + mu * mu / 2) / _MOST_POINTS
    return max(fine, 2.0 ** math.ceil(math.log2(coarse)))


def _range(sigma: float, rate: float) -> float:
    """Return the largest privacy loss of a step, but for a chance of 1e-22."""
    loss = 10 / sigma + 0.5 / sigma / sigma
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + loss) if rate < 1 else loss)


@lru_cache(maxsize=128)
def _steps(sigma: float, rate: float, count: int, interval: float) -> Any:
    """Return the privacy-loss distribution of `count` equal steps."""
    one = _step(sigma, rate, interval)
    return one if count == 1 else one.self_compose(count)


@lru_cache(maxsize=128)
def _step(sigma: float, rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )


def prv_epsilon(mu: float, sampled: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return the upper bound of Opacus' PRV accountant.

    It adds its error bound to epsilon: half a percent of epsilon, at most `PRV_ERROR` where
    its grid stays below a few million points.

    Raises:
        AccountingError: Its grid would be too large, or rounding would decide.
        Exception: Whatever Opacus raises; it names no errors of its own.
    """
    from common.opacus_import import opacus_accountants

    usable = _without_rounding(mu, sampled, delta)
    accountant = opacus_accountants().PRVAccountant()
    accountant.history = [*sampled, *([(1 / mu, 1.0, 1)] if mu else [])]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # opacus warns of its own numpy usage
        error = prv_error(mu, sampled, delta)
        return float(accountant.get_epsilon(usable, eps_error=error, delta_error=usable / 1000))


def prv_error(mu: float, sampled: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return the error bound that Opacus can be asked for.

    Raises:
        AccountingError: With so many points as are allowed it would be above 1 % of epsilon,
            or above 1, beyond which the method has no proof; or the privacy loss is so large
            that Opacus would silently return about 709, the largest number with an
            exponential.
    """
    steps = sum(count for _, _, count in sampled) + (mu > 0)
    wide = renyi_epsilon(mu, sampled, delta / 4000) + 3  # about the range that Opacus will take
    if wide > _LARGEST:
        raise AccountingError("a privacy loss above 700 does not fit into its exponentials")
    bound = renyi_epsilon(mu, sampled, delta)
    points = 2 * wide * math.sqrt(steps * math.log(12000 / delta) / 2)  # at an error of 1
    most = 4 * _MOST_POINTS // max(4, len(sampled) + (mu > 0))  # Opacus has a grid for each
    error = max(min(PRV_ERROR, bound / 200), points / most)
    if not error <= min(max(PRV_ERROR, bound / 100), 1.0):
        raise AccountingError(f"{steps} steps need a grid of more than {most} points")
    return error
