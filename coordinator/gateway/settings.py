"""Settings of the gateway: every limit, window and path has a name, a unit and a default here.

Sources, strongest first: command-line options, environment (prefix BSNS_GATEWAY_), a TOML file (--config or
BSNS_GATEWAY_CONFIG_FILE), defaults. Promises that what loads is complete and in range, and that `shown` contains no
secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from bsns.chain.deployment import ETHER
from bsns.protocol.endpoints import split_endpoint
from bsns.service_settings import ServiceSettings
from coordinator.settings import SettingsError, require_tls

KIB: Final = 1024


class GatewaySettings(ServiceSettings):
    """Everything a gateway is told. Sizes in bytes, times in seconds, money in wei, depths in blocks."""

    config_file_variable = "BSNS_GATEWAY_CONFIG_FILE"
    settings_error = SettingsError
    model_config = SettingsConfigDict(
        env_prefix="BSNS_GATEWAY_", frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=()
    )

    # Where and who
    rpc_url: str = Field(min_length=1, description="JSON-RPC endpoint of the chain")
    deployment: Path = Field(description="deployment file that names the contracts")
    database_url: str = Field(min_length=1, description="the coordinator's database: sqlite:///file or postgresql://…")
    migrate_on_start: bool = Field(default=True, description="bring the tables to this release before serving")
    listen: str = Field(default="127.0.0.1:0", description="host:port of HTTP; port 0 takes a free one")
    health_listen: str = Field(default="127.0.0.1:0", description="host:port of /healthz, /readyz and /metrics")
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector (http://host:4318) for traces; none are made without"
    )
    certificate_file: Path | None = Field(default=None, description="PEM certificate; required off loopback")
    certificate_key_file: Path | None = Field(default=None, description="PEM key of the certificate")
    public_url: str | None = Field(default=None, description="as users reach it, for links; default: from listen")
    key_file: Path = Field(description="key that pays the network: raw hex (mode 600) or a keystore v3")
    keystore_password: SecretStr | None = Field(default=None, description="prefer keystore_password_file")
    keystore_password_file: Path | None = Field(default=None)
    state_dir: Path = Field(description="secrets and prompts of the requests that are made for users")
    model_folder: tuple[Path, ...] = Field(min_length=1, description="prepared models to offer")
    coordinator: str = Field(description="host:port of the coordinator that collects the tab")
    coordinator_certificate: Path | None = Field(default=None, description="its certificate (PEM); needed off loopback")
    publisher: str | None = Field(default=None, description="whose plans to pay for; default: the newest active")

    # Money
    tab_minimum_wei: int = Field(default=ETHER // 100, ge=0, description="the tab is filled up when it holds less")
    tab_target_wei: int = Field(default=ETHER // 10, ge=1, description="up to this much")
    reserve_wei: int = Field(default=ETHER // 20, ge=0, description="left on the account for gas and withdrawals")
    deposit_confirmations: int = Field(default=12, ge=1, description="blocks on a deposit before it counts")
    open_accounts: bool = Field(default=True, description="whoever signs for an address gets an account")
    price_basis_points: int = Field(
        default=0, ge=0, le=100_000, description="on top of what the network asks; hundredths of a per cent"
    )

    # Requests
    default_maximum_tokens: int = Field(default=256, ge=1, description="of an answer, where the request says nothing")
    choices: int = Field(default=8, ge=1, le=128, description="most answers to one request (n)")
    requests_in_flight: int = Field(
        default=4, ge=1, description="served at once; the collector has a limit a tab (tab_requests_in_flight)"
    )
    queued_requests: int = Field(default=64, ge=0, description="more are told to come back")
    attempts: int = Field(default=2, ge=1, description="times that an answer is asked for before its first token came")
    keep_alive_seconds: float = Field(default=10.0, gt=0, description="a silent stream says so often that it lives")
    request_seconds: int = Field(
        default=7 * 86_400, ge=3_600, description="prompts and secrets of requests are kept so long after they are over"
    )
    response_seconds: int = Field(
        default=86_400, ge=0, description="an answer is kept so long for its idempotency key, then forgotten"
    )

    # Surfaces
    body_bytes: int = Field(default=512 * KIB, ge=KIB, description="largest request body")
    key_requests_a_minute: int = Field(default=120, ge=1, description="of one API key")
    address_requests_a_minute: int = Field(default=600, ge=1, description="of one network address, pages included")
    tracked_addresses: int = Field(default=10_000, ge=16, description="keys and addresses whose rate is remembered")
    connections: int = Field(default=512, ge=8, description="open at once; more are told to come back")
    trusted_proxies: tuple[str, ...] = Field(
        default=(), description="addresses whose X-Forwarded-For says who asks; none"
    )
    cors_origins: tuple[str, ...] = Field(default=(), description="origins whose pages may call the API; none")
    explorer: bool = Field(default=True, description="serve the pages")
    live_viewers: int = Field(default=64, ge=0, description="pages that are told about changes at once")
    audits: int = Field(default=2, ge=1, description="records checked against the chain at once")
    audit_seconds: float = Field(default=60.0, gt=0)
    poll_seconds: float = Field(default=2.0, gt=0, description="the tab, withdrawals and refunds are looked after")
    drain_seconds: float = Field(default=30.0, ge=0, description="for answers in progress when it is stopped")

    @field_validator("listen", "health_listen", "coordinator")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        split_endpoint(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin == "*" or "://" not in origin:
                raise ValueError(f"{origin!r} is not an origin: name each one, such as https://app.example")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GatewaySettings:
        require_tls(self.listen, self.certificate_file, self.certificate_key_file)
        if self.tab_target_wei <= self.tab_minimum_wei:
            raise ValueError("tab_target_wei must be more than tab_minimum_wei")
        return self

    def price(self, network_wei: int) -> int:
        """What users pay for what the network asks, rounded up."""
        return -(-network_wei * (10_000 + self.price_basis_points) // 10_000)
