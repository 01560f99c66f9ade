"""Bytes that are no message of an RPC's type are the caller's mistake, and answered as one.

Owns an interceptor for grpc.aio servers: without it such bytes end a call with UNKNOWN, as if the server had failed.
Promises INVALID_ARGUMENT with what to do, on every method, for the first message of a call and any later one. What is
in a message that can be read is for the service to judge.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

_DETAIL: Final = "these bytes are no message of this call's type: check the release of bsns.v1 that you were built with"


class _Malformed:
    """In place of a message that could not be read."""


_MALFORMED: Final = _Malformed()


class MessageGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Give it to a server's `interceptors`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler with its messages guarded."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        guarded = _guarded_stream if handler.request_streaming else _guarded_message
        kind = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
        }[handler.request_streaming, handler.response_streaming]
        behaviour = guarded(getattr(handler, kind[0]))
        return kind[1](behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)


def _tolerant(deserialise: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialise(data)
        except DecodeError:
            return _MALFORMED

    return read


def _guarded_message(behaviour: Any) -> Any:
    async def check(request: Any, context: Any) -> None:
        if request is _MALFORMED:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _DETAIL)

    if not inspect.iscoroutinefunction(behaviour):

        async def answer_all(request: Any, context: Any) -> AsyncIterator[Any]:
            await check(request, context)
            async for item in behaviour(request, context):
                yield item

        return answer_all

    async def answer(request: Any, context: Any) -> Any:
        await check(request, context)
        return await behaviour(request, context)

    return answer


def _guarded_stream(behaviour: Any) -> Any:
    async def readable(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if request is _MALFORMED:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _DETAIL)
            yield request

    if not inspect.iscoroutinefunction(behaviour):

        async def converse(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async for item in behaviour(readable(requests, context), context):
                yield item

        return converse

    async def listen(requests: AsyncIterator[Any], context: Any) -> Any:
        return await behaviour(readable(requests, context), context)

    return listen
