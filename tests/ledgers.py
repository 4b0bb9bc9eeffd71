"""A merchant's ledger and a witness beside it, with clocks that a test sets: no network."""

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.budget import Budget, Charge, Occasion
from common.chain import Head
from common.events import Event, GaussianSum
from common.identity import Identity
from common.ledger import Ledger, whole_run
from server.witness import Witness

CONTRACT, OTHER_CONTRACT, MODEL = "c" * 64, "d" * 64, "e" * 64
DELTA = 1e-5
BUDGET = Budget(1.0, DELTA)
DAY = 86_400.0
COORDINATOR = Identity.generate("coordinator")


def charge(sigma: float = 20.0, count: int = 1, stage: str = "update") -> Charge:
    """Return a charge that costs the same towards everybody."""
    event = GaussianSum(sigma, 1.0, count)
    return Charge(stage, event, event)


def charge_of(event: Event, towards_server: Event | None = None, stage: str = "update") -> Charge:
    """Return a charge for an event."""
    return Charge(stage, event, event if towards_server is None else towards_server)


def occasion(
    number: int = 1,
    run: str = "run",
    attempt: int = 0,
    stage: str = "update",
    contract: str = CONTRACT,
) -> Occasion:
    """Return what a release is for."""
    return Occasion(run, stage, number, attempt, contract)


@dataclass
class Clock:
    """A clock that stands until it is set."""

    now: float = 1.8e9

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return self.now


@dataclass
class Shop:
    """One merchant: files in a folder, a key, its witness, and everybody's clock."""

    folder: Path
    budget: Budget = BUDGET
    identity: Identity = field(default_factory=lambda: Identity.generate("shop"))
    clock: Clock = field(default_factory=Clock)
    witness_clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "ledger.sqlite"
        self.key = self.identity.public
        self.witness = self.opened_witness()
        self.ledger = self.opened()

    def opened(self, path: Path | None = None) -> Ledger:
        """Open the ledger once more, as another process would."""
        path = path or self.path
        return Ledger(path, self.budget, self.identity, COORDINATOR.public, self.clock)

    def opened_witness(self) -> Witness:
        """Open the witness's record once more, as another process would."""
        return Witness(self.folder / "witness.sqlite", COORDINATOR, self.witness_clock)

    @property
    def latest(self) -> bytes:
        """Return what the witness saw last, countersigned."""
        return self.witness.latest(self.key)

    def refusal(self, head: Head) -> str:
        """Let the witness see a head; return why it refuses, or nothing."""
        return self.witness.countersign({"shop": (self.key, head)}).get("shop", "")

    def reserve(
        self,
        run: str = "run",
        charges: Sequence[Charge] = (),
        last: tuple[str, int] = ("update", 99),
        ledger: Ledger | None = None,
    ) -> Head:
        """Reserve a run, and let both sides know that the witness saw it."""
        ledger = ledger or self.ledger
        head = ledger.reserve(
            whole_run(run, CONTRACT), charges or [charge(20.0, 5)], last, self.latest
        )
        assert self.refusal(head) == ""
        ledger.accept(self.latest)
        return head

    def release(
        self,
        number: int = 1,
        run: str = "run",
        attempt: int = 0,
        cost: Charge | None = None,
        step: str = "",
    ) -> Head:
        """Release once, with the witness in step."""
        head = self.ledger.release(
            occasion(number, run, attempt), cost or charge(), MODEL, step, self.latest
        )
        assert self.refusal(head) == ""
        return head

    def kinds(self, ledger: Ledger | None = None) -> list[str]:
        """Return the kinds of all entries."""
        return [entry.document["kind"] for entry in (ledger or self.ledger).entries()]

    def copy(self, name: str) -> Path:
        """Copy the ledger's file as a careful person would: closed, whole."""
        self.ledger.close()
        target = self.folder / name
        shutil.copy(self.path, target)
        return target

    def put_back(self, copy: Path) -> None:
        """Put a copy back in the place of the ledger, under a process that still uses it."""
        for end in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        shutil.copy(copy, self.path)


@contextmanager
def behind_its_back(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a ledger's tables without triggers, as whoever owns the file can; commit."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'")
        for (name,) in triggers.fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        connection.commit()
