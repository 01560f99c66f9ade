"""The gRPC service of the collector: what requesters with a tab call (coordinator.tab_collector decides).

Promises that every refusal names its reason, that nothing a caller sends ends the process, and that no call is made
while the coordinator does not follow the chain.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog

from bsns.chain.errors import ChainError
from bsns.protocol.identifiers import BYTES32, ProtocolError, RequestId, address
from bsns.v1 import tabs_pb2, tabs_pb2_grpc
from coordinator.refusals import Refusal, abort, invalid
from coordinator.storage import StorageError
from coordinator.tab_collector import TabCollector

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)
MAXIMUM_AVOIDED = 64


class RequestCollectionServicer(tabs_pb2_grpc.RequestCollectionServicer):
    """Serves RequestCollection. `not_synced_because`: why the state is not current (or None)."""

    def __init__(self, collector: TabCollector, not_synced_because: Callable[[], str | None]) -> None:
        self._collector, self._not_synced_because = collector, not_synced_because

    async def GetTab(self, request: tabs_pb2.GetTabRequest, context: Any) -> tabs_pb2.GetTabResponse:
        return await self._answered(context, lambda: self._collector.tab(_account(request.requester)))

    async def TakeTicket(self, request: tabs_pb2.TakeTicketRequest, context: Any) -> tabs_pb2.TakeTicketResponse:
        async def take() -> tabs_pb2.TakeTicketResponse:
            if len(request.avoid) > MAXIMUM_AVOIDED:
                raise invalid("MESSAGE_TOO_LARGE", f"at most {MAXIMUM_AVOIDED} nodes are avoided")
            grant = await self._collector.take(request.ticket, map(_account, request.avoid))
            return tabs_pb2.TakeTicketResponse(grant=grant.to_message())

        return await self._answered(context, take)

    async def DeliverResults(
        self, request: tabs_pb2.DeliverResultsRequest, context: Any
    ) -> tabs_pb2.DeliverResultsResponse:
        async def deliver() -> tabs_pb2.DeliverResultsResponse:
            await self._collector.deliver(_request_id(request.request_id), request.results, request.voucher)
            return tabs_pb2.DeliverResultsResponse()

        return await self._answered(context, deliver)

    async def AbandonTicket(
        self, request: tabs_pb2.AbandonTicketRequest, context: Any
    ) -> tabs_pb2.AbandonTicketResponse:
        async def abandon() -> tabs_pb2.AbandonTicketResponse:
            await self._collector.abandon(_request_id(request.request_id), bytes(request.signature))
            return tabs_pb2.AbandonTicketResponse()

        return await self._answered(context, abandon)

    async def ShowSecrets(self, request: tabs_pb2.ShowSecretsRequest, context: Any) -> tabs_pb2.ShowSecretsResponse:
        async def show() -> tabs_pb2.ShowSecretsResponse:
            taken = await self._collector.show_secrets([bytes(item) for item in request.secrets])
            return tabs_pb2.ShowSecretsResponse(taken=taken)

        return await self._answered(context, show)

    async def _answered(self, context: Any, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            if (reason := self._not_synced_because()) is not None:
                raise Refusal(
                    grpc.StatusCode.UNAVAILABLE,
                    "CHAIN_UNAVAILABLE",
                    f"the coordinator does not follow the chain at the moment ({reason}): try again",
                )
            return await call()
        except Refusal as refusal:
            await abort(context, refusal)
        except ChainError as error:
            await abort(context, Refusal(grpc.StatusCode.UNAVAILABLE, "CHAIN_UNAVAILABLE", f"{error}: try again"))
        except StorageError as error:
            _log.error("database_unavailable", error=str(error))
            await abort(
                context,
                Refusal(grpc.StatusCode.UNAVAILABLE, "INTERNAL", "the coordinator's database is unavailable"),
            )


def _account(value: bytes) -> str:
    try:
        return address(bytes(value))
    except ProtocolError as error:
        raise invalid("MALFORMED_MESSAGE", f"not an account: {error}") from error


def _request_id(value: bytes) -> RequestId:
    if len(value) != BYTES32:
        raise invalid("MALFORMED_MESSAGE", "request_id must be 32 bytes")
    return RequestId(bytes(value))
