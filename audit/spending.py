"""What a merchant spent, recomputed from the raw events of its ledger."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from audit.codes import Notebook
from audit.epsilon import opinions, recompute
from audit.findings import Spending
from audit.rules import Book, Charge, Reading, Tally, events, events_towards_server, together
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, merged, to_document

UNBOUNDED = float("inf")
MOST_KINDS = 100  # of sampled sums in one ledger: each takes time to compose
_ABOVE = 1 + 1e-6  # a cap may be filled to the last bit of a float
TOLERANCE, SLACK = 0.02, 0.01  # relative and absolute: what accountants may differ by


def epsilon_of(found: Iterable[Event], delta: float) -> float:
    """Return the auditor's epsilon of raw events; infinite where no library gives one."""
    return _epsilon(merged(found), delta)


def quick_epsilon(found: Iterable[Event], delta: float) -> float:
    """Return the same after adding up sums over all customers, in mu^2, where they are exact.

    A ledger of many runs under many contracts holds thousands of different sums; this composes
    them in milliseconds. What an audit reports at the end is composed one by one.
    """
    found = list(found)
    mu_squared = Tally.of(e for e in found if isinstance(e, GaussianSum)).mu_squared
    rest = [event for event in found if not isinstance(event, GaussianSum)]
    if mu_squared == UNBOUNDED:
        return UNBOUNDED
    whole = [GaussianSum(mu_squared**-0.5, 1.0)] if mu_squared else []
    return _epsilon(merged([*whole, *rest]), delta)


@lru_cache(maxsize=4096)
def _epsilon(found: tuple[Event, ...], delta: float) -> float:
    if sum(isinstance(event, PoissonGaussianSum) for event in found) > MOST_KINDS:
        return UNBOUNDED
    try:
        return recompute([to_document(event) for event in found], delta)
    except AccountingError:
        return UNBOUNDED


@lru_cache(maxsize=256)
def _opinions(found: tuple[Event, ...], delta: float) -> dict[str, float | str]:
    if sum(isinstance(event, PoissonGaussianSum) for event in found) > MOST_KINDS:
        return {"auditor": f"more than {MOST_KINDS} kinds of sampled sums are not composed"}
    try:
        return opinions([to_document(event) for event in found], delta)
    except AccountingError as error:
        return {"auditor": str(error)}


def opinions_of(found: Iterable[Event], delta: float) -> dict[str, float | str]:
    """Return each library's epsilon of raw events, or why it gave none."""
    return dict(_opinions(merged(found), delta))


def understated(claimed: float, recomputed: float) -> bool:
    """Tell whether less is claimed than an auditor finds, beyond what accountants differ by."""
    return not recomputed <= claimed * (1 + TOLERANCE) + SLACK


@dataclass(frozen=True)
class Policy:
    """A merchant's own caps, as its evidence tells them."""

    epsilon: float
    delta: float
    epsilon_towards_server: float | None
    refresh_days: float | None
    purposes: Mapping[str, float]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Policy":
        """Read the caps of a document whose fields were checked."""
        return cls(**{name: document[name] for name in cls.__dataclass_fields__})

    @property
    def caps(self) -> dict[str, float]:
        """Return every cap by name; what is not capped is not there."""
        named = {"epsilon": self.epsilon, "epsilon_towards_server": self.epsilon_towards_server}
        named |= {f"purposes.{stage}": cap for stage, cap in self.purposes.items()}
        return {name: cap for name, cap in named.items() if cap is not None}


def check_reservations(book: Book, policy: Policy, where: str, notes: Notebook) -> None:
    """Recompute what every reservation says of itself, and hold it against its caps."""
    for reading in book.readings:
        notes.count("reservations recomputed")
        place = f"{where}, reservation of run {reading.run}"
        _check_claims(reading, place, notes)
        _check_caps(reading, place, notes)
    told = [Policy.of(reading.reserve["policy"]) for reading in book.readings] + [policy]
    for before, after in pairwise(told):
        _check_raised(before, after, where, notes)
    if any(one.refresh_days is not None for one in told):
        notes.add(
            "refresh-period",
            where,
            "the cap starts afresh after some days; for a customer who stays, what counts is the "
            "lifetime epsilon",
        )


def _check_claims(reading: Reading, place: str, notes: Notebook) -> None:
    reserve = reading.reserve
    delta = reserve["policy"]["delta"]
    for name, charges in (
        ("before", reading.counted),
        ("after", (*reading.counted, *reading.reserved)),
        ("lifetime", (*reading.ever, *reading.reserved)),
    ):
        found = quick_epsilon(events(charges), delta)
        notes.check(
            not understated(reserve[name], found),
            "epsilon-differs",
            place,
            f"'{name}' says epsilon {reserve[name]:.4g}, the events give {found:.4g}",
        )


def _check_caps(reading: Reading, place: str, notes: Notebook) -> None:
    """Hold the events themselves against the caps.

    What the entry says of them may be above the cap where a sum is sampled: it is an upper
    bound, found quickly, and the merchant decided by a closer one.
    """
    policy = Policy.of(reading.reserve["policy"])
    charges = (*reading.counted, *reading.reserved)
    found = {
        "epsilon": events(charges),
        "epsilon_towards_server": events_towards_server(charges),
        **{f"purposes.{s}": events(c for c in charges if c.stage == s) for s in policy.purposes},
    }
    values = {name: quick_epsilon(found[name], policy.delta) for name in policy.caps}
    passed = [name for name, cap in policy.caps.items() if understated(cap, values[name])]
    if not Tally.of(events(charges)).sampled and reading.reserve["after"] > policy.epsilon * _ABOVE:
        passed, values["epsilon"] = ["epsilon"], reading.reserve["after"]
    for name in passed:
        told = f"cap {name} = {policy.caps[name]:.4g} is passed: epsilon {values[name]:.4g}"
        notes.add("cap-exceeded", place, f"the policy's {told}")


def _check_raised(before: Policy, after: Policy, where: str, notes: Notebook) -> None:
    """Note caps that were raised or dropped, and a period that was shortened."""
    old, new = before.caps, after.caps
    raised = [name for name, cap in old.items() if not new.get(name, UNBOUNDED) <= cap]
    raised += ["delta"] if after.delta > before.delta else []
    periods = [UNBOUNDED if p.refresh_days is None else p.refresh_days for p in (before, after)]
    raised += ["refresh_days"] if periods[1] < periods[0] else []
    if raised:
        told = ", ".join(raised)
        notes.add("policy-raised", where, f"the merchant loosened its own policy: {told}")


def spending_of(merchant: str, book: Book, policy: Policy) -> Spending:
    """Return what a ledger says was spent, composed from raw events."""
    charged = together(c for run in book.runs.values() for c in run.charged)
    everything, delta = events(charged), policy.delta
    return Spending(
        merchant=merchant,
        delta=delta,
        cap=policy.epsilon,
        refresh_days=policy.refresh_days,
        lifetime=epsilon_of(everything, delta),
        by_run={name: epsilon_of(events(r.charged), delta) for name, r in book.runs.items()},
        by_purpose=_by_purpose(charged, delta),
        timeline=_timeline(book, delta),
        opinions=opinions_of(everything, delta),
        events=tuple(to_document(event) for event in merged(everything)),
        refusals=tuple(book.refusals),
    )


def _by_purpose(charged: Sequence[Charge], delta: float) -> dict[str, float]:
    stages = dict.fromkeys(charge.stage for charge in charged)
    return {s: epsilon_of(events(c for c in charged if c.stage == s), delta) for s in stages}


def _timeline(book: Book, delta: float) -> tuple[tuple[float, str, float], ...]:
    return tuple(
        (r.at, r.run, quick_epsilon(events((*r.ever, *r.reserved)), delta)) for r in book.readings
    )
