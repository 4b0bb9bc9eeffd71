"""What the run store holds, as frozen rows, and how they are read."""

import hashlib
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Connection

from common.errors import ArchiveError, RunError
from server.run_tables import CHECKPOINTS, RUNS

_MOST_CHARACTERS = 500  # of a text that people read
_LOG = logging.getLogger(__name__)


class RunState(StrEnum):
    """Where a run is. Only a finished one cannot be resumed."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


ACTIVE = {RunState.WAITING, RunState.RUNNING}


@dataclass(frozen=True)
class RunRow:
    """What is known of a run; times in seconds since 1970."""

    run: str
    contract: str  # its SHA-256
    state: RunState
    reason: str  # of a failure or a stop
    flower_run: str
    round: int
    rounds: int
    epsilon: float  # spent so far by a merchant that answered everything
    cohort: int
    message: str  # the last one: one line
    started_at: float
    updated_at: float  # last checkpoint or change of state
    alive_at: float  # last sign of life of its process
    epoch: int
    stop_requested: bool
    bundle: str


@dataclass(frozen=True)
class MerchantRow:
    """How a merchant fares in a run."""

    merchant: str
    state: str  # a few words: "takes part", "refused", "silent", "late", "out"
    round: int
    last_error: str
    seen_at: float


@dataclass(frozen=True)
class Checkpoint:
    """From where a run goes on."""

    round: int
    body: bytes | None  # None: nothing was saved yet
    note: str  # what a person should know of it


def read_row(connection: Connection, run: str, *, lock: bool = False) -> RunRow:
    """Return the row of a run; `lock` keeps it as it is until the transaction ends.

    Raises:
        RunError: There is none of this name.
    """
    wanted = select(RUNS).where(RUNS.c.run == run)
    found = connection.execute(wanted.with_for_update() if lock else wanted).mappings().first()
    if found is None:
        raise RunError(f"run {run}: is not in the run store; `hansa server status` lists its runs")
    return run_row(found)


def run_row(found: Any) -> RunRow:
    """Return a row of the table as a value."""
    return RunRow(**{**found, "state": RunState(found["state"])})


def last_checkpoint(connection: Connection, run: str) -> Checkpoint:
    """Return the newest checkpoint of a run that is whole.

    Raises:
        ArchiveError: There are some, and all are damaged.
    """
    newest_first = CHECKPOINTS.c.number.desc()
    wanted = select(CHECKPOINTS).where(CHECKPOINTS.c.run == run).order_by(newest_first)
    found = connection.execute(wanted).mappings().all()
    note = ""
    for row in found:
        if hashlib.sha256(row["body"]).hexdigest() == row["sha256"]:
            return Checkpoint(int(row["round"]), bytes(row["body"]), note)
        note = f"the checkpoint of round {row['round']} is damaged; goes on from the one before"
        _LOG.warning("run %s: %s", run, note)
    if found:
        raise ArchiveError(
            f"run {run}: its checkpoints are damaged; put back a copy of the run store, or begin "
            "a new run"
        )
    return Checkpoint(0, None, note)


def one_line(text: str) -> str:
    """Return a text as one line without signs that a database or a terminal would trip over."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 3] + "..."
