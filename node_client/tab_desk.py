"""What a node does for requests that are paid out of a tab (contracts/RequestTabs.sol): serve what their collector has
taken, sign what it committed to, agree to batches, and see them through where the collector does not.

Owns the grants and batches of this node, which are in the evidence store. Promises that nothing is served that the
plan's publisher has not taken and the requester's tab does not hold money for; that one result is ever signed for a
stage, by the guard that also keeps commitments; that a batch is signed only if all its leaves can be opened by what is
on this disk, this node's own part in it is complete and its share right; and that what a drawn leaf would need of this
node is kept until no leaf of it can be opened any more. Does not collect: that is the coordinator's.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple

import structlog
from eth_typing import ChecksumAddress

from bsns.chain.errors import ContractError, TransactionFailedError
from bsns.chain.signer import Signer
from bsns.chain.submitter import Submitter
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ZERO_HASH, ProtocolError, RequestId, address
from bsns.protocol.tabs import (
    BatchStatus,
    CollectedBatch,
    PostedState,
    TicketGrant,
    due_calls,
    stage_result_digest,
)
from bsns.v1 import coordination_pb2, execution_pb2, tabs_pb2
from node_client.chain_view import ChainView, RequestView, SigningDomains, StageView
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import EvidenceStore
from node_client.settings import NodeSettings
from node_client.signing_guard import DutyKind, SigningGuard

log = structlog.get_logger(__name__)

TABS: Final = "RequestTabs"
_REFUSAL_LENGTH: Final = 512


class _Terms(NamedTuple):
    """Of the contracts; windows in seconds."""

    maximum_tokens: int
    protocol_fee_bps: int
    opening_window: int
    longest_batch: int


class TabDesk:
    """One node's tabs business."""

    def __init__(
        self,
        settings: NodeSettings,
        signer: Signer,
        domains: SigningDomains,
        chain: ChainView,
        submitter: Submitter,
        evidence: EvidenceStore,
        guard: SigningGuard,
    ) -> None:
        self._settings, self._signer, self._domain = settings, signer, domains.tabs
        self._chain, self._submitter, self._evidence, self._guard = chain, submitter, evidence, guard
        self._terms: _Terms | None = None
        for document in evidence.grants():
            self._remember(TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(document)))

    # -- requests

    async def admit(self, request_id: bytes, message: tabs_pb2.TicketGrant) -> None:
        """Let sessions of a request open that is not on the chain; Refusal with the reason otherwise. Harmless for one
        that is admitted already.
        """
        if self._chain.is_granted(request_id):
            return
        try:
            grant = TicketGrant.from_message(message)
        except ProtocolError as error:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, f"not a grant: {error}") from error
        ticket = grant.ticket.ticket
        plan = await self._chain.plan(ticket.plan_id)
        publisher = address(plan.publisher)
        try:
            found = grant.check(self._domain, publisher, bytes(plan.root))
        except ProtocolError as error:
            raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, f"the grant does not hold: {error}") from error
        if found != request_id:
            raise Refusal(ErrorReason.ERROR_REASON_WRONG_PLAN, "the ticket is that of another request")
        await self._check_cover(grant, publisher, int(plan.feePerToken))
        await asyncio.to_thread(self._evidence.save_grant, request_id, grant.to_message().SerializeToString())
        self._remember(grant)

    async def _check_cover(self, grant: TicketGrant, publisher: ChecksumAddress, fee_per_token: int) -> None:
        """Refusal unless the tab holds the fee, and the leaf could be opened."""
        ticket = grant.ticket.ticket
        most = (await self._terms_of()).maximum_tokens
        if not 0 < ticket.prompt_tokens <= most or not 0 < ticket.maximum_tokens <= most:
            raise Refusal(
                ErrorReason.ERROR_REASON_NOT_COVERED, f"prompt and answer have 1 to {most} tokens each by the escrow"
            )
        if ZERO_HASH in (ticket.input_commitment, ticket.secret_hash):
            raise Refusal(ErrorReason.ERROR_REASON_NOT_COVERED, "the ticket lacks a commitment or a secret hash")
        head = await self._chain.head()
        if head.timestamp > ticket.deadline:
            raise Refusal(ErrorReason.ERROR_REASON_NOT_COVERED, "the ticket's deadline is over: sign a new one")
        tab = await self._chain.client.call(TABS, "tabOf", ticket.requester, publisher)
        needed = (ticket.prompt_tokens + ticket.maximum_tokens) * fee_per_token
        if int(tab.closesAt) or int(tab.balance) < needed:
            state = "is closing" if int(tab.closesAt) else f"holds {tab.balance} wei"
            raise Refusal(
                ErrorReason.ERROR_REASON_NOT_COVERED,
                f"the tab of {ticket.requester} {state}, the request may cost {needed}: fund it",
            )
        if ticket.number < int(tab.tickets):
            raise Refusal(
                ErrorReason.ERROR_REASON_TICKET_OUT_OF_ORDER,
                f"ticket {ticket.number} was used: the next is {tab.tickets}",
            )

    def _remember(self, grant: TicketGrant) -> None:
        ticket = grant.ticket.ticket
        view = RequestView(
            ticket.requester,
            RequestStatus.ROUTED,
            len(grant.route),
            ticket.deadline,
            ticket.prompt_tokens,
            ticket.maximum_tokens,
            ticket.plan_id,
            ticket.input_commitment,
            granted=True,
        )
        stages = tuple(
            StageView(item.node, item.first_unit, item.end_unit, item.execution_class)
            for item in (stage.assignment for stage in grant.route)
        )
        self._chain.grant(ticket.request_id(self._domain), view, stages)

    async def sign_result(self, request_id: bytes, stage: int) -> execution_pb2.GetStageResultResponse:
        """What this node committed to for a stage that it has done; Refusal if it has not, or is paid on the chain."""
        if not self._chain.is_granted(request_id):
            raise Refusal(
                ErrorReason.ERROR_REASON_REQUEST_NOT_ROUTED, "the request is not paid out of a tab: the chain says more"
            )
        recorded = await asyncio.to_thread(self._evidence.sealed_stage, request_id, stage)
        if recorded is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the stage has not come to its end here; ask again"
            )
        commitment = recorded.result.commitment(request_id, 0, stage, self._signer.address)
        await asyncio.to_thread(self._guard.permit, DutyKind.COMMITMENT, request_id, stage, 0, commitment)
        tokens = recorded.result.output_tokens
        digest = stage_result_digest(self._domain, RequestId(request_id), stage, commitment, tokens)
        return execution_pb2.GetStageResultResponse(
            commitment=commitment, output_tokens=tokens, signature=self._signer.sign_digest(digest)
        )

    # -- batches

    async def consider(self, message: tabs_pb2.TicketBatch) -> coordination_pb2.BatchConsent:
        """A signed consent to a batch, or one that says why it is refused."""
        consent = coordination_pb2.BatchConsent()
        try:
            batch = CollectedBatch.from_message(message)
            batch_id = await asyncio.to_thread(batch.batch_id, self._domain)
            consent.batch_id = batch_id
            await self._check_batch(batch)
            await asyncio.to_thread(self._evidence.save_batch, batch_id, message.SerializeToString())
            consent.signature = self._signer.sign_digest(batch_id)
            log.info("batch_consented", batch=batch_id.hex(), tickets=len(batch.tickets))
        except (ProtocolError, ContractError) as error:
            consent.refusal = str(error)[:_REFUSAL_LENGTH]
            log.warning("batch_refused", refusal=consent.refusal)
        return consent

    async def _check_batch(self, batch: CollectedBatch) -> None:
        """ProtocolError unless this node may sign the batch."""
        plan = await self._chain.plan(batch.plan_id)
        if (address(plan.publisher), int(plan.feePerToken)) != (batch.collector, batch.fee_per_token):
            raise ProtocolError("collector or fee is not that of the plan")
        terms = await self._terms_of()
        await asyncio.to_thread(batch.check, self._domain, bytes(plan.root), terms.protocol_fee_bps)
        for item in batch.tickets:
            request = item.ticket.ticket.request_id(self._domain)
            for stage, result in enumerate(item.results):
                if result.served_by.assignment.node != self._signer.address:
                    continue
                recorded = await asyncio.to_thread(self._evidence.sealed_stage, bytes(request), stage)
                if recorded is None or result.commitment != recorded.result.commitment(
                    request, 0, stage, self._signer.address
                ):
                    raise ProtocolError(
                        f"stage {stage} of request 0x{request.hex()} is not on record here as it stands"
                    )
        for segment in batch.segments:
            tab = await self._chain.client.call(TABS, "tabOf", segment.requester, batch.collector)
            due = int(tab.collected) + segment.tokens * batch.fee_per_token
            if segment.cumulative < due or int(tab.balance) < segment.tokens * batch.fee_per_token:
                raise ProtocolError(f"voucher or tab of {segment.requester} does not cover its {segment.tokens} tokens")

    async def batch_duty(self, batch_id: bytes) -> int:
        """See a batch through that this node has a share of; returns the block time from which to look again."""
        head = await self._chain.head()
        patience = self._settings.batch_patience_seconds
        state = PostedState.of(await self._chain.client.call(TABS, "batchOf", batch_id))
        batch = await asyncio.to_thread(self._batch, batch_id)
        if state.status.is_over or (state.status is BatchStatus.ABSENT and head.timestamp > batch.deadline + patience):
            await asyncio.to_thread(self._end_batch, batch_id, batch, posted=state.status.is_over)
            return head.timestamp + patience
        terms = await self._terms_of()
        for call in due_calls(
            batch, self._domain, state, {}, now=head.timestamp, head_number=head.number,
            opening_window=terms.opening_window, patience=patience,
        ):  # fmt: skip
            try:
                receipt = await self._submitter.submit(
                    TABS, call.function, *call.arguments, timeout_s=self._settings.transaction_timeout_seconds
                )
                log.warning("batch_seen_through", batch=batch_id.hex(), call=call.function, gas=receipt.gas_used)
            except (ContractError, TransactionFailedError) as error:
                # Somebody else was first.
                log.info("batch_call_not_needed", batch=batch_id.hex(), call=call.function, detail=str(error))
        return head.timestamp + max(1, patience // 4)

    def _batch(self, batch_id: bytes) -> CollectedBatch:
        document = self._evidence.batch(batch_id)
        return CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(document))

    def _end_batch(self, batch_id: bytes, batch: CollectedBatch, *, posted: bool) -> None:
        """No leaf of it can be opened any more; of one that was never posted the tickets may be in another."""
        requests = [bytes(item.ticket.ticket.request_id(self._domain)) for item in batch.tickets] if posted else []
        self._evidence.end_batch(batch_id, requests)

    async def ticket_duty(self, request_id: bytes, deadline: int) -> int | None:
        """Whether the evidence of a request that is on no chain is still needed: block time from which to look again,
        None if it is not.
        """
        now = (await self._chain.head()).timestamp
        if await asyncio.to_thread(self._evidence.is_batch_over, request_id):
            return None
        longest = (await self._terms_of()).longest_batch
        return None if now > deadline + longest else now + max(1, self._settings.batch_patience_seconds // 4)

    async def _terms_of(self) -> _Terms:
        if self._terms is None:
            call: Any = self._chain.client.call
            escrow, tabs = await call("InferenceEscrow", "terms"), await call(TABS, "terms")
            longest = int(await call(TABS, "longestBatch"))
            self._terms = _Terms(
                int(escrow.maximumTokens), int(escrow.protocolFeeBps), int(tabs.openingWindow), longest
            )
        return self._terms
