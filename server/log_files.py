"""Keeps logs from filling the disk.

What services print (NAME.log) is copied to NAME.log.1 when it grew too long, and emptied in
place: the process that writes has it open for appending and goes on at the new end. What it
prints between the two steps is lost. Structured logs (NAME.jsonl) are moved, and nothing of them
is lost: their writers notice (`common.logs`).
"""

import logging
import os
import shutil
import threading
from pathlib import Path

LIMIT_BYTES = 10 * 1024 * 1024
KEPT = 3
_LOOK_S = 30.0
_LOG = logging.getLogger(__name__)


def rotate(path: Path, limit_bytes: int = LIMIT_BYTES, kept: int = KEPT) -> bool:
    """Put a file's content aside if it is too long; return whether it was.

    Raises:
        OSError: The disk does not let it.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    for number in range(kept - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    aside = path.with_name(f"{path.name}.1")
    if path.suffix == ".jsonl":
        path.replace(aside)
        return True
    try:
        shutil.copyfile(path, aside)
        aside.chmod(0o600)
    finally:
        os.truncate(path, 0)  # a full disk is emptied rather than left full
    return True


class LogKeeper:
    """Rotates the logs of a folder until it is closed."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="log-files", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _keep(self) -> None:
        while not self._closed.wait(_LOOK_S):
            for path in (*self._folder.glob("*.log"), *self._folder.glob("*.jsonl")):
                try:
                    rotate(path, self._limit_bytes)
                except OSError as error:
                    _LOG.warning("%s: cannot be rotated (%s)", path, error.strerror)


def last_lines(path: Path, count: int = 12, most_bytes: int = 16_384) -> list[str]:
    """Return the last lines of a file; none where it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - most_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-count:]
