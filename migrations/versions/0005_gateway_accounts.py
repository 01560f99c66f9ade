"""Accounts of the gateway's users: keys, charges, deposits, withdrawals, and the movements they add up to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_HASH = sa.String(66)
_ADDRESS = sa.String(42)
_IDENTITY = sa.String(40)
_NAME = sa.String(64)
_STATE = sa.String(16)
_UINT256 = sa.String(78)


def upgrade() -> None:
    """New tables: no release before had a gateway."""
    op.create_table(
        "gateway_accounts",
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("address", _ADDRESS),
        sa.Column("balance", _UINT256, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("account_id", name="pk_gateway_accounts"),
        sa.UniqueConstraint("address", name="uq_gateway_accounts_address"),
    )
    op.create_table(
        "gateway_keys",
        sa.Column("key_hash", sa.String(64), nullable=False),
        sa.Column("key_id", _IDENTITY, nullable=False),
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("request_limit", _UINT256),
        sa.Column("day_limit", _UINT256),
        sa.Column("day", sa.BigInteger, nullable=False),
        sa.Column("day_spent", _UINT256, nullable=False),
        sa.Column("proof", _HASH),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("key_hash", name="pk_gateway_keys"),
        sa.UniqueConstraint("key_id", name="uq_gateway_keys_key_id"),
        sa.UniqueConstraint("proof", name="uq_gateway_keys_proof"),
    )
    op.create_index("ix_gateway_keys_account_id", "gateway_keys", ["account_id"])
    op.create_table(
        "gateway_charges",
        sa.Column("charge_id", _IDENTITY, nullable=False),
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("key_id", _IDENTITY, nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("state", _STATE, nullable=False),
        sa.Column("held", _UINT256, nullable=False),
        sa.Column("charged", _UINT256, nullable=False, server_default="0"),
        sa.Column("refunded", _UINT256, nullable=False, server_default="0"),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("response", sa.Text),
        sa.PrimaryKeyConstraint("charge_id", name="pk_gateway_charges"),
        sa.UniqueConstraint("account_id", "idempotency_key", name="uq_gateway_charges_account_id_idempotency_key"),
    )
    op.create_index("ix_gateway_charges_state", "gateway_charges", ["state"])
    op.create_index("ix_gateway_charges_account", "gateway_charges", ["account_id", "created_at"])
    op.create_table(
        "gateway_requests",
        sa.Column("request_id", _HASH, nullable=False),
        sa.Column("charge_id", _IDENTITY, nullable=False),
        sa.Column("price", _UINT256, nullable=False),
        sa.Column("refunded", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_gateway_requests"),
    )
    op.create_index("ix_gateway_requests_charge_id", "gateway_requests", ["charge_id"])
    op.create_table(
        "gateway_movements",
        sa.Column("number", sa.Integer, nullable=False, autoincrement=True),
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("kind", _STATE, nullable=False),
        sa.Column("amount", sa.String(79), nullable=False),
        sa.Column("reference", sa.String(80), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_gateway_movements"),
    )
    op.create_index("ix_gateway_movements_account", "gateway_movements", ["account_id", "number"])
    op.create_table(
        "gateway_deposits",
        sa.Column("transaction_hash", _HASH, nullable=False),
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("amount", _UINT256, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("transaction_hash", name="pk_gateway_deposits"),
    )
    op.create_table(
        "gateway_withdrawals",
        sa.Column("withdrawal_id", _IDENTITY, nullable=False),
        sa.Column("account_id", _IDENTITY, nullable=False),
        sa.Column("recipient", _ADDRESS, nullable=False),
        sa.Column("amount", _UINT256, nullable=False),
        sa.Column("state", _STATE, nullable=False),
        sa.Column("nonce", sa.BigInteger),
        sa.Column("raw", sa.LargeBinary),
        sa.Column("transaction_hash", _HASH),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("withdrawal_id", name="pk_gateway_withdrawals"),
    )
    op.create_index("ix_gateway_withdrawals_account_id", "gateway_withdrawals", ["account_id"])
    op.create_index("ix_gateway_withdrawals_state", "gateway_withdrawals", ["state"])


def downgrade() -> None:
    """Whoever still has money on an account loses sight of it: pay the accounts out before."""
    for index, table in (
        ("ix_gateway_withdrawals_state", "gateway_withdrawals"),
        ("ix_gateway_withdrawals_account_id", "gateway_withdrawals"),
        ("ix_gateway_movements_account", "gateway_movements"),
        ("ix_gateway_requests_charge_id", "gateway_requests"),
        ("ix_gateway_charges_account", "gateway_charges"),
        ("ix_gateway_charges_state", "gateway_charges"),
        ("ix_gateway_keys_account_id", "gateway_keys"),
    ):
        op.drop_index(index, table_name=table)
    for table in ("withdrawals", "deposits", "movements", "requests", "charges", "keys", "accounts"):
        op.drop_table(f"gateway_{table}")
