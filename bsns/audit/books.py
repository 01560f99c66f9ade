"""The books of the contracts, kept by an auditor: every event is entered, one transaction after the other.

Owns what money and stake did, who was promised, judged and punished, and why. `Books.apply` folds the history from its
first event; after `Books.open_range` it also writes down each entry, and `Books.close_range` gives the entries and the
folds of both ends. Keeps two accounts of everything and compares them: the running values that the contracts emit
(`staked`, `credit`) give the states, the amounts give the movements between them. Promises that whatever does not add
up is a failed check that names the log, and that what it keeps is what the range has, the accounts, and what is still
open: live requests, bonds held, plans not yet in effect. Fetches nothing and trusts that no event is missing from its
input; AuditError if one plainly is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from eth_typing import ChecksumAddress

from bsns.audit.chain_facts import NOBODY, STAGE_VERDICTS, VERIFICATION_EVENTS
from bsns.audit.entries import (
    AccountCredit,
    ChallengeEntry,
    CreditEntry,
    Ending,
    Entries,
    JailEntry,
    LogEntry,
    ModelEntry,
    NodeStake,
    PendingPlan,
    Place,
    PlanEntry,
    ReplacementEntry,
    RequestMoney,
    RequestStep,
    RequestVerdicts,
    Reward,
    RouteEntry,
    SlashEntry,
    StageTally,
    StakeMovement,
    Totals,
    WithdrawalEntry,
)
from bsns.audit.errors import AuditError
from bsns.audit.tab_books import BATCHES, TABS, TabBooks
from bsns.protocol.contract_states import SLASH_REASONS
from bsns.protocol.identifiers import address
from bsns.protocol.record import RecordedAssignment

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import ChainEvent

FOR_EVER: Final = 2**64 - 1
"""Jail term of a key that can never come back."""
PROBLEMS_KEPT: Final = 5
"""Problems that a check names; there may be thousands."""

# Names of the checks on what the events say about one another.
RUNNING: Final = "events: running values"
SETTLEMENTS: Final = "MONEY-02: each request"
SLASHES: Final = "STAKE-01: each slash"
PARTS: Final = "STAKE-02: thawing within stake"
BONDS: Final = "MONEY-01: each bond"
JUDGEMENTS: Final = "judgements: each slash and jailing has one"
EVENT_CHECKS: Final = (RUNNING, SETTLEMENTS, SLASHES, PARTS, BONDS, JUDGEMENTS, TABS, BATCHES)


@dataclass(frozen=True, slots=True)
class LiveBond:
    request_id: bytes
    stage: int
    bond: int


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node's account as the books have it, for comparison with the registry's own view."""

    node: ChecksumAddress
    operator: ChecksumAddress
    staked: int
    thawing: int
    active_from: int
    jailed_until: int
    exiting: bool


# ----------------------------------------------------------------------------------------------------------- the folds


@dataclass(slots=True)
class _Node:
    operator: ChecksumAddress = NOBODY
    staked: int = 0
    thawing: int = 0
    active_from: int = 0
    jailed_until: int = 0
    exiting: bool = False
    start: int = 0
    start_thawing: int = 0
    added: int = 0
    thaw_started: int = 0
    withdrawn: int = 0
    slashed: int = 0
    last_operator: ChecksumAddress = NOBODY

    @property
    def is_there(self) -> bool:
        return self.operator != NOBODY

    def status(self, now: int) -> str:
        if not self.is_there:
            return "Absent"
        if self.exiting:
            return "Exiting"
        if self.jailed_until:
            return "Jailed"
        return "Pending" if now < self.active_from else "Active"


@dataclass(slots=True)
class _Credit:
    balance: int = 0
    start: int = 0
    credited: int = 0
    withdrawn: int = 0


@dataclass(slots=True)
class _Request:
    request_id: bytes
    requester: ChecksumAddress
    plan_id: bytes
    opened: Place
    deposit: int
    fee_per_token: int
    prompt_tokens: int
    maximum_tokens: int
    deadline: int
    status: str = "Open"
    steps: list[RequestStep] = field(default_factory=list)
    ending: Ending | None = None


@dataclass(slots=True)
class _Bond:
    at: Place
    challenger: ChecksumAddress
    bond: int


@dataclass(slots=True)
class _Verdicts:
    commitments: int = 0
    sampled: bool | None = None
    rounds: int = 0
    attestations: int = 0
    reveals: int = 0
    tallies: list[StageTally] = field(default_factory=list)
    challenges: dict[Place, ChallengeEntry] = field(default_factory=dict)
    accepted: bool | None = None
    blamed_stage: int | None = None
    entries: list[LogEntry] = field(default_factory=list)


@dataclass(slots=True)
class _Judgement:
    """A log that stage penalties follow, and what has followed so far. Rewards are credited before their slash."""

    at: Place
    request_id: bytes
    stage: int
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Open:
    """What one transaction has begun and a later log of it ends."""

    previous: ChainEvent | None = None
    judgement: _Judgement | None = None
    rewards: list[ChainEvent] = field(default_factory=list)
    payments: dict[bytes, list[ChainEvent]] = field(default_factory=dict)
    concluded: set[bytes] = field(default_factory=set)
    bond: tuple[bytes, Place, str] | None = None
    bond_left: int = 0
    jailings: list[tuple[ChainEvent, _Judgement | None]] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    """Outcome of one check over many events."""

    compared: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Sums:
    burned: int = 0
    deposits_start: int = 0
    opened: int = 0
    executors: int = 0
    verifiers: int = 0
    fees: int = 0
    refunded: dict[str, int] = field(default_factory=lambda: {"settled": 0, "verdict": 0, "expired": 0})
    bonds_start: int = 0
    bonds_put_down: int = 0
    bonds_ended: int = 0


# Of the registry, and about neither stake nor money.
_IGNORED: Final = frozenset({"EndpointChanged", "DutyOpened", "DutyClosed"})


class Books:
    """See the module. `first_block` only goes into the advice of errors; `tokens_per_draw` is RequestTabs'."""

    def __init__(self, first_block: int, tokens_per_draw: int = 0) -> None:
        self._first_block = first_block
        self.tabs = TabBooks(self._note, tokens_per_draw)
        self._records = False
        self._nodes: dict[ChecksumAddress, _Node] = {}
        self._credits: dict[tuple[str, ChecksumAddress], _Credit] = {}
        self._live: dict[bytes, _Request] = {}
        self._bonds: dict[tuple[bytes, int], _Bond] = {}
        self._due: dict[bytes, PendingPlan] = {}
        self._checks = {name: _Tally() for name in EVENT_CHECKS}
        self._sums = _Sums()
        self._movements: list[StakeMovement] = []
        self._models: list[ModelEntry] = []
        self._plans: list[PlanEntry] = []
        self._routes: list[RouteEntry] = []
        self._replacements: list[ReplacementEntry] = []
        self._requests: dict[bytes, _Request] = {}
        self._credit_entries: list[CreditEntry] = []
        self._withdrawals: list[WithdrawalEntry] = []
        self._verdicts: dict[bytes, _Verdicts] = {}
        self._slashes: list[SlashEntry] = []
        self._jailings: list[JailEntry] = []
        self._open = _Open()

    # ------------------------------------------------------------------------------------------------------- the range

    def forget_plans(self, time: int) -> None:
        """Plans in effect at `time` are no longer due. Call it before the range; within it they belong to it."""
        self._due = {key: plan for key, plan in self._due.items() if plan.effective_at > time}

    def open_range(self) -> None:
        """What was entered so far is the start; what follows is written down."""
        self._records = True
        self._nodes = {key: node for key, node in self._nodes.items() if node.is_there}
        self._credits = {key: item for key, item in self._credits.items() if item.balance}
        self._requests = dict(self._live)
        self._sums = _Sums(deposits_start=self._deposits(), bonds_start=self._held())
        self.tabs.open_range()
        for node in self._nodes.values():
            node.start, node.start_thawing = node.staked, node.thawing
            node.added = node.thaw_started = node.withdrawn = node.slashed = 0
        for item in self._credits.values():
            item.start, item.credited, item.withdrawn = item.balance, 0, 0

    def close_range(self, now: int) -> Entries:
        """All entries since `open_range`; `now` is the time of the last block."""
        return Entries(
            totals=self._totals(),
            nodes=tuple(self._node_stakes(now)),
            movements=tuple(self._movements),
            models=tuple(self._models),
            plans=tuple(self._plans),
            plans_due=tuple(self._due.values()),
            routes=tuple(self._routes),
            replacements=tuple(self._replacements),
            requests=tuple(self._money(item, now) for item in self._requests.values()),
            credits=tuple(sorted(self._credit_entries, key=lambda item: (item.at.block, item.at.log_index))),
            withdrawals=tuple(self._withdrawals),
            accounts=tuple(
                AccountCredit(contract, account, item.start, item.credited, item.withdrawn, item.balance)
                for (contract, account), item in sorted(self._credits.items())
            ),
            verdicts=tuple(_verdicts_of(key, item) for key, item in self._verdicts.items()),
            slashes=tuple(self._slashes),
            jailings=tuple(self._jailings),
            tab_movements=tuple(self.tabs.movements),
            tabs=self.tabs.states(),
            batches=self.tabs.batches(),
        )

    def outcomes(self) -> Iterable[tuple[str, Sequence[str], int, int]]:
        """Name, problems (at most PROBLEMS_KEPT), failures and comparisons of each check of EVENT_CHECKS."""
        for name, item in self._checks.items():
            yield name, item.problems, item.failed, item.compared

    # -------------------------------------------------------------------------------------------- what the chain owes

    def holdings(self, contract: str) -> int:
        """Wei that the contract must hold: stakes, live deposits, bonds, and credits."""
        own = {
            "NodeRegistry": sum(item.staked for item in self._nodes.values()),
            "InferenceEscrow": self._deposits(),
            "OutputVerification": self._held(),
            "RequestTabs": self.tabs.held() + self.tabs.pots() + self.tabs.bonds(),
        }.get(contract, 0)
        return own + sum(item.balance for (owner, _), item in self._credits.items() if owner == contract)

    def node_states(self) -> tuple[NodeState, ...]:
        """Accounts of all nodes of the range; a removed one is all zeros."""
        return tuple(
            NodeState(key, n.operator, n.staked, n.thawing, n.active_from, n.jailed_until, n.exiting)
            if n.is_there
            else NodeState(key, NOBODY, 0, 0, 0, 0, False)
            for key, n in self._nodes.items()
        )

    def sortition_total(self) -> int:
        """The registry's denominator of a draw: staked - thawing of whoever is neither jailed nor exiting."""
        counted = (n for n in self._nodes.values() if n.is_there and not n.exiting and n.jailed_until == 0)
        return sum(n.staked - n.thawing for n in counted)

    def live_bonds(self) -> tuple[LiveBond, ...]:
        return tuple(LiveBond(key[0], key[1], item.bond) for key, item in self._bonds.items())

    # --------------------------------------------------------------------------------------------------------- entering

    def apply(self, transaction: Sequence[ChainEvent]) -> None:
        """Enter all events of the next transaction, in the order of their logs."""
        self._open = _Open()
        for event in transaction:
            match event.contract:
                case "NodeRegistry":
                    self._registry(event)
                case "ShardAssignments":
                    self._assignments(event)
                case "InferenceEscrow":
                    self._escrow(event)
                case "RequestTabs":
                    self._tab(event)
                case _:
                    self._verification(event)
            self._open.previous = event
        self._end_transaction()

    def _tab(self, event: ChainEvent) -> None:
        role = self.tabs.apply(event)
        if event.name == "CreditWithdrawn":
            self._withdrawn(event)
        elif event.name == "Credited":
            self._credited(event)
            source = bytes(event.arguments["source"])
            self._credit_entry(event, role, source if role == "leaf challenge" else None)

    def _end_transaction(self) -> None:
        """Whatever a transaction began and did not end is wrong."""
        done = self._open
        for event, judgement in done.jailings:
            self._jailed(event, judgement)
        for event in done.rewards:
            self._note(SLASHES, False, f"{_shown(event)} credits a reward and no slash follows")
        for events in done.payments.values():
            for event in events:
                self._note(SETTLEMENTS, False, f"{_shown(event)} credits and the request does not end there")
        self._end_bond()

    def _note(self, check: str, ok: bool, problem: str) -> None:
        item = self._checks[check]
        item.compared += 1
        if not ok:
            item.failed += 1
            if len(item.problems) < PROBLEMS_KEPT:
                item.problems.append(problem)

    def _gap(self, event: ChainEvent, what: str) -> AuditError:
        return AuditError(
            f"{_shown(event)} is about {what} of which no earlier event tells: the deployment's first_block "
            f"{self._first_block} is too late, or the RPC endpoint has lost logs; correct the deployment file or try "
            "another endpoint"
        )

    # --------------------------------------------------------------------------------------------------------- registry

    def _registry(self, event: ChainEvent) -> None:
        values = event.arguments
        match event.name:
            case "Credited":
                self._credited(event)
                self._open.rewards.append(event)
            case "CreditWithdrawn":
                self._withdrawn(event)
            case "NodeJailed":
                self._jail(event)
            case "NodeRegistered":
                self._register(event)
            case name if name in _IGNORED:
                return
            case _:
                node_key = _address(values["node"])
                node = self._nodes.get(node_key)
                if node is None or not node.is_there:
                    raise self._gap(event, f"node {node_key}")
                self._move_stake(event, node_key, node)
                self._note(PARTS, node.thawing <= node.staked, f"{_shown(event)} leaves more thawing than staked")

    def _register(self, event: ChainEvent) -> None:
        values = event.arguments
        key = _address(values["node"])
        node = self._nodes.setdefault(key, _Node())
        self._note(RUNNING, not node.is_there, f"{_shown(event)} registers a node that is there already")
        node.operator = node.last_operator = _address(values["operator"])
        node.staked, node.thawing = int(values["staked"]), 0
        node.active_from, node.jailed_until, node.exiting = int(values["activeFrom"]), 0, False
        node.added += node.staked
        self._moved(event, "registered", key, node, node.staked)

    def _move_stake(self, event: ChainEvent, key: ChecksumAddress, node: _Node) -> None:
        values, before, thawing = event.arguments, node.staked, node.thawing
        amount = int(values.get("amount", 0))
        match event.name:
            case "StakeAdded":
                node.staked = int(values["staked"])
                node.added += amount
                self._note(
                    RUNNING, node.staked == before + amount, f"{_shown(event)}: staked is not {before} + {amount}"
                )
                self._moved(event, "added", key, node, amount)
            case "ThawStarted":
                node.thawing = int(values["thawing"])
                node.thaw_started += amount
                fits = node.thawing == thawing + amount
                self._note(RUNNING, fits, f"{_shown(event)}: thawing is not {thawing} + {amount}")
                self._moved(event, "thaw started", key, node, amount)
            case "ExitStarted":
                node.exiting, node.thawing = True, node.staked
                node.thaw_started += node.staked - thawing
                self._moved(event, "exit started", key, node, node.staked - thawing)
            case "StakeWithdrawn":
                node.staked, node.thawing = int(values["staked"]), 0
                node.withdrawn += amount
                fits = node.staked == before - amount and amount == thawing
                self._note(RUNNING, fits, f"{_shown(event)}: {amount} of {before} staked, {thawing} thawing")
                payee = _address(values["operator"])
                self._note(RUNNING, payee == node.operator, f"{_shown(event)}: paid to {payee}, not its operator")
                self._moved(event, "withdrawn", key, node, amount)
            case "NodeRemoved":
                self._note(RUNNING, node.staked == 0, f"{_shown(event)} removes a node with {node.staked} wei at stake")
                self._moved(event, "removed", key, node, 0)
                node.operator, node.active_from, node.jailed_until, node.exiting = NOBODY, 0, 0, False
            case "NodeReleased":
                node.jailed_until = 0
                self._moved(event, "released", key, node, 0)
            case "NodeSlashed":
                self._slash(event, key, node)

    def _slash(self, event: ChainEvent, key: ChecksumAddress, node: _Node) -> None:
        values, before, thawing = event.arguments, node.staked, node.thawing
        amount, burned = int(values["amount"]), int(values["burned"])
        node.staked, node.thawing = int(values["staked"]), int(values["thawing"])
        node.slashed += amount
        self._sums.burned += burned
        self._note(RUNNING, node.staked == before - amount, f"{_shown(event)}: staked is not {before} - {amount}")
        left = thawing * node.staked // before if before else 0
        self._note(RUNNING, node.thawing == left, f"{_shown(event)}: thawing is not {left}, its share of what is left")
        rewards, self._open.rewards = self._open.rewards, []
        given = sum(int(item.arguments["amount"]) for item in rewards)
        fits = burned + given == amount
        self._note(SLASHES, fits, f"{_shown(event)}: {burned} burned and {given} credited are not {amount}")
        judgement, reason = self._open.judgement, SLASH_REASONS[int(values["reason"])]
        self._note(JUDGEMENTS, judgement is not None, f"{_shown(event)} follows no judgement in its transaction")
        if judgement is not None:
            judgement.reasons[key] = reason
        request_id = None if judgement is None else judgement.request_id
        for item in rewards:
            self._credit_entry(item, "slash reward", request_id)
        self._moved(event, "slashed", key, node, amount)
        if self._records:
            self._slashes.append(
                SlashEntry(
                    _place(event),
                    key,
                    node.operator,
                    reason,
                    amount,
                    burned,
                    tuple(Reward(_address(e.arguments["account"]), int(e.arguments["amount"])) for e in rewards),
                    node.staked,
                    node.thawing,
                    request_id,
                    None if judgement is None else judgement.stage,
                    None if judgement is None else judgement.at,
                )
            )

    def _jail(self, event: ChainEvent) -> None:
        node = self._nodes.setdefault(_address(event.arguments["node"]), _Node())
        until = int(event.arguments["jailedUntil"])
        self._note(RUNNING, until > node.jailed_until, f"{_shown(event)} shortens a jail term")
        node.jailed_until = until
        self._open.jailings.append((event, self._open.judgement))

    def _jailed(self, event: ChainEvent, judgement: _Judgement | None) -> None:
        """Once the transaction is over: the slash that a jailing belongs to may follow it."""
        self._note(JUDGEMENTS, judgement is not None, f"{_shown(event)} follows no judgement in its transaction")
        if not self._records:
            return
        node = _address(event.arguments["node"])
        self._jailings.append(
            JailEntry(
                _place(event),
                node,
                int(event.arguments["jailedUntil"]),
                "Silence" if judgement is None else judgement.reasons.get(node, "Silence"),
                None if judgement is None else judgement.request_id,
                None if judgement is None else judgement.stage,
                None if judgement is None else judgement.at,
            )
        )

    def _moved(self, event: ChainEvent, kind: str, key: ChecksumAddress, node: _Node, amount: int) -> None:
        if self._records:
            entry = StakeMovement(_place(event), kind, key, node.operator, amount, node.staked, node.thawing)
            self._movements.append(entry)

    # ------------------------------------------------------------------------------------------------------ assignments

    def _assignments(self, event: ChainEvent) -> None:
        values = event.arguments
        if event.name == "ModelRegistered" and self._records:
            self._models.append(
                ModelEntry(
                    _place(event),
                    bytes(values["modelId"]),
                    _address(values["registrant"]),
                    bytes(values["manifestHash"]),
                    bytes(values["weightRoot"]),
                    int(values["unitCount"]),
                    str(values["name"]),
                )
            )
        if event.name != "PlanPublished":
            return
        plan_id, model_id = bytes(values["planId"]), bytes(values["modelId"])
        publisher, epoch, effective_at = _address(values["publisher"]), int(values["epoch"]), int(values["effectiveAt"])
        self._due[plan_id] = PendingPlan(_place(event), plan_id, model_id, publisher, epoch, effective_at)
        if self._records:
            assignments = tuple(RecordedAssignment(*item) for item in values["assignments"])
            self._plans.append(
                PlanEntry(
                    _place(event),
                    plan_id,
                    model_id,
                    publisher,
                    epoch,
                    effective_at,
                    int(values["feePerToken"]),
                    bytes(values["root"]),
                    bytes(values["measurementsHash"]),
                    tuple(dict.fromkeys(item.node for item in assignments)),
                    assignments,
                )
            )

    # ----------------------------------------------------------------------------------------------------------- escrow

    def _escrow(self, event: ChainEvent) -> None:
        values = event.arguments
        match event.name:
            case "Credited":
                self._credited(event)
                self._open.payments.setdefault(bytes(values["requestId"]), []).append(event)
            case "CreditWithdrawn":
                self._withdrawn(event)
            case "RequestOpened":
                self._request_opened(event)
            case _:
                request = self._live.get(bytes(values["requestId"]))
                if request is None:
                    raise self._gap(event, f"request 0x{bytes(values['requestId']).hex()}")
                match event.name:
                    case "RequestRouted":
                        self._step(event, request, "Routed")
                        if self._records:
                            nodes = tuple(_address(item) for item in values["nodes"])
                            self._routes.append(RouteEntry(_place(event), request.request_id, request.deadline, nodes))
                    case "StageReplaced":
                        if self._records:
                            nodes = _address(values["replaced"]), _address(values["node"])
                            entry = ReplacementEntry(_place(event), request.request_id, int(values["stage"]), *nodes)
                            self._replacements.append(entry)
                    case "RequestCommitted":
                        self._step(event, request, "Committed")
                    case "RequestVerified":
                        self._step(event, request, "Verified")
                    case "RequestSettled":
                        self._end_request(event, request, "settled")
                    case "RequestRefunded":
                        # A verdict concludes before it refunds; a claim after the deadline concludes afterwards.
                        judged = request.request_id in self._open.concluded
                        self._end_request(event, request, "verdict" if judged else "expired")

    def _request_opened(self, event: ChainEvent) -> None:
        values = event.arguments
        request = _Request(
            bytes(values["requestId"]),
            _address(values["requester"]),
            bytes(values["planId"]),
            _place(event),
            int(values["deposit"]),
            int(values["feePerToken"]),
            int(values["promptTokens"]),
            int(values["maximumTokens"]),
            int(values["deadline"]),
        )
        known = request.request_id in self._live
        self._note(SETTLEMENTS, not known, f"{_shown(event)} opens a request that is open already")
        self._live[request.request_id] = request
        self._sums.opened += request.deposit
        if self._records:
            self._requests[request.request_id] = request
            request.steps.append(RequestStep(request.opened, "Open", request.deadline))

    def _step(self, event: ChainEvent, request: _Request, status: str) -> None:
        request.status = status
        deadline = event.arguments.get("deadline")
        if deadline is not None:
            request.deadline = int(deadline)
        if self._records:
            request.steps.append(RequestStep(_place(event), status, None if deadline is None else int(deadline)))

    def _end_request(self, event: ChainEvent, request: _Request, because: str) -> None:
        values, where = event.arguments, _shown(event)
        executors, verifiers = int(values.get("paidToExecutors", 0)), int(values.get("paidToVerifiers", 0))
        fee, refunded = int(values.get("protocolFee", 0)), int(values["refunded"])
        total = executors + verifiers + fee + refunded
        fits = total == request.deposit
        self._note(SETTLEMENTS, fits, f"{where}: paid, fee and refund are {total} wei, deposited {request.deposit}")
        paid = self._open.payments.pop(request.request_id, [])
        parts = (("protocol", fee), ("executor", executors), ("verifier", verifiers), ("requester", refunded))
        roles = _roles([int(item.arguments["amount"]) for item in paid], parts)
        self._note(SETTLEMENTS, roles is not None, f"{where}: what was credited before it is not its parts")
        for item, role in zip(paid, roles or ["unknown"] * len(paid)):
            self._credit_entry(item, role, request.request_id)
            if role == "requester":
                fits = _address(item.arguments["account"]) == request.requester
                self._note(SETTLEMENTS, fits, f"{_shown(item)} refunds somebody else than the requester")
        request.status = "Settled" if because == "settled" else "Refunded"
        request.ending = Ending(_place(event), because, executors, verifiers, fee, refunded)
        self._sums.executors += executors
        self._sums.verifiers += verifiers
        self._sums.fees += fee
        self._sums.refunded[because] += refunded
        del self._live[request.request_id]

    # ----------------------------------------------------------------------------------------------------- verification

    def _verification(self, event: ChainEvent) -> None:
        values = event.arguments
        if event.name == "Credited":
            self._credited(event)
            self._bond_credited(event)
            return
        if event.name == "CreditWithdrawn":
            self._withdrawn(event)
            return
        request_id = bytes(values["requestId"])
        if event.name in ("StageTallied", "ContradictionProven"):
            self._open.judgement = _Judgement(_place(event), request_id, int(values["stage"]))
        elif event.name == "Challenged":
            self._challenged(event, request_id)
        elif event.name == "ChallengeResolved":
            self._challenge_resolved(event, request_id)
        elif event.name == "RequestConcluded":
            self._open.concluded.add(request_id)
        if self._records and event.name in VERIFICATION_EVENTS:
            self._judge(event, self._verdicts.setdefault(request_id, _Verdicts()))

    def _challenged(self, event: ChainEvent, request_id: bytes) -> None:
        stage, bond = int(event.arguments["stage"]), int(event.arguments["bond"])
        known = (request_id, stage) in self._bonds
        self._note(BONDS, not known, f"{_shown(event)} puts a second bond on a stage")
        self._bonds[request_id, stage] = _Bond(_place(event), _address(event.arguments["challenger"]), bond)
        self._sums.bonds_put_down += bond

    def _challenge_resolved(self, event: ChainEvent, request_id: bytes) -> None:
        self._end_bond()
        values, stage = event.arguments, int(event.arguments["stage"])
        held = self._bonds.pop((request_id, stage), None)
        if held is None:
            raise self._gap(event, f"a challenge of stage {stage} of request 0x{request_id.hex()}")
        bond = int(values["bond"])
        fits = bond == held.bond and _address(values["challenger"]) == held.challenger
        self._note(BONDS, fits, f"{_shown(event)} ends another bond than the one put down")
        before = self._open.previous
        decided = before is not None and before.name == "StageTallied" and int(before.arguments["stage"]) == stage
        outcome = "upheld" if values["upheld"] else "refuted" if decided else "returned"
        self._sums.bonds_ended += bond
        role = "bond forfeited" if outcome == "refuted" else "bond returned"
        self._open.bond, self._open.bond_left = (request_id, _place(event), role), bond
        if self._records:
            entry = ChallengeEntry(held.at, stage, held.challenger, held.bond, outcome, _place(event))
            self._verdicts.setdefault(request_id, _Verdicts()).challenges[held.at] = entry

    def _bond_credited(self, event: ChainEvent) -> None:
        if self._open.bond is None:
            self._note(BONDS, False, f"{_shown(event)} credits and no challenge ends there")
            self._credit_entry(event, "unknown", None)
            return
        request_id, _, role = self._open.bond
        self._open.bond_left -= int(event.arguments["amount"])
        self._credit_entry(event, role, request_id)

    def _end_bond(self) -> None:
        if self._open.bond is not None:
            _, at, _ = self._open.bond
            left = self._open.bond_left
            self._note(BONDS, left == 0, f"block {at.block} log {at.log_index}: {left} wei of the bond went to nobody")
        self._open.bond = None

    def _judge(self, event: ChainEvent, item: _Verdicts) -> None:
        values = event.arguments
        at = _place(event)
        item.entries.append(LogEntry(at, event.name, _values(event)))
        match event.name:
            case "StageCommitted":
                item.commitments += 1
            case "CommitteeDrawn":
                item.sampled = bool(values["sampled"])
                item.rounds = 1
            case "RoundEscalated":
                item.rounds = int(values["round"])
            case "AttestationCommitted":
                item.attestations += 1
            case "StageRevealed" | "AttestationRevealed":
                item.reveals += 1
            case "StageTallied":
                item.rounds = max(item.rounds, int(values["round"]))
                item.tallies.append(
                    StageTally(
                        at,
                        int(values["round"]),
                        int(values["stage"]),
                        STAGE_VERDICTS[int(values["verdict"])],
                        _address(values["medoid"]),
                        int(values["support"]),
                        int(values["revealedStake"]),
                        int(values["distance"]),
                    )
                )
            case "Challenged":
                bond = int(values["bond"])
                entry = ChallengeEntry(at, int(values["stage"]), _address(values["challenger"]), bond, None, None)
                item.challenges[at] = entry
            case "RequestConcluded":
                item.accepted, item.blamed_stage = bool(values["accepted"]), int(values["blamedStage"])

    # ---------------------------------------------------------------------------------------------------------- credits

    def _credited(self, event: ChainEvent) -> None:
        values = event.arguments
        item = self._credits.setdefault((event.contract, _address(values["account"])), _Credit())
        before, amount = item.balance, int(values["amount"])
        item.balance = int(values["credit"])
        item.credited += amount
        self._note(RUNNING, item.balance == before + amount, f"{_shown(event)}: credit is not {before} + {amount}")

    def _credit_entry(self, event: ChainEvent, role: str, request_id: bytes | None) -> None:
        if self._records:
            values = event.arguments
            account, amount, balance = _address(values["account"]), int(values["amount"]), int(values["credit"])
            entry = CreditEntry(_place(event), event.contract, account, amount, balance, role, request_id)
            self._credit_entries.append(entry)

    def _withdrawn(self, event: ChainEvent) -> None:
        account, amount = _address(event.arguments["account"]), int(event.arguments["amount"])
        item = self._credits.setdefault((event.contract, account), _Credit())
        self._note(RUNNING, item.balance == amount, f"{_shown(event)}: {amount} of a credit of {item.balance}")
        item.balance = 0
        item.withdrawn += amount
        if self._records:
            self._withdrawals.append(WithdrawalEntry(_place(event), event.contract, account, amount))

    # ------------------------------------------------------------------------------------------------------------- sums

    def _deposits(self) -> int:
        return sum(item.deposit for item in self._live.values())

    def _held(self) -> int:
        return sum(item.bond for item in self._bonds.values())

    def _totals(self) -> Totals:
        nodes, accounts, sums = list(self._nodes.values()), list(self._credits.values()), self._sums
        tabs = self.tabs.sums
        return Totals(
            stake_start=sum(item.start for item in nodes),
            stake_added=sum(item.added for item in nodes),
            stake_withdrawn=sum(item.withdrawn for item in nodes),
            stake_slashed=sum(item.slashed for item in nodes),
            stake_burned=sums.burned,
            stake_end=sum(item.staked for item in nodes),
            deposits_start=sums.deposits_start,
            deposits_opened=sums.opened,
            paid_to_executors=sums.executors,
            paid_to_verifiers=sums.verifiers,
            protocol_fees=sums.fees,
            refunded_at_settlement=sums.refunded["settled"],
            refunded_by_verdict=sums.refunded["verdict"],
            refunded_after_expiry=sums.refunded["expired"],
            deposits_end=self._deposits(),
            bonds_start=sums.bonds_start,
            bonds_put_down=sums.bonds_put_down,
            bonds_ended=sums.bonds_ended,
            bonds_end=self._held(),
            tabs_start=tabs.tabs_start,
            tabs_funded=tabs.funded,
            tabs_restored=tabs.restored,
            tabs_charged=tabs.charged,
            tabs_withdrawn=tabs.withdrawn,
            tabs_end=self.tabs.held(),
            pots_start=tabs.pots_start,
            pots_taken=tabs.taken,
            pots_paid=tabs.paid,
            pots_fees=tabs.fees,
            pots_end=self.tabs.pots(),
            tab_bonds_start=tabs.bonds_start,
            tab_bonds_put_down=tabs.bonds_put_down,
            tab_bonds_returned=tabs.bonds_returned,
            tab_bonds_burned=tabs.bonds_burned,
            tab_bonds_end=self.tabs.bonds(),
            credits_start=sum(item.start for item in accounts),
            credited=sum(item.credited for item in accounts),
            credits_withdrawn=sum(item.withdrawn for item in accounts),
            credits_end=sum(item.balance for item in accounts),
        )

    def _node_stakes(self, now: int) -> Iterable[NodeStake]:
        for key, node in self._nodes.items():
            if node.last_operator == NOBODY:  # jailed without ever having had an account
                continue
            yield NodeStake(
                key,
                node.last_operator,
                node.start,
                node.start_thawing,
                node.added,
                node.thaw_started,
                node.withdrawn,
                node.slashed,
                node.staked,
                node.thawing,
                node.status(now),
            )

    def _money(self, item: _Request, now: int) -> RequestMoney:
        expired = item.ending is None and now > item.deadline
        return RequestMoney(
            item.request_id,
            item.requester,
            item.plan_id,
            item.opened,
            item.deposit,
            item.fee_per_token,
            item.prompt_tokens,
            item.maximum_tokens,
            tuple(item.steps),
            item.ending,
            "Expired" if expired else item.status,
        )


def _verdicts_of(request_id: bytes, item: _Verdicts) -> RequestVerdicts:
    return RequestVerdicts(
        request_id,
        item.commitments,
        item.sampled,
        item.rounds,
        item.attestations,
        item.reveals,
        tuple(item.tallies),
        tuple(item.challenges.values()),
        item.accepted,
        item.blamed_stage,
        tuple(item.entries),
    )


def _roles(amounts: Sequence[int], parts: Iterable[tuple[str, int]]) -> list[str] | None:
    """Which part each amount belongs to, given in the order of the parts; None if they do not add up to them."""
    roles: list[str] = []
    for role, total in parts:
        while total > 0 and len(roles) < len(amounts) and amounts[len(roles)] <= total:
            total -= amounts[len(roles)]
            roles.append(role)
        if total:
            return None
    return roles if len(roles) == len(amounts) else None


def _values(event: ChainEvent) -> dict[str, str | bool]:
    """Everything but the request, which the entry lies under."""
    found: dict[str, str | bool] = {}
    for name, value in event.arguments.items():
        if name == "requestId":
            continue
        if name == "verdict":
            value = STAGE_VERDICTS[int(value)]
        found[name] = (
            value if isinstance(value, bool) else f"0x{value.hex()}" if isinstance(value, bytes) else str(value)
        )
    return found


@lru_cache(maxsize=4_096)
def _address(value: str) -> ChecksumAddress:
    """The few accounts of many logs: a checksum is a hash, and takes longer than all the rest."""
    return address(value)


def _place(event: ChainEvent) -> Place:
    return Place(event.block_number, event.transaction_hash, event.log_index)


def _shown(event: ChainEvent) -> str:
    return f"block {event.block_number} log {event.log_index} ({event.contract}.{event.name})"
