"""A real PostgreSQL for tests: Debian's packages, a cluster of its own, thrown away at the end."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

USER, PASSWORD = "hansa", "a-word-nobody-may-see"
_NUMBERS = count()


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's newest programs, where they are installed."""
    found = [
        path.parent
        for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")
        if path.with_name("pg_ctl").exists()
    ]
    return max(found, key=lambda path: float(path.parent.name), default=None)


@dataclass(frozen=True)
class Postgres:
    """A cluster on a free port of 127.0.0.1; passwords are asked for there."""

    binaries: Path
    folder: Path
    port: int
    account: str | None  # PostgreSQL refuses to run as root

    def call(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs; its words go to a file, since a server keeps them."""
        log = self.folder / "programs.log"
        with log.open("ab") as words:
            done = subprocess.run(
                [self.binaries / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd=self.folder,
                user=self.account,
                group=None if self.account is None else pwd.getpwnam(self.account).pw_gid,
                extra_groups=None if self.account is None else [],
                check=False,
                timeout=120,
            )
        assert done.returncode == 0, f"{program}: {log.read_text(errors='replace')[-2000:]}"

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=on"
        log = str(self.folder / "server.log")
        self.call("pg_ctl", "start", "-w", "-D", self._data, "-l", log, "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; mode "immediate" is a crash."""
        self.call("pg_ctl", "stop", "-w", "-D", self._data, "-m", mode)

    def make(self) -> None:
        """Make the cluster."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self.account is not None:
            shutil.chown(secret, self.account)
        login = ("-U", USER, "--auth-local=trust", "--auth-host=scram-sha-256")
        self.call("initdb", "-D", self._data, "-E", "UTF8", *login, f"--pwfile={secret}")

    def connect(self, database: str = "postgres") -> "psycopg.Connection[Any]":
        """Return a connection of its own, in which every statement is a transaction."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
        )

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        name = f"test_{os.getpid()}_{next(_NUMBERS)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    @property
    def _data(self) -> str:
        return str(self.folder / "data")


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Give a cluster of its own, to tests that stop it too."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    account = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="hansa-pg-"))  # short: it holds a Unix socket
    if account is not None:
        shutil.chown(folder, account, pwd.getpwnam(account).pw_gid)
    cluster = Postgres(programs, folder, _free_port(), account)
    try:
        cluster.make()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop("immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Give the cluster that a module's tests share; each makes a database of its own."""
    with running_postgres() as cluster:
        yield cluster


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of an empty database, of both kinds in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'runs.sqlite'}"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.new_database()
