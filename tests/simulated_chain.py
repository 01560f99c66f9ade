"""A chain in memory: the second implementation of the ChainClient boundary, for property tests.

Owns blocks with forks, events by block hash, a transaction pool with nonces and replacement, and faults. Promises
what a real endpoint promises and takes the same liberties: an orphaned block's hash is unknown, transactions of
orphaned blocks go back to the pool or are lost, the pool forgets. Executes calls by a function the test gives. Knows
nothing of signatures: `SimulatedSigner` writes who sends.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bsns.chain.client import Block, ChainEvent, Receipt, Transfer
from bsns.chain.errors import ChainUnavailableError, ContractError, UnknownBlockError
from bsns.protocol.identifiers import address, keccak256

GENESIS_TIME: Final = 1_700_000_000
BLOCK_SECONDS: Final = 1

NewEvent = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PooledTransaction:
    """A transaction as the chain sees it."""

    hash: bytes
    sender: str
    nonce: int
    contract: str
    function: str
    arguments: str
    value: int
    fee: int


@dataclass(frozen=True, slots=True)
class MinedTransaction:
    """A transaction in a block."""

    transaction: PooledTransaction
    succeeded: bool


@dataclass(slots=True)
class _Content:
    block: Block
    events: tuple[ChainEvent, ...] = ()
    transactions: tuple[MinedTransaction, ...] = ()


class SimulatedSigner:
    """Says who sends, in place of a signature."""

    def __init__(self, number: int = 1) -> None:
        self._address = address(number.to_bytes(20, "big"))

    @property
    def address(self) -> Any:
        return self._address

    def sign_digest(self, digest: bytes) -> bytes:
        raise NotImplementedError("nothing in the simulation is signed")

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        return json.dumps(dict(transaction), sort_keys=True).encode()


@dataclass
class SimulatedChain:
    """The chain. `execute` decides whether a call succeeds; it sees the calls that succeeded before it in the same
    fork.
    """

    execute: Callable[[PooledTransaction, Sequence[PooledTransaction]], bool] = lambda _call, _before: True
    identity: int = 31_337
    first_number: int = 1
    faults: int = 0
    pool: dict[tuple[str, int], PooledTransaction] = field(default_factory=dict)
    _fork: int = 0
    _sent: dict[bytes, PooledTransaction] = field(default_factory=dict)
    _interruption: tuple[int, Callable[[], None]] | None = None

    def __post_init__(self) -> None:
        genesis = Block(self.first_number - 1, keccak256(b"genesis"), bytes(32), GENESIS_TIME)
        self._chain: list[_Content] = [_Content(genesis)]

    # ------------------------------------------------------------------------------------------------------ the test's

    def mine(self, *blocks: Iterable[NewEvent], take: bool = True) -> None:
        """One block for each of `blocks` with its events; pooled transactions go into the first if they `take` any."""
        for events in blocks or ((),):
            parent = self._chain[-1].block
            self._fork += 1
            block = Block(
                parent.number + 1,
                keccak256(parent.hash + self._fork.to_bytes(8, "big")),
                parent.hash,
                parent.timestamp + BLOCK_SECONDS,
            )
            mined = self._take() if take else ()
            self._chain.append(
                _Content(
                    block,
                    tuple(
                        ChainEvent(
                            contract, name, arguments, block.number, block.hash, keccak256(block.hash), 2 * index
                        )
                        for index, (contract, name, arguments) in enumerate(events)
                    ),
                    mined,
                )
            )

    def reorganise(self, depth: int, *blocks: Iterable[NewEvent], keep_transactions: bool = True) -> None:
        """Orphan the last `depth` blocks and mine `blocks` in their place (fewer, as many or more)."""
        depth = min(depth, len(self._chain) - 1)
        orphaned = self._chain[len(self._chain) - depth :]
        del self._chain[len(self._chain) - depth :]
        if keep_transactions:
            # Some node of the network still has whatever was ever broadcast, and the next block may take that instead.
            mined = {item.transaction.hash: item.transaction for content in orphaned for item in content.transactions}
            others = [item for digest, item in self._sent.items() if digest not in mined]
            for transaction in (*others, *mined.values()):
                if transaction.nonce >= self._count(transaction.sender):
                    self.pool.setdefault((transaction.sender, transaction.nonce), transaction)
        if blocks:
            self.mine(*blocks, take=False)

    def interrupt(self, calls: int, change: Callable[[], None]) -> None:
        """Let `change` happen just before the endpoint answers the `calls`-th question from now."""
        self._interruption = calls, change

    @property
    def height(self) -> int:
        return self._chain[-1].block.number

    def history(self) -> list[tuple[ChainEvent, Block]]:
        """Every canonical event with its block."""
        return [(event, content.block) for content in self._chain for event in content.events]

    def executed(self) -> list[PooledTransaction]:
        """Calls that took effect on the canonical chain, in order."""
        return [mined.transaction for content in self._chain for mined in content.transactions if mined.succeeded]

    def drop_pool(self) -> None:
        """The pool forgets everything."""
        self.pool.clear()

    def spend_nonce(self, sender: str) -> None:
        """Another program with the same key sends something."""
        nonce = self._count(sender)
        transaction = PooledTransaction(
            keccak256(f"foreign{nonce}".encode()), sender, nonce, "Foreign", "call", "", 0, 2**60
        )
        self.pool[sender, nonce] = transaction

    # -------------------------------------------------------------------------------------------------- ChainClient's

    async def chain_id(self) -> int:
        self._fault()
        return self.identity

    async def head(self) -> Block:
        self._fault()
        return self._chain[-1].block

    async def block(self, number: int) -> Block | None:
        self._fault()
        index = number - self._chain[0].block.number
        return self._chain[index].block if 0 <= index < len(self._chain) else None

    async def block_by_hash(self, block_hash: bytes) -> Block | None:
        self._fault()
        return next((content.block for content in self._chain if content.block.hash == block_hash), None)

    async def events(self, block_hash: bytes) -> tuple[ChainEvent, ...]:
        self._fault()
        for content in self._chain:
            if content.block.hash == block_hash:
                return content.events
        raise UnknownBlockError(f"unknown block 0x{block_hash.hex()}")

    async def events_between(
        self,
        first: int,
        last: int,
        *,
        contract: str | None = None,
        name: str | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> tuple[ChainEvent, ...]:
        self._fault()
        return tuple(
            event
            for event, block in self.history()
            if first <= block.number <= last
            and contract in (None, event.contract)
            and name in (None, event.name)
            and all(event.arguments[key] == value for key, value in (filters or {}).items())
        )

    async def call(self, contract: str, function: str, *arguments: Any, block: int | bytes | None = None) -> Any:
        raise NotImplementedError(f"the simulated chain has no view {contract}.{function}")

    async def balance(self, account: str, *, block: bytes | None = None) -> int:
        self._fault()
        return 10**24

    async def transaction_count(self, account: str, *, pending: bool = True) -> int:
        self._fault()
        count = self._count(account)
        while pending and (account, count) in self.pool:
            count += 1
        return count

    async def prepare(
        self, contract: str, function: str, arguments: tuple[Any, ...], *, sender: str, value: int = 0, nonce: int
    ) -> dict[str, Any]:
        self._fault()
        call = PooledTransaction(b"", sender, nonce, contract, function, repr(arguments), value, 0)
        waiting = [self.pool[key] for key in sorted(self.pool)]
        if not self.execute(call, [*self.executed(), *waiting]):
            raise ContractError("Refused", {"function": function})
        return {
            "from": sender,
            "nonce": nonce,
            "contract": contract,
            "function": function,
            "arguments": repr(arguments),
            "value": value,
            "maxFeePerGas": 1_000,
            "maxPriorityFeePerGas": 100,
        }

    async def prepare_transfer(self, recipient: str, value: int, *, sender: str, nonce: int) -> dict[str, Any]:
        self._fault()
        return {
            "from": sender,
            "nonce": nonce,
            "contract": "Transfer",
            "function": recipient,
            "arguments": "",
            "value": value,
            "maxFeePerGas": 1_000,
            "maxPriorityFeePerGas": 100,
        }

    async def send_raw(self, raw: bytes) -> bytes:
        self._fault()
        fields, digest = json.loads(raw), keccak256(raw)
        key = fields["from"], fields["nonce"]
        if fields["nonce"] < self._count(fields["from"]):
            raise ChainUnavailableError("the RPC endpoint refused: nonce too low")
        known = self.pool.get(key)
        if known is not None and known.hash == digest:
            return digest
        if known is not None and fields["maxFeePerGas"] * 10 < known.fee * 11:
            raise ChainUnavailableError("the RPC endpoint refused: replacement transaction underpriced")
        self.pool[key] = self._sent[digest] = PooledTransaction(
            digest,
            *key,
            fields["contract"],
            fields["function"],
            fields["arguments"],
            fields["value"],
            fields["maxFeePerGas"],
        )
        return digest

    async def receipt(self, transaction_hash: bytes) -> Receipt | None:
        self._fault()
        for content in self._chain:
            for mined in content.transactions:
                if mined.transaction.hash == transaction_hash:
                    return Receipt(
                        transaction_hash, content.block.number, content.block.hash, mined.succeeded, 21_000, ()
                    )
        return None

    async def transfer(self, transaction_hash: bytes) -> Transfer | None:
        self._fault()
        for content in self._chain:
            for mined in content.transactions:
                sent = mined.transaction
                if sent.hash == transaction_hash:
                    return Transfer(sent.sender, sent.function, sent.value, content.block.number, mined.succeeded)
        return None

    # ---------------------------------------------------------------------------------------------------------- inside

    def _fault(self) -> None:
        if self._interruption is not None:
            calls, change = self._interruption
            self._interruption = (calls - 1, change) if calls > 1 else None
            if calls <= 1:
                change()
        if self.faults:
            self.faults -= 1
            raise ChainUnavailableError("simulated outage")

    def _count(self, sender: str) -> int:
        return sum(mined.transaction.sender == sender for content in self._chain for mined in content.transactions)

    def _take(self) -> tuple[MinedTransaction, ...]:
        mined: list[MinedTransaction] = []
        for sender in sorted({sender for sender, _ in self.pool}):
            nonce = self._count(sender)
            while (transaction := self.pool.pop((sender, nonce), None)) is not None:
                before = [*self.executed(), *(item.transaction for item in mined if item.succeeded)]
                mined.append(MinedTransaction(transaction, self.execute(transaction, before)))
                nonce += 1
            for stale in [key for key in self.pool if key[0] == sender and key[1] < nonce]:
                del self.pool[stale]
        return tuple(mined)


class Traffic:
    """Plausible events for blocks on top of a chain: what could happen next, given what happened on that fork."""

    def __init__(self, seed: int, *, first_identity: int = 0) -> None:
        self._random = random.Random(seed)
        # Nodes and requests are numbered; a second source of events for one chain begins elsewhere.
        self._serial = first_identity

    def block(self, chain: SimulatedChain, *, above: int | None = None) -> list[NewEvent]:
        """Up to four events that may follow the events of `chain` up to block `above`."""
        happened = [event for event, block in chain.history() if above is None or block.number <= above]
        events: list[NewEvent] = []
        for _ in range(self._random.randrange(5)):
            seen = [(event.contract, event.name, dict(event.arguments)) for event in happened] + events
            events.append(self._next(seen))
        return events

    def _next(self, seen: list[NewEvent]) -> NewEvent:
        nodes = [a["node"] for _, name, a in seen if name == "NodeRegistered"]
        opened = [a["requestId"] for _, name, a in seen if name == "RequestOpened"]
        routed = {a["requestId"]: a["nodes"] for _, name, a in seen if name == "RequestRouted"}
        choices: list[Callable[[], NewEvent]] = [self._register, self._open]
        if nodes:
            choices += [lambda: self._node_event(nodes)] * 2
        if opened:
            choices += [lambda: self._request_event(opened, routed)] * 4
        choices.append(lambda: self._credit(nodes))
        return self._random.choice(choices)()

    def _number(self) -> int:
        self._serial += 1
        return self._serial

    def _register(self) -> NewEvent:
        node = address(self._number().to_bytes(20, "big"))
        arguments = {
            "node": node,
            "operator": address((2**100 + self._serial).to_bytes(20, "big")),
            "staked": self._random.randrange(2**256),
            "activeFrom": GENESIS_TIME,
            "certificateHash": self._random.randbytes(32),
            "endpoint": f"node-{self._serial}:1",
        }
        return "NodeRegistry", "NodeRegistered", arguments

    def _open(self) -> NewEvent:
        number = self._number()
        arguments = {
            "requestId": number.to_bytes(32, "big"),
            "requester": address((2**99 + number).to_bytes(20, "big")),
            "planId": bytes(32),
            "deposit": self._random.randrange(2**128),
            "feePerToken": 7,
            "promptTokens": 3,
            "maximumTokens": 9,
            "inputCommitment": self._random.randbytes(32),
            "secretHash": self._random.randbytes(32),
            "deadline": GENESIS_TIME + 60,
        }
        return "InferenceEscrow", "RequestOpened", arguments

    def _credit(self, nodes: list[str]) -> NewEvent:
        account = self._random.choice(nodes) if nodes else address(bytes(20))
        contract = self._random.choice(["NodeRegistry", "InferenceEscrow", "OutputVerification"])
        if self._random.random() < 0.3:
            return contract, "CreditWithdrawn", {"account": account, "amount": 1}
        return contract, "Credited", {"account": account, "amount": 1, "credit": self._random.randrange(2**256)}

    def _node_event(self, nodes: list[str]) -> NewEvent:
        node, amount = self._random.choice(nodes), self._random.randrange(2**200)
        options: list[tuple[str, dict[str, Any]]] = [
            ("StakeAdded", {"amount": amount, "staked": amount, "warmFrom": GENESIS_TIME + 5}),
            ("ThawStarted", {"amount": amount, "thawing": amount, "thawEnd": GENESIS_TIME + 9}),
            ("ExitStarted", {"thawEnd": GENESIS_TIME + 9}),
            ("NodeRemoved", {}),
            ("NodeJailed", {"jailedUntil": self._random.choice([GENESIS_TIME + 9, 2**64 - 1])}),
            ("NodeReleased", {}),
            ("NodeSlashed", {"reason": 0, "amount": 5, "burned": 5, "staked": amount, "thawing": 0}),
            ("DutyOpened", {"openDuties": self._random.randrange(9)}),
        ]
        name, arguments = self._random.choice(options)
        return "NodeRegistry", name, {"node": node, **arguments}

    def _request_event(self, opened: list[bytes], routed: Mapping[bytes, tuple[str, ...]]) -> NewEvent:
        request = self._random.choice(opened)
        if request not in routed:
            nodes = tuple(address(number.to_bytes(20, "big")) for number in (1, 2))
            return (
                "InferenceEscrow",
                "RequestRouted",
                {"requestId": request, "nodes": nodes, "deadline": GENESIS_TIME + 99},
            )
        stage, node = self._random.randrange(2), address(self._random.randrange(3).to_bytes(20, "big"))
        root = self._random.randbytes(32)
        reveal = {
            "sketch": self._random.randbytes(32),
            "outputTokens": self._random.randrange(10),
            "salt": self._random.randbytes(32),
        }
        options: list[tuple[str, str, dict[str, Any]]] = [
            ("OutputVerification", "StageCommitted", {"stage": stage, "node": node, "commitment": reveal["salt"]}),
            ("OutputVerification", "StageRevealed", {"stage": stage, "node": node, "evidenceRoot": root, **reveal}),
            (
                "OutputVerification",
                "AttestationCommitted",
                {"round": 1, "stage": stage, "node": node, "commitment": reveal["salt"], "stake": 5},
            ),
            (
                "OutputVerification",
                "AttestationRevealed",
                {"round": 1, "stage": stage, "node": node, "innerSketch": root, **reveal},
            ),
            (
                "OutputVerification",
                "CommitteeDrawn",
                {"round": 1, "sampled": True, "seed": reveal["salt"], "secret": reveal["salt"], "attestDeadline": 1},
            ),
            ("InferenceEscrow", "RequestRefunded", {"requester": node, "refunded": 1}),
        ]
        contract, name, arguments = self._random.choice(options)
        return contract, name, {"requestId": request, **arguments}
