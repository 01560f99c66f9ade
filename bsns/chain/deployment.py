"""Where the contracts are on one chain, on which terms, and how they get there.

A deployment is five contracts that name one another as immutables, so their addresses are computed before the first
of them exists (CREATE from consecutive nonces of one deployer). Nobody can change them afterwards. The JSON file of a
Deployment is all that a node, a requester or an auditor needs to know besides an RPC endpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlp
from eth_typing import ChecksumAddress

from bsns.chain.artifacts import CONTRACT_NAMES, contract_artifact
from bsns.chain.errors import ChainError
from bsns.protocol.identifiers import address, keccak256

if TYPE_CHECKING:
    from bsns.chain.signer import Signer

ETHER = 10**18
GWEI = 10**9


@dataclass(frozen=True, slots=True)
class RegistryTerms:
    """Stake in wei, times in seconds."""

    minimum_stake: int = ETHER
    activation_delay: int = 3_600
    thaw_period: int = 7 * 86_400


@dataclass(frozen=True, slots=True)
class EscrowTerms:
    """Shares in basis points, windows in seconds.

    `verifier_share_bps` is what a committee's work costs: on a stage that is judged each seat executes again, which is
    to take 8 % of what the answer cost (`make bench-verification`, goal of section cost), of a fee of which an answer
    is assumed to cost 0.8. Five seats then cost 0.32 of the fee, and for less nobody sits who does not have to.
    """

    protocol_fee_bps: int = 100
    verifier_share_bps: int = 3_200
    route_window: int = 300
    commit_window: int = 3_600
    verification_window: int = 86_400
    maximum_tokens: int = 131_072


@dataclass(frozen=True, slots=True)
class VerificationTerms:
    """Rates, shares in basis points, tolerance tau in units of sketch distance, windows in seconds, bond in wei."""

    sampling_rate_bps: int = 1_000
    committee_seats: int = 5
    minimum_reveals: int = 3
    # twice the measured honest radius of the sketch (bsns/protocol/sketch.py)
    tolerance: int = 128
    secret_window: int = 300
    attest_window: int = 600
    reveal_window: int = 600
    challenge_window: int = 3_600
    jail_period: int = 86_400
    challenge_bond: int = ETHER // 20
    incorrect_slash_bps: int = 5_000
    withhold_slash_bps: int = 500
    member_share_bps: int = 1_000
    reporter_share_bps: int = 1_000


@dataclass(frozen=True, slots=True)
class TabTerms:
    """Windows in seconds, bond in wei. A batch has one draw for each begun `tokens_per_draw` tokens, at most 32."""

    # far below the 256 blocks for which a block hash can be read
    secret_window: int = 300
    draw_window: int = 3_600
    opening_window: int = 86_400
    close_period: int = 2 * 86_400
    # one request of the largest prompt and answer is a batch
    tokens_per_draw: int = 8_192
    challenge_bond: int = ETHER // 20


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything a deployment fixes for ever. The defaults are for a public network."""

    registry: RegistryTerms = field(default_factory=RegistryTerms)
    escrow: EscrowTerms = field(default_factory=EscrowTerms)
    verification: VerificationTerms = field(default_factory=VerificationTerms)
    tabs: TabTerms = field(default_factory=TabTerms)
    plan_activation_delay: int = 600

    @classmethod
    def for_devnet(cls) -> Terms:
        """One person's machine: short windows, every request verified by everybody else."""
        return cls(
            registry=RegistryTerms(activation_delay=1, thaw_period=7_200),
            # three members can sit on a stage of four nodes
            escrow=EscrowTerms(verifier_share_bps=2_000, route_window=60, commit_window=300, verification_window=3_900),
            verification=VerificationTerms(
                sampling_rate_bps=10_000,
                committee_seats=8,
                minimum_reveals=1,
                secret_window=20,
                attest_window=40,
                reveal_window=30,
                challenge_window=3,
                jail_period=60,
            ),
            tabs=TabTerms(secret_window=20, draw_window=120, opening_window=120, close_period=300, tokens_per_draw=256),
            plan_activation_delay=1,
        )


@dataclass(frozen=True, slots=True)
class Deployment:
    """Addresses of one deployment. `first_block` is where its events begin."""

    chain_id: int
    node_registry: ChecksumAddress
    shard_assignments: ChecksumAddress
    inference_escrow: ChecksumAddress
    output_verification: ChecksumAddress
    request_tabs: ChecksumAddress
    treasury: ChecksumAddress
    first_block: int

    @property
    def contracts(self) -> dict[str, ChecksumAddress]:
        """Addresses by contract name, in the order of CONTRACT_NAMES."""
        return dict(
            zip(
                CONTRACT_NAMES,
                (
                    self.node_registry,
                    self.shard_assignments,
                    self.inference_escrow,
                    self.output_verification,
                    self.request_tabs,
                ),
                strict=True,
            )
        )

    def save(self, path: Path) -> None:
        """Write the deployment file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(path)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Deployment:
        """From decoded JSON; ValueError names what is missing or wrong."""
        missing = [item.name for item in fields(cls) if item.name not in content]
        if missing:
            raise ValueError(f"not a deployment: {', '.join(missing)} missing")
        return cls(
            chain_id=int(content["chain_id"]),
            first_block=int(content["first_block"]),
            **{
                item.name: address(content[item.name])
                for item in fields(cls)
                if item.name not in {"chain_id", "first_block"}
            },
        )

    @classmethod
    def load(cls, path: Path) -> Deployment:
        """Read a deployment file; ValueError says what to do if it is not one."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a deployment file ({error}); `bsns-coordinator deploy` writes one"
            ) from error


def create_address(deployer: str, nonce: int) -> ChecksumAddress:
    """Address of the contract that `deployer` creates with transaction `nonce` (CREATE)."""
    return address(keccak256(rlp.encode([bytes.fromhex(deployer[2:]), nonce]))[12:])


def solidity_struct(
    contract: str, terms: RegistryTerms | EscrowTerms | VerificationTerms | TabTerms
) -> tuple[int, ...]:
    """Terms as the constructor of `contract` takes them: by field name, in the order of its ABI."""
    constructor = next(item for item in contract_artifact(contract).abi if item["type"] == "constructor")
    components = next(item["components"] for item in constructor["inputs"] if item["type"] == "tuple")
    values = {_camel_case(key): value for key, value in asdict(terms).items()}
    return tuple(values[item["name"]] for item in components)


def _camel_case(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


async def deploy(
    rpc_url: str,
    signer: Signer,
    terms: Terms,
    *,
    treasury: str | None = None,
    progress: Callable[[str, str], None] = lambda _name, _address: None,
) -> Deployment:
    """Create the five contracts from `signer`'s account and return where they are.

    `treasury` receives the protocol fee (default: the deployer); `progress` is called with name and address of each
    contract. Raises ChainError if the account has been used by somebody else meanwhile, or a contract refuses its
    terms.
    """
    from bsns.chain.client import raw_connection, send_and_wait

    async with raw_connection(rpc_url) as connection:
        nonce = await connection.eth.get_transaction_count(signer.address, "pending")
        first_block = await connection.eth.block_number + 1
        chain_id = await connection.eth.chain_id
        where = {name: create_address(signer.address, nonce + index) for index, name in enumerate(CONTRACT_NAMES)}
        registry, assignments, escrow, verification, tabs = (where[name] for name in CONTRACT_NAMES)
        receiver = address(treasury or signer.address)
        arguments: dict[str, list[Any]] = {
            "NodeRegistry": [escrow, verification, tabs, solidity_struct("NodeRegistry", terms.registry)],
            "ShardAssignments": [registry, terms.plan_activation_delay],
            "InferenceEscrow": [
                registry,
                assignments,
                verification,
                tabs,
                receiver,
                solidity_struct("InferenceEscrow", terms.escrow),
            ],
            "OutputVerification": [registry, escrow, solidity_struct("OutputVerification", terms.verification)],
            "RequestTabs": [registry, assignments, escrow, solidity_struct("RequestTabs", terms.tabs)],
        }
        for index, name in enumerate(CONTRACT_NAMES):
            artifact = contract_artifact(name)
            factory = connection.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
            data = factory.constructor(*arguments[name]).data_in_transaction
            receipt = await send_and_wait(connection, signer, {"data": data}, nonce=nonce + index)
            created = address(receipt["contractAddress"])
            if created != where[name]:
                raise ChainError(
                    f"{name} came to {created}, not to {where[name]}: the deployer's account is in use elsewhere"
                )
            progress(name, created)
        return Deployment(chain_id, registry, assignments, escrow, verification, tabs, receiver, first_block)


__all__ = [
    "Deployment",
    "EscrowTerms",
    "RegistryTerms",
    "TabTerms",
    "Terms",
    "VerificationTerms",
    "create_address",
    "deploy",
    "solidity_struct",
]
