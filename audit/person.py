"""Composition in closed form: what one person is promised who is a customer of several merchants.

Gaussian mechanisms compose exactly: with mu^2 the sum of count / sigma^2 their privacy curve is
delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang 2018, Theorem 8; Dong,
Roth and Su 2022, Corollary 3.3). Written anew here: an audit shares no accounting with a run.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from audit.plain import UNBOUNDED, Measure, number, whole

MERCHANTS = (1, 2, 3, 5, 12)  # of one person
_MOST = 200.0  # mu above which there is no protection worth a figure


def composed(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Return mu of all events together; nothing where one of them is no plain Gaussian sum.

    >>> composed([{"kind": "gaussian-sum", "noise_multiplier": 4.0, "count": 4}])
    0.5
    """
    total = 0.0
    for event in events:
        sigma, count = number(event.get("noise_multiplier")), whole(event.get("count"))
        if event.get("kind") != "gaussian-sum" or sigma is None or count is None:
            return None
        if count < 0 or not 1e-100 < sigma < 1e100:
            return None
        total += count / sigma**2
    return math.sqrt(total)


def epsilon_of(mu: float, delta: float | None) -> Measure:
    """Return the least epsilon at `delta` of a Gaussian mechanism, rounded up.

    >>> round(epsilon_of(0.5, 1e-5), 3)
    1.993
    """
    if delta is None or not 0 < delta < 1:
        return None
    if mu > _MOST:
        return UNBOUNDED
    if mu <= 0 or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * 40 + 1
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(epsilon: float, mu: float) -> float:
    from scipy.special import log_ndtr

    larger = float(log_ndtr(mu / 2 - epsilon / mu))
    smaller = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return -math.exp(larger) * math.expm1(min(smaller - larger, 0.0))


def several_merchants(mu: float, delta: float | None) -> list[dict[str, Any]]:
    """Return epsilon of a person at k merchants, each of which promises mu to a customer.

    In one shared sum the person moves the same sum k times over, so that mu grows k-fold; where
    every merchant has noise of its own it grows by the root of k.
    """
    return [
        {
            "merchants": k,
            "shared": epsilon_of(k * mu, delta),
            "independent": epsilon_of(math.sqrt(k) * mu, delta),
        }
        for k in MERCHANTS
    ]
