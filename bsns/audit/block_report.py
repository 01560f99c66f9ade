"""The report on a range of blocks: stakes, assignments, payments, verdicts and penalties, each line with its log.

Owns `bsns audit report`: how a report is made from the chain alone, its one canonical form (UTF-8 JSON, sorted keys, no
spaces, wei as decimal text, one final newline), and how anybody's report is derived again. The history from the
contracts' first block up to the range gives the state at its start; the state after its last block, which the report
names by hash, is compared with what the contracts answer there. Promises that equal ranges of one chain give equal
bytes, that every check is there whether it holds or not, and that `verify_report` names the first field that differs.
Needs the logs since the deployment and the state of the last block. Trusts the RPC endpoint for both.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin, get_type_hints

from eth_typing import ChecksumAddress

from bsns.audit.books import PROBLEMS_KEPT, Books
from bsns.audit.chain_facts import contract_domain
from bsns.audit.entries import (
    AccountCredit,
    BatchEntry,
    CreditEntry,
    Entries,
    JailEntry,
    ModelEntry,
    NodeStake,
    Place,
    PlanEntry,
    ReplacementEntry,
    RequestMoney,
    RequestVerdicts,
    RouteEntry,
    SlashEntry,
    StakeMovement,
    TabMovement,
    TabState,
    Totals,
    WithdrawalEntry,
)
from bsns.audit.errors import AuditError
from bsns.audit.pinned_history import PinnedHistory, Progress, at_once, silent
from bsns.audit.verification import Check
from bsns.protocol.bounded_json import parse_json
from bsns.protocol.record import Big, ContractDomain, Hash

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import Block, ChainClient
    from bsns.chain.deployment import Deployment

REPORT_FORMAT: Final = 3
MAXIMUM_REPORT_BYTES: Final = 512 * 1024 * 1024
"""About a million entries."""
PLANS_UNTIL_PRUNED: Final = 256
"""Plans entered before the range until those in effect are forgotten."""
_SAFE_INTEGER: Final = 2**53
_REQUEST_STATUSES: Final = ("Absent", "Open", "Routed", "Committed", "Verified", "Settled", "Expired", "Refunded")
_BATCH_STATUSES: Final = ("Absent", "Posted", "Drawn", "Settled", "Void")
_BALANCE_RULES: Final = {
    "NodeRegistry": "STAKE-01: balance of NodeRegistry",
    "ShardAssignments": "balance of ShardAssignments",
    "InferenceEscrow": "MONEY-01: balance of InferenceEscrow",
    "OutputVerification": "MONEY-01: balance of OutputVerification",
    "RequestTabs": "MONEY-04: balance of RequestTabs",
}


@dataclass(frozen=True, slots=True)
class BlockStamp:
    """A block, and its time in Unix seconds."""

    number: int
    hash: Hash
    timestamp: int


@dataclass(frozen=True, slots=True)
class Activation:
    """A plan that took effect within the range: `block` is the first whose time reached `effective_at`."""

    block: BlockStamp
    plan_id: Hash
    model_id: Hash
    publisher: ChecksumAddress
    epoch: int
    effective_at: int
    published: Place


@dataclass(frozen=True, slots=True)
class ContractBalance:
    """Wei of a contract after the last block, and what the books say it owes. `forced` is what it has beyond that:
    money can be forced on any account of a chain, and changes no book.
    """

    contract: str
    account: ChecksumAddress
    balance: Big
    books: Big
    forced: Big


@dataclass(frozen=True, slots=True)
class Stakes:
    nodes: tuple[NodeStake, ...]
    movements: tuple[StakeMovement, ...]


@dataclass(frozen=True, slots=True)
class Assignments:
    models: tuple[ModelEntry, ...]
    plans: tuple[PlanEntry, ...]
    activations: tuple[Activation, ...]
    routes: tuple[RouteEntry, ...]
    replacements: tuple[ReplacementEntry, ...]


@dataclass(frozen=True, slots=True)
class Payments:
    requests: tuple[RequestMoney, ...]
    credits: tuple[CreditEntry, ...]
    withdrawals: tuple[WithdrawalEntry, ...]
    accounts: tuple[AccountCredit, ...]


@dataclass(frozen=True, slots=True)
class Tabs:
    states: tuple[TabState, ...]
    movements: tuple[TabMovement, ...]
    batches: tuple[BatchEntry, ...]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Everything between the start of block `first` and the end of block `last`, in the order of the chain."""

    format: int
    domain: ContractDomain
    first: BlockStamp
    last: BlockStamp
    stakes: Stakes
    assignments: Assignments
    payments: Payments
    tabs: Tabs
    verdicts: tuple[RequestVerdicts, ...]
    slashes: tuple[SlashEntry, ...]
    jailings: tuple[JailEntry, ...]
    totals: Totals
    balances: tuple[ContractBalance, ...]
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(item.ok for item in self.checks)

    def to_document(self) -> dict[str, Any]:
        """The report as JSON values, fields in the order of their declaration."""
        document: dict[str, Any] = _encode(self, type(self))
        return document

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return _canonical(self.to_document())


async def make_report(
    client: ChainClient, deployment: Deployment, first: int | None, last: int | None, progress: Progress = silent
) -> BlockReport:
    """The report on the blocks `first` to `last`; by default from the deployment's first to the newest.

    AuditError for a range that cannot be reported on, which says which could; ChainUnavailableError if the endpoint
    fails or the chain is reorganised meanwhile.
    """
    last = (await client.head()).number if last is None else last
    first = deployment.first_block if first is None else first
    if first > last:
        raise AuditError(f"--from {first} is after --to {last}: give the earlier block with --from")
    history = await PinnedHistory.ending_at(client, deployment, last, progress)
    start = await history.header(first)
    terms = await history.call("RequestTabs", "terms")
    books = Books(deployment.first_block, int(terms.tokensPerDraw))
    await _enter_history(books, history, first)
    books.open_range()
    async for transaction in history.transactions("reading the range", max(first, deployment.first_block), last):
        books.apply(transaction)
    entries = books.close_range(history.last.timestamp)
    activations = await _activations(history, entries, first)
    balances = [item async for item in _balances(history, books)]
    checks = (
        *_event_checks(books),
        *_range_checks(entries),
        *(_balance_check(item) for item in balances),
        *[check async for check in _state_checks(history, books, entries)],
    )
    await history.require_unchanged()
    return BlockReport(
        format=REPORT_FORMAT,
        domain=contract_domain(deployment, deployment.first_block),
        first=_stamp(start),
        last=_stamp(history.last),
        stakes=Stakes(entries.nodes, entries.movements),
        assignments=Assignments(entries.models, entries.plans, activations, entries.routes, entries.replacements),
        payments=Payments(entries.requests, entries.credits, entries.withdrawals, entries.accounts),
        tabs=Tabs(entries.tabs, entries.tab_movements, entries.batches),
        verdicts=entries.verdicts,
        slashes=entries.slashes,
        jailings=entries.jailings,
        totals=entries.totals,
        balances=tuple(balances),
        checks=checks,
    )


async def verify_report(
    data: bytes, client: ChainClient, deployment: Deployment, progress: Progress = silent
) -> list[Check]:
    """Derive the report in `data` again and compare every field; it holds if all checks are ok.

    The checks of the report itself follow those of the file. AuditError and ChainUnavailableError as for
    `make_report`: they say nothing about the report.
    """
    try:
        document = _parse(data)
    except ValueError as error:
        return [Check("report format", False, str(error))]
    checks = [Check("report format", True, "canonical JSON")]
    domain = contract_domain(deployment, deployment.first_block)
    different = first_difference(document["domain"], _encode(domain, ContractDomain), "domain")
    checks.append(_compared("contracts", different, "those of the deployment"))
    first, last = document["first"]["number"], document["last"]["number"]
    block = await _last_block(document, client, deployment)
    checks.append(block)
    if not all(item.ok for item in checks):
        return checks
    report = await make_report(client, deployment, first, last, progress)
    different = first_difference(document, report.to_document(), "")
    checks.append(_compared("every field", different, f"derived again from blocks {first} to {last}"))
    return [*checks, *report.checks]


def first_difference(given: Any, derived: Any, path: str) -> str | None:
    """The first place where two JSON documents differ, with both values; None if they are equal."""
    if isinstance(given, dict) and isinstance(derived, dict):
        for name in derived:
            where = f"{path}.{name}" if path else name
            if name not in given:
                return f"{where} is missing in the report"
            found = first_difference(given[name], derived[name], where)
            if found:
                return found
        unknown = next((name for name in given if name not in derived), None)
        return None if unknown is None else f"{path}.{unknown!r:.60} has no place in a report".lstrip(".")
    if isinstance(given, list) and isinstance(derived, list):
        for index, pair in enumerate(zip(given, derived)):
            found = first_difference(*pair, f"{path}[{index}]")
            if found:
                return found
        if len(given) != len(derived):
            return f"{path}: {len(given)} entries in the report, {len(derived)} on chain"
        return None
    if type(given) is type(derived) and given == derived:
        return None
    return f"{path}: {_as_json(given)} in the report, {_as_json(derived)} on chain"


# ------------------------------------------------------------------------------------------------------ from the chain


async def _enter_history(books: Books, history: PinnedHistory, first: int) -> None:
    """Everything before block `first`."""
    begin, plans = history.deployment.first_block, 0
    if first <= begin:
        return
    async for transaction in history.transactions("reading what was before", begin, first - 1):
        books.apply(transaction)
        plans += sum(event.name == "PlanPublished" for event in transaction)
        if plans >= PLANS_UNTIL_PRUNED:
            books.forget_plans((await history.header(transaction[0].block_number)).timestamp)
            plans = 0
    books.forget_plans((await history.header(first - 1)).timestamp)


async def _activations(history: PinnedHistory, entries: Entries, first: int) -> tuple[Activation, ...]:
    found = []
    for plan in entries.plans_due:
        if plan.effective_at > history.last.timestamp:
            continue
        low = max(first, plan.at.block)
        block = await history.first_block_at(plan.effective_at, low, history.last.number)
        stamp = _stamp(block)
        found.append(
            Activation(stamp, plan.plan_id, plan.model_id, plan.publisher, plan.epoch, plan.effective_at, plan.at)
        )
    return tuple(sorted(found, key=lambda item: (item.block.number, item.published.block, item.published.log_index)))


async def _balances(history: PinnedHistory, books: Books) -> AsyncIterator[ContractBalance]:
    for contract, account in history.deployment.contracts.items():
        balance, owed = await history.balance(account), books.holdings(contract)
        yield ContractBalance(contract, account, balance, owed, max(0, balance - owed))


# -------------------------------------------------------------------------------------------------------------- checks


def _event_checks(books: Books) -> Iterator[Check]:
    for name, problems, failed, compared in books.outcomes():
        yield _counted(name, problems, failed, f"{compared} compared, from the first block of the contracts")


def _range_checks(entries: Entries) -> Iterator[Check]:
    sums = entries.totals
    yield _sum(
        "STAKE-01: stakes of the range",
        sums.stake_start + sums.stake_added,
        sums.stake_withdrawn + sums.stake_slashed + sums.stake_end,
        "start + added = withdrawn + slashed + end",
    )
    problems = [
        f"{item.node}: {item.start} + {item.added} is not {item.withdrawn} + {item.slashed} + {item.end}"
        for item in entries.nodes
        if item.start + item.added != item.withdrawn + item.slashed + item.end
    ]
    yield _counted("STAKE-01: stake of each node", problems, len(problems), f"{len(entries.nodes)} nodes")
    paid = sums.paid_to_executors + sums.paid_to_verifiers + sums.protocol_fees
    paid += sums.refunded_at_settlement + sums.refunded_by_verdict + sums.refunded_after_expiry
    yield _sum(
        "MONEY-02: deposits of the range",
        sums.deposits_start + sums.deposits_opened,
        paid + sums.deposits_end,
        "start + opened = executors + verifiers + fees + refunds + end",
    )
    yield _sum(
        "MONEY-01: bonds of the range",
        sums.bonds_start + sums.bonds_put_down,
        sums.bonds_ended + sums.bonds_end,
        "start + put down = ended + end",
    )
    yield _sum(
        "MONEY-04: tabs of the range",
        sums.tabs_start + sums.tabs_funded + sums.tabs_restored,
        sums.tabs_charged + sums.tabs_withdrawn + sums.tabs_end,
        "start + funded + restored = charged + withdrawn + end",
    )
    yield _sum(
        "MONEY-04: batches of the range",
        sums.pots_start + sums.tabs_charged,
        sums.pots_taken + sums.pots_paid + sums.pots_fees + sums.tabs_restored + sums.pots_end,
        "start + charged = taken + paid + fees + restored + end",
    )
    yield _sum(
        "MONEY-04: bonds of batches and leaf challenges",
        sums.tab_bonds_start + sums.tab_bonds_put_down,
        sums.tab_bonds_returned + sums.tab_bonds_burned + sums.tab_bonds_end,
        "start + put down = returned or forfeited + burned + end",
    )
    yield _sum(
        "credits of the range: where they come from",
        sums.credited,
        paid
        + sums.bonds_ended
        + sums.stake_slashed
        - sums.stake_burned
        + sums.pots_paid
        + sums.pots_fees
        + sums.tab_bonds_returned,
        "credited = ended deposits + ended bonds + slashed and not burned + batches paid + their bonds",
    )
    problems = [
        f"{item.contract} {item.account}: {item.start} + {item.credited} is not {item.withdrawn} + {item.end}"
        for item in entries.accounts
        if item.start + item.credited != item.withdrawn + item.end
    ]
    yield _counted("credits of each account", problems, len(problems), f"{len(entries.accounts)} accounts")


def _balance_check(item: ContractBalance) -> Check:
    name = _BALANCE_RULES[item.contract]
    if item.balance < item.books:
        return Check(name, False, f"{item.balance} wei on chain, {item.books} by the books")
    if item.forced:
        why = "forced on it by somebody, or from before the deployment's first_block"
        return Check(name, True, f"{item.books} wei by the books, {item.forced} more on chain ({why})")
    return Check(name, True, f"{item.books} wei on chain and by the books")


async def _state_checks(history: PinnedHistory, books: Books, entries: Entries) -> AsyncIterator[Check]:
    """What the books say against what the contracts answer after the last block."""
    treasury = await history.call("InferenceEscrow", "treasury")
    known = history.deployment.treasury
    strangers = [item.account for item in entries.credits if item.role == "protocol" and item.account != known]
    problems = [f"InferenceEscrow.treasury is {treasury}, the deployment says {known}"] if treasury != known else []
    problems += [f"a protocol fee went to {account}" for account in strangers]
    yield _counted("treasury", problems, len(problems), f"protocol fees go to {known}")
    yield await _compare(history, "STAKE-01: registry's view of each node", _node_views(history, books), "nodes")
    total, expected = await history.call("NodeRegistry", "totalSortitionStake"), books.sortition_total()
    yield Check(
        "registry's view of all stake that draws count",
        total == expected,
        f"{total} wei on chain, {expected} by the books",
    )
    yield await _compare(history, "contracts' view of each credit", _credit_views(history, entries), "accounts")
    yield await _compare(
        history, "MONEY-02: escrow's view of each request", _request_views(history, entries), "requests"
    )
    yield await _compare(history, "MONEY-01: verification's view of each bond", _bond_views(history, books), "bonds")
    yield await _compare(history, "MONEY-04: contract's view of each tab", _tab_views(history, entries), "tabs")
    yield await _compare(history, "MONEY-04: contract's view of each batch", _batch_views(history, entries), "batches")


_View = Callable[[], Awaitable[str | None]]
"""Asks the chain, and says what is wrong or None."""


async def _compare(history: PinnedHistory, name: str, views: Sequence[_View], what: str) -> Check:
    answers = await at_once(views, lambda done: history.progress(f"comparing {what}", done, len(views)))
    problems = [item for item in answers if item is not None]
    return _counted(name, problems, len(problems), f"{len(views)} {what} after block {history.last.number}")


def _node_views(history: PinnedHistory, books: Books) -> list[_View]:
    async def compare(node: str, expected: dict[str, Any]) -> str | None:
        account = await history.call("NodeRegistry", "accountOf", node)
        return _unlike(f"node {node}", account, expected)

    return [
        partial(
            compare,
            item.node,
            {
                "operator": item.operator,
                "staked": item.staked,
                "thawing": item.thawing,
                "activeFrom": item.active_from,
                "jailedUntil": item.jailed_until,
                "exiting": item.exiting,
            },
        )
        for item in books.node_states()
    ]


def _credit_views(history: PinnedHistory, entries: Entries) -> list[_View]:
    async def compare(item: AccountCredit) -> str | None:
        credit = await history.call(item.contract, "creditOf", item.account)
        where = f"{item.contract}: credit of {item.account}"
        return None if credit == item.end else f"{where} is {credit} on chain, {item.end} by the books"

    return [partial(compare, item) for item in entries.accounts]


def _request_views(history: PinnedHistory, entries: Entries) -> list[_View]:
    async def compare(item: RequestMoney) -> str | None:
        request = await history.call("InferenceEscrow", "requestOf", item.request_id)
        expected = {
            "requester": item.requester,
            "status": _REQUEST_STATUSES.index(item.status),
            "deposit": item.deposit,
            "feePerToken": item.fee_per_token,
            "planId": item.plan_id,
        }
        return _unlike(f"request 0x{item.request_id.hex()}", request, expected)

    return [partial(compare, item) for item in entries.requests]


def _bond_views(history: PinnedHistory, books: Books) -> list[_View]:
    async def compare(request_id: bytes, stage: int, bond: int) -> str | None:
        record = await history.call("OutputVerification", "stageRecordOf", request_id, stage)
        return _unlike(f"stage {stage} of request 0x{request_id.hex()}", record, {"bond": bond})

    return [partial(compare, item.request_id, item.stage, item.bond) for item in books.live_bonds()]


def _tab_views(history: PinnedHistory, entries: Entries) -> list[_View]:
    async def compare(item: TabState) -> str | None:
        tab = await history.call("RequestTabs", "tabOf", item.requester, item.collector)
        return _unlike(f"tab of {item.requester} with {item.collector}", tab, {"balance": item.end})

    return [partial(compare, item) for item in entries.tabs]


def _batch_views(history: PinnedHistory, entries: Entries) -> list[_View]:
    async def compare(item: BatchEntry) -> str | None:
        batch = await history.call("RequestTabs", "batchOf", item.batch_id)
        expected = {"status": _BATCH_STATUSES.index(item.status), "taken": item.taken}
        return _unlike(f"batch 0x{item.batch_id.hex()}", batch, expected)

    return [partial(compare, item) for item in entries.batches]


def _unlike(what: str, view: Any, expected: dict[str, Any]) -> str | None:
    for name, value in expected.items():
        if getattr(view, name) != value:
            return f"{what}: {name} is {_short(getattr(view, name))} on chain, {_short(value)} by the books"
    return None


def _sum(name: str, left: int, right: int, rule: str) -> Check:
    if left == right:
        return Check(name, True, f"{rule}: {left} wei on either side")
    return Check(name, False, f"{rule}: {left} wei and {right} wei, {abs(left - right)} apart")


def _counted(name: str, problems: Sequence[str], failed: int, fine: str) -> Check:
    if not failed:
        return Check(name, True, fine)
    more = f" (and {failed - PROBLEMS_KEPT} more)" if failed > PROBLEMS_KEPT else ""
    return Check(name, False, "; ".join(problems[:PROBLEMS_KEPT]) + more)


def _compared(name: str, difference: str | None, fine: str) -> Check:
    return Check(name, difference is None, fine if difference is None else f"first difference: {difference}")


# -------------------------------------------------------------------------------------------------------- a report file


async def _last_block(document: dict[str, Any], client: ChainClient, deployment: Deployment) -> Check:
    """Whether the chain has the block that the report ends with."""
    name, number, claimed = "last block", document["last"]["number"], document["last"]["hash"]
    head = await client.head()
    if number > head.number:
        return Check(name, False, f"last.number: {number} in the report, the newest block is {head.number}")
    if number < deployment.first_block:
        first = deployment.first_block
        return Check(name, False, f"last.number: {number} in the report, the contracts begin at block {first}")
    block = await client.block(number)
    shown = "no such block" if block is None else f"0x{block.hash.hex()}"
    if shown != claimed:
        advice = "the chain was reorganised since, or is another: make the report again"
        return Check(
            name, False, f"last.hash: {_as_json(claimed)} in the report, {_as_json(shown)} on chain ({advice})"
        )
    return Check(name, True, f"block {number} is on the chain")


def _parse(data: bytes) -> dict[str, Any]:
    """The document of a report file, with everything in it that is needed to derive it again. ValueError otherwise."""
    if len(data) > MAXIMUM_REPORT_BYTES:
        raise ValueError(f"the file has {len(data)} bytes, more than the limit of {MAXIMUM_REPORT_BYTES}")
    try:
        document = parse_json(data)
        canonical = _canonical(document)
    except ValueError as error:
        raise ValueError(f"the file is not UTF-8 JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError("the file holds no JSON object")
    if document.get("format") != REPORT_FORMAT or isinstance(document["format"], bool):
        found = _as_json(document.get("format"))
        raise ValueError(f"format is {found}, this release reads {REPORT_FORMAT}; install a release that knows it")
    for name in ("domain", "first", "last"):
        if not isinstance(document.get(name), dict):
            raise ValueError(f"{name} is missing")
    numbers = [document[name].get("number") for name in ("first", "last")]
    for name, number in zip(("first", "last"), numbers):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _SAFE_INTEGER:
            raise ValueError(f"{name}.number is {_as_json(number)}, expected the number of a block")
    if numbers[0] > numbers[1]:
        raise ValueError(f"first.number is {numbers[0]}, after last.number, which is {numbers[1]}")
    if not isinstance(document["last"].get("hash"), str):
        raise ValueError("last.hash is missing")
    if canonical != data:
        raise ValueError("the file is not in canonical form (sorted keys, no spaces, one final newline)")
    return document


def _canonical(document: Any) -> bytes:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _encode(value: Any, kind: Any) -> Any:
    """A value of a report as JSON: bytes in hexadecimal, numbers that readers would round as decimal text."""
    match value:
        case None | bool() | str():
            return value
        case bytes():
            return f"0x{value.hex()}"
        case int():
            return str(value) if kind == Big else value
        case tuple():
            return [_encode(item, get_args(kind)[0]) for item in value]
        case dict():
            return value
        case _:
            owner: type = type(value)
            return {name: _encode(getattr(value, name), hint) for name, hint in _fields(owner).items()}


@lru_cache(maxsize=64)
def _fields(owner: type) -> dict[str, Any]:
    """Types of the fields of a dataclass in their order, without `| None`."""
    hints = get_type_hints(owner, include_extras=True)
    return {item.name: _present(hints[item.name]) for item in dataclasses.fields(owner)}


def _present(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next(item for item in get_args(kind) if item is not type(None))
    return kind


def _stamp(block: Block) -> BlockStamp:
    return BlockStamp(block.number, block.hash, block.timestamp)


def _short(value: Any) -> str:
    return f"0x{value.hex()}" if isinstance(value, bytes) else f"{value!s:.120}"


def _as_json(value: Any) -> str:
    return "nothing" if value is None else f"{json.dumps(value, ensure_ascii=False):.120}"
