"""The lease by which one process at a time writes a run.

It has an epoch. Who resumes the run takes the next epoch, and from then on the database refuses
what the older process sends, however late it wakes up.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.engine import Connection

from common.errors import ArchiveError, RunError
from server.run_database import Database
from server.run_rows import ACTIVE, MerchantRow, RunState, one_line, read_row
from server.run_tables import CHECKPOINTS, MERCHANTS, RUNS

_KEPT = 2  # checkpoints of a run


class RunLease:
    """The right of one process to write a run; made by `RunStore`, safe to share among threads.

    Every method raises an `ArchiveError` where another process took the run over, where the run
    has finished, or where the database does not answer; then nothing was written.

    Attributes:
        run: Its name.
        epoch: Rises with every process that takes the run over.
        checkpoint: What was saved last.
    """

    def __init__(
        self,
        database: Database,
        now: Callable[[], float],
        run: str,
        epoch: int,
        checkpoint: bytes | None,
    ) -> None:
        self._database = database
        self._now = now
        self.run = run
        self.epoch = epoch
        self.checkpoint = checkpoint

    def save(self, checkpoint: bytes, *, round: int, epsilon: float, cohort: int) -> None:
        """Keep a checkpoint and how far the run is, both or neither; forget all but two.

        SQLite overwrites what is forgotten. PostgreSQL keeps it in its files until it vacuums.
        """
        body, now = bytes(checkpoint), self._now()

        def work(connection: Connection) -> None:
            self._change(
                connection,
                round=int(round),
                epsilon=float(epsilon),
                cohort=int(cohort),
                updated_at=now,
            )
            mine = CHECKPOINTS.c.run == self.run
            last = connection.execute(select(func.max(CHECKPOINTS.c.number)).where(mine)).scalar()
            number = (last or 0) + 1
            connection.execute(
                insert(CHECKPOINTS).values(
                    run=self.run,
                    number=number,
                    round=int(round),
                    saved_at=now,
                    sha256=hashlib.sha256(body).hexdigest(),
                    body=body,
                )
            )
            old = CHECKPOINTS.c.number <= number - _KEPT
            connection.execute(delete(CHECKPOINTS).where(mine, old))

        self._database.write_patiently(work)
        self.checkpoint = body
        self._database.empty_log()

    def beat(self, message: str | None = None) -> bool:
        """Say that the process lives, and what it does; return whether it is asked to stop.

        A thread that beats may come too late by one: once the process finished the run, nothing
        happens.
        """
        said = {} if message is None else {"message": one_line(message)}

        def work(connection: Connection) -> bool:
            if self._has_finished(connection):
                return False
            self._change(connection, **said)
            return read_row(connection, self.run).stop_requested

        return self._database.write_patiently(work)

    def merchants(self, rows: Sequence[MerchantRow]) -> None:
        """Write down how merchants fare; what was known of them is replaced."""
        values = {
            row.merchant: {
                "run": self.run,
                "merchant": row.merchant,
                "state": one_line(row.state),
                "round": int(row.round),
                "last_error": one_line(row.last_error),
                "seen_at": float(row.seen_at),
            }
            for row in rows
        }
        this = (MERCHANTS.c.run == self.run, MERCHANTS.c.merchant == bindparam("who"))

        def work(connection: Connection) -> None:
            self._change(connection)
            if values:
                connection.execute(delete(MERCHANTS).where(*this), [{"who": who} for who in values])
                connection.execute(insert(MERCHANTS), list(values.values()))

        self._database.write_patiently(work)

    def running(self) -> None:
        """Say that enough merchants take part."""
        self._move(RunState.RUNNING)

    def finish(self, bundle: Path | str) -> None:
        """End the run; nobody can change it after that."""
        changes = {"state": RunState.FINISHED.value, "bundle": str(bundle)}

        def work(connection: Connection) -> None:
            # A connection may be lost after the commit: the second try finds what the first did.
            if self._has_finished(connection, str(bundle)):
                return
            self._change(connection, **changes, stop_requested=False, updated_at=self._now())

        self._database.write_patiently(work)

    def fail(self, reason: str) -> None:
        """End the run with an error; it can be resumed."""
        self._move(RunState.FAILED, reason=one_line(reason))

    def stop(self, reason: str) -> None:
        """End the run because somebody asked; it can be resumed."""
        self._move(RunState.STOPPED, reason=one_line(reason))

    def _move(self, state: RunState, **changes: Any) -> None:
        changes |= {"state": state.value, "updated_at": self._now()}
        if state not in ACTIVE:
            changes["stop_requested"] = False
        self._database.write_patiently(lambda connection: self._change(connection, **changes))

    def _change(self, connection: Connection, **changes: Any) -> None:
        """Change the run's row if it is still ours; it is locked until the transaction ends."""
        ours = (RUNS.c.run == self.run, RUNS.c.epoch == self.epoch)
        unfinished = RUNS.c.state != RunState.FINISHED.value
        done = connection.execute(
            update(RUNS).where(*ours, unfinished).values(alive_at=self._now(), **changes)
        )
        if done.rowcount != 1:
            raise ArchiveError(self._refusal(connection))

    def _has_finished(self, connection: Connection, bundle: str | None = None) -> bool:
        """Return whether this process finished the run (with this bundle)."""
        row = read_row(connection, self.run)
        finished = row.epoch == self.epoch and row.state == RunState.FINISHED
        return finished and bundle in {None, row.bundle}

    def _refusal(self, connection: Connection) -> str:
        try:
            row = read_row(connection, self.run)
        except RunError:
            return f"run {self.run}: is no longer in the run store; nothing was written"
        if row.epoch != self.epoch:
            return (
                f"run {self.run}: was taken over by another process (epoch {row.epoch}, this one "
                f"has {self.epoch}); nothing was written, and this process must end"
            )
        return f"run {self.run}: has finished; nothing was written"
