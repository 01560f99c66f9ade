"""The network as the chain's events tell it: a frozen state and a pure `apply(state, event, block)`.

Owns what is remembered about nodes, models, documents, plans, requests and accounts, and how each event of the four
contracts changes it. Every event belongs to exactly one aggregate (`aggregate_of`) and changes nothing else, so that an
aggregate can be rebuilt from its own events after a reorganisation (SYNC-01: fold(apply, canonical events) == stored
state). Promises to handle every event the contracts declare; an unknown one is an error that names it. No I/O, no
clock: time comes with the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.identifiers import ModelId, PlanId, RequestId, address
from bsns.protocol.plan import Assignment, ShardPlan

if TYPE_CHECKING:
    from bsns.chain.client import Block, ChainEvent

TOMBSTONE: Final = 2**64 - 1
UNBLAMED: Final = 2**16 - 1


class NetworkStateError(Exception):
    """The events do not tell a possible history: a contract this release does not know, or events that were lost."""


class UnknownEventError(NetworkStateError):
    """An event this release does not know. Install the release that belongs to the deployment."""

    def __init__(self, contract: str, name: str) -> None:
        super().__init__(
            f"event {contract}.{name} is unknown to this release: install the one that belongs to the deployment"
        )


class AggregateKind(StrEnum):
    """What an event belongs to."""

    NODE = "node"
    MODEL = "model"
    DOCUMENT = "document"
    PLAN = "plan"
    REQUEST = "request"
    ACCOUNT = "account"


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node account, by its hot key. Wei and Unix seconds."""

    node: str
    operator: str | None = None
    endpoint: str = ""
    certificate_hash: bytes = b""
    staked: int = 0
    thawing: int = 0
    warm_from: int = 0
    thaw_end: int = 0
    active_from: int = 0
    jailed_until: int = 0
    open_duties: int = 0
    exiting: bool = False
    registered_at: int = 0
    slashed: int = 0
    contradictions: int = 0

    def status_at(self, now: int) -> NodeStatus:
        """Status at Unix second `now`. A served term still needs the operator to leave jail."""
        if self.operator is None:
            return NodeStatus.ABSENT
        if self.exiting:
            return NodeStatus.EXITING
        if self.jailed_until:
            return NodeStatus.JAILED
        return NodeStatus.PENDING if now < self.active_from else NodeStatus.ACTIVE


@dataclass(frozen=True, slots=True)
class ModelState:
    """A registered model."""

    model_id: ModelId
    registrant: str
    manifest_hash: bytes
    weight_root: bytes
    unit_count: int
    name: str


@dataclass(frozen=True, slots=True)
class DocumentState:
    """A document that lies on chain under its hash."""

    document_hash: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PlanState:
    """A published plan with all its assignments."""

    plan_id: PlanId
    model_id: ModelId
    publisher: str
    epoch: int
    effective_at: int
    fee_per_token: int
    root: bytes
    measurements_hash: bytes
    assignments: tuple[Assignment, ...]

    @property
    def shard_plan(self) -> ShardPlan:
        """The plan with its tree; PLAN-01 is checked again."""
        return ShardPlan(self.assignments[-1].end_unit, self.assignments)


@dataclass(frozen=True, slots=True)
class Reveal:
    """An opened commitment. Of a committee member `evidence_root` is the sketch of the rows inside the stage."""

    evidence_root: bytes
    sketch: bytes
    output_tokens: int
    salt: bytes

    @property
    def sketches(self) -> tuple[bytes, bytes]:
        """Of a member: the two that members are compared by."""
        return self.sketch, self.evidence_root


@dataclass(frozen=True, slots=True)
class StageState:
    """The executor's side of one stage. `replaced` are the nodes that had it before and stopped, in order."""

    stage: int
    node: str
    commitment: bytes | None = None
    reveal: Reveal | None = None
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttestationState:
    """One committee member's word on one stage in one round."""

    round: int
    stage: int
    node: str
    commitment: bytes
    stake: int
    reveal: Reveal | None = None


@dataclass(frozen=True, slots=True)
class DrawState:
    """A committee draw (round 1) or escalation (rounds 2 and 3)."""

    round: int
    sampled: bool
    seed: bytes
    attest_deadline: int


@dataclass(frozen=True, slots=True)
class TallyState:
    """What a tally said. `verdict` as in IOutputVerification.StageVerdict."""

    round: int
    stage: int
    verdict: int
    medoid: str
    support: int
    revealed_stake: int
    distance: int


@dataclass(frozen=True, slots=True)
class ChallengeState:
    """A bonded challenge of one stage; `upheld` is None while it is undecided."""

    stage: int
    challenger: str
    bond: int
    upheld: bool | None = None


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request from its deposit to its end. Wei and Unix seconds."""

    request_id: RequestId
    requester: str
    plan_id: PlanId
    status: RequestStatus
    opened_at: int
    opened_block: int
    deadline: int
    deposit: int
    fee_per_token: int
    prompt_tokens: int
    maximum_tokens: int
    input_commitment: bytes
    secret_hash: bytes
    stages: tuple[StageState, ...] = ()
    routed_by_requester: bool = False
    entropy_block: int = 0
    snapshot_time: int = 0
    snapshot_stake: int = 0
    secret_deadline: int = 0
    secret: bytes | None = None
    draws: tuple[DrawState, ...] = ()
    attestations: tuple[AttestationState, ...] = ()
    tallies: tuple[TallyState, ...] = ()
    challenges: tuple[ChallengeState, ...] = ()
    accepted: bool | None = None
    challenge_deadline: int = 0
    concluded: bool = False
    blamed_stage: int | None = None
    output_tokens: int = 0
    paid_to_executors: int = 0
    paid_to_verifiers: int = 0
    protocol_fee: int = 0
    refunded: int = 0

    @property
    def round(self) -> int:
        """Round in progress; 0 before the first draw."""
        return self.draws[-1].round if self.draws else 0

    @property
    def sampled(self) -> bool:
        """Whether a committee sits or sat."""
        return any(draw.sampled for draw in self.draws)

    def members(self, round_: int, stage: int) -> tuple[AttestationState, ...]:
        """Members that committed for `stage` in `round_`, in the order of membersOf."""
        return tuple(item for item in self.attestations if item.round == round_ and item.stage == stage)

    def tally(self, round_: int, stage: int) -> TallyState | None:
        """The tally of `stage` in `round_`, if there was one."""
        return next((item for item in self.tallies if item.round == round_ and item.stage == stage), None)


@dataclass(frozen=True, slots=True)
class AccountState:
    """Credits an account can withdraw, in wei by contract."""

    account: str
    credits: tuple[tuple[str, int], ...] = ()


Aggregate = NodeState | ModelState | DocumentState | PlanState | RequestState | AccountState
AggregateKey = tuple[AggregateKind, str]

AGGREGATE_TYPES: Final[Mapping[AggregateKind, type[Aggregate]]] = {
    AggregateKind.NODE: NodeState,
    AggregateKind.MODEL: ModelState,
    AggregateKind.DOCUMENT: DocumentState,
    AggregateKind.PLAN: PlanState,
    AggregateKind.REQUEST: RequestState,
    AggregateKind.ACCOUNT: AccountState,
}


@dataclass(frozen=True)
class NetworkState:
    """Aggregates by kind and key. Keys are addresses in checksum form and ids as 0x hex."""

    aggregates: Mapping[AggregateKey, Aggregate] = field(default_factory=dict)

    @property
    def nodes(self) -> dict[str, NodeState]:
        return self._of(NodeState)

    @property
    def models(self) -> dict[str, ModelState]:
        return self._of(ModelState)

    @property
    def documents(self) -> dict[str, DocumentState]:
        return self._of(DocumentState)

    @property
    def plans(self) -> dict[str, PlanState]:
        return self._of(PlanState)

    @property
    def requests(self) -> dict[str, RequestState]:
        return self._of(RequestState)

    @property
    def accounts(self) -> dict[str, AccountState]:
        return self._of(AccountState)

    def _of(self, kind: type[_A]) -> dict[str, _A]:
        return {key: item for (_, key), item in self.aggregates.items() if isinstance(item, kind)}


_A = TypeVar("_A", NodeState, ModelState, DocumentState, PlanState, RequestState, AccountState)

# Which aggregate an event belongs to: its kind, and the parameter that names it.
_OWNERS: Final[Mapping[tuple[str, str], tuple[AggregateKind, str]]] = {
    ("NodeRegistry", "NodeRegistered"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "EndpointChanged"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "StakeAdded"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "ThawStarted"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "ExitStarted"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "StakeWithdrawn"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "NodeRemoved"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "NodeJailed"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "NodeReleased"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "NodeSlashed"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "DutyOpened"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "DutyClosed"): (AggregateKind.NODE, "node"),
    ("NodeRegistry", "Credited"): (AggregateKind.ACCOUNT, "account"),
    ("NodeRegistry", "CreditWithdrawn"): (AggregateKind.ACCOUNT, "account"),
    ("ShardAssignments", "ModelRegistered"): (AggregateKind.MODEL, "modelId"),
    ("ShardAssignments", "DocumentAnnounced"): (AggregateKind.DOCUMENT, "documentHash"),
    ("ShardAssignments", "PlanPublished"): (AggregateKind.PLAN, "planId"),
    ("InferenceEscrow", "RequestOpened"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "RequestRouted"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "StageReplaced"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "RequestCommitted"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "RequestVerified"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "RequestSettled"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "RequestRefunded"): (AggregateKind.REQUEST, "requestId"),
    ("InferenceEscrow", "Credited"): (AggregateKind.ACCOUNT, "account"),
    ("InferenceEscrow", "CreditWithdrawn"): (AggregateKind.ACCOUNT, "account"),
    ("OutputVerification", "StageCommitted"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "CommitmentsComplete"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "EntropyRenewed"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "CommitteeDrawn"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "AttestationCommitted"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "StageRevealed"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "AttestationRevealed"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "StageTallied"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "RoundEscalated"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "VerdictReached"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "Challenged"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "ChallengeResolved"): (AggregateKind.REQUEST, "requestId"),
    ("OutputVerification", "RequestConcluded"): (AggregateKind.REQUEST, "requestId"),
    # By node, not by request: anybody can sign a statement about a request that was never opened.
    ("OutputVerification", "ContradictionProven"): (AggregateKind.NODE, "node"),
    ("OutputVerification", "Credited"): (AggregateKind.ACCOUNT, "account"),
    ("OutputVerification", "CreditWithdrawn"): (AggregateKind.ACCOUNT, "account"),
}


def aggregate_of(event: ChainEvent) -> AggregateKey:
    """The one aggregate that `event` changes; UnknownEventError for an event of no known contract."""
    owner = _OWNERS.get((event.contract, event.name))
    if owner is None:
        raise UnknownEventError(event.contract, event.name)
    kind, parameter = owner
    value = event.arguments[parameter]
    return kind, address(value) if kind in (AggregateKind.NODE, AggregateKind.ACCOUNT) else "0x" + bytes(value).hex()


def fold(state: NetworkState, history: Iterable[tuple[ChainEvent, Block]]) -> NetworkState:
    """Apply events in chain order."""
    for event, block in history:
        state = apply(state, event, block)
    return state


def apply(state: NetworkState, event: ChainEvent, block: Block) -> NetworkState:
    """The state after `event` of `block`. Raises UnknownEventError, or NetworkStateError for an impossible history."""
    key = aggregate_of(event)
    before = state.aggregates.get(key)
    after = _applied(before, event, event.arguments, block)
    return NetworkState({**state.aggregates, key: after})


def _applied(before: Aggregate | None, event: ChainEvent, a: Mapping[str, Any], block: Block) -> Aggregate:
    match event.contract:
        case "NodeRegistry" if "account" in a:
            return _account(before, event)
        case "NodeRegistry":
            return _node(before, event, a, block)
        case "ShardAssignments":
            return _assignment(event, a)
        case "InferenceEscrow" if "account" in a:
            return _account(before, event)
        case "InferenceEscrow":
            return _escrow(before, event, a, block)
        case "OutputVerification" if "account" in a:
            return _account(before, event)
        case "OutputVerification" if event.name == "ContradictionProven":
            node = _existing_node(before, a)
            return replace(node, contradictions=node.contradictions + 1)
        case "OutputVerification":
            return _verification(before, event, a)
        case _:
            raise UnknownEventError(event.contract, event.name)


def _node(before: Aggregate | None, event: ChainEvent, a: Mapping[str, Any], block: Block) -> NodeState:
    node = _existing_node(before, a)
    match event.name:
        case "NodeRegistered":
            return NodeState(
                node=node.node,
                operator=address(a["operator"]),
                endpoint=a["endpoint"],
                certificate_hash=bytes(a["certificateHash"]),
                staked=a["staked"],
                active_from=a["activeFrom"],
                registered_at=block.timestamp,
                slashed=node.slashed,
                contradictions=node.contradictions,
            )
        case "EndpointChanged":
            return replace(node, endpoint=a["endpoint"], certificate_hash=bytes(a["certificateHash"]))
        case "StakeAdded":
            return replace(node, staked=a["staked"], warm_from=a["warmFrom"])
        case "ThawStarted":
            return replace(node, thawing=a["thawing"], thaw_end=a["thawEnd"])
        case "ExitStarted":
            return replace(node, exiting=True, thawing=node.staked, thaw_end=a["thawEnd"])
        case "StakeWithdrawn":
            return replace(node, staked=a["staked"], thawing=max(0, node.thawing - a["amount"]))
        case "NodeRemoved":
            return NodeState(
                node=node.node,
                # A tombstone outlives the account.
                jailed_until=node.jailed_until if node.jailed_until == TOMBSTONE else 0,
                slashed=node.slashed,
                contradictions=node.contradictions,
            )
        case "NodeJailed":
            return replace(node, jailed_until=a["jailedUntil"])
        case "NodeReleased":
            return replace(node, jailed_until=0)
        case "NodeSlashed":
            return replace(node, staked=a["staked"], thawing=a["thawing"], slashed=node.slashed + a["amount"])
        case "DutyOpened" | "DutyClosed":
            return replace(node, open_duties=a["openDuties"])
        case _:
            raise UnknownEventError(event.contract, event.name)


def _assignment(event: ChainEvent, a: Mapping[str, Any]) -> ModelState | DocumentState | PlanState:
    match event.name:
        case "DocumentAnnounced":
            return DocumentState(bytes(a["documentHash"]), len(a["document"]))
        case "ModelRegistered":
            return ModelState(
                model_id=ModelId(bytes(a["modelId"])),
                registrant=address(a["registrant"]),
                manifest_hash=bytes(a["manifestHash"]),
                weight_root=bytes(a["weightRoot"]),
                unit_count=a["unitCount"],
                name=a["name"],
            )
        case "PlanPublished":
            return PlanState(
                plan_id=PlanId(bytes(a["planId"])),
                model_id=ModelId(bytes(a["modelId"])),
                publisher=address(a["publisher"]),
                epoch=a["epoch"],
                effective_at=a["effectiveAt"],
                fee_per_token=a["feePerToken"],
                root=bytes(a["root"]),
                measurements_hash=bytes(a["measurementsHash"]),
                assignments=tuple(Assignment.from_tuple(tuple(item)) for item in a["assignments"]),
            )
        case _:
            raise UnknownEventError(event.contract, event.name)


def _escrow(before: Aggregate | None, event: ChainEvent, a: Mapping[str, Any], block: Block) -> RequestState:
    if event.name == "RequestOpened":
        return RequestState(
            request_id=RequestId(bytes(a["requestId"])),
            requester=address(a["requester"]),
            plan_id=PlanId(bytes(a["planId"])),
            status=RequestStatus.OPEN,
            opened_at=block.timestamp,
            opened_block=block.number,
            deadline=a["deadline"],
            deposit=a["deposit"],
            fee_per_token=a["feePerToken"],
            prompt_tokens=a["promptTokens"],
            maximum_tokens=a["maximumTokens"],
            input_commitment=bytes(a["inputCommitment"]),
            secret_hash=bytes(a["secretHash"]),
        )
    request = _existing_request(before, event, a)
    match event.name:
        case "RequestRouted":
            return replace(
                request,
                status=RequestStatus.ROUTED,
                # A publisher sees a request once its block is there.
                routed_by_requester=block.number == request.opened_block,
                deadline=a["deadline"],
                stages=tuple(StageState(stage, address(node)) for stage, node in enumerate(a["nodes"])),
            )
        case "StageReplaced":
            return _with_stage(request, a["stage"], node=address(a["node"]))
        case "RequestCommitted":
            return replace(request, status=RequestStatus.COMMITTED, deadline=a["deadline"])
        case "RequestVerified":
            return replace(request, status=RequestStatus.VERIFIED)
        case "RequestSettled":
            return replace(
                request,
                status=RequestStatus.SETTLED,
                paid_to_executors=a["paidToExecutors"],
                paid_to_verifiers=a["paidToVerifiers"],
                protocol_fee=a["protocolFee"],
                refunded=a["refunded"],
            )
        case "RequestRefunded":
            return replace(request, status=RequestStatus.REFUNDED, refunded=a["refunded"])
        case _:
            raise UnknownEventError(event.contract, event.name)


def _verification(before: Aggregate | None, event: ChainEvent, a: Mapping[str, Any]) -> RequestState:
    request = _existing_request(before, event, a)
    match event.name:
        case "StageCommitted":
            return _with_stage(request, a["stage"], commitment=bytes(a["commitment"]))
        case "CommitmentsComplete":
            return replace(
                request,
                entropy_block=a["entropyBlock"],
                snapshot_time=a["snapshotTime"],
                snapshot_stake=a["snapshotStake"],
                secret_deadline=a["secretDeadline"],
            )
        case "EntropyRenewed":
            return replace(request, entropy_block=a["entropyBlock"])
        case "CommitteeDrawn":
            draw = DrawState(a["round"], a["sampled"], bytes(a["seed"]), a["attestDeadline"])
            return replace(request, secret=bytes(a["secret"]), draws=(*request.draws, draw))
        case "RoundEscalated":
            draw = DrawState(a["round"], True, bytes(a["seed"]), a["attestDeadline"])
            return replace(request, draws=(*request.draws, draw), accepted=None)
        case "AttestationCommitted":
            attestation = AttestationState(
                a["round"], a["stage"], address(a["node"]), bytes(a["commitment"]), a["stake"]
            )
            return replace(request, attestations=(*request.attestations, attestation))
        case "StageRevealed":
            return _with_stage(request, a["stage"], reveal=_reveal(a))
        case "AttestationRevealed":
            return _with_attestation_revealed(request, a)
        case "StageTallied":
            tally = TallyState(
                a["round"],
                a["stage"],
                int(a["verdict"]),
                address(a["medoid"]),
                a["support"],
                a["revealedStake"],
                a["distance"],
            )
            return replace(request, tallies=(*request.tallies, tally))
        case "VerdictReached":
            return replace(request, accepted=a["accepted"], challenge_deadline=a["challengeDeadline"])
        case "Challenged":
            challenge = ChallengeState(a["stage"], address(a["challenger"]), a["bond"])
            # The escrow has no event for its `reopen`: a challenge is what takes a verified request back.
            status = RequestStatus.COMMITTED if request.status == RequestStatus.VERIFIED else request.status
            return replace(request, status=status, challenges=(*request.challenges, challenge))
        case "ChallengeResolved":
            resolved = tuple(
                replace(item, upheld=a["upheld"])
                if item.upheld is None and (item.stage, item.challenger) == (a["stage"], address(a["challenger"]))
                else item
                for item in request.challenges
            )
            return replace(request, challenges=resolved)
        case "RequestConcluded":
            blamed = None if a["blamedStage"] == UNBLAMED else a["blamedStage"]
            return replace(
                request,
                concluded=True,
                accepted=a["accepted"],
                blamed_stage=blamed,
                output_tokens=a["outputTokens"],
            )
        case _:
            raise UnknownEventError(event.contract, event.name)


def _account(before: Aggregate | None, event: ChainEvent) -> AccountState:
    account = address(event.arguments["account"])
    credits = dict(before.credits) if isinstance(before, AccountState) else {}
    match event.name:
        case "Credited":
            credits[event.contract] = event.arguments["credit"]
        case "CreditWithdrawn":
            credits[event.contract] = 0
        case _:
            raise UnknownEventError(event.contract, event.name)
    return AccountState(account, tuple(sorted(credits.items())))


def _existing_node(before: Aggregate | None, a: Mapping[str, Any]) -> NodeState:
    # Contracts may jail or tombstone a key whose account is gone, so a node that was never seen is a blank one.
    return before if isinstance(before, NodeState) else NodeState(address(a["node"]))


def _existing_request(before: Aggregate | None, event: ChainEvent, a: Mapping[str, Any]) -> RequestState:
    if not isinstance(before, RequestState):
        raise NetworkStateError(
            f"{event.contract}.{event.name} in block {event.block_number} is about request "
            f"0x{bytes(a['requestId']).hex()}, which was never opened: the follower began after the "
            "deployment's first block; rebuild its database"
        )
    return before


def _with_stage(
    request: RequestState,
    stage: int,
    *,
    commitment: bytes | None = None,
    reveal: Reveal | None = None,
    node: str | None = None,
) -> RequestState:
    if stage >= len(request.stages):
        raise NetworkStateError(
            f"request 0x{request.request_id.hex()} has {len(request.stages)} stages, an event names stage {stage}"
        )
    old = request.stages[stage]
    new = replace(old, commitment=commitment or old.commitment, reveal=reveal or old.reveal)
    if node is not None:
        new = replace(new, node=node, replaced=(*old.replaced, old.node))
    return replace(request, stages=(*request.stages[:stage], new, *request.stages[stage + 1 :]))


def _with_attestation_revealed(request: RequestState, a: Mapping[str, Any]) -> RequestState:
    node = address(a["node"])
    return replace(
        request,
        attestations=tuple(
            replace(item, reveal=_reveal(a))
            if (item.round, item.stage, item.node) == (a["round"], a["stage"], node)
            else item
            for item in request.attestations
        ),
    )


def _reveal(a: Mapping[str, Any]) -> Reveal:
    evidence_root = a["evidenceRoot"] if "evidenceRoot" in a else a["innerSketch"]
    return Reveal(bytes(evidence_root), bytes(a["sketch"]), a["outputTokens"], bytes(a["salt"]))
