"""A requester's tab with one collector: money put down once, and many requests paid out of it by signed vouchers
(contracts/RequestTabs.sol).

Owns tickets and vouchers: a ticket is on disk before the collector sees it, and a voucher's secret before the voucher
is signed. Promises never to promise more than what was received, by the chain and its own signatures, whatever a
collector says; that a voucher which may have arrived is sent again and not signed anew; and to show a secret only when
its batch is on the chain, where the collector cannot choose the batch by it any more. Serving is
`bsns.requester.client`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from bsns.chain.errors import ContractError
from bsns.chain.signer import Signer
from bsns.chain.submitter import Submitter
from bsns.protocol import typed_data
from bsns.protocol.commitments import input_commitment, secret_hash
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ProtocolError, RequestId, address
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.tabs import (
    BatchStatus,
    CollectedTicket,
    PostedState,
    Segment,
    SignedTicket,
    StageResult,
    Ticket,
    TicketGrant,
    Voucher,
    abandonment_digest,
    wei_of,
)
from bsns.requester.collector import CollectorConnection
from bsns.requester.errors import InvalidRequestError, TicketRefusedError, UnavailableError
from bsns.requester.journal import Journal, JournalEntry, TabEntry
from bsns.requester.request_input import RequestInput
from bsns.requester.settlement import Settlement
from bsns.v1 import tabs_pb2

if TYPE_CHECKING:
    from bsns.chain.client import ChainClient
    from bsns.chain.deployment import Deployment

TABS: Final = "RequestTabs"
ATTEMPTS: Final = 3
"""Times that a ticket or voucher is made anew because another process of this requester was faster."""
POLL_S: Final = 0.5
# Place of the segments among the fields of IRequestTabs.Batch.
_SEGMENTS: Final = 5


@dataclass(frozen=True, slots=True)
class TabStanding:
    """Wei, by the chain: what the tab holds, what was collected so far; and by the collector what is not on the chain
    yet. `closes_at`: Unix seconds, 0 while it is open.
    """

    requester: str
    collector: str
    balance: int
    collected: int
    tickets: int
    closes_at: int
    outstanding: int | None
    next_ticket: int | None


@dataclass(frozen=True, slots=True)
class _Posted:
    """A batch as its event shows it: `shown` is the Solidity struct."""

    batch_id: bytes
    shown: tuple[Any, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(Segment(*item) for item in self.shown[_SEGMENTS])


class Tab:
    """The tab of `signer` with `collector`; `connection` is needed for requests only."""

    def __init__(
        self,
        chain: ChainClient,
        deployment: Deployment,
        signer: Signer,
        journal: Journal,
        collector: str,
        connection: CollectorConnection | None = None,
    ) -> None:
        self._chain, self._deployment, self._signer, self._journal = chain, deployment, signer, journal
        self.collector = address(collector)
        self._connection = connection
        self._submitter = Submitter(chain, signer)
        self.domain = typed_data.tabs_domain(deployment.chain_id, deployment.request_tabs)
        # One at a time: a number is asked for before it is used, and what was promised read before more is.
        self._lock = asyncio.Lock()
        self._delivered_secrets: dict[bytes, bytes] = {}
        self._other_secrets: dict[bytes, bytes] = {}

    # -- money

    async def standing(self) -> TabStanding:
        """The tab by the chain and, with a connection, by its collector."""
        raw = await self._on_chain()
        told = None if self._connection is None else await self._connection.tab(self._signer.address)
        return TabStanding(
            self._signer.address,
            self.collector,
            int(raw.balance),
            int(raw.collected),
            int(raw.tickets),
            int(raw.closesAt),
            None if told is None else wei_of(told.outstanding),
            None if told is None else told.next_ticket,
        )

    async def fund(self, amount: int) -> str:
        """Put money on the tab; the transaction."""
        if amount <= 0:
            raise InvalidRequestError("an amount is a positive number of wei")
        return _shown(await self._submitter.submit(TABS, "fund", self.collector, value=amount))

    async def close(self) -> str:
        """Begin to close the tab: after its close period the money can be taken out. Funding it again keeps it open."""
        return _shown(await self._submitter.submit(TABS, "beginClose", self.collector))

    async def withdraw(self) -> tuple[int, Mapping[str, str]]:
        """Take out what the closed tab holds and what the contract owes besides; wei, and the transactions."""
        held = int((await self._on_chain()).balance)
        owed = int(await self._chain.call(TABS, "creditOf", self._signer.address))
        if not held and not owed:
            raise InvalidRequestError(f"neither the tab with {self.collector} nor the contract owes anything")
        transactions = {}
        # What is owed is due in any case, what the tab holds only once it is closed.
        if owed:
            receipt = await self._submitter.submit(TABS, "withdrawCredit", self._signer.address)
            transactions["withdraw_credit"] = _shown(receipt)
        if held:
            transactions["withdraw_tab"] = _shown(await self._submitter.submit(TABS, "withdrawTab", self.collector))
        return held + owed, transactions

    async def _on_chain(self) -> Any:
        return await self._chain.call(TABS, "tabOf", self._signer.address, self.collector)

    # -- requests

    async def open(
        self,
        plan_id: bytes,
        given: RequestInput,
        sampling: SamplingParameters,
        stop: tuple[str, ...],
        avoid: Iterable[str],
    ) -> JournalEntry:
        """A ticket that the collector has taken, with its route. UnavailableError, or TicketRefusedError."""
        for attempt in range(ATTEMPTS):
            async with self._lock:
                entry = await self._ticket(plan_id, given, sampling, stop)
                try:
                    return await self._taken(entry, avoid)
                except TicketRefusedError as error:
                    if error.reason != "ERROR_REASON_TICKET_OUT_OF_ORDER" or attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError("unreachable")

    async def _ticket(
        self, plan_id: bytes, given: RequestInput, sampling: SamplingParameters, stop: tuple[str, ...]
    ) -> JournalEntry:
        told = await self._connected.tab(self._signer.address)
        if address(bytes(told.collector)) != self.collector:
            raise UnavailableError(
                f"the coordinator that was asked collects for {address(bytes(told.collector))}, the plan is of "
                f"{self.collector}: give the address of that plan's coordinator"
            )
        now = max(int(time.time()), (await self._chain.head()).timestamp)
        salt, secret = secrets.token_bytes(32), secrets.token_bytes(32)
        commitment = input_commitment(given.digest, given.rows, sampling.digest(), salt)
        ticket = Ticket(
            plan_id, address(self._signer.address), told.next_ticket, commitment, secret_hash(secret), given.rows,
            sampling.maximum_tokens, now + told.ticket_seconds,
        )  # fmt: skip
        entry = JournalEntry(
            request_id=ticket.request_id(self.domain),
            chain_id=self._deployment.chain_id,
            escrow=self._deployment.inference_escrow,
            requester=self._signer.address,
            plan_id=plan_id,
            publisher=self.collector,
            nonce=0,
            secret=secret,
            salt=salt,
            input=given,
            sampling=sampling,
            stop=stop,
            deposit=0,
            created_at=int(time.time()),
            tab=TabEntry(self.collector, ticket.number, ticket.deadline),
        )
        self._journal.write(entry)
        return entry

    async def _taken(self, entry: JournalEntry, avoid: Iterable[str]) -> JournalEntry:
        signed = self.signed_ticket(entry)
        try:
            grant = TicketGrant.from_message(await self._connected.take(signed, avoid))
            plan = await self._chain.call("ShardAssignments", "planOf", entry.plan_id)
            found = grant.check(self.domain, self.collector, bytes(plan.root))
        except ProtocolError as error:
            raise UnavailableError(f"the collector answered with a grant that does not hold: {error}") from error
        if found != entry.request_id:
            raise UnavailableError("the collector answered for another ticket")
        assert entry.tab is not None, "made with one"
        tab = dataclasses.replace(
            entry.tab,
            grant=grant.to_message().SerializeToString(),
            route=tuple(item.to_message().SerializeToString() for item in grant.route),
        )
        return self._save(dataclasses.replace(entry, stage="opened", tab=tab))

    def signed_ticket(self, entry: JournalEntry) -> SignedTicket:
        """The ticket of an entry, signed."""
        assert entry.tab is not None, "asked of entries with a tab only"
        commitment = input_commitment(entry.input.digest, entry.input.rows, entry.sampling.digest(), entry.salt)
        ticket = Ticket(
            entry.plan_id, address(self._signer.address), entry.tab.number, commitment, secret_hash(entry.secret),
            entry.input.rows, entry.sampling.maximum_tokens, entry.tab.deadline,
        )  # fmt: skip
        return SignedTicket(ticket, self._signer.sign_digest(ticket.request_id(self.domain)))

    async def charge(self, entry: JournalEntry) -> int:
        """Wei that the answer of an entry costs."""
        plan = await self._chain.call("ShardAssignments", "planOf", entry.plan_id)
        return (entry.input.rows + len(entry.answer)) * int(plan.feePerToken)

    async def pay(self, entry: JournalEntry) -> JournalEntry:
        """Promise what an answer costs, with what its nodes signed for it."""
        assert entry.tab is not None, "asked of entries with a tab only"
        results = _results(entry.tab)
        for attempt in range(ATTEMPTS):
            async with self._lock:
                entry = await self._with_voucher(entry, anew=attempt > 0)
                try:
                    await self._connected.deliver(entry.request_id, results, self._voucher(entry))
                except TicketRefusedError as error:
                    # Another process of this requester may have promised something in between.
                    if error.reason != "ERROR_REASON_NOT_COVERED" or attempt == ATTEMPTS - 1:
                        raise
                    continue
                assert entry.tab is not None, "kept"
                tab = dataclasses.replace(entry.tab, delivered=True)
                return self._save(dataclasses.replace(entry, stage="concluded", tab=tab))
        raise AssertionError("unreachable")

    async def _with_voucher(self, entry: JournalEntry, *, anew: bool) -> JournalEntry:
        """The entry with what its voucher says. One that was made is kept, unless the collector refused it: it may have
        arrived, and another one on top would promise the answer twice.
        """
        assert entry.tab is not None, "asked of entries with a tab only"
        if entry.tab.voucher_secret and not anew:
            return entry
        cumulative = await self._promised() + await self.charge(entry)
        tab = dataclasses.replace(entry.tab, voucher_secret=secrets.token_bytes(32), cumulative=cumulative)
        return self._save(dataclasses.replace(entry, tab=tab))

    def _voucher(self, entry: JournalEntry) -> Voucher:
        assert entry.tab is not None, "made with one"
        promise = Voucher(
            address(self._signer.address), self.collector, entry.tab.cumulative, secret_hash(entry.tab.voucher_secret)
        )
        return dataclasses.replace(promise, signature=self._signer.sign_digest(promise.digest(self.domain)))

    async def _promised(self) -> int:
        """Cumulative wei of the newest voucher: by the chain, and by what the collector shows of this key's own
        signatures. A collector that shows none, or an older one, is promised less.
        """
        collected = int((await self._on_chain()).collected)
        told = await self._connected.tab(self._signer.address)
        try:
            newest = Voucher.from_message(told.newest_voucher) if told.HasField("newest_voucher") else None
        except ProtocolError:
            newest = None
        if (
            newest is None
            or (newest.requester, newest.collector) != (self._signer.address, self.collector)
            or not newest.is_signed(self.domain)
        ):
            return collected
        return max(collected, newest.cumulative)

    async def abandon(self, entry: JournalEntry) -> None:
        """Give up a ticket that was not answered: it is not charged, and does not hold up those behind it."""
        signature = self._signer.sign_digest(abandonment_digest(self.domain, RequestId(entry.request_id)))
        await self._connected.abandon(entry.request_id, signature)
        self._save(dataclasses.replace(entry, stage="concluded"))

    # -- draws

    async def show_secrets(self) -> int:
        """Hand over the secrets of vouchers whose batches are on the chain; how many the collector took."""
        told = await self._connected.tab(self._signer.address)
        return await self._show(await self._posted(), told) if told.awaited_secret_hashes else 0

    async def _show(self, posted: list[_Posted], told: tabs_pb2.GetTabResponse) -> int:
        on_chain = {item.secret_hash for batch in posted for item in batch.segments}
        wanted = on_chain.intersection(bytes(item) for item in told.awaited_secret_hashes)
        shown = [secret for key, secret in self._own_secrets().items() if key in wanted] if wanted else []
        return await self._connected.show_secrets(shown) if shown else 0

    async def follow(self, seconds: float) -> int:
        """Show secrets until no batch with a ticket of this tab waits for its draw, and see requests through that were
        opened, at most for `seconds`. Where the collector does not draw with the secrets, they are put on record, and
        count in any case. How many batches and requests still wait.
        """
        until = time.monotonic() + seconds
        while True:
            posted = await self._posted()
            await self._show(posted, await self._connected.tab(self._signer.address))
            waiting = 0
            for batch in posted:
                state = PostedState.of(await self._chain.call(TABS, "batchOf", batch.batch_id))
                if state.status is not BatchStatus.POSTED:
                    continue
                waiting += 1
                await self._record_late(batch, state)
            waiting += await self.see_through()
            if not waiting or time.monotonic() > until:
                return waiting
            await asyncio.sleep(POLL_S)

    async def challenge(self, request_id: bytes) -> str:
        """Have a delivered request judged that was not drawn, for the bond of the contract's terms; the transaction.

        InvalidRequestError unless it is in a batch whose leaves can be opened. The contract lets drawn leaves go first.
        """
        entry = self._journal.read(request_id)
        if entry.tab is None or not entry.tab.delivered:
            raise InvalidRequestError(f"request 0x{request_id.hex()} was not delivered on a tab: it has no leaf")
        number = entry.tab.number
        for batch in await self._posted():
            for place, segment in enumerate(batch.segments):
                mine = segment.requester == self._signer.address
                if not mine or not segment.first_ticket <= number < segment.first_ticket + segment.tickets:
                    continue
                ticket = CollectedTicket(self.signed_ticket(entry), _results(entry.tab))
                bond = int((await self._chain.call(TABS, "terms")).challengeBond)
                # What was signed and the number say where it belongs: no way to the root is needed.
                opening = ticket.opening(place)
                return _shown(await self._submitter.submit(TABS, "challengeLeaf", batch.shown, opening, [], value=bond))
        raise InvalidRequestError(f"ticket {number} of request 0x{request_id.hex()} is in no batch yet")

    async def see_through(self) -> int:
        """Do what is overdue of requests whose leaves were opened; how many are not over."""
        waiting = 0
        for entry in self._journal.entries():
            if entry.tab is None or not entry.tab.delivered:
                continue
            settlement = Settlement(self._chain, self._submitter, entry.request_id, _unheard, _unheard)
            standing = await settlement.standing()
            if standing.status is RequestStatus.ABSENT:
                continue
            if standing.status.is_over:
                await self._resolve(entry.request_id)
                continue
            waiting += 1
            await settlement.look(entry.secret)
        return waiting

    async def _resolve(self, request_id: bytes) -> None:
        """End a challenge of ours whose request is over: its bond comes back, or goes to the nodes."""
        if await self._chain.call(TABS, "challengerOf", request_id) == self._signer.address:
            with suppress(ContractError):  # anybody may
                await self._submitter.submit(TABS, "resolveChallenge", request_id)

    async def _record_late(self, batch: _Posted, state: PostedState) -> None:
        """Put our secret on record when two thirds of the secret window are over."""
        terms = await self._chain.call(TABS, "terms")
        now = (await self._chain.head()).timestamp
        if not state.secret_deadline - int(terms.secretWindow) // 3 < now < state.secret_deadline:
            return
        own = self._own_secrets()
        for number, segment in enumerate(batch.segments):
            secret = own.get(segment.secret_hash)
            if secret is not None:
                try:
                    await self._submitter.submit(TABS, "recordSecret", batch.shown, number, secret)
                except ContractError:
                    return  # drawn, or recorded, in between

    async def _posted(self) -> list[_Posted]:
        """Batches of the collector with a segment of this requester, from the chain."""
        head = await self._chain.head()
        events = await self._chain.events_between(
            self._deployment.first_block, head.number, contract=TABS, name="BatchPosted",
            filters={"collector": self.collector},
        )  # fmt: skip
        found = (_Posted(bytes(event.arguments["batchId"]), tuple(event.arguments["batch"])) for event in events)
        return [batch for batch in found if any(item.requester == self._signer.address for item in batch.segments)]

    def _own_secrets(self) -> dict[bytes, bytes]:
        """Secrets of all vouchers of this journal, by their hashes. A voucher that was delivered is not made anew, so
        its entry is read once.
        """
        for request_id in self._journal.request_ids():
            if request_id in self._delivered_secrets:
                continue
            entry = self._journal.read_intact(request_id)
            tab = None if entry is None else entry.tab
            if tab is not None and tab.voucher_secret:
                (self._delivered_secrets if tab.delivered else self._other_secrets)[request_id] = tab.voucher_secret
        found = {**self._other_secrets, **self._delivered_secrets}
        return {secret_hash(secret): secret for secret in found.values()}

    @property
    def _connected(self) -> CollectorConnection:
        if self._connection is None:
            raise InvalidRequestError("a request on a tab needs its collector: give the coordinator's host:port")
        return self._connection

    def _save(self, entry: JournalEntry) -> JournalEntry:
        self._journal.write(entry)
        return entry


def _results(tab: TabEntry) -> tuple[StageResult, ...]:
    """What the nodes signed, in stage order."""
    return tuple(StageResult.from_message(tabs_pb2.StageResult.FromString(item)) for item in tab.results)


def _unheard(*_: object) -> None:
    """Nobody listens."""


def _shown(receipt: Any) -> str:
    return f"0x{receipt.transaction_hash.hex()}"
