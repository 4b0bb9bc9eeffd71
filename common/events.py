"""What a merchant released, as frozen values.

Compatibility promise. Events are written to ledgers and bundles that must be readable, and
mean the same, for as long as somebody's budget depends on them:

* an event is never removed, and none of its fields is removed, renamed or given another unit;
* the meaning of an event never changes: a new mechanism, or a mechanism whose guarantee
  differs in any way, gets a new event with a new `kind`;
* `count` is exact: an event with count n means the same as n events with count 1, and with
  count 0 the same as no event;
* what is not known is refused, never skipped.

Events do not interpret themselves: accountants do (`common.accounting`, and independently
`audit.epsilon`). The order of events carries no meaning.

Common to all events. x and x' are neighbouring tables: one has one customer's row (with all of
that customer's data) more than the other. A sum over a set of customers is f(S) = sum of g(c)
over c in S, with g(c) a vector of P numbers and ||g(c)||_2 <= `sensitivity` for every
possible customer; g may depend on everything that was released before.

The noise that is drawn is a sum of discrete Gaussians; docs/privacy-model.md ("Integer noise")
proves the release to be, but for 10^-204, post-processing of the continuous Gaussian that the
events below name. That is why no Skellam event exists: no Skellam noise is released, and
discrete Gaussian noise needs no event of its own.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.errors import AccountingError


@dataclass(frozen=True)
class GaussianSum:
    """`count` sums over all customers, each with Gaussian noise of its own.

    Each releases f(x) + Z with Z ~ N(0, s^2 I_P), s >= `noise_multiplier * sensitivity`, or
    any post-processing of it. The Zs are independent of each other and of all else. Its
    dominating pair, in both directions, is N(1 / noise_multiplier, 1) against N(0, 1).
    """

    noise_multiplier: float
    sensitivity: float  # L2 norm that one customer adds at most, in the unit of the sum
    count: int = 1


@dataclass(frozen=True)
class PoissonGaussianSum:
    """Like `GaussianSum`, but every customer enters each sum with chance `sampling_rate`.

    Each releases f(S) + Z with Z as for `GaussianSum`. S holds every customer of x with
    probability `sampling_rate`, independently of all other customers, sums and releases, and
    S stays secret. A batch of fixed size, or one from shuffling, is not this event. With q the
    rate and m = 1 / noise_multiplier its dominating pair is (1 - q) N(0, 1) + q N(m, 1)
    against N(0, 1) if the customer is removed, and the reverse if one is added.
    """

    noise_multiplier: float
    sensitivity: float
    sampling_rate: float
    count: int = 1


Event = GaussianSum | PoissonGaussianSum

_MOST = 2**53  # every whole number below it is a float
_NO_SAMPLING = -1.0  # sorts before every rate

_KINDS: dict[str, type[GaussianSum] | type[PoissonGaussianSum]] = {
    "gaussian-sum": GaussianSum,
    "poisson-gaussian-sum": PoissonGaussianSum,
}


def to_document(event: Event) -> dict[str, Any]:
    """Return the event as a JSON-serialisable dictionary with its `kind`.

    >>> to_document(GaussianSum(2.0, 1.0))
    {'kind': 'gaussian-sum', 'noise_multiplier': 2.0, 'sensitivity': 1.0, 'count': 1}
    """
    kind = next(name for name, cls in _KINDS.items() if type(event) is cls)
    return {"kind": kind, **vars(event)}


def from_document(document: dict[str, Any]) -> Event:
    """Read an event back.

    Raises:
        AccountingError: The kind is not known, or the fields are not those of the kind.
    """
    fields = dict(document) if isinstance(document, dict) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise AccountingError(f"unknown privacy event {kind!r}; a newer version may know it")
    try:
        return check(_KINDS[kind](**fields))
    except TypeError:
        raise AccountingError(f"privacy event '{kind}' has other fields than expected") from None


def check(event: Event) -> Event:
    """Return the event if its kind is known and its numbers make sense.

    Raises:
        AccountingError: The event is of no known kind, or a number is not finite or out of
            range; the message names it.
    """
    if type(event) not in _KINDS.values():
        raise AccountingError(f"unknown privacy event {type(event).__name__}")
    _check_number("noise_multiplier", event.noise_multiplier, sys.float_info.max)
    _check_number("sensitivity", event.sensitivity, sys.float_info.max)
    if isinstance(event, PoissonGaussianSum):
        _check_number("sampling_rate", event.sampling_rate, 1.0)
    if not (type(event.count) is int and 0 <= event.count < _MOST):
        raise AccountingError(f"expected a whole count >= 0, got {str(event.count)[:40]}")
    return event


def _check_number(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not 0 < value <= most:
        limit = "finite " if most > 1 else ""
        upper = "" if most > 1 else f" and <= {most:g}"
        raise AccountingError(f"expected a {limit}{name} > 0{upper}, got {str(value)[:40]}")


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of events that are alike; the order of events does not matter.

    The result is in one fixed order, and its numbers are floats whatever they were.

    >>> merged([GaussianSum(2.0, 1.0), GaussianSum(2, 1, 3)])
    (GaussianSum(noise_multiplier=2.0, sensitivity=1.0, count=4),)
    """
    counts: dict[tuple[float, float, float], int] = {}
    for event in events:
        rate = event.sampling_rate if isinstance(event, PoissonGaussianSum) else _NO_SAMPLING
        key = (float(event.noise_multiplier), float(event.sensitivity), float(rate))
        counts[key] = counts.get(key, 0) + event.count
    return tuple(
        GaussianSum(sigma, sensitivity, count)
        if rate == _NO_SAMPLING
        else PoissonGaussianSum(sigma, sensitivity, rate, count)
        for (sigma, sensitivity, rate), count in sorted(counts.items())
        if count
    )
