"""Who may ask, and how often.

Owns API keys as they are shown in a request, and rates: of a key, and of a network address where there is none.
Promises that nothing about a key but its id is ever logged or repeated, and that what is remembered of callers is
bounded. The account book says what a key may spend.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, cast

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from coordinator.gateway.errors import too_many, unauthorised
from coordinator.storage import AccountBook, AccountKey

MINUTE_S = 60.0
_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="An API key of an account of this gateway.")


class RateLimiter:
    """A token bucket a caller: `per_minute` at once, then one every 60 s / `per_minute`. Beyond `tracked` callers,
    those who have not asked for longest are forgotten.
    """

    def __init__(self, per_minute: int, tracked: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._tracked, self._clock = per_minute, tracked, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """0 if the caller may ask now, and it is counted; else seconds until it may."""
        now, rate = self._clock(), self._per_minute / MINUTE_S
        left, at = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - at) * rate)
        wait = 0.0 if left >= 1 else (1 - left) / rate
        self._buckets[caller] = (left if wait else left - 1, now)
        while len(self._buckets) > self._tracked:
            self._buckets.popitem(last=False)
        return wait


class Access:
    """Keys of `book`, at most `per_minute` requests each."""

    def __init__(self, book: AccountBook, per_minute: int, tracked: int) -> None:
        self._book = book
        self._rates = RateLimiter(per_minute, tracked)

    async def key(self, shown: str | None) -> AccountKey:
        """The key of a request; ApiError 401 or 429."""
        if not shown:
            raise unauthorised(
                "this needs an API key: send the header `Authorization: Bearer KEY` (`bsns account open` makes one)"
            )
        # UnknownKeyError is answered with 401, too.
        found = await asyncio.to_thread(self._book.key, shown)
        wait = self._rates.wait_s(found.key_id)
        if wait:
            raise too_many(f"this key asks too often: come back in {max(1, round(wait))} s", wait)
        structlog.contextvars.bind_contextvars(key_id=found.key_id)
        return found


async def _key_holder(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> AccountKey:
    access = cast("Access", request.app.state.access)
    return await access.key(None if credentials is None else credentials.credentials)


KeyHolder = Annotated[AccountKey, Depends(_key_holder)]
"""A parameter of a route that only somebody with an API key may ask."""
