"""Why the coordinator refuses a call, as gRPC says it: a code, an ErrorReason in google.rpc.ErrorInfo, a sentence."""

from __future__ import annotations

from typing import Any, Final, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from bsns.v1 import common_pb2

_ERROR_DOMAIN: Final = "bsns"
_DETAILS_KEY: Final = "grpc-status-details-bin"


class Refusal(Exception):
    """A call is refused; `reason` is the name of an ErrorReason without its prefix."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


def invalid(reason: str, message: str) -> Refusal:
    """The message is wrong whatever else is true."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def failed_precondition(reason: str, message: str) -> Refusal:
    """The message is right, and its time is not now."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, reason, message)


def unauthenticated(reason: str, message: str) -> Refusal:
    """Whoever should have signed has not."""
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, reason, message)


async def abort(context: grpc.aio.ServicerContext[Any, Any], refusal: Refusal) -> NoReturn:
    """End the call with google.rpc.Status and ErrorInfo(reason, domain "bsns")."""
    name = f"ERROR_REASON_{refusal.reason}"
    common_pb2.ErrorReason.Value(name)  # a misspelt reason must not reach the wire
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=name, domain=_ERROR_DOMAIN))
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message, details=[detail])
    await context.abort(refusal.code, refusal.message, ((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort always raises")
