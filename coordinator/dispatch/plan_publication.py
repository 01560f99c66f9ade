"""From measurements to a plan on chain: gather nodes, plan, collect every node's consent, publish.

Owns the one offer in progress for one model. Promises that what is published is what the planner gave for the planning
record stored under the hash that the plan carries, that record and manifest are announced on chain before the plan if
they are small enough, and that every assigned node signed that very root. A node that refuses, stays silent, or whose
measurements nothing can be planned with is left out for a while, each time for twice as long until a plan stands: no
few nodes can keep the others from one. A plan is replaced when a stage has had no live replica for longer than the
limit; or, not too often, when nodes have come, gone or changed speed or their network is of another class (which
`network_class` says), and the change is worth its cost
(bsns.planning.rebalancing). Nothing here survives a restart, and nothing needs to: without a published plan the offer
is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog

from bsns.chain.client import ChainClient
from bsns.planning import Objective, Partition, PlanningError, Transfers
from bsns.planning.measured import NEWCOMER_LINK, check_measurements
from bsns.planning.published import PLANNER, PLANNER_VERSION, decision_of_record, plan_of_record
from bsns.planning.rebalancing import Change, Decision, MoveTerms, drifted, row_ns
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.identifiers import ModelId, ProtocolError, keccak256, model_id
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.model_graph import ModelGraph
from bsns.protocol.plan import ShardPlan
from bsns.protocol.planning_record import MAXIMUM_ANNOUNCED_BYTES, PlanningRecord, RebalancingTerms, SignedMeasurements
from bsns.protocol.typed_data import PLAN_CONSENT, Domain, is_signed_by, signing_digest
from bsns.v1 import coordination_pb2
from coordinator.dispatch.node_pool import NodePool
from coordinator.dispatch.node_standing import NodeStandings
from coordinator.network_state import PlanState
from coordinator.storage import Intent, IntentState, Storage
from coordinator.transaction_outbox import TransactionOutbox, WorkerThread

_FEE_BYTES: Final = 16
_MAXIMUM_REFUSAL_SHOWN: Final = 200
_DEFAULT_MOVES: Final = MoveTerms()
_PUBLISHABLE: Final = (NodeStatus.PENDING, NodeStatus.ACTIVE)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """What the operator decides. The first plan waits for `minimum_nodes`, a replacement for
    `replacement_minimum_nodes`. `batch` is how many sessions share a step in the measured times that are planned with;
    the prior link stands for pairs of nodes that have not measured each other; `moves` says when a change of a plan is
    worth it. The rest: bsns.planning.Terms.
    """

    fee_per_token: int
    minimum_nodes: int = 1
    replacement_minimum_nodes: int = 1
    stage_count: int | None = None
    replicas: int = 1
    spread_leftover: bool = True
    objective: Objective = Objective.THROUGHPUT
    concurrent_sessions: int = 4
    session_tokens: int = 2_048
    seed: int = 0
    batch: int = 1
    prior_latency_ns: int = NEWCOMER_LINK.latency_ns
    prior_bytes_per_second: int = NEWCOMER_LINK.bytes_per_second
    moves: MoveTerms = _DEFAULT_MOVES


@dataclass(frozen=True, slots=True)
class PublicationLimits:
    """Seconds. `refusal_pause_seconds` is how long a node is left out at first, doubled each time up to
    `maximum_pause_seconds`. A plan that serves is judged again at the earliest `rebalance_after_seconds` after it took
    effect, when nodes have been away, new, or off by `drift_bps` for `settle_seconds`.
    """

    gather_seconds: float = 1.0
    consent_wait_seconds: float = 120.0
    consent_validity_seconds: int = 900
    refusal_pause_seconds: float = 60.0
    maximum_pause_seconds: float = 3_600.0
    failure_pause_seconds: float = 5.0
    replace_after_seconds: float = 30.0
    rebalance_after_seconds: float = 120.0
    settle_seconds: float = 20.0
    drift_bps: int = 2_500


@dataclass(frozen=True, slots=True)
class _Absence:
    """A node that is left out `until` then, by the clock; the next time for longer than `seconds`."""

    until: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Swarm:
    """Nodes that could serve, with the time of a row on each, and the class of their network: what a judgement of the
    plan in force was based on.
    """

    rows: frozenset[tuple[str, int]]
    network_class: int | None


@dataclass(slots=True)
class _Offer:
    plan: ShardPlan
    is_repair: bool
    epoch: int
    record: PlanningRecord
    deadline: int
    made_at: float
    message: coordination_pb2.AttachResponse
    consents: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> set[str]:
        return {str(item.node) for item in self.plan.assignments}


def planning_record(
    model: ModelId, measurements: Iterable[SignedMeasurements], policy: PlanPolicy, previous: bytes | None = None
) -> PlanningRecord:
    """What this release's planner is given for `policy`: every node considered, also one that will get nothing.
    `previous` is the id of the plan in force.

    ProtocolError if there are no measurements, or too many to record.
    """
    return PlanningRecord(
        planner=PLANNER,
        planner_version=PLANNER_VERSION,
        model=model,
        objective=policy.objective,
        stage_count=policy.stage_count,
        replicas=policy.replicas,
        spread_leftover=policy.spread_leftover,
        concurrent_sessions=policy.concurrent_sessions,
        session_tokens=policy.session_tokens,
        transfers=Transfers.RELAYED,  # what our nodes do
        seed=policy.seed,
        batch=policy.batch,
        prior_latency_ns=policy.prior_latency_ns,
        prior_bytes_per_second=policy.prior_bytes_per_second,
        measurements=tuple(measurements),
        rebalancing=None
        if previous is None
        else RebalancingTerms(
            previous,
            policy.moves.horizon_seconds,
            policy.moves.load_bytes_per_second,
            policy.moves.minimum_gain_bps,
            policy.moves.minimum_drift_gain_bps,
        ),
    )


def plannable(
    measurements: Iterable[SignedMeasurements], manifest: ModelManifest, policy: PlanPolicy
) -> tuple[list[SignedMeasurements], dict[str, str]]:
    """Those measurements that can be planned with, and by node why the others cannot."""
    graph = ModelGraph.of_manifest(manifest)
    usable: list[SignedMeasurements] = []
    refused: dict[str, str] = {}
    for item in measurements:
        try:
            check_measurements(item.measurements, graph, batch=policy.batch)
        except PlanningError as error:
            refused[item.measurements.node] = str(error)
        else:
            usable.append(item)
    return usable, refused


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
        standings: NodeStandings,
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
        self._standings = standings
        self._domain = assignments_domain
        self._limits = limits
        self._clock = clock
        self._blocking = run_blocking
        self._offer: _Offer | None = None
        self._left_out: dict[str, _Absence] = {}
        self._uncovered_since: float | None = None
        self._different: tuple[_Swarm, float] | None = None
        self._judged: tuple[bytes, _Swarm] | None = None
        self._planned_in: tuple[bytes, int | None] | None = None
        self.network_class: int | None = None
        self._not_before = 0.0
        self._publish_key: str | None = None
        self._manifest_is_out = False
        self.waits_for: str | None = None

    async def step(self, now: int) -> None:
        """Do what is next for this model at Unix second `now` (chain time)."""
        if await self._blocking(lambda: self._storage.model(self.model)) is None:
            await self._register()
            return
        if not self._manifest_is_out:
            self._manifest_is_out = await self._announce(self.manifest.to_bytes(), "the manifest file")
        plans = await self._blocking(lambda: self._storage.plans(self.model, self._outbox.sender))
        current = plans[-1] if plans else None
        if await self._is_publishing(current):
            return
        if self._offer is not None:
            await self._continue_offer(self._offer)
            return
        if current is None:
            if self._clock() >= self._not_before:
                await self._make_offer(None, now, is_repair=True)
            return
        serving = await self.serving_nodes(now)
        if not self._is_covered(current, serving):
            if self._clock() - (self._uncovered_since or 0.0) < self._limits.replace_after_seconds:
                self._rest()
            elif self._clock() >= self._not_before:
                await self._make_offer(current, now, is_repair=True)
        elif self._clock() >= self._not_before and await self._is_worth_judging(current, serving, now):
            await self._make_offer(current, now, is_repair=False)
        else:
            self._rest()

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
                    offer.record.hash,
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

    async def _announce(self, document: bytes, where: str) -> bool:
        """Have `document` on chain, where auditors look for it. Whether nothing is left to do: it lies there, or is too
        large, in which case the log says which file (`where`) to give them.
        """
        digest = keccak256(document)
        if len(document) > MAXIMUM_ANNOUNCED_BYTES:
            _log.warning(
                "document_too_large_to_announce",
                model=self._name,
                document="0x" + digest.hex(),
                size_bytes=len(document),
                maximum_bytes=MAXIMUM_ANNOUNCED_BYTES,
                advice=f"auditors need a file: hand out {where}",
            )
            return True
        if await self._blocking(lambda: self._storage.document(digest)) is not None:
            return True
        await self._outbox.want(Intent(f"announce/0x{digest.hex()}", "ShardAssignments", "announce", (document,)))
        return False

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

    def _rest(self) -> None:
        self.waits_for = None
        self._left_out.clear()

    def _is_covered(self, current: PlanState, serving: set[str]) -> bool:
        stages = {item.stage for item in current.assignments}
        covered = {item.stage for item in current.assignments if item.node in serving}
        if stages == covered:
            self._uncovered_since = None
            return True
        if self._uncovered_since is None:
            self._uncovered_since = self._clock()
            _log.warning("stages_without_live_node", model=self._name, stages=sorted(stages - covered))
        return False

    async def _is_worth_judging(self, current: PlanState, serving: set[str], now: int) -> bool:
        """Whether the swarm is another one than the plan in force was made for, has stayed so for a while, and was not
        judged yet. The plan stands for a while first: each change costs loads.
        """
        if now < current.effective_at + self._limits.rebalance_after_seconds:
            return False
        swarm, differs = await self._blocking(lambda: self._compared(current, serving))
        if not differs or self._judged == (current.plan_id, swarm):
            self._different = None
            return False
        if self._different is None or self._different[0] != swarm:
            self._different = swarm, self._clock()
        return self._clock() - self._different[1] >= self._limits.settle_seconds

    def _compared(self, current: PlanState, serving: set[str]) -> tuple[_Swarm, bool]:
        """The swarm as it is, and whether the plan's nodes were others or had other times."""
        usable, _ = self.measured(serving)
        measured = {item.measurements.node: item.measurements for item in usable}
        swarm = _Swarm(frozenset((node, row_ns(item)) for node, item in measured.items()), self.network_class)
        record = self._storage.planning_record(current.measurements_hash)
        if record is None:
            return swarm, {item.node for item in current.assignments} != set(measured)
        planned = [item.measurements for item in record.measurements]
        if {item.node for item in planned} != set(measured):
            return swarm, True
        if self._planned_in is None or self._planned_in[0] != current.plan_id or self._planned_in[1] is None:
            self._planned_in = current.plan_id, self.network_class
        is_another_network = self.network_class != self._planned_in[1]
        return swarm, is_another_network or bool(drifted(planned, measured, self._limits.drift_bps))

    async def serving_nodes(self, now: int) -> set[str]:
        """Nodes that are attached, alive, Pending or Active on chain, and not suspect."""
        accounts = await self._blocking(self._storage.nodes)
        return {
            node
            for node in self._pool.live()
            if (account := accounts.get(node)) is not None
            and account.status_at(now) in _PUBLISHABLE
            and not self._standings.of(node).is_suspect
        }

    async def _make_offer(self, current: PlanState | None, now: int, *, is_repair: bool) -> None:
        clock = self._clock()
        absent = {node for node, absence in self._left_out.items() if absence.until > clock}
        present = await self.serving_nodes(now) - absent
        usable, refused = await self._blocking(lambda: self.measured(present))
        for node, reason in refused.items():
            self._leave_out(node, reason)
        minimum = self._policy.minimum_nodes if current is None else self._policy.replacement_minimum_nodes
        if len(usable) < max(minimum, 1):
            self.waits_for = f"nodes: {len(usable)} of {minimum} are attached, staked and measured"
            return
        if self._pool.seconds_unchanged < self._limits.gather_seconds:
            self.waits_for = "the last nodes to join"
            return
        if current is not None:
            rows = frozenset((item.measurements.node, row_ns(item.measurements)) for item in usable)
            self._judged = current.plan_id, _Swarm(rows, self.network_class)
        try:
            record, partition, plan = await self._blocking(lambda: self._plan(usable, current))
        except ProtocolError as error:  # a PlanningError, or measurements too large to record
            self.waits_for = f"a possible plan: {error}"
            self._not_before = self._clock() + self._limits.failure_pause_seconds
            _log.warning("no_plan_possible", model=self._name, reason=str(error))
            return
        if plan is None:
            self._rest()
            return
        epoch = int(await self._chain.call("ShardAssignments", "nextEpoch", self.model, self._outbox.sender))
        deadline = now + self._limits.consent_validity_seconds
        message = self._offer_message(plan, epoch, record.hash, deadline)
        self._offer = _Offer(plan, is_repair, epoch, record, deadline, self._clock(), message)
        self.waits_for = "the nodes' consents"
        _log_offer(self._name, epoch, plan, partition)
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
        if not offer.is_repair:
            # The plan in force serves. Who cannot change now is not left out for it: the change is not made.
            reasons = {node: offer.refusals.get(node, "no answer") for node in sorted(failed)}
            _log.warning("plan_change_given_up", model=self._name, reasons=reasons)
            failed = set()
        for node in failed:
            self._leave_out(node, offer.refusals.get(node, "detached" if node in gone else "no answer to the offer"))
        self._offer = None

    def _leave_out(self, node: str, reason: str) -> None:
        before, limits = self._left_out.get(node), self._limits
        longer = limits.refusal_pause_seconds if before is None else 2 * before.seconds
        seconds = min(longer, limits.maximum_pause_seconds)
        self._left_out[node] = _Absence(self._clock() + seconds, seconds)
        _log.warning("node_left_out", model=self._name, node=node, reason=reason, seconds=seconds)

    def measured(self, nodes: set[str]) -> tuple[list[SignedMeasurements], dict[str, str]]:
        known = self._storage.measurements(self.model)
        return plannable([known[node] for node in sorted(nodes & set(known))], self.manifest, self._policy)

    def _plan(
        self, measurements: list[SignedMeasurements], current: PlanState | None
    ) -> tuple[PlanningRecord, Partition, ShardPlan | None]:
        """Takes seconds for hundreds of nodes: the record alone is megabytes of their links. No plan where the one in
        force is to stay.
        """
        record = planning_record(self.model, measurements, self._policy, None if current is None else current.plan_id)
        if current is None:
            partition = plan_of_record(record, self.manifest)
        else:
            decision = decision_of_record(record, self.manifest, current.shard_plan)
            _log_decision(self._name, current.epoch, decision)
            partition = decision.partition
            if decision.change is Change.STAY:
                return record, partition, None
        self._storage.keep_planning_record(record)
        return record, partition, partition.to_shard_plan()

    async def _publish(self, offer: _Offer) -> None:
        key = f"publishPlan/0x{self.model.hex()}/{offer.epoch}/{offer.plan.root.hex()[:16]}/{offer.deadline}"
        arguments = (
            self.model,
            offer.epoch,
            self._policy.fee_per_token,
            offer.record.hash,
            tuple(item.as_tuple() for item in offer.plan.assignments),
            offer.deadline,
            tuple(offer.consents[item.node] for item in offer.plan.assignments),
        )
        self._publish_key = key
        self._offer = None
        self._uncovered_since = None
        # Intents are sent in the order they are wanted: who sees the plan finds its record already there.
        await self._announce(
            offer.record.to_bytes(), f"what `bsns-coordinator record 0x{offer.record.hash.hex()}` writes"
        )
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
                assignments=[item.to_message() for item in plan.assignments],
            )
        )

    @property
    def _name(self) -> str:
        return self.manifest.name


def _log_decision(name: str, epoch: int, decision: Decision) -> None:
    _log.info(
        "plan_judged",
        model=name,
        epoch=epoch,
        trigger=str(decision.trigger),
        change=str(decision.change),
        before_nanoseconds=decision.before_ns,
        after_nanoseconds=decision.partition.value_ns,
        load_bytes=decision.load_bytes,
        moved_bytes=decision.moved_bytes,
    )


def _log_offer(name: str, epoch: int, plan: ShardPlan, partition: Partition) -> None:
    _log.info(
        "plan_offered",
        model=name,
        epoch=epoch,
        nodes=len({item.node for item in plan.assignments}),
        unused=len(partition.unused),
        stages=plan.stage_count,
        solver=partition.solver,
        objective=partition.objective,
        value_nanoseconds=partition.value_ns,
        lower_bound_nanoseconds=partition.lower_bound_ns,
        ratio=round(partition.ratio, 4),
    )
