"""A merchant's ledger: what was released, charged before it is computed.

One SQLite file a merchant. A charge checks the cap and is written in one transaction; it is
never taken back, so a crash after a charge leaves it spent. The same (run, stage, round,
attempt) can be charged once only: a server that asks twice is refused. Rows are never changed
or deleted (triggers refuse it). Refusals are rows too.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.accounting import epsilon
from common.errors import AccountingError, BudgetRefusal, LedgerError
from common.events import Event, from_document, merged, to_document

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('charge', 'refusal')),
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    event TEXT NOT NULL,
    towards_server TEXT NOT NULL,
    contract TEXT NOT NULL,
    reason TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS once ON entry (run, stage, round, attempt)
    WHERE kind = 'charge';
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON entry
    WHEN EXISTS (
        SELECT 1 FROM entry WHERE seq = NEW.seq OR (
            kind = 'charge' AND NEW.kind = 'charge' AND run = NEW.run AND stage = NEW.stage
            AND round = NEW.round AND attempt = NEW.attempt
        )
    )
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class Budget:
    """The merchant's cap over all runs, from its own policy file."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Occasion:
    """What a charge is for; the same occasion is charged once only."""

    run: str
    stage: str
    round: int
    attempt: int
    contract: str  # SHA-256 of the contract


@dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    seq: int
    kind: str  # "charge" or "refusal"
    occasion: Occasion
    event: Event  # towards whoever sees sums
    towards_server: Event  # towards whoever sees this merchant's single message
    reason: str


class Ledger:
    """The ledger in one file. Several processes may use the file; SQLite orders them.

    Args:
        path: The SQLite file; made when it is not there.
        budget: The cap that no charge may pass.

    Raises:
        LedgerError: The file cannot be opened as a ledger.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path = path
        self.budget = budget
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection:
                connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{path}: cannot be opened as a ledger ({error})") from None
        self._connection: sqlite3.Connection | None = None
        self._charged: list[Event] = []
        self._seen = 0

    def charge(self, occasion: Occasion, event: Event, towards_server: Event) -> None:
        """Pay for one release, before it is computed.

        Raises:
            BudgetRefusal: The cap would be passed; the refusal is written down.
            LedgerError: The occasion was charged before, or the file cannot be written.
        """
        with self._transaction() as connection:
            spent = epsilon((*self._events(connection), event), self.budget.delta)
            refused = spent > self.budget.epsilon * (1 + 1e-9)
            reason = (
                f"would reach epsilon {spent:.4g}, the merchant's cap is {self.budget.epsilon:.4g} "
                f"at delta {self.budget.delta:.3g}"
            )
            kind = "refusal" if refused else "charge"
            try:
                self._append(
                    connection, kind, occasion, event, towards_server, reason if refused else ""
                )
            except sqlite3.IntegrityError:
                raise LedgerError(
                    f"{occasion.stage} of round {occasion.round}, attempt {occasion.attempt}, was "
                    "released before in this run; a second release needs an attempt of its own"
                ) from None
        if refused:
            raise BudgetRefusal(f"{occasion.stage} of round {occasion.round} {reason}")

    def check_affordable(self, events: Sequence[Event]) -> None:
        """Raise a `BudgetRefusal` if these further events together would pass the cap."""
        with self._transaction() as connection:
            after = epsilon((*self._events(connection), *events), self.budget.delta)
        if after > self.budget.epsilon * (1 + 1e-9):
            raise BudgetRefusal(
                f"the run would bring this merchant to epsilon {after:.4g}, its cap is "
                f"{self.budget.epsilon:.4g} at delta {self.budget.delta:.3g}"
            )

    def entries(self, run: str | None = None) -> list[Entry]:
        """Return all entries in order, of one run if it is named."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT seq, kind, run, stage, round, attempt, contract, event, towards_server, "
                "reason FROM entry WHERE ?1 IS NULL OR run = ?1 ORDER BY seq",
                (run,),
            ).fetchall()
        return [
            Entry(
                row[0],
                row[1],
                Occasion(*row[2:7]),
                self._event(row[7]),
                self._event(row[8]),
                row[9],
            )
            for row in rows
        ]

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _events(self, connection: sqlite3.Connection) -> list[Event]:
        """Return everything charged so far, alike events merged; reads only what is new."""
        rows = connection.execute(
            "SELECT seq, event FROM entry WHERE kind = 'charge' AND seq > ? ORDER BY seq",
            (self._seen,),
        ).fetchall()
        if rows:
            new = [self._event(event) for _, event in rows]
            self._charged = list(merged([*self._charged, *new]))
            self._seen = rows[-1][0]
        return self._charged

    def _event(self, text: str) -> Event:
        try:
            return from_document(json.loads(text))
        except (ValueError, AccountingError) as error:
            raise LedgerError(
                f"{self.path}: holds an entry that cannot be read ({error})"
            ) from None

    @staticmethod
    def _append(
        connection: sqlite3.Connection,
        kind: str,
        occasion: Occasion,
        event: Event,
        towards_server: Event,
        reason: str,
    ) -> None:
        connection.execute(
            "INSERT INTO entry (at, kind, run, stage, round, attempt, event, towards_server, "
            "contract, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                time.time(),
                kind,
                occasion.run,
                occasion.stage,
                occasion.round,
                occasion.attempt,
                json.dumps(to_document(event)),
                json.dumps(to_document(towards_server)),
                occasion.contract,
                reason,
            ),
        )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; commit at the end, roll back on any exception."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: the ledger cannot be used ({error})") from None
        try:
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: the ledger cannot be written ({error})") from None
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
