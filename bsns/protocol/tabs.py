"""Requests that are paid out of a tab: tickets, what nodes sign for them, vouchers, and batches of all that.

Owns the digests, the Merkle-sum tree, the rule of the draw and that of the shares, as contracts/RequestTabs.sol has
them; and what is to be done next about a batch that was posted, which is the same for its collector and for the nodes
with a share, who do it where the collector does not. All functions are pure. Promises that a `CollectedBatch` which
constructs can be posted and all its leaves opened, as far as that depends on signatures, numbers and sums. Does not
know who may have a tab, nor talk to anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Final, NamedTuple

from eth_abi.abi import encode
from eth_typing import ChecksumAddress

from bsns.protocol import merkle
from bsns.protocol.commitments import BASIS_POINTS, secret_hash
from bsns.protocol.identifiers import (
    ZERO_HASH,
    ProtocolError,
    RequestId,
    abi_hash,
    address,
    keccak256,
    require_bytes32,
)
from bsns.protocol.plan import Assignment
from bsns.protocol.typed_data import Domain, is_signed_by, signing_digest
from bsns.v1 import tabs_pb2

TICKET: Final = (
    "Ticket(bytes32 planId,address requester,uint64 number,bytes32 inputCommitment,bytes32 secretHash,"
    "uint32 promptTokens,uint32 maximumTokens,uint64 deadline)"
)
STAGE_RESULT: Final = "StageResult(bytes32 requestId,uint16 stage,bytes32 commitment,uint32 outputTokens)"
VOUCHER: Final = "Voucher(address requester,address collector,uint96 cumulative,bytes32 secretHash)"
TICKET_GRANT: Final = "TicketGrant(bytes32 requestId,bytes32 routeHash)"
TICKET_ABANDONMENT: Final = "TicketAbandonment(bytes32 requestId)"
_SEGMENT: Final = (
    "Segment(address requester,uint64 firstTicket,uint32 tickets,uint32 tokens,uint96 cumulative,bytes32 secretHash)"
)
_SHARE: Final = "Share(address node,uint96 amount)"
_BATCH: Final = (
    "Batch(bytes32 planId,address collector,uint128 feePerToken,bytes32 root,uint64 deadline,Segment[] segments,"
    f"Share[] shares){_SEGMENT}{_SHARE}"
)
MAXIMUM_SEGMENTS: Final = 128
MAXIMUM_SHARES: Final = 64
MAXIMUM_DRAWS: Final = 32
MAXIMUM_BATCH_TICKETS: Final = 64
"""RequestTabs takes any number; with 64 a batch with everything that opens it is one message of at most 1 MiB."""
_UINT96: Final = 2**96 - 1


class BatchStatus(IntEnum):
    """IRequestTabs.BatchStatus."""

    ABSENT = 0
    POSTED = 1
    DRAWN = 2
    SETTLED = 3
    VOID = 4

    @property
    def is_over(self) -> bool:
        return self in (BatchStatus.SETTLED, BatchStatus.VOID)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a requester signs before a request is served (IRequestTabs.Ticket). `deadline`: Unix seconds."""

    plan_id: bytes
    requester: ChecksumAddress
    number: int
    input_commitment: bytes
    secret_hash: bytes
    prompt_tokens: int
    maximum_tokens: int
    deadline: int

    def as_tuple(self) -> tuple[Any, ...]:
        """Field values in the order of the Solidity struct."""
        return (
            self.plan_id,
            self.requester,
            self.number,
            self.input_commitment,
            self.secret_hash,
            self.prompt_tokens,
            self.maximum_tokens,
            self.deadline,
        )

    def request_id(self, domain: Domain) -> RequestId:
        """The id of the request, and what is signed."""
        return RequestId(signing_digest(domain, TICKET, self.as_tuple()))

    def to_message(self) -> tabs_pb2.Ticket:
        return tabs_pb2.Ticket(
            plan_id=self.plan_id,
            requester=_bytes(self.requester),
            number=self.number,
            input_commitment=self.input_commitment,
            secret_hash=self.secret_hash,
            prompt_tokens=self.prompt_tokens,
            maximum_tokens=self.maximum_tokens,
            deadline=self.deadline,
        )

    @classmethod
    def from_message(cls, message: tabs_pb2.Ticket) -> Ticket:
        """ProtocolError for a field of the wrong length."""
        return cls(
            require_bytes32(message.plan_id, "plan id"),
            address(bytes(message.requester)),
            message.number,
            require_bytes32(message.input_commitment, "input commitment"),
            require_bytes32(message.secret_hash, "secret hash"),
            message.prompt_tokens,
            message.maximum_tokens,
            message.deadline,
        )


@dataclass(frozen=True, slots=True)
class SignedTicket:
    """A ticket and its requester's signature."""

    ticket: Ticket
    signature: bytes

    def check(self, domain: Domain) -> RequestId:
        """The request's id; ProtocolError unless the requester signed it."""
        found = self.ticket.request_id(domain)
        if not is_signed_by(found, self.signature, self.ticket.requester):
            raise ProtocolError(f"the ticket is not signed by {self.ticket.requester}")
        return found

    def to_message(self) -> tabs_pb2.SignedTicket:
        return tabs_pb2.SignedTicket(ticket=self.ticket.to_message(), signature=self.signature)

    @classmethod
    def from_message(cls, message: tabs_pb2.SignedTicket) -> SignedTicket:
        return cls(Ticket.from_message(message.ticket), bytes(message.signature))


@dataclass(frozen=True, slots=True)
class RouteStage:
    """One stage of a route: its assignment, and the proof that the plan has it."""

    assignment: Assignment
    proof: tuple[bytes, ...]

    def to_message(self) -> tabs_pb2.RouteStage:
        return tabs_pb2.RouteStage(assignment=self.assignment.to_message(), proof=list(self.proof))

    @classmethod
    def from_message(cls, message: tabs_pb2.RouteStage) -> RouteStage:
        proof = tuple(require_bytes32(item, "proof") for item in message.proof)
        return cls(Assignment.from_message(message.assignment), proof)


def check_route(route: Sequence[RouteStage], plan_root: bytes) -> None:
    """ProtocolError unless `route` has each stage of the plan once, in order, as the plan assigns it."""
    if not route:
        raise ProtocolError("a route has at least one stage")
    for stage, item in enumerate(route):
        if item.assignment.stage != stage:
            raise ProtocolError(f"stage {item.assignment.stage} stands at place {stage} of the route")
        if not merkle.verify(plan_root, item.assignment.leaf, item.proof):
            raise ProtocolError(f"node {item.assignment.node} is not assigned to stage {stage} by the plan")


@dataclass(frozen=True, slots=True)
class TicketGrant:
    """A ticket that its collector has taken, with the route it chose."""

    ticket: SignedTicket
    route: tuple[RouteStage, ...]
    signature: bytes = b""

    def digest(self, domain: Domain) -> bytes:
        """What the collector signs."""
        route_hash = keccak256(b"".join(item.assignment.leaf for item in self.route))
        return signing_digest(domain, TICKET_GRANT, (self.ticket.ticket.request_id(domain), route_hash))

    def to_message(self) -> tabs_pb2.TicketGrant:
        route = [item.to_message() for item in self.route]
        return tabs_pb2.TicketGrant(ticket=self.ticket.to_message(), route=route, signature=self.signature)

    @classmethod
    def from_message(cls, message: tabs_pb2.TicketGrant) -> TicketGrant:
        """ProtocolError for a malformed message; whether it holds is for `check` and `check_route` to say."""
        route = tuple(RouteStage.from_message(item) for item in message.route)
        return cls(SignedTicket.from_message(message.ticket), route, bytes(message.signature))

    def check(self, domain: Domain, collector: str, plan_root: bytes) -> RequestId:
        """The request's id; ProtocolError unless requester and `collector` signed it and the plan has the route."""
        request_id = self.ticket.check(domain)
        check_route(self.route, plan_root)
        if not is_signed_by(self.digest(domain), self.signature, collector):
            raise ProtocolError(f"the collector {collector} has not signed this ticket with this route")
        return request_id


@dataclass(frozen=True, slots=True)
class StageResult:
    """What the node of one stage signs for a request of a tab. `commitment` as for commitStage."""

    served_by: RouteStage
    commitment: bytes
    output_tokens: int
    signature: bytes

    def is_signed(self, domain: Domain, request: RequestId) -> bool:
        digest = stage_result_digest(
            domain, request, self.served_by.assignment.stage, self.commitment, self.output_tokens
        )
        return is_signed_by(digest, self.signature, self.served_by.assignment.node)

    def to_message(self) -> tabs_pb2.StageResult:
        return tabs_pb2.StageResult(
            served_by=self.served_by.to_message(),
            commitment=self.commitment,
            output_tokens=self.output_tokens,
            signature=self.signature,
        )

    @classmethod
    def from_message(cls, message: tabs_pb2.StageResult) -> StageResult:
        return cls(
            RouteStage.from_message(message.served_by),
            require_bytes32(message.commitment, "commitment"),
            message.output_tokens,
            bytes(message.signature),
        )


def stage_result_digest(domain: Domain, request: RequestId, stage: int, commitment: bytes, output_tokens: int) -> bytes:
    """What a node signs for its stage of a request of a tab."""
    return signing_digest(domain, STAGE_RESULT, (request, stage, commitment, output_tokens))


@dataclass(frozen=True, slots=True)
class Voucher:
    """A requester's promise of `cumulative` wei over everything it has received so far from `collector`."""

    requester: ChecksumAddress
    collector: ChecksumAddress
    cumulative: int
    secret_hash: bytes
    signature: bytes = b""

    def digest(self, domain: Domain) -> bytes:
        values = (self.requester, self.collector, self.cumulative, self.secret_hash)
        return signing_digest(domain, VOUCHER, values)

    def is_signed(self, domain: Domain) -> bool:
        return is_signed_by(self.digest(domain), self.signature, self.requester)

    def to_message(self) -> tabs_pb2.Voucher:
        return tabs_pb2.Voucher(
            requester=_bytes(self.requester),
            collector=_bytes(self.collector),
            cumulative=wei_bytes(self.cumulative),
            secret_hash=self.secret_hash,
            signature=self.signature,
        )

    @classmethod
    def from_message(cls, message: tabs_pb2.Voucher) -> Voucher:
        return cls(
            address(bytes(message.requester)),
            address(bytes(message.collector)),
            wei_of(message.cumulative),
            require_bytes32(message.secret_hash, "secret hash"),
            bytes(message.signature),
        )


def abandonment_digest(domain: Domain, request: RequestId) -> bytes:
    """What a requester signs who gives a ticket up."""
    return signing_digest(domain, TICKET_ABANDONMENT, (request,))


@dataclass(frozen=True)
class CollectedTicket:
    """A ticket with the results of its stages in order; none if nobody is paid for it."""

    ticket: SignedTicket
    results: tuple[StageResult, ...] = ()

    @property
    def output_tokens(self) -> int:
        return self.results[0].output_tokens if self.results else 0

    @property
    def tokens(self) -> int:
        """What is charged for: prompt and answer, 0 without results."""
        return self.ticket.ticket.prompt_tokens + self.output_tokens if self.results else 0

    def check(self, domain: Domain, plan_id: bytes, plan_root: bytes) -> RequestId:
        """The request's id; ProtocolError unless the leaf could be opened as it stands."""
        ticket = self.ticket.ticket
        request = self.ticket.check(domain)
        if ticket.plan_id != plan_id:
            raise ProtocolError(f"ticket {ticket.number} is for another plan")
        if not self.results:
            return request
        check_route([item.served_by for item in self.results], plan_root)
        if not 0 < self.output_tokens <= ticket.maximum_tokens:
            raise ProtocolError(f"{self.output_tokens} answer tokens, ticket {ticket.number} allows "
                                f"{ticket.maximum_tokens}")  # fmt: skip
        for stage, item in enumerate(self.results):
            if item.output_tokens != self.output_tokens:
                raise ProtocolError(f"stage {stage} speaks of {item.output_tokens} tokens, others of "
                                    f"{self.output_tokens}")  # fmt: skip
            if not item.is_signed(domain, request):
                raise ProtocolError(f"the result of stage {stage} is not signed by {item.served_by.assignment.node}")
        return request

    def leaf(self, domain: Domain) -> bytes:
        """RequestTabs.leafOf."""
        executions = ZERO_HASH
        for item in self.results:
            executions = abi_hash(
                ["bytes32", "address", "bytes32"], [executions, item.served_by.assignment.node, item.commitment]
            )
        request = self.ticket.ticket.request_id(domain)
        return merkle.leaf_hash(encode(["bytes32", "bytes32", "uint32"], [request, executions, self.output_tokens]))

    def opening(self, segment: int) -> tuple[Any, ...]:
        """IRequestTabs.Opening of the leaf, which belongs to `segment` of its batch."""
        route = [result.served_by for result in self.results]
        return (
            segment,
            self.ticket.ticket.as_tuple(),
            self.ticket.signature,
            self.output_tokens,
            [stage.assignment.as_tuple() for stage in route],
            [list(stage.proof) for stage in route],
            [result.commitment for result in self.results],
            [result.signature for result in self.results],
        )

    def to_message(self) -> tabs_pb2.CollectedTicket:
        results = [item.to_message() for item in self.results]
        return tabs_pb2.CollectedTicket(ticket=self.ticket.to_message(), results=results)

    @classmethod
    def from_message(cls, message: tabs_pb2.CollectedTicket) -> CollectedTicket:
        results = tuple(StageResult.from_message(item) for item in message.results)
        return cls(SignedTicket.from_message(message.ticket), results)


class TreeStep(NamedTuple):
    """IRequestTabs.TreeStep: the sibling of a node on the way from a leaf to the root."""

    hash: bytes
    tokens: int
    leaves: int
    is_left: bool


class SumTree:
    """The Merkle-sum tree over (leaf hash, tokens) in order; nodes are (hash, tokens, leaves)."""

    def __init__(self, leaves: Sequence[tuple[bytes, int]]) -> None:
        if not leaves:
            raise ProtocolError("a batch has at least one ticket")
        level = [(require_bytes32(leaf, "leaf"), tokens, 1) for leaf, tokens in leaves]
        self._levels = [level]
        while len(level) > 1:
            parents = [_parent(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            if len(level) % 2:
                parents.append(level[-1])
            level = parents
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        return self._levels[-1][0][0]

    def path(self, index: int) -> tuple[TreeStep, ...]:
        """From leaf `index` to the root."""
        if not 0 <= index < len(self._levels[0]):
            raise ProtocolError(f"leaf {index} is not in a tree of {len(self._levels[0])}")
        found = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                found.append(TreeStep(*level[sibling], is_left=sibling < index))
            index //= 2
        return tuple(found)


def _parent(left: tuple[bytes, int, int], right: tuple[bytes, int, int]) -> tuple[bytes, int, int]:
    types = ["bytes32", "uint256", "uint256"] * 2
    return abi_hash(types, [*left, *right]), left[1] + right[1], left[2] + right[2]


@dataclass(frozen=True, slots=True)
class Segment:
    """One requester's run of tickets in a batch (IRequestTabs.Segment)."""

    requester: ChecksumAddress
    first_ticket: int
    tickets: int
    tokens: int
    cumulative: int
    secret_hash: bytes

    def as_tuple(self) -> tuple[Any, ...]:
        return (
            self.requester,
            self.first_ticket,
            self.tickets,
            self.tokens,
            self.cumulative,
            self.secret_hash,
        )


class Share(NamedTuple):
    """What a node gets of a batch of which no leaf is opened, in wei."""

    node: ChecksumAddress
    amount: int


@dataclass(frozen=True)
class CollectedBatch:
    """A batch with its leaves, in the order of its segments. ProtocolError if segments and tickets do not fit."""

    plan_id: bytes
    collector: ChecksumAddress
    fee_per_token: int
    deadline: int
    segments: tuple[Segment, ...]
    shares: tuple[Share, ...]
    tickets: tuple[CollectedTicket, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.segments) <= MAXIMUM_SEGMENTS or len(self.shares) > MAXIMUM_SHARES:
            raise ProtocolError(f"a batch has 1 to {MAXIMUM_SEGMENTS} segments and at most {MAXIMUM_SHARES} shares")
        if len(self.tickets) > MAXIMUM_BATCH_TICKETS:
            raise ProtocolError(f"a batch has at most {MAXIMUM_BATCH_TICKETS} tickets, this one {len(self.tickets)}")
        left = iter(self.tickets)
        for segment in self.segments:
            tokens = 0
            for number in range(segment.first_ticket, segment.first_ticket + segment.tickets):
                item = next(left, None)
                if item is None or (item.ticket.ticket.requester, item.ticket.ticket.number) != (
                    segment.requester,
                    number,
                ):
                    raise ProtocolError(f"ticket {number} of {segment.requester} is not where its segment says")
                tokens += item.tokens
            if tokens != segment.tokens or not tokens:
                raise ProtocolError(f"the segment of {segment.requester} has {tokens} tokens, not {segment.tokens}")
        if next(left, None) is not None:
            raise ProtocolError("there are tickets behind the last segment")

    def tree(self, domain: Domain) -> SumTree:
        return SumTree([(item.leaf(domain), item.tokens) for item in self.tickets])

    def as_tuple(self, domain: Domain) -> tuple[Any, ...]:
        """Field values in the order of the Solidity struct."""
        return (
            self.plan_id,
            self.collector,
            self.fee_per_token,
            self.tree(domain).root,
            self.deadline,
            [item.as_tuple() for item in self.segments],
            [tuple(item) for item in self.shares],
        )

    def batch_id(self, domain: Domain) -> bytes:
        """EIP-712 digest of the batch: its id, and what the nodes with a share sign."""
        segments = b"".join(
            abi_hash(["bytes32", "address", "uint64", "uint32", "uint32", "uint96", "bytes32"],
                     [keccak256(_SEGMENT.encode()), *item.as_tuple()])
            for item in self.segments
        )  # fmt: skip
        shares = b"".join(
            abi_hash(["bytes32", "address", "uint96"], [keccak256(_SHARE.encode()), *item]) for item in self.shares
        )
        struct = abi_hash(
            ["bytes32", "bytes32", "address", "uint128", "bytes32", "uint64", "bytes32", "bytes32"],
            [keccak256(_BATCH.encode()), self.plan_id, self.collector, self.fee_per_token, self.tree(domain).root,
             self.deadline, keccak256(segments), keccak256(shares)],
        )  # fmt: skip
        return keccak256(b"\x19\x01" + domain.separator + struct)

    @cached_property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.segments)

    @property
    def pot(self) -> int:
        """Wei that all tabs are charged."""
        return self.tokens * self.fee_per_token

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """Of each ticket the offset of its first token in the batch."""
        found, total = [], 0
        for item in self.tickets:
            found.append(total)
            total += item.tokens
        return tuple(found)

    def leaf_at(self, token: int) -> int:
        """Index of the ticket that covers `token`."""
        for index, first in enumerate(self.first_tokens):
            if first <= token < first + self.tickets[index].tokens:
                return index
        raise ProtocolError(f"token {token} is not among the {self.tokens} of the batch")

    def segment_of(self, index: int) -> int:
        """Index of the segment that ticket `index` belongs to."""
        for number, segment in enumerate(self.segments):
            if index < segment.tickets:
                return number
            index -= segment.tickets
        raise ProtocolError(f"there is no ticket {index} in the batch")

    def opening(self, index: int) -> tuple[Any, ...]:
        """IRequestTabs.Opening of ticket `index`."""
        return self.tickets[index].opening(self.segment_of(index))

    def check(self, domain: Domain, plan_root: bytes, protocol_fee_bps: int) -> None:
        """ProtocolError unless every leaf can be opened and the shares are those of `shares_of`."""
        for item in self.tickets:
            item.check(domain, self.plan_id, plan_root)
            if item.results and item.ticket.ticket.deadline < self.deadline:
                raise ProtocolError(f"ticket {item.ticket.ticket.number} may lapse before the batch has to be posted")
        if self.shares != shares_of(self.tickets, self.fee_per_token, protocol_fee_bps):
            raise ProtocolError("the shares are not in proportion to the work of the plan's stages")

    def to_message(self) -> tabs_pb2.TicketBatch:
        return tabs_pb2.TicketBatch(
            plan_id=self.plan_id,
            collector=_bytes(self.collector),
            fee_per_token=self.fee_per_token.to_bytes(16),
            deadline=self.deadline,
            segments=[
                tabs_pb2.BatchSegment(
                    requester=_bytes(item.requester),
                    first_ticket=item.first_ticket,
                    tickets=item.tickets,
                    tokens=item.tokens,
                    cumulative=wei_bytes(item.cumulative),
                    secret_hash=item.secret_hash,
                )
                for item in self.segments
            ],
            shares=[tabs_pb2.BatchShare(node=_bytes(node), amount=wei_bytes(amount)) for node, amount in self.shares],
            tickets=[item.to_message() for item in self.tickets],
        )

    @classmethod
    def from_message(cls, message: tabs_pb2.TicketBatch) -> CollectedBatch:
        """ProtocolError for a malformed message; whether it holds is for `check` to say."""
        if len(message.fee_per_token) > 16:
            raise ProtocolError("a fee has at most 16 bytes")
        return cls(
            require_bytes32(message.plan_id, "plan id"),
            address(bytes(message.collector)),
            int.from_bytes(message.fee_per_token),
            message.deadline,
            tuple(
                Segment(
                    address(bytes(item.requester)),
                    item.first_ticket,
                    item.tickets,
                    item.tokens,
                    wei_of(item.cumulative),
                    require_bytes32(item.secret_hash, "secret hash"),
                )
                for item in message.segments
            ),
            tuple(Share(address(bytes(item.node)), wei_of(item.amount)) for item in message.shares),
            tuple(CollectedTicket.from_message(item) for item in message.tickets),
        )


def shares_of(tickets: Iterable[CollectedTicket], fee_per_token: int, protocol_fee_bps: int) -> tuple[Share, ...]:
    """What each node gets of a batch: of every request's charge less the protocol fee its part by work weight, as the
    escrow pays where nobody verified. By address; the last one takes the dust.
    """
    weighed: dict[ChecksumAddress, int] = {}
    pot = scale = 0
    served = [item for item in tickets if item.results]
    for item in served:
        pot += item.tokens * fee_per_token
    # Exact: parts of 2^64 of a wei.
    scale = 1 << 64
    for item in served:
        whole = sum(result.served_by.assignment.work_weight for result in item.results)
        for result in item.results:
            assignment = result.served_by.assignment
            part = item.tokens * fee_per_token * scale * assignment.work_weight // whole
            weighed[assignment.node] = weighed.get(assignment.node, 0) + part
    paid = pot - pot * protocol_fee_bps // BASIS_POINTS
    found, left = [], paid
    for place, node in enumerate(sorted(weighed)):
        amount = left if place == len(weighed) - 1 else paid * weighed[node] // (pot * scale) if pot else 0
        left -= amount
        found.append(Share(node, amount))
    return tuple(found)


def drawn_tokens(
    batch_id: bytes,
    segments: Sequence[Segment],
    entropy: bytes,
    secrets: Mapping[bytes, bytes],
    tokens_per_draw: int,
) -> tuple[int, ...]:
    """The tokens that a batch is drawn at: `entropy` is the hash of its entropy block, `secrets` those that counted, by
    their hashes.
    """
    tokens = sum(item.tokens for item in segments)
    found = []
    for draw in range(-(-tokens // tokens_per_draw)):
        token = int.from_bytes(abi_hash(["bytes32", "bytes32", "uint256"], [entropy, batch_id, draw])) % tokens
        first = 0
        for segment in segments:
            if token < first + segment.tokens:
                break
            first += segment.tokens
        secret = secrets.get(segment.secret_hash, ZERO_HASH)
        seed = abi_hash(["bytes32", "bytes32", "uint256", "bytes32"], [entropy, batch_id, draw, secret])
        found.append(first + int.from_bytes(seed) % segment.tokens)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class PostedState:
    """Where a batch stands on chain (IRequestTabs.BatchState). Deadlines in Unix seconds."""

    status: BatchStatus
    entropy_block: int
    secret_deadline: int
    deadline: int
    pending: int
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, raw: Any) -> PostedState:
        """From the contract's struct."""
        return cls(
            BatchStatus(int(raw.status)),
            int(raw.entropyBlock),
            int(raw.secretDeadline),
            int(raw.deadline),
            int(raw.pending),
            tuple(map(int, raw.offsets)),
        )

    @property
    def pending_tokens(self) -> tuple[int, ...]:
        """Drawn tokens whose leaves are still to be opened."""
        return tuple(token for draw, token in enumerate(self.offsets) if self.pending >> draw & 1)


class BatchCall(NamedTuple):
    """A call of RequestTabs; `key` tells it from others about the same batch."""

    key: str
    function: str
    arguments: tuple[Any, ...]


def due_calls(
    batch: CollectedBatch,
    domain: Domain,
    state: PostedState,
    secrets: Mapping[bytes, bytes],
    *,
    now: int,
    head_number: int,
    opening_window: int,
    patience: int = 0,
) -> tuple[BatchCall, ...]:
    """What is due of a posted batch at Unix second `now`, after block `head_number`; `secrets` by their hashes.

    With `patience` seconds, only what somebody else has left undone for so long.
    """
    # Asked again and again of batches of which nothing is due: only what is due builds the tree and its hashes.
    match state.status:
        case BatchStatus.POSTED:
            known = [secrets.get(item.secret_hash, ZERO_HASH) for item in batch.segments]
            complete = ZERO_HASH not in known
            if now > state.deadline + patience:
                return (BatchCall("voidBatch", "voidBatch", (batch.as_tuple(domain),)),)
            is_time = (complete and not patience) or now > state.secret_deadline + patience
            if head_number >= state.entropy_block and is_time and now <= state.deadline:
                return (BatchCall(f"draw/{state.entropy_block}", "draw", (batch.as_tuple(domain), known)),)
        case BatchStatus.DRAWN if now > state.deadline + patience:
            over = "voidBatch" if state.pending else "settle"
            return (BatchCall(over, over, (batch.as_tuple(domain),)),)
        case BatchStatus.DRAWN if now <= state.deadline and now > state.deadline - opening_window + patience:
            leaves = dict.fromkeys(map(batch.leaf_at, state.pending_tokens))
            if not leaves:
                return ()
            shown, tree = batch.as_tuple(domain), batch.tree(domain)
            return tuple(
                BatchCall(f"openLeaf/{index}", "openLeaf", (shown, batch.opening(index), list(tree.path(index))))
                for index in leaves
            )
    return ()


def secrets_by_hash(secrets: Iterable[bytes]) -> dict[bytes, bytes]:
    """Secrets by the hashes that vouchers name; ProtocolError for one that is not 32 bytes."""
    return {secret_hash(item): item for item in secrets}


def wei_bytes(amount: int) -> bytes:
    """Wei as tabs count them: 12 bytes big-endian. ProtocolError beyond."""
    if not 0 <= amount <= _UINT96:
        raise ProtocolError(f"{amount} wei is more than a tab can hold")
    return amount.to_bytes(12)


def wei_of(data: bytes) -> int:
    """The inverse of `wei_bytes`."""
    if len(data) > 12:
        raise ProtocolError(f"an amount has at most 12 bytes, got {len(data)}")
    return int.from_bytes(data)


def _bytes(account: str) -> bytes:
    return bytes.fromhex(account[2:])
