"""Events -> epsilon, and epsilon -> noise.

Sums over all customers are Gaussian mechanisms: their composition is one Gaussian mechanism
with mu^2 = sum(count / noise_multiplier^2), and its privacy curve is known in closed form
(Balle and Wang 2018, Theorem 8; Dong, Roth and Su 2022, Corollary 3.3). No approximation.

Poisson-sampled sums are composed with two independent libraries, Opacus' PRV accountant and
dp-accounting's privacy-loss distributions; the larger epsilon is claimed, and a disagreement
is an error, never a number. Opacus' Gaussian-DP accountant is an approximation from below and
is not used.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, check, merged

_DISAGREEMENT = 0.02  # relative, plus the error bound that Opacus' PRV adds by design
PRV_ERROR = 0.01


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Return an upper bound on epsilon at `delta` for everything in `events` together.

    Neighbouring relation: add or remove one customer's row. The events may come from any
    number of runs and be chosen adaptively.

    Raises:
        AccountingError: `delta` or an event is out of range, or the libraries disagree.

    >>> round(epsilon([GaussianSum(noise_multiplier=4.0, sensitivity=1.0)], 1e-5), 3)
    0.926
    """
    _check_delta(delta)
    events = merged(check(event) for event in events)
    if not events:
        return 0.0
    if all(isinstance(event, GaussianSum) for event in events):
        return gaussian_epsilon(gaussian_mu(events), delta)
    return _sampled_epsilon(events, delta)


def gaussian_mu(events: Iterable[Event]) -> float:
    """Return mu of the composition of sums over all customers: mu^2 = sum(count / sigma^2)."""
    return math.sqrt(
        math.fsum(event.count / event.noise_multiplier / event.noise_multiplier for event in events)
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of a Gaussian mechanism with sensitivity / noise = `mu`, rounded up.

    Source: Balle and Wang 2018, "Improving the Gaussian mechanism for differential privacy",
    Theorem 8, solved for epsilon by bisection in log space.
    """
    _check_delta(delta)
    if mu == 0.0:
        return 0.0
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2.0
        if high > 1e6:
            raise AccountingError(f"epsilon would be above a million (mu = {mu:.3g})")
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        if gaussian_delta(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def gaussian_delta(mu: float, eps: float) -> float:
    """Return delta(eps) of a Gaussian mechanism: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - eps / mu))
    second = eps + float(log_ndtr(-mu / 2 - eps / mu))
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def mu_for(eps: float, delta: float) -> float:
    """Return the largest mu whose Gaussian mechanism is (eps, delta)-DP, rounded down."""
    _check_delta(delta)
    if not 0 < eps < float("inf"):
        raise AccountingError(f"expected a finite epsilon > 0, got {eps}")
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) <= eps:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        if middle and gaussian_epsilon(middle, delta) > eps:
            high = middle
        else:
            low = middle
    return low


def person_table(eps: float, delta: float) -> list[tuple[float, float, float]]:
    """Return (k, epsilon with shared noise, epsilon with own noise) for a person at k merchants.

    Each merchant protects the person's row with (eps, delta). With one shared secure sum the
    person moves the same sum k times over: mu grows k-fold. With noise of its own at every
    merchant the k Gaussian mechanisms compose: mu grows by the root of k.

    >>> [tuple(round(value, 1) for value in row) for row in person_table(1.0, 1e-4)]
    [(2.5, 2.9, 1.7), (5.0, 6.6, 2.5), (12.0, 20.4, 4.2)]
    """
    mu = mu_for(eps, delta)
    return [
        (k, gaussian_epsilon(k * mu, delta), gaussian_epsilon(math.sqrt(k) * mu, delta))
        for k in (2.5, 5.0, 12.0)
    ]


def sampled_noise_multiplier(
    target: float, delta: float, sampling_rate: float, steps: int, others: tuple[Event, ...]
) -> float:
    """Return the noise multiplier of `steps` Poisson-sampled sums, found by Opacus.

    Args:
        target: Epsilon of the sampled steps and `others` together.
        delta: Delta of the whole.
        sampling_rate: Chance of each customer to enter a step, below 1.
        steps: Number of steps.
        others: Everything else that the same budget pays for.

    Raises:
        AccountingError: No noise multiplier reaches the target.
    """
    from opacus.accountants.utils import get_noise_multiplier

    from common.opacus_accountant import MECHANISM

    try:
        return float(
            get_noise_multiplier(
                target_epsilon=target,
                target_delta=delta,
                sample_rate=sampling_rate,
                steps=steps,
                accountant=MECHANISM,
                epsilon_tolerance=target * 1e-3,
                others=others,
            )
        )
    except ValueError as error:
        raise AccountingError(
            f"no noise multiplier reaches epsilon {target} at delta {delta} with {steps} steps "
            f"at sampling rate {sampling_rate}: {error}"
        ) from None


@lru_cache(maxsize=4096)
def _sampled_epsilon(events: tuple[Event, ...], delta: float) -> float:
    prv, pld = _prv_epsilon(events, delta), _pld_epsilon(events, delta)
    for name, value in (("Opacus PRV", prv), ("dp-accounting PLD", pld)):
        if not 0 <= value < float("inf"):
            raise AccountingError(f"{name} returned epsilon {value}; no epsilon is claimed")
    if abs(prv - pld) > PRV_ERROR + _DISAGREEMENT * max(prv, pld):
        raise AccountingError(
            f"the accountants disagree: Opacus PRV says {prv:.4f}, dp-accounting PLD says "
            f"{pld:.4f}; no epsilon is claimed"
        )
    return max(prv, pld)


def opacus_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return Opacus' PRV upper bound for the same events (an opinion of its own)."""
    _check_delta(delta)
    events = merged(check(event) for event in events)
    return _prv_epsilon(events, delta) if events else 0.0


def _prv_epsilon(events: tuple[Event, ...], delta: float) -> float:
    import warnings

    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, _rate(e), e.count) for e in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus warns of its own numpy usage
        try:
            return float(
                accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000)
            )
        except (ValueError, RuntimeError, OverflowError, FloatingPointError) as error:
            raise AccountingError(f"Opacus PRV failed ({error}); no epsilon is claimed") from None


def _pld_epsilon(events: tuple[Event, ...], delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3
    )
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(_rate(event), gaussian)
        accountant.compose(sampled if _rate(event) < 1 else gaussian, event.count)
    return float(accountant.get_epsilon(delta))


def _rate(event: Event) -> float:
    return event.sampling_rate if isinstance(event, PoissonGaussianSum) else 1.0


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise AccountingError(f"expected 0 < delta < 1, got {delta}")
