"""The durable record of runs: where each one is, and from what it goes on after a crash.

One process at a time writes a run (`server/run_lease.py`). A checkpoint and the row that tells
of it are written in one transaction.

Clocks only tell whether a process seems alive. No checkpoint depends on them.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import IntegrityError

from common.errors import RunError
from server.run_database import Database
from server.run_lease import RunLease
from server.run_rows import (
    ACTIVE,
    MerchantRow,
    RunRow,
    RunState,
    last_checkpoint,
    read_row,
    run_row,
)
from server.run_tables import MERCHANTS, RUNS

__all__ = ["STALE_S", "MerchantRow", "RunLease", "RunRow", "RunState", "RunStore", "sqlite_url"]

STALE_S = 20  # a process that did not say for so long that it lives is taken for dead


def sqlite_url(path: Path) -> str:
    """Return the URL of a run store in a file.

    >>> sqlite_url(Path("federation/runs.sqlite"))
    'sqlite:///federation/runs.sqlite'
    """
    return URL.create("sqlite", database=str(path)).render_as_string()


class RunStore:
    """All runs of a coordinator, in SQLite or PostgreSQL.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`. Tables are made,
            or brought up to date, here.
        now: Seconds since 1970.

    Raises:
        ArchiveError: The database cannot be used, or is of a newer version.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self._database = Database(url)
        self._now = now

    def begin(self, run: str, contract: str, rounds: int, flower_run: str) -> RunLease:
        """Write a new run down and return the right to write it on.

        Raises:
            RunError: There is a run of this name.
        """
        now = self._now()
        new = RunRow(
            run=run,
            contract=contract,
            state=RunState.WAITING,
            reason="",
            flower_run=flower_run,
            round=0,
            rounds=rounds,
            epsilon=0.0,
            cohort=0,
            message="",
            started_at=now,
            updated_at=now,
            alive_at=now,
            epoch=1,
            stop_requested=False,
            bundle="",
        )

        def work(connection: Connection) -> None:
            try:
                connection.execute(insert(RUNS).values({**asdict(new), "state": new.state.value}))
            except IntegrityError:
                raise RunError(
                    f"run {run}: is in the run store already; go on with it by "
                    f"`hansa server resume`, or begin one of another name"
                ) from None

        self._database.write(work)
        return RunLease(self._database, self._now, run, 1, None)

    def resume(self, run: str, flower_run: str) -> RunLease:
        """Take a run over at its last checkpoint; a process that held it writes no more.

        A request to stop that nobody heeded is forgotten: what restarts runs by itself asks
        `row(run).stop_requested` first.

        Raises:
            RunError: The run is unknown, has finished, or another process works on it.
            ArchiveError: No checkpoint of it is whole.
        """

        def work(connection: Connection) -> RunLease:
            row = read_row(connection, run, lock=True)
            self._check_free(row)
            found = last_checkpoint(connection, run)
            now = self._now()
            connection.execute(
                update(RUNS)
                .where(RUNS.c.run == run)
                .values(
                    epoch=row.epoch + 1,
                    state=RunState.WAITING.value,
                    reason="",
                    message=found.note,
                    round=found.round,
                    flower_run=flower_run,
                    stop_requested=False,
                    updated_at=now,
                    alive_at=now,
                )
            )
            return RunLease(self._database, self._now, run, row.epoch + 1, found.body)

        return self._database.write(work)

    def _check_free(self, row: RunRow) -> None:
        if row.state == RunState.FINISHED:
            raise RunError(f"run {row.run}: has finished; begin a new one")
        if self.is_alive(row):
            ago = max(0.0, self._now() - row.alive_at)
            raise RunError(
                f"run {row.run}: another process works on it (seen {ago:.0f} s ago); stop that "
                f"one first. If it died, wait until {STALE_S} s have passed"
            )

    def row(self, run: str) -> RunRow:
        """Return what is known of a run.

        Raises:
            RunError: There is none of this name.
        """
        return self._database.read(lambda connection: read_row(connection, run))

    def rows(self) -> list[RunRow]:
        """Return all runs, newest first."""
        newest_first = select(RUNS).order_by(RUNS.c.started_at.desc(), RUNS.c.run.desc())
        return self._database.read(
            lambda connection: [
                run_row(found) for found in connection.execute(newest_first).mappings()
            ]
        )

    def last(self) -> RunRow | None:
        """Return the newest run, if there is one."""
        return next(iter(self.rows()), None)

    def merchants(self, run: str) -> list[MerchantRow]:
        """Return how every merchant fares in a run, in the order of their ids."""
        columns = [column for column in MERCHANTS.c if column.name != "run"]
        wanted = select(*columns).where(MERCHANTS.c.run == run)
        found = self._database.read(
            lambda connection: [MerchantRow(**row) for row in connection.execute(wanted).mappings()]
        )
        return sorted(found, key=lambda row: row.merchant)  # databases differ in order of letters

    def request_stop(self, run: str) -> None:
        """Ask the process of a run to stop; end a run whose process died.

        Raises:
            RunError: The run is unknown, or has ended.
        """

        def work(connection: Connection) -> None:
            row = read_row(connection, run, lock=True)
            if row.state not in ACTIVE:
                raise RunError(f"run {run}: has ended ({row.state}); there is nothing to stop")
            changes: dict[str, Any] = {"stop_requested": True}
            if not self.is_alive(row):
                changes |= {
                    "state": RunState.STOPPED.value,
                    "reason": "was stopped after its process had died",
                    "updated_at": self._now(),
                }
            connection.execute(update(RUNS).where(RUNS.c.run == run).values(changes))

        self._database.write(work)

    def is_alive(self, row: RunRow, now: float | None = None) -> bool:
        """Return whether a process works on a run, as far as its signs of life tell."""
        now = self._now() if now is None else now
        # A sign of life far in the future is that of a clock that was put back since.
        return row.state in ACTIVE and abs(now - row.alive_at) < STALE_S
