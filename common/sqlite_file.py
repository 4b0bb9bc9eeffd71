"""One SQLite file that several processes may write to.

Used by the ledger and by its witness. A transaction holds SQLite's write lock from its start, so
that what it reads holds until it has written; of several threads one at a time is in it.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BROKEN = (sqlite3.Error, UnicodeDecodeError)  # the latter where its message holds broken bytes

_PATIENCE_S = 30.0  # to wait for another process that writes


class SqliteFile:
    """A file and the connection to it, which is made anew when another file lies at the path.

    A file with a log stays open between transactions. One without is opened for each: what was
    copied over it is read, and nothing that SQLite kept of what was there before.

    Args:
        path: The file; made when it is not there.
        failure: Makes an exception of "used (why)" or "written (why)", to be read after "cannot
            be".
        log: Whether a write-ahead log lies beside the file: what is written is on the disk with
            one wait instead of several.

    Attributes:
        lock: Held by the thread that is in a transaction.
    """

    def __init__(self, path: Path, failure: Callable[[str], Exception], *, log: bool) -> None:
        self.lock = threading.RLock()
        self._path, self._failure, self._log = path, failure, log
        self._connection: sqlite3.Connection | None = None
        self._synchronous = ""  # what the connection was told last
        self._file: tuple[int, int] | None = None  # that it is connected to

    def open(self, schema: str) -> None:
        """Connect, and make what the schema says where it is not there.

        Raises:
            OSError, sqlite3.Error, UnicodeDecodeError: It cannot be done; nothing stays open.
        """
        try:
            self._connection, self._synchronous = self._connect(), ""
            self._connection.executescript(f"BEGIN IMMEDIATE;{schema}COMMIT;")
            self._file = _file_at(self._path)
        except (OSError, *BROKEN):
            self.close()
            raise

    def close(self) -> None:
        """Close the file; the next transaction opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self, synchronous: str) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; commit at the end, undo on any exception.

        Args:
            synchronous: SQLite's word for what a commit waits for.

        Raises:
            Exception: What `failure` makes, where the file cannot be used or written.
        """
        with self.lock:
            try:
                connection = self._begun(synchronous)
                yield connection
                connection.execute("COMMIT")
            except BROKEN as error:
                raise self._failure(f"written ({error})") from None
            finally:
                self._end()

    def _begun(self, synchronous: str) -> sqlite3.Connection:
        try:
            connection = self._connected()
            if self._synchronous != synchronous:
                connection.execute(f"PRAGMA synchronous = {synchronous}")
                self._synchronous = synchronous
            connection.execute("BEGIN IMMEDIATE")
        except (OSError, *BROKEN) as error:
            raise self._failure(f"used ({error})") from None
        return connection

    def _end(self) -> None:
        """Undo what is not committed; whatever happens, no lock is held any more."""
        connection = self._connection
        if connection is None:
            return
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except BROKEN:
            self.close()
        if not self._log:
            self.close()

    def _connected(self) -> sqlite3.Connection:
        """Return the connection; a new one if another file is at the path by now."""
        there = _file_at(self._path)
        if self._file != there:
            self.close()
        if self._connection is None:
            self._connection, self._synchronous = self._connect(), ""
            self._file = there
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, timeout=_PATIENCE_S, check_same_thread=False
        )
        patience = time.monotonic() + _PATIENCE_S
        while self._log:
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


def _file_at(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one that is put at its path."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
