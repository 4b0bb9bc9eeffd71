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
from common.errors import AccountingError, BudgetRefusal, LedgerError, ReplayRefusal
from common.events import Event, from_document, merged, to_document

_PATIENCE_S = 30.0  # to wait for another process that writes

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
CREATE UNIQUE INDEX IF NOT EXISTS refused_once ON entry (run, stage, round, attempt)
    WHERE kind = 'refusal';
CREATE TABLE IF NOT EXISTS secure_sum (
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    survivors INTEGER NOT NULL,
    PRIMARY KEY (run, stage, round, attempt)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS secure_step (step TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS step_no_update BEFORE UPDATE ON secure_step
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS step_no_delete BEFORE DELETE ON secure_step
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS step_no_replace BEFORE INSERT ON secure_step
    WHEN EXISTS (SELECT 1 FROM secure_step WHERE step = NEW.step)
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS sum_no_update BEFORE UPDATE ON secure_sum
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS sum_no_delete BEFORE DELETE ON secure_sum
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS sum_no_replace BEFORE INSERT ON secure_sum
    WHEN EXISTS (
        SELECT 1 FROM secure_sum WHERE run = NEW.run AND stage = NEW.stage
            AND round = NEW.round AND attempt = NEW.attempt
    )
    BEGIN SELECT RAISE(IGNORE); END;
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
    """A cap on everything charged: the merchant's over all runs, or a contract's over one."""

    epsilon: float  # towards whoever sees sums
    delta: float
    # epsilon towards whoever sees single messages; None: no cap
    towards_server: float | None = None


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
                connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{path}: cannot be opened as a ledger ({error})") from None
        self._connection: sqlite3.Connection | None = None
        self._totals: dict[tuple[str, str], tuple[Event, ...]] = {}
        self._seen = 0

    def charge(
        self,
        occasion: Occasion,
        event: Event,
        towards_server: Event,
        run_limit: Budget | None = None,
        step: str = "",
    ) -> None:
        """Pay for one release, before it is computed.

        Args:
            occasion: What the release is for.
            event: The release towards whoever sees sums.
            towards_server: The release towards whoever sees this merchant's single message.
            run_limit: What the contract allows for the whole run, if that is to be held.
            step: Names the step of a secure sum that the release is masked in; never charged
                twice, so that a session's file put back from a copy masks nothing again.

        Raises:
            BudgetRefusal: The merchant's cap or the run's limit would be passed; the refusal is
                written down.
            ReplayRefusal: The occasion or the step was charged before.
            LedgerError: The file cannot be written.
        """
        with self._transaction() as connection:
            self._read_new(connection)
            reason = self._over_cap((event,), (towards_server,))
            if not reason and run_limit is not None:
                after = epsilon((*self._total("run", occasion.run), event), run_limit.delta)
                if _above(after, run_limit.epsilon):
                    reason = (
                        f"would bring this run to epsilon {after:.4g}, its contract allows "
                        f"{run_limit.epsilon:.4g} at delta {run_limit.delta:.3g}"
                    )
            kind = "refusal" if reason else "charge"
            try:
                self._append(connection, kind, occasion, event, towards_server, reason)
            except sqlite3.IntegrityError:
                raise ReplayRefusal(
                    f"{occasion.stage} of round {occasion.round}, attempt {occasion.attempt}, was "
                    "released before in this run; a second release needs an attempt of its own"
                ) from None
            if step and not reason:
                self._append_step(connection, step)
        if reason:
            raise BudgetRefusal(f"{occasion.stage} of round {occasion.round} {reason}")

    def check_affordable(
        self, events: Sequence[Event], towards_server: Sequence[Event] = ()
    ) -> None:
        """Raise a `BudgetRefusal` if these further releases together would pass the cap."""
        with self._transaction() as connection:
            self._read_new(connection)
            reason = self._over_cap(events, towards_server)
        if reason:
            raise BudgetRefusal(f"the run {reason}")

    def _over_cap(self, events: Sequence[Event], towards_server: Sequence[Event]) -> str:
        """Return why the merchant's cap does not allow these releases, or nothing."""
        budget = self.budget
        for column, new, cap, whom in (
            ("event", events, budget.epsilon, ""),
            ("towards_server", towards_server, budget.towards_server, " towards the server"),
        ):
            if cap is None:
                continue
            after = epsilon((*self._total(column), *new), budget.delta)
            if _above(after, cap):
                return (
                    f"would bring this merchant to epsilon {after:.4g}{whom}, its cap is {cap:.4g} "
                    f"at delta {budget.delta:.3g}"
                )
        return ""

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

    def take_step(self, step: str) -> None:
        """Write down that a step of a secure sum was taken, where it is charged nothing.

        Raises:
            ReplayRefusal: It was taken before.
            LedgerError: The file cannot be written.
        """
        with self._transaction() as connection:
            self._append_step(connection, step)

    def note_sum(self, run: str, stage: str, number: int, attempt: int, survivors: int) -> None:
        """Write down how many merchants' noise is in a secure sum that this one helped unmask.

        What was charged stays charged: the charge counts on the fewest survivors. The number
        tells what noise was achieved. A second note for the same sum is ignored. The note
        reaches the disk with the next charge; a power cut before may lose it, never a charge.

        Raises:
            LedgerError: The file cannot be written.
        """
        with self._transaction("NORMAL") as connection:
            connection.execute(
                "INSERT OR IGNORE INTO secure_sum VALUES (?, ?, ?, ?, ?)",
                (run, stage, number, attempt, survivors),
            )

    def survivors(self, run: str) -> dict[tuple[str, int, int], int]:
        """Return (stage, round, attempt) -> merchants in the sum, for the secure sums of a run."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT stage, round, attempt, survivors FROM secure_sum WHERE run = ?", (run,)
            ).fetchall()
        return {(stage, number, attempt): found for stage, number, attempt, found in rows}

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _total(self, column: str, run: str = "") -> tuple[Event, ...]:
        return self._totals.get((column, run), ())

    def _read_new(self, connection: sqlite3.Connection) -> None:
        """Add what was charged since the last look, by any process, to the totals."""
        rows = connection.execute(
            "SELECT seq, run, event, towards_server FROM entry "
            "WHERE kind = 'charge' AND seq > ? ORDER BY seq",
            (self._seen,),
        ).fetchall()
        for seq, run, event, towards_server in rows:
            for key, text in (
                (("event", ""), event),
                (("run", run), event),
                (("towards_server", ""), towards_server),
            ):
                self._totals[key] = merged([*self._totals.get(key, ()), self._event(text)])
            self._seen = seq

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
        # asking again for what was refused adds no row: a server cannot fill the disk so
        verb = "INSERT OR IGNORE" if kind == "refusal" else "INSERT"
        connection.execute(
            f"{verb} INTO entry (at, kind, run, stage, round, attempt, event, towards_server, "
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

    @staticmethod
    def _append_step(connection: sqlite3.Connection, step: str) -> None:
        try:
            connection.execute("INSERT INTO secure_step VALUES (?)", (step,))
        except sqlite3.IntegrityError:
            raise ReplayRefusal(
                "this step of the secure sum was taken before; was the session's file put back?"
            ) from None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=_PATIENCE_S)
        patience = time.monotonic() + _PATIENCE_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                # of two processes that make the file at once SQLite refuses one without waiting
                if "locked" not in str(error) or time.monotonic() > patience:
                    connection.close()
                    raise
                time.sleep(0.01)
        return connection

    @contextmanager
    def _transaction(self, synchronous: str = "FULL") -> Iterator[sqlite3.Connection]:
        """Hold the write lock; commit at the end, roll back on any exception."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            connection = self._connection
            connection.execute(f"PRAGMA synchronous = {synchronous}")
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


def _above(spent: float, cap: float) -> bool:
    """Tell whether a cap is passed, beyond what the rounding of a plan's sigma explains."""
    return not spent <= cap * (1 + 1e-9)
