"""Countersignatures, witness logs and anchors against the chain of a merchant's ledger.

A merchant signs its own entries, so it could write its ledger anew. What it cannot do is make
the witness forget a head that it countersigned.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from audit import fields
from audit.codes import Flaw, Notebook
from audit.rules import Book
from common.chain import Countersignature, Entry, Head, Seen
from common.errors import EvidenceError, LedgerError, WireError

DAY_S = 86_400.0

_OWN: fields.Fields = {"body": fields.text, "signature": fields.text}
_LOGGED: fields.Fields = {
    "merchant": fields.text,
    "seq": fields.whole,
    "link": fields.digest,
    "signature": fields.text,
    "body": fields.text,
    "countersignature": fields.text,
}
_INVALID = "countersignature-invalid"
_ANCHOR = re.compile(r"hansa head ([0-9a-f]{64}) ([1-9][0-9]{0,15}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class Anchor:
    """A head that the auditor knows from earlier: the ledger must still hold it."""

    key: bytes
    seq: int
    link: bytes

    def __str__(self) -> str:
        """Return the line that `read_anchors` reads."""
        return f"hansa head {self.key.hex()} {self.seq} {self.link.hex()}"


@dataclass(frozen=True)
class Logged:
    """A head that a witness says it countersigned."""

    merchant: str
    seen: Seen


def read_anchors(path: Path) -> tuple[Anchor, ...]:
    """Read heads, one a line: `hansa head <key> <seq> <link>`; empty lines and # are passed over.

    Raises:
        EvidenceError: The file cannot be read, or a line is no head; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        match = _ANCHOR.fullmatch(line)
        if match:
            found.append(Anchor(bytes.fromhex(match[1]), int(match[2]), bytes.fromhex(match[3])))
        elif line and not line.startswith("#"):
            raise EvidenceError(
                f"{path}, line {number}: expected 'hansa head <key> <number> <link>'"
            )
    return tuple(found)


def read_countersignatures(raw: bytes, witness: bytes, public: bytes) -> list[Seen]:
    """Read a merchant's `witness.jsonl` and check every signature.

    Raises:
        Flaw: A line is no countersignature of this ledger by the pinned witness.
    """
    found = []
    for line, document in fields.objects(raw, _INVALID, "witness.jsonl"):
        if fields.wrong_fields(document, _OWN):
            raise Flaw(_INVALID, f"witness.jsonl, line {line}: is no countersignature")
        found.append(_opened(document["body"], document["signature"], witness, public, line))
    return found


def _opened(body: str, signature: str, witness: bytes, public: bytes, line: int) -> Seen:
    try:
        countersignature = Countersignature(body.encode(), bytes.fromhex(signature))
        return countersignature.opened(witness, public)
    except (WireError, LedgerError, ValueError, OverflowError):
        raise Flaw(
            _INVALID,
            f"witness.jsonl, line {line}: is not signed by the pinned witness, or is of another "
            "ledger",
        ) from None


def read_witness_log(raw: bytes, witness: bytes, members: dict[str, bytes]) -> list[Logged]:
    """Read a coordinator's `witness.jsonl` and check both signatures of every head.

    Raises:
        Flaw: A line is not what the format says, or a signature does not fit.
    """
    found = []
    for line, document in fields.objects(raw, _INVALID, "witness.jsonl"):
        place = f"witness.jsonl, line {line}"
        if fields.wrong_fields(document, _LOGGED):
            raise Flaw(_INVALID, f"{place}: is no head that was countersigned")
        key = members.get(document["merchant"])
        if key is None:
            raise Flaw(_INVALID, f"{place}: '{document['merchant'][:64]}' is not enrolled")
        seen = _opened(document["body"], document["countersignature"], witness, key, line)
        if not _is_head(document, key, seen):
            raise Flaw(_INVALID, f"{place}: the merchant did not sign the head that it speaks of")
        found.append(Logged(document["merchant"], seen))
    return found


def _is_head(document: dict[str, Any], key: bytes, seen: Seen) -> bool:
    try:
        signature = bytes.fromhex(document["signature"])
    except ValueError:
        return False
    same = (document["seq"], document["link"]) == (seen.seq, seen.link.hex())
    return same and Head(seen.seq, seen.link, signature, seen.seq, ()).is_of(key)


def check_clock(seen: Sequence[Seen], where: str, notes: Notebook) -> None:
    """Warn where the witness's clock, or what it saw, went backwards."""
    backwards = any(b.at < a.at or b.seq < a.seq for a, b in pairwise(seen))
    notes.check(not backwards, "witness-clock", where, "the witness's times or heads go backwards")


def check_own(entries: Sequence[Entry], seen: Sequence[Seen], where: str, notes: Notebook) -> None:
    """Hold the countersignatures that a merchant got against its own ledger."""
    notes.count("heads countersigned", len(seen))
    check_clock(seen, where, notes)
    last = max((one.seq for one in seen), default=0)
    notes.check(
        last <= len(entries),
        "truncated",
        where,
        f"the ledger ends at entry {len(entries)}, the witness countersigned entry {last}: "
        "entries are missing at its end",
    )
    forked = [one for one in seen if one.seq <= len(entries) and not holds(entries, one)]
    if forked:
        notes.add(
            "forked",
            where,
            f"the witness countersigned another entry {forked[0].seq}: this is one of two ledgers",
        )


def holds(entries: Sequence[Entry], head: Seen | Anchor) -> bool:
    """Tell whether a chain has this head."""
    return 1 <= head.seq <= len(entries) and entries[head.seq - 1].link == head.link


def check_witnessed(book: Book, seen: Sequence[Seen], where: str, notes: Notebook) -> None:
    """Check that nothing was released for a reservation that no witness saw."""
    last = max((one.seq for one in seen), default=0)
    for run in book.runs.values():
        notes.check(
            not run.releases or run.seq <= last,
            "not-witnessed",
            f"{where}, reservation of run {run.run}",
            "sums were released, and no countersignature covers what was reserved for them",
        )


def check_expiries(
    book: Book, seen: Sequence[Seen], last_period: float | None, where: str, notes: Notebook
) -> None:
    """Check that runs expired by the clock of the witness, not by the merchant's alone.

    A run is charged at the later of its last entry's time and that of the first countersignature
    after it; the moment of expiry is the earlier of the entry's time and the last
    countersignature that the ledger can have known.
    """
    for seq, at, run, (latest, latest_at) in book.expiries:
        after = [one.at for one in seen if one.seq >= latest]
        known = [one.at for one in seen if one.seq < seq]
        today = min(at, max(known, default=0.0))
        charged = max(latest_at, min(after, default=float("inf")))
        periods = [p for p in _periods(book, seq, last_period) if p is not None]
        notes.check(
            bool(periods) and today - charged >= min(periods) * DAY_S - 1.0,
            "expired-early",
            f"{where}, entry {seq}",
            f"run {run.run} expired before the refresh period was over by the witness's clock",
        )


def _periods(book: Book, seq: int, last_period: float | None) -> list[float | None]:
    """Return the refresh periods that may have held at an expiry.

    Runs expire in one step with the reservation that they make room for, which tells the policy;
    where none follows at once it was refused, and the policy of the next one, or of today, is
    all that is known.
    """
    expired = {number for number, *_ in book.expiries}
    while seq in expired:
        seq += 1
    told = [(r.seq, r.reserve["policy"]["refresh_days"]) for r in book.readings if r.seq >= seq]
    if told and told[0][0] == seq:
        return [told[0][1]]
    return [*(period for _, period in told[:1]), last_period]


def check_anchors(
    anchors: Sequence[Anchor], key: bytes, entries: Sequence[Entry], where: str, notes: Notebook
) -> None:
    """Check that a ledger still holds every head that the auditor knows."""
    for anchor in anchors:
        if anchor.key == key:
            notes.count("heads known from earlier")
            notes.check(
                holds(entries, anchor),
                "anchor-missing",
                where,
                f"does not hold entry {anchor.seq} as the auditor knows it: the ledger was "
                "shortened or written anew",
            )


def check_log(
    entries: Sequence[Entry],
    log: Sequence[Seen],
    made_at: float,
    where: str,
    notes: Notebook,
) -> None:
    """Hold what the witness's own log says of a merchant against the merchant's ledger."""
    notes.count("heads in the witness's log", len(log))
    older = [one for one in log if one.seq > len(entries) and one.at > made_at]
    missing = [one for one in log if one.seq > len(entries) and one.at <= made_at]
    forked = [one for one in log if one.seq <= len(entries) and not holds(entries, one)]
    if forked:
        told = f"the witness countersigned another entry {forked[0].seq}: this is one of two"
        notes.add("forked", where, told)
    if missing:
        notes.add(
            "rolled-back",
            where,
            f"the witness countersigned entry {missing[-1].seq}, the ledger ends at "
            f"{len(entries)}: it was put back from a copy, or shortened",
        )
    if older:
        notes.add(
            "evidence-older",
            where,
            "the witness saw entries after this evidence was made; ask for newer evidence",
        )


def check_log_complete(
    seen: Sequence[Seen], log: Sequence[Seen], made_at: float, where: str, notes: Notebook
) -> None:
    """Hold the countersignatures that a merchant has against the witness's own log."""
    logged = {(one.seq, one.link) for one in log}
    lacking = [one for one in seen if (one.seq, one.link) not in logged]
    told = "the coordinator's evidence was made before the witness's last look; ask for a newer one"
    notes.check(all(one.at <= made_at for one in lacking), "evidence-older", where, told)
    notes.check(
        not any(one.at <= made_at for one in lacking),
        "witness-log-short",
        where,
        "the merchant holds countersignatures that the witness's log lacks",
    )
