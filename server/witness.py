"""The witness of the merchants' ledgers: remembers every head, countersigns extensions only.

It reads no entry. From a head it learns how many entries a ledger has and their hashes; a
ledger that was shortened, put back from a copy or kept twice gives a head that does not extend
what the witness saw, and its merchant is left out until a person found out why.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from common.chain import Countersignature, Head, extended
from common.errors import ArchiveError, WireError
from common.identity import Identity

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
"""


class Witness:
    """Heads of ledgers in one SQLite file.

    Args:
        path: The file; made when it is not there.
        identity: Countersigns; merchants pin its public key.
        now: Seconds since 1970.

    Raises:
        ArchiveError: The file cannot be used.
    """

    def __init__(
        self, path: Path, identity: Identity, now: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._identity = identity
        self._now = now
        self._latest: dict[bytes, tuple[int, bytes, Countersignature]] = {}  # by merchant's key
        self._number = 0  # of the newest row that is in `_latest`
        with self._transaction() as connection:
            connection.executescript(_SCHEMA)
            self._read_new(connection)

    def _read_new(self, connection: sqlite3.Connection) -> None:
        """Take in what was witnessed since the last look, by any process."""
        rows = connection.execute(
            "SELECT number, key, seq, link, body, countersignature FROM head WHERE number > ? "
            "ORDER BY number",
            (self._number,),
        )
        for number, key, seq, link, body, signature in rows.fetchall():
            self._latest[key] = (seq, link, Countersignature(body, signature))
            self._number = number

    @property
    def public(self) -> bytes:
        """Return the key that merchants pin."""
        return self._identity.public

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
        with self._transaction() as connection:
            self._read_new(connection)
            for merchant, (key, head) in sorted(heads.items()):
                try:
                    self._check(connection, key, head)
                except WireError as error:
                    refused[merchant] = str(error)
                    continue
                if self._seq(key) == head.seq:
                    continue
                signed = self._signed(key, head.seq, head.link)
                connection.execute(
                    "INSERT INTO head SELECT coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ?, ? "
                    "FROM head",
                    (
                        merchant,
                        key,
                        head.seq,
                        head.link,
                        head.signature,
                        signed.body,
                        signed.signature,
                    ),
                )
        with self._transaction() as connection:  # what is on the disk by now
            self._read_new(connection)
        return refused

    def _check(self, connection: sqlite3.Connection, key: bytes, head: Head) -> None:
        """Raise unless a head is signed by its merchant and extends what was seen last."""
        if not head.is_of(key):
            raise WireError("field 'head': is not signed with this merchant's key")
        if key not in self._latest:
            return
        seq, link, _ = self._latest[key]
        known = link
        if head.since != seq:
            row = connection.execute(
                "SELECT link FROM head WHERE key = ? AND seq = ?", (key, head.since)
            ).fetchone()
            known = row[0] if row is not None else b""
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

    def _signed(self, key: bytes, seq: int, link: bytes) -> Countersignature:
        body = Countersignature.statement(key, seq, link, self._now())
        return Countersignature(body, self._identity.sign(Countersignature.signed(body)))

    def _seq(self, key: bytes) -> int:
        return self._latest[key][0] if key in self._latest else 0

    def latest(self, key: bytes) -> bytes:
        """Return the countersignature of the last head of a merchant's ledger, if any was seen."""
        return self._latest[key][2].to_bytes() if key in self._latest else b""

    def renewed(self, key: bytes) -> bytes:
        """Return the same with the time of now, by which a merchant tells what expired."""
        if key not in self._latest:
            return b""
        return self._signed(key, *self._latest[key][:2]).to_bytes()

    def log(self) -> list[dict[str, Any]]:
        """Return all that was countersigned, oldest first, as evidence holds it."""
        with self._transaction() as connection:
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

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                if connection.in_transaction:
                    connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ArchiveError(
                f"{self._path}: the witness's record cannot be used ({error})"
            ) from None
