"""JSON-RPC to the five contracts: reads, events, prepared transactions.

Owns the boundary `ChainClient` and its implementation over web3. Promises that values leave as plain Python (bytes,
int, checksummed addresses, named tuples for structs), that every custom error is decoded, and that transport trouble
is always ChainUnavailableError. Does not sign, choose nonces or wait for an endpoint that is down: see
bsns.chain.submitter, bsns.chain.patient_client and the coordinator's outbox.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiohttp
from eth_abi.abi import decode
from eth_abi.codec import ABICodec
from eth_abi.decoding import StringDecoder
from eth_abi.encoding import TextStringEncoder
from eth_abi.exceptions import DecodingError
from eth_abi.registry import BaseEquals
from eth_account import Account
from eth_utils.abi import abi_to_signature, event_abi_to_log_topic, function_abi_to_4byte_selector
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3._utils.abi import build_strict_registry
from web3._utils.events import get_event_data
from web3.contract.utils import async_call_contract_function
from web3.exceptions import (
    BlockNotFound,
    ContractCustomError,
    ContractLogicError,
    ContractPanicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.types import RPCEndpoint, TxParams

from bsns.chain.artifacts import CONTRACT_NAMES, contract_artifact
from bsns.chain.errors import (
    ChainUnavailableError,
    ContractError,
    EndpointRefusedError,
    InsufficientFundsError,
    TransactionFailedError,
    TransactionTimeoutError,
    UnknownBlockError,
    WrongChainError,
)
from bsns.chain.http_provider import OneSessionProvider
from bsns.protocol.endpoints import masked_url

if TYPE_CHECKING:
    from bsns.chain.deployment import Deployment
    from bsns.chain.signer import Signer

DEFAULT_TIMEOUT_S = 10.0
GAS_MARGIN_PERCENT = 120  # an estimate on the pending block can be too low by the time the transaction is mined
# The last commitment, attestation or tally of a request does the work that concludes the step. Which one is the last is
# decided by the order in the block, after all of them were estimated. Unused gas costs nothing.
GAS_HEADROOM = 250_000
PRIORITY_FEE_WEI = 10**9
RECEIPT_POLL_S = 0.1
DEPLOY_TIMEOUT_S = 60.0
MAXIMUM_LOG_RANGE = 2_000
_UNKNOWN_BLOCK_CODE = -32_000
# An endpoint that prunes its history may drop the very block that it has just resolved "latest" to.
LATEST_ATTEMPTS = 3
_PRUNED_MEANWHILE = "BlockOutOfRange"
# What Anvil and Geth say, of a transaction and of an estimate.
_INSUFFICIENT_FUNDS = ("insufficient funds", "gas required exceeds allowance")


@dataclass(frozen=True, slots=True)
class Block:
    """Header of one block; `timestamp` in Unix seconds."""

    number: int
    hash: bytes
    parent_hash: bytes
    timestamp: int


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """One decoded log. `arguments` under the Solidity parameter names; structs as tuples."""

    contract: str
    name: str
    arguments: Mapping[str, Any]
    block_number: int
    block_hash: bytes
    transaction_hash: bytes
    log_index: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Outcome of a mined transaction."""

    transaction_hash: bytes
    block_number: int
    block_hash: bytes
    succeeded: bool
    gas_used: int
    events: tuple[ChainEvent, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A mined transaction as money that went from `sender` to `recipient` (None: it created a contract)."""

    sender: str
    recipient: str | None
    value: int
    block_number: int
    succeeded: bool


class ChainClient(Protocol):
    """What the services need of a chain. Every method may raise ChainUnavailableError."""

    async def chain_id(self) -> int: ...

    async def head(self) -> Block: ...

    async def block(self, number: int) -> Block | None: ...

    async def block_by_hash(self, block_hash: bytes) -> Block | None: ...

    async def events(self, block_hash: bytes) -> tuple[ChainEvent, ...]:
        """All events of our contracts in that block; UnknownBlockError if it was orphaned."""
        ...

    async def events_between(
        self,
        first: int,
        last: int,
        *,
        contract: str | None = None,
        name: str | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> tuple[ChainEvent, ...]:
        """Events in blocks [first, last], narrowed to a contract, an event and values of its indexed parameters."""
        ...

    async def call(self, contract: str, function: str, *arguments: Any, block: int | bytes | None = None) -> Any:
        """Result of a view, of the newest state or as of `block`: a number, or a hash, which no other fork can answer
        for. ContractError if it reverts.
        """
        ...

    async def balance(self, account: str, *, block: bytes | None = None) -> int:
        """Wei of an account, now or as of the block with that hash."""
        ...

    async def transaction_count(self, account: str, *, pending: bool = True) -> int: ...

    async def prepare(
        self, contract: str, function: str, arguments: tuple[Any, ...], *, sender: str, value: int = 0, nonce: int
    ) -> dict[str, Any]:
        """An unsigned EIP-1559 transaction with gas and fees; ContractError if it would revert."""
        ...

    async def prepare_transfer(self, recipient: str, value: int, *, sender: str, nonce: int) -> dict[str, Any]:
        """An unsigned plain transfer of `value` wei."""
        ...

    async def send_raw(self, raw: bytes) -> bytes:
        """Broadcast; returns the transaction hash. Sending the same bytes again is harmless."""
        ...

    async def receipt(self, transaction_hash: bytes) -> Receipt | None: ...

    async def transfer(self, transaction_hash: bytes) -> Transfer | None:
        """What a transaction moved, once it is mined; None before, and for a hash that nobody knows."""
        ...


class Web3ChainClient:
    """ChainClient over an HTTP JSON-RPC endpoint."""

    def __init__(self, connection: AsyncWeb3[Any], deployment: Deployment) -> None:
        self.deployment = deployment
        self._web3 = connection
        self._contracts = {
            name: connection.eth.contract(address=where, abi=contract_artifact(name).abi, decode_tuples=True)
            for name, where in deployment.contracts.items()
        }
        self._names = {where: name for name, where in deployment.contracts.items()}

    @classmethod
    async def connect(
        cls, rpc_url: str, deployment: Deployment, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Web3ChainClient:
        """Connect and check that the endpoint is on the deployment's chain and has its contracts.

        Raises ChainUnavailableError or WrongChainError; both say what to do.
        """
        client = cls(_open(rpc_url, timeout_s), deployment)
        try:
            actual = await client.chain_id()
            if actual != deployment.chain_id:
                raise WrongChainError(
                    f"{masked_url(rpc_url)} is on chain {actual}, the deployment on chain {deployment.chain_id}: "
                    "give the RPC endpoint of the deployment's chain"
                )
            for name, where in deployment.contracts.items():
                if not await _guarded(client._web3.eth.get_code(where)):
                    raise WrongChainError(
                        f"there is no {name} at {where} on chain {actual}: the deployment file is of another network, "
                        "or this chain was reset"
                    )
        except BaseException:
            await client.close()
            raise
        return client

    async def close(self) -> None:
        """Give the connections back."""
        await self._web3.provider.disconnect()

    async def __aenter__(self) -> Web3ChainClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def chain_id(self) -> int:
        return int(await _guarded(self._web3.eth.chain_id))

    async def head(self) -> Block:
        return _block(await _guarded(self._web3.eth.get_block("latest")))

    async def block(self, number: int) -> Block | None:
        try:
            return _block(await _guarded(self._web3.eth.get_block(number)))
        except UnknownBlockError:
            return None

    async def block_by_hash(self, block_hash: bytes) -> Block | None:
        try:
            return _block(await _guarded(self._web3.eth.get_block(HexBytes(block_hash))))
        except UnknownBlockError:
            return None

    async def events(self, block_hash: bytes) -> tuple[ChainEvent, ...]:
        return self._decode(
            await _guarded(self._web3.eth.get_logs({"blockHash": HexBytes(block_hash), "address": list(self._names)}))
        )

    async def events_between(
        self,
        first: int,
        last: int,
        *,
        contract: str | None = None,
        name: str | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> tuple[ChainEvent, ...]:
        addresses = [self.deployment.contracts[contract]] if contract else list(self._names)
        found: list[ChainEvent] = []
        for start in range(first, last + 1, MAXIMUM_LOG_RANGE):
            end = min(last, start + MAXIMUM_LOG_RANGE - 1)
            query: dict[str, Any] = {"fromBlock": start, "toBlock": end, "address": addresses}
            topics = _topics(contract, name, filters or {})
            if topics is not None:
                query["topics"] = topics
            found += self._decode(await _guarded(self._web3.eth.get_logs(query)))  # type: ignore[arg-type]
        return tuple(found)

    async def call(self, contract: str, function: str, *arguments: Any, block: int | bytes | None = None) -> Any:
        bound = self._contracts[contract].functions[function](*arguments)
        if isinstance(block, bytes):
            return _plain(await _guarded(_call_at(self._web3, bound, block)))
        if block is not None:
            return _plain(await _guarded(bound.call(block_identifier=block)))
        return _plain(await _latest(lambda: bound.call(block_identifier="latest")))

    async def balance(self, account: str, *, block: bytes | None = None) -> int:
        if block is not None:
            return await _guarded(_balance_at(self._web3, _checked(account), block))  # type: ignore[no-any-return]
        return int(await _latest(lambda: self._web3.eth.get_balance(_checked(account))))

    async def transaction_count(self, account: str, *, pending: bool = True) -> int:
        return int(
            await _guarded(self._web3.eth.get_transaction_count(_checked(account), "pending" if pending else "latest"))
        )

    async def prepare(
        self, contract: str, function: str, arguments: tuple[Any, ...], *, sender: str, value: int = 0, nonce: int
    ) -> dict[str, Any]:
        data = self._contracts[contract].encode_abi(function, args=list(arguments))
        call = {"to": self.deployment.contracts[contract], "data": data, "value": value}
        return await _complete(self._web3, call, sender=sender, nonce=nonce, chain_id=self.deployment.chain_id)

    async def prepare_transfer(self, recipient: str, value: int, *, sender: str, nonce: int) -> dict[str, Any]:
        call = {"to": _checked(recipient), "value": value}
        return await _complete(self._web3, call, sender=sender, nonce=nonce, chain_id=self.deployment.chain_id)

    async def send_raw(self, raw: bytes) -> bytes:
        try:
            return await _broadcast(self._web3, raw)
        except ChainUnavailableError as error:
            if "already known" in str(error) or "already imported" in str(error):
                from bsns.protocol.identifiers import keccak256

                return keccak256(raw)
            raise

    async def receipt(self, transaction_hash: bytes) -> Receipt | None:
        try:
            found = await _guarded(self._web3.eth.get_transaction_receipt(HexBytes(transaction_hash)))
        except UnknownBlockError:
            return None
        return Receipt(
            bytes(found["transactionHash"]),
            int(found["blockNumber"]),
            bytes(found["blockHash"]),
            found["status"] == 1,
            int(found["gasUsed"]),
            self._decode(found["logs"]),
        )

    async def transfer(self, transaction_hash: bytes) -> Transfer | None:
        try:
            sent = await _guarded(self._web3.eth.get_transaction(HexBytes(transaction_hash)))
            mined = await _guarded(self._web3.eth.get_transaction_receipt(HexBytes(transaction_hash)))
        except UnknownBlockError:
            return None
        return Transfer(
            str(sent["from"]), sent.get("to"), int(sent["value"]), int(mined["blockNumber"]), mined["status"] == 1
        )

    def _decode(self, logs: Any) -> tuple[ChainEvent, ...]:
        """Logs of our contracts as events, in log order; logs of others are left out."""
        events = []
        for log in sorted(logs, key=lambda item: (item["blockNumber"], item["logIndex"])):
            contract = self._names.get(log["address"])
            if contract is None:
                continue
            abi = _event_abis(contract).get(bytes(log["topics"][0]))
            if abi is None:
                raise WrongChainError(
                    f"{contract} at {log['address']} emitted an event this version does not know: "
                    "the deployment is of another version of the contracts"
                )
            decoded = get_event_data(_event_codec(), abi, log)
            events.append(
                ChainEvent(
                    contract,
                    decoded["event"],
                    {key: _plain(value) for key, value in decoded["args"].items()},
                    int(log["blockNumber"]),
                    bytes(log["blockHash"]),
                    bytes(log["transactionHash"]),
                    int(log["logIndex"]),
                )
            )
        return tuple(events)


@asynccontextmanager
async def raw_connection(rpc_url: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> AsyncIterator[AsyncWeb3[Any]]:
    """A connection without a deployment, to make one. ChainUnavailableError if nothing answers."""
    connection = _open(rpc_url, timeout_s)
    try:
        await _guarded(connection.eth.chain_id)
        yield connection
    finally:
        await connection.provider.disconnect()


async def send_and_wait(
    connection: AsyncWeb3[Any], signer: Signer, call: dict[str, Any], *, nonce: int, timeout_s: float = DEPLOY_TIMEOUT_S
) -> Mapping[str, Any]:
    """Send one raw transaction and wait until it is mined; for deployment only."""
    chain_id = int(await _guarded(connection.eth.chain_id))
    transaction = await _complete(connection, call, sender=signer.address, nonce=nonce, chain_id=chain_id)
    raw = signer.sign_transaction(transaction)
    transaction_hash = HexBytes(await _broadcast(connection, raw))
    try:
        receipt: Mapping[str, Any] = await connection.eth.wait_for_transaction_receipt(
            transaction_hash, timeout=timeout_s, poll_latency=RECEIPT_POLL_S
        )
    except Web3Exception as error:
        raise TransactionTimeoutError(f"not mined within {timeout_s} s: {transaction_hash.hex()}") from error
    if receipt["status"] != 1:
        raise TransactionFailedError(f"transaction {transaction_hash.hex()} was mined and reverted")
    return receipt


def decode_contract_error(data: bytes) -> ContractError:
    """The custom error behind revert data, looked up in all four ABIs; web3 gives the bytes only."""
    selector = bytes(data[:4])
    known = _error_abis().get(selector)
    if known is None:
        return ContractError("UnknownError", {"data": bytes(data)})
    name, names, types = known
    try:
        values = decode(types, bytes(data[4:]))
    except DecodingError:
        return ContractError(name, {"data": bytes(data)})
    return ContractError(name, dict(zip(names, values, strict=True)))


def _open(rpc_url: str, timeout_s: float) -> AsyncWeb3[Any]:
    provider = OneSessionProvider(
        rpc_url,
        request_kwargs={"timeout": aiohttp.ClientTimeout(total=timeout_s)},
        exception_retry_configuration=None,  # who retries is decided by the caller, never around money
    )
    return AsyncWeb3(provider)


async def _complete(
    connection: AsyncWeb3[Any], call: dict[str, Any], *, sender: str, nonce: int, chain_id: int
) -> dict[str, Any]:
    """Fill in gas and fees. The base fee may double before the transaction is mined without it being stuck."""
    block = await _guarded(connection.eth.get_block("latest"))
    try:
        estimate = await _latest(
            lambda: connection.eth.estimate_gas(cast(TxParams, {**call, "from": _checked(sender)}), "pending")
        )
    except InsufficientFundsError as error:
        raise InsufficientFundsError(_checked(sender), error.detail) from error
    return {
        **call,
        "type": 2,
        "chainId": chain_id,
        "nonce": nonce,
        "gas": estimate * GAS_MARGIN_PERCENT // 100 + (GAS_HEADROOM if "data" in call else 0),
        "maxFeePerGas": 2 * block["baseFeePerGas"] + PRIORITY_FEE_WEI,
        "maxPriorityFeePerGas": PRIORITY_FEE_WEI,
    }


async def _broadcast(connection: AsyncWeb3[Any], raw: bytes) -> bytes:
    try:
        return bytes(await _guarded(connection.eth.send_raw_transaction(HexBytes(raw))))
    except InsufficientFundsError as error:
        raise InsufficientFundsError(Account.recover_transaction(HexBytes(raw)), error.detail) from error


def _by_hash(block_hash: bytes) -> Any:
    """A block as EIP-1898 names it: refused, rather than answered from another fork, if it is not canonical."""
    return {"blockHash": f"0x{block_hash.hex()}", "requireCanonical": True}


async def _call_at(connection: AsyncWeb3[Any], bound: Any, block_hash: bytes) -> Any:
    """`bound.call` as of a hash, which web3 itself would look up and replace by its number."""
    return await async_call_contract_function(
        connection,
        bound.address,
        bound._return_data_normalizers,
        abi_to_signature(bound.abi),
        {},
        _by_hash(block_hash),
        bound.contract_abi,
        bound.abi,
        None,
        None,
        bound.decode_tuples,
        *bound.args,
    )


async def _balance_at(connection: AsyncWeb3[Any], account: str, block_hash: bytes) -> int:
    """Past web3's own methods, which cannot carry a block by hash."""
    answer: Any = await connection.provider.make_request(RPCEndpoint("eth_getBalance"), [account, _by_hash(block_hash)])
    if "error" in answer:
        raise Web3RPCError(str(answer["error"]), rpc_response=answer)
    return int(answer["result"], 16)


async def _latest(read: Callable[[], Awaitable[Any]]) -> Any:
    """A read of the newest state, begun again when the endpoint pruned that state under it."""
    for attempt in range(1, LATEST_ATTEMPTS + 1):
        try:
            return await _guarded(read())
        except ChainUnavailableError as error:
            if _PRUNED_MEANWHILE not in str(error) or attempt == LATEST_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


async def _guarded(awaitable: Any) -> Any:
    """Await an RPC call; every way it can fail becomes one of ours."""
    try:
        return await awaitable
    except ContractCustomError as error:
        raise decode_contract_error(HexBytes(error.data)) from error  # type: ignore[arg-type]
    except ContractPanicError as error:
        raise ContractError("Panic", {"message": str(error)}) from error
    except ContractLogicError as error:
        raise ContractError("Revert", {"message": str(error)}) from error
    except (BlockNotFound, TransactionNotFound) as error:
        raise UnknownBlockError(str(error)) from error
    except Web3RPCError as error:
        details: Any = (error.rpc_response or {}).get("error", {})
        if details.get("code") == _UNKNOWN_BLOCK_CODE and "unknown block" in str(error).lower():
            raise UnknownBlockError(str(error)) from error
        reason = str(details.get("message") or error)
        if any(sign in reason.lower() for sign in _INSUFFICIENT_FUNDS):
            raise InsufficientFundsError(None, reason) from error
        raise EndpointRefusedError(f"the RPC endpoint refused: {reason}") from error
    except (aiohttp.ClientError, TimeoutError, OSError, Web3Exception, ValueError) as error:
        raise ChainUnavailableError(
            f"no answer from the RPC endpoint ({_transport_reason(error)}); check that it runs and is reachable"
        ) from error


def _transport_reason(error: Exception) -> str:
    """Without the URL of an HTTP error, where providers put keys."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"HTTP status {error.status} {error.message}"
    return f"{type(error).__name__}: {error}" if str(error) else "it took too long"


def _block(raw: Any) -> Block:
    return Block(int(raw["number"]), bytes(raw["hash"]), bytes(raw["parentHash"]), int(raw["timestamp"]))


def _checked(account: str) -> Any:
    from bsns.protocol.identifiers import address

    return address(account)


def _plain(value: Any) -> Any:
    """HexBytes to bytes, lists to tuples, mappings to named order; named tuples stay what they are."""
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return cast(Any, value)._make(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return tuple(_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


@lru_cache(maxsize=len(CONTRACT_NAMES))
def _event_abis(contract: str) -> dict[bytes, Any]:
    abi = contract_artifact(contract).abi
    return {bytes(event_abi_to_log_topic(item)): item for item in abi if item["type"] == "event"}  # type: ignore[arg-type]


class _AnyString(StringDecoder):
    """A string as anybody may emit it: the contracts do not check that it is UTF-8, and one bad name must not make the
    logs of everybody unreadable. Bytes that are not UTF-8 become escapes.
    """

    def decode(self, stream: Any) -> str:
        data, _padding = self.split_data_and_padding(self.read_data_from_stream(stream))  # type: ignore[no-untyped-call]
        return bytes(data).decode(errors="backslashreplace")


@lru_cache(maxsize=1)
def _event_codec() -> ABICodec:
    registry = build_strict_registry()
    registry.unregister("string")
    registry.register(BaseEquals("string"), TextStringEncoder, _AnyString, label="string")  # type: ignore[no-untyped-call]
    return ABICodec(registry)


@lru_cache(maxsize=1)
def _error_abis() -> dict[bytes, tuple[str, list[str], list[str]]]:
    found = {}
    for contract in CONTRACT_NAMES:
        for item in contract_artifact(contract).abi:
            if item["type"] == "error":
                selector = function_abi_to_4byte_selector({**item, "type": "function"})  # type: ignore[arg-type]
                inputs = item["inputs"]
                found[bytes(selector)] = (item["name"], [i["name"] for i in inputs], [i["type"] for i in inputs])
    return found


def _topics(contract: str | None, name: str | None, filters: Mapping[str, Any]) -> list[Any] | None:
    """Topic filter: event name (in any contract unless one is given), then the indexed parameters in order."""
    if name is None:
        if filters:
            raise ValueError("filters need an event name")
        return None
    matches = [
        (topic, abi)
        for owner in ([contract] if contract else CONTRACT_NAMES)
        for topic, abi in _event_abis(owner).items()
        if abi["name"] == name
    ]
    if not matches:
        raise ValueError(f"no contract emits {name}")
    topics: list[Any] = [[HexBytes(topic) for topic, _ in matches]]
    indexed = [item for item in matches[0][1]["inputs"] if item["indexed"]]
    unknown = set(filters) - {item["name"] for item in indexed}
    if unknown:
        raise ValueError(f"{name} has no indexed parameter {', '.join(sorted(unknown))}")
    for item in indexed:
        topics.append(_topic_value(item["type"], filters[item["name"]]) if item["name"] in filters else None)
    while topics and topics[-1] is None:
        topics.pop()
    return topics


def _topic_value(kind: str, value: Any) -> HexBytes:
    if kind == "bytes32":
        return HexBytes(value)
    if kind == "address":
        return HexBytes(bytes.fromhex(_checked(value)[2:]).rjust(32, b"\0"))
    return HexBytes(int(value).to_bytes(32, "big"))
