"""What a ledger's entries add up to, and the rules that they must keep.

Written against docs/evidence.md, not against the code that writes ledgers: nothing here shares
a line with it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from audit.codes import Notebook
from audit.fields import read_event
from common.events import Event, PoissonGaussianSum

Occasion = tuple[str, int, int]  # stage, round, attempt

_SLACK = 1e-9  # relative; what sums of floats may be off by


@dataclass(frozen=True)
class Charge:
    """What releases of one stage cost."""

    stage: str
    event: Event  # towards whoever sees sums
    towards_server: Event  # towards whoever sees the merchant's single message


@dataclass(frozen=True)
class Release:
    """One noisy sum that a merchant wrote down before it computed it."""

    seq: int  # of the entry
    charge: Charge
    contract: str
    parameters: str  # SHA-256 of the model that was shown
    step: str

    @property
    def roster(self) -> str:
        """Return the hash of the roster of the release's session; empty for a plain sum."""
        return self.step.rpartition("/")[0]


@dataclass
class Tally:
    """What events use up, whatever the accountant.

    Sums over all customers add up in mu^2 exactly; sampled sums are counted one kind by one.
    """

    mu_squared: float = 0.0
    sampled: Counter[tuple[float, float]] = field(default_factory=Counter)

    @classmethod
    def of(cls, found: Iterable[Event]) -> "Tally":
        """Return the tally of some events.

        >>> from common.events import GaussianSum
        >>> four, one = Tally.of([GaussianSum(2.0, 1.0, 4)]), Tally.of([GaussianSum(1.0, 1.0)])
        >>> four.covers(one), one.covers(Tally.of([GaussianSum(0.9, 1.0)]))
        (True, False)
        """
        tally = cls()
        for event in found:
            tally.add(event)
        return tally

    def add(self, event: Event) -> None:
        """Take one more event into account."""
        if isinstance(event, PoissonGaussianSum):
            self.sampled[event.noise_multiplier, event.sampling_rate] += event.count
        else:
            self.mu_squared += event.count / event.noise_multiplier / event.noise_multiplier

    def covers(self, taken: "Tally") -> bool:
        """Tell whether this pays for what was taken."""
        sampled = all(self.sampled[kind] >= count for kind, count in taken.sampled.items())
        return sampled and taken.mu_squared <= self.mu_squared * (1 + _SLACK)


@dataclass
class LedgerRun:
    """What a ledger says of one run."""

    run: str
    seq: int  # of the reservation
    reserve: Mapping[str, Any]  # its document
    reserved: tuple[Charge, ...]
    joined: dict[str, int] = field(default_factory=dict)  # roster's hash -> members
    releases: dict[Occasion, Release] = field(default_factory=dict)
    survivors: dict[Occasion, int] = field(default_factory=dict)
    settled: bool = False
    expired: bool = False
    latest: tuple[int, float] = (0, 0.0)  # the run's last entry and its time
    taken: tuple[Tally, Tally] = field(default_factory=lambda: (Tally(), Tally()))

    @property
    def contract(self) -> str:
        """Return SHA-256 of the contract."""
        return str(self.reserve["contract"])

    @cached_property
    def limits(self) -> tuple[Tally, Tally]:
        """Return what the reservation pays for, towards everybody and towards the server."""
        return Tally.of(events(self.reserved)), Tally.of(events_towards_server(self.reserved))

    @property
    def charged(self) -> tuple[Charge, ...]:
        """Return what counts as spent."""
        return self._released if self.settled else self.reserved

    def add(self, occasion: Occasion, release: Release) -> None:
        """Take a release into account; one after the run was settled counts too."""
        self.releases[occasion] = release
        self.__dict__.pop("_released", None)

    @cached_property
    def _released(self) -> tuple[Charge, ...]:
        return together(release.charge for release in self.releases.values())


@dataclass(frozen=True)
class Reading:
    """What a ledger told before one reservation: what counted at that moment."""

    seq: int  # of the reservation
    run: str
    at: float
    reserve: Mapping[str, Any]
    counted: tuple[Charge, ...]  # of earlier runs, within the refresh period
    ever: tuple[Charge, ...]  # of earlier runs, all of them
    reserved: tuple[Charge, ...]


@dataclass
class Book:
    """A ledger, read."""

    runs: dict[str, LedgerRun] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)  # one a reservation, in order
    refusals: list[tuple[float, str, str]] = field(default_factory=list)
    expiries: list[tuple[int, float, LedgerRun, tuple[int, float]]] = field(default_factory=list)
    opening: Mapping[str, Any] = field(default_factory=dict)
    _steps: set[str] = field(default_factory=set)


def read_book(documents: Sequence[Mapping[str, Any]], where: str, notes: Notebook) -> Book:
    """Fold a ledger's entries, whose schema was checked, and note each broken rule."""
    book = Book()
    for seq, document in enumerate(documents, start=1):
        place = f"{where}, entry {seq}"
        notes.check(
            (document["kind"] == "open") == (seq == 1),
            "open-rule",
            place,
            "a ledger begins with its only entry 'open'; this one is missing or there again",
        )
        _FOLDS[document["kind"]](_Fold(book, seq, document, place, notes))
    return book


@dataclass(frozen=True)
class _Fold:
    """One entry on its way into the book."""

    book: Book
    seq: int
    document: Mapping[str, Any]
    place: str
    notes: Notebook

    @property
    def at(self) -> float:
        return float(self.document["at"])

    @property
    def occasion(self) -> Occasion:
        document = self.document
        return document["stage"], document["round"], document["attempt"]

    def run(self, code: str = "entry-without-reserve") -> LedgerRun | None:
        """Return the entry's run and remember its latest entry; note where there is none."""
        name = self.document["run"]
        found = self.book.runs.get(name)
        kind = self.document["kind"]
        self.check(found is not None, code, f"'{kind}' for run {name}, which reserved nothing")
        if found is not None:
            found.latest = self.seq, max(found.latest[1], self.at)
        return found

    def check(self, holds: bool, code: str, message: str) -> bool:
        return self.notes.check(holds, code, self.place, message)


def _open(fold: _Fold) -> None:
    fold.book.opening = fold.book.opening or fold.document


def _reserve(fold: _Fold) -> None:
    book, document = fold.book, fold.document
    run = document["run"]
    if not fold.check(run not in book.runs, "reserve-twice", f"run {run} reserved before"):
        return
    reserved = tuple(_charge(item) for item in document["releases"])
    ever = [charge for known in book.runs.values() for charge in known.charged]
    counted = [c for known in book.runs.values() if not known.expired for c in known.charged]
    book.readings.append(
        Reading(fold.seq, run, fold.at, document, tuple(counted), tuple(ever), reserved)
    )
    book.runs[run] = LedgerRun(run, fold.seq, document, reserved, latest=(fold.seq, fold.at))


def _join(fold: _Fold) -> None:
    run, roster = fold.run(), fold.document["roster"]
    _take_step(fold, f"{roster}/0")
    if run is not None:
        run.joined[roster] = fold.document["members"]


def _release(fold: _Fold) -> None:
    document, run = fold.document, fold.run("release-without-reserve")
    if document["step"]:
        _take_step(fold, document["step"])
    if run is None:
        return
    fold.notes.count("releases")
    release = Release(
        fold.seq, _charge(document), document["contract"], document["parameters"], document["step"]
    )
    closed = run.settled or run.expired
    fold.check(not closed, "release-after-close", f"run {run.run} was settled or expired before")
    fold.check(
        release.contract == run.contract,
        "contract-switched",
        f"released under contract {release.contract[:16]}, reserved under {run.contract[:16]}",
    )
    fold.check(
        not release.step or release.roster in run.joined,
        "step-not-joined",
        "masked in a session of secure sums that the ledger did not join",
    )
    fresh = fold.occasion not in run.releases
    if fold.check(fresh, "release-twice", f"{_told(fold.occasion)} was released before"):
        run.add(fold.occasion, release)
        _check_covered(fold, run, release.charge)


def _check_covered(fold: _Fold, run: LedgerRun, charge: Charge) -> None:
    towards = ("towards everybody", "towards the coordinator")
    released = (charge.event, charge.towards_server)
    for limit, taken, event, whom in zip(run.limits, run.taken, released, towards, strict=True):
        taken.add(event)
        fold.check(
            limit.covers(taken),
            "release-not-covered",
            f"{_told(fold.occasion)} with it, more was released {whom} than reserved",
        )


def _take_step(fold: _Fold, step: str) -> None:
    taken = fold.book._steps
    fold.check(step not in taken, "step-twice", f"step {step[:24]}... was taken before")
    taken.add(step)


def _sum(fold: _Fold) -> None:
    run = fold.run()
    if run is None:
        return
    known = fold.occasion in run.releases
    told = f"helped to open {_told(fold.occasion)} without having released anything for it"
    fold.check(known, "sum-without-release", told)
    told = f"helped to open {_told(fold.occasion)} a second time"
    fold.check(fold.occasion not in run.survivors, "step-twice", told)
    run.survivors.setdefault(fold.occasion, fold.document["survivors"])


def _settle(fold: _Fold) -> None:
    run = fold.run()
    if run is not None:
        fold.check(not run.settled, "close-twice", f"run {run.run} was settled before")
        run.settled = True


def _expire(fold: _Fold) -> None:
    known = fold.book.runs.get(fold.document["run"])
    before = (0, 0.0) if known is None else known.latest
    run = fold.run()
    if run is not None:
        fold.check(not run.expired, "close-twice", f"run {run.run} expired before")
        run.expired = True
        fold.book.expiries.append((fold.seq, fold.at, run, before))


def _refuse(fold: _Fold) -> None:
    document = fold.document
    fold.book.refusals.append((fold.at, document["run"], document["reason"]))


def _rekey(fold: _Fold) -> None:
    told = f"the ledger goes on under the key {fold.document['key'][:16]}, signed by both keys"
    fold.notes.add("key-rotated", fold.place, told)


_FOLDS: dict[str, Callable[[_Fold], None]] = {
    "open": _open,
    "reserve": _reserve,
    "join": _join,
    "release": _release,
    "sum": _sum,
    "settle": _settle,
    "expire": _expire,
    "refuse": _refuse,
    "rekey": _rekey,
}


def _charge(document: Mapping[str, Any]) -> Charge:
    event, towards = map(read_event, (document["event"], document["towards_server"]))
    return Charge(document["stage"], event, towards)


def _told(occasion: Occasion) -> str:
    return f"{occasion[0]} of round {occasion[1]}, attempt {occasion[2]},"


def events(charges: Iterable[Charge]) -> list[Event]:
    """Return events towards whoever sees sums."""
    return [charge.event for charge in charges]


def events_towards_server(charges: Iterable[Charge]) -> list[Event]:
    """Return events towards whoever sees single messages."""
    return [charge.towards_server for charge in charges]


def together(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """Add up the counts of charges that are alike."""
    counts: dict[Charge, list[int]] = {}
    for charge in charges:
        one = replace(charge.event, count=1), replace(charge.towards_server, count=1)
        sums = counts.setdefault(Charge(charge.stage, *one), [0, 0])
        sums[0] += charge.event.count
        sums[1] += charge.towards_server.count
    return tuple(
        Charge(one.stage, *map(_times, (one.event, one.towards_server), sums))
        for one, sums in counts.items()
    )


def _times(event: Event, count: int) -> Event:
    return replace(event, count=count)
