"""One SQLite file that several threads, objects and processes use at once."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.errors import LedgerError
from common.sqlite_file import SqliteFile

SCHEMA = "CREATE TABLE IF NOT EXISTS number (value INTEGER) STRICT;"


def opened(path: Path, *, log: bool = True) -> SqliteFile:
    """Return an open file whose failures are ledgers'."""
    file = SqliteFile(path, lambda what: LedgerError(f"cannot be {what}"), log=log)
    file.open(SCHEMA)
    return file


def add(file: SqliteFile, value: int) -> None:
    """Write a number."""
    with file.transaction("OFF") as connection:
        connection.execute("INSERT INTO number VALUES (?)", (value,))


def add_and_divide_by_zero(file: SqliteFile) -> None:
    """Write a number, and fail before the transaction is over."""
    with file.transaction("OFF") as connection:
        connection.execute("INSERT INTO number VALUES (1)")
        connection.execute("INSERT INTO number VALUES (?)", (1 // 0,))


def numbers(path: Path) -> list[int]:
    """Return all numbers, read by somebody else."""
    with closing(sqlite3.connect(path)) as connection:
        return [value for (value,) in connection.execute("SELECT value FROM number")]


@pytest.mark.parametrize("log", [True, False])
class TestTransaction:
    """SqliteFile.transaction."""

    def test_committed(self, tmp_path: Path, log: bool) -> None:
        """What is written is there for others when the transaction is over, not before."""
        file = opened(tmp_path / "one", log=log)
        with file.transaction("FULL") as connection:
            connection.execute("INSERT INTO number VALUES (1)")
            assert numbers(tmp_path / "one") == []
        assert numbers(tmp_path / "one") == [1]
        assert (tmp_path / "one-wal").exists() == log

    def test_undone(self, tmp_path: Path, log: bool) -> None:
        """Whatever is raised, nothing stays, and the next transaction works."""
        file = opened(tmp_path / "one", log=log)
        with pytest.raises(ZeroDivisionError):
            add_and_divide_by_zero(file)
        add(file, 2)
        assert numbers(tmp_path / "one") == [2]

    def test_failures(self, tmp_path: Path, log: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """SQLite's errors are the owner's: at the start, and when something is written."""
        file = opened(tmp_path / "one", log=log)
        with pytest.raises(LedgerError, match=r"cannot be written .*TEXT"):
            add(file, "text")  # type: ignore[arg-type]
        monkeypatch.setattr("common.sqlite_file._PATIENCE_S", 0.01)
        file.close()
        with closing(sqlite3.connect(tmp_path / "one", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError, match=r"cannot be used .*locked"):
                add(file, 1)
        add(file, 2)
        assert numbers(tmp_path / "one") == [2]

    def test_an_undoing_that_fails(
        self, tmp_path: Path, log: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody has to wait for this process to end, and the next transaction works."""

        class Denying(sqlite3.Connection):
            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                if sql in {"COMMIT", "ROLLBACK"}:
                    raise sqlite3.OperationalError("denied")
                return super().execute(sql, *rest)

        path, connect = tmp_path / "one", sqlite3.connect
        file = opened(path, log=log)
        file.close()
        with monkeypatch.context() as patch:
            patch.setattr("sqlite3.connect", lambda *a, **k: connect(*a, factory=Denying, **k))
            with pytest.raises(LedgerError, match=r"cannot be written \(denied\)"):
                add(file, 1)
        monkeypatch.setattr("common.sqlite_file._PATIENCE_S", 0.01)
        add(opened(path, log=log), 2)
        add(file, 3)
        assert numbers(path) == [2, 3]

    def test_another_file_at_the_path(self, tmp_path: Path, log: bool) -> None:
        """A file that is put there is the one that is written to; one that is gone is an error."""
        path = tmp_path / "one"
        file, other = opened(path, log=log), opened(tmp_path / "other", log=log)
        add(file, 1)
        add(other, 7)
        other.close()
        file.close()
        add(file, 2)
        (tmp_path / "other").replace(path)
        for rest in tmp_path.glob("one-*"):
            rest.unlink()
        add(file, 8)
        assert numbers(path) == [7, 8]
        file.close()
        path.unlink()
        with pytest.raises(LedgerError, match="cannot be used"):
            add(file, 9)

    def test_two_hands(self, tmp_path: Path, log: bool) -> None:
        """Threads of one object, and a second object, take turns; nothing is lost."""
        path = tmp_path / "one"
        files = [opened(path, log=log), opened(path, log=log)]

        def count(file: SqliteFile) -> None:
            for _ in range(40):
                with file.transaction("OFF") as connection:
                    (most,) = connection.execute("SELECT coalesce(max(value), 0) FROM number")
                    connection.execute("INSERT INTO number VALUES (?)", (most[0] + 1,))

        threads = [threading.Thread(target=count, args=(files[n % 2],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert numbers(path) == list(range(1, 161))


def test_a_copy_over_a_file_without_log(tmp_path: Path) -> None:
    """As many transactions, the same inode: nothing of what was there before is written over it."""
    paths = tmp_path / "one", tmp_path / "other"
    file, other = (opened(path, log=False) for path in paths)
    for number in range(300):
        add(file, number)
        add(other, -number)
    paths[0].write_bytes(paths[1].read_bytes())
    add(file, 7)
    assert numbers(paths[0]) == [*range(0, -300, -1), 7]
    with closing(sqlite3.connect(paths[0])) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_what_is_no_database_stays_closed(tmp_path: Path) -> None:
    """Opening says what is wrong in SQLite's own words."""
    (tmp_path / "one").write_bytes(b"no database, but as long as one must be to be looked at" * 90)
    with pytest.raises(sqlite3.DatabaseError):
        opened(tmp_path / "one")
