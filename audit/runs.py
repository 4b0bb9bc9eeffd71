"""A coordinator's record of one run: what it must look like, and what must agree in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit import fields
from audit.codes import Flaw, Notebook
from audit.reading import contract_of
from common.chain import is_signed
from common.contract import Contract
from common.errors import AccountingError, ContractError, SecureSumError
from common.events import Event, from_document
from common.fixed_point import from_lattice
from common.identity import Members
from common.plan import Plan, Release, lattice_of, plan_of
from common.session import Advert, Roster, session_context
from common.start import START, starting_parameters

RECORD = "run.jsonl"
_SCHEMA = "record-schema"
_NAMES = fields.several(fields.text)
_KINDS: dict[str, fields.Fields] = {
    "start": {
        "run": fields.text,
        "contract": fields.digest,
        "at": fields.number,
        "merchants": _NAMES,
        "parameters": fields.digest,
        "hansa": fields.text,
        "code": fields.text,
    },
    "late": {"at": fields.number, "merchants": _NAMES},
    "session": {"session": fields.whole, "context": fields.digest, "adverts": _NAMES},
    "sum": {
        "stage": fields.text,
        "round": fields.whole,
        "attempt": fields.whole,
        "event": fields.event,
        "customers_per_merchant": fields.number,
        "parameters": fields.digest,
        "asked": _NAMES,
        "merchants": fields.maybe(_NAMES),
        "fewest": fields.maybe(fields.whole),
        "lattice_step": fields.number,
        "total": fields.maybe(fields.vector),
    },
    "end": {"parameters": fields.digest},
}


@dataclass(frozen=True)
class RecordedSum:
    """One sum that the coordinator asked for."""

    line: int
    stage: str
    round: int
    attempt: int
    event: Event
    customers_per_merchant: float
    parameters: str  # SHA-256 of the model that was shown
    asked: tuple[str, ...]
    merchants: tuple[str, ...] | None  # whose parts are in the sum; None: none came of it
    fewest: int | None
    lattice_step: float
    total: np.ndarray | None  # int64 multiples of the step

    @property
    def occasion(self) -> tuple[str, int, int]:
        """Return stage, round and attempt."""
        return self.stage, self.round, self.attempt

    @property
    def values(self) -> np.ndarray:
        """Return the sum in its own unit."""
        multiples = np.zeros(0, np.int64) if self.total is None else self.total
        return from_lattice(multiples, self.lattice_step)


@dataclass(frozen=True)
class Session:
    """A session of secure sums, with the roster that its members agreed on."""

    line: int
    number: int
    roster: Roster

    @property
    def names(self) -> frozenset[str]:
        """Return the ids of its members."""
        return frozenset(advert.merchant for advert in self.roster.adverts)


@dataclass(frozen=True)
class RunRecord:
    """The record of one run, read."""

    run: str
    contract: Contract
    start: Mapping[str, Any]
    sessions: tuple[Session, ...]
    sums: tuple[RecordedSum, ...]
    end: str | None  # SHA-256 of the final model
    first: np.ndarray  # parameters that the contract says to start from
    late: tuple[str, ...] = ()  # who came when the run was under way

    @property
    def merchants(self) -> tuple[str, ...]:
        """Return who took part."""
        return (*self.start["merchants"], *self.late)

    @property
    def fewest(self) -> int | None:
        """Return the merchants in the smallest part that was summed apart."""
        return min((one.fewest for one in self.sums if one.fewest is not None), default=None)


def read_record(run: str, files: Mapping[str, bytes]) -> RunRecord:
    """Read a run's record.

    Raises:
        Flaw: A file is missing, or a line is not what the format says.
    """
    if RECORD not in files or "contract.toml" not in files:
        raise Flaw("evidence-incomplete", f"{RECORD} or contract.toml is missing")
    lines = [(n, _line(n, one)) for n, one in fields.objects(files[RECORD], _SCHEMA, RECORD)]
    start = lines[0][1] if lines else {}
    ends = [one["parameters"] for _, one in lines if one["kind"] == "end"]
    starts = sum(one["kind"] == "start" for _, one in lines)
    if start.get("kind") != "start" or starts != 1 or start["run"] != run or len(ends) > 1:
        raise Flaw(_SCHEMA, f"{RECORD}: expected one 'start' of run {run}, first, and one 'end'")
    contract = contract_of(files["contract.toml"], "contract.toml")
    if contract.sha256 != start["contract"]:
        raise Flaw("contract-differs", f"contract.toml is not the contract {start['contract']}")
    return RunRecord(
        run=run,
        contract=contract,
        start=start,
        sessions=tuple(_session(n, one) for n, one in lines if one["kind"] == "session"),
        sums=tuple(_sum(n, one) for n, one in lines if one["kind"] == "sum"),
        end=ends[0] if ends else None,
        first=_first(contract, files),
        late=tuple(name for _, one in lines if one["kind"] == "late" for name in one["merchants"]),
    )


def _first(contract: Contract, files: Mapping[str, bytes]) -> np.ndarray:
    """Return where the run must have started; the contract's hash says so, not who gives a file."""
    try:
        return starting_parameters(contract, files.get(START))
    except ContractError as error:
        raise Flaw("start-differs", str(error)) from None


def _line(number: int, document: dict[str, Any]) -> dict[str, Any]:
    kind = document.get("kind")
    known = _KINDS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise Flaw(_SCHEMA, f"{RECORD}, line {number}: kind {str(kind)[:40]!r} is not known")
    wrong = fields.wrong_fields(document, {**known, "kind": fields.text})
    if wrong:
        told = f"field '{wrong[0][:40]}' is missing, wrong or not known"
        raise Flaw(_SCHEMA, f"{RECORD}, line {number} ({kind}): {told}")
    return document


def _session(line: int, document: Mapping[str, Any]) -> Session:
    try:
        adverts = tuple(Advert.from_bytes(bytes.fromhex(text)) for text in document["adverts"])
        roster = Roster(bytes.fromhex(document["context"]), adverts)
    except (SecureSumError, ValueError) as error:
        raise Flaw("advert-invalid", f"{RECORD}, line {line}: {error}") from None
    return Session(line, document["session"], roster)


def _sum(line: int, document: Mapping[str, Any]) -> RecordedSum:
    merchants, total = document["merchants"], document["total"]
    if len({value is None for value in (merchants, document["fewest"], total)}) != 1:
        raise Flaw(_SCHEMA, f"{RECORD}, line {line}: merchants, fewest and total belong together")
    values = {name: document[name] for name in ("stage", "round", "attempt", "parameters")}
    return RecordedSum(
        line=line,
        event=from_document(document["event"]),
        customers_per_merchant=float(document["customers_per_merchant"]),
        asked=tuple(document["asked"]),
        merchants=None if merchants is None else tuple(merchants),
        fewest=document["fewest"],
        lattice_step=float(document["lattice_step"]),
        total=None if total is None else fields.integers(total),
        **values,
    )


def planned(contract: Contract) -> Plan | None:
    """Return a contract's plan; None where it has none, so that nothing is planned."""
    try:
        return plan_of(contract)
    except AccountingError:
        return None


def release_of(contract: Contract, stage: str, number: int) -> Release | None:
    """Return the release that a contract plans for a stage and round, if any."""
    plan, rounds = planned(contract), contract.training.rounds
    if plan is None or number > rounds:
        return None
    return plan.release_of(stage, number, rounds)


def check_sessions(record: RunRecord, members: Members, where: str, notes: Notebook) -> None:
    """Check what makes a roster: the session's name, and every advert's signature."""
    for session in record.sessions:
        place = f"{where}, session {session.number}"
        expected = session_context(record.run, session.number, record.contract.sha256)
        notes.check(
            session.roster.context == expected,
            "session-differs",
            place,
            "the session is of another run, number or contract",
        )
        for advert in session.roster.adverts:
            notes.count("adverts")
            signed = advert.signed(session.roster.context)
            keys = members.keys_of(advert.merchant)  # one of earlier, for a run of that time
            notes.check(
                any(is_signed(key, signed, advert.signature) for key in keys),
                "advert-invalid",
                place,
                f"the advert of '{advert.merchant}' is not signed with its enrolled key",
            )


def check_sums(record: RunRecord, where: str, notes: Notebook) -> None:
    """Check every sum by itself, against the contract's plan and against the rosters."""
    done: set[tuple[str, int]] = set()
    seen: set[tuple[str, int, int]] = set()
    for one in record.sums:
        notes.count("sums")
        place = f"{where}, {one.stage} of round {one.round}, attempt {one.attempt}"
        again = one.occasion in seen or (one.stage, one.round) in done
        notes.check(not again, "sum-repeated", place, "was asked for again after it came about")
        seen.add(one.occasion)
        for problem in _differences(record, one):
            notes.add("sum-differs", place, problem)
        if one.merchants is not None:
            done.add((one.stage, one.round))
            _check_survivors(record, one, place, notes)


def _differences(record: RunRecord, one: RecordedSum) -> list[str]:
    """Return what of a sum is not as the contract plans it, or contradicts itself."""
    contract = record.contract
    release = release_of(contract, one.stage, one.round)
    if release is None or one.attempt > contract.training.spare_rounds:
        return ["the contract plans no such sum"]
    merchants = one.merchants or ()
    length = release.length if one.total is None else len(one.total)
    tests: dict[str, bool] = {
        "the event is not the one that the contract plans": one.event == release.event,
        "the lattice is not the contract's": one.lattice_step == lattice_of(release, contract).step,
        f"expected {release.length} numbers, found {length}": length == release.length,
        "counts merchants that were not asked": {*merchants} <= {*one.asked},
        "counts a merchant twice": len({*merchants}) == len(merchants),
        "asks merchants that did not start": {*one.asked} <= {*record.merchants},
        "its smallest part is larger than all of it": (one.fewest or 0) <= len(merchants),
    }
    return [problem for problem, holds in tests.items() if not holds]


def _check_survivors(record: RunRecord, one: RecordedSum, place: str, notes: Notebook) -> None:
    """Check that a sum holds enough merchants, in every part that was summed apart."""
    contract = record.contract
    fewest = one.fewest or 0
    notes.check(
        fewest >= contract.min_survivors,
        "below-threshold",
        place,
        f"its smallest part has {fewest} merchants, the contract asks for {contract.min_survivors}",
    )
    if not contract.aggregation.secure:
        return
    left = set(one.merchants or ())
    for session in _latest(record, one):
        part = left & session.names
        left -= session.names
        if part:
            notes.check(
                len(part) >= max(session.roster.threshold, fewest),
                "below-threshold",
                place,
                f"{len(part)} of {session.roster.size} merchants of session {session.number}: "
                f"fewer than the threshold of {session.roster.threshold}, or than recorded",
            )
    notes.check(not left, "sum-differs", place, f"{_some(left)} were in no session before this sum")


def _latest(record: RunRecord, one: RecordedSum) -> list[Session]:
    """Return the sessions that were set up before a sum, the newest first."""
    return [session for session in reversed(record.sessions) if session.line < one.line]


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_prefix(older: bytes, newer: bytes, where: str, notes: Notebook) -> None:
    """Check that an older record of a run is how the newer one begins."""
    notes.check(
        newer.startswith(older),
        "record-rewritten",
        where,
        "an older evidence tells the run differently: the record was written anew",
    )
