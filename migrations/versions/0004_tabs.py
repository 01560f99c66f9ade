"""Tickets, vouchers and batches of tabs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_HASH = sa.String(66)
_ADDRESS = sa.String(42)
_UINT256 = sa.String(78)


def upgrade() -> None:
    """New tables: no release before has collected anything."""
    op.create_table(
        "tab_tickets",
        sa.Column("request_id", _HASH, nullable=False),
        sa.Column("requester", _ADDRESS, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("plan_id", _HASH, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.Column("charge", _UINT256, nullable=False),
        sa.Column("batch_id", _HASH),
        sa.Column("grant", sa.LargeBinary, nullable=False),
        sa.Column("collected", sa.LargeBinary),
        sa.PrimaryKeyConstraint("request_id", name="pk_tab_tickets"),
        sa.UniqueConstraint("requester", "number", name="uq_tab_tickets_requester_number"),
    )
    op.create_index("ix_tab_tickets_state", "tab_tickets", ["state"])
    op.create_index("ix_tab_tickets_batch_id", "tab_tickets", ["batch_id"])
    op.create_table(
        "tab_vouchers",
        sa.Column("secret_hash", _HASH, nullable=False),
        sa.Column("requester", _ADDRESS, nullable=False),
        sa.Column("cumulative", _UINT256, nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("secret", _HASH),
        sa.Column("batch_id", _HASH),
        sa.PrimaryKeyConstraint("secret_hash", name="pk_tab_vouchers"),
    )
    op.create_index("ix_tab_vouchers_batch_id", "tab_vouchers", ["batch_id"])
    op.create_index("ix_tab_vouchers_requester", "tab_vouchers", ["requester", "cumulative"])
    op.create_table(
        "tab_batches",
        sa.Column("batch_id", _HASH, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("consents", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name="pk_tab_batches"),
    )
    op.create_index("ix_tab_batches_state", "tab_batches", ["state"])


def downgrade() -> None:
    """What was collected and is not on the chain is lost."""
    for index, table in (
        ("ix_tab_batches_state", "tab_batches"),
        ("ix_tab_vouchers_requester", "tab_vouchers"),
        ("ix_tab_vouchers_batch_id", "tab_vouchers"),
        ("ix_tab_tickets_batch_id", "tab_tickets"),
        ("ix_tab_tickets_state", "tab_tickets"),
    ):
        op.drop_index(index, table_name=table)
    for table in ("tab_batches", "tab_vouchers", "tab_tickets"):
        op.drop_table(table)
