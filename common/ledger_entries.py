"""A ledger's stored entries: whether they are one merchant's chain, and what they say."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.budget import Account, Budget
from common.chain import (
    NO_LINK,
    Countersignature,
    Entry,
    check_rekey,
    is_signed,
    link_after,
    named_key,
    signed_head,
)
from common.errors import AccountingError, LedgerError
from common.sqlite_file import BROKEN


def checked_entries(
    rows: Sequence[tuple[int, bytes, bytes, bytes]],
    public: bytes,
    source: str,
    after: tuple[int, bytes] = (0, NO_LINK),
    keys: tuple[bytes, ...] = (),
) -> list[Entry]:
    """Return stored rows as entries, if they continue the chain and their merchant signed it.

    The signature of the last one is checked: its link commits to all before it; and that of
    every entry that hands the ledger over, with the new key's.

    Args:
        rows: As stored.
        public: The key of today.
        source: Starts an error's message.
        after: Number and link of the entry before.
        keys: That signed up to there, oldest first.

    Raises:
        LedgerError: They do not; names the source.
    """
    entries, (seq, link) = [Entry(*row) for row in rows], after
    for number, entry in enumerate(entries, start=seq + 1):
        bits = isinstance(entry.body, bytes) and isinstance(entry.signature, bytes)
        before, link = link, link_after(link, entry.body) if bits else b""
        if entry.seq != number or entry.link != link:
            raise LedgerError(f"{source}: entry {number} was changed, or is missing")
        try:
            if keys and named_key(entry) is not None:
                check_rekey(entry, keys, before)
            keys = keys_after(keys, entry, public)
        except LedgerError as error:
            raise LedgerError(f"{source}: {error}") from None
    if entries:
        _check_signer(entries[-1], keys, public, source)
    return entries


def keys_after(keys: tuple[bytes, ...], entry: Entry, public: bytes) -> tuple[bytes, ...]:
    """Return the keys that signed, and sign, a ledger when this entry is in it.

    Raises:
        LedgerError: It is an entry that names a key, and names none.
    """
    named = named_key(entry)
    if named is not None:
        return (*keys, named)
    return keys or (public,)


def _check_signer(last: Entry, keys: tuple[bytes, ...], public: bytes, source: str) -> None:
    """Check that the key of today is the ledger's, and that it signed the last entry.

    Raises:
        LedgerError: It is not, or did not.
    """
    if public in keys[:-1]:
        raise LedgerError(
            f"{source}: was handed over from this key to {keys[-1].hex()[:16]}..., which alone "
            "opens it now; put the new key in its place (a rotation that broke off is finished by "
            "starting it again)"
        )
    signer = keys[-2] if last.seq > 1 and named_key(last) is not None else public
    head = signed_head(signer, last.seq, last.link)
    if keys[-1] != public or not is_signed(signer, head, last.signature):
        raise LedgerError(
            f"{source}: entry {last.seq} is not signed with this merchant's key; the ledger "
            "was changed, or is another merchant's"
        )


@dataclass(frozen=True)
class StoredLedger:
    """What a ledger's file holds, checked."""

    account: Account
    entries: list[Entry]
    countersignatures: list[Countersignature]
    keys: tuple[bytes, ...]  # that signed it, oldest first


def read_ledger(path: Path, budget: Budget, public: bytes) -> StoredLedger:
    """Read a ledger without writing to it, and without the merchant's private key.

    Args:
        path: The SQLite file.
        budget: The merchant's caps.
        public: The key of today, which the ledger was handed over to last.

    Raises:
        LedgerError: The file cannot be read, was changed, or is another merchant's.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            file.execute("BEGIN")
            rows = file.execute("SELECT seq, body, link, signature FROM entry ORDER BY seq")
            entries = checked_entries(rows.fetchall(), public, str(path))
            seen = file.execute(
                "SELECT body, signature FROM countersignature ORDER BY number"
            ).fetchall()
    except BROKEN as error:
        raise LedgerError(f"{path}: cannot be read as a ledger ({error})") from None
    account = Account(budget)
    keys: tuple[bytes, ...] = ()
    for entry in entries:
        fold(account, entry, path)
        keys = keys_after(keys, entry, public)
    return StoredLedger(account, entries, [Countersignature(*row) for row in seen], keys)


def fold(
    account: Account, entry: Entry, path: Path, document: Mapping[str, Any] | None = None
) -> None:
    """Take an entry into account, whose body is read unless `document` is what it says.

    Raises:
        LedgerError: It cannot be read; names the file.
    """
    try:
        account.fold(entry.seq, entry.document if document is None else document)
    except (
        LedgerError,
        AccountingError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise LedgerError(
            f"{path}: holds an entry {entry.seq} that cannot be read ({error})"
        ) from None
