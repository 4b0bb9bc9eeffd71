"""Recompute epsilon from raw events with other accountants than the one that printed it.

Uses none of `common.accounting`: it reads the stored documents itself, and every event is
composed by a library. dp-accounting's privacy-loss distributions (Koskela et al. 2020;
Doroshenko et al. 2022), in both directions of the add-or-remove relation, give the auditor's
epsilon; Opacus' PRV accountant (Gopi et al. 2021) gives a second opinion.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from common.errors import AccountingError

DP_ACCOUNTING, OPACUS = "dp-accounting PLD", "Opacus PRV"
OPACUS_ERROR = 0.01  # what Opacus adds to epsilon by design, at most, up to epsilon 1

_FINE = 0.05  # grid interval of the privacy loss, in standard deviations of one step's
_POINTS = 2**21  # of all of Opacus' grids together: seconds, and a few hundred megabytes
_ROUNDING = 1e-15  # probability a step's Fourier transforms may get wrong, at most
_MOST_STEPS = 10**6  # dp-accounting raises a whole number to this power
_FAILURES = (
    AccountingError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

_Parts = dict[tuple[float, float], int]  # (noise multiplier, sampling rate) -> count


def recompute(events: Iterable[dict[str, Any]], delta: float) -> float:
    """Return epsilon at `delta` of events as `privacy.json` and the ledger hold them.

    Raises:
        AccountingError: An event's kind is not known to this auditor, a field is missing or
            out of range, or dp-accounting gives no finite epsilon.
    """
    parts = _read(events, delta)
    said = _opinion(lambda: _dp_accounting(parts, delta))
    if isinstance(said, str):
        raise AccountingError(f"{DP_ACCOUNTING} {said}; the auditor has no epsilon")
    return said


def opinions(events: Iterable[dict[str, Any]], delta: float) -> dict[str, float | str]:
    """Return each library's upper bound on epsilon, or a sentence on why it gave none.

    Opacus adds an error bound by design: half a percent of epsilon, at most `OPACUS_ERROR`
    up to epsilon 1, and at most 1 % of a larger one.

    Raises:
        AccountingError: The events cannot be read, as for `recompute`.
    """
    parts = _read(events, delta)
    first = _opinion(lambda: _dp_accounting(parts, delta))
    about = first if isinstance(first, float) else 2.0
    return {DP_ACCOUNTING: first, OPACUS: _opinion(lambda: _opacus(parts, delta, about))}


def _opinion(accountant: Callable[[], float]) -> float | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries warn of their own numpy usage
            value = accountant()
    except _FAILURES as error:
        return f"failed ({type(error).__name__}: {str(error)[:160]})"
    if not 0 <= value < math.inf:
        return f"returned epsilon {value}"
    return float(value)


def _dp_accounting(parts: _Parts, delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    usable = _usable(parts, delta)
    if not parts:
        return 0.0
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_interval(parts),
    )
    for (sigma, rate), count in parts.items():
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        sampled = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(gaussian if rate == 1.0 else sampled, count)
    return float(accountant.get_epsilon(usable))


def _opacus(parts: _Parts, delta: float, about: float) -> float:
    from common.opacus_import import opacus_accountants

    usable = _usable(parts, delta)
    if not parts:
        return 0.0
    steps, wide = sum(parts.values()), 2 * about + 5
    if wide > 700.0:  # it would silently return about 709, the largest exponent
        raise AccountingError("a privacy loss above 700 does not fit into its exponentials")
    points = 2 * wide * math.sqrt(steps * math.log(12000 / delta) / 2)
    error = max(min(OPACUS_ERROR, about / 200), points * max(4, len(parts)) / (4 * _POINTS))
    if not error <= min(max(OPACUS_ERROR, about / 100), 1.0):
        raise AccountingError(f"{steps} steps need a grid of millions of points")
    accountant = opacus_accountants().PRVAccountant()
    accountant.history = [(sigma, rate, count) for (sigma, rate), count in parts.items()]
    return float(accountant.get_epsilon(usable, eps_error=error, delta_error=usable / 1000))


def _usable(parts: _Parts, delta: float) -> float:
    """Return `delta` less the probability that Fourier transforms may get wrong."""
    steps = sum(parts.values())
    rounding = _ROUNDING * (steps + 10)
    if rounding > delta / 2:
        raise AccountingError(f"delta {delta:.3g} is too small for {steps} steps")
    if steps > _MOST_STEPS and any(rate < 1.0 for _, rate in parts):
        raise AccountingError(f"{steps} steps are more than {_MOST_STEPS}")
    return delta - rounding


def _interval(parts: _Parts) -> float:
    """Return a grid interval that adds less than a thousandth to the variance of the loss.

    It is pessimistic at any interval. dp-accounting composes equal sums over all customers
    into one step, and others one by one.
    """
    steps = sum(count if rate < 1.0 else 1 for (_, rate), count in parts.items())
    variance = math.fsum(n * (rate / sigma) ** 2 for (sigma, rate), n in parts.items())
    mus = [math.sqrt(n if rate == 1.0 else 1) / sigma for (sigma, rate), n in parts.items()]
    widest = max(10 * mu + mu * mu / 2 for mu in mus)  # but for a chance of 1e-22
    return max(min(_FINE * math.sqrt(variance / steps), 0.1), 32 * widest / _POINTS)


def _read(events: Iterable[dict[str, Any]], delta: float) -> _Parts:
    """Return the number of times that each mechanism was applied, in a fixed order."""
    if not 0 < delta < 1:
        raise AccountingError(f"expected 0 < delta < 1, got {delta}")
    parts: _Parts = {}
    for event in events:
        (sigma, rate), count = _mechanism(event)
        if count:
            parts[sigma, rate] = parts.get((sigma, rate), 0) + count
    return dict(sorted(parts.items()))


def _mechanism(event: dict[str, Any]) -> tuple[tuple[float, float], int]:
    kind, sigma = event.get("kind"), _number(event, "noise_multiplier")
    count = _number(event, "count")
    if not count.is_integer():
        raise AccountingError("an event's field 'count' is not a whole number")
    if kind == "gaussian-sum":
        return (sigma, 1.0), int(count)
    if kind != "poisson-gaussian-sum":
        raise AccountingError(f"the auditor does not know privacy event {kind!r}")
    rate = _number(event, "sampling_rate")
    if rate > 1.0:
        raise AccountingError("an event's field 'sampling_rate' is above 1")
    return (sigma, rate), int(count)


def _number(event: dict[str, Any], name: str) -> float:
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AccountingError(f"an event's field '{name}' is missing or no number")
    lowest = 0.0 if name == "count" else 5e-324
    if not lowest <= value <= 1.7e308:
        raise AccountingError(f"an event's field '{name}' is out of range")
    return float(value)
