"""What the node reads from the chain, as frozen values, remembered for one block.

Owns the reads that sessions, duties and verification need, and the search for where other nodes are reached. Promises
that a remembered answer is never older than the head it was read at, that "not there (yet)" is never remembered, and
that values are checked for their types. Does not write: see bsns.chain.submitter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from eth_typing import ChecksumAddress

from bsns.chain.client import Block, ChainClient, ChainEvent
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainUnavailableError
from bsns.protocol.contract_states import NodeStatus, Phase, RequestStatus
from bsns.protocol.endpoints import split_endpoint
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.plan import Assignment
from bsns.protocol.typed_data import (
    Domain,
    assignments_domain,
    escrow_domain,
    registry_domain,
    tabs_domain,
    verification_domain,
)

# Bounds memory when a caller asks for many made-up requests within one block.
_REMEMBERED_LIMIT: Final = 10_000
# A head older than this is asked for again even if nobody polled.
_HEAD_SECONDS: Final = 1.0
_REREAD_BLOCKS: Final = 32


@dataclass(frozen=True, slots=True)
class RequestView:
    requester: ChecksumAddress
    status: RequestStatus
    stage_count: int
    deadline: int
    prompt_tokens: int
    maximum_tokens: int
    plan_id: bytes
    input_commitment: bytes
    # Paid out of a tab: not on the chain, or not yet.
    granted: bool = False


@dataclass(frozen=True, slots=True)
class StageView:
    node: ChecksumAddress
    first_unit: int
    end_unit: int
    execution_class: bytes


@dataclass(frozen=True, slots=True)
class ModelView:
    manifest_hash: bytes
    weight_root: bytes
    unit_count: int


@dataclass(frozen=True, slots=True)
class VerificationView:
    phase: Phase
    round: int
    stage_count: int
    sampled: bool
    attest_deadline: int
    reveal_deadline: int


@dataclass(frozen=True, slots=True)
class StageRecordView:
    commitment: bytes
    revealed: bool
    disputed: bool


@dataclass(frozen=True, slots=True)
class NodeEndpoint:
    """Where a node is reached, as it registered it; `certificate_hash` is SHA-256 of its TLS certificate."""

    endpoint: str
    certificate_hash: bytes


@dataclass(frozen=True, slots=True)
class SigningDomains:
    """The EIP-712 domains of one deployment."""

    registry: Domain
    assignments: Domain
    escrow: Domain
    verification: Domain
    tabs: Domain

    @classmethod
    def of(cls, deployment: Deployment) -> SigningDomains:
        chain = deployment.chain_id
        return cls(
            registry_domain(chain, deployment.node_registry),
            assignments_domain(chain, deployment.shard_assignments),
            escrow_domain(chain, deployment.inference_escrow),
            verification_domain(chain, deployment.output_verification),
            tabs_domain(chain, deployment.request_tabs),
        )


class ChainView:
    """Reads at the head; every method may raise ChainUnavailableError."""

    def __init__(self, client: ChainClient, deployment: Deployment) -> None:
        self.client, self.deployment = client, deployment
        self._head: Block | None = None
        self._head_read_at = 0.0
        self._remembered: dict[tuple[object, ...], Any] = {}
        self._endpoints: dict[str, tuple[int, NodeEndpoint]] = {}
        self._registered: dict[ChecksumAddress, None] = {}
        self._registered_up_to = deployment.first_block - 1
        # Requests that are paid out of tabs, as their grants say: the chain may never hear of them.
        self._granted: dict[bytes, tuple[RequestView, tuple[StageView, ...]]] = {}

    async def head(self, *, fresh: bool = False) -> Block:
        """The newest block known; asked for again when `fresh` or older than a second."""
        if self._head is None or fresh or time.monotonic() - self._head_read_at > _HEAD_SECONDS:
            head = await self.client.head()
            if self._head is None or head.hash != self._head.hash:
                self._remembered.clear()
            self._head, self._head_read_at = head, time.monotonic()
        return self._head

    async def request(self, request_id: bytes) -> RequestView:
        raw = await self._read("InferenceEscrow", "requestOf", request_id)
        view = _request(raw)
        if view.status not in (RequestStatus.ROUTED, RequestStatus.SETTLED):
            # The block that routes it may be newer than what was remembered: look again at what can still change.
            view = _request(await self._read("InferenceEscrow", "requestOf", request_id, fresh=True))
        if view.status is RequestStatus.ABSENT and request_id in self._granted:
            return self._granted[request_id][0]
        return view

    def grant(self, request_id: bytes, view: RequestView, stages: tuple[StageView, ...]) -> None:
        """Take a request that is not on the chain for what `view` says, until it is."""
        self._granted[bytes(request_id)] = view, stages

    def revoke(self, request_id: bytes) -> None:
        """Nobody asks for the request any more."""
        self._granted.pop(bytes(request_id), None)

    def is_granted(self, request_id: bytes) -> bool:
        return bytes(request_id) in self._granted

    async def stages(self, request_id: bytes) -> tuple[StageView, ...]:
        """The route; empty while there is none."""
        raw = await self._read("InferenceEscrow", "stagesOf", request_id, empty_is_unknown=True)
        if not raw and request_id in self._granted:
            return self._granted[request_id][1]
        return tuple(
            StageView(address(item.node), int(item.firstUnit), int(item.endUnit), bytes(item.executionClass))
            for item in raw
        )

    async def node_status(self, node: str) -> NodeStatus:
        status = NodeStatus(await self._read("NodeRegistry", "statusOf", node))
        if status is not NodeStatus.ACTIVE:
            status = NodeStatus(await self._read("NodeRegistry", "statusOf", node, fresh=True))
        return status

    async def registered_nodes(self) -> tuple[ChecksumAddress, ...]:
        """Every node that has ever registered, oldest first; `node_status` says what has become of one."""
        head = await self.head()
        if head.number > self._registered_up_to:
            # What was read before is read again as far as a reorganisation may have changed it.
            first = max(self.deployment.first_block, self._registered_up_to + 1 - _REREAD_BLOCKS)
            events = await self.client.events_between(
                first, head.number, contract="NodeRegistry", name="NodeRegistered"
            )
            self._registered.update((address(event.arguments["node"]), None) for event in events)
            self._registered_up_to = head.number
        return tuple(self._registered)

    async def model_of_plan(self, plan_id: bytes) -> bytes:
        """Model id of a plan; 32 zero bytes if there is no such plan."""
        return bytes((await self._read("ShardAssignments", "planOf", plan_id)).modelId)

    async def plan(self, plan_id: bytes) -> Any:
        """IShardAssignments.Plan; all zero if there is no such plan."""
        return await self._read("ShardAssignments", "planOf", plan_id)

    async def plan_root(self, plan_id: bytes) -> bytes:
        """Merkle root over the assignments of a plan; 32 zero bytes if there is no such plan."""
        return bytes((await self._read("ShardAssignments", "planOf", plan_id)).root)

    async def assignments_of(
        self, node: ChecksumAddress, lookback_blocks: int
    ) -> tuple[tuple[ModelId, Assignment], ...]:
        """What `node` has in the newest plan of each publisher for each model, of those of the last blocks."""
        head = await self.head(fresh=True)
        first = max(self.deployment.first_block, head.number - lookback_blocks)
        events = await self.client.events_between(first, head.number, contract="ShardAssignments", name="PlanPublished")
        newest = {(event.arguments["modelId"], event.arguments["publisher"]): event for event in events}
        return tuple(
            (ModelId(bytes(model)), assignment)
            for (model, _), event in newest.items()
            for assignment in map(Assignment.from_tuple, map(tuple, event.arguments["assignments"]))
            if assignment.node == node
        )

    async def model(self, model_id: bytes) -> ModelView:
        raw = await self._read("ShardAssignments", "modelOf", model_id)
        return ModelView(bytes(raw.manifestHash), bytes(raw.weightRoot), int(raw.unitCount))

    async def verification(self, request_id: bytes) -> VerificationView:
        raw = await self.client.call("OutputVerification", "verificationOf", request_id)
        return VerificationView(
            Phase(raw.phase),
            int(raw.round),
            int(raw.stageCount),
            bool(raw.sampled),
            int(raw.attestDeadline),
            int(raw.revealDeadline),
        )

    async def entropy(self, request_id: bytes) -> bytes:
        """Hash of the block that the draw's entropy comes from; ChainUnavailableError if the endpoint lacks it."""
        raw = await self.client.call("OutputVerification", "verificationOf", request_id)
        block = await self.client.block(int(raw.entropyBlock))
        if block is None:
            raise ChainUnavailableError(f"the endpoint has no block {raw.entropyBlock}, whose hash the draw used")
        return block.hash

    async def stage_record(self, request_id: bytes, stage: int) -> StageRecordView:
        raw = await self.client.call("OutputVerification", "stageRecordOf", request_id, stage)
        return StageRecordView(bytes(raw.commitment), bool(raw.revealed), bool(raw.disputed))

    async def attestation(self, request_id: bytes, round_: int, stage: int, node: str) -> tuple[bytes, bool]:
        """Commitment (zero: none) and whether it was opened."""
        raw = await self.client.call("OutputVerification", "attestationOf", request_id, round_, stage, node)
        return bytes(raw.commitment), bool(raw.revealed)

    async def is_seated(self, request_id: bytes, stage: int, node: str) -> bool:
        return bool(await self._read("OutputVerification", "isSeated", request_id, stage, node))

    async def endpoint(self, node: str, *, fresh: bool = False) -> NodeEndpoint | None:
        """Where `node` is reached: its last registration or change. None if it never registered."""
        head = await self.head()
        known = self._endpoints.get(node)
        if known is not None and not fresh:
            return known[1]
        # What was read up to a block need not be read again.
        first = known[0] + 1 if known is not None else self.deployment.first_block
        found: list[ChainEvent] = []
        for name in ("NodeRegistered", "EndpointChanged"):
            found += await self.client.events_between(
                first, head.number, contract="NodeRegistry", name=name, filters={"node": node}
            )
        if not found:
            return known[1] if known is not None else None
        last = max(found, key=lambda event: (event.block_number, event.log_index)).arguments
        endpoint = NodeEndpoint(str(last["endpoint"]), bytes(last["certificateHash"]))
        try:
            split_endpoint(endpoint.endpoint)
        except ValueError:
            return None
        self._endpoints[node] = (head.number, endpoint)
        return endpoint

    def known_endpoint(self, node: str) -> NodeEndpoint | None:
        """What `endpoint` found the last time, without asking the chain."""
        known = self._endpoints.get(node)
        return None if known is None else known[1]

    async def events_since(
        self, first: int, last: int, name: str, filters: Mapping[str, Any] | None = None
    ) -> tuple[ChainEvent, ...]:
        """Events of OutputVerification in blocks [first, last]."""
        return await self.client.events_between(first, last, contract="OutputVerification", name=name, filters=filters)

    async def _read(
        self, contract: str, function: str, *arguments: Any, fresh: bool = False, empty_is_unknown: bool = False
    ) -> Any:
        head = await self.head()
        key = (contract, function, *arguments)
        if not fresh and key in self._remembered:
            return self._remembered[key]
        value = await self.client.call(contract, function, *arguments)
        if self._head is not None and self._head.hash == head.hash and not (empty_is_unknown and not value):
            if len(self._remembered) >= _REMEMBERED_LIMIT:
                self._remembered.clear()
            self._remembered[key] = value
        return value


def _request(raw: Any) -> RequestView:
    try:
        return RequestView(
            address(raw.requester),
            RequestStatus(raw.status),
            int(raw.stageCount),
            int(raw.deadline),
            int(raw.promptTokens),
            int(raw.maximumTokens),
            bytes(raw.planId),
            bytes(raw.inputCommitment),
        )
    except (AttributeError, ValueError) as error:
        raise ChainUnavailableError(f"the escrow answered something that is no request: {error}") from error
