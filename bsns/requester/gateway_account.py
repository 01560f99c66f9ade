"""An account of a gateway, for people who hold a key on the chain: open it, fill it, look at it, empty it.

Owns the calls to a gateway's account routes and the transfer that a deposit is. Promises that no API key and no
signature leaves this machine in the clear: plaintext is for loopback. A gateway holds what is deposited: who trusts
nobody pays the network directly (`bsns.requester.client`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from bsns.chain.client import ChainClient
from bsns.chain.signer import Signer
from bsns.chain.submitter import Submitter
from bsns.protocol.endpoints import is_loopback
from bsns.protocol.identifiers import address
from bsns.protocol.typed_data import ACCOUNT_KEY_REQUEST, gateway_domain, signing_digest
from bsns.requester.errors import GatewayRefusedError, InvalidRequestError, UnavailableError

CALL_S: Final = 30.0
PROOF_S: Final = 300
POLL_S: Final = 1.0
DEPOSIT_S: Final = 1_800.0


class GatewayAccount:
    """Calls of one gateway at `url`; `api_key` is needed for all but `open`. Use as `async with`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError(
                f"{url!r:.100} is no address of a gateway: give https://host, or http on loopback"
            )
        if parts.scheme == "http" and not is_loopback(f"{parts.hostname}:{parts.port or 80}"):
            raise InvalidRequestError(f"{parts.hostname} is not on loopback: give https, keys do not go in the clear")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url = url.rstrip("/")
        self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=CALL_S))

    async def __aenter__(self) -> GatewayAccount:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def about(self) -> dict[str, Any]:
        """Deposit address, terms."""
        return await self._call("GET", "/v1/gateway")

    async def open(self, signer: Signer, name: str, limits: Mapping[str, int | None]) -> dict[str, Any]:
        """A new key for the account of `signer`, which is opened if there is none. The key is shown once."""
        about = await self.about()
        deadline = int(time.time()) + PROOF_S
        domain = gateway_domain(int(about["chain_id"]), address(about["deposit_address"]))
        digest = signing_digest(domain, ACCOUNT_KEY_REQUEST, (signer.address, name, deadline))
        body = {
            "address": signer.address,
            "name": name,
            "deadline": deadline,
            "signature": "0x" + signer.sign_digest(digest).hex(),
            **{field: None if value is None else str(value) for field, value in limits.items()},
        }
        return await self._call("POST", "/v1/accounts", body)

    async def account(self) -> dict[str, Any]:
        """Balance, and what the key may spend."""
        return await self._call("GET", "/v1/account")

    async def statement(self, limit: int) -> list[dict[str, Any]]:
        """The newest movements."""
        found = await self._call("GET", f"/v1/account/movements?limit={limit}")
        return list(found["data"])

    async def deposit(
        self, chain: ChainClient, signer: Signer, wei: int, on_progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Send `wei` from the account's address, and have it credited once it is deep enough in the chain."""
        about, account = await self.about(), await self.account()
        if account["address"] is not None and address(account["address"]) != signer.address:
            raise InvalidRequestError(
                f"deposits of this account come from {account['address']}, this key is {signer.address}: give its key"
            )
        if await chain.chain_id() != int(about["chain_id"]):
            raise InvalidRequestError(
                f"the gateway is on chain {about['chain_id']}: give an RPC endpoint of that chain"
            )
        receipt = await Submitter(chain, signer).transfer(address(about["deposit_address"]), wei)
        shown = "0x" + receipt.transaction_hash.hex()
        on_progress(f"sent in {shown}; it counts after {about['deposit_confirmations']} blocks")
        return await self.claim(shown)

    async def claim(self, transaction: str) -> dict[str, Any]:
        """Have a transfer credited that was sent already."""
        until = time.monotonic() + DEPOSIT_S
        while True:
            try:
                return await self._call("POST", "/v1/account/deposits", {"transaction": transaction})
            except GatewayRefusedError as error:
                if error.code not in ("not_mined", "not_confirmed") or time.monotonic() > until:
                    raise
            await asyncio.sleep(POLL_S)

    async def withdraw(self, wei: int) -> dict[str, Any]:
        """Take `wei` out; it goes to the account's address."""
        return await self._call("POST", "/v1/account/withdrawals", {"amount_wei": str(wei)})

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._url + path, json=body) as answer:
                content = await answer.json(content_type=None)
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise UnavailableError(f"the gateway at {self._url} cannot be asked ({error}): try again later") from error
        if status >= 400:
            problem = content.get("error", {}) if isinstance(content, dict) else {}
            raise GatewayRefusedError(
                f"the gateway refused: {problem.get('message', f'status {status}')}", problem.get("code")
            )
        if not isinstance(content, dict):
            raise UnavailableError(f"what answers at {self._url} is no gateway: check the address")
        return content
