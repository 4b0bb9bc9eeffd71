"""Countersignatures, witness logs and anchors against the chain of a merchant's ledger.

A merchant signs its own entries, so it could write its ledger anew. What it cannot do is make
the witness forget a head that it countersigned.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from audit import fields
from audit.codes import Flaw, Notebook
from audit.rules import Book
from common.chain import Countersignature, Entry, Head, Seen
from common.errors import EvidenceError, LedgerError, WireError
from common.identity import Members

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


def read_countersignatures(raw: bytes, members: Members, keys: Sequence[bytes]) -> list[Seen]:
    """Read a merchant's `witness.jsonl` and check every signature.

    Args:
        raw: The file.
        members: Name the witness, and the keys that it had before.
        keys: Of the merchant's ledger, oldest first.

    Raises:
        Flaw: A line is no countersignature of this ledger by the pinned witness, or is by a key
            that was given up before.
    """
    found, places = [], []
    for line, document in fields.objects(raw, _INVALID, "witness.jsonl"):
        if fields.wrong_fields(document, _OWN):
            raise Flaw(_INVALID, f"witness.jsonl, line {line}: is no countersignature")
        signed = document["body"], document["signature"]
        seen, place = _opened(signed, members.witnesses, keys, line)
        found.append(seen)
        places.append(place)
    _check_in_turn([witness for witness, _ in places], _WITNESS)
    return found


_WITNESS = "the witness"


def _check_in_turn(places: Sequence[int], whose: str) -> None:
    """Raise a `Flaw` where a key signs after a later one of the same owner did."""
    for line, (before, after) in enumerate(pairwise(places), start=2):
        if after < before:
            told = f"signature {line} is by a key that {whose} had given up before"
            raise Flaw("key-given-up", f"witness.jsonl: {told}")


def _opened(
    signed: tuple[str, str], witnesses: Sequence[bytes], keys: Sequence[bytes], line: int
) -> tuple[Seen, tuple[int, int]]:
    """Return a countersignature, and the places of the witness's and the merchant's key."""
    for place, (witness, key) in _pairs(witnesses, keys):
        try:
            countersignature = Countersignature(signed[0].encode(), bytes.fromhex(signed[1]))
            return countersignature.opened(witness, key), place
        except (WireError, LedgerError, ValueError, OverflowError):
            continue
    raise Flaw(
        _INVALID,
        f"witness.jsonl, line {line}: is not signed by the pinned witness, or is of another ledger",
    )


def _pairs(
    witnesses: Sequence[bytes], keys: Sequence[bytes]
) -> Iterator[tuple[tuple[int, int], tuple[bytes, bytes]]]:
    """Yield pairs of keys with their places, the newest first."""
    for place, witness in reversed(list(enumerate(witnesses))):
        for other, key in reversed(list(enumerate(keys))):
            yield (place, other), (witness, key)


def read_witness_log(raw: bytes, members: Members) -> list[Logged]:
    """Read a coordinator's `witness.jsonl` and check both signatures of every head.

    Raises:
        Flaw: A line is not what the format says, a signature does not fit, or is by a key that
            was given up before.
    """
    found: list[Logged] = []
    witnesses: list[int] = []
    places: dict[str, list[int]] = {}
    for line, document in fields.objects(raw, _INVALID, "witness.jsonl"):
        told = f"witness.jsonl, line {line}"
        if fields.wrong_fields(document, _LOGGED):
            raise Flaw(_INVALID, f"{told}: is no head that was countersigned")
        name = document["merchant"]
        keys = members.keys_of(name)
        if not keys:
            raise Flaw(_INVALID, f"{told}: '{name[:64]}' is not enrolled")
        signed = document["body"], document["countersignature"]
        seen, (witness, key) = _opened(signed, members.witnesses, keys, line)
        if not _is_head(document, keys[key], seen):
            raise Flaw(_INVALID, f"{told}: the merchant did not sign the head that it speaks of")
        found.append(Logged(name, seen))
        witnesses.append(witness)
        places.setdefault(name, []).append(key)
    _check_in_turn(witnesses, _WITNESS)
    for name, of_merchant in places.items():
        _check_in_turn(of_merchant, f"'{name}'")
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
    anchors: Sequence[Anchor],
    keys: Collection[bytes],
    entries: Sequence[Entry],
    where: str,
    notes: Notebook,
) -> None:
    """Check that a ledger still holds every head that the auditor knows, of any of its keys."""
    for anchor in anchors:
        if anchor.key in keys:
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
