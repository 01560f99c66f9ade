"""Pages to look at the network: requests, nodes, plans, models, slashes, blocks, and each one's records checked again.

Owns what is on a page and where a page is. Promises that everything comes from canonical blocks or signed messages,
that every list ends and says where it goes on, that whatever strangers wrote is escaped, and that a record is checked
against the chain while its reader waits, by the code that `bsns audit verify` runs. Needs no script: with one, pages
follow the chain. Shows no prompt and no answer: the gateway's own users' are nobody else's business.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Annotated, Any, Final

import jinja2
from fastapi import APIRouter, Query
from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from bsns import audit
from bsns.chain.client import ChainClient
from bsns.chain.deployment import ETHER, Deployment
from bsns.chain.errors import ChainError
from bsns.protocol.contract_states import RequestStatus, StageVerdict
from bsns.protocol.identifiers import ModelId, PlanId, ProtocolError, RequestId, address
from bsns.protocol.tabs import CollectedBatch, CollectedTicket, TicketGrant
from bsns.protocol.typed_data import tabs_domain
from bsns.v1 import tabs_pb2
from coordinator.gateway import drawings
from coordinator.gateway.drawings import SwarmLink, SwarmNode
from coordinator.gateway.errors import ApiError, too_many
from coordinator.gateway.explorer_rows import (
    BlockRow,
    ModelRow,
    NodeRow,
    PenaltyRow,
    PlanRow,
    RequestRow,
    Row,
    TicketRow,
    members_of,
    moment,
    money,
    reached,
    short,
    stages_of,
    transactions_of,
    words,
)
from coordinator.gateway.live import Live
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.settings import GatewaySettings
from coordinator.gateway.tab_checks import ticket_checks
from coordinator.network_state import UNBLAMED, AggregateKind, NodeState, PlanState, RequestState
from coordinator.storage import (
    END,
    BatchRecord,
    ExplorerQueries,
    StampedEvent,
    Storage,
    TicketRecord,
    TicketState,
)

ROWS: Final = 50
EXPORTED_ROWS: Final = 10_000
SERIES_EVENTS: Final = 5_000
SHOWN_EVENTS: Final = 200
NODES: Final = 10_000
STAKE_EVENTS: Final = ("NodeRegistered", "StakeAdded", "StakeWithdrawn", "NodeSlashed", "NodeRemoved")
# A spreadsheet takes a field that begins so for a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")

_Before = Annotated[str | None, Query(max_length=100, pattern=r"^\d+-[0-9a-fx]+$")]
_BeforeBlock = Annotated[int | None, Query(ge=0, le=2**62)]
_Status = Annotated[str | None, Query(max_length=16)]


@dataclass(frozen=True, slots=True)
class _Listing:
    """A kind of thing that is listed, and exported: the type of its rows, and the rows beyond a place, each with its
    place.
    """

    row: type[Row]
    read: Callable[[int, str | None], list[tuple[str, Row]]]


class Explorer:
    """The pages over `storage`, which a coordinator fills; `chain` is asked to check records."""

    def __init__(
        self,
        storage: Storage,
        chain: ChainClient,
        deployment: Deployment,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        live: Live,
        clock: Callable[[], float],
    ) -> None:
        self._storage, self._chain, self._deployment = storage, chain, deployment
        self._settings, self._metrics, self._live, self._clock = settings, metrics, live, clock
        self._queries = ExplorerQueries(storage)
        self._tabs = tabs_domain(deployment.chain_id, deployment.request_tabs)
        self._auditors = asyncio.Semaphore(settings.audits)
        self._waiting_audits = 0
        self._templates = _environment()
        self._drawing = threading.Lock()
        self._drawn: tuple[bytes, dict[str, Markup]] | None = None
        self._listings = self._all_listings()
        self.router = APIRouter(tags=["explorer"], default_response_class=HTMLResponse)
        for path, page in (
            ("/", self.overview),
            ("/requests", self.requests),
            ("/requests/{request_id}", self.request),
            ("/requests/{request_id}/record.json", self.record),
            ("/requests/{request_id}/verification", self.verification),
            ("/tickets", self.tickets),
            ("/batches", self.batches),
            ("/batches/{batch_id}", self.batch),
            ("/nodes", self.nodes),
            ("/nodes/{node}", self.node),
            ("/accounts/{account}", self.account),
            ("/plans", self.plans),
            ("/plans/{plan_id}", self.plan),
            ("/models", self.models),
            ("/models/{model_id}", self.model),
            ("/slashes", self.slashes),
            ("/blocks", self.blocks),
            ("/blocks/{number}", self.block),
            ("/transactions/{transaction}", self.transaction),
            ("/search", self.search),
            ("/export/{name}", self.export),
            ("/live", self.live),
            ("/static/{name}", self.static),
        ):
            self.router.add_api_route(path, page, methods=["GET"], response_class=HTMLResponse)

    # -------------------------------------------------------------------------------------------------------- overview

    async def overview(self) -> Response:
        """The network at a glance."""
        return await self._page("overview.html", self._overview)

    def _overview(self) -> dict[str, Any]:
        now = self._now()
        nodes = self._storage.nodes()
        plans = self._current_plans()
        counts = self._storage.request_counts()
        latest = self._queries.requests(8)
        return {
            "title": "Overview",
            "nodes": nodes.values(),
            "active": sum(item.status_at(now).name == "ACTIVE" for item in nodes.values()),
            "staked": sum(item.staked for item in nodes.values()),
            "slashed": sum(item.slashed for item in nodes.values()),
            "counts": {status.name.capitalize(): count for status, count in counts.items()},
            "tickets": {str(state): count for state, count in self._queries.ticket_counts().items()},
            "swarms": [(plan, self._swarm(plan, nodes, now)) for plan in plans],
            **self._network_charts(now),
            "latest": [RequestRow.of(item) for item in latest],
            "latest_tickets": [TicketRow.of(item) for item in self._queries.tickets(8)],
        }

    def _current_plans(self) -> list[PlanState]:
        """Of each model and publisher the plan in effect."""
        found: dict[tuple[bytes, str], PlanState] = {}
        now = self._now()
        for plan in sorted(self._storage.plans(), key=lambda item: item.epoch):
            if plan.effective_at <= now:
                found[plan.model_id, plan.publisher] = plan
        return list(found.values())

    def _swarm(self, plan: PlanState, nodes: Mapping[str, NodeState], now: int) -> Markup:
        stages: dict[str, list[int]] = {}
        units: dict[str, str] = {}
        for item in plan.assignments:
            stages.setdefault(item.node, []).append(item.stage)
            units[item.node] = f"{item.first_unit} to {item.end_unit - 1}"
        hops = {
            (item.measurements.node, link.node): link.round_trip_nanoseconds / 2e9
            for item in self._storage.measurements(plan.model_id).values()
            for link in item.measurements.links
        }
        taken = self._storage.topologies(plan.model_id, 1)
        clusters = dict(zip(taken[0].snapshot.nodes, taken[0].snapshot.clusters)) if taken else {}
        shown = [
            SwarmNode(
                node, state.status_at(now).name.lower(), state.staked, tuple(stages.get(node, ())),
                units.get(node, ""), clusters.get(address(node), 0),
            )
            for node, state in nodes.items()
            if node in stages or state.operator is not None
        ]  # fmt: skip
        count = plan.assignments[-1].stage + 1
        by_stage = [[item.node for item in plan.assignments if item.stage == stage] for stage in range(count)]
        links = [
            SwarmLink(source, target, hops.get((source, target)))
            for stage in range(count)
            for source in by_stage[stage]
            for target in by_stage[(stage + 1) % count]
        ]
        return drawings.swarm(shown, links, count)

    def _network_charts(self, now: int) -> dict[str, Markup]:
        """Charts of the overview, drawn once a block: every open page asks for them again with each."""
        cursor = self._storage.cursor()
        block = b"" if cursor is None else cursor.hash
        with self._drawing:
            if self._drawn is None or self._drawn[0] != block:
                charts = {
                    "throughput": self._throughput(now),
                    "stake": self._stake_chart(now),
                    "verdicts": self._verdict_chart(now),
                }
                self._drawn = block, charts
            return self._drawn[1]

    def _throughput(self, now: int) -> Markup:
        concluded = self._queries.events(SERIES_EVENTS, names=("RequestConcluded",))
        paid = self._queries.ticket_times(SERIES_EVENTS, (TicketState.DELIVERED, TicketState.BATCHED, TicketState.OVER))
        fees = {item.plan_id: item.fee_per_token for item in self._storage.plans()}
        return drawings.bars(
            "Tokens paid for",
            "tokens",
            {
                "on the chain": [
                    (block.timestamp, float(event.arguments["outputTokens"])) for event, block in concluded
                ],
                "on tabs": [(at, charge / fees[plan]) for at, charge, plan in paid if fees.get(plan)],
            },
            now=now,
        )

    def _verdict_chart(self, now: int) -> Markup:
        tallied = self._queries.events(SERIES_EVENTS, names=("StageTallied",))
        series: dict[str, list[tuple[int, float]]] = {}
        for verdict in StageVerdict:
            if verdict is not StageVerdict.NONE:
                series[words(verdict.name)] = []
        for event, block in tallied:
            name = words(StageVerdict(int(event.arguments["verdict"])).name)
            series.setdefault(name, []).append((block.timestamp, 1.0))
        return drawings.bars("Verdicts on stages", "stages", series, now=now)

    def _stake_chart(self, now: int, node: str | None = None) -> Markup:
        if node is None:
            events = self._queries.events(SERIES_EVENTS, names=STAKE_EVENTS)
        else:
            history = self._queries.history_of(AggregateKind.NODE, node, SERIES_EVENTS)
            events = [item for item in history if item[0].name in STAKE_EVENTS]
        held: dict[str, int] = {}
        points: list[tuple[int, float]] = []
        for event, block in reversed(events):
            held[event.arguments["node"]] = int(event.arguments.get("staked", 0))
            points.append((block.timestamp, sum(held.values()) / ETHER))
        title = "Stake of the network" if node is None else "Stake of the node"
        return drawings.steps(title, "ETH", points, now=now)

    # -------------------------------------------------------------------------------------------------------- requests

    async def requests(self, status: _Status = None, before: _Before = None) -> Response:
        """Requests on the chain."""
        wanted = None
        if status is not None:
            wanted = next((item for item in RequestStatus if item.name.lower() == status.lower()), None)
            if wanted is None:
                raise ApiError(400, f"there is no status {status!r:.20}", param="status")

        def read() -> dict[str, Any]:
            found = self._queries.requests(ROWS, _place(before), status=wanted)
            return {
                "title": "Requests",
                "rows": [RequestRow.of(item) for item in found],
                "status": "" if wanted is None else wanted.name.capitalize(),
                "statuses": [item.name.capitalize() for item in RequestStatus if item is not RequestStatus.ABSENT],
                "next": _next(found, _place_of_request),
            }

        return await self._page("requests.html", read)

    async def request(self, request_id: str) -> Response:
        """One request: its states, who computed what, what the committee said, where the money went."""
        identity = RequestId(_hash(request_id, "request"))
        known = await asyncio.to_thread(self._storage.request, identity)
        if known is not None:
            return await self._page("request.html", lambda: self._request(known))
        ticket = await asyncio.to_thread(self._storage.ticket, identity)
        if ticket is None:
            raise ApiError(404, f"no request {request_id:.70} is known here", code="not_found")
        return await self._page("ticket.html", lambda: self._ticket(ticket))

    def _request(self, item: RequestState) -> dict[str, Any]:
        key = "0x" + item.request_id.hex()
        history = self._queries.history_of(AggregateKind.REQUEST, key, SHOWN_EVENTS)[::-1]
        plan = self._storage.plan(item.plan_id)
        credits = [
            (event, block)
            for event, block in self._queries.events(SHOWN_EVENTS, names=("Credited",), about=key[2:])
            if event.arguments.get("requestId", event.arguments.get("source")) == item.request_id
        ][::-1]
        return {
            "title": f"Request {key[:14]}…",
            "item": item,
            "key": key,
            "states": drawings.states(reached(history), item.status.name.capitalize()),
            "plan": plan,
            "stages": stages_of(item, plan),
            "members": members_of(item),
            "credits": [
                {"account": event.arguments["account"], "amount": event.arguments["amount"], "contract": event.contract}
                for event, _ in credits
            ],
            "transactions": transactions_of(history),
            "on_tab": self._storage.ticket(item.request_id) is not None,
            "blamed": item.blamed_stage if item.blamed_stage not in (None, UNBLAMED) else None,
        }

    def _ticket(self, item: TicketRecord) -> dict[str, Any]:
        grant = TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(item.grant))
        collected = None
        if item.collected is not None:
            collected = CollectedTicket.from_message(tabs_pb2.CollectedTicket.FromString(item.collected))
        served = [result.served_by for result in collected.results] if collected else list(grant.route)
        return {
            "title": f"Request 0x{item.request_id.hex()[:12]}…",
            "item": item,
            "key": "0x" + item.request_id.hex(),
            "ticket": grant.ticket.ticket,
            "collected": collected,
            "stages": [
                {
                    "stage": stage.assignment.stage,
                    "units": f"{stage.assignment.first_unit} to {stage.assignment.end_unit - 1}",
                    "node": stage.assignment.node,
                    "commitment": collected.results[number].commitment if collected else None,
                }
                for number, stage in enumerate(served)
            ],
        }

    async def record(self, request_id: str) -> Response:
        """The verification record of a request on the chain, as `bsns audit export` writes it."""
        identity = _hash(request_id, "request")
        async with self._auditing():
            try:
                record = await audit.export(self._chain, self._deployment, identity)
            except audit.AuditError as error:
                raise ApiError(404, str(error), code="not_found") from error
        name = f"record-{request_id[:14]}.json"
        return Response(
            record.to_bytes(), media_type="application/json",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )  # fmt: skip

    async def verification(self, request_id: str) -> Response:
        """The record of a request, made from the chain now and checked in front of the reader, check by check."""
        identity = RequestId(_hash(request_id, "request"))
        request = await asyncio.to_thread(self._storage.request, identity)
        ticket = await asyncio.to_thread(self._storage.ticket, identity)
        if request is None and ticket is None:
            raise ApiError(404, f"no request {request_id:.70} is known here", code="not_found")
        head, tail = await asyncio.to_thread(self._verification_frame, identity, request is not None)

        async def lines() -> AsyncIterator[str]:
            yield head
            passed = failed = 0
            note = ""
            try:
                async with self._auditing(), asyncio.timeout(self._settings.audit_seconds):
                    async for check in self._checks(identity, request is not None, ticket):
                        passed, failed = passed + check.ok, failed + (not check.ok)
                        yield self._templates.get_template("check.html").render(check=check)
            except (ChainError, audit.AuditError, ProtocolError, ApiError) as error:
                note = f"The chain could not be asked any further: {error}. That says nothing about the request."
            except TimeoutError:
                note = f"Not all checks were done within {self._settings.audit_seconds:.0f} s."
            outcome = "failed" if failed else "unfinished" if note else "passed"
            self._metrics.audits.labels(outcome).inc()
            yield self._templates.get_template("checked.html").render(
                passed=passed, failed=failed, note=note, outcome=outcome
            )
            yield tail

        return StreamingResponse(lines(), media_type="text/html", headers={"X-Accel-Buffering": "no"})

    def _verification_frame(self, identity: RequestId, on_chain: bool) -> tuple[str, str]:
        context = {"title": "Verification", "key": "0x" + identity.hex(), "on_chain": on_chain, **self._common()}
        head, tail = self._templates.get_template("verification.html").render(**context).split("<!--checks-->")
        return head, tail

    async def _checks(
        self, identity: RequestId, on_chain: bool, ticket: TicketRecord | None
    ) -> AsyncIterator[audit.Check]:
        if on_chain:
            record = await audit.export(self._chain, self._deployment, identity)
            shown = f"{len(record.to_bytes())} bytes as of block {record.as_of.number}, built from the chain just now"
            yield audit.Check("record", True, shown)
            async for check in audit.checks(record, self._chain, self._deployment):
                yield check
        if ticket is not None:
            batch = None
            if ticket.batch_id is not None:
                batch = await asyncio.to_thread(self._queries.batch, ticket.batch_id)
            async for check in ticket_checks(ticket, batch, self._chain, self._tabs):
                yield check

    @asynccontextmanager
    async def _auditing(self) -> AsyncIterator[None]:
        """One of the few audits at once; whoever would wait behind as many others is told to come back."""
        if self._waiting_audits >= 4 * self._settings.audits:
            raise too_many("as many records as this gateway checks at once are being checked: try again in a moment")
        self._waiting_audits += 1
        try:
            async with self._auditors:
                yield
        finally:
            self._waiting_audits -= 1

    async def tickets(self, before: _Before = None) -> Response:
        """Requests on tabs of this coordinator."""

        def read() -> dict[str, Any]:
            found = self._queries.tickets(ROWS, _place(before))
            rows = [TicketRow.of(item) for item in found]
            return {"title": "Requests on tabs", "rows": rows, "next": _next(found, _place_of_ticket)}

        return await self._page("tickets.html", read)

    async def batches(self, before: _Before = None) -> Response:
        """Batches of requests on tabs."""

        def read() -> dict[str, Any]:
            found = self._queries.batches(ROWS, _place(before))
            place = _next(found, lambda item: f"{item.changed_at}-0x{item.batch_id.hex()}")
            return {"title": "Batches", "rows": [(item, _content(item)) for item in found], "next": place}

        return await self._page("batches.html", read)

    async def batch(self, batch_id: str) -> Response:
        """One batch: whose requests it has, and who is paid what."""
        identity = _hash(batch_id, "batch")
        item = await asyncio.to_thread(self._queries.batch, identity)
        if item is None:
            raise ApiError(404, f"no batch {batch_id:.70} is known here", code="not_found")

        def read() -> dict[str, Any]:
            content = _content(item)
            tickets = self._queries.tickets(SHOWN_EVENTS, batch=identity)
            return {
                "title": f"Batch 0x{identity.hex()[:12]}…",
                "item": item,
                "content": content,
                "root": content.tree(self._tabs).root,
                "tickets": [TicketRow.of(ticket) for ticket in tickets],
            }

        return await self._page("batch.html", read)

    # -------------------------------------------------------------------------------------------------- nodes, accounts

    async def nodes(self) -> Response:
        """All nodes."""
        return await self._page(
            "nodes.html",
            lambda: {"title": "Nodes", "rows": [row for _, row in self._listings["nodes"].read(NODES, None)]},
        )

    async def node(self, node: str) -> Response:
        """One node: its stake as it changed, what it serves, what it did, what it was punished for."""
        who = _address(node)
        state = await asyncio.to_thread(self._storage.node, who)
        if state is None:
            raise ApiError(404, f"no node {node:.60} is known here", code="not_found")

        def read() -> dict[str, Any]:
            now = self._now()
            history = self._queries.history_of(AggregateKind.NODE, who, SHOWN_EVENTS)
            work = self._queries.events(
                SHOWN_EVENTS, names=("StageCommitted", "AttestationCommitted", "StageReplaced"), about=who
            )
            return {
                "title": f"Node {who[:10]}…",
                "item": state,
                "status": state.status_at(now).name.lower(),
                "stake_chart": self._stake_chart(now, who),
                "plans": self._queries.plans(8, node=who),
                "history": history,
                "faults": [item for item in history if item[0].name in ("NodeSlashed", "NodeJailed")],
                "work": work,
                "now": now,
            }

        return await self._page("node.html", read)

    async def account(self, account: str) -> Response:
        """What an address asked, operates and collects."""
        who = _address(account)
        if await asyncio.to_thread(self._storage.node, who) is not None:
            return RedirectResponse(f"/nodes/{who}", 307)

        def read() -> dict[str, Any]:
            operated = [item for item in self._storage.nodes().values() if item.operator == who]
            return {
                "title": f"Account {who[:10]}…",
                "account": who,
                "nodes": operated,
                "requests": [RequestRow.of(item) for item in self._queries.requests(ROWS, requester=who)],
                "tickets": [TicketRow.of(item) for item in self._queries.tickets(ROWS, requester=who)],
                "events": self._queries.events(ROWS, names=("Credited", "CreditWithdrawn"), about=who),
            }

        return await self._page("account.html", read)

    async def slashes(self, before: _Before = None) -> Response:
        """Stake that was taken, and why."""

        def read() -> dict[str, Any]:
            found = self._queries.events(ROWS, _event_place(before), names=("NodeSlashed", "NodeJailed"))
            return {
                "title": "Slashes",
                "rows": [PenaltyRow.of(*item) for item in found],
                "next": _next(found, _place_of_event),
            }

        return await self._page("slashes.html", read)

    # --------------------------------------------------------------------------------------------------- plans, models

    async def plans(self) -> Response:
        """Plans, the newest first."""

        def read() -> dict[str, Any]:
            current = {item.plan_id for item in self._current_plans()}
            return {"title": "Plans", "rows": self._queries.plans(ROWS), "current": current}

        return await self._page("plans.html", read)

    async def plan(self, plan_id: str) -> Response:
        """One plan: which node has which units."""
        item = await asyncio.to_thread(self._storage.plan, PlanId(_hash(plan_id, "plan")))
        if item is None:
            raise ApiError(404, f"no plan {plan_id:.70} is known here", code="not_found")

        def read() -> dict[str, Any]:
            model = self._storage.model(item.model_id)
            return {
                "title": f"Plan 0x{item.plan_id.hex()[:12]}…",
                "item": item,
                "model": model,
                "swarm": self._swarm(item, self._storage.nodes(), self._now()),
                "requests": [RequestRow.of(row) for row in self._queries.requests(20, plan=item.plan_id)],
                "has_record": self._storage.planning_record(item.measurements_hash) is not None,
            }

        return await self._page("plan.html", read)

    async def models(self) -> Response:
        """Models that were registered."""
        return await self._page("models.html", lambda: {"title": "Models", "rows": self._queries.models(ROWS)})

    async def model(self, model_id: str) -> Response:
        """One model and its plans."""
        item = await asyncio.to_thread(self._storage.model, ModelId(_hash(model_id, "model")))
        if item is None:
            raise ApiError(404, f"no model {model_id:.70} is known here", code="not_found")
        return await self._page(
            "model.html",
            lambda: {"title": "Model", "item": item, "plans": self._queries.plans(ROWS, model=item.model_id)},
        )

    # ---------------------------------------------------------------------------------------------------------- blocks

    async def blocks(self, before: _BeforeBlock = None, quiet: bool = False) -> Response:
        """Blocks with events of the contracts; with `quiet` also those without, as far as they are kept."""

        def read() -> dict[str, Any]:
            found = self._queries.blocks(ROWS, before, with_events=not quiet)
            place = str(found[-1].block.number) if len(found) == ROWS else None
            return {"title": "Blocks", "rows": found, "quiet": quiet, "next": place}

        return await self._page("blocks.html", read)

    async def block(self, number: str) -> Response:
        """One block and its events."""
        if not number.isascii() or not number.isdigit() or len(number) > 18:
            raise ApiError(404, f"{number!r:.30} is no block number", code="not_found")

        def read() -> dict[str, Any]:
            found = self._queries.events_of_block(int(number))
            block = found[0][1] if found else self._storage.block_at(int(number))
            if block is None:
                raise ApiError(
                    404, f"block {number} is not kept here: it is above the head, or old and without events",
                    code="not_found",
                )  # fmt: skip
            return {"title": f"Block {number}", "item": block, "events": found}

        return await self._page("block.html", read)

    async def transaction(self, transaction: str) -> Response:
        """What a transaction did to the contracts."""
        digest = _hash(transaction, "transaction")

        def read() -> dict[str, Any]:
            found = self._queries.events_of_transaction(digest)
            if not found:
                raise ApiError(
                    404, f"transaction {transaction:.70} is not known to have touched the contracts", code="not_found"
                )
            return {"title": "Transaction", "key": transaction, "item": found[0][1], "events": found}

        return await self._page("transaction.html", read)

    # ---------------------------------------------------------------------------------------------------------- search

    async def search(self, q: Annotated[str, Query(max_length=200)] = "") -> Response:
        """An address, a hash, a block number, or the name of a model."""
        text = q.strip()
        target = await asyncio.to_thread(self._target, text) if text else "/"
        if target is not None:
            return RedirectResponse(target, 303)
        response = await self._page("nothing.html", lambda: {"title": "Nothing found", "query": text})
        response.status_code = 404
        return response

    def _target(self, text: str) -> str | None:
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return f"/blocks/{text}"
        digits = text.lower().removeprefix("0x")
        is_hex = all(character in "0123456789abcdef" for character in digits)
        if is_hex and len(digits) == 40:
            return f"/accounts/{address('0x' + digits)}"
        if is_hex and len(digits) == 64:
            return self._target_of_hash(bytes.fromhex(digits))
        for model in self._queries.models(ROWS):
            if text.lower() in model.name.lower():
                return f"/models/0x{model.model_id.hex()}"
        return None

    def _target_of_hash(self, digest: bytes) -> str | None:
        shown = "0x" + digest.hex()
        if self._storage.request(RequestId(digest)) or self._storage.ticket(RequestId(digest)):
            return f"/requests/{shown}"
        if self._storage.plan(PlanId(digest)):
            return f"/plans/{shown}"
        if self._storage.model(ModelId(digest)):
            return f"/models/{shown}"
        if self._queries.batch(digest):
            return f"/batches/{shown}"
        block = self._queries.block_of_hash(digest)
        if block is not None:
            return f"/blocks/{block.number}"
        return f"/transactions/{shown}" if self._queries.events_of_transaction(digest) else None

    # ---------------------------------------------------------------------------------------------------------- export

    async def export(self, name: str) -> Response:
        """A list as JSON or CSV: NAME.json, NAME.csv; the newest rows, at most `EXPORTED_ROWS`."""
        kind, _, form = name.rpartition(".")
        listing = self._listings.get(kind)
        if listing is None or form not in ("json", "csv"):
            names = ", ".join(self._listings)
            raise ApiError(404, f"there is no list {name!r:.40}: ask for one of {names}, as .json or .csv")
        media = "application/json" if form == "json" else "text/csv; charset=utf-8"
        return StreamingResponse(
            _exported(listing, form), media_type=media,
            headers={"Content-Disposition": f'attachment; filename="{kind}.{form}"'},
        )  # fmt: skip

    def _all_listings(self) -> dict[str, _Listing]:
        queries = self._queries

        def requests(limit: int, place: str | None) -> list[tuple[str, Row]]:
            found = queries.requests(limit, _place(place))
            return [(_place_of_request(item), RequestRow.of(item)) for item in found]

        def tickets(limit: int, place: str | None) -> list[tuple[str, Row]]:
            found = queries.tickets(limit, _place(place))
            return [(_place_of_ticket(item), TicketRow.of(item)) for item in found]

        def nodes(_limit: int, place: str | None) -> list[tuple[str, Row]]:
            now = self._now()
            found = [] if place else self._storage.nodes().values()
            return [("all", NodeRow.of(item, now)) for item in sorted(found, key=lambda item: -item.staked)]

        def plans(limit: int, place: str | None) -> list[tuple[str, Row]]:
            return [] if place else [("all", PlanRow.of(item)) for item in queries.plans(limit)]

        def models(limit: int, place: str | None) -> list[tuple[str, Row]]:
            return [] if place else [("all", ModelRow.of(item)) for item in queries.models(limit)]

        def slashes(limit: int, place: str | None) -> list[tuple[str, Row]]:
            found = queries.events(limit, _event_place(place), names=("NodeSlashed", "NodeJailed"))
            return [(_place_of_event(item), PenaltyRow.of(*item)) for item in found]

        def blocks(limit: int, place: str | None) -> list[tuple[str, Row]]:
            found = queries.blocks(limit, None if place is None else int(place), with_events=True)
            return [(str(item.block.number), BlockRow.of(item.block, item.events)) for item in found]

        return {
            "requests": _Listing(RequestRow, requests),
            "tickets": _Listing(TicketRow, tickets),
            "nodes": _Listing(NodeRow, nodes),
            "plans": _Listing(PlanRow, plans),
            "models": _Listing(ModelRow, models),
            "slashes": _Listing(PenaltyRow, slashes),
            "blocks": _Listing(BlockRow, blocks),
        }

    # ------------------------------------------------------------------------------------------------------------ rest

    async def live(self) -> Response:
        """Server-sent events: a line a block."""
        viewer = self._live.join()
        if viewer is None:
            raise too_many("as many pages are told about changes as this gateway tells: reload by hand", 30)
        return StreamingResponse(
            viewer.lines(), media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )  # fmt: skip

    async def static(self, name: str) -> Response:
        """Stylesheet and script."""
        kind = _STATIC.get(name)
        if kind is None:
            raise ApiError(404, "there is no such file", code="not_found")
        content = files("coordinator.gateway").joinpath("static", name).read_bytes()
        return Response(content, media_type=kind, headers={"Cache-Control": "public, max-age=300"})

    async def _page(self, template: str, read: Callable[[], dict[str, Any]]) -> Response:
        def made() -> str:
            return self._templates.get_template(template).render(**{**self._common(), **read()})

        return HTMLResponse(await asyncio.to_thread(made))

    def _common(self) -> dict[str, Any]:
        cursor = self._storage.cursor()
        return {
            "cursor": cursor,
            "chain_id": self._deployment.chain_id,
            "contracts": self._deployment.contracts,
            "now": self._now(),
        }

    def _now(self) -> int:
        """The later of this machine's clock and the last block's."""
        cursor = self._storage.cursor()
        return max(int(self._clock()), 0 if cursor is None else cursor.timestamp)


_STATIC: Final = {
    "explorer.css": "text/css; charset=utf-8",
    "explorer.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


# ------------------------------------------------------------------------------------------------------------ addresses


def _hash(text: str, what: str) -> bytes:
    """32 bytes of a path; ApiError 404 if they are none: no such thing is there."""
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ApiError(404, f"{text!r:.80} is no {what}: 0x and 64 hexadecimal digits", code="not_found")
    return value


def _address(text: str) -> str:
    try:
        return address(text)
    except ProtocolError as error:
        raise ApiError(404, f"{text!r:.60} is no address: 0x and 40 hexadecimal digits", code="not_found") from error


def _content(item: BatchRecord) -> CollectedBatch:
    return CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(item.message))


def _place(text: str | None) -> tuple[int, str] | None:
    """Where a list goes on: a number, and the id among those with the same."""
    if text is None:
        return None
    number, _, key = text.partition("-")
    return min(int(number), 2**62), key


def _event_place(text: str | None) -> tuple[int, int]:
    if text is None:
        return END
    number, _, index = text.partition("-")
    return min(int(number), 2**62), min(int(index), 2**30) if index.isdigit() else 0


def _next(found: Sequence[Any], place: Callable[[Any], str]) -> str | None:
    return place(found[-1]) if len(found) == ROWS else None


def _place_of_request(item: RequestState) -> str:
    return f"{item.opened_block}-0x{item.request_id.hex()}"


def _place_of_ticket(item: TicketRecord) -> str:
    return f"{item.changed_at}-0x{item.request_id.hex()}"


def _place_of_event(item: StampedEvent) -> str:
    return f"{item[0].block_number}-{item[0].log_index}"


# -------------------------------------------------------------------------------------------------------------- export


async def _exported(listing: _Listing, form: str) -> AsyncIterator[str]:
    columns = [field.name for field in fields(listing.row)]
    place: str | None = None
    count = 0
    yield "[" if form == "json" else _csv([columns])
    while count < EXPORTED_ROWS:
        found = await asyncio.to_thread(listing.read, min(ROWS * 10, EXPORTED_ROWS - count), place)
        if not found:
            break
        rows = [asdict(row) for _, row in found]
        if form == "json":
            text = ",\n".join(json.dumps(_exact(row), ensure_ascii=False) for row in rows)
            yield f",\n{text}" if count else text
        else:
            yield _csv([[_field(row[name]) for name in columns] for row in rows])
        count += len(found)
        place = found[-1][0]
    if form == "json":
        yield "]\n"


def _exact(row: Mapping[str, Any]) -> dict[str, Any]:
    """Wei as text: JSON's numbers are exact only up to 2^53."""
    return {name: str(value) if name.endswith("_wei") else value for name, value in row.items()}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue()


def _field(value: Any) -> str:
    text = "" if value is None else str(value)
    # What a stranger wrote must not become a formula; a negative number of ours may.
    return f"'{text}" if text.startswith(_FORMULA) and not isinstance(value, int) else text


# ----------------------------------------------------------------------------------------------------------- templates


def error_page(error: ApiError) -> Response:
    """What a person sees in place of an ApiError."""
    heading = {404: "Not found", 429: "Too many requests", 400: "That cannot be shown"}.get(error.status, "Not now")
    page = _environment().get_template("failed.html").render(heading=heading, message=error.message)
    return HTMLResponse(page, error.status, error.headers)


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("coordinator.gateway"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(money=money, moment=moment, short=short, words=words, arguments=_arguments)
    return made


def _arguments(event: Any) -> list[tuple[str, str]]:
    """Arguments of an event as text, long ones cut."""
    shown = []
    for name, value in event.arguments.items():
        text = "0x" + value.hex() if isinstance(value, bytes) else str(value)
        shown.append((name, text if len(text) <= 200 else f"{text[:200]}…"))
    return shown
