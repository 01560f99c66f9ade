"""What the chain's logs say about one request, as a verification record without anything that only the requester knows.

Needs logs, receipts and headers, and no archived state: stakes are folded from the registry's events. Promises that
two gatherings as of the same block are equal. Does not judge; that is `bsns.audit.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bsns.audit.errors import AuditError
from bsns.audit.stakes import StakeLedger
from bsns.protocol.commitments import commitments_digest
from bsns.protocol.contract_states import SLASH_REASONS, STATUS_AFTER
from bsns.protocol.identifiers import address
from bsns.protocol.merkle import MerkleTree
from bsns.protocol.plan import Assignment
from bsns.protocol.record import (
    BlockReference,
    Challenge,
    ChallengeResolution,
    Conclusion,
    ContractDomain,
    Credit,
    Draw,
    Entropy,
    EntropyRenewal,
    Jailing,
    Member,
    MemberDistance,
    Payment,
    RecordedAssignment,
    RecordedCommitment,
    RecordedModel,
    RecordedPlan,
    RecordedRequest,
    RecordedReveal,
    Round,
    Route,
    RouteReplacement,
    RouteStage,
    Slash,
    Tally,
    Term,
    Transaction,
    Verdict,
    VerificationRecord,
)
from bsns.protocol.sketch import distance, member_distance

if TYPE_CHECKING:  # the chain client is slow to import, and `bsns audit show` needs none
    from bsns.chain.client import Block, ChainClient, ChainEvent, Receipt
    from bsns.chain.deployment import Deployment

NO_DISTANCE: Final = 2**256 - 1
"""Distance where there is no medoid, or the token counts differ."""
NOBODY: Final = address("0x" + "00" * 20)
STAGE_VERDICTS: Final = ("None", "Accepted", "Tolerated", "Rejected", "NoQuorum", "Withheld")
_ESCROW_EVENTS: Final = (
    "RequestRouted",
    "StageReplaced",
    "RequestCommitted",
    "RequestVerified",
    "RequestSettled",
    "RequestRefunded",
    "Credited",
)
VERIFICATION_EVENTS: Final = (
    "StageCommitted",
    "CommitmentsComplete",
    "EntropyRenewed",
    "CommitteeDrawn",
    "AttestationCommitted",
    "StageRevealed",
    "AttestationRevealed",
    "StageTallied",
    "RoundEscalated",
    "VerdictReached",
    "Challenged",
    "ChallengeResolved",
    "RequestConcluded",
    "ContradictionProven",
)
# What a slash or a jailing that follows in the same transaction belongs to.
_JUDGEMENTS: Final = ("StageTallied", "ContradictionProven")

Position = tuple[int, int]
"""Block number and log index."""


def position(event: ChainEvent) -> Position:
    """Where an event lies in the history."""
    return event.block_number, event.log_index


@dataclass(frozen=True, slots=True)
class FoldedStakes:
    """What the registry's events give for the moments that count. Keys of `members`: (round, stage, node)."""

    snapshot_total: int | None
    members: dict[tuple[int, int, str], int]
    slashed: dict[int, int]
    """Stake of a slashed node just before, by index in the record's slashes."""


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """A record as of one block, and the stakes behind it."""

    record: VerificationRecord
    stakes: FoldedStakes


@dataclass(slots=True)
class _Gathering:
    """Events of one request by name, with the receipts and headers behind them."""

    events: list[ChainEvent]
    receipts: dict[bytes, Receipt] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)

    def named(self, *names: str) -> list[ChainEvent]:
        return [item for item in self.events if item.name in names]

    def first(self, name: str) -> ChainEvent | None:
        return next((item for item in self.events if item.name == name), None)

    def time(self, event: ChainEvent) -> int:
        return self.times[event.block_number]


def contract_domain(deployment: Deployment, first_block: int) -> ContractDomain:
    """The contracts of `deployment`, whose events begin in `first_block`."""
    return ContractDomain(
        deployment.chain_id,
        deployment.node_registry,
        deployment.shard_assignments,
        deployment.inference_escrow,
        deployment.output_verification,
        deployment.request_tabs,
        deployment.treasury,
        first_block,
    )


async def gather(client: ChainClient, deployment: Deployment, request_id: bytes, as_of: Block) -> ChainFacts:
    """Everything on chain about `request_id` up to block `as_of`. AuditError if there is no such request; ChainError
    if the chain is not there.
    """
    first, last = deployment.first_block, as_of.number
    registry = await client.events_between(first, last, contract="NodeRegistry")
    if not registry:
        raise AuditError(
            f"no node ever registered between blocks {first} and {last}: first_block is not the deployment's"
        )
    opened = await _one(client, deployment, last, "InferenceEscrow", "RequestOpened", requestId=request_id)
    plan = await _one(client, deployment, last, "ShardAssignments", "PlanPublished", planId=opened.arguments["planId"])
    model = await _one(
        client, deployment, last, "ShardAssignments", "ModelRegistered", modelId=plan.arguments["modelId"]
    )
    found = [opened]
    for contract, names in (("InferenceEscrow", _ESCROW_EVENTS), ("OutputVerification", VERIFICATION_EVENTS)):
        for name in names:
            found += await client.events_between(
                opened.block_number, last, contract=contract, name=name, filters={"requestId": request_id}
            )
    gathering = _Gathering(sorted(found, key=position))
    await _fetch_receipts(client, gathering, [model, plan, *gathering.events])
    record = await _assemble(client, deployment, as_of, gathering, model, plan, registry)
    return await _fold(client, record, gathering, registry)


async def read_terms(client: ChainClient) -> tuple[Term, ...]:
    """All immutable numbers of the contracts."""
    terms: list[Term] = []
    for contract in ("InferenceEscrow", "NodeRegistry", "OutputVerification", "RequestTabs"):
        values = await client.call(contract, "terms")
        terms += [Term(f"{contract}.{name}", int(value)) for name, value in zip(values._fields, values)]
    delay = await client.call("ShardAssignments", "planActivationDelay")
    terms.append(Term("ShardAssignments.planActivationDelay", int(delay)))
    return tuple(sorted(terms, key=lambda item: item.name))


async def _one(
    client: ChainClient, deployment: Deployment, last: int, contract: str, name: str, **filters: Any
) -> ChainEvent:
    events = await client.events_between(deployment.first_block, last, contract=contract, name=name, filters=filters)
    if not events:
        shown = ", ".join(f"{key} 0x{value.hex()}" for key, value in filters.items())
        raise AuditError(
            f"the chain has no {name} with {shown} between blocks {deployment.first_block} and {last}: "
            "it is another chain or deployment, or the request does not exist"
        )
    return events[0]


async def _fetch_receipts(client: ChainClient, gathering: _Gathering, events: Iterable[ChainEvent]) -> None:
    for event in events:
        if event.transaction_hash not in gathering.receipts:
            receipt = await client.receipt(event.transaction_hash)
            if receipt is None:
                raise AuditError(
                    f"the chain gives a log of transaction 0x{event.transaction_hash.hex()} and no receipt: "
                    "the RPC endpoint is not in sync, try another"
                )
            gathering.receipts[event.transaction_hash] = receipt
        if event.block_number not in gathering.times:
            gathering.times[event.block_number] = (await _header(client, event.block_number)).timestamp


async def _header(client: ChainClient, number: int) -> Block:
    block = await client.block(number)
    if block is None:
        raise AuditError(f"the chain has no block {number}: the RPC endpoint is not in sync, try another")
    return block


async def _assemble(
    client: ChainClient,
    deployment: Deployment,
    as_of: Block,
    gathering: _Gathering,
    model: ChainEvent,
    plan: ChainEvent,
    registry: Sequence[ChainEvent],
) -> VerificationRecord:
    opened = gathering.events[0]
    recorded_plan = _plan(plan)
    operators = _Operators(registry)
    route = _route(gathering, recorded_plan, operators)
    commitments = _commitments(gathering)
    entropy = _entropy(gathering, commitments)
    slashes, jailings = _penalties(gathering, bytes(opened.arguments["requestId"]))
    return VerificationRecord(
        domain=contract_domain(deployment, min(registry[0].block_number, model.block_number)),
        terms=await read_terms(client),
        as_of=BlockReference(as_of.number, as_of.hash),
        status=_status(gathering),
        model=RecordedModel(
            bytes(model.arguments["modelId"]),
            bytes(model.arguments["manifestHash"]),
            bytes(model.arguments["weightRoot"]),
            int(model.arguments["unitCount"]),
            str(model.arguments["name"]),
            address(model.arguments["registrant"]),
            model.transaction_hash,
        ),
        plan=recorded_plan,
        request=_request(opened, gathering.time(opened)),
        route=route,
        input=None,
        tokens=None,
        evidence=(),
        commitments=commitments,
        entropy=entropy,
        draw=await _draw(client, gathering, entropy),
        rounds=_rounds(gathering, operators),
        verdicts=tuple(
            Verdict(bool(e.arguments["accepted"]), int(e.arguments["challengeDeadline"]), e.transaction_hash)
            for e in gathering.named("VerdictReached")
        ),
        challenges=_challenges(gathering),
        conclusion=_conclusion(gathering),
        payment=_payment(gathering),
        slashes=slashes,
        jailings=jailings,
        transactions=tuple(
            Transaction(
                item.transaction_hash,
                item.block_number,
                item.block_hash,
                item.gas_used,
                tuple(f"{event.contract}.{event.name}" for event in item.events),
            )
            for item in gathering.receipts.values()
        ),
    )


class _Operators:
    """Operator of a node at a moment: an account may be removed and its key registered again by somebody else."""

    def __init__(self, registry: Sequence[ChainEvent]) -> None:
        self._registered = [item for item in registry if item.name == "NodeRegistered"]

    def at(self, node: str, when: Position) -> Any:
        operator = NOBODY
        for event in self._registered:
            if position(event) > when:
                break
            if event.arguments["node"] == node:
                operator = address(event.arguments["operator"])
        return operator


def _plan(event: ChainEvent) -> RecordedPlan:
    values = event.arguments
    return RecordedPlan(
        bytes(values["planId"]),
        address(values["publisher"]),
        int(values["epoch"]),
        int(values["effectiveAt"]),
        int(values["feePerToken"]),
        bytes(values["root"]),
        bytes(values["measurementsHash"]),
        tuple(RecordedAssignment.of(Assignment.from_tuple(item)) for item in values["assignments"]),
        event.transaction_hash,
    )


def _request(event: ChainEvent, time: int) -> RecordedRequest:
    values = event.arguments
    return RecordedRequest(
        bytes(values["requestId"]),
        address(values["requester"]),
        int(values["deposit"]),
        int(values["feePerToken"]),
        int(values["promptTokens"]),
        int(values["maximumTokens"]),
        bytes(values["inputCommitment"]),
        bytes(values["secretHash"]),
        time,
        int(values["deadline"]),
        event.transaction_hash,
        None,
    )


def _route(gathering: _Gathering, plan: RecordedPlan, operators: _Operators) -> Route | None:
    event = gathering.first("RequestRouted")
    if event is None:
        return None
    leaves = [item.assignment().leaf for item in plan.assignments]
    tree = MerkleTree(leaves)
    given = {stage: (node, event) for stage, node in enumerate(event.arguments["nodes"])}
    replacements = []
    for change in gathering.named("StageReplaced"):
        values = change.arguments
        given[int(values["stage"])] = values["node"], change
        replacements.append(
            RouteReplacement(
                int(values["stage"]), address(values["replaced"]), address(values["node"]), change.transaction_hash
            )
        )
    stages = []
    for stage, (node, since) in sorted(given.items()):
        index = next((i for i, item in enumerate(plan.assignments) if item.stage == stage and item.node == node), None)
        if index is None:
            raise AuditError(f"node {node} was routed for stage {stage} without an assignment in the plan")
        operator = operators.at(node, position(since))
        stages.append(RouteStage(stage, address(node), operator, index, leaves[index], tree.proof(index)))
    return Route(int(event.arguments["deadline"]), tuple(stages), event.transaction_hash, tuple(replacements))


def _reveal(event: ChainEvent) -> RecordedReveal:
    values = event.arguments
    return RecordedReveal(
        bytes(values["evidenceRoot"] if "evidenceRoot" in values else values["innerSketch"]),
        bytes(values["sketch"]),
        int(values["outputTokens"]),
        bytes(values["salt"]),
        event.transaction_hash,
    )


def _commitments(gathering: _Gathering) -> tuple[RecordedCommitment, ...]:
    reveals = {int(e.arguments["stage"]): _reveal(e) for e in gathering.named("StageRevealed")}
    found = []
    for event in gathering.named("StageCommitted"):
        stage = int(event.arguments["stage"])
        node, commitment = address(event.arguments["node"]), bytes(event.arguments["commitment"])
        found.append(RecordedCommitment(stage, node, commitment, event.transaction_hash, reveals.get(stage)))
    return tuple(sorted(found, key=lambda item: item.stage))


def _entropy(gathering: _Gathering, commitments: Sequence[RecordedCommitment]) -> Entropy | None:
    event = gathering.first("CommitmentsComplete")
    if event is None:
        return None
    values = event.arguments
    return Entropy(
        int(values["entropyBlock"]),
        int(values["snapshotTime"]),
        int(values["snapshotStake"]),
        int(values["secretDeadline"]),
        commitments_digest(item.commitment for item in commitments),
        event.transaction_hash,
        tuple(
            EntropyRenewal(int(e.arguments["entropyBlock"]), e.transaction_hash)
            for e in gathering.named("EntropyRenewed")
        ),
    )


async def _draw(client: ChainClient, gathering: _Gathering, entropy: Entropy | None) -> Draw | None:
    event = gathering.first("CommitteeDrawn")
    if event is None or entropy is None:
        return None
    number = entropy.renewals[-1].entropy_block if entropy.renewals else entropy.block
    values = event.arguments
    return Draw(
        BlockReference(number, (await _header(client, number)).hash),
        bytes(values["secret"]),
        bytes(values["seed"]),
        bool(values["sampled"]),
        int(values["attestDeadline"]),
        event.transaction_hash,
    )


def _rounds(gathering: _Gathering, operators: _Operators) -> tuple[Round, ...]:
    rounds = []
    executors = {int(e.arguments["stage"]): _reveal(e) for e in gathering.named("StageRevealed")}
    for event in gathering.named("CommitteeDrawn", "RoundEscalated"):
        number = int(event.arguments["round"])
        members = _members(gathering, number, operators)
        tallies = tuple(
            _tally(item, members, executors)
            for item in gathering.named("StageTallied")
            if item.arguments["round"] == number
        )
        rounds.append(
            Round(
                number,
                bytes(event.arguments["seed"]),
                int(event.arguments["attestDeadline"]),
                event.transaction_hash,
                members,
                tallies,
            )
        )
    return tuple(rounds)


def _members(gathering: _Gathering, number: int, operators: _Operators) -> tuple[Member, ...]:
    """Members of a round in the order in which they committed, which is their index in the committee."""
    reveals = {
        (int(e.arguments["stage"]), str(e.arguments["node"])): _reveal(e)
        for e in gathering.named("AttestationRevealed")
        if e.arguments["round"] == number
    }
    members = []
    for event in gathering.named("AttestationCommitted"):
        values = event.arguments
        if values["round"] != number:
            continue
        stage, node = int(values["stage"]), address(values["node"])
        members.append(
            Member(
                stage,
                node,
                operators.at(node, position(event)),
                int(values["stake"]),
                bytes(values["commitment"]),
                event.transaction_hash,
                reveals.get((stage, node)),
            )
        )
    return tuple(members)


def sketch_distance(medoid: RecordedReveal, other: RecordedReveal) -> int:
    """OutputVerification's distance: another number of tokens is another output, however close the sketches are."""
    return distance(medoid.sketch, other.sketch) if medoid.output_tokens == other.output_tokens else NO_DISTANCE


def members_distance(medoid: RecordedReveal, other: RecordedReveal) -> int:
    """The same of two committee members, who are compared by the rows inside the stage, too."""
    if medoid.output_tokens != other.output_tokens:
        return NO_DISTANCE
    return member_distance((medoid.sketch, medoid.evidence_root), (other.sketch, other.evidence_root))


def _tally(event: ChainEvent, members: Sequence[Member], executors: dict[int, RecordedReveal]) -> Tally:
    values = event.arguments
    stage, medoid = int(values["stage"]), address(values["medoid"])
    bench = [item for item in members if item.stage == stage and item.reveal is not None]
    chosen = next((item.reveal for item in bench if item.node == medoid), None)
    return Tally(
        stage,
        STAGE_VERDICTS[int(values["verdict"])],
        medoid,
        int(values["support"]),
        int(values["revealedStake"]),
        int(values["distance"]),
        tuple(
            MemberDistance(item.node, members_distance(chosen, item.reveal))
            for item in bench
            if chosen is not None and item.reveal is not None
        ),
        event.transaction_hash,
    )


def _challenges(gathering: _Gathering) -> tuple[Challenge, ...]:
    resolved = gathering.named("ChallengeResolved")
    found = []
    for event in gathering.named("Challenged"):
        values = event.arguments
        answer = next(
            (
                item
                for item in resolved
                if item.arguments["stage"] == values["stage"] and position(item) > position(event)
            ),
            None,
        )
        resolution = None
        if answer is not None:
            resolved.remove(answer)
            resolution = ChallengeResolution(
                bool(answer.arguments["upheld"]), int(answer.arguments["bond"]), answer.transaction_hash
            )
        found.append(
            Challenge(
                int(values["stage"]),
                address(values["challenger"]),
                int(values["bond"]),
                event.transaction_hash,
                resolution,
            )
        )
    return tuple(found)


def _conclusion(gathering: _Gathering) -> Conclusion | None:
    event = gathering.first("RequestConcluded")
    if event is None:
        return None
    values = event.arguments
    return Conclusion(
        bool(values["accepted"]), int(values["blamedStage"]), int(values["outputTokens"]), event.transaction_hash
    )


def _payment(gathering: _Gathering) -> Payment | None:
    settled, refunded = gathering.first("RequestSettled"), gathering.first("RequestRefunded")
    event = settled or refunded
    if event is None:
        return None
    values = event.arguments
    return Payment(
        settled is not None,
        int(values.get("paidToExecutors", 0)),
        int(values.get("paidToVerifiers", 0)),
        int(values.get("protocolFee", 0)),
        int(values["refunded"]),
        tuple(
            Credit(
                address(e.arguments["account"]),
                int(e.arguments["amount"]),
                int(e.arguments["credit"]),
                e.transaction_hash,
            )
            for e in gathering.named("Credited")
        ),
        event.transaction_hash,
    )


def _penalties(gathering: _Gathering, request_id: bytes) -> tuple[tuple[Slash, ...], tuple[Jailing, ...]]:
    """Slashes and jailings that follow a judgement of this request in its transaction, up to the next judgement."""
    slashes: list[Slash] = []
    jailings: list[Jailing] = []
    judged = {item.transaction_hash for item in gathering.named(*_JUDGEMENTS)}
    for receipt in gathering.receipts.values():
        if receipt.transaction_hash not in judged:
            continue
        ours = False
        for event in receipt.events:
            values = event.arguments
            if event.name in _JUDGEMENTS:
                ours = bytes(values["requestId"]) == request_id
            elif ours and event.name == "NodeSlashed":
                slashes.append(
                    Slash(
                        address(values["node"]),
                        SLASH_REASONS[int(values["reason"])],
                        int(values["amount"]),
                        int(values["burned"]),
                        int(values["staked"]),
                        int(values["thawing"]),
                        receipt.transaction_hash,
                    )
                )
            elif ours and event.name == "NodeJailed":
                jailings.append(Jailing(address(values["node"]), int(values["jailedUntil"]), receipt.transaction_hash))
    return tuple(slashes), tuple(jailings)


def _status(gathering: _Gathering) -> str:
    last = next(STATUS_AFTER[item.name] for item in reversed(gathering.events) if item.name in STATUS_AFTER)
    return last.name.capitalize()


async def _fold(
    client: ChainClient, record: VerificationRecord, gathering: _Gathering, registry: Sequence[ChainEvent]
) -> ChainFacts:
    """Fold the registry's events once, and look at the stakes at each moment that counts."""
    ledger = StakeLedger(record.term("NodeRegistry.activationDelay"), record.term("NodeRegistry.thawPeriod"))
    totals: list[int] = []
    members: dict[tuple[int, int, str], int] = {}
    slashed: dict[int, int] = {}
    probes: list[tuple[Position, Callable[[], None]]] = []
    complete = gathering.first("CommitmentsComplete")
    if complete is not None:
        probes.append((position(complete), lambda: totals.append(ledger.total_sortition_stake())))
    snapshot_time = record.entropy.snapshot_time if record.entropy else 0

    def look_at_member(event: ChainEvent) -> Callable[[], None]:
        values = event.arguments
        key = (int(values["round"]), int(values["stage"]), address(values["node"]))

        def look() -> None:
            members[key] = ledger.sortition_stake(key[2], snapshot_time, gathering.time(event))

        return look

    probes += [(position(e), look_at_member(e)) for e in gathering.named("AttestationCommitted")]

    def look_at_slashed(index: int, node: str) -> Callable[[], None]:
        def look() -> None:
            slashed[index] = ledger.staked(node)

        return look

    for index, slash in enumerate(record.slashes):
        receipt = gathering.receipts[slash.transaction]
        event = next(
            e
            for e in receipt.events
            if e.name == "NodeSlashed" and e.arguments["node"] == slash.node and e.arguments["staked"] == slash.staked
        )
        probes.append(((event.block_number, event.log_index - 1), look_at_slashed(index, slash.node)))
    applied = 0
    for when, look in sorted(probes, key=lambda item: item[0]):
        while applied < len(registry) and position(registry[applied]) <= when:
            event = registry[applied]
            applied += 1
            time = (await _header(client, event.block_number)).timestamp if event.name == "NodeReleased" else 0
            ledger.apply(event.name, event.arguments, time)
        look()
    return ChainFacts(record, FoldedStakes(totals[0] if totals else None, members, slashed))
