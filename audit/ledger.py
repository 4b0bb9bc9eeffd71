"""A merchant's ledger: entries, their chain, and what each entry must look like."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from audit import fields
from audit.codes import Flaw
from common.chain import (
    NO_LINK,
    REKEY,
    Entry,
    body_bytes,
    is_signed,
    link_after,
    rekey_proof,
    signed_head,
)
from common.errors import LedgerError

_EVERY: fields.Fields = {"kind": fields.text, "at": fields.number, "salt": fields.text}
_LINE: fields.Fields = {
    "seq": fields.whole,
    "body": fields.text,
    "link": fields.digest,
    "signature": fields.text,
}
_CODE: fields.Fields = {"hansa": fields.text, "code": fields.text}
_OCCASION: fields.Fields = {
    "run": fields.text,
    "stage": fields.text,
    "round": fields.whole,
    "attempt": fields.whole,
}
_CHARGE: fields.Fields = {
    "stage": fields.text,
    "event": fields.event,
    "towards_server": fields.event,
}
_KINDS: dict[str, fields.Fields] = {
    "open": {
        "v": lambda value: fields.whole(value) and value == 1,
        "ledger": fields.text,
        "merchant": fields.text,
        "key": fields.digest,
        "unit": fields.text,
        "relation": fields.text,
        **_CODE,
    },
    "reserve": {
        "run": fields.text,
        "contract": fields.digest,
        "releases": fields.several(fields.shaped(_CHARGE)),
        "last": fields.stage_and_round,
        "policy": fields.shaped(fields.POLICY),
        "before": fields.number,
        "after": fields.number,
        "lifetime": fields.number,
        "accountant": fields.text,
        **_CODE,
    },
    "join": {
        "run": fields.text,
        "session": fields.whole,
        "roster": fields.digest,
        "members": fields.whole,
    },
    "release": {
        **_OCCASION,
        **_CHARGE,
        "contract": fields.digest,
        "parameters": fields.digest,
        "step": fields.text,
    },
    "sum": {**_OCCASION, "survivors": fields.whole},
    "settle": {"run": fields.text},
    "expire": {"run": fields.text},
    "refuse": {**_OCCASION, "contract": fields.text, "reason": fields.text},
    REKEY: {"key": fields.digest, "proof": fields.text},
}


@dataclass(frozen=True)
class Break:
    """The first place where a chain does not hold."""

    code: str
    seq: int  # of the entry
    message: str


def read_entries(raw: bytes) -> list[Entry]:
    """Read `ledger.jsonl`.

    Raises:
        Flaw: A line is not what the format says.
    """
    return [_entry(line, found) for line, found in fields.objects(raw, _UNREADABLE, "ledger.jsonl")]


_UNREADABLE = "ledger-unreadable"


def _entry(line: int, found: dict[str, Any]) -> Entry:
    wrong = fields.wrong_fields(found, _LINE)
    if wrong:
        raise Flaw(_UNREADABLE, f"line {line}: field '{wrong[0][:40]}' is missing or wrong")
    try:
        return Entry(
            found["seq"],
            found["body"].encode("ascii"),
            bytes.fromhex(found["link"]),
            bytes.fromhex(found["signature"]),
        )
    except ValueError:
        raise Flaw(_UNREADABLE, f"line {line}: is no entry of a ledger") from None


@dataclass(frozen=True)
class Reign:
    """The entries that one key signed."""

    key: bytes  # empty where what names it cannot be read
    first: int  # number of an entry

    def __str__(self) -> str:
        """Return the key's first digits."""
        return self.key.hex()[:16] or "no key"


def reigns(entries: Sequence[Entry], public: bytes) -> tuple[Reign, ...]:
    """Return which key signed from which entry on, as the ledger tells; nothing is checked.

    A ledger that was never handed over has the key of its evidence throughout.
    """
    handed_over = [entry for entry in entries if _document(entry).get("kind") == REKEY]
    if not handed_over:
        return (Reign(public, 1),)
    later = (Reign(_key(entry), entry.seq + 1) for entry in handed_over)
    return (Reign(_key(entries[0]), 1), *later)


def _document(entry: Entry) -> dict[str, Any]:
    """Return what an entry says, or nothing; only of entries that may hand a ledger over."""
    if entry.seq != 1 and REKEY.encode() not in entry.body:
        return {}
    try:
        return entry.document
    except LedgerError:
        return {}


def _key(entry: Entry) -> bytes:
    key = _document(entry).get("key")
    return bytes.fromhex(key) if isinstance(key, str) and fields.digest(key) else b""


def check_chain(entries: Sequence[Entry], public: bytes) -> Break | None:
    """Return the first entry that breaks the chain: number, link, or any single signature.

    The signature of the last entry would vouch for all of them. Every one is checked all the
    same: it tells whether each entry was signed when it was made, as the format says, with the
    key that was the ledger's at that time.
    """
    link = NO_LINK
    for number, entry in enumerate(entries, start=1):
        if entry.seq != number:
            message = f"expected entry {number}, found {entry.seq}: one is missing, or moved"
            return Break("chain-gap", number, message)
        link = link_after(link, entry.body)
        if entry.link != link:
            message = "its link does not follow from the entries before and its text"
            return Break("chain-broken", number, message)
    found = reigns(entries, public)
    for number, reign in enumerate(found):
        end = found[number + 1].first - 1 if number + 1 < len(found) else len(entries)
        unsigned = first_unsigned(entries[reign.first - 1 : end], reign.key)
        if unsigned is not None:
            message = "is not signed with the key that was this merchant's at that time"
            return Break("entry-signature", unsigned, message)
    return _wrong_rekey(entries, found, public)


def _wrong_rekey(entries: Sequence[Entry], found: Sequence[Reign], public: bytes) -> Break | None:
    """Return the first entry that hands the ledger over to a key that did not agree, or may not."""
    for number, (before, after) in enumerate(pairwise(found), start=1):
        entry = entries[after.first - 2]
        link = entries[entry.seq - 2].link if entry.seq > 1 else NO_LINK
        message = rekey_proof(before.key, after.key, entry.seq - 1, link)
        problem = ""
        if not is_signed(after.key, message, _proof(entry)):
            problem = "the new key did not sign the entry before: it may be somebody else's"
        elif after.key in [reign.key for reign in found[:number]]:
            problem = "the ledger is handed over to a key that was given up before"
        if problem:
            return Break("rekey-invalid", entry.seq, problem)
    if found[-1].key != public:
        problem = f"the ledger is handed over to {found[-1]}, the evidence is signed by another key"
        return Break("rekey-invalid", found[-1].first - 1, problem)
    return None


def _proof(entry: Entry) -> bytes:
    try:
        return bytes.fromhex(str(_document(entry).get("proof")))
    except ValueError:
        return b""


def first_unsigned(entries: Sequence[Entry], public: bytes) -> int | None:
    """Return the number of the first entry whose signature does not fit.

    In as many threads as there are cores: verifying holds no lock of the interpreter.
    """
    workers = min(os.cpu_count() or 1, 8, len(entries) // 64 + 1)
    size = -(-len(entries) // workers) or 1
    parts = [entries[start : start + size] for start in range(0, len(entries), size)]
    if len(parts) < 2:
        return _unsigned(entries, public)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda part: _unsigned(part, public), parts))
    return next((seq for seq in found if seq is not None), None)


def _unsigned(entries: Sequence[Entry], public: bytes) -> int | None:
    for entry in entries:
        if not is_signed(public, signed_head(public, entry.seq, entry.link), entry.signature):
            return entry.seq
    return None


def read_document(entry: Entry) -> dict[str, Any]:
    """Return what an entry says.

    Raises:
        Flaw: It is not canonical JSON (two readers could read two things), its kind is not
            known, or a field is missing, of another kind or not known.
    """
    try:
        document = entry.document
        canonical = body_bytes(document) == entry.body
    except (LedgerError, ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise Flaw("entry-schema", f"entry {entry.seq}: is no canonical JSON object")
    kind = document.get("kind")
    known = dict(_KINDS.get(kind, {})) if isinstance(kind, str) else {}
    if not known:
        raise Flaw(
            "entry-schema",
            f"entry {entry.seq}: this auditor does not know kind {str(kind)[:40]!r}; a newer "
            "version may",
        )
    wrong = fields.wrong_fields(document, {**known, **_EVERY})
    if wrong:
        raise Flaw(
            "entry-schema",
            f"entry {entry.seq} ({kind}): field '{wrong[0][:40]}' is missing, wrong or not known",
        )
    return document
