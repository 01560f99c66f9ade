"""Snapshots of the network, with the class of each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A table of what is taken anew: nothing to carry over."""
    op.create_table(
        "topologies",
        sa.Column("sequence", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("model_id", sa.String(66), nullable=False),
        sa.Column("taken_at", sa.BigInteger, nullable=False),
        sa.Column("class_number", sa.Integer, nullable=False),
        sa.Column("snapshot", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_topologies"),
    )
    op.create_index("ix_topologies_model_id", "topologies", ["model_id"])


def downgrade() -> None:
    """The snapshots are dropped."""
    op.drop_index("ix_topologies_model_id", table_name="topologies")
    op.drop_table("topologies")
