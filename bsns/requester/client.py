"""The requester's client: quote, pay, stream the answer, see it verified, or take the deposit back.

Owns the order of a request (docs: "One request"): secret, salt and input are on disk before the transaction that
needs them is sent, the deposit is never larger than the quote, tokens are handed out as they arrive, and the text is
only called an answer once the last stage has signed for it. Promises that whatever happens in between, `resume` or
`refund` brings the request to an end without anybody's permission. Does not judge the record of a request; that is
`bsns.audit`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt
import structlog

from bsns.chain import errors as chain_errors
from bsns.chain.client import Receipt, Web3ChainClient
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainError, ContractError, TransactionFailedError
from bsns.chain.patient_client import PatientChainClient
from bsns.chain.signer import Signer
from bsns.chain.submitter import Submitter
from bsns.protocol import identifiers, typed_data
from bsns.protocol.commitments import content_digest, secret_hash
from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.identifiers import ModelId, RequestId
from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.plan import Assignment, ShardPlan
from bsns.protocol.record import (
    Disclosure,
    RecordedEvidence,
    RecordedInput,
    RecordedSampling,
    RecordedStep,
    RecordedTokens,
)
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.tabs import RouteStage
from bsns.requester.chat_tokenizer import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_FILE,
    ChatTokenizer,
    ChatTokenizerError,
    StreamDecoder,
)
from bsns.requester.collector import CollectorConnection
from bsns.requester.errors import (
    AnswerInvalidError,
    ChainRefusedError,
    InsufficientFundsError,
    InvalidRequestError,
    NotServedError,
    RefundNotDueError,
    RequesterError,
    UnavailableError,
)
from bsns.requester.execution_session import (
    ExecutionSession,
    SessionDomains,
    SessionError,
    SessionLimits,
    entry_commitment,
)
from bsns.requester.image_processor import CONFIG_FILE, LABELS_FILE, ImageProcessor, ImageProcessorError, LabelDecoder
from bsns.requester.journal import Journal, JournalEntry, StageEvidenceHeader
from bsns.requester.node_connection import NodeEndpoint, find_endpoints
from bsns.requester.request_input import RequestInput
from bsns.requester.route_choice import RouteWishes, choose_route
from bsns.requester.settlement import Settlement, Standing
from bsns.requester.standby import NodeBackoff, Standby
from bsns.requester.tab import Tab
from bsns.v1 import tabs_pb2

if TYPE_CHECKING:
    from bsns.chain.client import ChainClient, ChainEvent

logger = structlog.get_logger(__name__)

MANIFEST_FILE: Final = "manifest.json"
OPEN_ATTEMPTS: Final = 3
"""Times that a request is paid for where a new plan takes effect between the quote and the payment."""
NO_WISHES: Final = RouteWishes()
Message = str | Sequence[Mapping[str, str]]
"""What a person says: one message of a user, or a whole conversation of role and content."""
Prompt = Message | Sequence[int] | npt.NDArray[np.float32]
"""What a request is about: a message or token ids for a language model, a row float32 [1, width] for a classifier."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Seconds the client waits for everything that has no deadline on chain."""

    connect_s: float = 10.0
    open_session_s: float = 60.0
    first_token_s: float = 300.0
    next_token_s: float = 120.0
    close_s: float = 10.0
    evidence_s: float = 60.0
    silence_s: float = 0.4
    """So long no token, and the nodes are asked whether they are there."""
    choice_s: float = 3.0
    """Where the requester chooses its route: a node that does not answer within this time is not chosen."""
    probe_s: float = 0.35
    """A node that does not answer that within this time is taken for dead, and replaced."""
    commitments_s: float = 8.0
    """So long no commitment of a stage, and its node is asked whether it is there."""
    transaction_s: float = 120.0
    chain_patience_s: float = 30.0
    """How long a chain that does not answer is asked again."""
    session_token_lifetime_s: int = 3_600
    evidence_query_lifetime_s: int = 300
    settlement_grace_s: float = 15.0
    """How long an overdue step is left to the coordinator's desk before it is sent from here."""
    settlement_s: float = 7_200.0


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request would cost. `fee_wei` is the deposit for all `maximum_tokens`; what is not used comes back."""

    plan_id: bytes
    publisher: str
    model_id: bytes
    stage_count: int
    prompt_tokens: int
    maximum_tokens: int
    fee_per_token: int
    fee_wei: int


@dataclass(frozen=True, slots=True)
class RouteNode:
    """The node that served one stage."""

    stage: int
    node: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what became of it. `charged` is None while the request is not settled; 0 if it was refunded.

    `finish_reason`: "stop" (end token or stop string), "length", or "interrupted" (a node disappeared in the middle).
    `token_ids` are all that were drawn and charged, also beyond a stop string; of a classifier the one class that was
    drawn, with its label as `text` (nodes hand out no probabilities). `transactions` by name: the requester's own.
    """

    text: str
    token_ids: tuple[int, ...]
    request_id: bytes
    finish_reason: str
    status: str
    fee_wei: int
    charged: int | None
    time_to_first_token_s: float | None
    tokens_per_second: float | None
    route: tuple[RouteNode, ...]
    transactions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """One request of this state folder with its status on chain."""

    request_id: bytes
    status: str
    created_at: int
    fee_wei: int
    prompt_tokens: int
    answer_tokens: int
    finish_reason: str
    refundable_in_s: int | None


@dataclass(frozen=True, slots=True)
class Refund:
    """Wei that reached the requester's account: the deposit and whatever other credit it had in the escrow."""

    request_id: bytes
    withdrawn_wei: int
    transactions: Mapping[str, str]


# Assignments and their Merkle proofs, as the contract takes them.
_Route = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _ActivePlan:
    plan_id: bytes
    publisher: str
    model_id: bytes
    stage_count: int
    fee_per_token: int


@dataclass(slots=True)
class _Timing:
    sent_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    count: int = 0

    def mark(self) -> None:
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        self.count += 1

    @property
    def first_token_s(self) -> float | None:
        return None if self.sent_at is None or self.first_at is None else self.first_at - self.sent_at

    @property
    def tokens_per_second(self) -> float | None:
        if self.first_at is None or self.last_at is None or self.last_at <= self.first_at:
            return None
        return (self.count - 1) / (self.last_at - self.first_at)


OnToken = Callable[[int, str], None]
"""Called with each token id and the text that it completes (often a word, sometimes nothing)."""
OnProgress = Callable[[str], None]
OnOpened = Callable[[bytes], None]
"""Called with the id of a request once it is paid for, or its ticket is taken."""
IsWanted = Callable[[], bool]
"""Asked after each token; an answer that is not wanted any more ends there, and is paid for as far as it goes."""


def _no_token(_token: int, _text: str) -> None:
    return None


def _no_progress(_text: str) -> None:
    return None


def _not_told(_request_id: bytes) -> None:
    return None


def _wanted() -> bool:
    return True


class Client:
    """One requester on one deployment. Make it with `connect`, use it as `async with`."""

    def __init__(
        self,
        chain: ChainClient,
        deployment: Deployment,
        signer: Signer,
        journal: Journal,
        *,
        manifest: ModelManifest | None = None,
        codec: ChatTokenizer | ImageProcessor | None = None,
        limits: RequestLimits | None = None,
        share_prompt: bool = True,
    ) -> None:
        self._limits = limits or RequestLimits()
        self._share_prompt = share_prompt
        self._connection = chain
        self.chain: ChainClient = PatientChainClient(chain, self._limits.chain_patience_s)
        self.deployment = deployment
        self._signer = signer
        self._journal = journal
        self._manifest = manifest
        self._tokenizer = codec if isinstance(codec, ChatTokenizer) else None
        self._images = codec if isinstance(codec, ImageProcessor) else None
        self._submitter = Submitter(self.chain, signer)
        self._backoff = NodeBackoff()
        self._domains = SessionDomains(
            typed_data.escrow_domain(deployment.chain_id, deployment.inference_escrow),
            typed_data.verification_domain(deployment.chain_id, deployment.output_verification),
        )

    @classmethod
    async def connect(
        cls,
        rpc_url: str,
        deployment: Deployment,
        signer: Signer,
        state_dir: Path,
        *,
        model_folder: Path | None = None,
        limits: RequestLimits | None = None,
        share_prompt: bool = True,
    ) -> Client:
        """Connect to the chain. `model_folder` is a prepared model (manifest, and tokenizer or image preprocessing);
        without it only token ids or rows of values can be sent. `share_prompt` shows prompts to the node of the last
        stage too, which then drafts what it can quote from them: answers come faster, and one more node reads along.

        Raises UnavailableError (chain), InvalidRequestError (model folder) or JournalError (state folder).
        """
        manifest, codec = load_model_folder(model_folder) if model_folder is not None else (None, None)
        journal = Journal(state_dir)
        async with _chain_errors():
            chain = await Web3ChainClient.connect(rpc_url, deployment)
        return cls(
            chain, deployment, signer, journal,
            manifest=manifest, codec=codec, limits=limits, share_prompt=share_prompt,
        )  # fmt: skip

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the chain connection back."""
        if isinstance(self._connection, Web3ChainClient):
            await self._connection.close()

    @property
    def address(self) -> str:
        """The account that pays."""
        return self._signer.address

    def token_ids(self, message: Message) -> tuple[int, ...]:
        """Prompt tokens of a message; InvalidRequestError without a tokenizer or for a message that the template
        refuses.
        """
        if self._tokenizer is None:
            if self._images is not None:
                raise InvalidRequestError(
                    f"model {self._model_name} classifies images, it takes no text: give an image"
                )
            raise InvalidRequestError(
                "a message needs the model's tokenizer: give a prepared model folder, or token ids"
            )
        try:
            if isinstance(message, str):
                return tuple(self._tokenizer.prompt_token_ids(message))
            return tuple(self._tokenizer.conversation_token_ids(message))
        except ChatTokenizerError as error:
            raise InvalidRequestError(str(error)) from error

    def image_row(self, image: Path) -> npt.NDArray[np.float32]:
        """The input row of an image file, float32 [1, width], scaled and cut as the model asks; InvalidRequestError for
        a model that takes no images or a file that is none.
        """
        if self._images is None:
            if self._tokenizer is not None:
                raise InvalidRequestError(f"model {self._model_name} answers text, it takes no images: give a prompt")
            raise InvalidRequestError(
                "an image needs the model's preprocessing: give the prepared folder of an image classifier"
            )
        try:
            return self._images.row(image)
        except ImageProcessorError as error:
            raise InvalidRequestError(str(error)) from error

    async def quote(self, prompt: Prompt, maximum_tokens: int = 1, *, publisher: str | None = None) -> Quote:
        """Price of a prompt with at most `maximum_tokens` of answer under the active plan. A classifier's answer is
        one token, the class.
        """
        return await self._quote(self._request_input(prompt), maximum_tokens, publisher)

    async def _quote(self, given: RequestInput, maximum_tokens: int, publisher: str | None) -> Quote:
        async with _chain_errors():
            plan = await self._active_plan(publisher)
            await self._check_lengths(given, maximum_tokens)
            fee = int(await self.chain.call("InferenceEscrow", "quote", plan.plan_id, given.rows, maximum_tokens))
        return Quote(
            plan.plan_id,
            plan.publisher,
            plan.model_id,
            plan.stage_count,
            given.rows,
            maximum_tokens,
            plan.fee_per_token,
            fee,
        )

    async def request(
        self,
        prompt: Prompt,
        sampling: SamplingParameters | None = None,
        *,
        stop: Sequence[str] = (),
        on_token: OnToken = _no_token,
        on_progress: OnProgress = _no_progress,
        on_opened: OnOpened = _not_told,
        is_wanted: IsWanted = _wanted,
        fee_wei: int | None = None,
        publisher: str | None = None,
        wishes: RouteWishes = NO_WISHES,
        wait_for_settlement: bool = True,
        tab: Tab | None = None,
    ) -> Answer:
        """Pay for and stream one answer.

        `sampling` defaults to greedy, with one token for a row of values (the class, the most such a request may ask
        for). `fee_wei` is the most that may be deposited (default: whatever the quote says). With `wishes` the route
        is chosen here and paid for in one transaction; without, the publisher of the plan does. With a `tab` the
        request is paid out of it, without a transaction, and is over when its collector has the voucher. With
        `wait_for_settlement` False it returns once the answer is there and the committee is drawn; `resume` follows it
        up. Raises RequesterError; after the deposit was paid that is NotServedError, which says when the deposit can
        be taken back.
        """
        given = self._request_input(prompt)
        if sampling is None:
            sampling = SamplingParameters() if given.tokens else SamplingParameters(maximum_tokens=1)
        self._check_stop(stop)
        if tab is not None:
            return await self._request_on_tab(
                tab, given, sampling, stop, fee_wei, wishes, on_token, on_progress, on_opened, is_wanted
            )
        entry, receipt = await self._open(given, sampling, stop, publisher, fee_wei, wishes, on_progress)
        entry = self._save(entry.with_transaction("open", receipt.transaction_hash, stage="opened"))
        logger.info(
            "request opened", request_id=entry.request_id.hex(), fee_wei=entry.deposit, prompt_tokens=given.rows
        )
        on_opened(entry.request_id)
        return await self._carry_on(entry, on_token, on_progress, wait_for_settlement, is_wanted)

    async def _request_on_tab(
        self,
        tab: Tab,
        given: RequestInput,
        sampling: SamplingParameters,
        stop: Sequence[str],
        fee_wei: int | None,
        wishes: RouteWishes,
        on_token: OnToken,
        on_progress: OnProgress,
        on_opened: OnOpened,
        is_wanted: IsWanted,
    ) -> Answer:
        if wishes.within_s is not None:
            raise InvalidRequestError("on a tab the collector chooses the route: nodes can be avoided, not measured")
        quote = await self._allowed(given, sampling.maximum_tokens, tab.collector, fee_wei)
        async with _chain_errors():
            entry = await tab.open(quote.plan_id, given, sampling, tuple(stop), wishes.avoid)
            on_progress(f"request 0x{entry.request_id.hex()}: ticket {entry.tab.number if entry.tab else 0} is taken")
            on_opened(entry.request_id)
            return await self._carry_on_tab(tab, entry, on_token, on_progress, quote.fee_wei, is_wanted)

    async def resume_on_tab(
        self, tab: Tab, request_id: bytes, *, on_token: OnToken = _no_token, on_progress: OnProgress = _no_progress
    ) -> Answer:
        """Take up a request of a tab wherever it stopped: serve, sign, deliver."""
        entry = self._entry(request_id)
        if entry.tab is None or entry.stage == "prepared":
            raise InvalidRequestError(f"request 0x{request_id.hex()} is not on a tab, or its ticket was never taken")
        async with _chain_errors():
            return await self._carry_on_tab(tab, entry, on_token, on_progress, 0)

    async def _carry_on_tab(
        self,
        tab: Tab,
        entry: JournalEntry,
        on_token: OnToken,
        on_progress: OnProgress,
        fee_wei: int,
        is_wanted: IsWanted = _wanted,
    ) -> Answer:
        assert entry.tab is not None, "opened on a tab"
        stages = [RouteStage.from_message(tabs_pb2.RouteStage.FromString(item)) for item in entry.tab.route]
        nodes = [item.assignment.node for item in stages]
        known = await self._endpoints(nodes)
        route = tuple(known[node] for node in nodes if node in known)
        if len(route) < len(nodes):
            raise UnavailableError("a node of the route has no endpoint on chain; is first_block right?")
        timing = _Timing()
        if entry.stage == "opened":
            head = await self.chain.head()
            standing = Standing(RequestStatus.ROUTED, entry.tab.deadline, 0, head.timestamp)
            try:
                entry, route = await self._serve(entry, route, standing, on_token, on_progress, timing, is_wanted, tab)
            except NotServedError:
                # The collector gives it up by itself after a while.
                with suppress(RequesterError):
                    await tab.abandon(entry)
                raise
        if entry.stage == "answered":
            try:
                entry = await tab.pay(entry)
            except UnavailableError as error:
                raise UnavailableError(
                    f"{error}; the answer is kept, pay for it with `bsns requests --resume 0x{entry.request_id.hex()}`"
                ) from error
        assert entry.tab is not None, "kept"
        return Answer(
            text=entry.text,
            token_ids=entry.answer,
            request_id=entry.request_id,
            finish_reason=entry.finish_reason or "interrupted",
            status="Delivered" if entry.tab.delivered else "Abandoned",
            fee_wei=fee_wei,
            charged=await tab.charge(entry) if entry.tab.delivered else 0,
            time_to_first_token_s=timing.first_token_s,
            tokens_per_second=timing.tokens_per_second,
            route=tuple(RouteNode(stage, item.node, item.endpoint) for stage, item in enumerate(route)),
            transactions=entry.transactions,
        )

    async def _open(
        self,
        given: RequestInput,
        sampling: SamplingParameters,
        stop: Sequence[str],
        publisher: str | None,
        fee_wei: int | None,
        wishes: RouteWishes,
        on_progress: OnProgress,
    ) -> tuple[JournalEntry, Receipt]:
        """Pay for a request, again where another plan takes effect between its quote and its payment."""
        entry: JournalEntry | None = None
        for attempt in itertools.count(1):
            quote = await self._affordable(given, sampling.maximum_tokens, publisher, fee_wei)
            route = None if wishes.is_empty else await self._chosen_route(quote.plan_id, wishes)
            entry = self._prepared(entry, quote, given, sampling, stop)
            on_progress(f"request 0x{entry.request_id.hex()}: paying {quote.fee_wei} wei")
            async with _chain_errors():
                try:
                    return entry, await self._pay(entry, route)
                except (ContractError, TransactionFailedError) as error:
                    if attempt == OPEN_ATTEMPTS or not await self._was_replaced(error, entry):
                        raise
            on_progress("another plan took effect meanwhile: nothing was paid, quoting again")
        raise AssertionError("unreachable")

    async def _allowed(
        self, given: RequestInput, maximum_tokens: int, publisher: str | None, fee_wei: int | None
    ) -> Quote:
        """The quote; InvalidRequestError if it is more than `fee_wei`."""
        quote = await self._quote(given, maximum_tokens, publisher)
        if fee_wei is not None and fee_wei < quote.fee_wei:
            raise InvalidRequestError(
                f"the quote is {quote.fee_wei} wei, more than the {fee_wei} you allow: allow more, or ask for "
                "fewer tokens"
            )
        return quote

    async def _affordable(
        self, given: RequestInput, maximum_tokens: int, publisher: str | None, fee_wei: int | None
    ) -> Quote:
        quote = await self._allowed(given, maximum_tokens, publisher, fee_wei)
        async with _chain_errors():
            funds = await self.chain.balance(self.address)
        if funds < quote.fee_wei:
            raise InsufficientFundsError(
                f"account {self.address} has {funds} wei, the deposit is {quote.fee_wei} plus gas: send it more, or "
                "ask for fewer tokens"
            )
        return quote

    def _prepared(
        self,
        before: JournalEntry | None,
        quote: Quote,
        given: RequestInput,
        sampling: SamplingParameters,
        stop: Sequence[str],
    ) -> JournalEntry:
        """The request on disk before anything is sent: whoever loses the secret or the salt can neither be served nor
        draw. One that was not opened `before` stays the same request, on another plan.
        """
        if before is not None:
            entry = dataclasses.replace(before, plan_id=quote.plan_id, publisher=quote.publisher, deposit=quote.fee_wei)
        else:
            nonce = secrets.randbits(128)
            entry = JournalEntry(
                request_id=identifiers.request_id(
                    self.deployment.chain_id, self.deployment.inference_escrow, self.address, nonce
                ),
                chain_id=self.deployment.chain_id,
                escrow=self.deployment.inference_escrow,
                requester=self.address,
                plan_id=quote.plan_id,
                publisher=quote.publisher,
                nonce=nonce,
                secret=secrets.token_bytes(32),
                salt=secrets.token_bytes(32),
                input=given,
                sampling=sampling,
                stop=tuple(stop),
                deposit=quote.fee_wei,
                created_at=int(time.time()),
            )
        self._journal.write(entry)
        return entry

    async def _chosen_route(self, plan_id: bytes, wishes: RouteWishes) -> _Route:
        async def may_serve(node: str) -> bool:
            return NodeStatus(await self.chain.call("NodeRegistry", "statusOf", node)) == NodeStatus.ACTIVE

        async with _chain_errors():
            standby = await self._read_standby(plan_id)
            route = await choose_route(
                standby, wishes, self._backoff, may_serve=may_serve, timeout_s=self._limits.choice_s
            )
        return tuple(item.as_tuple() for item in route), tuple(standby.plan.proof(item) for item in route)

    async def _pay(self, entry: JournalEntry, route: _Route | None) -> Receipt:
        return await self._submitter.submit(
            "InferenceEscrow",
            "open" if route is None else "openRouted",
            entry.plan_id,
            entry.nonce,
            entry_commitment(entry),
            secret_hash(entry.secret),
            entry.input.rows,
            entry.sampling.maximum_tokens,
            *(route or ()),
            value=entry.deposit,
            timeout_s=self._limits.transaction_s,
        )

    async def _was_replaced(self, error: ContractError | TransactionFailedError, entry: JournalEntry) -> bool:
        """Whether `open` was refused, before or after it was mined, because its plan is not the active one any more."""
        if isinstance(error, ContractError):
            return error.name == "PlanNotActive"
        plan = await self.chain.call("ShardAssignments", "planOf", entry.plan_id)
        active = await self.chain.call("ShardAssignments", "activePlan", plan.modelId, plan.publisher)
        return bytes(active) != entry.plan_id

    async def resume(
        self,
        request_id: bytes,
        *,
        on_token: OnToken = _no_token,
        on_progress: OnProgress = _no_progress,
        wait_for_settlement: bool = True,
    ) -> Answer:
        """Take up a request of this state folder wherever it stopped: serve, draw, wait, collect evidence."""
        entry = self._entry(request_id)
        async with _chain_errors():
            standing = await self._settlement(entry, on_progress).standing()
        if standing.status == RequestStatus.ABSENT:
            raise UnavailableError(
                f"request 0x{request_id.hex()} is not on chain: it was never opened, and nothing was paid. "
                "Make a new request"
            )
        if entry.stage == "prepared":
            entry = self._save(dataclasses.replace(entry, stage="opened"))
        return await self._carry_on(entry, on_token, on_progress, wait_for_settlement)

    async def requests(self) -> tuple[RequestSummary, ...]:
        """All requests of this state folder that belong to this deployment, oldest first."""
        found = []
        async with _chain_errors():
            for entry in self._journal.entries():
                if (entry.chain_id, entry.escrow) != (self.deployment.chain_id, self.deployment.inference_escrow):
                    continue
                if entry.tab is not None:
                    found.append(await self._tab_summary(entry))
                    continue
                standing = await self._settlement(entry, _no_progress).standing()
                live = not standing.status.is_over and standing.status != RequestStatus.ABSENT
                found.append(
                    RequestSummary(
                        entry.request_id,
                        standing.status.name.capitalize(),
                        entry.created_at,
                        entry.deposit,
                        entry.input.rows,
                        len(entry.answer),
                        entry.finish_reason,
                        max(0, standing.deadline - standing.now + 1) if live else None,
                    )
                )
        return tuple(found)

    async def _tab_summary(self, entry: JournalEntry) -> RequestSummary:
        """A request of a tab: by the chain if its leaf was opened, else by this folder."""
        standing = await self._settlement(entry, _no_progress).standing()
        assert entry.tab is not None, "asked of those only"
        by_hand = "Delivered" if entry.tab.delivered else {"concluded": "Abandoned"}.get(entry.stage, entry.stage)
        on_chain = standing.status is not RequestStatus.ABSENT
        return RequestSummary(
            entry.request_id,
            standing.status.name.capitalize() if on_chain else by_hand.capitalize(),
            entry.created_at,
            standing.deposit,
            entry.input.rows,
            len(entry.answer),
            entry.finish_reason,
            None,
        )

    def is_on_tab(self, request_id: bytes) -> bool:
        """Whether a request of this state folder is paid out of a tab."""
        return self._entry(request_id).tab is not None

    def tab(self, collector: str, connection: CollectorConnection | None = None) -> Tab:
        """This requester's tab with `collector`, the publisher of a plan."""
        return Tab(self.chain, self.deployment, self._signer, self._journal, collector, connection)

    async def publisher(self, publisher: str | None = None) -> str:
        """Whose tab is meant: that of `publisher`, whatever has become of its plans, or of whoever published last."""
        if publisher is not None:
            try:
                return identifiers.address(publisher)
            except identifiers.ProtocolError as error:
                raise InvalidRequestError(f"publisher: {error}") from error
        async with _chain_errors():
            return (await self._active_plan(None)).publisher

    async def refund(self, request_id: bytes) -> Refund:
        """Take back what the escrow owes: claim an expired deposit, then withdraw the account's whole credit.

        Needs no state folder, only the key. RefundNotDueError says how long it still takes, or that there is nothing
        to take.
        """
        transactions: dict[str, str] = {}
        async with _chain_errors():
            request = await self.chain.call("InferenceEscrow", "requestOf", request_id)
            status = RequestStatus(request.status)
            if status == RequestStatus.ABSENT:
                raise InvalidRequestError(f"request 0x{request_id.hex()} is not on this chain")
            if request.requester != self.address:
                raise InvalidRequestError(
                    f"request 0x{request_id.hex()} was paid by {request.requester}, this key is {self.address}"
                )
            if not status.is_over:
                left = int(request.deadline) - (await self.chain.head()).timestamp + 1
                raise RefundNotDueError(
                    f"request 0x{request_id.hex()} is {status.name.lower()}; its deposit of {request.deposit} wei can "
                    f"be taken back in {max(left, 0)} s (after {_clock(int(request.deadline))}) if nothing happens "
                    "until then",
                    max(left, 0),
                )
            if status == RequestStatus.EXPIRED:
                receipt = await self._submitter.submit("InferenceEscrow", "claimRefund", request_id)
                transactions["claim_refund"] = f"0x{receipt.transaction_hash.hex()}"
            credit = int(await self.chain.call("InferenceEscrow", "creditOf", self.address))
            if credit == 0:
                raise RefundNotDueError(
                    f"request 0x{request_id.hex()} is {status.name.lower()} and the escrow owes {self.address} "
                    "nothing: what was due has been withdrawn already",
                    None,
                )
            receipt = await self._submitter.submit("InferenceEscrow", "withdrawCredit", self.address)
            transactions["withdraw_credit"] = f"0x{receipt.transaction_hash.hex()}"
        return Refund(request_id, credit, transactions)

    def disclosure(self, request_id: bytes, *, with_tokens: bool = False) -> Disclosure:
        """What this requester can add to the record of a request: nonce, opened input, evidence, and the token ids if
        asked for. A row of values is never disclosed: the record holds its digest.
        """
        entry = self._entry(request_id)
        sampling = entry.sampling
        recorded_input = RecordedInput(
            prompt_digest=entry.input.digest,
            prompt_tokens=entry.input.rows,
            sampling=RecordedSampling(
                round(sampling.temperature * 1_000_000),
                sampling.top_k,
                round(sampling.top_p * 1_000_000),
                sampling.seed,
                sampling.maximum_tokens,
            ),
            sampling_digest=sampling.digest(),
            salt=entry.salt,
        )
        evidence = tuple(
            RecordedEvidence(
                item.stage,
                item.evidence_root,
                item.sealed_sketch,
                item.output_tokens,
                tuple(RecordedStep.of(step) for step in item.steps),
            )
            for item in sorted(entry.evidence, key=lambda item: item.stage)
        )
        # The answer is under the evidence only if all of it arrived.
        complete = bool(evidence) and (len(entry.answer), len(entry.drafts)) == (
            evidence[-1].output_tokens,
            len(evidence[-1].steps),
        )
        prompt = entry.input.tokens
        shown = with_tokens and complete and bool(prompt)
        tokens = RecordedTokens(prompt, entry.answer, entry.drafts) if shown else None
        return Disclosure(entry.nonce, recorded_input, tokens, evidence)

    # ------------------------------------------------------------------------------------------------------ one request

    async def _carry_on(
        self,
        entry: JournalEntry,
        on_token: OnToken,
        on_progress: OnProgress,
        wait_for_settlement: bool,
        is_wanted: IsWanted = _wanted,
    ) -> Answer:
        """Bring an opened request as far as it goes from wherever it is."""
        settlement = self._settlement(entry, on_progress)
        timing = _Timing()
        async with _chain_errors():
            standing = await settlement.standing()
            if standing.status == RequestStatus.OPEN:
                on_progress("waiting for a route")
                standing = await settlement.wait_until_not(RequestStatus.OPEN)
            # Anybody may claim an expired deposit for us; the coordinator does in the block that passes the deadline.
            if standing.status in (RequestStatus.EXPIRED, RequestStatus.REFUNDED) and entry.stage == "opened":
                raise self._not_served(entry, "nobody routed or served it in time", standing)
            route = await self._route(entry)
            if standing.status == RequestStatus.ROUTED and entry.stage == "opened":
                entry, _ = await self._serve(entry, route, standing, on_token, on_progress, timing, is_wanted)
            if standing.status == RequestStatus.ROUTED:
                on_progress("waiting for the nodes' commitments")
                standing = await self._await_commitments(entry, route, settlement, on_progress)
                if standing.status in (RequestStatus.EXPIRED, RequestStatus.REFUNDED):
                    raise self._not_served(entry, "the nodes answered but did not all commit", standing)
            if standing.status in (RequestStatus.COMMITTED, RequestStatus.VERIFIED, RequestStatus.SETTLED):
                # By now the chain knows who has replaced whom.
                route = await self._route(entry)
                entry = await self._collect_evidence(entry, route, on_progress)
            if standing.status == RequestStatus.COMMITTED and entry.stage != "drawn":
                settlement = self._settlement(entry, on_progress)
                await settlement.draw(entry.secret)
                entry = self._save(dataclasses.replace(self._entry(entry.request_id), stage="drawn"))
                standing = await settlement.standing()
            if wait_for_settlement and not standing.status.is_over:
                standing = await self._settlement(entry, on_progress).finish(
                    entry.secret, grace_s=self._limits.settlement_grace_s, timeout_s=self._limits.settlement_s
                )
            entry = self._entry(entry.request_id)
            charged = await self._charged(entry, standing)
        if standing.status.is_over:
            entry = self._save(dataclasses.replace(entry, stage="concluded"))
        return Answer(
            text=entry.text,
            token_ids=entry.answer,
            request_id=entry.request_id,
            finish_reason=entry.finish_reason or "interrupted",
            status=standing.status.name.capitalize(),
            fee_wei=entry.deposit,
            charged=charged,
            time_to_first_token_s=timing.first_token_s,
            tokens_per_second=timing.tokens_per_second,
            route=tuple(RouteNode(stage, item.node, item.endpoint) for stage, item in enumerate(route)),
            transactions=entry.transactions,
        )

    async def _serve(
        self,
        entry: JournalEntry,
        route: Sequence[NodeEndpoint],
        standing: Standing,
        on_token: OnToken,
        on_progress: OnProgress,
        timing: _Timing,
        is_wanted: IsWanted,
        tab: Tab | None = None,
    ) -> tuple[JournalEntry, tuple[NodeEndpoint, ...]]:
        """Stream the answer; the journal holds it when this returns. Also who served it, where some were replaced."""
        decoder = self._decoder(entry.stop)
        pieces: list[str] = []
        try:
            async with self._session(entry, route, standing.now, on_progress) as session:
                on_progress(f"opening the session at {len(route)} nodes")
                await session.open()
                timing.sent_at = time.monotonic()
                is_closing = False
                async for token in session.stream():
                    timing.mark()
                    pieces.append(decoder.push(token) if decoder is not None else "")
                    on_token(token, pieces[-1])
                    is_stopped = decoder is not None and decoder.stopped_by is not None
                    if not is_closing and (is_stopped or not is_wanted()):
                        is_closing = True
                        await session.close()
                finish_reason = session.finish_reason
                tokens, drafts, served_by = session.tokens, session.drafts, session.route
                for served in served_by:
                    self._backoff.served(served.node)
                if tab is not None and entry.tab is not None:
                    entry = dataclasses.replace(
                        entry,
                        tab=dataclasses.replace(
                            entry.tab,
                            route=tuple(item.to_message().SerializeToString() for item in session.served_by),
                            results=tuple(
                                item.to_message().SerializeToString() for item in await session.results(tab.domain)
                            ),
                        ),
                    )
        except SessionError as error:
            kind = AnswerInvalidError if error.invalid else NotServedError
            raise self._not_served(entry, f"node of stage {error.stage} refused: {error}", standing, kind) from error
        rest = decoder.finish() if decoder is not None else ""
        if rest:
            pieces.append(rest)
            on_token(tokens[-1], rest)
        if decoder is not None and decoder.stopped_by is not None:
            finish_reason = "stop"
        answered = dataclasses.replace(
            entry, stage="answered", answer=tokens, drafts=drafts, text="".join(pieces), finish_reason=finish_reason
        )
        return self._save(answered), served_by

    async def _collect_evidence(
        self, entry: JournalEntry, route: Sequence[NodeEndpoint], on_progress: OnProgress
    ) -> JournalEntry:
        """Fetch what stages show of their evidence. A node that shows none only makes the record shorter."""
        missing = [stage for stage in range(len(route)) if stage not in {item.stage for item in entry.evidence}]
        if not missing:
            return entry
        on_progress("collecting the evidence of the stages")
        now = (await self.chain.head()).timestamp
        found: list[StageEvidenceHeader] = list(entry.evidence)

        async def collect(session: ExecutionSession, stage: int) -> None:
            record = await self.chain.call("OutputVerification", "stageRecordOf", entry.request_id, stage)
            try:
                found.append(await session.evidence(stage, record.commitment))
            except SessionError as error:
                logger.warning("no evidence", request_id=entry.request_id.hex(), stage=stage, detail=str(error))
                on_progress(f"stage {stage} shows no evidence ({error}); the record will hold its commitment only")

        try:
            async with self._session(entry, route, now) as session:
                await asyncio.gather(*(collect(session, stage) for stage in missing))
        except SessionError as error:
            on_progress(f"node of stage {error.stage} cannot be reached ({error}); the record will hold less evidence")
        return self._save(dataclasses.replace(entry, evidence=tuple(sorted(found, key=lambda item: item.stage))))

    async def _await_commitments(
        self,
        entry: JournalEntry,
        route: Sequence[NodeEndpoint],
        settlement: Settlement,
        on_progress: OnProgress,
    ) -> Standing:
        """Wait until all stages have committed, or the deadline is over. A node that died before it did is replaced."""
        while True:
            try:
                async with asyncio.timeout(self._limits.commitments_s):
                    return await settlement.wait_until_not(RequestStatus.ROUTED)
            except TimeoutError:
                pass
            records = await asyncio.gather(
                *(
                    self.chain.call("OutputVerification", "stageRecordOf", entry.request_id, stage)
                    for stage in range(len(route))
                )
            )
            missing = [stage for stage, record in enumerate(records) if record.commitment == identifiers.ZERO_HASH]
            try:
                async with self._session(entry, route, (await self.chain.head()).timestamp, on_progress) as session:
                    await session.mend(missing)
            except SessionError as error:
                on_progress(f"stage {error.stage} has not committed: {error}")

    def _session(
        self,
        entry: JournalEntry,
        route: Sequence[NodeEndpoint],
        chain_now: int,
        on_progress: OnProgress | None = None,
    ) -> ExecutionSession:
        """With `on_progress`, nodes that stop are replaced, and it is told."""
        limits = self._limits
        # Nodes may judge the token by their clock or the chain's.
        now = max(int(time.time()), chain_now)
        return ExecutionSession(
            entry,
            route,
            self._signer,
            self._domains,
            SessionLimits(
                limits.connect_s,
                limits.open_session_s,
                limits.first_token_s,
                limits.next_token_s,
                limits.close_s,
                limits.evidence_s,
                limits.silence_s,
                limits.probe_s,
            ),
            now + limits.session_token_lifetime_s,
            now + limits.evidence_query_lifetime_s,
            self._share_prompt,
            standby=None if on_progress is None else self._standby_of(entry),
            backoff=self._backoff,
            on_progress=on_progress or _no_progress,
        )

    def _standby_of(self, entry: JournalEntry) -> Callable[[], Awaitable[Standby]]:
        """Who could take over, read from the chain at once, so that it need not be there when somebody has to."""

        reading = asyncio.ensure_future(self._read_standby(entry.plan_id))
        # Most requests never ask.
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())

        async def standby() -> Standby:
            async with _chain_errors():
                return await asyncio.shield(reading)

        return standby

    async def _read_standby(self, plan_id: bytes) -> Standby:
        events = await self._events("ShardAssignments", "PlanPublished", {"planId": plan_id})
        assignments = tuple(Assignment.from_tuple(tuple(item)) for item in events[0].arguments["assignments"])
        nodes = {item.node for item in assignments}
        plan = ShardPlan(max(item.end_unit for item in assignments), assignments)
        return Standby(plan, await self._endpoints(nodes))

    def _settlement(self, entry: JournalEntry, on_progress: OnProgress) -> Settlement:
        def sent(name: str, receipt: Receipt) -> None:
            current = self._journal.read(entry.request_id)
            self._save(current.with_transaction(name, receipt.transaction_hash))

        return Settlement(self.chain, self._submitter, entry.request_id, on_progress, sent)

    async def _route(self, entry: JournalEntry) -> tuple[NodeEndpoint, ...]:
        """Endpoints of the route's nodes, in stage order; NotServedError if one has none."""
        stages = await self.chain.call("InferenceEscrow", "stagesOf", entry.request_id)
        nodes = [stage.node for stage in stages]
        known = await self._endpoints(nodes)
        for stage, node in enumerate(nodes):
            if node not in known:
                raise UnavailableError(f"node {node} of stage {stage} has no endpoint on chain; is first_block right?")
        return tuple(known[node] for node in nodes)

    async def _charged(self, entry: JournalEntry, standing: Standing) -> int | None:
        match standing.status:
            case RequestStatus.SETTLED:
                name = "RequestSettled"
            case RequestStatus.REFUNDED:
                name = "RequestRefunded"
            case _:
                return None
        events = await self._events("InferenceEscrow", name, {"requestId": entry.request_id})
        return entry.deposit - int(events[-1].arguments["refunded"]) if events else None

    async def _events(self, contract: str, name: str, filters: Mapping[str, Any]) -> tuple[ChainEvent, ...]:
        """Those since the deployment, the oldest first."""
        head = await self.chain.head()
        return await self.chain.events_between(
            self.deployment.first_block, head.number, contract=contract, name=name, filters=filters
        )

    async def _endpoints(self, nodes: Iterable[str]) -> dict[str, NodeEndpoint]:
        head = await self.chain.head()
        return await find_endpoints(self.chain, nodes, self.deployment.first_block, head.number)

    # ---------------------------------------------------------------------------------------------------------- choices

    async def _active_plan(self, publisher: str | None) -> _ActivePlan:
        """The plan in effect of `publisher`, or of whoever published last."""
        filters: dict[str, Any] = {}
        if self._manifest is not None:
            manifest = self._manifest
            filters["modelId"] = identifiers.model_id(manifest.manifest_hash, manifest.weight_root, len(manifest.units))
        if publisher is not None:
            filters["publisher"] = identifiers.address(publisher)
        events = await self._events("ShardAssignments", "PlanPublished", filters)
        seen: set[tuple[bytes, str]] = set()
        for event in reversed(events):
            key = (ModelId(event.arguments["modelId"]), str(event.arguments["publisher"]))
            if key in seen:
                continue
            seen.add(key)
            plan_id = bytes(await self.chain.call("ShardAssignments", "activePlan", *key))
            if plan_id != identifiers.ZERO_HASH:
                plan = await self.chain.call("ShardAssignments", "planOf", plan_id)
                return _ActivePlan(plan_id, key[1], key[0], int(plan.stageCount), int(plan.feePerToken))
        whose = f"of {publisher}" if publisher else "of anybody"
        which = f"for model {self._manifest.name}" if self._manifest else "for any model"
        raise UnavailableError(
            f"there is no active plan {whose} {which}: ask the network's operator, or wait until its plan takes effect"
        )

    async def _check_lengths(self, given: RequestInput, maximum_tokens: int) -> None:
        if maximum_tokens < 1:
            raise InvalidRequestError("ask for at least one token")
        if not given.tokens and maximum_tokens != 1:
            raise InvalidRequestError(
                f"a row of values has one answer, {maximum_tokens} tokens were asked for: ask for 1"
            )
        limit = int((await self.chain.call("InferenceEscrow", "terms")).maximumTokens)
        if max(given.rows, maximum_tokens) > limit:
            raise InvalidRequestError(
                f"prompt of {given.rows} and answer of {maximum_tokens} tokens: the contracts allow {limit} each"
            )
        # The last token drawn is nobody's input.
        if self._manifest is not None and given.rows + maximum_tokens - 1 > self._manifest.context_limit:
            raise InvalidRequestError(
                f"prompt ({given.rows}) and answer ({maximum_tokens}) together exceed the model's context of "
                f"{self._manifest.context_limit} tokens: shorten the prompt or ask for fewer tokens"
            )

    def _request_input(self, prompt: Prompt) -> RequestInput:
        """What goes to stage 0; InvalidRequestError if the model, where it is known, does not take it."""
        if isinstance(prompt, np.ndarray):
            return self._input_row(prompt)
        if isinstance(prompt, str) or any(isinstance(item, Mapping) for item in prompt):
            tokens = self.token_ids(cast("Message", prompt))
        else:
            tokens = tuple(cast("Sequence[int]", prompt))
        if not tokens:
            raise InvalidRequestError("the prompt is empty")
        if self._manifest is not None and not self._manifest.takes_token_ids:
            raise InvalidRequestError(
                f"model {self._model_name} takes a row of {self._manifest.input_width} values, not token ids: give an "
                "image"
            )
        highest = self._manifest.vocabulary_size if self._manifest is not None else 2**31
        for token in cast("Sequence[object]", tokens):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < highest:
                raise InvalidRequestError(f"token id {token!r} is outside the vocabulary of {highest}")
        return RequestInput.of_tokens(tokens)

    def _input_row(self, row: npt.NDArray[np.float32]) -> RequestInput:
        try:
            given = RequestInput.of_row(row)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error
        if self._manifest is None:
            return given
        if self._manifest.takes_token_ids:
            raise InvalidRequestError(
                f"model {self._model_name} takes token ids, not a row of values: give a prompt, or the folder of a "
                "model that takes rows"
            )
        if given.width != self._manifest.input_width:
            raise InvalidRequestError(
                f"the row holds {given.width} values, model {self._model_name} takes {self._manifest.input_width}"
            )
        return given

    @property
    def _model_name(self) -> str:
        return self._manifest.name if self._manifest is not None else "unknown"

    def _decoder(self, stop: Sequence[str]) -> StreamDecoder | LabelDecoder | None:
        """What turns the tokens of an answer into text; None without a model folder."""
        if self._images is not None:
            return self._images.label_decoder()
        return self._tokenizer.stream_decoder(stop) if self._tokenizer is not None else None

    def _check_stop(self, stop: Sequence[str]) -> None:
        if not stop:
            return
        if self._tokenizer is None:
            raise InvalidRequestError("stop strings need the model's tokenizer: give a prepared model folder")
        try:
            StreamDecoder(self._tokenizer, stop)
        except ChatTokenizerError as error:
            raise InvalidRequestError(str(error)) from error

    def _entry(self, request_id: bytes) -> JournalEntry:
        entry = self._journal.read(request_id)
        if (entry.chain_id, entry.escrow) != (self.deployment.chain_id, self.deployment.inference_escrow):
            raise InvalidRequestError(
                f"request 0x{request_id.hex()} is of escrow {entry.escrow} on chain {entry.chain_id}: give its "
                "deployment"
            )
        if entry.requester != self.address:
            raise InvalidRequestError(f"request 0x{request_id.hex()} was made by {entry.requester}: give its key")
        return entry

    def _save(self, entry: JournalEntry) -> JournalEntry:
        self._journal.write(entry)
        return entry

    def _not_served(
        self, entry: JournalEntry, what: str, standing: Standing, kind: type[NotServedError] = NotServedError
    ) -> NotServedError:
        if entry.tab is not None:
            return kind(f"{what}; the request is not charged to your tab", entry.request_id, None)
        is_due = standing.status in (RequestStatus.EXPIRED, RequestStatus.REFUNDED)
        when = "now" if is_due else f"after {_clock(standing.deadline)}"
        return kind(
            f"{what}; your deposit of {entry.deposit} wei can be taken back {when} "
            f"with `bsns refund 0x{RequestId(entry.request_id).hex()}`",
            entry.request_id,
            standing.now if is_due else standing.deadline,
        )


def load_model_folder(folder: Path) -> tuple[ModelManifest, ChatTokenizer | ImageProcessor]:
    """Manifest of a prepared model, with its tokenizer or its image preprocessing and labels, whose files are checked
    against the manifest. No weights are read.
    """
    try:
        manifest = ModelManifest.from_bytes((folder / MANIFEST_FILE).read_bytes())
        is_classifier = manifest.task == "image-classification"
        for name in (CONFIG_FILE, LABELS_FILE) if is_classifier else (TOKENIZER_FILE, CHAT_TEMPLATE_FILE):
            if content_digest((folder / name).read_bytes()) != manifest.file_sha256(name):
                raise InvalidRequestError(f"{name} in {folder} is not the one of its manifest: prepare the model again")
        return manifest, ImageProcessor(folder) if is_classifier else ChatTokenizer(folder)
    except OSError as error:
        raise InvalidRequestError(f"{folder} is not a prepared model ({error}); `make model` prepares one") from error
    except (ManifestError, ChatTokenizerError, ImageProcessorError) as error:
        raise InvalidRequestError(f"the model in {folder} cannot be used: {error}") from error


@asynccontextmanager
async def _chain_errors() -> AsyncIterator[None]:
    """Errors of bsns.chain as errors of this package."""
    try:
        yield
    except RequesterError:
        raise
    except ContractError as error:
        raise ChainRefusedError(f"the contracts refused: {error}", error.name) from error
    except chain_errors.InsufficientFundsError as error:
        raise InsufficientFundsError(str(error)) from error
    except ChainError as error:
        raise UnavailableError(str(error)) from error


def _clock(deadline: int) -> str:
    return datetime.fromtimestamp(deadline, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
