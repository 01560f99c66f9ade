"""Collects requests that are paid out of tabs, and posts them in batches (contracts/RequestTabs.sol).

Owns what is known of tickets, vouchers and batches, in the database. Promises that no ticket is taken which its tab
does not cover or whose leaf could not be opened; that numbers are taken without gaps and each once; that a batch is
posted only when every node with a share has signed it, and its bond is then worth putting down: all its leaves can be
opened from what is stored here; and that a kill at any moment loses nothing that a restart does not take up. Speaks to
the chain through the outbox alone. Routes as the escrow's requests are routed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Final, NamedTuple

import structlog

from bsns.chain.client import ChainClient
from bsns.chain.signer import Signer
from bsns.protocol.identifiers import ZERO_HASH, PlanId, ProtocolError, RequestId, address
from bsns.protocol.tabs import (
    MAXIMUM_BATCH_TICKETS,
    MAXIMUM_DRAWS,
    MAXIMUM_SEGMENTS,
    BatchStatus,
    CollectedBatch,
    CollectedTicket,
    PostedState,
    RouteStage,
    Segment,
    SignedTicket,
    StageResult,
    TicketGrant,
    Voucher,
    abandonment_digest,
    due_calls,
    secrets_by_hash,
    shares_of,
    wei_bytes,
)
from bsns.protocol.typed_data import Domain, is_signed_by
from bsns.tracing import RequestTracer
from bsns.v1 import coordination_pb2, tabs_pb2
from coordinator.dispatch.node_pool import NodePool
from coordinator.dispatch.request_routing import RequestRouting
from coordinator.refusals import failed_precondition, invalid, unauthenticated
from coordinator.storage import (
    BatchProgress,
    BatchRecord,
    Intent,
    Storage,
    TicketRecord,
    TicketState,
    VoucherRecord,
)
from coordinator.transaction_outbox import TransactionOutbox, WorkerThread

TABS: Final = "RequestTabs"
MAXIMUM_SECRETS_SHOWN: Final = 64
_PARSED_BATCHES: Final = 64
_OPEN: Final = (TicketState.TAKEN, TicketState.DELIVERED, TicketState.ABANDONED, TicketState.BATCHED)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TabLimits:
    """Seconds, and counts. A batch is posted when it is full, or its oldest answer has waited for `batch_seconds`."""

    batch_seconds: int = 300
    batch_tickets: int = MAXIMUM_BATCH_TICKETS
    requests_in_flight: int = 4
    delivery_seconds: int = 900
    consent_seconds: int = 60
    post_seconds: int = 900
    ticket_seconds: int = 7_200


class _Terms(NamedTuple):
    maximum_tokens: int
    protocol_fee_bps: int
    tokens_per_draw: int
    opening_window: int


class TabCollector:
    """The collector that signs with the publisher's key. `chain_now` is the chain's time."""

    def __init__(
        self,
        storage: Storage,
        chain: ChainClient,
        outbox: TransactionOutbox,
        pool: NodePool,
        routing: RequestRouting,
        signer: Signer,
        domain: Domain,
        *,
        limits: TabLimits,
        chain_now: Callable[[], int],
        tracer: RequestTracer,
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._storage, self._chain, self._outbox, self._pool, self._routing = storage, chain, outbox, pool, routing
        self._signer, self._domain, self._limits = signer, domain, limits
        self._now, self._blocking, self._tracer = chain_now, run_blocking, tracer
        self._terms: _Terms | None = None
        # One change at a time: numbers, and what a tab covers, are read before they are written.
        self._lock = asyncio.Lock()
        # Nodes that were offered a batch and said no, with the reason; and those it was offered to, with when they had
        # attached: who comes back may not have heard it.
        self._refusals: dict[bytes, dict[str, str]] = {}
        self._offered: dict[bytes, dict[str, float]] = {}
        # Block after which batches on the chain were looked at last: nothing about them changes without another.
        self._followed = -1

    # ----------------------------------------------------------------------------------------------------- requesters

    async def tab(self, requester: str) -> tabs_pb2.GetTabResponse:
        """Where a requester's tab stands here."""
        on_chain = await self._chain.call(TABS, "tabOf", requester, self._signer.address)
        number = await self._next_number(requester, int(on_chain.tickets))
        vouchers = await self._blocking(lambda: self._storage.vouchers(requester))
        tickets = await self._blocking(lambda: self._storage.tickets(_OPEN, requester=requester))
        batches = await self._blocking(lambda: self._storage.batches(BatchProgress.OFFERED, BatchProgress.WANTED))
        open_batches = {item.batch_id for item in batches}
        return tabs_pb2.GetTabResponse(
            collector=bytes.fromhex(self._signer.address[2:]),
            next_ticket=number,
            newest_voucher=tabs_pb2.Voucher.FromString(vouchers[-1].message) if vouchers else None,
            outstanding=wei_bytes(sum(item.charge for item in tickets)),
            awaited_secret_hashes=[
                item.secret_hash for item in vouchers if item.batch_id in open_batches and item.secret is None
            ],
            ticket_seconds=self._limits.ticket_seconds,
        )

    async def take(self, message: tabs_pb2.SignedTicket, avoid: Iterable[str]) -> TicketGrant:
        """Take a ticket and choose a route for it; Refusal if it cannot be served and paid."""
        began = time.time()
        try:
            signed = SignedTicket.from_message(message)
            request = signed.check(self._domain)
        except ProtocolError as error:
            raise unauthenticated("SIGNATURE_INVALID", f"not a ticket: {error}") from error
        async with self._lock:
            known = await self._blocking(lambda: self._storage.ticket(request))
            if known is not None:
                return TicketGrant.from_message(_grant(known))
            grant = await self._take(signed, request, frozenset(avoid))
        self._tracer.span(request, "take ticket", began, {"bsns.stages": len(grant.route)})
        return grant

    async def _take(self, signed: SignedTicket, request: RequestId, avoid: frozenset[str]) -> TicketGrant:
        ticket, terms, now = signed.ticket, await self._terms_of(), self._now()
        plan = await self._blocking(lambda: self._storage.plan(PlanId(ticket.plan_id)))
        if plan is None or plan.publisher != self._signer.address:
            raise failed_precondition("WRONG_PLAN", "the ticket is for a plan that is not published by this collector")
        if bytes(await self._chain.call("ShardAssignments", "activePlan", plan.model_id, plan.publisher)) != (
            ticket.plan_id
        ):
            raise failed_precondition("WRONG_PLAN", "another plan has taken effect: quote and sign again")
        counts = (ticket.prompt_tokens, ticket.maximum_tokens)
        if not all(0 < count <= terms.maximum_tokens for count in counts):
            raise invalid("NOT_COVERED", f"prompt and answer have 1 to {terms.maximum_tokens} tokens each")
        if sum(counts) > MAXIMUM_DRAWS * terms.tokens_per_draw:
            raise invalid("NOT_COVERED", f"a batch has at most {MAXIMUM_DRAWS * terms.tokens_per_draw} tokens")
        if ZERO_HASH in (ticket.input_commitment, ticket.secret_hash):
            raise invalid("NOT_COVERED", "a ticket has an input commitment and a secret hash")
        if ticket.deadline < now + self._limits.ticket_seconds // 2:
            raise failed_precondition(
                "NOT_COVERED", f"the ticket must be good for {self._limits.ticket_seconds} s, by the chain's clock"
            )
        on_chain = await self._chain.call(TABS, "tabOf", ticket.requester, self._signer.address)
        await self._check_cover(signed, on_chain, sum(counts) * plan.fee_per_token)
        route = await self._routing.choose(plan, sum(counts), [], now, avoid)
        if route is None:
            raise failed_precondition("PEER_UNAVAILABLE", "a stage has no node that is attached and active: try later")
        stages = tuple(RouteStage(item, plan.shard_plan.proof(item)) for item in route)
        grant = TicketGrant(signed, stages)
        grant = replace(grant, signature=self._signer.sign_digest(grant.digest(self._domain)))
        record = TicketRecord(
            request,
            ticket.requester,
            ticket.number,
            ticket.plan_id,
            TicketState.TAKEN,
            now,
            sum(counts) * plan.fee_per_token,
            None,
            grant.to_message().SerializeToString(),
            None,
        )
        if not await self._blocking(lambda: self._storage.keep_ticket(record)):
            raise failed_precondition("TICKET_OUT_OF_ORDER", f"ticket {ticket.number} was taken: ask for the next one")
        _log.info("ticket_taken", request_id="0x" + request.hex(), requester=ticket.requester, number=ticket.number)
        return grant

    async def _check_cover(self, signed: SignedTicket, on_chain: Any, charge: int) -> None:
        ticket = signed.ticket
        if int(on_chain.closesAt):
            raise failed_precondition("NOT_COVERED", "the tab is closing: fund it again to keep it open")
        number = await self._next_number(ticket.requester, int(on_chain.tickets))
        if ticket.number != number:
            raise failed_precondition(
                "TICKET_OUT_OF_ORDER", f"the next ticket of this tab is {number}, not {ticket.number}"
            )
        tickets = await self._blocking(lambda: self._storage.tickets(_OPEN, requester=ticket.requester))
        in_flight = sum(item.state is TicketState.TAKEN for item in tickets)
        if in_flight >= self._limits.requests_in_flight:
            raise failed_precondition(
                "NOT_COVERED",
                f"{in_flight} requests of this tab are being served, or were answered without a voucher: deliver or "
                "abandon one of them",
            )
        # What is in a batch that was charged already is counted twice for a moment: on the side of the nodes.
        outstanding = sum(item.charge for item in tickets)
        if int(on_chain.balance) < outstanding + charge:
            raise failed_precondition(
                "NOT_COVERED",
                f"the tab holds {on_chain.balance} wei, of which {outstanding} are spoken for; this request may cost "
                f"{charge}: fund it with {outstanding + charge - int(on_chain.balance)} more",
            )

    async def _next_number(self, requester: str, on_chain: int) -> int:
        last = await self._blocking(lambda: self._storage.last_ticket_number(requester))
        return on_chain if last is None else max(on_chain, last + 1)

    async def deliver(
        self, request: RequestId, results: Sequence[tabs_pb2.StageResult], voucher: tabs_pb2.Voucher
    ) -> None:
        """Keep what the nodes signed and the voucher that pays for it; Refusal if either does not hold."""
        try:
            found = tuple(StageResult.from_message(item) for item in results)
            promise = Voucher.from_message(voucher)
        except ProtocolError as error:
            raise invalid("MALFORMED_MESSAGE", f"not a delivery: {error}") from error
        async with self._lock:
            record = await self._blocking(lambda: self._storage.ticket(request))
            if record is None:
                raise failed_precondition("UNKNOWN_SESSION", "this ticket was not taken here")
            if record.state in (TicketState.DELIVERED, TicketState.BATCHED, TicketState.OVER) and record.collected:
                return
            if record.state is not TicketState.TAKEN:
                raise failed_precondition("SESSION_ENDED", "the ticket was given up: it is not charged any more")
            await self._deliver(record, found, promise)

    async def _deliver(self, record: TicketRecord, results: tuple[StageResult, ...], promise: Voucher) -> None:
        grant = TicketGrant.from_message(_grant(record))
        plan = await self._blocking(lambda: self._storage.plan(PlanId(record.plan_id)))
        if plan is None or not results:
            raise invalid("MALFORMED_MESSAGE", "a delivery has the result of each stage")
        collected = CollectedTicket(grant.ticket, results)
        try:
            await self._blocking(lambda: collected.check(self._domain, record.plan_id, plan.shard_plan.root))
        except ProtocolError as error:
            raise unauthenticated("SIGNATURE_INVALID", str(error)) from error
        if (promise.requester, promise.collector) != (record.requester, self._signer.address) or not promise.is_signed(
            self._domain
        ):
            raise unauthenticated("SIGNATURE_INVALID", "the voucher is not signed by the requester for this collector")
        charge = collected.tokens * plan.fee_per_token
        tickets = await self._blocking(
            lambda: self._storage.tickets((TicketState.DELIVERED,), requester=record.requester)
        )
        vouchers = await self._blocking(lambda: self._storage.vouchers(record.requester))
        due = await self._promised(record.requester, vouchers) + sum(item.charge for item in tickets) + charge
        if promise.cumulative < due or any(item.secret_hash == promise.secret_hash for item in vouchers):
            raise failed_precondition(
                "NOT_COVERED", f"the voucher promises {promise.cumulative} wei, {due} are due, with a fresh secret"
            )
        done = replace(
            record,
            state=TicketState.DELIVERED,
            changed_at=self._now(),
            charge=charge,
            collected=collected.to_message().SerializeToString(),
        )
        kept = VoucherRecord(
            promise.secret_hash,
            record.requester,
            promise.cumulative,
            promise.to_message().SerializeToString(),
            None,
            None,
        )
        await self._blocking(lambda: self._storage.deliver(done, kept))
        _log.info("ticket_delivered", request_id="0x" + record.request_id.hex(), charge=charge)

    async def _promised(self, requester: str, vouchers: Sequence[VoucherRecord]) -> int:
        """Cumulative wei of the last voucher that went into a batch, here or on the chain."""
        on_chain = await self._chain.call(TABS, "tabOf", requester, self._signer.address)
        used = max((item.cumulative for item in vouchers if item.batch_id is not None), default=0)
        return max(int(on_chain.collected), used)

    async def abandon(self, request: RequestId, signature: bytes) -> None:
        """Take note that a ticket was not answered; Refusal unless its requester says so. Harmless to repeat."""
        async with self._lock:
            record = await self._blocking(lambda: self._storage.ticket(request))
            if record is None or not is_signed_by(
                abandonment_digest(self._domain, request), signature, record.requester
            ):
                raise unauthenticated("SIGNATURE_INVALID", "no such ticket, or its requester did not sign this")
            if record.state is TicketState.TAKEN:
                await self._give_up(record)

    async def _give_up(self, record: TicketRecord) -> None:
        given_up = replace(record, state=TicketState.ABANDONED, changed_at=self._now(), charge=0, collected=None)
        await self._blocking(lambda: self._storage.change_ticket(given_up))
        _log.info("ticket_given_up", request_id="0x" + record.request_id.hex())

    async def show_secrets(self, secrets: Sequence[bytes]) -> int:
        """Keep secrets of vouchers; how many belong to any."""
        if len(secrets) > MAXIMUM_SECRETS_SHOWN:
            raise invalid("MESSAGE_TOO_LARGE", f"at most {MAXIMUM_SECRETS_SHOWN} secrets at once")
        try:
            by_hash = secrets_by_hash(secrets)
        except ProtocolError as error:
            raise invalid("MALFORMED_MESSAGE", str(error)) from error
        kept = [
            await self._blocking(lambda: self._storage.keep_secret(key, secret))  # noqa: B023 - awaited at once
            for key, secret in by_hash.items()
        ]
        return sum(kept)

    # ---------------------------------------------------------------------------------------------------------- nodes

    async def consent(self, node: str, message: coordination_pb2.BatchConsent) -> None:
        """A node's answer to a batch that was offered to it; ProtocolError for a signature that is not its own."""
        batch_id = bytes(message.batch_id)
        async with self._lock:
            records = await self._blocking(lambda: self._storage.batches(BatchProgress.OFFERED))
            record = next((item for item in records if item.batch_id == batch_id), None)
            if record is None:
                return
            if not message.signature:
                self._refusals.setdefault(batch_id, {})[node] = message.refusal[:512]
                _log.warning("batch_refused", batch="0x" + batch_id.hex(), node=node, reason=message.refusal[:512])
                return
            if not is_signed_by(batch_id, bytes(message.signature), node):
                raise ProtocolError(f"the consent to batch 0x{batch_id.hex()} is not signed by {node}")
            record = replace(record, consents={**record.consents, node: bytes(message.signature)})
            await self._blocking(lambda: self._storage.change_batch(record))

    # ----------------------------------------------------------------------------------------------------------- loop

    async def step(self, head_number: int) -> None:
        """One look at everything that is open, after block `head_number`."""
        async with self._lock:
            now = self._now()
            for record in await self._blocking(lambda: self._storage.tickets((TicketState.TAKEN,))):
                if now > record.changed_at + self._limits.delivery_seconds:
                    await self._give_up(record)
            for record in await self._blocking(lambda: self._storage.tickets((TicketState.DELIVERED,))):
                # What cannot be opened when it is drawn would cost the bond, and the others their pay.
                if _grant(record).ticket.ticket.deadline < now + self._limits.consent_seconds:
                    await self._give_up(record)
            if head_number != self._followed:
                for batch in await self._blocking(lambda: self._storage.batches(BatchProgress.WANTED)):
                    await self._follow(batch, now, head_number)
                self._followed = head_number
            for batch in await self._blocking(lambda: self._storage.batches(BatchProgress.OFFERED)):
                await self._gather(batch, now)
            await self._form(now)

    async def _form(self, now: int) -> None:
        """Offer a batch of what has been delivered, if there is enough of it or it has waited long enough."""
        limits = self._limits
        done = (TicketState.TAKEN, TicketState.DELIVERED, TicketState.ABANDONED)
        tickets = await self._blocking(lambda: self._storage.tickets(done))
        busy = {item.requester for item in await self._blocking(lambda: self._storage.tickets((TicketState.BATCHED,)))}
        runs: dict[bytes, list[list[TicketRecord]]] = {}
        for requester, own in groupby(tickets, key=lambda item: item.requester):
            run: list[TicketRecord] = []
            for item in own:
                if item.state is TicketState.TAKEN or (run and item.plan_id != run[0].plan_id):
                    break
                run.append(item)
            if requester not in busy and any(item.collected for item in run):
                runs.setdefault(run[0].plan_id, []).append(run)
        for plan_id, ready in runs.items():
            delivered = [item for run in ready for item in run if item.collected]
            oldest = min(item.changed_at for item in delivered)
            if len(delivered) >= limits.batch_tickets or now >= oldest + limits.batch_seconds:
                await self._offer(plan_id, ready, now)

    async def _offer(self, plan_id: bytes, runs: Sequence[Sequence[TicketRecord]], now: int) -> None:
        plan = await self._blocking(lambda: self._storage.plan(PlanId(plan_id)))
        if plan is None:
            return
        terms = await self._terms_of()
        segments: list[Segment] = []
        included: list[TicketRecord] = []
        promises: list[VoucherRecord] = []
        room, tokens_left = self._limits.batch_tickets, MAXIMUM_DRAWS * terms.tokens_per_draw
        for run in runs[:MAXIMUM_SEGMENTS]:
            found = await self._segment(run, plan.fee_per_token, room, tokens_left)
            if found is None:
                continue
            segment, records, promise = found
            segments.append(segment)
            included += records
            promises.append(promise)
            room, tokens_left = room - segment.tickets, tokens_left - segment.tokens
        if not segments:
            return
        collected = tuple(map(_collected, included))
        shares = shares_of(collected, plan.fee_per_token, terms.protocol_fee_bps)
        lapses = min(item.ticket.ticket.deadline for item in collected if item.results)
        deadline = min(now + self._limits.post_seconds, lapses)
        batch = CollectedBatch(
            plan_id, address(self._outbox.sender), plan.fee_per_token, deadline, tuple(segments), shares, collected
        )
        batch_id = await self._blocking(lambda: batch.batch_id(self._domain))
        message = batch.to_message().SerializeToString()
        record = BatchRecord(batch_id, BatchProgress.OFFERED, now, message, {})
        requests, hashes = [item.request_id for item in included], [item.secret_hash for item in promises]
        await self._blocking(lambda: self._storage.keep_batch(record, requests, hashes))
        _log.info("batch_offered", batch="0x" + batch_id.hex(), tickets=len(included), tokens=batch.tokens)
        self._tell(record, batch)

    async def _segment(
        self, run: Sequence[TicketRecord], fee_per_token: int, room: int, tokens_left: int
    ) -> tuple[Segment, list[TicketRecord], VoucherRecord] | None:
        """The longest part of a requester's run that fits, with the smallest voucher that covers it: of a larger one
        the rest would be given up.
        """
        requester = run[0].requester
        on_chain = await self._chain.call(TABS, "tabOf", requester, self._signer.address)
        if int(on_chain.tickets) != run[0].number:
            return None  # its last batch is not on the chain yet
        taken: list[TicketRecord] = []
        tokens = 0
        for item in run:
            count = _collected(item).tokens
            if (
                len(taken) == room
                or tokens + count > tokens_left
                or ((tokens + count) * fee_per_token > int(on_chain.balance))
            ):
                break
            taken.append(item)
            tokens += count
        vouchers = await self._blocking(lambda: self._storage.vouchers(requester))
        due = int(on_chain.collected) + tokens * fee_per_token
        promise = next((item for item in vouchers if item.batch_id is None and item.cumulative >= due), None)
        if not tokens or promise is None:
            return None
        account = _collected(taken[0]).ticket.ticket.requester
        segment = Segment(
            account,
            run[0].number,
            len(taken),
            tokens,
            promise.cumulative,
            promise.secret_hash,
        )
        return segment, taken, promise

    def _tell(self, record: BatchRecord, batch: CollectedBatch) -> None:
        message = coordination_pb2.AttachResponse(batch=tabs_pb2.TicketBatch.FromString(record.message))
        told, live = self._offered.setdefault(record.batch_id, {}), self._pool.live()
        for node, _ in batch.shares:
            if node in record.consents or node not in live or told.get(node) == live[node].attached_at:
                continue
            if self._pool.tell(node, message):
                told[node] = live[node].attached_at

    async def _gather(self, record: BatchRecord, now: int) -> None:
        """Post a batch that all have signed; leave out what a node does not sign for in time."""
        batch = _batch(record)
        missing = [node for node, _ in batch.shares if node not in record.consents]
        if not missing:
            await self._post(record, batch)
            return
        self._tell(record, batch)
        refusals = self._refusals.get(record.batch_id, {})
        late = now > record.changed_at + self._limits.consent_seconds
        if not late and not set(missing) & set(refusals):
            return
        unwilling: set[str] = {node for node in missing if late or node in refusals}
        _log.warning("batch_dissolved", batch="0x" + record.batch_id.hex(), nodes=sorted(unwilling))
        await self._dissolve(record, unwilling, now)

    async def _dissolve(self, record: BatchRecord, unwilling: set[str], now: int) -> None:
        """Back to the tickets; those that one of `unwilling` served are charged to nobody."""
        tickets = await self._blocking(lambda: self._storage.tickets((TicketState.BATCHED,), batch=record.batch_id))
        changed = []
        for item in tickets:
            results = _collected(item).results
            lost = any(result.served_by.assignment.node in unwilling for result in results)
            delivered = bool(results) and not lost
            changed.append(
                replace(
                    item,
                    state=TicketState.DELIVERED if delivered else TicketState.ABANDONED,
                    batch_id=None,
                    charge=item.charge if delivered else 0,
                    collected=item.collected if delivered else None,
                    changed_at=item.changed_at if delivered else now,
                )
            )
        await self._blocking(lambda: self._storage.dissolve_batch(record.batch_id, changed))
        self._forget(record.batch_id)

    async def _post(self, record: BatchRecord, batch: CollectedBatch) -> None:
        vouchers = await self._blocking(
            lambda: {
                item.secret_hash: Voucher.from_message(tabs_pb2.Voucher.FromString(item.message))
                for segment in batch.segments
                for item in self._storage.vouchers(segment.requester)
            }
        )
        terms = await self._terms_of()
        arguments = (
            batch.as_tuple(self._domain),
            [vouchers[segment.secret_hash].signature for segment in batch.segments],
            [record.consents[node] for node, _ in batch.shares],
        )
        bond = terms.tokens_per_draw * batch.fee_per_token
        await self._outbox.want(Intent(f"post/0x{record.batch_id.hex()}", TABS, "post", arguments, bond))
        await self._blocking(lambda: self._storage.change_batch(replace(record, state=BatchProgress.WANTED)))
        self._forget(record.batch_id)

    async def _follow(self, record: BatchRecord, now: int, head_number: int) -> None:
        """Do what is due of a batch that was posted."""
        batch = _batch(record)
        state = PostedState.of(await self._chain.call(TABS, "batchOf", record.batch_id))
        if state.status is BatchStatus.ABSENT:
            if now > batch.deadline + self._limits.consent_seconds:
                _log.error("batch_not_posted", batch="0x" + record.batch_id.hex())
                await self._dissolve(record, set(), now)
            return
        if state.status is not BatchStatus.POSTED:
            # Charged for good: what the tab holds is free for other requests.
            await self._blocking(lambda: self._storage.end_tickets(record.batch_id, now))
        if state.status.is_over:
            _log.info("batch_over", batch="0x" + record.batch_id.hex(), status=state.status.name.lower())
            over = replace(record, state=BatchProgress.OVER, changed_at=now)
            await self._blocking(lambda: self._storage.change_batch(over))
            if state.status is BatchStatus.SETTLED:
                # The bond is back as a credit; the next batch needs it in the account.
                key = f"withdrawCredit/0x{record.batch_id.hex()}"
                await self._outbox.want(Intent(key, TABS, "withdrawCredit", (self._signer.address,)))
            return
        shown = await self._blocking(lambda: self._storage.secrets_of(record.batch_id))
        secrets = {key: secret for key, secret in shown.items() if secret is not None}
        terms = await self._terms_of()
        for call in due_calls(
            batch, self._domain, state, secrets, now=now, head_number=head_number,
            opening_window=terms.opening_window,
        ):  # fmt: skip
            key = f"{call.key}/0x{record.batch_id.hex()}"
            await self._outbox.want(Intent(key, TABS, call.function, call.arguments))

    def _forget(self, batch_id: bytes) -> None:
        self._refusals.pop(batch_id, None)
        self._offered.pop(batch_id, None)

    async def _terms_of(self) -> _Terms:
        if self._terms is None:
            escrow, tabs = await self._chain.call("InferenceEscrow", "terms"), await self._chain.call(TABS, "terms")
            self._terms = _Terms(
                int(escrow.maximumTokens), int(escrow.protocolFeeBps), int(tabs.tokensPerDraw), int(tabs.openingWindow)
            )
        return self._terms


def _grant(record: TicketRecord) -> tabs_pb2.TicketGrant:
    """As it was stored; what is in it was checked then."""
    return tabs_pb2.TicketGrant.FromString(record.grant)


def _collected(record: TicketRecord) -> CollectedTicket:
    """A ticket with its results, as far as there are any."""
    if record.collected is not None:
        return CollectedTicket.from_message(tabs_pb2.CollectedTicket.FromString(record.collected))
    return CollectedTicket(TicketGrant.from_message(_grant(record)).ticket)


def _batch(record: BatchRecord) -> CollectedBatch:
    return _parsed_batch(record.message)


@lru_cache(maxsize=_PARSED_BATCHES)
def _parsed_batch(message: bytes) -> CollectedBatch:
    """Of a stored message. Kept: a batch that waits is looked at after each block."""
    return CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(message))
