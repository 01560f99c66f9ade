"""The tables that the coordinator keeps; integers of 256 bits are zero-padded text. The migrations make them."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

UINT256_DIGITS: Final = 78

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

deployment = Table(
    "deployment",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("chain_id", BigInteger, nullable=False),
    Column("document", Text, nullable=False),
    Column("cursor_number", BigInteger),
    Column("cursor_hash", String(66)),
)
blocks = Table(
    "blocks",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", String(66), nullable=False, unique=True),
    Column("parent_hash", String(66), nullable=False),
    Column("timestamp", BigInteger, nullable=False),
)
events = Table(
    "events",
    metadata,
    Column("block_hash", String(66), primary_key=True),
    Column("log_index", Integer, primary_key=True, autoincrement=False),
    Column("block_number", BigInteger, nullable=False, index=True),
    Column("transaction_hash", String(66), nullable=False),
    Column("contract", String(32), nullable=False),
    Column("name", String(64), nullable=False),
    Column("aggregate_kind", String(16), nullable=False),
    Column("aggregate_key", String(66), nullable=False),
    Column("arguments", Text, nullable=False),
    Index("ix_events_aggregate", "aggregate_kind", "aggregate_key", "block_number", "log_index"),
)
nodes = Table(
    "nodes",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("operator", String(42), index=True),
    Column("staked", String(UINT256_DIGITS), nullable=False),
    Column("document", Text, nullable=False),
)
models = Table(
    "models",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("name", Text, nullable=False),
    Column("document", Text, nullable=False),
)
documents = Table(
    "documents",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("document", Text, nullable=False),
)
plans = Table(
    "plans",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("model_id", String(66), nullable=False),
    Column("publisher", String(42), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("document", Text, nullable=False),
    Index("ix_plans_model_publisher", "model_id", "publisher", "epoch"),
)
requests = Table(
    "requests",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("requester", String(42), nullable=False, index=True),
    Column("plan_id", String(66), nullable=False),
    Column("status", Integer, nullable=False),
    Column("opened_block", BigInteger, nullable=False),
    Column("deposit", String(UINT256_DIGITS), nullable=False),
    Column("document", Text, nullable=False),
    Index("ix_requests_status", "status", "opened_block"),
)
accounts = Table(
    "accounts",
    metadata,
    Column("key", String(66), primary_key=True),
    Column("document", Text, nullable=False),
)
measurements = Table(
    "measurements",
    metadata,
    Column("model_id", String(66), primary_key=True),
    Column("node", String(42), primary_key=True),
    Column("measured_at", BigInteger, nullable=False),
    Column("message", Text, nullable=False),
)
# What each offered plan was computed from, by the hash that the plan carries.
planning_records = Table(
    "planning_records",
    metadata,
    Column("hash", String(66), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
# Snapshots of the network, the newest of each model.
topologies = Table(
    "topologies",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("model_id", String(66), nullable=False, index=True),
    Column("taken_at", BigInteger, nullable=False),
    Column("class_number", Integer, nullable=False),
    Column("snapshot", Text, nullable=False),
)
# What is collected for tabs: tickets with their results, vouchers with their secrets, batches.
tab_tickets = Table(
    "tab_tickets",
    metadata,
    Column("request_id", String(66), primary_key=True),
    Column("requester", String(42), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("plan_id", String(66), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("changed_at", BigInteger, nullable=False),
    Column("charge", String(UINT256_DIGITS), nullable=False),
    Column("batch_id", String(66), index=True),
    Column("grant", LargeBinary, nullable=False),
    Column("collected", LargeBinary),
    UniqueConstraint("requester", "number"),
)
tab_vouchers = Table(
    "tab_vouchers",
    metadata,
    Column("secret_hash", String(66), primary_key=True),
    Column("requester", String(42), nullable=False),
    Column("cumulative", String(UINT256_DIGITS), nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("secret", String(66)),
    Column("batch_id", String(66), index=True),
    Index("ix_tab_vouchers_requester", "requester", "cumulative"),
)
tab_batches = Table(
    "tab_batches",
    metadata,
    Column("batch_id", String(66), primary_key=True),
    Column("state", String(16), nullable=False, index=True),
    Column("changed_at", BigInteger, nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("consents", Text, nullable=False),
)
intents = Table(
    "intents",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("key", String(255), nullable=False, unique=True),
    Column("sender", String(42), nullable=False),
    Column("contract", String(32), nullable=False),
    Column("function", String(64), nullable=False),
    Column("arguments", Text, nullable=False),
    Column("value", String(UINT256_DIGITS), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False),
    Column("next_attempt_at", Float, nullable=False),
    Column("nonce", BigInteger),
    Column("transaction_hash", String(66)),
    Column("mined_block_number", BigInteger, index=True),
    Column("mined_block_hash", String(66)),
    Column("succeeded", Integer),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("sender", "nonce"),
)
transactions = Table(
    "transactions",
    metadata,
    Column("hash", String(66), primary_key=True),
    Column("intent_sequence", Integer, nullable=False, index=True),
    Column("sender", String(42), nullable=False),
    Column("nonce", BigInteger, nullable=False),
    Column("fields", Text, nullable=False),
    Column("raw", Text, nullable=False),
    Column("signed_at", Float, nullable=False),
    Column("broadcast_at", Float),
    Index("ix_transactions_sender_nonce", "sender", "nonce"),
)
