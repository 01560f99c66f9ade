"""web3's HTTP provider with one kept session, which a cancelled call cannot lock for everybody else.

web3 8.0 guards its cache of sessions by one `threading.Lock` of the whole process, taken in a thread for every request.
A task that is cancelled while it waits there leaves the lock held by nobody, and every later call of every provider in
the process waits for ever (ApeWorX/web3.py#3867). It also opens a connection per request. Here a provider has one
session of its own event loop and needs no lock.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from web3 import AsyncHTTPProvider
from web3._utils.http_session_manager import HTTPSessionManager

_SESSION = "session"  # the one entry of the cache, which `disconnect` closes
REQUESTS_MAX = 100
"""Connections that one provider opens to its endpoint at most; further requests wait for one."""


class _OneSession(HTTPSessionManager):
    async def async_cache_and_return_session(
        self,
        endpoint_uri: Any,
        session: aiohttp.ClientSession | None = None,
        request_timeout: aiohttp.ClientTimeout | None = None,
    ) -> aiohttp.ClientSession:
        kept: aiohttp.ClientSession | None = self.session_cache.get_cache_entry(_SESSION)
        if kept is None or kept.closed:
            kept = session or aiohttp.ClientSession(
                raise_for_status=True, connector=aiohttp.TCPConnector(limit=REQUESTS_MAX)
            )
            self.session_cache.cache(_SESSION, kept)
        return kept

    async def async_make_post_request(self, endpoint_uri: Any, data: bytes | dict[str, Any], **kwargs: Any) -> bytes:
        """As in web3, but asked again once where the endpoint closed the kept connection before it answered.

        That may have been a connection which an idle endpoint gave up; no call of Ethereum's JSON-RPC that we make
        does harm twice (the same signed transaction is the same transaction).
        """
        try:
            return await super().async_make_post_request(endpoint_uri, data, **kwargs)
        except aiohttp.ClientConnectorError:  # nobody listens: asking again at once would not help
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await super().async_make_post_request(endpoint_uri, data, **kwargs)


class OneSessionProvider(AsyncHTTPProvider):
    """AsyncHTTPProvider of one event loop. `disconnect` closes its session."""

    def __init__(self, endpoint_uri: str, **arguments: Any) -> None:
        super().__init__(endpoint_uri, **arguments)
        self._request_session_manager = _OneSession()
