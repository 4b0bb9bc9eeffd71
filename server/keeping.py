"""The coordinator's side of the run store: checkpoints, signs of life, who takes part."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.attendance import Enrolled
from server.registry import NAME, Registry
from server.runs import MerchantRow, RunLease

logger = logging.getLogger("hansa.coordinator")

_BEAT_S = 2.0


@dataclass
class LeaseKeeper:
    """Keeps a run in the run store.

    Attributes:
        lease: The right to write.
        rounds: Of the contract.
    """

    lease: RunLease
    rounds: int
    _round: int = 0
    _beaten: float = field(default=0.0)
    _stop: bool = False
    _running: bool = False
    _told: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Return the run's name."""
        return self.lease.run

    @property
    def checkpoint(self) -> bytes | None:
        """Return the last checkpoint; None where the run begins."""
        return self.lease.checkpoint

    def save(self, checkpoint: bytes, *, round: int, epsilon: float, cohort: int) -> None:
        """Keep a checkpoint, whole or not at all."""
        if not self._running:
            self.lease.running()
            self._running = True
        self._round = round
        self.lease.save(checkpoint, round=round, epsilon=epsilon, cohort=cohort)
        logger.info(
            "checkpoint",
            extra={"run": self.run, "round": round, "epsilon": epsilon, "cohort": cohort},
        )
        self.beat(f"round {min(round + 1, self.rounds)} of {self.rounds}")

    def beat(self, message: str | None = None) -> bool:
        """Say that the run goes on, now and then; return whether it is to stop."""
        now = time.monotonic()
        if message is not None or now - self._beaten >= _BEAT_S:
            self._beaten = now
            self._stop = self.lease.beat(message)
        return self._stop

    def attendance(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Tell of merchants what they do, and what went wrong last."""
        now, told = time.time(), {name: (self._round, *state) for name, state in states.items()}
        changed = {name: row for name, row in told.items() if self._told.get(name) != row}
        self.lease.merchants(
            [
                MerchantRow(name, state, number, error, now)
                for name, (number, state, error) in changed.items()
            ]
        )
        for name, (number, state, error) in changed.items():
            known = self._told.get(name, (0, "", ""))
            if known[1:] != (state, error):
                about = {"run": self.run, "round": number, "merchant": name}
                logger.info("%s%s", state, f": {error}" if error else "", extra=about)
        self._told.update(changed)


def registered(folder: Path) -> Enrolled:
    """Return what the registry of a federation's folder knows of merchants; nothing without one."""
    if not (folder / NAME).is_file():
        return Enrolled()
    registry = Registry(folder)
    return Enrolled(registry.added_at(), registry.nodes())
