"""Who runs in a folder: one lock, one state file, and how to start and stop from outside."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import NotReady, RunError, ServiceError
from common.logs import last_error

_LOCK, _STATE = "lock", "state.json"
_PATIENCE_S = 1.0  # somebody who only looks holds the lock for a moment
_POLL_S = 0.1


@contextmanager
def locked(folder: Path, name: str = _LOCK) -> Iterator[None]:
    """Be the only one in a folder; the lock ends with the process, whatever ends that.

    Raises:
        ServiceError: Somebody else is; the message says who.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + _PATIENCE_S
        while not _try(handle, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise ServiceError(
                    f"{folder / name}: process {_owner(folder, name)} runs here already; there "
                    "can be only one: stop it first"
                )
            time.sleep(_POLL_S / 2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(folder: Path, name: str = _LOCK) -> int:
    with suppress(OSError, ValueError):
        return int((folder / name).read_text(encoding="ascii"))
    return 0


def is_locked(folder: Path, name: str = _LOCK) -> bool:
    """Tell whether somebody holds the lock of a folder."""
    try:
        handle = os.open(folder / name, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def state_of(folder: Path) -> dict[str, Any] | None:
    """Return what the supervisor of a folder says of itself; None where none runs."""
    if not is_locked(folder):
        return None
    owner = _owner(folder)
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    if isinstance(state, dict) and state.get("pid") == owner:
        return state
    return {"pid": owner, "started_at": None, "children": {}}  # it has only just started


def stop(folder: Path, timeout_s: float = 30) -> bool:
    """End the supervisor of a folder and its children; by force if it does not end in time.

    Returns:
        Whether one ran.

    Raises:
        ServiceError: It belongs to somebody else.
    """
    state = state_of(folder)
    if state is None:
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _send(state["pid"], number):
            return True
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not is_locked(folder):
                return True
            time.sleep(_POLL_S)
    raise ServiceError(f"{folder}: process {state['pid']} does not end, even when it is killed")


def restart(folder: Path, child: str) -> bool:
    """Have the supervisor of a folder start a child anew, by ending it in good order.

    Returns:
        Whether one ran.

    Raises:
        ServiceError: It belongs to somebody else.
    """
    state = state_of(folder)
    pid = (state or {"children": {}})["children"].get(child, {}).get("pid")
    return bool(pid) and _send(pid, signal.SIGTERM)


def _send(pid: int, number: int) -> bool:
    """Send a signal; tell whether there was a process to get it."""
    if pid <= 0:
        raise ServiceError("the supervisor has only just started; try again")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ServiceError(
            f"process {pid} belongs to another user; stop it as that user, or as root"
        ) from None
    return True


def start_in_background(
    command: Sequence[str],
    folder: Path,
    log: Path,
    ready: Callable[[], bool],
    timeout_s: float,
) -> int:
    """Start a supervisor that stays when this process ends, and wait until all is well.

    Args:
        command: What to run.
        folder: Its folder; it is not started where one runs.
        log: Takes what it prints.
        ready: Whether all is well.
        timeout_s: How long to wait for that.

    Returns:
        Its process id.

    Raises:
        ServiceError: One runs already.
        NotReady: It runs, but was not ready in time; it goes on trying.
        RunError: It ended; the message has the end of its log.
    """
    state = state_of(folder)
    if state is not None:
        raise ServiceError(f"{folder}: process {state['pid']} runs here already")
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = log.stat().st_size if log.exists() else 0
    pid = _detached(command, log)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            raise RunError(
                f"it ended at once (status {os.waitstatus_to_exitcode(status)}): "
                f"{last_error(log, before) or f'{log} says nothing'}"
            )
        if ready():
            return pid
        time.sleep(_POLL_S)
    raise NotReady(f"it runs (process {pid}) but was not ready within {timeout_s:g} s")


def _detached(command: Sequence[str], log: Path) -> int:
    """Start a process in a session of its own, without a terminal."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        command[0],
        list(command),
        os.environ,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
