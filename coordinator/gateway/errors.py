"""What the gateway answers when it cannot do what was asked: one error, in the shape that OpenAI's clients expect.

Promises that every answer with a status of 400 or more has the body {"error": {"message", "type", "param", "code"}},
that its message says what to do next, and that nothing of the gateway's own (keys, files, tracebacks) is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from bsns.requester.errors import (
    AnswerInvalidError,
    InvalidRequestError,
    NotServedError,
    RequesterError,
)
from coordinator.storage import (
    AccountError,
    DuplicateError,
    IdempotencyError,
    InsufficientBalanceError,
    SpendingLimitError,
    StorageError,
    UnknownKeyError,
)

RETRY_SECONDS = 5
# OpenAI's clients try again by themselves after 409, 429 and 5xx, unless they are told not to.
_FINAL = {"x-should-retry": "false"}


class ApiError(Exception):
    """An HTTP answer that is not the one hoped for. `param` names the field of the request that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def too_many(message: str, seconds: float = RETRY_SECONDS) -> ApiError:
    """Somebody asks too often, or all at once: the same request is fine later."""
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def unavailable(message: str, code: str = "network_unavailable") -> ApiError:
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def of_account(error: AccountError) -> ApiError:
    """What the account book refused."""
    message = str(error)
    match error:
        case UnknownKeyError():
            return unauthorised(message)
        case InsufficientBalanceError():
            return ApiError(429, message, kind="insufficient_quota", code="insufficient_quota", headers=_FINAL)
        case SpendingLimitError():
            return ApiError(429, message, kind="insufficient_quota", code="spending_limit_exceeded", headers=_FINAL)
        case IdempotencyError(is_busy=True):
            headers = {"Retry-After": "1"}
            return ApiError(409, message, kind="conflict_error", code="idempotency_key_in_use", headers=headers)
        case IdempotencyError():
            return ApiError(422, message, code="idempotency_key_reused", param="Idempotency-Key")
        case DuplicateError():
            return ApiError(409, message, kind="conflict_error", code="duplicate", headers=_FINAL)
        case _:
            return ApiError(400, message)


def of_requester(error: RequesterError) -> ApiError:
    """What the network did not do. Nothing of it is charged."""
    match error:
        case AnswerInvalidError():
            return unavailable(
                "a node signed for another answer than it gave, so this one is discarded and not charged: try again",
                "answer_invalid",
            )
        case NotServedError():
            return unavailable(
                "the nodes of the route did not finish the answer and nobody could take over; nothing is charged: "
                "try again",
                "not_served",
            )
        case InvalidRequestError():
            return ApiError(400, str(error))
        case _:
            return unavailable(
                "the network cannot take this request at the moment; nothing is charged: try again later"
            )


def of_storage(error: StorageError) -> ApiError:
    return (
        of_account(error)
        if isinstance(error, AccountError)
        else unavailable("the gateway's database does not answer at the moment: try again", "database_unavailable")
    )
