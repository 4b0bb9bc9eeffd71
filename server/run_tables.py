"""Tables of the run store, as the newest revision in `server/migrations` leaves them.

Their names begin with `hansa_`: a PostgreSQL database may hold other tables too.
"""

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

VERSION_TABLE = "hansa_schema"  # Alembic writes down there which revision a database has
METADATA = MetaData()

RUNS = Table(
    "hansa_run",
    METADATA,
    Column("run", Text, primary_key=True),
    Column("contract", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("flower_run", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("epsilon", Double, nullable=False),
    Column("cohort", Integer, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("alive_at", Double, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("stop_requested", Boolean, nullable=False),
    Column("bundle", Text, nullable=False),
    Column("message", Text, nullable=False, server_default=text("''")),
)

CHECKPOINTS = Table(
    "hansa_checkpoint",
    METADATA,
    Column("run", Text, ForeignKey("hansa_run.run"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("round", Integer, nullable=False),
    Column("saved_at", Double, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

MERCHANTS = Table(
    "hansa_merchant",
    METADATA,
    Column("run", Text, ForeignKey("hansa_run.run"), primary_key=True),
    Column("merchant", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("last_error", Text, nullable=False),
    Column("seen_at", Double, nullable=False),
)
