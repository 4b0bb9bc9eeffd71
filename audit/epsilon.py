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
        AccountingError: An event's kind is not known to this auditor.
    """
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=INTERVAL
    )
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(float(event["noise_multiplier"]))
        if event["kind"] == "gaussian-sum":
            accountant.compose(gaussian, int(event["count"]))
        elif event["kind"] == "poisson-gaussian-sum":
            sampled = dp_accounting.PoissonSampledDpEvent(float(event["sampling_rate"]), gaussian)
            accountant.compose(sampled, int(event["count"]))
        else:
            raise AccountingError(f"the auditor does not know privacy event '{event['kind']}'")
    return float(accountant.get_epsilon(delta))
