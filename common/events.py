"""What a merchant released, as frozen values.

Compatibility promise: an event is never removed and its meaning never changes; a new
mechanism gets a new event. Events do not interpret themselves: accountants do
(`common.accounting`, and independently `audit.epsilon`).

Neighbouring relation of every event: add or remove one customer's row.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import AccountingError


@dataclass(frozen=True)
class GaussianSum:
    """`count` sums over all customers, each with Gaussian noise of its own.

    The noise in each coordinate of each sum has a standard deviation of at least
    `noise_multiplier * sensitivity`.
    """

    noise_multiplier: float
    sensitivity: float  # L2 norm that one customer adds at most, in the unit of the sum
    count: int = 1


@dataclass(frozen=True)
class PoissonGaussianSum:
    """Like `GaussianSum`, but every customer enters each sum with chance `sampling_rate`.

    The draws are independent between customers and sums, and secret.
    """

    noise_multiplier: float
    sensitivity: float
    sampling_rate: float
    count: int = 1


Event = GaussianSum | PoissonGaussianSum

_MOST = 2**53  # every whole number below it is a float

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
    return {"kind": kind, **asdict(event)}


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
    """Return the event if its numbers make sense.

    Raises:
        AccountingError: A number is not finite or out of range; the message names it.
    """
    for name, value in (
        ("noise_multiplier", event.noise_multiplier),
        ("sensitivity", event.sensitivity),
    ):
        if not 0 < value < float("inf"):
            raise AccountingError(f"expected a finite {name} > 0, got {value}")
    if not (isinstance(event.count, int) and 0 <= event.count < _MOST):
        raise AccountingError(f"expected a whole count >= 0, got {str(event.count)[:40]}")
    if isinstance(event, PoissonGaussianSum) and not 0 < event.sampling_rate <= 1:
        raise AccountingError(f"expected 0 < sampling_rate <= 1, got {event.sampling_rate}")
    return event


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of events that are alike; the order of events does not matter.

    >>> merged([GaussianSum(2.0, 1.0), GaussianSum(2.0, 1.0, 3)])
    (GaussianSum(noise_multiplier=2.0, sensitivity=1.0, count=4),)
    """
    counts: dict[tuple[Any, ...], int] = {}
    for event in events:
        rate = event.sampling_rate if isinstance(event, PoissonGaussianSum) else None
        key = (event.noise_multiplier, event.sensitivity, rate)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(
        GaussianSum(sigma, sensitivity, count)
        if rate is None
        else PoissonGaussianSum(sigma, sensitivity, rate, count)
        for (sigma, sensitivity, rate), count in sorted(counts.items(), key=_sortable)
        if count
    )


def _sortable(item: tuple[tuple[Any, ...], int]) -> tuple[float, float, float]:
    sigma, sensitivity, rate = item[0]
    return (sigma, sensitivity, -1.0 if rate is None else rate)
