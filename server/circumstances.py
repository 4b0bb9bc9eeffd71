"""What a deployed run has and a simulated one does not need: checkpoints, patience."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import RunError
from server.attendance import Enrolled


class Keeper(Protocol):
    """Where a run's checkpoints are kept, and by whom it can be stopped."""

    @property
    def run(self) -> str:
        """Return the run's name."""

    @property
    def checkpoint(self) -> bytes | None:
        """Return the last checkpoint; None where the run begins."""

    def save(self, checkpoint: bytes, *, round: int, epsilon: float, cohort: int) -> None:
        """Keep a checkpoint, whole or not at all; raise if another process took over."""

    def beat(self, message: str | None = None) -> bool:
        """Say that the run goes on, and with what; return whether it is to stop."""

    def attendance(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Tell of merchants what they do, and what went wrong last."""


@dataclass(frozen=True)
class Circumstances:
    """What a deployed run has and a simulated one does not need.

    Attributes:
        keeper: Keeps checkpoints; None: the run cannot be taken up.
        enrolled: What the registry knows of merchants.
        wait_s: How long to wait for merchants before the run begins.
        resend_s: See `Patience`.
    """

    keeper: Keeper | None = None
    enrolled: Enrolled = field(default_factory=Enrolled)
    wait_s: float = 0.0
    resend_s: float | None = None


class Stopped(RunError):
    """The run was asked to stop; its last checkpoint lets it go on."""


def go_on(keeper: Keeper, message: str | None = None) -> None:
    """Say that a run goes on, and with what.

    Raises:
        Stopped: It was asked to stop.
    """
    if keeper.beat(message):
        raise Stopped("the run was asked to stop; it can go on from its last checkpoint")


SIMULATED = Circumstances()
