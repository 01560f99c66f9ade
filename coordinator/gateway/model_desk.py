"""Answers for users of the gateway, paid out of its own tab.

Owns what is between an HTTP request and the network: a place in the queue, the attempts, and the charge. Promises that
money is set aside before anything is asked for, that a user is charged what the answer cost and nothing for one that
was not given whole, that whoever goes away has its answer ended there and is charged as far as it went, and that every
charge is settled whatever becomes of the connection. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from bsns.protocol.identifiers import RequestId
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.sampling import SamplingParameters
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.requester.client import Answer, Client, Quote, RouteNode
from bsns.requester.errors import (
    InvalidRequestError,
    JournalError,
    NotServedError,
    RequesterError,
    UnavailableError,
)
from bsns.requester.journal import Journal, JournalEntry
from bsns.requester.tab import Tab
from bsns.tracing import Facts, RequestTracer
from coordinator.gateway.errors import ApiError, of_requester, of_storage, too_many, unavailable
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.settings import GatewaySettings
from coordinator.storage import AccountBook, AccountKey, Charge, ChargeState, Storage, StorageError, TicketState

_OVER: Final = (TicketState.OVER, TicketState.ABANDONED)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OfferedModel:
    """A model that users can ask. `tokenizer` is None for one that takes no text."""

    name: str
    manifest: ModelManifest
    client: Client
    tokenizer: ChatTokenizer | None
    created: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer that is asked for."""

    prompt: tuple[int, ...]
    sampling: SamplingParameters


@dataclass(frozen=True, slots=True)
class Job:
    """All answers to one HTTP request."""

    model: OfferedModel
    choices: tuple[Choice, ...]
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """A request on the network was made for a choice. Again, where an attempt before did not give a token."""

    choice: int
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that a choice grew by, and how many tokens it has now."""

    choice: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is whole."""

    choice: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Done:
    """All choices are whole, and charged."""

    answers: tuple[Answer, ...]
    charge: Charge


Event = Opened | Piece | Finished | Done


@dataclass(slots=True)
class Generation:
    """An answer in the making. It goes on, and is settled, whether somebody listens or not."""

    job: Job
    charge: Charge
    quotes: tuple[Quote, ...]
    queue: asyncio.Queue[Event | ApiError] = field(default_factory=asyncio.Queue)
    is_wanted: bool = True

    def abandon(self) -> None:
        """Nobody wants it any more: it ends with the next token."""
        self.is_wanted = False

    async def events(self, silence_s: float) -> AsyncIterator[Event | None]:
        """Until Done; None after each `silence_s` without one. Raises the ApiError that it ended with."""
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    event = await self.queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, ApiError):
                raise event
            yield event
            if isinstance(event, Done):
                return


@dataclass(slots=True)
class _Progress:
    """One attempt at a choice, as the client tells of it."""

    generation: Generation
    choice: int
    metrics: GatewayMetrics
    began: float = field(default_factory=time.monotonic)
    request_id: RequestId | None = None
    tokens: int = 0

    def opened(self, request_id: bytes) -> None:
        self.request_id = RequestId(request_id)
        structlog.contextvars.bind_contextvars(network_request="0x" + request_id.hex())
        self.generation.queue.put_nowait(Opened(self.choice, self.request_id))

    def token(self, _token: int, text: str) -> None:
        model = self.generation.job.model.name
        self.tokens += 1
        if self.tokens == 1:
            self.metrics.first_token(model, time.monotonic() - self.began)
        self.metrics.tokens.labels(model).inc()
        if text:
            self.generation.queue.put_nowait(Piece(self.choice, text, self.tokens))


class ModelDesk:
    """Takes jobs for `models`, all of one publisher's tab."""

    def __init__(
        self,
        models: dict[str, OfferedModel],
        tab: Tab,
        journal: Journal,
        book: AccountBook,
        storage: Storage,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        tracer: RequestTracer,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.models = models
        self._tab, self._journal, self._settings = tab, journal, settings
        self._book, self._storage = book, storage
        self._metrics, self._tracer, self._clock = metrics, tracer, clock
        self._slots = asyncio.Semaphore(settings.requests_in_flight)
        self._waiting = 0
        self._running: set[asyncio.Task[None]] = set()
        self._unpaid: set[RequestId] = set()
        self.is_draining = False

    def model(self, name: str) -> OfferedModel:
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name!r:.100} here: ask for one of {known}", code="model_not_found",
                param="model",
            )  # fmt: skip
        return found

    async def quote(self, job: Job) -> list[Quote]:
        """What the network asks for each choice, at the most."""
        found: dict[tuple[int, int], Quote] = {}
        quotes = []
        for choice in job.choices:
            size = len(choice.prompt), choice.sampling.maximum_tokens
            if size not in found:
                try:
                    found[size] = await job.model.client.quote(
                        list(choice.prompt), choice.sampling.maximum_tokens, publisher=self._tab.collector
                    )
                except RequesterError as error:
                    raise of_requester(error) from error
            quotes.append(found[size])
        return quotes

    def price(self, quotes: Sequence[Quote]) -> int:
        """The most that a user pays for all choices, in wei."""
        return sum(self._settings.price(item.fee_wei) for item in quotes)

    async def submit(
        self,
        job: Job,
        key: AccountKey,
        *,
        body_hash: str,
        idempotency_key: str | None,
        allowed_wei: int | None,
        respond: Callable[[Generation, Done], str],
    ) -> Generation | str:
        """Begin to answer, or the answer that was given to this idempotency key before. `respond` makes the text that
        is kept for it.
        """
        if self.is_draining:
            raise unavailable("this gateway is being stopped: try again in a moment", "draining")
        if self._waiting + len(job.choices) > self._settings.queued_requests + self._settings.requests_in_flight:
            raise too_many("all places in the queue of this gateway are taken: try again in a moment")
        quotes = await self.quote(job)
        price = self.price(quotes)
        if allowed_wei is not None and price > allowed_wei:
            raise ApiError(
                402, f"this request may cost {price} wei, you allow {allowed_wei}: allow more, or ask for fewer tokens",
                code="price_above_maximum", param="X-BSNS-Max-Price-Wei",
            )  # fmt: skip
        now = int(self._clock())
        charge = await asyncio.to_thread(
            self._book.hold, key, price, model=job.model.name, body_hash=body_hash, idempotency_key=idempotency_key,
            now=now,
        )  # fmt: skip
        if charge.state is not ChargeState.HELD:
            if charge.response is None:
                raise ApiError(410, "the answer to this idempotency key is not kept any more: use another key")
            return charge.response
        generation = Generation(job, charge, tuple(quotes))
        self._waiting += len(job.choices)
        self._metrics.requests_waiting.set(self._waiting)
        task = asyncio.create_task(self._generate(generation, respond), name=charge.charge_id)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return generation

    async def drain(self, seconds: float) -> None:
        """Take nothing new, wait for what is being answered, then end it."""
        self.is_draining = True
        if self._running:
            _log.info("draining", answers=len(self._running))
            _, late = await asyncio.wait(self._running, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=seconds)

    # ----------------------------------------------------------------------------------------------------- one answer

    async def _generate(self, generation: Generation, respond: Callable[[Generation, Done], str]) -> None:
        charge, began = generation.charge, time.monotonic()
        outcome, prices, end = "failed", {}, None
        try:
            answers = await self._answers(generation)
            prices = {RequestId(item.request_id): self._settings.price(item.charged or 0) for item in answers}
            outcome = "answered" if generation.is_wanted else "abandoned"
            settled = await self._settle(generation, prices, answers, respond)
            generation.queue.put_nowait(settled)
            self._metrics.charged_wei.inc(settled.charge.charged)
        except RequesterError as error:
            _log.warning("not_answered", charge=charge.charge_id, error=f"{type(error).__name__}: {error}")
            end = of_requester(error)
        except StorageError as error:
            _log.error("not_settled", charge=charge.charge_id, error=str(error))
            end = of_storage(error)
        except asyncio.CancelledError:
            end = unavailable("this gateway was stopped before the answer was whole; nothing is charged", "draining")
            raise
        except Exception:
            _log.exception("not_answered", charge=charge.charge_id)
            end = ApiError(500, "the gateway failed; nothing is charged", kind="server_error", code="internal_error")
        finally:
            self._waiting -= len(generation.job.choices)
            self._metrics.requests_waiting.set(self._waiting)
            self._metrics.answered(generation.job.model.name, outcome, time.monotonic() - began)
            if end is not None:
                # Put back at the next start where the database is away just now.
                with contextlib.suppress(StorageError):
                    self._book.settle(charge.charge_id, {}, None, int(self._clock()))
                generation.queue.put_nowait(end)

    async def _settle(
        self,
        generation: Generation,
        prices: dict[RequestId, int],
        answers: tuple[Answer, ...],
        respond: Callable[[Generation, Done], str],
    ) -> Done:
        now, charge = int(self._clock()), generation.charge
        after = replace(charge, state=ChargeState.CHARGED, charged=sum(prices.values()), finished_at=now)
        done = Done(answers, after)
        kept = respond(generation, done) if charge.idempotency_key is not None else None
        await asyncio.to_thread(self._book.settle, charge.charge_id, prices, kept, now)
        return done

    async def _answers(self, generation: Generation) -> tuple[Answer, ...]:
        """All choices, or the first error once none of them is in progress any more."""

        async def one(number: int) -> Answer:
            try:
                async with self._slots:
                    return await self._answer(generation, number)
            except BaseException:
                generation.abandon()  # the others are of no use alone
                raise

        numbers = range(len(generation.job.choices))
        found = await asyncio.gather(*(one(number) for number in numbers), return_exceptions=True)
        for item in found:
            if isinstance(item, BaseException):
                raise item
        return tuple(item for item in found if isinstance(item, Answer))

    async def _answer(self, generation: Generation, number: int) -> Answer:
        attempts = self._settings.attempts
        for attempt in range(1, attempts + 1):
            progress = _Progress(generation, number, self._metrics)
            try:
                answer = await self._ask(generation, number, progress)
            except NotServedError as error:
                if progress.tokens or attempt == attempts or not generation.is_wanted:
                    raise
                _log.info("asked_again", charge=generation.charge.charge_id, error=str(error))
                continue
            generation.queue.put_nowait(Finished(number, answer))
            return answer
        raise AssertionError("unreachable")

    async def _ask(self, generation: Generation, number: int, progress: _Progress) -> Answer:
        began, failed = time.time(), "not answered"
        try:
            answer = await self._asked(generation, number, progress)
            failed = ""
            return answer
        finally:
            if progress.request_id is not None:
                facts: Facts = {"bsns.model": generation.job.model.name, "bsns.tokens": progress.tokens}
                self._tracer.span(progress.request_id, "request", began, facts, failed=failed or None, is_root=True)

    async def _asked(self, generation: Generation, number: int, progress: _Progress) -> Answer:
        job = generation.job
        choice = job.choices[number]
        try:
            answer = await job.model.client.request(
                list(choice.prompt), choice.sampling, stop=job.stop, on_token=progress.token,
                on_opened=progress.opened, is_wanted=lambda: generation.is_wanted, publisher=self._tab.collector,
                tab=self._tab, fee_wei=generation.quotes[number].fee_wei,
            )  # fmt: skip
        except UnavailableError:
            entry = self._answered(progress.request_id)
            if entry is None:
                raise
            # The answer is whole and signed for; only its voucher did not arrive, and is sent again.
            self._unpaid.add(entry.request_id)
            return self._unpaid_answer(entry, generation.quotes[number])
        except InvalidRequestError as error:
            # It was fine when it was quoted: what has changed since is the plan.
            raise UnavailableError(str(error)) from error
        if answer.finish_reason == "interrupted":
            raise NotServedError("the answer stopped in the middle", answer.request_id)
        return answer

    def _answered(self, request_id: RequestId | None) -> JournalEntry | None:
        entry = None if request_id is None else self._journal.read(request_id)
        return entry if entry is not None and entry.stage == "answered" else None

    @staticmethod
    def _unpaid_answer(entry: JournalEntry, quote: Quote) -> Answer:
        return Answer(
            text=entry.text,
            token_ids=entry.answer,
            request_id=entry.request_id,
            finish_reason=entry.finish_reason,
            status="Answered",
            fee_wei=quote.fee_wei,
            charged=(entry.input.rows + len(entry.answer)) * quote.fee_per_token,
            time_to_first_token_s=None,
            tokens_per_second=None,
            route=tuple[RouteNode, ...](),
            transactions=entry.transactions,
        )

    # ------------------------------------------------------------------------------------------------ after a crash

    async def recover(self) -> None:
        """After a start: release what is still set aside, and find answers whose vouchers did not go out."""
        now = int(self._clock())
        for charge in await asyncio.to_thread(self._book.unsettled):
            _log.info("released", charge=charge.charge_id, held_wei=charge.held)
            await asyncio.to_thread(self._book.settle, charge.charge_id, {}, None, now)
        self._unpaid |= await asyncio.to_thread(self._find_unpaid)

    def _find_unpaid(self) -> set[RequestId]:
        entries = map(self._journal.read_intact, self._journal.request_ids())
        return {
            item.request_id
            for item in entries
            if item is not None and item.tab is not None and item.stage in ("opened", "answered")
        }

    async def forget_old(self) -> int:
        """Remove prompts and secrets of requests that have been over for long: their batches are, too, and so is what
        the chain made of them. How many.
        """
        before = int(self._clock()) - self._settings.request_seconds
        return await asyncio.to_thread(self._forget_before, before)

    def _forget_before(self, before: int) -> int:
        forgotten = 0
        for request_id in self._journal.request_ids():
            ticket = self._storage.ticket(request_id)
            if ticket is None or ticket.changed_at > before or ticket.state not in _OVER:
                continue
            request = self._storage.request(request_id)
            if request is None or request.status.is_over:
                self._journal.forget(request_id)
                forgotten += 1
        return forgotten

    async def pay_late(self) -> None:
        """Pay for answers whose vouchers did not arrive, and give up tickets that a crash left open."""
        client = next(iter(self.models.values())).client
        for request_id in tuple(self._unpaid):
            try:
                entry = self._journal.read(request_id)
                if entry.stage == "answered":
                    await client.resume_on_tab(self._tab, request_id)
                elif entry.stage == "opened":
                    await self._tab.abandon(entry)
            except (UnavailableError, JournalError) as error:
                _log.info("still_unpaid", request="0x" + request_id.hex(), error=str(error))
                continue
            except RequesterError as error:
                # The collector has given it up itself: nobody is paid for it, and nobody charged.
                _log.info("given_up", request="0x" + request_id.hex(), error=str(error))
            self._unpaid.discard(request_id)
