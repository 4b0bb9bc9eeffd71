"""One process that runs under a supervisor: what it is, and how it is started and signalled."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import tether

_LOG_BYTES = 20 * 1024 * 1024  # of a log that is moved aside at a start


@dataclass(frozen=True)
class Child:
    """A process that should run."""

    name: str
    command: tuple[str, ...]
    log: Path  # what it prints is appended here
    env: dict[str, str] = field(default_factory=dict)  # beside the supervisor's own
    healthy: Callable[[], bool] | None = None  # None: whoever runs is healthy
    start_s: float = 60  # until it must be healthy at first
    hang_s: float = 15  # unhealthy for so long, it is killed and started again
    user: str | None = None  # who it runs as; None: as the supervisor does
    after: tuple[str, ...] = ()  # children that must be healthy before it is started


def tethered(
    command: Sequence[str], number: int = signal.SIGKILL, user: str | None = None
) -> list[str]:
    """Return a command that runs another one, which gets a signal when this process ends."""
    own = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), str(int(number))]
    return [*own, user or "", *command]


def started(child: Child) -> tuple[subprocess.Popen[bytes], int]:
    """Start a child in a group of its own; return it and how long its log was."""
    child.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if child.log.exists() and child.log.stat().st_size > _LOG_BYTES:
        child.log.replace(child.log.with_name(f"{child.log.name}.1"))
    handle = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(  # noqa: S603  # our own commands, no shell
            tethered(child.command, user=child.user),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            env={**os.environ, **child.env},
            start_new_session=True,
        )
        return process, os.fstat(handle).st_size
    finally:
        os.close(handle)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a child and to all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # it has ended already, and so has all that it started


def wait_for(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait until a child has ended, but no longer than that."""
    try:
        process.wait(max(timeout_s, 0.0))
    except subprocess.TimeoutExpired:
        return  # the caller asks it to end in another way
