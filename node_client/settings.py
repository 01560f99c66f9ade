"""Settings of one node: every limit, window and path has a name, a unit and a default here.

Sources, strongest first: command-line options, environment (prefix BSNS_NODE_), a TOML file (BSNS_NODE_CONFIG_FILE or
--config), defaults. Promises that what loads is complete and in range, and that `shown` never contains a secret. Reads
nothing but these sources.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from bsns.protocol.commitments import MAXIMUM_DRAFTS
from bsns.protocol.endpoints import is_loopback, split_endpoint
from bsns.protocol.measurements import MAXIMUM_LINKS
from bsns.service_settings import ServiceSettings
from node_client.errors import SettingsError
from node_client.keystore import DEFAULT_SCRYPT_COST

CACHE_VARIABLE: Final = "BSNS_CACHE"
MIB: Final = 1024 * 1024
# A frame's payload may fill 1 MiB; the message around it needs a little more, and gRPC's default limit is 4 MiB.
MAXIMUM_FRAME_BYTES: Final = MIB


def default_cache() -> Path:
    """BSNS_CACHE, or ~/.cache/bsns: where `python -m bsns.runtime.prepare` puts models."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "bsns"


class NodeSettings(ServiceSettings):
    """Everything a node is told. Sizes in bytes, times in seconds, money in wei."""

    config_file_variable = "BSNS_NODE_CONFIG_FILE"
    settings_error = SettingsError
    model_config = SettingsConfigDict(env_prefix="BSNS_NODE_", frozen=True, extra="forbid", hide_input_in_errors=True)

    # Where and who
    rpc_url: str = Field(min_length=1, description="JSON-RPC endpoint of the chain")
    deployment: Path = Field(description="deployment file that names the contracts")
    data_dir: Path = Field(description="keys, signing history and evidence of this node; one folder a node")
    model_cache: Path = Field(default_factory=default_cache, description="folder that holds models/")
    listen: str = Field(default="127.0.0.1:0", description="host:port to listen on; port 0 takes a free one")
    advertise: str | None = Field(
        default=None, description="host:port registered on chain; default: what is listened on"
    )
    health_listen: str = Field(default="127.0.0.1:0", description="host:port of /healthz, /readyz and /metrics")
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector (http://host:4318) for traces; none are made without"
    )
    coordinator: str | None = Field(
        default=None,
        description="host:port of a coordinator to attach to, or of several that stand in for one another, with commas "
        "between them; a node works without one",
    )
    coordinator_certificate: Path | None = Field(
        default=None, description="PEM certificate of a coordinator that is not on loopback"
    )

    # Keys
    password: SecretStr | None = Field(default=None, description="keystore password; prefer password_file")
    password_file: Path | None = Field(default=None, description="file (mode 600) with the keystore password")
    operator_key_file: Path | None = Field(
        default=None, description="file (mode 600) with a raw operator key to import"
    )
    keystore_scrypt_cost: int = Field(default=DEFAULT_SCRYPT_COST, ge=2, le=2**22)

    # Money
    stake_wei: int = Field(default=0, ge=0, description="stake to register with")
    minimum_fee_per_token_wei: int = Field(default=0, ge=0, description="plans that pay less are refused")
    gas_balance_minimum_wei: int = Field(default=10**16, ge=0, description="the hot key is topped up below this")
    gas_balance_target_wei: int = Field(
        default=5 * 10**16, ge=0, description="balance after a top-up from the operator's key"
    )
    trusted_publishers: tuple[str, ...] = Field(default=(), description="plan publishers to work for; empty: any")

    # Compute and memory
    threads: int = Field(default=1, ge=1, le=256)
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda)(:\d+)?$",
        description="where torch computes; the tolerances of cuda are measured on one model of GPU (H200)",
    )
    arithmetic: Literal["float32", "bfloat16", "int8"] = Field(
        default="float32", description="how decoders' matrices are kept and multiplied; a plan promises it"
    )
    activation_encoding: Literal["link", "float32", "float16", "int8"] = Field(
        default="link", description="how activations travel to the next stage; link: as its measured bandwidth asks for"
    )
    speculation_tokens: int = Field(
        default=8,
        ge=0,
        le=MAXIMUM_DRAFTS,
        description="most tokens drafted at once from what the text repeats, as the last stage, shared by the sessions "
        "that are open; 0: none",
    )
    maximum_batch: int = Field(default=64, ge=1, le=1024, description="steps of different sessions that run together")
    weight_memory_bytes: int = Field(default=4 * 1024 * MIB, ge=1, description="executors kept in memory")
    cache_memory_bytes: int = Field(default=1024 * MIB, ge=1, description="KV caches of all sessions together")
    reexecution_rows: int = Field(
        default=32, ge=1, le=4096, description="rows of one piece of a re-execution; bounds the wait of live sessions"
    )

    # Sessions
    maximum_sessions: int = Field(default=64, ge=1)
    session_idle_seconds: float = Field(default=60.0, gt=0, description="a session without progress is ended")
    session_linger_seconds: float = Field(default=60.0, gt=0, description="a finished session still answers repeats")
    requester_reconnect_seconds: float = Field(
        default=2.0, ge=0, description="a requester whose stream broke may come back"
    )
    repair_seconds: float = Field(
        default=15.0, gt=0, description="a session that a dead stage holds up waits so long for a replacement"
    )
    witness_probe_seconds: float = Field(
        default=0.25, gt=0, description="a node that does not answer within this time may be replaced"
    )
    history_seconds: float = Field(default=10.0, gt=0, description="time for the history of a stage that is taken over")
    session_inbox_limit: int = Field(default=64, ge=4, description="messages waiting for one session")
    stream_outbox_limit: int = Field(default=1024, ge=16, description="messages waiting for one reader")
    recording_limit: int = Field(default=16, ge=1, description="steps of a session executed but not yet recorded")
    statement_interval_steps: int = Field(default=8, ge=1)
    maximum_token_lifetime_seconds: int = Field(
        default=86_400, ge=1, description="session tokens valid for longer are refused"
    )
    maximum_query_lifetime_seconds: int = Field(default=900, ge=1)
    maximum_concurrent_calls: int = Field(default=256, ge=8)
    drain_seconds: float = Field(default=30.0, ge=0, description="how long SIGTERM waits for sessions")

    # Peers
    peer_connect_seconds: float = Field(default=3.0, gt=0)
    peer_retry_seconds: float = Field(
        default=10.0, gt=0, description="a peer out of reach for longer fails its sessions"
    )
    peer_backoff_seconds: float = Field(default=0.1, gt=0)
    peer_backoff_maximum_seconds: float = Field(default=2.0, gt=0)
    peer_proof_lifetime_seconds: int = Field(default=60, ge=5, le=600)
    maximum_peers: int = Field(default=256, ge=1)

    # Links
    maximum_links: int = Field(default=64, ge=0, le=MAXIMUM_LINKS, description="other nodes whose links are measured")
    link_probe_seconds: float = Field(default=5.0, gt=0, description="longest measurement of one link")
    link_refresh_seconds: float = Field(default=600.0, gt=0, description="a link is measured again after this")
    link_backoff_seconds: float = Field(
        default=5.0, gt=0, description="pause before a peer out of reach is tried again"
    )
    link_backoff_maximum_seconds: float = Field(default=600.0, gt=0)
    link_change_share: float = Field(
        default=0.25, gt=0, lt=1, description="a link that changed by more than this share is reported again"
    )
    link_report_seconds: float = Field(
        default=10.0, gt=0, description="least time between two reports of links and pace"
    )
    pace_change_share: float = Field(
        default=0.25, gt=0, description="steps whose time is off by more than this share of what was reported are news"
    )
    probe_bytes_a_minute: int = Field(default=128 * MIB, ge=0, description="probes answered, of all nodes together")

    # Chain
    rpc_timeout_seconds: float = Field(default=10.0, gt=0)
    chain_poll_seconds: float = Field(default=1.0, gt=0)
    chain_lookback_blocks: int = Field(
        default=50_000, ge=1, description="how far a restarted node looks for open duties"
    )
    transaction_timeout_seconds: float = Field(default=60.0, gt=0)
    registration_proof_seconds: int = Field(default=600, ge=30)
    attestation_give_up_share: float = Field(
        default=2 / 3, gt=0, lt=1, description="share of the attest window spent asking for evidence"
    )
    evidence_retry_seconds: float = Field(default=2.0, gt=0)
    neighbour_evidence_seconds: float = Field(
        default=10.0, gt=0, description="time spent asking for the evidence next to a stage that is judged"
    )

    batch_patience_seconds: int = Field(
        default=60, ge=1, description="a batch's next step is left to its collector for so long"
    )

    # Disk
    evidence_bytes: int = Field(
        default=4 * 1024 * MIB, ge=1, description="bytes of evidence kept until disputes are over"
    )
    evidence_response_bytes: int = Field(
        default=1024 * MIB, ge=1, description="input bytes accepted from an executor for one stage"
    )

    # Coordinator
    coordinator_backoff_seconds: float = Field(default=0.5, gt=0)
    coordinator_backoff_maximum_seconds: float = Field(default=30.0, gt=0)
    maximum_consent_lifetime_seconds: int = Field(default=3_600, ge=1)
    profile_seconds: float = Field(default=1.5, gt=0, description="time spent measuring each model")

    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    @property
    def coordinators(self) -> tuple[str, ...]:
        """The coordinators in the order they are tried."""
        return tuple(part.strip() for part in (self.coordinator or "").split(",") if part.strip())

    @field_validator("coordinator")
    @classmethod
    def _coordinators(cls, value: str | None) -> str | None:
        for part in (value or "").split(","):
            if part.strip():
                split_endpoint(part.strip())
        return value

    @field_validator("listen", "advertise", "health_listen")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_endpoint(value)
        return value

    @model_validator(mode="after")
    def _relations(self) -> NodeSettings:
        if self.gas_balance_target_wei < self.gas_balance_minimum_wei:
            raise ValueError("gas_balance_target_wei must not be below gas_balance_minimum_wei")
        if (
            self.advertise is None
            and not is_loopback(self.listen)
            and split_endpoint(self.listen)[0] in ("0.0.0.0", "::")
        ):
            raise ValueError("a node that listens on every address must say with `advertise` where it is reached")
        distant = [item for item in self.coordinators if not is_loopback(item)]
        if distant and self.coordinator_certificate is None:
            raise ValueError(f"{distant[0]} is not on loopback: give its certificate with coordinator_certificate")
        return self
