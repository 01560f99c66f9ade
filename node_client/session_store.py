"""Sessions of the stages this node executes, and who may open one.

Owns the state of each session, keyed by (request, stage), the admission rules and the budgets. Promises that a session
is open only for a request that the chain, or the collector of a tab, routed to this node for that stage, with a token
of its requester and an opening of its input commitment; that caches of all sessions fit the budget; that opening
twice gives the same session; and that a stage that was sealed, or lost in a crash after its node had signed something
about it, is never opened again. Does not move tensors: see node_client.pipeline.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eth_typing import ChecksumAddress

from bsns.protocol.commitments import (
    MAXIMUM_DRAFTS,
    MAXIMUM_SHOWN_PROMPT,
    SPARE_DRAFTS,
    TOKEN_BYTES,
    EvidenceBuilder,
    content_digest,
    input_commitment,
    sketch_seed,
    token_ids,
)
from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.identifiers import BYTES32, ZERO_HASH, ModelId, ProtocolError, RequestId, address, require_bytes32
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.plan import Assignment, execution_class_id
from bsns.protocol.replacement import MAXIMUM_REPLACEMENTS, StageReplacement, route_after
from bsns.protocol.sampling import SamplingError, SamplingParameters
from bsns.protocol.sketch import StageSketch
from bsns.protocol.typed_data import SESSION_TOKEN, is_signed_by, signing_digest
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.cuda import DeviceMemoryError
from bsns.runtime.executor import ShardExecutor, StageSession
from bsns.v1 import common_pb2, execution_pb2
from node_client.chain_view import ChainView, RequestView, SigningDomains, StageView
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import EvidenceStore, InputOpening
from node_client.prompt_lookup import Drawn, SpeculatedAnswer
from node_client.settings import NodeSettings
from node_client.shard_runtime import Rows, ShardRuntime, input_bytes, input_encodings, new_sketch
from node_client.signing_guard import SigningGuard
from node_client.tab_desk import TabDesk

if TYPE_CHECKING:
    from node_client.pipeline import ForwardStream

SessionKey = tuple[bytes, int]
Clock = Callable[[], float]


class SessionState(enum.Enum):
    """ACTIVE executes; SEALED has its result on disk and only answers repeats; FAILED is being removed."""

    ACTIVE = "active"
    SEALED = "sealed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """A step that was executed: a repeat must be the same. `rejected` rows of the steps before it were not kept."""

    position: int
    rows: int
    digest: bytes
    rejected: int = field(default=0, compare=False)

    @property
    def end(self) -> int:
        """Position behind the last row."""
        return self.position + self.rows


@dataclass(frozen=True, slots=True)
class ReceivedOutput:
    """What the last stage handed to stage 0 after a step: `token_ids` are the newest token and its drafts, `accepted`
    of the drafts before it belong to the answer.
    """

    accepted: int
    token_ids: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Stall:
    """Something behind `stage` is wrong: what its requester is told."""

    refusal: Refusal
    stage: int


@dataclass(eq=False)
class Session:
    """One stage of one request. Changed only by its own task in the pipeline, except `inbox`."""

    request_id: bytes
    stage: int
    route: tuple[StageView, ...]
    requester: ChecksumAddress
    opening: InputOpening
    model: ModelId
    executor: ShardExecutor
    cache: StageSession | None
    cache_bytes: int
    sketch: StageSketch
    inbox: asyncio.Queue[Any]
    # Last stage only.
    answer: SpeculatedAnswer | None = None
    state: SessionState = SessionState.ACTIVE
    executed: list[ExecutedStep] = field(default_factory=list)
    # Where step 0 (or, behind stage 0, every step) comes from; for stage 0 the requester.
    upstream: ForwardStream | None = None
    # Stage 0 only: where the last stage's outputs come from, the outputs, and the answer's tokens in them.
    ring: ForwardStream | None = None
    outputs: list[ReceivedOutput] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    # Stage 0 only: the requester is away, or wants the end; no step is begun then.
    held: object | None = None
    closing: bool = False
    close_waiters: list[asyncio.Future[int]] = field(default_factory=list)
    finish_reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
    ended_message: execution_pb2.SessionEnded | None = None
    final_statement: common_pb2.SignedHandOver | None = None
    # For a successor that reconnects: the newest output and what followed it.
    unacknowledged: list[execution_pb2.ForwardRequest] = field(default_factory=list)
    sent_statement: execution_pb2.ForwardRequest | None = None
    receipts: dict[int, common_pb2.SignedHandOver] = field(default_factory=dict)
    # Written by the recording thread only.
    builder: EvidenceBuilder = field(default_factory=EvidenceBuilder)
    recordings: deque[asyncio.Future[Any]] = field(default_factory=deque)
    last_signed_step: int = -1
    # Chains that the neighbours across the ring's joint have: of the outputs that were sent to stage 0, of the inputs
    # that stage 0 received.
    output_chains: list[bytes] = field(default_factory=list)
    returned_chains: list[bytes] = field(default_factory=list)
    opened_at: float = 0.0
    # The route as it was on chain, what has replaced nodes of it since, and the root of the plan they are all in.
    first_views: tuple[StageView, ...] = ()
    replacements: tuple[StageReplacement, ...] = ()
    replacement_messages: tuple[execution_pb2.StageReplacement, ...] = ()
    plan_root: bytes = ZERO_HASH
    # This node takes the stage over, and has not fetched what it missed; the stages around it may be new as well.
    takes_over: bool = False
    predecessor_is_new: bool = False
    successor_is_new: bool = False
    # Who asks for its history meanwhile, for a stage that takes over itself.
    history_waiters: list[asyncio.Future[Any]] = field(default_factory=list)
    # Why the ring does not go on, and until when (monotonic clock) a replacement is waited for.
    stalled: Stall | None = None
    stalled_until: float = 0.0
    # Why it failed, if it did.
    failure: Refusal | None = None
    # How often the newest output was refused as damaged, and was sent again.
    resent: int = 0

    @property
    def key(self) -> SessionKey:
        return self.request_id, self.stage

    @property
    def has_failed(self) -> bool:
        """Whether a callback gave the session up while its task was waiting."""
        return self.state is SessionState.FAILED

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.route) - 1

    @property
    def successor_stage(self) -> int:
        """The stage that takes the outputs: the last stage's go to stage 0."""
        return 0 if self.is_last else self.stage + 1

    @property
    def successor(self) -> ChecksumAddress:
        return self.route[self.successor_stage].node

    @property
    def predecessor_stage(self) -> int:
        return (self.stage or len(self.route)) - 1

    @property
    def predecessor(self) -> ChecksumAddress:
        """The node whose frames are taken; for stage 0 from step 1 on the last stage's."""
        return self.route[self.predecessor_stage].node

    @property
    def manifest(self) -> ModelManifest:
        return self.executor.manifest

    @property
    def next_step(self) -> int:
        return len(self.executed)

    @property
    def positions(self) -> int:
        """Rows of the whole sequence: the last token drawn is nobody's input."""
        return self.opening.prompt_tokens + self.opening.sampling.maximum_tokens - 1

    def check_extent(self, step: int, position: int, rows: int) -> None:
        """Refusal unless `rows` rows from `position` on can be step `step` of this session, whatever came before.

        Step 0 is the prompt (of a model that takes no tokens, its input row), each later one a token and its drafts.
        """
        prompt = self.opening.prompt_tokens
        if step == 0:
            if (position, rows) != (0, prompt):
                raise Refusal(
                    ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
                    f"step 0 has {prompt} rows from position 0 on, {rows} from {position} on were announced",
                )
            return
        most = 1 + MAXIMUM_DRAFTS if self.manifest.takes_token_ids else 1
        if not 1 <= rows <= most:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_TENSOR, f"step {step} has 1 to {most} rows, {rows} were announced"
            )
        # Stage 0 also gets the answer's last token, of which it executes nothing.
        ends_answer = self.stage == 0 and rows == 1
        if not prompt <= position <= self.positions + ends_answer - rows:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
                f"step {step} lies between positions {prompt} and {self.positions}, {rows} rows from {position} on "
                "were announced",
            )

    def check_follows(self, position: int) -> int:
        """How many rows of the newest step are kept if the next begins at `position`; Refusal unless at least one is,
        of the prompt all, and no gap is left.
        """
        last = self.executed[-1]
        kept = position - last.position
        if not 1 <= kept <= last.rows or (last.position == 0 and kept != last.rows):
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                f"step {self.next_step} begins behind a row of step {self.next_step - 1}, which has positions "
                f"{last.position} to {last.end - 1}; position {position} was announced",
            )
        return kept

    def rejected_before(self, position: int) -> int:
        """Rows that were executed and not kept, if the next step begins at `position`."""
        last = self.executed[-1]
        return last.rejected + last.end - position

    def check_next(self, step: int, position: int, rows: int) -> None:
        """Refusal unless this is the step that comes next, of a session that goes on."""
        self.check_order(step, position, rows)
        if step and self.answer is not None:
            drawn = self.opening.prompt_tokens + self.answer.count - 1, 1 + len(self.answer.drafts)
            if (position, rows) != drawn:
                raise Refusal(
                    ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                    f"step {step} has {drawn[1]} rows from position {drawn[0]} on, as they were handed to stage 0; "
                    f"{rows} rows from {position} on came back",
                )

    def check_order(self, step: int, position: int, rows: int) -> None:
        """Refusal unless this can be the step that comes next, whatever was drawn."""
        if step != self.next_step:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, f"step {self.next_step} comes next, step {step} was sent"
            )
        if self.state is not SessionState.ACTIVE:
            raise Refusal(ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, "the session has ended")
        if step == 0:
            return
        self.check_follows(position)
        tokens = position - self.opening.prompt_tokens + 1
        if self.rejected_before(position) + rows - 1 > tokens + SPARE_DRAFTS:
            raise Refusal(
                ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED,
                f"{self.rejected_before(position)} drafts were rejected in {tokens} tokens and {rows - 1} more were "
                "sent; the last stage must draft less",
            )

    def check_repeat(self, step: int, position: int, rows: int, digest: bytes) -> None:
        """Refusal unless `step`, which was executed, is repeated as it was."""
        if self.executed[step] != ExecutedStep(position, rows, digest):
            raise Refusal(
                ErrorReason.ERROR_REASON_DIGEST_MISMATCH,
                f"step {step} was executed with other rows; a step has one input",
            )

    def check_end(self, steps: int, tokens: int) -> None:
        """Refusal unless the session can end after the steps it executed with an answer of `tokens` tokens."""
        if steps != self.next_step or not steps:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                f"{self.next_step} steps were executed, the end is announced after {steps}",
            )
        known = self.answer.count if self.answer is not None else len(self.tokens) if self.stage == 0 else tokens
        if tokens != known:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, f"the answer has {known} tokens, its end speaks of {tokens}"
            )
        self.check_follows(self.opening.prompt_tokens + tokens - 1)

    def take(self, logits: Rows, most_drafts: int) -> Drawn:
        """The last stage draws, and drafts."""
        assert self.answer is not None, "only the last stage has logits"
        return self.answer.take(logits, most_drafts if self.manifest.takes_token_ids else 0)

    def encodings_of(self, step: int) -> tuple[TensorEncoding, ...]:
        """How the input of a step may travel: what returns to stage 0 after its first step are tokens, of any model."""
        if self.stage == 0 and step > 0:
            return (TensorEncoding.TOKEN_IDS,)
        return input_encodings(self.manifest, self.executor.first_unit)

    def input_bytes_of(self, step: int, rows: int, encoding: TensorEncoding) -> int:
        if self.stage == 0 and step > 0:
            return TOKEN_BYTES * rows
        return input_bytes(self.manifest, self.executor.first_unit, rows, encoding)

    def is_final(self, token: int, tokens: int) -> bool:
        """Whether `token`, the `tokens`-th drawn, ends the answer."""
        return token in self.manifest.end_token_ids or tokens >= self.opening.sampling.maximum_tokens

    def reason_of(self, token: int) -> common_pb2.FinishReason.ValueType:
        stopped = token in self.manifest.end_token_ids
        return common_pb2.FINISH_REASON_STOP if stopped else common_pb2.FINISH_REASON_LENGTH


class SessionStore:
    """All sessions of the node."""

    def __init__(
        self,
        settings: NodeSettings,
        node: ChecksumAddress,
        domains: SigningDomains,
        chain: ChainView,
        runtime: ShardRuntime,
        evidence: EvidenceStore,
        guard: SigningGuard,
        *,
        tabs: TabDesk | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._settings, self._node, self._domains = settings, node, domains
        self._chain, self._runtime, self._evidence, self._guard = chain, runtime, evidence, guard
        self._tabs, self._clock = tabs, clock
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._opening: dict[SessionKey, asyncio.Lock] = {}
        self._cache_used = 0
        self.draining = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def active(self) -> int:
        """Sessions that still execute."""
        return sum(session.state is SessionState.ACTIVE for session in self._sessions.values())

    @property
    def free_cache_bytes(self) -> int:
        return self._settings.cache_memory_bytes - self._cache_used

    def get(self, request_id: bytes, stage: int) -> Session | None:
        return self._sessions.get((request_id, stage))

    def require(self, request_id: bytes, stage: int) -> Session:
        """The session, or a Refusal that tells the caller to open it."""
        session = self._sessions.get((request_id, stage))
        if session is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_UNKNOWN_SESSION,
                "there is no such session here: open it with OpenSession, or it has ended",
            )
        return session

    def of_request(self, request_id: bytes) -> list[Session]:
        return [session for key, session in self._sessions.items() if key[0] == request_id]

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    async def check_token(self, request_id: bytes, token: execution_pb2.SessionToken) -> RequestView:
        """The request, if `token` is its requester's and still valid; a Refusal otherwise."""
        if len(request_id) != BYTES32:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "request_id must be 32 bytes")
        now = int(self._clock())
        if token.deadline < now:
            raise Refusal(
                ErrorReason.ERROR_REASON_SESSION_TOKEN_EXPIRED, "the session token has expired; sign a new one"
            )
        if token.deadline > now + self._settings.maximum_token_lifetime_seconds:
            raise Refusal(
                ErrorReason.ERROR_REASON_SESSION_TOKEN_INVALID,
                f"a session token is valid for at most {self._settings.maximum_token_lifetime_seconds} s; sign "
                "one with an earlier deadline",
            )
        request = await self._chain.request(request_id)
        if request.status is RequestStatus.ABSENT:
            raise Refusal(ErrorReason.ERROR_REASON_REQUEST_NOT_ROUTED, "the request is not on the chain; open it first")
        digest = signing_digest(
            self._domains.escrow, SESSION_TOKEN, (request_id, request.input_commitment, token.deadline)
        )
        if not is_signed_by(digest, token.signature, request.requester):
            raise Refusal(
                ErrorReason.ERROR_REASON_SESSION_TOKEN_INVALID,
                "the session token is not signed by the requester of this request",
            )
        return request

    async def open(self, message: execution_pb2.OpenSessionRequest) -> tuple[Session, bool]:
        """The session and whether it is new. Every way it can be refused is a Refusal; nothing is kept then."""
        key = (bytes(message.request_id), message.stage)
        if message.HasField("grant") and self._tabs is not None:
            await self._tabs.admit(key[0], message.grant)
        request = await self.check_token(key[0], message.token)
        lock = self._opening.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                existing = self._sessions.get(key)
                if existing is not None:
                    return existing, False
                session = await self._admit(key, request, message)
                self._sessions[key] = session
                return session, True
        finally:
            if not lock.locked():
                self._opening.pop(key, None)

    def free_cache(self, session: Session) -> None:
        """Give the KV cache and the weights back; the session itself stays until `remove`."""
        if session.cache is not None:
            session.cache = None
            self._cache_used -= session.cache_bytes
            self._runtime.release(session.executor)

    def remove(self, session: Session) -> None:
        self.free_cache(session)
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]

    async def _admit(self, key: SessionKey, request: RequestView, message: execution_pb2.OpenSessionRequest) -> Session:
        if self.draining:
            raise Refusal(ErrorReason.ERROR_REASON_DRAINING, "the node is shutting down; ask for another route")
        status = await self._chain.node_status(self._node)
        if status is not NodeStatus.ACTIVE:
            raise Refusal(
                ErrorReason.ERROR_REASON_NODE_NOT_ACTIVE,
                f"the node is {status.name.lower()} on chain and must not serve",
            )
        if request.status is not RequestStatus.ROUTED:
            raise Refusal(
                ErrorReason.ERROR_REASON_REQUEST_NOT_ROUTED,
                f"the request is {request.status.name.lower()}; sessions are for routed requests",
            )
        head = await self._chain.head()
        if head.timestamp > request.deadline:
            raise Refusal(
                ErrorReason.ERROR_REASON_REQUEST_NOT_ROUTED, "the request's deadline has passed; claim its refund"
            )
        first_route = await self._chain.stages(key[0])
        plan_root = await self._chain.plan_root(request.plan_id)
        replacements = replacements_from_messages(key[0], message.replacements)
        route = self.route_after(first_route, replacements, request.requester, plan_root)
        if key[1] >= len(route) or route[key[1]].node != self._node:
            raise Refusal(
                ErrorReason.ERROR_REASON_WRONG_STAGE,
                f"stage {key[1]} of this request is not routed to node {self._node}",
            )
        opening = self._opened(request, message.input)
        model = ModelId(await self._chain.model_of_plan(request.plan_id))
        manifest = self._runtime.store(model).manifest
        # The last token drawn is nobody's input.
        positions = opening.prompt_tokens + opening.sampling.maximum_tokens - 1
        if positions > manifest.context_limit:
            raise Refusal(
                ErrorReason.ERROR_REASON_CONTEXT_LIMIT,
                f"{opening.prompt_tokens} prompt tokens and {opening.sampling.maximum_tokens} answer tokens take "
                f"{positions} positions, the model has {manifest.context_limit}; shorten one of them",
            )
        prompt = _checked_prompt(message.prompt, opening, manifest, is_last=key[1] == len(route) - 1)
        self._check_history(key)
        session = await self._allocate(key, request, route, opening, model, positions)
        session.first_views = first_route
        session.replacements, session.plan_root = replacements, plan_root
        session.replacement_messages = tuple(message.replacements)
        session.takes_over = first_route[key[1]].node != self._node
        if replacements:
            self._evidence.save_replacements(*key, [item.SerializeToString() for item in message.replacements])
        session.predecessor_is_new, session.successor_is_new = message.predecessor_is_new, message.successor_is_new
        if session.is_last:
            session.answer = SpeculatedAnswer(opening.sampling, manifest.end_token_ids, prompt)
        return session

    async def _allocate(
        self,
        key: SessionKey,
        request: RequestView,
        route: tuple[StageView, ...],
        opening: InputOpening,
        model: ModelId,
        positions: int,
    ) -> Session:
        """Weights, cache and record of an admitted session; gives everything back if one of them is refused."""
        own = route[key[1]]
        executor = await self._runtime.executor(model, own.first_unit, own.end_unit)
        try:
            if execution_class_id(executor.execution_class) != own.execution_class:
                raise Refusal(
                    ErrorReason.ERROR_REASON_WRONG_PLAN,
                    f"the plan promises another execution class than {executor.execution_class}, which is what this "
                    "node runs",
                )
            if self.active >= self._settings.maximum_sessions:
                raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "all sessions are taken; try again later")
            try:
                cache = executor.new_session(positions)
            except DeviceMemoryError as error:
                raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, f"{error}; try again later") from error
            needed = cache.cache_bytes_limit
            if needed > self.free_cache_bytes:
                raise Refusal(
                    ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED,
                    f"the session needs {needed} bytes of cache, {self.free_cache_bytes} are free; try again later",
                )
            # Without drafts that will be rejected: they cost the session its end, if nothing is left for them.
            taken, given = (
                input_bytes(executor.manifest, unit, positions) for unit in (executor.first_unit, executor.end_unit)
            )
            if taken + given > self._evidence.bytes_free:
                raise Refusal(
                    ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "there is no room for the evidence of another session"
                )
            self._evidence.open_stage(key[0], key[1], opening, int(self._clock()))
            self._cache_used += needed
        except BaseException:
            self._runtime.release(executor)
            raise
        return Session(
            request_id=key[0],
            stage=key[1],
            route=route,
            requester=request.requester,
            opening=opening,
            model=model,
            executor=executor,
            cache=cache,
            cache_bytes=needed,
            sketch=new_sketch(sketch_seed(RequestId(key[0]), key[1]), executor),
            inbox=asyncio.Queue(self._settings.session_inbox_limit),
            opened_at=time.monotonic(),
        )

    def route_after(
        self,
        route: Sequence[StageView],
        replacements: Sequence[StageReplacement],
        requester: ChecksumAddress,
        plan_root: bytes,
    ) -> tuple[StageView, ...]:
        """`route` with `replacements` in place; Refusal if one of them is not as the chain would take it."""
        try:
            nodes = route_after(
                [stage.node for stage in route],
                replacements,
                requester=requester,
                domain=self._domains.escrow,
                plan_root=plan_root,
            )
        except ProtocolError as error:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID, f"a replacement does not hold: {error}"
            ) from error
        classes = {(item.stage, item.assignment.node): item.assignment.execution_class for item in replacements}
        return tuple(
            stage if stage.node == node else StageView(node, stage.first_unit, stage.end_unit, classes[number, node])
            for number, (stage, node) in enumerate(zip(route, nodes, strict=True))
        )

    def _check_history(self, key: SessionKey) -> None:
        if self._evidence.sealed_stage(*key) is not None:
            raise Refusal(ErrorReason.ERROR_REASON_SESSION_ENDED, "this session has ended and its result is committed")
        if self._guard.has_signed(*key):
            # The cache is gone, and executing again could sign other bytes for the same steps: that would be
            # equivocation.
            raise Refusal(
                ErrorReason.ERROR_REASON_UNKNOWN_SESSION,
                "this session was lost when the node restarted; open a new request",
            )

    @staticmethod
    def _opened(request: RequestView, message: execution_pb2.InputOpening) -> InputOpening:
        if len(message.prompt_digest) != BYTES32 or len(message.salt) != BYTES32:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "prompt_digest and salt must be 32 bytes")
        sampling = sampling_from_message(message.sampling)
        commitment = input_commitment(message.prompt_digest, message.prompt_tokens, sampling.digest(), message.salt)
        if commitment != request.input_commitment:
            raise Refusal(
                ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH,
                "prompt digest, sampling parameters and salt do not open the commitment on chain",
            )
        if message.prompt_tokens != request.prompt_tokens or not message.prompt_tokens >= 1:
            raise Refusal(
                ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH,
                f"the commitment is over {message.prompt_tokens} prompt tokens, {request.prompt_tokens} were paid",
            )
        if sampling.maximum_tokens > request.maximum_tokens:
            raise Refusal(
                ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH,
                f"{sampling.maximum_tokens} answer tokens are asked for, {request.maximum_tokens} were paid",
            )
        return InputOpening(bytes(message.prompt_digest), message.prompt_tokens, sampling, bytes(message.salt))


def _checked_prompt(data: bytes, opening: InputOpening, manifest: ModelManifest, *, is_last: bool) -> tuple[int, ...]:
    """The prompt that a requester shows to the last stage; empty if it shows none. Refusal if it is another one."""
    if not data:
        return ()
    if not is_last or not manifest.takes_token_ids:
        raise Refusal(
            ErrorReason.ERROR_REASON_MALFORMED_MESSAGE,
            "a prompt is shown to the last stage of a model that takes token ids, and to no other; leave it out",
        )
    if len(data) > TOKEN_BYTES * MAXIMUM_SHOWN_PROMPT:
        raise Refusal(
            ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE,
            f"a prompt of more than {MAXIMUM_SHOWN_PROMPT} tokens is not looked up; leave it out",
        )
    if len(data) != TOKEN_BYTES * opening.prompt_tokens or content_digest(data) != opening.prompt_digest:
        raise Refusal(
            ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH,
            "this is not the prompt of the request: send its token ids as int32, or leave them out",
        )
    return token_ids(data)


def replacements_from_messages(
    request_id: bytes, messages: Sequence[execution_pb2.StageReplacement]
) -> tuple[StageReplacement, ...]:
    """Wire replacements as the protocol's; Refusal if they are malformed. `SessionStore.route_after` says whether they
    hold.
    """
    if len(messages) > MAXIMUM_REPLACEMENTS:
        raise Refusal(
            ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE,
            f"a route has at most {MAXIMUM_REPLACEMENTS} replacements, {len(messages)} were sent; open a new request",
        )
    found = []
    for message in messages:
        try:
            assignment = Assignment.from_message(message.assignment)
            found.append(
                StageReplacement(
                    request_id,
                    address(message.replaced),
                    assignment,
                    tuple(require_bytes32(item, "proof") for item in message.proof),
                    bytes(message.consent),
                    bytes(message.witness),
                )
            )
        except (ProtocolError, ValueError) as error:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, f"not a replacement: {error}") from error
    return tuple(found)


def sampling_from_message(message: common_pb2.SamplingParameters) -> SamplingParameters:
    """Wire parameters as the protocol's; Refusal if out of range."""
    try:
        return SamplingParameters(
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p,
            seed=message.seed,
            maximum_tokens=message.maximum_tokens,
        )
    except SamplingError as error:
        raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, str(error)) from error


def sampling_to_message(sampling: SamplingParameters) -> common_pb2.SamplingParameters:
    """The inverse of `sampling_from_message`."""
    return common_pb2.SamplingParameters(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        maximum_tokens=sampling.maximum_tokens,
    )
