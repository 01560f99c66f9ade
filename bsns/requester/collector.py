"""The collector of a tab, as a requester calls it: the coordinator whose plan is paid for.

Owns the connection and what a refusal means. Promises that off loopback the collector shows the certificate that the
requester was given. Believes nothing: what a collector says is checked by `bsns.requester.client` against signatures
and the chain.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from bsns.protocol.endpoints import is_loopback
from bsns.protocol.identifiers import RequestId
from bsns.protocol.tabs import SignedTicket, StageResult, Voucher
from bsns.requester.errors import InvalidRequestError, TicketRefusedError, UnavailableError
from bsns.requester.node_connection import CHANNEL_OPTIONS, explain_refusal
from bsns.v1 import tabs_pb2, tabs_pb2_grpc

CALL_SECONDS: Final = 30.0
_T = TypeVar("_T")


class CollectorConnection:
    """Calls of one collector at `endpoint` (host:port). `certificate`: PEM file, needed off loopback."""

    def __init__(self, endpoint: str, certificate: Path | None = None) -> None:
        try:
            local = is_loopback(endpoint)
        except ValueError as error:
            raise InvalidRequestError(f"{endpoint!r} is not host:port: give the coordinator's") from error
        if certificate is None and not local:
            raise InvalidRequestError(f"{endpoint} is not on loopback: give the coordinator's certificate (PEM)")
        if certificate is None:
            self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        else:
            try:
                credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
            except OSError as error:
                raise InvalidRequestError(f"the certificate {certificate} cannot be read: {error}") from error
            self._channel = grpc.aio.secure_channel(endpoint, credentials, options=CHANNEL_OPTIONS)
        self._endpoint = endpoint
        self._stub: Any = tabs_pb2_grpc.RequestCollectionStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def tab(self, requester: str) -> tabs_pb2.GetTabResponse:
        request = tabs_pb2.GetTabRequest(requester=bytes.fromhex(requester[2:]))
        return await self._answer(self._stub.GetTab(request, timeout=CALL_SECONDS))

    async def take(self, ticket: SignedTicket, avoid: Iterable[str]) -> tabs_pb2.TicketGrant:
        request = tabs_pb2.TakeTicketRequest(
            ticket=ticket.to_message(), avoid=[bytes.fromhex(node[2:]) for node in sorted(avoid)]
        )
        found: tabs_pb2.TakeTicketResponse = await self._answer(self._stub.TakeTicket(request, timeout=CALL_SECONDS))
        return found.grant

    async def deliver(self, request_id: RequestId, results: Sequence[StageResult], voucher: Voucher) -> None:
        request = tabs_pb2.DeliverResultsRequest(
            request_id=request_id, results=[item.to_message() for item in results], voucher=voucher.to_message()
        )
        await self._answer(self._stub.DeliverResults(request, timeout=CALL_SECONDS))

    async def abandon(self, request_id: RequestId, signature: bytes) -> None:
        request = tabs_pb2.AbandonTicketRequest(request_id=request_id, signature=signature)
        await self._answer(self._stub.AbandonTicket(request, timeout=CALL_SECONDS))

    async def show_secrets(self, secrets: Sequence[bytes]) -> int:
        request = tabs_pb2.ShowSecretsRequest(secrets=secrets)
        found = await self._answer(self._stub.ShowSecrets(request, timeout=CALL_SECONDS))
        return int(found.taken)

    async def _answer(self, call: Awaitable[_T]) -> _T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            reason, detail = explain_refusal(error)
            if reason.startswith("ERROR_REASON_") and error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise TicketRefusedError(f"the collector refused: {detail}", reason) from error
            raise UnavailableError(
                f"the collector at {self._endpoint} cannot be asked ({detail}): try again later"
            ) from error
