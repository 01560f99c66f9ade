"""From measurements to a plan on chain: gather nodes, plan, collect every node's consent, publish.

Owns the one offer in progress for one model. Promises that what is published is what the planner gave for
measurements that are stored under the hash the plan carries, and that every assigned node signed that very root. A
node that refuses or stays silent is left out of the next attempt for a while. A plan is replaced only when a stage
has had no live replica for longer than the limit. Nothing here survives a restart, and nothing needs to: without a
published plan the offer is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from bsns.chain.client import ChainClient
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.identifiers import ProtocolError, model_id
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.measurements import NodeMeasurements, measurements_hash
from bsns.protocol.plan import ShardPlan
from bsns.protocol.typed_data import PLAN_CONSENT, Domain, is_signed_by, signing_digest
from bsns.v1 import common_pb2, coordination_pb2
from coordinator.dispatch.node_pool import NodePool
from coordinator.network_state import PlanState
from coordinator.planning import PlanningError, capability_of, plan_chain, to_shard_plan, unit_costs
from coordinator.storage import Intent, IntentState, Storage
from coordinator.transaction_outbox import TransactionOutbox, WorkerThread

_FEE_BYTES: Final = 16
_MAXIMUM_REFUSAL_SHOWN: Final = 200
_PUBLISHABLE: Final = (NodeStatus.PENDING, NodeStatus.ACTIVE)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """What the operator decides. The first plan waits for `minimum_nodes`, a replacement for
    `replacement_minimum_nodes`.
    """

    fee_per_token: int
    minimum_nodes: int = 1
    replacement_minimum_nodes: int = 1
    stage_count: int | None = None
    replicas: int = 1
    concurrent_sessions: int = 4
    session_tokens: int = 2_048


@dataclass(frozen=True, slots=True)
class PublicationLimits:
    """Seconds."""

    gather_seconds: float = 1.0
    consent_wait_seconds: float = 120.0
    consent_validity_seconds: int = 900
    refusal_pause_seconds: float = 60.0
    failure_pause_seconds: float = 5.0
    replace_after_seconds: float = 30.0


@dataclass(slots=True)
class _Offer:
    plan: ShardPlan
    epoch: int
    measurements_hash: bytes
    deadline: int
    made_at: float
    message: coordination_pb2.AttachResponse
    consents: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> set[str]:
        return {str(item.node) for item in self.plan.assignments}


def compute_plan(
    manifest: ModelManifest, measurements: Mapping[str, NodeMeasurements], policy: PlanPolicy
) -> ShardPlan:
    """The plan that `measurements` give, nodes in ascending order of their address. Pure: anyone can repeat it.

    Raises PlanningError.
    """
    units = unit_costs(manifest, concurrent_sessions=policy.concurrent_sessions, session_tokens=policy.session_tokens)
    ordered = sorted(measurements.values(), key=lambda item: bytes.fromhex(item.node[2:]))
    capabilities = [capability_of(item) for item in ordered]
    partition = plan_chain(units, capabilities, stage_count=policy.stage_count, replicas=policy.replicas)
    return to_shard_plan(partition)


class PlanPublication:
    """Keeps one model planned. `step` is one look at the situation; `consent` takes what nodes answer."""

    def __init__(
        self,
        manifest: ModelManifest,
        policy: PlanPolicy,
        *,
        chain: ChainClient,
        storage: Storage,
        pool: NodePool,
        outbox: TransactionOutbox,
        assignments_domain: Domain,
        limits: PublicationLimits,
        clock: Callable[[], float],
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self.manifest = manifest
        self.model = model_id(manifest.manifest_hash, manifest.weight_root, len(manifest.units))
        self._policy = policy
        self._chain = chain
        self._storage = storage
        self._pool = pool
        self._outbox = outbox
        self._domain = assignments_domain
        self._limits = limits
        self._clock = clock
        self._blocking = run_blocking
        self._offer: _Offer | None = None
        self._left_out: dict[str, float] = {}
        self._uncovered_since: float | None = None
        self._not_before = 0.0
        self._publish_key: str | None = None
        self.waits_for: str | None = None

    async def step(self, now: int) -> None:
        """Do what is next for this model at Unix second `now` (chain time)."""
        if await self._blocking(lambda: self._storage.model(self.model)) is None:
            await self._register()
            return
        plans = await self._blocking(lambda: self._storage.plans(self.model, self._outbox.sender))
        current = plans[-1] if plans else None
        if await self._is_publishing(current):
            return
        if self._offer is not None:
            await self._continue_offer(self._offer)
            return
        if current is not None and not await self._needs_replacement(current, now):
            self.waits_for = None
            return
        if self._clock() >= self._not_before:
            await self._make_offer(current, now)

    async def consent(self, node: str, message: coordination_pb2.PlanConsent) -> None:
        """A node's answer to the offer in progress; others are ignored. ProtocolError for a signature that is not its
        own.
        """
        offer = self._offer
        if offer is None or message.model_id != self.model or node not in offer.nodes:
            return
        if message.epoch != offer.epoch:
            return
        if not message.signature:
            offer.refusals[node] = message.refusal[:_MAXIMUM_REFUSAL_SHOWN] or "no reason given"
        elif bytes(message.plan_root) == offer.plan.root:
            digest = signing_digest(
                self._domain,
                PLAN_CONSENT,
                (
                    self.model,
                    self._outbox.sender,
                    offer.epoch,
                    self._policy.fee_per_token,
                    offer.measurements_hash,
                    offer.plan.root,
                    offer.deadline,
                ),
            )
            if not is_signed_by(digest, message.signature, node):
                raise ProtocolError(f"the consent is not signed by {node} over the offered plan")
            offer.consents[node] = bytes(message.signature)
        self._pool.changed()

    def offer_for(self, node: str) -> coordination_pb2.AttachResponse | None:
        """The offer in progress, if `node` has a part in it and has not answered: for a node that attaches again."""
        offer = self._offer
        if offer is None or node not in offer.nodes or node in offer.consents:
            return None
        return offer.message

    # -------------------------------------------------------------------------------------------------------- inside

    async def _register(self) -> None:
        self.waits_for = "the model's registration on chain"
        arguments = (
            self.manifest.manifest_hash,
            self.manifest.weight_root,
            len(self.manifest.units),
            self.manifest.name,
        )
        key = f"registerModel/0x{self.model.hex()}"
        await self._outbox.want(Intent(key, "ShardAssignments", "registerModel", arguments))

    async def _is_publishing(self, current: PlanState | None) -> bool:
        """Whether a publishPlan intent is under way, or mined but not yet read back."""
        if self._publish_key is None:
            return False
        key = self._publish_key
        record = await self._blocking(lambda: self._storage.intent(key))
        published = current is not None and f"publishPlan/0x{self.model.hex()}/{current.epoch}/" in key
        if record is not None and record.state != IntentState.REFUSED and not published:
            self.waits_for = "the plan's publication on chain"
            return True
        if record is not None and record.state == IntentState.REFUSED:
            _log.warning("plan_refused", model=self._name, reason=record.reason)
            self._not_before = self._clock() + self._limits.failure_pause_seconds
        self._publish_key = None
        return False

    async def _needs_replacement(self, current: PlanState, now: int) -> bool:
        serving = await self.serving_nodes(now)
        stages = {item.stage for item in current.assignments}
        covered = {item.stage for item in current.assignments if item.node in serving}
        if stages == covered:
            self._uncovered_since = None
            return False
        if self._uncovered_since is None:
            self._uncovered_since = self._clock()
            _log.warning("stages_without_live_node", model=self._name, stages=sorted(stages - covered))
        return self._clock() - self._uncovered_since >= self._limits.replace_after_seconds

    async def serving_nodes(self, now: int) -> set[str]:
        """Nodes that are attached, alive, and Pending or Active on chain."""
        accounts = await self._blocking(self._storage.nodes)
        return {
            node
            for node in self._pool.live()
            if (account := accounts.get(node)) is not None and account.status_at(now) in _PUBLISHABLE
        }

    async def _make_offer(self, current: PlanState | None, now: int) -> None:
        serving = await self.serving_nodes(now)
        known = await self._blocking(lambda: self._storage.measurements(self.model))
        clock = self._clock()
        self._left_out = {node: until for node, until in self._left_out.items() if until > clock}
        usable = {node: known[node] for node in sorted(serving - set(self._left_out)) if node in known}
        minimum = self._policy.minimum_nodes if current is None else self._policy.replacement_minimum_nodes
        if len(usable) < max(minimum, 1):
            self.waits_for = f"nodes: {len(usable)} of {minimum} are attached, staked and measured"
            return
        if self._pool.seconds_unchanged < self._limits.gather_seconds:
            self.waits_for = "the last nodes to join"
            return
        try:
            plan = compute_plan(self.manifest, usable, self._policy)
        except PlanningError as error:
            self.waits_for = f"a possible plan: {error}"
            self._not_before = clock + self._limits.failure_pause_seconds
            _log.warning("no_plan_possible", model=self._name, reason=str(error))
            return
        # The set names every node that was considered, also those that got nothing: that is what the plan follows from.
        digest = await self._blocking(lambda: self._storage.keep_measurement_set(list(usable.values())))
        if digest != measurements_hash(usable.values()):
            raise ProtocolError("the stored measurements are not those the plan was computed from")
        epoch = int(await self._chain.call("ShardAssignments", "nextEpoch", self.model, self._outbox.sender))
        deadline = now + self._limits.consent_validity_seconds
        self._offer = _Offer(plan, epoch, digest, deadline, clock, self._offer_message(plan, epoch, digest, deadline))
        self.waits_for = "the nodes' consents"
        _log.info("plan_offered", model=self._name, epoch=epoch, nodes=len(self._offer.nodes), stages=plan.stage_count)
        for node in sorted(self._offer.nodes):
            self._pool.tell(node, self._offer.message)

    async def _continue_offer(self, offer: _Offer) -> None:
        missing = offer.nodes - set(offer.consents)
        if not missing:
            await self._publish(offer)
            return
        silent = self._clock() - offer.made_at >= self._limits.consent_wait_seconds
        gone = missing - set(self._pool.live())
        failed = set(offer.refusals) | gone | (missing if silent else set())
        if not failed:
            return
        for node in failed:
            self._left_out[node] = self._clock() + self._limits.refusal_pause_seconds
            _log.warning(
                "node_left_out",
                model=self._name,
                node=node,
                reason=offer.refusals.get(node, "detached" if node in gone else "no answer to the offer"),
            )
        self._offer = None

    async def _publish(self, offer: _Offer) -> None:
        key = f"publishPlan/0x{self.model.hex()}/{offer.epoch}/{offer.plan.root.hex()[:16]}/{offer.deadline}"
        arguments = (
            self.model,
            offer.epoch,
            self._policy.fee_per_token,
            offer.measurements_hash,
            tuple(item.as_tuple() for item in offer.plan.assignments),
            offer.deadline,
            tuple(offer.consents[item.node] for item in offer.plan.assignments),
        )
        self._publish_key = key
        self._offer = None
        self._uncovered_since = None
        await self._outbox.want(Intent(key, "ShardAssignments", "publishPlan", arguments))

    def _offer_message(
        self, plan: ShardPlan, epoch: int, digest: bytes, deadline: int
    ) -> coordination_pb2.AttachResponse:
        return coordination_pb2.AttachResponse(
            offer=coordination_pb2.PlanOffer(
                model_id=self.model,
                publisher=bytes.fromhex(self._outbox.sender[2:]),
                epoch=epoch,
                fee_per_token=self._policy.fee_per_token.to_bytes(_FEE_BYTES, "big"),
                measurements_hash=digest,
                consent_deadline=deadline,
                assignments=[
                    common_pb2.Assignment(
                        stage=item.stage,
                        replica=item.replica,
                        first_unit=item.first_unit,
                        end_unit=item.end_unit,
                        node=bytes.fromhex(item.node[2:]),
                        work_weight=item.work_weight,
                        execution_class=item.execution_class,
                    )
                    for item in plan.assignments
                ],
            )
        )

    @property
    def _name(self) -> str:
        return self.manifest.name
