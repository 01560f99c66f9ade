"""The books of RequestTabs, kept by an auditor beside those of the other contracts (`bsns.audit.books`).

Owns what tabs and batches did with money. A tab's running balance gives its states, the amounts the movements; a batch
is charged a pot, of which opened leaves take deposits of the escrow, and the rest is paid out or goes back. Promises
that whatever does not add up is a failed check that names the log. What a leaf becomes is a request like any other.
Credits are entered by `bsns.audit.books`, which tells here whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from eth_typing import ChecksumAddress

from bsns.audit.entries import BatchEntry, Place, TabMovement, TabState
from bsns.audit.errors import AuditError
from bsns.protocol.identifiers import address

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import ChainEvent

BATCHES: Final = "MONEY-04: each batch"
TABS: Final = "MONEY-04: each tab"
Note = Callable[[str, bool, str], None]
# Fields of IRequestTabs.Batch as an event shows them.
_FEE, _SEGMENTS, _SHARES = 2, 5, 6


@dataclass(slots=True)
class _TabFold:
    balance: int = 0
    start: int = 0
    funded: int = 0
    charged: int = 0
    restored: int = 0
    withdrawn: int = 0


@dataclass(slots=True)
class _BatchFold:
    posted: Place
    collector: ChecksumAddress
    plan_id: bytes
    fee_per_token: int
    tokens: int
    tickets: int
    charged: int = 0
    taken: int = 0
    restored: int = 0
    credited: int = 0
    paid: int = 0
    fee: int = 0
    bond: int = 0
    opened: int = 0
    draws: int | None = None
    ended: Place | None = None
    status: str = "Posted"

    @property
    def left(self) -> int:
        """Wei of the pot that are neither taken, paid nor given back."""
        return self.charged - self.taken - self.restored - self.paid - self.fee


@dataclass(slots=True)
class TabSums:
    """Wei over a range."""

    tabs_start: int = 0
    funded: int = 0
    restored: int = 0
    charged: int = 0
    withdrawn: int = 0
    pots_start: int = 0
    taken: int = 0
    paid: int = 0
    fees: int = 0
    bonds_start: int = 0
    bonds_put_down: int = 0
    bonds_returned: int = 0
    bonds_burned: int = 0


@dataclass(slots=True)
class TabBooks:
    """See the module. `tokens_per_draw` of the contract's terms gives the bond of a batch."""

    note: Note
    tokens_per_draw: int = 0
    sums: TabSums = field(default_factory=TabSums)
    records: bool = False
    movements: list[TabMovement] = field(default_factory=list)
    _tabs: dict[tuple[ChecksumAddress, ChecksumAddress], _TabFold] = field(default_factory=dict)
    _open: dict[bytes, _BatchFold] = field(default_factory=dict)
    _range: dict[bytes, _BatchFold] = field(default_factory=dict)
    # Bonds of those who challenged a leaf, by request.
    _challenges: dict[bytes, int] = field(default_factory=dict)

    def open_range(self) -> None:
        """What was entered so far is the start; what follows is written down."""
        self.records = True
        self._tabs = {key: item for key, item in self._tabs.items() if item.balance}
        for item in self._tabs.values():
            item.start = item.balance
            item.funded = item.charged = item.restored = item.withdrawn = 0
        self._range = dict(self._open)
        self.sums = TabSums(tabs_start=self.held(), pots_start=self.pots(), bonds_start=self.bonds())

    def states(self) -> tuple[TabState, ...]:
        """Every tab of the range."""
        return tuple(
            TabState(
                requester, collector, item.start, item.funded, item.restored, item.charged, item.withdrawn, item.balance
            )
            for (requester, collector), item in sorted(self._tabs.items())
        )

    def batches(self) -> tuple[BatchEntry, ...]:
        """Every batch that was not over before the range, in the order of their posts."""
        return tuple(
            BatchEntry(
                batch_id, item.posted, item.collector, item.plan_id, item.tickets, item.tokens, item.charged,
                item.bond, item.draws, item.opened, item.taken, item.paid, item.fee, item.restored, item.ended,
                item.status,
            )
            for batch_id, item in self._range.items()
        )  # fmt: skip

    def held(self) -> int:
        """Wei on all tabs."""
        return sum(item.balance for item in self._tabs.values())

    def pots(self) -> int:
        """Wei of batches that are not over."""
        return sum(item.left for item in self._open.values())

    def bonds(self) -> int:
        """Bonds of batches that are not over, and of those who challenged a leaf."""
        return sum(item.bond for item in self._open.values()) + sum(self._challenges.values())

    def live(self) -> Iterable[tuple[bytes, int]]:
        """Batches that are not over, with what was taken of each."""
        return tuple((batch_id, item.taken) for batch_id, item in self._open.items())

    def apply(self, event: ChainEvent) -> str:
        """Enter one event; of a credit, what it is for."""
        values = event.arguments
        match event.name:
            case "TabFunded" | "TabWithdrawn" | "TabCharged" | "TabRestored":
                self._move(event)
            case "BatchPosted":
                self._posted(event)
            case "BatchDrawn":
                batch = self._batch(event)
                batch.draws, batch.status = len(values["offsets"]), "Drawn"
            case "RequestTaken":
                batch = self._batch(event)
                amount = int(values["amount"])
                batch.taken += amount
                batch.opened += 1
                self.sums.taken += amount
                self.note(BATCHES, batch.taken == int(values["taken"]), f"{_shown(event)}: taken is not {batch.taken}")
                self.note(BATCHES, batch.left >= 0, f"{_shown(event)}: more is taken than was charged")
            case "LeafChallenged":
                bond = int(values["bond"])
                self._challenges[bytes(values["requestId"])] = bond
                self.sums.bonds_put_down += bond
            case "ChallengeResolved":
                held = self._challenges.pop(bytes(values["requestId"]), 0)
                self.sums.bonds_returned += int(values["bond"])
                fits = held == int(values["bond"])
                self.note(BATCHES, fits, f"{_shown(event)}: a bond of {values['bond']} wei ends, {held} were held")
            case "BatchSettled" | "BatchVoided":
                self._ended(event)
            case "Credited":
                source = bytes(values["source"])
                batch_or_none = self._open.get(source)
                if batch_or_none is None:
                    return "leaf challenge"
                batch_or_none.credited += int(values["amount"])
                return "batch"
            case _:
                pass  # closings, secrets, entropy, openings: no money moves
        return ""

    def _move(self, event: ChainEvent) -> None:
        values = event.arguments
        key = address(values["requester"]), address(values["collector"])
        tab = self._tabs.setdefault(key, _TabFold())
        before, amount = tab.balance, int(values["amount"])
        sums = self.sums
        match event.name:
            case "TabFunded":
                tab.balance, kind = int(values["balance"]), "funded"
                tab.funded += amount
                sums.funded += amount
                fits = tab.balance == before + amount
            case "TabRestored":
                tab.balance, kind = int(values["balance"]), "restored"
                tab.restored += amount
                sums.restored += amount
                self._batch(event).restored += amount
                fits = tab.balance == before + amount
            case "TabCharged":
                tab.balance, kind = int(values["balance"]), "charged"
                tab.charged += amount
                sums.charged += amount
                self._batch(event).charged += amount
                fits = tab.balance == before - amount
            case _:
                tab.balance, kind = 0, "withdrawn"
                tab.withdrawn += amount
                sums.withdrawn += amount
                fits = before == amount
        self.note(TABS, fits, f"{_shown(event)}: {amount} wei {kind}, from {before} to {tab.balance}")
        if self.records:
            batch = bytes(values["batchId"]) if "batchId" in values else None
            self.movements.append(TabMovement(_place(event), kind, *key, amount, tab.balance, batch))

    def _posted(self, event: ChainEvent) -> None:
        values = event.arguments
        shown = values["batch"]
        fee, segments = int(shown[_FEE]), shown[_SEGMENTS]
        tokens, tickets = sum(int(item[3]) for item in segments), sum(int(item[2]) for item in segments)
        batch = _BatchFold(
            _place(event), address(values["collector"]), bytes(values["planId"]), fee, tokens, tickets,
            bond=self.tokens_per_draw * fee,
        )  # fmt: skip
        self.sums.bonds_put_down += batch.bond
        batch_id = bytes(values["batchId"])
        self._open[batch_id] = batch
        if self.records:
            self._range[batch_id] = batch

    def _ended(self, event: ChainEvent) -> None:
        values, batch_id = event.arguments, bytes(event.arguments["batchId"])
        batch = self._batch(event)
        del self._open[batch_id]
        batch.ended = _place(event)
        pot = batch.tokens * batch.fee_per_token
        self.note(BATCHES, batch.charged == pot, f"{_shown(event)}: {batch.charged} wei charged for {pot}")
        self.note(BATCHES, int(values["taken"]) == batch.taken, f"{_shown(event)}: taken is not {batch.taken}")
        if event.name == "BatchSettled":
            batch.status = "Settled"
            batch.paid, batch.fee = int(values["paidToExecutors"]), int(values["protocolFee"])
            self.sums.paid += batch.paid
            self.sums.fees += batch.fee
            self.sums.bonds_returned += batch.bond
            due = batch.paid + batch.fee + batch.bond
            self.note(BATCHES, batch.credited == due, f"{_shown(event)}: {batch.credited} wei credited, {due} due")
        else:
            batch.status = "Void"
            self.sums.bonds_burned += batch.bond
            fits = (int(values["restored"]), int(values["burned"])) == (batch.restored, batch.bond)
            self.note(BATCHES, fits, f"{_shown(event)}: restored {batch.restored} wei, a bond of {batch.bond}")
        self.note(BATCHES, batch.left == 0, f"{_shown(event)}: {batch.left} wei of the pot went nowhere")

    def _batch(self, event: ChainEvent) -> _BatchFold:
        batch_id = bytes(event.arguments["batchId"])
        batch = self._open.get(batch_id)
        if batch is None:
            raise AuditError(
                f"{_shown(event)} is about batch 0x{batch_id.hex()} of which no earlier event tells: the endpoint has "
                "lost logs; try another"
            )
        return batch


def _place(event: ChainEvent) -> Place:
    return Place(event.block_number, event.transaction_hash, event.log_index)


def _shown(event: ChainEvent) -> str:
    return f"block {event.block_number} log {event.log_index} ({event.contract}.{event.name})"
