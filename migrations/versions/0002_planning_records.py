"""Announced documents, and planning records in place of sets of measurements."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_HASH = sa.String(66)


def upgrade() -> None:
    """The sets named no terms, so that no plan could be recomputed from them alone: they are dropped.

    Events of documents are there if the database was of this revision before; their aggregates are folded again.
    """
    op.drop_table("measurement_sets")
    op.create_table(
        "planning_records",
        sa.Column("hash", _HASH, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_planning_records"),
    )
    documents = op.create_table(
        "documents",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_documents"),
    )
    connection = op.get_bind()
    announced = sa.text("select distinct aggregate_key, arguments from events where name = 'DocumentAnnounced'")
    for key, arguments in connection.execute(announced).all():
        size = len(json.loads(arguments)["document"]["$bytes"]) // 2
        aggregate = json.dumps({"document_hash": key[2:], "size_bytes": size}, separators=(",", ":"))
        connection.execute(sa.insert(documents).values(key=key, document=aggregate))


def downgrade() -> None:
    """Back to sets of measurements, of which there are none. Events stay: they cannot be read again."""
    op.drop_table("documents")
    op.drop_table("planning_records")
    op.create_table(
        "measurement_sets",
        sa.Column("hash", _HASH, nullable=False),
        sa.Column("messages", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_measurement_sets"),
    )
