"""What can be checked of a request that was paid out of a tab, before the chain has seen it and after.

Owns the order of the checks. Promises that each one is computed here from what was signed and what the chain says, and
nothing is taken from the database but the signed messages themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from bsns.audit import Check
from bsns.chain.client import ChainClient
from bsns.protocol.identifiers import ProtocolError
from bsns.protocol.tabs import BatchStatus, CollectedBatch, CollectedTicket, PostedState, TicketGrant
from bsns.protocol.typed_data import Domain
from bsns.v1 import tabs_pb2
from coordinator.storage import BatchRecord, TicketRecord


async def ticket_checks(
    ticket: TicketRecord, batch: BatchRecord | None, chain: ChainClient, domain: Domain
) -> AsyncIterator[Check]:
    """The checks of a ticket, each as soon as it is done. Chain errors pass through."""
    grant = TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(ticket.grant))
    signed = grant.ticket
    request = "0x" + ticket.request_id.hex()
    yield _holds(
        "request id", signed.ticket.request_id(domain) == ticket.request_id, f"{request} is the digest of its ticket"
    )
    yield _passes("ticket", lambda: signed.check(domain), f"signed by the requester {signed.ticket.requester}")
    plan = await chain.call("ShardAssignments", "planOf", signed.ticket.plan_id)
    root, publisher = bytes(plan.root), str(plan.publisher)
    yield _passes(
        "route", lambda: grant.check(domain, publisher, root),
        f"{len(grant.route)} stages, each under the plan's root on the chain, signed by its publisher",
    )  # fmt: skip
    if ticket.collected is None:
        yield Check("results", ticket.state in ("taken", "abandoned"), f"none: the ticket is {ticket.state}")
        return
    collected = CollectedTicket.from_message(tabs_pb2.CollectedTicket.FromString(ticket.collected))
    yield _passes(
        "results", lambda: collected.check(domain, signed.ticket.plan_id, root),
        f"the node of each of {len(collected.results)} stages signed for {collected.output_tokens} tokens",
    )  # fmt: skip
    charge = collected.tokens * int(plan.feePerToken)
    yield _holds(
        "charge", charge == ticket.charge, f"{collected.tokens} tokens at {plan.feePerToken} wei: {charge} wei"
    )
    if batch is None or ticket.batch_id is None:
        yield Check("batch", True, "none yet: the collector posts it with others")
        return
    posted = CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(batch.message))
    yield _holds("batch", posted.batch_id(domain) == ticket.batch_id, f"0x{ticket.batch_id.hex()} is its digest")
    leaf = collected.leaf(domain)
    leaves = [item.leaf(domain) for item in posted.tickets]
    yield _holds(
        "leaf", leaf in leaves, f"0x{leaf.hex()} is under the root 0x{posted.tree(domain).root.hex()} of the batch"
    )
    state = PostedState.of(await chain.call("RequestTabs", "batchOf", ticket.batch_id))
    yield Check(
        "chain", state.status is not BatchStatus.VOID,
        "the chain does not know the batch yet" if state.status is BatchStatus.ABSENT
        else f"the batch is {state.status.name.lower()} on the chain",
    )  # fmt: skip
    if state.status in (BatchStatus.DRAWN, BatchStatus.SETTLED) and leaf in leaves:
        index = leaves.index(leaf)
        drawn = [token for token in state.offsets if posted.leaf_at(token) == index]
        yield Check(
            "draw", True,
            f"drawn {len(drawn)} times of {len(state.offsets)}: it is a request of the escrow, with a committee"
            if drawn else f"not among the {len(state.offsets)} drawn: anybody may still have challenged it",
        )  # fmt: skip


def _holds(name: str, ok: bool, detail: str) -> Check:
    return Check(name, ok, detail if ok else f"does not hold: {detail}")


def _passes(name: str, check: Callable[[], object], detail: str) -> Check:
    try:
        check()
    except ProtocolError as error:
        return Check(name, False, str(error))
    return Check(name, True, detail)
