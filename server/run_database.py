"""The database of the run store: SQLite or PostgreSQL, opened, migrated, and its errors told.

Every transaction has a connection of its own: a database server may restart between two of
them, and a process that forks shares none. A transaction that was committed is on the disk.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from common.errors import ArchiveError

_LOG = logging.getLogger(__name__)
_LOCK_S = 15  # how long one process waits for another's transaction
_RETRY_S = 30.0  # how long a run waits for a database server that restarts
_ADVISORY_LOCK = 0x68616E7361  # "hansa": one process migrates at a time
_BEGIN = {"read": "BEGIN", "write": "BEGIN IMMEDIATE", "bare": ""}
_SECRETS = ("password", "sslpassword")
_FORMS = "write sqlite:///FILE or postgresql://USER@HOST/DATABASE"
_ADVICE = (
    ("is full", "make room on its disk, then go on with `hansa server resume`"),
    ("no space left", "make room on its disk, then go on with `hansa server resume`"),
    ("is locked", "another process holds it: let it end or stop it, then try again"),
    ("lock timeout", "another process holds it: let it end or stop it, then try again"),
    ("i/o error", "its disk may be full or broken; make room or repair it, then try again"),
    ("not a database", "name another file, or put back a copy"),
    ("malformed", "put back a copy of the file, or name a new one"),
    ("readonly", "check who may write in its folder"),
    ("unable to open", "check its folder, and who may write there"),
    ("permission denied", "give its user the right to make tables and write to them"),
    ("connect", "check that the server runs, and the host, user and password in the URL"),
)
_POSTGRES = {
    "synchronous_commit": "on",  # whatever the server's default is
    "lock_timeout": f"{_LOCK_S}s",
    # A process that sleeps or vanished in the middle of a transaction gives its locks back before
    # others give up.
    "idle_in_transaction_session_timeout": "10s",
    "tcp_keepalives_idle": "4",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
_SET_UP_POSTGRES = "SELECT " + ", ".join(
    f"set_config('{name}', '{value}', true)" for name, value in _POSTGRES.items()
)

T = TypeVar("T")


class Database:
    """A database that holds the run store's tables, of the newest revision.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`.

    Raises:
        ArchiveError: It cannot be opened, or is of a newer revision.
    """

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _engine_of(self._url)
        if self._is_sqlite:
            _make_file(Path(self._url.database or ""))
            self._told(self._write_ahead)
        self._told(self._migrate)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Return what a function reads in one transaction."""
        return self._told(lambda: self._transaction("read", work))

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run a function in one transaction that excludes other writers of the same rows.

        Raises:
            ArchiveError: Nothing was written.
        """
        return self._told(lambda: self._transaction("write", work))

    def write_patiently(self, work: Callable[[Connection], T]) -> T:
        """Do the same, again where a server went away; `work` may be done twice.

        Raises:
            ArchiveError: The server did not come back in time, or refuses.
        """
        return self._told(lambda: self._again(work))

    def empty_log(self) -> None:
        """Empty SQLite's write-ahead log, in which pages that were overwritten live on."""
        if not self._is_sqlite:
            return
        try:
            with self._connection("bare") as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 1000")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()
        except DBAPIError as error:  # what was committed stays so; the next save tries again
            _LOG.warning("%s: its log cannot be emptied (%s)", _shown(self._url), error.orig)

    def _connection(self, mode: str) -> Connection:
        return self._engine.connect().execution_options(hansa_begin=mode)

    def _transaction(self, mode: str, work: Callable[[Connection], T]) -> T:
        with self._connection(mode) as connection, connection.begin():
            return work(connection)

    def _again(self, work: Callable[[Connection], T]) -> T:
        """Repeat a transaction while the server is away; SQLite's file never is."""
        until, pause_s = time.monotonic() + _RETRY_S, 0.1
        while True:
            try:
                return self._transaction("write", work)
            except DBAPIError as error:
                if self._is_sqlite or not _is_away(error) or time.monotonic() > until:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _write_ahead(self) -> None:
        """Switch a SQLite file to a write-ahead log; that it has one is written in it."""
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                with self._connection("bare") as connection:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
                break
            except OperationalError as error:  # SQLite does not wait by itself here
                if "locked" not in str(error.orig) or time.monotonic() > until:
                    raise
            time.sleep(0.05)
        if mode != "wal":
            raise ArchiveError(
                f"{_shown(self._url)}: cannot keep a write-ahead log there (it is {mode!r}); "
                "name a file on a local disk"
            )

    def _migrate(self) -> None:
        from server.migrations import migrate, revision_of, revisions

        known = revisions()

        def check(connection: Connection) -> bool:
            """Return whether there is something to do."""
            found = revision_of(connection)
            if found is not None and found not in known:
                raise ArchiveError(
                    f"{_shown(self._url)}: was written by a newer Hansa (tables of revision "
                    f"{found}, this one knows them up to {known[-1]}); install that version"
                )
            return found != known[-1]

        def apply(connection: Connection) -> None:
            if not self._is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
            if check(connection):  # no other process did it meanwhile
                migrate(connection)

        if self._transaction("read", check):
            self._transaction("write", apply)

    def _told(self, work: Callable[[], T]) -> T:
        """Return what a function returns; tell a database's errors to a person."""
        try:
            return work()
        except SQLAlchemyError as error:
            raise ArchiveError(_explained(error, self._url)) from None


def _parsed(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ArchiveError(f"the URL of the run store cannot be read; {_FORMS}") from None
    if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in {"sqlite", "sqlite+pysqlite"}:
        raise ArchiveError(f"{_shown(url)}: no run store can be kept there; {_FORMS}")
    if (url.database or ":memory:").startswith((":memory:", "file:")):
        raise ArchiveError(f"{_shown(url)}: a run store outlives its process; {_FORMS}")
    return url


def _engine_of(url: URL) -> Engine:
    is_sqlite = url.get_backend_name() == "sqlite"
    defaults: dict[str, Any] = {"timeout": _LOCK_S}
    options: dict[str, Any] = {}
    if not is_sqlite:
        options = {"isolation_level": "READ COMMITTED"}
        defaults = {  # a server that vanished is noticed within half a minute
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
    arguments = {name: value for name, value in defaults.items() if name not in url.query}
    try:
        engine = create_engine(
            url, poolclass=NullPool, hide_parameters=True, connect_args=arguments, **options
        )
    except ImportError:
        raise ArchiveError(
            f"{_shown(url)}: the driver of PostgreSQL is missing; "
            "install it with: pip install 'hansa[postgres]'"
        ) from None
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgres)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    for pragma in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    statement = _BEGIN[connection.get_execution_options()["hansa_begin"]]
    if statement:
        connection.exec_driver_sql(statement)


def _begin_postgres(connection: Connection) -> None:
    """Set a transaction up so that it is on the disk in the end, and blocks nobody for ever."""
    connection.exec_driver_sql(_SET_UP_POSTGRES)


def _make_file(path: Path) -> None:
    """Make sure that only its owner reads a new file."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ArchiveError(
            f"{path}: the run store cannot be opened ({error.strerror}); check its folder, and "
            "who may write there"
        ) from None


def _is_away(error: DBAPIError) -> bool:
    """Return whether a server could not be reached, or went away in the middle."""
    unreached = isinstance(error, OperationalError) and error.statement is None
    return error.connection_invalidated or unreached


def _shown(url: URL) -> str:
    """Return a URL without passwords."""
    hidden = {name: "***" for name in _SECRETS if name in url.query}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _explained(error: SQLAlchemyError, url: URL) -> str:
    """Return what went wrong, where, and what to do; no password, no parameter."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    words = " ".join(str(cause).split())
    secrets = [url.password, *(url.query.get(name) for name in _SECRETS)]
    for secret in filter(None, secrets):
        words = words.replace(str(secret), "***")
    advice = next((advice for word, advice in _ADVICE if word in words.lower()), "")
    told = f"{_shown(url)}: the run store cannot be used ({words})"
    return f"{told}; {advice}" if advice else told
