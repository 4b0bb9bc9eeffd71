"""Recompute epsilon from raw events with another accountant than the one that printed it.

Uses dp-accounting's privacy-loss distributions (Koskela et al. 2020; Doroshenko et al. 2022),
both directions of the add-or-remove relation, and none of `common.accounting`.
"""

from collections.abc import Iterable
from typing import Any

from common.errors import AccountingError

INTERVAL = 1e-4  # discretisation of the privacy loss; rounds towards a larger epsilon


def recompute(events: Iterable[dict[str, Any]], delta: float) -> float:
    """Return epsilon at `delta` of events as `privacy.json` and the ledger hold them.

    Raises:
        AccountingError: An event's kind is not known to this auditor, or a field is missing
            or out of range.
    """
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=INTERVAL
    )
    for event in events:
        kind = event.get("kind")
        gaussian = dp_accounting.GaussianDpEvent(_number(event, "noise_multiplier"))
        count = _number(event, "count")
        if not count.is_integer():
            raise AccountingError("an event's field 'count' is not a whole number")
        if kind == "gaussian-sum":
            composed = gaussian
        elif kind == "poisson-gaussian-sum":
            rate = _number(event, "sampling_rate")
            if rate > 1.0:
                raise AccountingError("an event's field 'sampling_rate' is above 1")
            composed = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        else:
            raise AccountingError(f"the auditor does not know privacy event {kind!r}")
        if count:
            accountant.compose(composed, int(count))
    return float(accountant.get_epsilon(delta))


def _number(event: dict[str, Any], name: str) -> float:
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AccountingError(f"an event's field '{name}' is missing or no number")
    lowest = 0.0 if name == "count" else 5e-324
    if not lowest <= value < float("inf"):
        raise AccountingError(f"an event's field '{name}' is out of range")
    return float(value)
