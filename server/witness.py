"""The witness of the merchants' ledgers: remembers every head, countersigns extensions only.

It reads no entry. From a head it learns how many entries a ledger has and their hashes; a
ledger that was shortened, put back from a copy or kept twice gives a head that does not extend
what the witness saw, and its merchant is left out until a person found out why.

A merchant that changes its key goes on with the same ledger: after a rotation that both keys
signed, the new key's head must extend what was seen of the old one, whose heads are refused.
"""

import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.chain import Countersignature, Head, extended, is_signed
from common.errors import ArchiveError, IdentityError, WireError
from common.identity import Identity
from common.rotation import Rotation
from common.sqlite_file import BROKEN, SqliteFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS head (
    number INTEGER PRIMARY KEY,
    merchant TEXT NOT NULL,
    key BLOB NOT NULL,
    seq INTEGER NOT NULL,
    link BLOB NOT NULL,
    signature BLOB NOT NULL,
    body BLOB NOT NULL,
    countersignature BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS once ON head (key, seq);
CREATE TRIGGER IF NOT EXISTS head_no_update BEFORE UPDATE ON head
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER IF NOT EXISTS head_no_delete BEFORE DELETE ON head
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER IF NOT EXISTS head_in_order BEFORE INSERT ON head
    WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM head)
        OR EXISTS (SELECT 1 FROM head WHERE key = NEW.key AND seq >= NEW.seq)
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TABLE IF NOT EXISTS rotation (
    number INTEGER PRIMARY KEY,
    merchant TEXT NOT NULL,
    old BLOB NOT NULL UNIQUE,
    new BLOB NOT NULL UNIQUE,
    at INTEGER NOT NULL,
    by_old BLOB NOT NULL,
    by_new BLOB NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS rotation_no_update BEFORE UPDATE ON rotation
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER IF NOT EXISTS rotation_no_delete BEFORE DELETE ON rotation
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER IF NOT EXISTS head_not_of_old_key BEFORE INSERT ON head
    WHEN EXISTS (SELECT 1 FROM rotation WHERE old = NEW.key)
    BEGIN SELECT RAISE(ABORT, 'a key that was given up signs no more'); END;
"""
_ROTATIONS = "SELECT merchant, old, new, at, by_old, by_new FROM rotation ORDER BY number"


class Witness:
    """Heads of ledgers in one SQLite file.

    Args:
        path: The file; made when it is not there.
        identity: Countersigns; merchants pin its public key.
        now: Seconds since 1970.
        durable: What was seen is on the disk before it is countersigned. False where a simulation
            made the merchants, too: then a loss of power may lose what lost nothing.

    Raises:
        ArchiveError: The file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        now: Callable[[], float] = time.time,
        *,
        durable: bool = True,
    ) -> None:
        self._synchronous = "FULL" if durable else "OFF"
        self._path = path
        self._identity = identity
        self._now = now
        self._latest: dict[bytes, tuple[int, bytes, Countersignature]] = {}  # by merchant's key
        self._signed_now: dict[bytes, Countersignature] = {}  # by this identity, for sure
        # number, key, seq and link of the newest row that is in `_latest`
        self._newest: tuple[int, bytes, int, bytes] = (0, b"", 0, b"")
        self._owners: dict[bytes, str] = {}  # key -> merchant
        self._before: dict[bytes, bytes] = {}  # key -> the one that it took over from
        self._file = SqliteFile(path, self._failure, log=False)
        try:
            self._file.open(_SCHEMA)
        except (OSError, *BROKEN) as error:
            raise self._failure(f"used ({error})") from None
        with self._file.transaction(self._synchronous) as connection:
            self._read_new(connection)

    def _failure(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self._path}: the witness's record cannot be {what}")

    def _read_new(self, connection: sqlite3.Connection) -> None:
        """Take in what was witnessed since the last look, by any process.

        Raises:
            ArchiveError: The record does not hold what it held at the last look.
        """
        rows = connection.execute(
            "SELECT number, merchant, key, seq, link, body, countersignature FROM head "
            "WHERE number >= ? ORDER BY number",
            (self._newest[0],),
        ).fetchall()
        if self._newest[0]:
            held, rows = rows[:1], rows[1:]
            if [(number, *row[1:4]) for number, *row in held] != [self._newest]:
                raise ArchiveError(
                    f"{self._path}: the witness's record was put back or replaced while it was in "
                    "use; end all processes that use it and find out what happened"
                )
        for number, merchant, key, seq, link, body, signature in rows:
            self._take(number, merchant, key, (seq, link, Countersignature(body, signature)))
        self._before = {new: old for _, old, new, *_ in connection.execute(_ROTATIONS)}

    def _take(
        self, number: int, merchant: str, key: bytes, seen: tuple[int, bytes, Countersignature]
    ) -> None:
        """Remember a row that is in the file."""
        self._latest[key], self._owners[key] = seen, merchant
        self._newest = number, key, *seen[:2]

    @property
    def public(self) -> bytes:
        """Return the key that merchants pin."""
        return self._identity.public

    def rotate(self, rotation: Rotation) -> None:
        """Let a new key go on where an old one was; once, later calls change nothing.

        Of a merchant: its heads are those of the new key from now on. Of the witness itself: a
        process that still has the old key countersigns nothing more. To be called before the
        list of members names the new key.

        Raises:
            IdentityError: A signature does not fit, the old key was given up before, the new one
                was seen before, or the ledger is another merchant's.
            ArchiveError: The file cannot be written.
        """
        rotation.check()
        with self._file.transaction(self._synchronous) as connection:
            self._read_new(connection)
            if rotation.old == self._before.get(rotation.new):
                return
            if rotation.old in self._before.values():
                raise IdentityError("this key was given up before, for another new key")
            if rotation.new in {*self._latest, *self._before, *self._before.values()}:
                raise IdentityError("the new key was seen before; make a fresh one")
            if self._owners.get(rotation.old, rotation.merchant) != rotation.merchant:
                raise IdentityError("the ledger of this key is another merchant's")
            values = rotation.merchant, rotation.old, rotation.new, rotation.at
            connection.execute(
                "INSERT INTO rotation SELECT coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ? "
                "FROM rotation",
                (*values, rotation.by_old, rotation.by_new),
            )
        with self._file.transaction(self._synchronous) as connection:
            self._read_new(connection)

    def rotations(self) -> tuple[Rotation, ...]:
        """Return all rotations that were taken in, oldest first."""
        with self._file.transaction(self._synchronous) as connection:
            return tuple(Rotation(*row) for row in connection.execute(_ROTATIONS).fetchall())

    def exchanged(self, keys: Mapping[str, bytes]) -> list[str]:
        """Return the merchants whose ledger was seen under another key, without a rotation.

        Such a merchant would go on with a new ledger, and what it spent would be forgotten.

        Args:
            keys: Merchant -> its enrolled key of today.
        """
        with self._file.transaction(self._synchronous) as connection:
            self._read_new(connection)
        lineages = {merchant: self._lineage(key) for merchant, key in keys.items()}
        return sorted(
            {
                merchant
                for key, merchant in self._owners.items()
                if merchant in lineages and key not in lineages[merchant]
            }
        )

    def _lineage(self, key: bytes) -> list[bytes]:
        """Return a key and those before it, newest first."""
        found = [key]
        while found[-1] in self._before:
            found.append(self._before[found[-1]])
        return found

    def _seen(self, key: bytes) -> tuple[int, bytes, Countersignature] | None:
        """Return what was seen last of a key's ledger, by that key or by one before it."""
        return next((self._latest[k] for k in self._lineage(key) if k in self._latest), None)

    def countersign(self, heads: Mapping[str, tuple[bytes, Head]]) -> dict[str, str]:
        """Remember heads, and countersign those that extend what was seen.

        Args:
            heads: Merchant -> public key and head.

        Returns:
            Merchant -> why its head is refused, of those that are.

        Raises:
            ArchiveError: The file cannot be written; nothing was countersigned.
        """
        refused: dict[str, str] = {}
        written: list[tuple[int, str, bytes, tuple[int, bytes, Countersignature]]] = []
        with self._file.lock:  # until what was written is remembered
            with self._file.transaction(self._synchronous) as connection:
                self._read_new(connection)
                for merchant, (key, head) in sorted(heads.items()):
                    try:
                        self._check(connection, key, head)
                    except WireError as error:
                        refused[merchant] = str(error)
                        continue
                    if self._seq(key) == head.seq:
                        continue
                    signed = self._signed_now[key] = self._signed(key, head.seq, head.link)
                    number = self._newest[0] + len(written) + 1
                    connection.execute(
                        "INSERT INTO head VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            number,
                            merchant,
                            key,
                            head.seq,
                            head.link,
                            head.signature,
                            signed.body,
                            signed.signature,
                        ),
                    )
                    written.append((number, merchant, key, (head.seq, head.link, signed)))
            for one in written:
                self._take(*one)
        return refused

    def _check(self, connection: sqlite3.Connection, key: bytes, head: Head) -> None:
        """Raise unless a head is signed by its merchant and extends what was seen last."""
        if not head.is_of(key):
            raise WireError("field 'head': is not signed with this merchant's key")
        if key in self._before.values():
            raise WireError("field 'head': is signed with a key that the merchant gave up")
        seen = self._seen(key)
        if seen is None:
            return
        seq, link, _ = seen
        known = link
        if head.since != seq:
            known = self._link(connection, key, head.since)
        extends = (
            head.since <= seq <= head.seq
            and extended(known, head.digests[: seq - head.since]) == link
            and extended(known, head.digests) == head.link
        )
        if not extends:
            raise WireError(
                f"field 'head': the merchant's ledger does not extend entry {seq}, which the "
                "witness saw; it was put back from a copy, or is one of two"
            )

    def _link(self, connection: sqlite3.Connection, key: bytes, seq: int) -> bytes:
        """Return the link of a head that was seen, by a key or by one before it; or nothing."""
        for one in self._lineage(key):
            row = connection.execute(
                "SELECT link FROM head WHERE key = ? AND seq = ?", (one, seq)
            ).fetchone()
            if row is not None:
                return bytes(row[0])
        return b""

    def _signed(self, key: bytes, seq: int, link: bytes) -> Countersignature:
        if self.public in self._before.values():
            raise ArchiveError(
                f"{self._path}: the operator's key was rotated; this process has the old one, "
                "start it again"
            )
        body = Countersignature.statement(key, seq, link, self._now())
        return Countersignature(body, self._identity.sign(Countersignature.signed(body)))

    def _seq(self, key: bytes) -> int:
        seen = self._seen(key)
        return 0 if seen is None else seen[0]

    def latest(self, key: bytes) -> bytes:
        """Return the countersignature of the last head of a merchant's ledger, if any was seen.

        What an earlier key of the witness signed is signed anew, with the time of now.
        """
        seen = self._seen(key)
        if seen is None:
            return b""
        held = seen[2]
        if self._signed_now.get(key) != held:
            if not is_signed(self.public, Countersignature.signed(held.body), held.signature):
                return self.renewed(key)
            self._signed_now[key] = held
        return held.to_bytes()

    def renewed(self, key: bytes) -> bytes:
        """Return the same with the time of now, by which a merchant tells what expired."""
        seen = self._seen(key)
        return b"" if seen is None else self._signed(key, *seen[:2]).to_bytes()

    def log(self) -> list[dict[str, Any]]:
        """Return all that was countersigned, oldest first, as evidence holds it."""
        with self._file.transaction(self._synchronous) as connection:
            rows = connection.execute(
                "SELECT merchant, seq, link, signature, body, countersignature FROM head "
                "ORDER BY number"
            ).fetchall()
        return [
            {
                "merchant": merchant,
                "seq": seq,
                "link": link.hex(),
                "signature": signature.hex(),
                "body": body.decode(),
                "countersignature": countersignature.hex(),
            }
            for merchant, seq, link, signature, body, countersignature in rows
        ]
