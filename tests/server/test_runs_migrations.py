"""Tests of the run store's migrations: from every earlier revision, with runs in it."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool

from common.errors import ArchiveError
from server.migrations import migrate, revision_of, revisions
from server.run_tables import METADATA, VERSION_TABLE
from server.runs import MerchantRow, RunState, RunStore
from tests.postgres import database_url, postgres

__all__ = ["database_url", "postgres"]  # fixtures

ROOT = Path(__file__).parent.parent.parent
RUN_OF_0001 = """
    INSERT INTO hansa_run VALUES ('run-1', 'c0ffee', 'running', '', '77', 2, 3, 0.5, 5,
        100.0, 101.0, 102.0, 4, :stop_requested, '')
"""
CHECKPOINT_OF_0001 = """
    INSERT INTO hansa_checkpoint VALUES ('run-1', 2, 2, 101.0,
        'fbddd9cb323e4849bad1ac0b512e35fab508b3c4581e7bee6967b8ceff9c812e', :body)
"""
OPEN = "import sys; from server.runs import RunStore; RunStore(sys.argv[1])"


@pytest.fixture
def engine(database_url: str) -> Engine:
    """Give the same database without the store."""
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    return create_engine(url, poolclass=NullPool)


def differences(connection: Connection) -> list[object]:
    """Return how the tables of a database differ from those of the models."""
    options = {"version_table": VERSION_TABLE, "compare_server_default": True}
    context = MigrationContext.configure(connection, opts=options)
    return list(compare_metadata(context, METADATA))


def test_revisions_are_one_line() -> None:
    """Every revision follows the one before it."""
    assert revisions() == [f"{number:04}" for number in range(1, len(revisions()) + 1)]


def test_migrated_tables_are_the_models(database_url: str, engine: Engine) -> None:
    """A new store has the tables, columns and types that the program names, and no others."""
    RunStore(database_url)
    with engine.connect() as connection:
        assert revision_of(connection) == revisions()[-1]
        assert differences(connection) == []


@pytest.mark.parametrize("revision", revisions()[:-1])
def test_an_earlier_revision_differs(revision: str, engine: Engine) -> None:
    """The comparison sees what a migration changes."""
    with engine.begin() as connection:
        migrate(connection, revision)
        assert differences(connection) != []


def test_runs_of_0001(database_url: str, engine: Engine) -> None:
    """A run that the first tables hold is read, resumed and goes on."""
    body = b"checkpoint 2"
    with engine.begin() as connection:
        migrate(connection, "0001")
        connection.execute(text(RUN_OF_0001), {"stop_requested": True})
        connection.execute(text(CHECKPOINT_OF_0001), {"body": body})
    store = RunStore(database_url)
    row = store.row("run-1")
    assert (row.state, row.round, row.epsilon, row.epoch) == (RunState.RUNNING, 2, 0.5, 4)
    assert (row.started_at, row.stop_requested, row.message) == (100.0, True, "")
    lease = store.resume("run-1", "78")
    assert (lease.checkpoint, lease.epoch) == (body, 5)
    lease.save(b"checkpoint 3", round=3, epsilon=0.75, cohort=5)
    lease.beat("goes on")
    lease.merchants([MerchantRow("shop", "takes part", 3, "", 1.0)])
    assert store.row("run-1").message == "goes on"
    with engine.connect() as connection:
        assert differences(connection) == []


def test_opening_again_changes_nothing(database_url: str) -> None:
    """A store that is up to date is opened as it is."""
    lease = RunStore(database_url).begin("run-1", "c0ffee", 3, "77")
    lease.save(b"body", round=1, epsilon=0.5, cohort=5)
    row = RunStore(database_url).row("run-1")
    assert RunStore(database_url).row("run-1") == row


def test_newer_revision(database_url: str, engine: Engine) -> None:
    """A database of a later version of Hansa is refused, and left as it is."""
    RunStore(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE hansa_schema SET version_num = '9999'"))
    with pytest.raises(ArchiveError, match=r"written by a newer Hansa .*revision 9999"):
        RunStore(database_url)
    with engine.connect() as connection:
        assert revision_of(connection) == "9999"


def test_failed_migration_leaves_nothing(database_url: str, engine: Engine) -> None:
    """A migration that fails half way is undone as a whole."""
    with engine.begin() as connection:
        migrate(connection, "0001")
        connection.execute(text("ALTER TABLE hansa_run ADD COLUMN message TEXT"))
    with pytest.raises(ArchiveError, match="message"):
        RunStore(database_url)
    with engine.begin() as connection:
        assert revision_of(connection) == "0001"
        connection.execute(text("ALTER TABLE hansa_run DROP COLUMN message"))
    assert RunStore(database_url).rows() == []


@pytest.mark.slow
def test_processes_open_a_new_store(database_url: str) -> None:
    """Processes that open a new store at once all succeed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, database_url], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        _, words = process.communicate(timeout=120)
        assert (process.returncode, words) == (0, "")


@pytest.mark.slow
def test_wheel_holds_the_migrations(tmp_path: Path) -> None:
    """Whoever installs the package has every revision and Alembic's environment."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folder = ROOT / "server" / "migrations"
    wanted = {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}
    assert len(wanted) >= len(revisions()) + 3
    assert wanted <= names
