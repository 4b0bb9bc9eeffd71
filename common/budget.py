"""What a merchant allows, and what its ledger's entries add up to. No input or output.

A run is charged what it reserved, whole, before anything of it leaves. When its last sum is
open the run is settled: from then on it counts as what was really released. Only releases that
the reservation covers are ever allowed, so that at every moment the charge is at least what
may have left. What was reserved and is not settled stays charged, whatever crashed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from common.accounting import Cover, covers, within
from common.errors import AccountingError
from common.events import Event, from_document, merged, to_document
from common.statements import epsilon_text

DAY_S = 86_400.0
WHOLE_RUN = "reserve"  # the stage of a refusal of a whole run
_MOST_REFUSALS = 1000  # entries a run: a coordinator cannot fill the disk with them
_UNKNOWN = ""  # all runs together for which nothing is reserved: their names are anybody's


@dataclass(frozen=True)
class Budget:
    """The caps in a merchant's own policy; nothing else can raise them.

    Attributes:
        epsilon: Towards whoever sees sums, for everything charged within `refresh_days`.
        delta: At which every epsilon of the budget is told.
        towards_server: Towards whoever sees this merchant's single messages; None: no cap.
        refresh_days: Days after which a run no longer counts; None: it counts for ever.
        purposes: (stage, epsilon): what one purpose may cost alone, beside the whole.
    """

    epsilon: float
    delta: float
    towards_server: float | None = None
    refresh_days: float | None = None
    purposes: tuple[tuple[str, float], ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """Return the caps as the ledger and evidence hold them."""
        found = asdict(self)
        found["epsilon_towards_server"] = found.pop("towards_server")
        return {**found, "purposes": dict(self.purposes)}


@dataclass(frozen=True)
class Occasion:
    """What a release is for; the same occasion is released once only."""

    run: str
    stage: str
    round: int
    attempt: int
    contract: str  # SHA-256 of the contract


@dataclass(frozen=True)
class Charge:
    """What one or several releases of a stage cost."""

    stage: str
    event: Event  # towards whoever sees sums
    towards_server: Event  # towards whoever sees this merchant's single message

    @property
    def document(self) -> dict[str, Any]:
        """Return the charge as a ledger's entry holds it."""
        events = {"event": self.event, "towards_server": self.towards_server}
        return {"stage": self.stage, **{name: to_document(e) for name, e in events.items()}}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Charge":
        """Read a charge back; raises `AccountingError` where it is none."""
        return cls(
            str(document.get("stage")),
            from_document(document.get("event", {})),
            from_document(document.get("towards_server", {})),
        )


@dataclass
class RunAccount:
    """What a ledger says of one run."""

    contract: str
    reserved: tuple[Charge, ...]
    last: tuple[str, int]  # stage and round of the run's last sum
    seq: int  # of the reservation
    at: float  # of the run's latest reservation or release, by the merchant's clock
    latest: int = 0  # number of that entry
    released: dict[tuple[str, int, int], Charge] = field(default_factory=dict)
    survivors: dict[tuple[str, int, int], int] = field(default_factory=dict)
    settled: bool = False
    expired: bool = False  # older than the refresh period: counts in the lifetime only
    # what `released` adds up to, alike events merged: towards who sees sums, towards the server
    total: tuple[tuple[Event, ...], tuple[Event, ...]] = ((), ())

    @cached_property
    def cover(self) -> tuple[Cover, Cover]:
        """What `reserved` pays for: towards who sees sums, towards the server."""
        return (
            Cover([charge.event for charge in self.reserved]),
            Cover([charge.towards_server for charge in self.reserved]),
        )

    def take(self, kind: str, entry: Mapping[str, Any]) -> set[str]:
        """Take an entry of the run into account; return the step that it took, if any."""
        if kind == "join":
            return {f"{entry['roster']}/0"}
        if kind == "release":
            self._take_release(_what(entry), Charge.from_document(entry))
            return {entry["step"]} - {""}
        if kind == "sum":
            self.survivors[_what(entry)] = int(entry["survivors"])
        self.settled |= kind == "settle"
        self.expired |= kind == "expire"
        return set()

    def _take_release(self, what: tuple[str, int, int], charge: Charge) -> None:
        again = what in self.released
        self.released[what] = charge
        new = self.released.values() if again else (charge,)
        sums, towards_server = ((), ()) if again else self.total
        self.total = (
            merged([*sums, *(one.event for one in new)]),
            merged([*towards_server, *(one.towards_server for one in new)]),
        )

    @property
    def finished(self) -> bool:
        """Tell whether the run's last sum was asked for."""
        return any((stage, number) == self.last for stage, number, _ in self.released)

    @property
    def charged(self) -> tuple[Charge, ...]:
        """Return what counts as spent."""
        return tuple(self.released.values()) if self.settled else self.reserved

    def charged_for(self, stage: str) -> tuple[Charge, ...]:
        """Return what counts as spent for one purpose.

        Where a failed sum of this stage was repeated with what another stage had left, that is
        more than was reserved for the stage.
        """
        released = [c for c in self.released.values() if c.stage == stage]
        planned = [c for c in self.reserved if c.stage == stage]
        if self.settled or not covers([c.event for c in planned], [c.event for c in released]):
            return tuple(released)
        return tuple(planned)


@dataclass
class Account:
    """The state that a ledger's entries add up to."""

    budget: Budget
    runs: dict[str, RunAccount] = field(default_factory=dict)
    steps: set[str] = field(default_factory=set)  # of secure sums, each taken once
    refused: set[tuple[str, str, int, int]] = field(default_factory=set)
    refusals: dict[str, int] = field(default_factory=dict)  # run -> entries

    def fold(self, seq: int, entry: Mapping[str, Any]) -> None:
        """Take an entry into account.

        Raises:
            AccountingError: It holds an event that cannot be read.
            KeyError, TypeError, ValueError: It is no entry of a ledger.
        """
        kind = entry["kind"]
        if kind == "refuse":
            self._fold_refusal(entry)
            return
        if kind == "reserve":
            self.runs[entry["run"]] = RunAccount(
                entry["contract"],
                tuple(Charge.from_document(item) for item in entry["releases"]),
                (str(entry["last"][0]), int(entry["last"][1])),
                seq,
                float(entry["at"]),
            )
        account = self.runs.get(entry.get("run", ""))
        if account is None:
            return  # of the ledger as a whole
        if kind in {"reserve", "release"}:  # what costs something; notes make no run younger
            account.at, account.latest = max(account.at, float(entry["at"])), seq
        self.steps |= account.take(kind, entry)

    def _fold_refusal(self, entry: Mapping[str, Any]) -> None:
        run = entry["run"]
        counted = run if run in self.runs else _UNKNOWN
        self.refused.add((run, *_what(entry)))
        self.refusals[counted] = self.refusals.get(counted, 0) + 1

    def worth_noting(self, occasion: Occasion) -> bool:
        """Tell whether a refusal is to be written down: once an occasion, not without end."""
        key = (occasion.run, occasion.stage, occasion.round, occasion.attempt)
        counted = occasion.run if occasion.run in self.runs else _UNKNOWN
        return key not in self.refused and self.refusals.get(counted, 0) < _MOST_REFUSALS

    def counted(self, old: Collection[str] = ()) -> list[RunAccount]:
        """Return the runs that count within the refresh period; `old` ones do not either."""
        return [
            account for run, account in self.runs.items() if not account.expired and run not in old
        ]

    def refusal_of(self, charges: Iterable[Charge], old: Collection[str] = ()) -> str:
        """Return why the caps do not allow these further charges, or nothing."""
        new, runs = list(charges), self.counted(old)
        spent = [*(charge for run in runs for charge in run.charged), *new]
        towards_server = self.budget.towards_server
        for whom, cap, events in (
            ("", self.budget.epsilon, [c.event for c in spent]),
            (" towards the server", towards_server, [c.towards_server for c in spent]),
        ):
            reason = "" if cap is None else self._over(events, cap, f"this merchant{whom}")
            if reason:
                return reason
        for stage, cap in self.budget.purposes:
            if any(charge.stage == stage for charge in new):
                spent = [*(c for run in runs for c in run.charged_for(stage)), *new]
                events = [charge.event for charge in spent if charge.stage == stage]
                reason = self._over(events, cap, f"this merchant, for '{stage}' alone,")
                if reason:
                    return reason
        return ""

    def _over(self, events: Iterable[Event], cap: float, whom: str) -> str:
        try:
            fits, after = within(merged(events), self.budget.delta, cap)
        except AccountingError as error:
            return f"cannot be accounted for ({error})"
        if fits:
            return ""
        return (
            f"would bring {whom} to epsilon {epsilon_text(after)}, its cap is {cap:.4g} at delta "
            f"{self.budget.delta:.3g}"
        )

    def spent(self, further: Iterable[Charge] = (), *, lifetime: bool = False) -> float:
        """Return an upper bound on epsilon, quick to find, of what was charged and `further`."""
        runs = list(self.runs.values()) if lifetime else self.counted()
        charges = [*(charge for run in runs for charge in run.charged), *further]
        events = [charge.event for charge in charges]
        return within(merged(events), self.budget.delta, float("inf"))[1] if events else 0.0

    def refusal_of_release(self, occasion: Occasion, charge: Charge) -> str:
        """Return why a release is not covered by what its run reserved, or nothing."""
        account = self.runs.get(occasion.run)
        if account is None or account.contract != occasion.contract:
            return "needs a reservation, and this merchant made none for this run"
        if account.settled or account.expired:
            return "comes too late: this run is closed in the merchant's ledger"
        sums, towards_server = account.total
        towards_all, towards_it = account.cover
        if not (
            towards_all.pays([*sums, charge.event])
            and towards_it.pays([*towards_server, charge.towards_server])
        ):
            return "would pass what this run reserved"
        if occasion.stage in dict(self.budget.purposes):
            taken = [*account.released.values(), charge]
            planned, wanted = (
                [c.event for c in charges if c.stage == occasion.stage]
                for charges in (account.reserved, taken)
            )
            if not covers(planned, wanted):
                return "would pass what this run reserved for this purpose"
        return ""


def _what(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    return str(entry["stage"]), int(entry["round"]), int(entry["attempt"])
