"""How each merchant fares in a run, and the run's last message."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table of merchants; runs that are there get an empty message."""
    op.create_table(
        "hansa_merchant",
        sa.Column("run", sa.Text, sa.ForeignKey("hansa_run.run"), primary_key=True),
        sa.Column("merchant", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("last_error", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.add_column(
        "hansa_run", sa.Column("message", sa.Text, nullable=False, server_default=sa.text("''"))
    )
