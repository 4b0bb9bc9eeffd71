"""Time the accountants: `python -m benchmarks.accounting` prints JSON, in seconds.

"cold" is a first call in a fresh process with the libraries imported; "warm" the same year
with one more week, which finds its parts in the caches.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from audit.epsilon import opinions, recompute
from common.accountants import _step, _step_curve, _steps, pld_epsilon, renyi_epsilon
from common.accounting import _assess_sampled, _parts, assess, covers, rdp_upper_bound, within
from common.contract import parse_contract
from common.events import Event, GaussianSum, PoissonGaussianSum, to_document
from common.plan import plan_of

DELTA = 1e-6
CONTRACT = {
    "federation": {"name": "accounting", "min_merchants": 10},
    "features": [{"name": "a"}, {"name": "b"}],
    "segments": {"names": ["x", "y", "z"]},
    "privacy": {"epsilon": 1.0, "delta": DELTA},
}
OTHERS = [GaussianSum(40.0, 1.0, 12), GaussianSum(45.0, 1.0), GaussianSum(50.0, 1.0)]
SAMPLED = [PoissonGaussianSum(6.0, 1.0, 0.2, 60), *OTHERS]


def timed(function: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return round((time.perf_counter() - start) / times, 7)


def distributions(events: list[Event]) -> float:
    """Return epsilon by privacy-loss distributions alone."""
    mu_squared, sampled = _parts(events)
    return pld_epsilon(mu_squared**0.5, sampled, DELTA)


def forget() -> None:
    """Empty every cache of the accountants."""
    for cached in (_step, _steps, _step_curve, _assess_sampled):
        cached.cache_clear()


def year_of(weeks: list[list[Event]]) -> dict[str, float]:
    """Return the times for a year, and for the year and a week more."""
    year = [event for week in weeks for event in week]
    longer = [*year, *weeks[0]]
    figures: dict[str, float] = {}
    functions: dict[str, Callable[[list[Event]], Any]] = {
        "renyi": lambda events: rdp_upper_bound(events, DELTA),
        "distributions": distributions,
        "assess": lambda events: assess(events, DELTA),
    }
    for name, function in functions.items():
        forget()
        figures[f"{name}_cold"] = timed(lambda f=function: f(year))  # type: ignore[misc]
        figures[f"{name}_warm"] = timed(lambda f=function: f(longer))  # type: ignore[misc]
    cap = 2 * rdp_upper_bound(longer, DELTA)
    figures["within_yes"] = timed(lambda: within(longer, DELTA, cap), 5)
    documents = [to_document(event) for event in year]
    figures["audit_recompute"] = timed(lambda: recompute(documents, DELTA))
    figures["audit_opinions"] = timed(lambda: opinions(documents, DELTA))
    return figures


def main() -> None:
    """Measure and print."""
    renyi_epsilon(1.0, ((2.0, 0.1, 2),), DELTA)
    assess(SAMPLED[:1], 1e-5)  # import the libraries
    default = list(plan_of(parse_contract(CONTRACT, source="benchmark")).events())
    report = {
        "default_week": year_of([default] * 52),
        "sampled_week": year_of([SAMPLED] * 52),
        "sampled_weeks_that_differ": year_of(
            [[PoissonGaussianSum(6.0 + w / 20, 1.0, 0.2, 60), *OTHERS] for w in range(52)]
        ),
        "covers_4_events": timed(lambda: covers(SAMPLED, SAMPLED), 2_000),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
