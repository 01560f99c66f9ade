"""Audit of a published plan: find what its planner was given, plan again, and compare.

Owns `bsns audit plan`. Takes the plan, the model's manifest and the planning record from the chain's logs, or the two
documents from files whose hashes must be those on chain. Promises one named check each, the first that fails being the
first difference, and no exception for whatever a publisher put into a document. Needs no archived state and no word of
the coordinator. Cannot know what a publisher left out: nodes that were Active and are not in the record are listed, for
people to judge. Trusts the RPC endpoint for logs and headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from eth_typing import ChecksumAddress

from bsns.audit.chain_facts import position
from bsns.audit.errors import AuditError
from bsns.audit.stakes import StakeLedger
from bsns.audit.verification import MAXIMUM_PROBLEMS, Check
from bsns.chain.errors import ChainUnavailableError
from bsns.planning import Partition
from bsns.planning.published import decision_of_record, plan_of_record
from bsns.planning.rebalancing import Decision, Trigger
from bsns.protocol.identifiers import ModelId, ProtocolError, address, keccak256, model_id
from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.merkle import MerkleTree
from bsns.protocol.plan import Assignment, ShardPlan
from bsns.protocol.planning_record import PlanningRecord
from bsns.protocol.typed_data import assignments_domain

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import ChainClient, ChainEvent
    from bsns.chain.deployment import Deployment

MAXIMUM_CLOCK_SKEW_S: Final = 300
"""How far a node's clock may be ahead of the block that published its measurements."""
BLOCKS_A_SEARCH: Final = 2_000
_MILLISECOND_NS: Final = 1_000_000


@dataclass(frozen=True)
class PlanAudit:
    """What was found. `partition` is None where the plan could not be computed again, `decision` where it was, and
    replaced no other.

    `unrecorded` nodes were Active on chain when the plan was published and are not in its record. Times in Unix
    seconds; `oldest_measured_at` is None without a record.
    """

    plan_id: bytes
    model_id: bytes
    publisher: ChecksumAddress
    epoch: int
    block_number: int
    published_at: int
    assignments: tuple[Assignment, ...]
    checks: tuple[Check, ...]
    partition: Partition | None
    decision: Decision | None
    oldest_measured_at: int | None
    unrecorded: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return all(item.ok for item in self.checks)

    def summary(self) -> dict[str, Any]:
        """The audit for programs: names and plain values; nanoseconds for one row."""
        found = self.partition
        return {
            "holds": self.holds,
            "plan_id": self.plan_id,
            "model_id": self.model_id,
            "publisher": self.publisher,
            "epoch": self.epoch,
            "block_number": self.block_number,
            "published_at": self.published_at,
            "oldest_measured_at": self.oldest_measured_at,
            "checks": self.checks,
            "unrecorded_nodes": self.unrecorded,
            "rebalancing": None
            if self.decision is None
            else {
                "trigger": str(self.decision.trigger),
                "change": str(self.decision.change),
                "before_ns": self.decision.before_ns,
                "gain": float(self.decision.gain),
                "load_bytes": self.decision.load_bytes,
                "moved_bytes": self.decision.moved_bytes,
            },
            "computed": None
            if found is None
            else {
                "solver": found.solver,
                "objective": found.objective,
                "value_ns": found.value_ns,
                "lower_bound_ns": found.lower_bound_ns,
                "ratio": found.ratio,
                "bound": found.bound,
                "stages": [
                    {
                        "first_unit": stage.first,
                        "end_unit": stage.end,
                        "nodes": [node.node for node in stage.nodes],
                        "cost_ns": stage.cost_ns,
                        "receive_ns": stage.receive_ns,
                        "compute_ns": stage.compute_ns,
                        "overflow_ns": stage.overflow_ns,
                        "send_ns": stage.send_ns,
                    }
                    for stage in found.stages
                ],
                "unused_nodes": [node.node for node in found.unused],
            },
        }


async def audit_plan(
    client: ChainClient,
    deployment: Deployment,
    plan_id: bytes,
    *,
    manifest: bytes | None = None,
    planning_record: bytes | None = None,
) -> PlanAudit:
    """Check the plan `plan_id`. `manifest` and `planning_record` are file contents, where the chain has no copy.

    AuditError if there is no such plan; ChainUnavailableError if the chain does not answer or changes meanwhile, which
    says nothing about the plan.
    """
    head = await client.head()
    published = await _event(client, deployment, head.number, "PlanPublished", planId=plan_id)
    values = published.arguments
    model = ModelId(bytes(values["modelId"]))
    block = await client.block(published.block_number)
    if block is None or block.hash != published.block_hash:
        raise ChainUnavailableError(
            f"block {published.block_number}, which published the plan, is not on the endpoint's chain any more: the "
            "chain was reorganised or the endpoint is not in sync, run the audit again"
        )
    assignments = tuple(Assignment.from_tuple(tuple(item)) for item in values["assignments"])
    root = bytes(values["root"])
    checks = [_same_root("leaves of the root", root, MerkleTree([item.leaf for item in assignments]).root)]

    registered = await _event(client, deployment, head.number, "ModelRegistered", modelId=model)
    manifest_hash = bytes(registered.arguments["manifestHash"])
    advice = "get the manifest file and give it with --manifest"
    if manifest is None:
        manifest = await _announced(client, deployment, head.number, manifest_hash)
    check, found_manifest = _manifest(manifest, manifest_hash, model, advice)
    checks.append(check)

    record_hash = bytes(values["measurementsHash"])
    advice = (
        f"ask the publisher for the output of `bsns-coordinator record 0x{record_hash.hex()}` and give it with "
        "--planning-record"
    )
    if planning_record is None:
        planning_record = await _announced(client, deployment, head.number, record_hash)
    check, record = _record(planning_record, record_hash, model, advice)
    checks.append(check)

    unrecorded: tuple[str, ...] = ()
    partition, decision = None, None
    if record is not None:
        checks += _measurement_checks(record, deployment, block.timestamp)
        checks.append(_assigned_nodes(assignments, record))
        active = await _active_nodes(client, deployment, published, block.timestamp)
        recorded = {item.measurements.node for item in record.measurements}
        unrecorded = tuple(node for node in active if node not in recorded)
    if record is not None and found_manifest is not None:
        try:
            previous = await _plan_before(client, deployment, published)
            checks.append(_names_plan_before(record, previous))
            partition = plan_of_record(record, found_manifest, previous[1] if previous else None)
            if previous is not None:
                decision = decision_of_record(record, found_manifest, previous[1])
            checks += _comparison(assignments, root, partition.to_shard_plan())
        except ProtocolError as error:
            checks.append(Check("recomputed plan", False, f"the record gives no plan: {error}"))
    return PlanAudit(
        plan_id=plan_id,
        model_id=model,
        publisher=address(values["publisher"]),
        epoch=int(values["epoch"]),
        block_number=block.number,
        published_at=block.timestamp,
        assignments=assignments,
        checks=tuple(checks),
        partition=partition,
        decision=decision,
        oldest_measured_at=min((item.measurements.measured_at for item in record.measurements), default=None)
        if record is not None
        else None,
        unrecorded=unrecorded,
    )


def show_plan(audit: PlanAudit) -> str:
    """The audit for people, several lines, the last without a newline."""
    return "\n".join(_lines(audit))


# ------------------------------------------------------------------------------------------------------ from the chain


async def _event(client: ChainClient, deployment: Deployment, last: int, name: str, **filters: bytes) -> ChainEvent:
    events = await client.events_between(
        deployment.first_block, last, contract="ShardAssignments", name=name, filters=filters
    )
    if not events:
        shown = ", ".join(f"{key} 0x{value.hex()}" for key, value in filters.items())
        raise AuditError(
            f"the chain has no {name} with {shown} between blocks {deployment.first_block} and {last}: "
            "it is another chain or deployment, or there is no such plan"
        )
    return events[0]


async def _plan_before(
    client: ChainClient, deployment: Deployment, published: ChainEvent
) -> tuple[bytes, ShardPlan] | None:
    """The publisher's plan for the model before `published`, its id and its content; None if it is the first."""
    same = {key: published.arguments[key] for key in ("modelId", "publisher")}
    events = await client.events_between(
        deployment.first_block,
        published.block_number,
        contract="ShardAssignments",
        name="PlanPublished",
        filters={"modelId": bytes(same["modelId"])},
    )
    earlier = [
        item
        for item in events
        if position(item) < position(published) and all(item.arguments[key] == value for key, value in same.items())
    ]
    if not earlier:
        return None
    values = max(earlier, key=position).arguments
    assignments = tuple(Assignment.from_tuple(tuple(item)) for item in values["assignments"])
    return bytes(values["planId"]), ShardPlan(assignments[-1].end_unit, assignments)


async def _announced(client: ChainClient, deployment: Deployment, last: int, document_hash: bytes) -> bytes | None:
    """The document first announced under `document_hash`; None if nobody did."""
    # Not all blocks at once: anybody may announce a document again and again to make its search long.
    for first in range(deployment.first_block, last + 1, BLOCKS_A_SEARCH):
        events = await client.events_between(
            first,
            min(last, first + BLOCKS_A_SEARCH - 1),
            contract="ShardAssignments",
            name="DocumentAnnounced",
            filters={"documentHash": document_hash},
        )
        if events:
            return bytes(events[0].arguments["document"])
    return None


async def _active_nodes(
    client: ChainClient, deployment: Deployment, published: ChainEvent, now: int
) -> tuple[ChecksumAddress, ...]:
    """Nodes that were Active when the plan was published, folded from the registry's events."""
    # Only stakes depend on the two terms and on times of release, and nobody asks for stakes here.
    ledger = StakeLedger(activation_delay=0, thaw_period=0)
    events = await client.events_between(deployment.first_block, published.block_number, contract="NodeRegistry")
    for event in events:
        if position(event) < position(published):
            ledger.apply(event.name, event.arguments, timestamp=0)
    return tuple(address(node) for node in ledger.active_nodes(now))


# -------------------------------------------------------------------------------------------------------------- checks


def _manifest(data: bytes | None, expected: bytes, model: ModelId, advice: str) -> tuple[Check, ModelManifest | None]:
    name = "manifest"
    if data is None:
        return _missing(name, expected, advice), None
    if keccak256(data) != expected:
        return _another(name, data, expected), None
    try:
        found = ModelManifest.from_bytes(data)
    except ManifestError as error:
        return Check(name, False, f"the document 0x{expected.hex()} is no manifest: {error}"), None
    if model_id(found.manifest_hash, found.weight_root, len(found.units)) != model:
        return Check(name, False, "its weights or units are not those that the model was registered with"), None
    return Check(name, True, f"{found.name}, {len(found.units)} units, 0x{expected.hex()}"), found


def _record(data: bytes | None, expected: bytes, model: ModelId, advice: str) -> tuple[Check, PlanningRecord | None]:
    name = "planning record"
    if data is None:
        return _missing(name, expected, advice), None
    if keccak256(data) != expected:
        return _another(name, data, expected), None
    try:
        found = PlanningRecord.from_bytes(data)
    except ProtocolError as error:
        return Check(name, False, f"the document 0x{expected.hex()} is no planning record: {error}"), None
    if found.model != model:
        return Check(name, False, f"it is about model 0x{found.model.hex()}, the plan about 0x{model.hex()}"), None
    return Check(name, True, f"{len(found.measurements)} nodes, {len(data)} bytes, 0x{expected.hex()}"), found


def _missing(name: str, expected: bytes, advice: str) -> Check:
    return Check(name, False, f"nobody announced the {name} 0x{expected.hex()} on chain: {advice}")


def _another(name: str, data: bytes, expected: bytes) -> Check:
    return Check(name, False, f"the {name} given has the hash 0x{keccak256(data).hex()}, the chain 0x{expected.hex()}")


def _measurement_checks(record: PlanningRecord, deployment: Deployment, published_at: int) -> Iterator[Check]:
    domain = assignments_domain(deployment.chain_id, deployment.shard_assignments)
    forged = [item.measurements.node for item in record.measurements if not item.is_authentic(domain)]
    yield _check(
        "measurement signatures",
        [f"the measurements of {node} are not signed by it" for node in forged],
        "every node signed its own",
    )
    latest = published_at + MAXIMUM_CLOCK_SKEW_S
    early = [item.measurements for item in record.measurements if item.measurements.measured_at > latest]
    yield _check(
        "measurement times",
        [
            f"{item.node} measured {item.measured_at - published_at} s after the plan was published; "
            f"{MAXIMUM_CLOCK_SKEW_S} s of skew are allowed"
            for item in early
        ],
        "all before the plan",
    )


def _assigned_nodes(assignments: Sequence[Assignment], record: PlanningRecord) -> Check:
    measured = {item.measurements.node for item in record.measurements}
    strangers = dict.fromkeys(item.node for item in assignments if item.node not in measured)
    return _check(
        "assigned nodes",
        [f"{node} serves in the plan and is not in the planning record" for node in strangers],
        "all are in the planning record",
    )


def _names_plan_before(record: PlanningRecord, previous: tuple[bytes, ShardPlan] | None) -> Check:
    """A publisher that could leave the plan in force out of its record could change plans without a reason."""
    name = "plan before"
    named = None if record.rebalancing is None else record.rebalancing.previous_plan
    expected = None if previous is None else previous[0]
    if named == expected:
        return Check(name, True, "none" if expected is None else f"0x{expected.hex()}")
    shown = ["none" if item is None else f"0x{item.hex()}" for item in (named, expected)]
    return Check(name, False, f"the record names {shown[0]}, the publisher's plan before this one is {shown[1]}")


def _comparison(assignments: tuple[Assignment, ...], root: bytes, computed: ShardPlan) -> Iterator[Check]:
    problems = []
    if len(assignments) != len(computed.assignments):
        problems.append(f"the plan has {len(assignments)} assignments, computed again {len(computed.assignments)}")
    for actual, expected in zip(assignments, computed.assignments):
        if _served(actual) != _served(expected):
            problems.append(f"the plan has {_shown(actual)}, computed again {_shown(expected)}")
    yield _check("assignments", problems, "the same stages, units and nodes")
    yield _check(
        "work weights",
        [
            f"{actual.work_weight} for stage {actual.stage} replica {actual.replica}, computed again "
            f"{expected.work_weight}"
            for actual, expected in zip(assignments, computed.assignments)
            if actual.work_weight != expected.work_weight
        ],
        "the same",
    )
    yield _same_root("root", root, computed.root)


def _served(item: Assignment) -> tuple[Any, ...]:
    return item.stage, item.replica, item.first_unit, item.end_unit, item.node, item.execution_class


def _shown(item: Assignment) -> str:
    units = f"units {item.first_unit} to {item.end_unit - 1}"
    return f"stage {item.stage} replica {item.replica} on {item.node} ({units}, class 0x{item.execution_class.hex()})"


def _same_root(name: str, published: bytes, computed: bytes) -> Check:
    if published == computed:
        return Check(name, True, f"0x{computed.hex()}")
    return Check(name, False, f"the plan has 0x{published.hex()}, computed again 0x{computed.hex()}")


def _check(name: str, problems: list[str], fine: str) -> Check:
    if not problems:
        return Check(name, True, fine)
    more = f" (and {len(problems) - MAXIMUM_PROBLEMS} more)" if len(problems) > MAXIMUM_PROBLEMS else ""
    return Check(name, False, "; ".join(problems[:MAXIMUM_PROBLEMS]) + more)


# ---------------------------------------------------------------------------------------------------------- for people


def _lines(audit: PlanAudit) -> Iterator[str]:
    published = datetime.fromtimestamp(audit.published_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"Plan         0x{audit.plan_id.hex()} epoch {audit.epoch} of {audit.publisher}"
    yield f"             block {audit.block_number}, {published}"
    yield f"Model        0x{audit.model_id.hex()}"
    if audit.oldest_measured_at is not None:
        yield f"Measured     at most {max(0, audit.published_at - audit.oldest_measured_at)} s before"
    found = audit.partition
    if found is not None:
        yield f"Solver       {found.solver}, objective {found.objective}"
        if audit.decision is not None:
            yield f"Replaced     {_reason(audit.decision)}"
        yield f"Value        {_milliseconds(found.value_ns)} a row, ratio {found.ratio:.4f}"
        yield f"             no plan is below {_milliseconds(found.lower_bound_ns)} ({found.bound})"
        for number, stage in enumerate(found.stages):
            parts = (
                f"receive {_milliseconds(stage.receive_ns)}, compute {_milliseconds(stage.compute_ns)}, "
                f"overflow {_milliseconds(stage.overflow_ns)}, send {_milliseconds(stage.send_ns)}"
            )
            yield f"Stage {number:<6} units {stage.first} to {stage.end - 1}: {_milliseconds(stage.cost_ns)} ({parts})"
            for node in stage.nodes:
                yield f"             {node.node}"
    for left_out in audit.unrecorded:
        yield f"Left out     {left_out} was Active on chain and is not in the planning record"
    for check in audit.checks:
        yield f"{'holds ' if check.ok else 'FAILED'}       {check.name}: {check.detail}"


def _reason(decision: Decision) -> str:
    why = {
        Trigger.UNCOVERED: "a stage of the plan before had no node left",
        Trigger.MEMBERSHIP: "nodes had come or gone",
        Trigger.DRIFT: "nodes had other times than planned with",
    }[decision.trigger]
    gain = "" if decision.before_ns is None else f", {100 * float(decision.gain):+.1f} % rate"
    return f"{why}: {decision.change}{gain}, {decision.moved_bytes} bytes of weights to load"


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / _MILLISECOND_NS:.3f} ms"
