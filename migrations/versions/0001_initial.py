"""Blocks, events, aggregates, measurements, intents and their transactions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_UINT256 = sa.String(78)
_HASH = sa.String(66)
_ADDRESS = sa.String(42)


def upgrade() -> None:
    """Create all tables."""
    op.create_table(
        "deployment",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("chain_id", sa.BigInteger, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("cursor_number", sa.BigInteger),
        sa.Column("cursor_hash", _HASH),
        sa.PrimaryKeyConstraint("id", name="pk_deployment"),
    )
    op.create_table(
        "blocks",
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("hash", _HASH, nullable=False),
        sa.Column("parent_hash", _HASH, nullable=False),
        sa.Column("timestamp", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_blocks"),
        sa.UniqueConstraint("hash", name="uq_blocks_hash"),
    )
    op.create_table(
        "events",
        sa.Column("block_hash", _HASH, nullable=False),
        sa.Column("log_index", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("block_number", sa.BigInteger, nullable=False),
        sa.Column("transaction_hash", _HASH, nullable=False),
        sa.Column("contract", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("aggregate_kind", sa.String(16), nullable=False),
        sa.Column("aggregate_key", _HASH, nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("block_hash", "log_index", name="pk_events"),
    )
    op.create_index("ix_events_block_number", "events", ["block_number"])
    op.create_index("ix_events_aggregate", "events", ["aggregate_kind", "aggregate_key", "block_number", "log_index"])
    op.create_table(
        "nodes",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("operator", _ADDRESS),
        sa.Column("staked", _UINT256, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_nodes"),
    )
    op.create_index("ix_nodes_operator", "nodes", ["operator"])
    op.create_table(
        "models",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_models"),
    )
    op.create_table(
        "plans",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("model_id", _HASH, nullable=False),
        sa.Column("publisher", _ADDRESS, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_plans"),
    )
    op.create_index("ix_plans_model_publisher", "plans", ["model_id", "publisher", "epoch"])
    op.create_table(
        "requests",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("requester", _ADDRESS, nullable=False),
        sa.Column("plan_id", _HASH, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("opened_block", sa.BigInteger, nullable=False),
        sa.Column("deposit", _UINT256, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_requests"),
    )
    op.create_index("ix_requests_requester", "requests", ["requester"])
    op.create_index("ix_requests_status", "requests", ["status", "opened_block"])
    op.create_table(
        "accounts",
        sa.Column("key", _HASH, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_accounts"),
    )
    op.create_table(
        "measurements",
        sa.Column("model_id", _HASH, nullable=False),
        sa.Column("node", _ADDRESS, nullable=False),
        sa.Column("measured_at", sa.BigInteger, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model_id", "node", name="pk_measurements"),
    )
    op.create_table(
        "measurement_sets",
        sa.Column("hash", _HASH, nullable=False),
        sa.Column("messages", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_measurement_sets"),
    )
    op.create_table(
        "intents",
        sa.Column("sequence", sa.Integer, nullable=False, autoincrement=True),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("sender", _ADDRESS, nullable=False),
        sa.Column("contract", sa.String(32), nullable=False),
        sa.Column("function", sa.String(64), nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("value", _UINT256, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.Float, nullable=False),
        sa.Column("nonce", sa.BigInteger),
        sa.Column("transaction_hash", _HASH),
        sa.Column("mined_block_number", sa.BigInteger),
        sa.Column("mined_block_hash", _HASH),
        sa.Column("succeeded", sa.Integer),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_intents"),
        sa.UniqueConstraint("key", name="uq_intents_key"),
        sa.UniqueConstraint("sender", "nonce", name="uq_intents_sender_nonce"),
    )
    op.create_index("ix_intents_state", "intents", ["state"])
    op.create_index("ix_intents_mined_block_number", "intents", ["mined_block_number"])
    op.create_table(
        "transactions",
        sa.Column("hash", _HASH, nullable=False),
        sa.Column("intent_sequence", sa.Integer, nullable=False),
        sa.Column("sender", _ADDRESS, nullable=False),
        sa.Column("nonce", sa.BigInteger, nullable=False),
        sa.Column("fields", sa.Text, nullable=False),
        sa.Column("raw", sa.Text, nullable=False),
        sa.Column("signed_at", sa.Float, nullable=False),
        sa.Column("broadcast_at", sa.Float),
        sa.PrimaryKeyConstraint("hash", name="pk_transactions"),
    )
    op.create_index("ix_transactions_intent_sequence", "transactions", ["intent_sequence"])
    op.create_index("ix_transactions_sender_nonce", "transactions", ["sender", "nonce"])


def downgrade() -> None:
    """Drop all tables: everything but intents and measurements can be read from the chain again."""
    for table in (
        "transactions",
        "intents",
        "measurement_sets",
        "measurements",
        "accounts",
        "requests",
        "plans",
        "models",
        "nodes",
        "events",
        "blocks",
        "deployment",
    ):
        op.drop_table(table)
