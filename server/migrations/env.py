"""Alembic runs this file: revisions go over the connection that `migrate` hands in."""

from alembic import context

from server.run_tables import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
