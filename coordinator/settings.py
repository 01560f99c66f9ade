"""Settings of the coordinator: every limit, window and path has a name, a unit and a default here.

Sources, strongest first: command-line options, environment (prefix BSNS_COORDINATOR_), a TOML file (--config or
BSNS_COORDINATOR_CONFIG_FILE), defaults. Promises that what loads is complete and in range, and that `shown` contains no
secret. Also reads the files that settings name, and says which setting is to blame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from bsns.chain import key_file
from bsns.chain.deployment import Deployment
from bsns.chain.signer import KeySigner
from bsns.planning import Objective
from bsns.planning.measured import NEWCOMER_LINK
from bsns.planning.rebalancing import MoveTerms
from bsns.protocol.endpoints import is_loopback, split_endpoint
from bsns.protocol.measurements import BATCHED_SESSIONS
from bsns.protocol.plan import MAXIMUM_ASSIGNMENTS, MAXIMUM_STAGES
from bsns.protocol.planning_record import MAXIMUM_RECORDED_NODES
from bsns.protocol.tabs import MAXIMUM_BATCH_TICKETS
from bsns.service_settings import ServiceSettings
from coordinator.chain_follower import FollowerLimits
from coordinator.coordination_service import ConversationLimits
from coordinator.dispatch import PlanPolicy, PoolLimits, PublicationLimits
from coordinator.tab_collector import TabLimits
from coordinator.transaction_outbox import OutboxLimits

KIB: Final = 1024
_MAXIMUM_UINT128: Final = 2**128 - 1


class SettingsError(Exception):
    """A setting or a file given by the operator cannot be used; the message says which and what to do."""


class CoordinatorSettings(ServiceSettings):
    """Everything a coordinator is told. Sizes in bytes, times in seconds, money in wei, depths in blocks."""

    config_file_variable = "BSNS_COORDINATOR_CONFIG_FILE"
    settings_error = SettingsError
    model_config = SettingsConfigDict(
        env_prefix="BSNS_COORDINATOR_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    # Where and who
    rpc_url: str = Field(min_length=1, description="JSON-RPC endpoint of the chain")
    rpc_timeout_seconds: float = Field(default=10.0, gt=0)
    deployment: Path = Field(description="deployment file that names the contracts")
    database_url: str = Field(min_length=1, description="sqlite:///file or postgresql://user:password@host/name")
    standby: bool = Field(
        default=False, description="wait until the coordinator that writes to the database is gone, then take its place"
    )
    migrate_on_start: bool = Field(default=True, description="bring the tables to this release before serving")
    listen: str = Field(default="127.0.0.1:0", description="host:port of the gRPC service; port 0 takes a free one")
    health_listen: str = Field(default="127.0.0.1:0", description="host:port of /healthz, /readyz and /metrics")
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector (http://host:4318) for traces; none are made without"
    )
    certificate_file: Path | None = Field(default=None, description="PEM certificate; required off loopback")
    certificate_key_file: Path | None = Field(default=None, description="PEM key of the certificate")
    key_file: Path = Field(description="key of the publisher: raw hex (mode 600) or a keystore v3")
    keystore_password: SecretStr | None = Field(default=None, description="prefer keystore_password_file")
    keystore_password_file: Path | None = Field(default=None)
    manifest: tuple[Path, ...] = Field(default=(), description="manifest files of the models to plan for")

    # What is planned
    fee_per_token: int = Field(ge=0, le=_MAXIMUM_UINT128, description="wei per token of prompt or answer")
    minimum_nodes: int = Field(default=1, ge=1, description="nodes to wait for before the first plan")
    replacement_minimum_nodes: int = Field(default=1, ge=1, description="nodes that a replacement plan needs")
    objective: Objective = Field(default=Objective.THROUGHPUT, description="throughput: fastest slowest stage; latency")
    stage_count: int | None = Field(default=None, ge=1, le=MAXIMUM_STAGES, description="default: as many as is best")
    replicas: int = Field(default=1, ge=1, le=MAXIMUM_ASSIGNMENTS, description="least nodes a stage")
    spread_leftover: bool = Field(default=True, description="nodes that no stage needs become replicas of the slowest")
    planned_sessions: int = Field(
        default=4, ge=1, le=2**32 - 1, description="sessions whose cache every node must hold"
    )
    planned_session_tokens: int = Field(default=2_048, ge=1, le=2**32 - 1)
    planned_batch: int = Field(default=1, description=f"sessions in a node's step: 1 or {BATCHED_SESSIONS}")
    planner_seed: int = Field(default=0, ge=0, le=2**32 - 1)
    prior_latency_nanoseconds: int = Field(
        default=NEWCOMER_LINK.latency_ns, ge=0, le=2**63 - 1, description="between nodes that measured no link"
    )
    prior_bytes_per_second: int = Field(default=NEWCOMER_LINK.bytes_per_second, ge=1, le=2**63 - 1)
    gather_seconds: float = Field(
        default=1.0, ge=0, description="quiet time before planning, so that all who join are in"
    )
    consent_wait_seconds: float = Field(default=120.0, gt=0)
    consent_validity_seconds: int = Field(default=900, ge=60)
    refusal_pause_seconds: float = Field(default=60.0, ge=0)
    plan_failure_pause_seconds: float = Field(default=5.0, ge=0)
    replace_after_seconds: float = Field(default=30.0, ge=0, description="a stage without a live node: plan anew after")
    rebalance_after_seconds: float = Field(
        default=120.0, ge=0, description="a plan that serves is not judged again sooner after it took effect"
    )
    settle_seconds: float = Field(
        default=20.0, ge=0, description="nodes must have come, gone or changed speed for so long to judge a plan again"
    )
    drift_basis_points: int = Field(
        default=2_500, ge=0, description="a node's times have changed when off by more; hundredths of a per cent"
    )
    rebalance_horizon_seconds: int = Field(
        default=600, gt=0, le=2**32 - 1, description="a change of plan must have paid its cost within this time"
    )
    load_bytes_per_second: int = Field(
        default=50_000_000, gt=0, le=2**64 - 1, description="at which nodes load and check weights, for that cost"
    )
    minimum_gain_basis_points: int = Field(
        default=500, ge=0, le=2**32 - 1, description="tokens that a change must bring; hundredths of a per cent"
    )
    minimum_drift_gain_basis_points: int = Field(
        default=1_500, ge=0, le=2**32 - 1, description="the same where only measured times have changed"
    )

    topology_seconds: float = Field(
        default=60.0, gt=0, description="a snapshot of the network so often, where something has changed"
    )

    # Chain
    confirmation_depth: int = Field(default=0, ge=0, description="blocks below the head that are left alone")
    maximum_reorganisation_depth: int = Field(default=256, ge=1)
    poll_seconds: float = Field(default=0.5, gt=0)
    chain_backoff_seconds: float = Field(default=0.5, gt=0)
    chain_backoff_maximum_seconds: float = Field(default=30.0, gt=0)
    follower_batch_blocks: int = Field(default=256, ge=1)
    synced_within_blocks: int = Field(default=3, ge=0, description="blocks behind the head that still count as synced")
    transaction_confirmations: int = Field(default=2, ge=1)
    transactions_in_flight: int = Field(default=64, ge=1)
    rebroadcast_seconds: float = Field(default=15.0, gt=0)
    replace_transaction_seconds: float = Field(default=45.0, gt=0)
    transaction_replacements: int = Field(default=6, ge=0)
    refusal_backoff_seconds: float = Field(default=2.0, gt=0)
    refusal_backoff_maximum_seconds: float = Field(default=120.0, gt=0)
    open_requests_a_pass: int = Field(default=1_024, ge=1, description="unfinished requests looked at in one pass")

    # Tabs
    batch_seconds: int = Field(
        default=300, ge=1, description="an answer waits at most so long for others to share a batch"
    )
    batch_tickets: int = Field(default=MAXIMUM_BATCH_TICKETS, ge=1, le=MAXIMUM_BATCH_TICKETS)
    tab_requests_in_flight: int = Field(
        default=4, ge=1, description="requests of one tab that are served and not yet paid for by a voucher"
    )
    tab_delivery_seconds: int = Field(
        default=900, ge=1, description="a ticket without a voucher after this is given up, and not charged"
    )
    batch_consent_seconds: int = Field(default=60, ge=1, description="a node that has not signed a batch is left out")
    batch_post_seconds: int = Field(default=900, ge=60, description="a batch that is not posted by then is made anew")
    ticket_seconds: int = Field(default=7_200, ge=600, description="a ticket must be good for so long")

    # Nodes
    attached_nodes: int = Field(default=256, ge=1, le=MAXIMUM_RECORDED_NODES)
    heartbeat_seconds: float = Field(default=2.0, ge=0.05, le=60)
    missed_heartbeats: int = Field(default=3, ge=1)
    queued_messages_a_node: int = Field(default=16, ge=2)
    messages_a_minute: int = Field(default=600, ge=1)
    message_bytes: int = Field(default=256 * KIB, ge=16 * KIB, description="largest gRPC message taken from a node")
    hello_seconds: float = Field(default=10.0, gt=0)
    clock_skew_seconds: int = Field(default=300, ge=0)
    measurement_age_seconds: int = Field(default=30 * 86_400, ge=1)
    drain_seconds: float = Field(default=5.0, ge=0)

    @field_validator("listen", "health_listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        split_endpoint(value)
        return value

    @field_validator("planned_batch")
    @classmethod
    def _measured_batch(cls, value: int) -> int:
        if value not in (1, BATCHED_SESSIONS):
            raise ValueError(f"nodes measure steps of 1 and of {BATCHED_SESSIONS} sessions, not of {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> CoordinatorSettings:
        require_tls(self.listen, self.certificate_file, self.certificate_key_file)
        if self.maximum_reorganisation_depth <= self.transaction_confirmations:
            raise ValueError("maximum_reorganisation_depth must be more than transaction_confirmations")
        return self

    @property
    def policy(self) -> PlanPolicy:
        return PlanPolicy(
            fee_per_token=self.fee_per_token,
            minimum_nodes=self.minimum_nodes,
            replacement_minimum_nodes=self.replacement_minimum_nodes,
            stage_count=self.stage_count,
            replicas=self.replicas,
            spread_leftover=self.spread_leftover,
            objective=self.objective,
            concurrent_sessions=self.planned_sessions,
            session_tokens=self.planned_session_tokens,
            seed=self.planner_seed,
            batch=self.planned_batch,
            prior_latency_ns=self.prior_latency_nanoseconds,
            prior_bytes_per_second=self.prior_bytes_per_second,
            moves=MoveTerms(
                horizon_seconds=self.rebalance_horizon_seconds,
                load_bytes_per_second=self.load_bytes_per_second,
                minimum_gain_bps=self.minimum_gain_basis_points,
                minimum_drift_gain_bps=self.minimum_drift_gain_basis_points,
            ),
        )

    @property
    def follower_limits(self) -> FollowerLimits:
        return FollowerLimits(
            confirmation_depth=self.confirmation_depth,
            maximum_reorganisation_depth=self.maximum_reorganisation_depth,
            poll_seconds=self.poll_seconds,
            backoff_seconds=self.chain_backoff_seconds,
            backoff_maximum_seconds=self.chain_backoff_maximum_seconds,
            batch_blocks=self.follower_batch_blocks,
            synced_within_blocks=self.synced_within_blocks,
        )

    @property
    def outbox_limits(self) -> OutboxLimits:
        return OutboxLimits(
            confirmations=self.transaction_confirmations,
            in_flight=self.transactions_in_flight,
            rebroadcast_seconds=self.rebroadcast_seconds,
            replace_seconds=self.replace_transaction_seconds,
            replacements=self.transaction_replacements,
            refusal_backoff_seconds=self.refusal_backoff_seconds,
            refusal_backoff_maximum_seconds=self.refusal_backoff_maximum_seconds,
        )

    @property
    def pool_limits(self) -> PoolLimits:
        return PoolLimits(
            attached_nodes=self.attached_nodes,
            heartbeat_seconds=self.heartbeat_seconds,
            missed_heartbeats=self.missed_heartbeats,
            queued_messages=self.queued_messages_a_node,
            messages_per_minute=self.messages_a_minute,
        )

    @property
    def tab_limits(self) -> TabLimits:
        return TabLimits(
            batch_seconds=self.batch_seconds,
            batch_tickets=self.batch_tickets,
            requests_in_flight=self.tab_requests_in_flight,
            delivery_seconds=self.tab_delivery_seconds,
            consent_seconds=self.batch_consent_seconds,
            post_seconds=self.batch_post_seconds,
            ticket_seconds=self.ticket_seconds,
        )

    @property
    def conversation_limits(self) -> ConversationLimits:
        return ConversationLimits(
            hello_seconds=self.hello_seconds,
            clock_skew_seconds=self.clock_skew_seconds,
            measurement_age_seconds=self.measurement_age_seconds,
        )

    @property
    def publication_limits(self) -> PublicationLimits:
        return PublicationLimits(
            gather_seconds=self.gather_seconds,
            consent_wait_seconds=self.consent_wait_seconds,
            consent_validity_seconds=self.consent_validity_seconds,
            refusal_pause_seconds=self.refusal_pause_seconds,
            failure_pause_seconds=self.plan_failure_pause_seconds,
            replace_after_seconds=self.replace_after_seconds,
            rebalance_after_seconds=self.rebalance_after_seconds,
            settle_seconds=self.settle_seconds,
            drift_bps=self.drift_basis_points,
        )


def require_tls(listen: str, certificate: Path | None, key: Path | None) -> None:
    """ValueError unless what is listened on is loopback, or has a certificate with its key."""
    if (certificate is None) != (key is None):
        raise ValueError("certificate_file and certificate_key_file belong together")
    if certificate is None and not is_loopback(listen):
        raise ValueError(f"{listen} is not on loopback: give certificate_file and certificate_key_file (TLS)")


def load_key(path: Path, password: str | None = None, password_file: Path | None = None) -> KeySigner:
    """The publisher's signer; SettingsError says what is wrong with the file."""
    try:
        return key_file.load_key(
            path,
            password,
            password_file,
            password_advice="keystore_password_file or the variable BSNS_COORDINATOR_KEYSTORE_PASSWORD",
        )
    except key_file.KeyFileError as error:
        raise SettingsError(str(error)) from error


def load_deployment(path: Path) -> Deployment:
    """The deployment file; SettingsError if it is none."""
    try:
        return Deployment.load(path)
    except ValueError as error:
        raise SettingsError(str(error)) from error
