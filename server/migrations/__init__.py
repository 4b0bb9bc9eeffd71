"""Revisions of the run store's tables, and the function that applies them.

A revision that was released never changes; a change of tables is a new file in `versions/`,
with a test that opens a database of the revision before it.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from server.run_tables import VERSION_TABLE

_FOLDER = Path(__file__).parent


def revisions() -> list[str]:
    """Return all revisions that this version of Hansa knows, oldest first."""
    script = ScriptDirectory(str(_FOLDER))
    return [revision.revision for revision in script.walk_revisions()][::-1]


def revision_of(connection: Connection) -> str | None:
    """Return the revision of a database; None: it is new."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring a database to a revision, inside the transaction of the connection."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
