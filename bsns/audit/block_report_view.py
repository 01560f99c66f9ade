"""A report on a range of blocks for people: tables that fit MAXIMUM_WIDTH columns, and the progress of making one.

Shows what the report says, and each check with its outcome. Amounts are in ether, exact to the wei. Each row says in
which block and log it lies, and the start of its transaction's hash; whole hashes are in the JSON. What strangers wrote
on chain (names of models) is shown without anything that a terminal would obey.
"""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from bsns.audit.block_report import BlockReport, make_report, verify_report
from bsns.audit.books import FOR_EVER
from bsns.audit.chain_facts import NO_DISTANCE
from bsns.audit.entries import JailEntry, Place, RequestMoney, RequestVerdicts, SlashEntry
from bsns.audit.pinned_history import Progress
from bsns.audit.report import printable
from bsns.audit.verification import Check
from bsns.protocol.record import NO_STAGE

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import ChainClient
    from bsns.chain.deployment import Deployment

MAXIMUM_WIDTH: Final = 100
MAXIMUM_ROWS: Final = 40
"""Rows that a table shows; all of them are in the JSON."""
_ETHER: Final = 10**18

Row = Sequence[str]


async def report_command(
    client: ChainClient,
    deployment: Deployment,
    first: int | None,
    last: int | None,
    given: bytes | None,
    *,
    as_json: bool,
) -> tuple[bool, bytes | None]:
    """`bsns audit report`: make a report and print it; or, if a report file is `given`, verify it and print that.

    Returns whether all checks hold, and the bytes of the report that was made.
    """
    console = Console(width=None if sys.stdout.isatty() else MAXIMUM_WIDTH, highlight=False, markup=False)
    if given is not None:
        with progress_bar() as progress:
            checks = await verify_report(given, client, deployment, progress)
        holds = all(item.ok for item in checks)
        if as_json:
            _write(json.dumps({"holds": holds, "checks": [asdict(item) for item in checks]}, ensure_ascii=False) + "\n")
        else:
            print_checks(checks, console)
        return holds, None
    with progress_bar() as progress:
        report = await make_report(client, deployment, first, last, progress)
    data = report.to_bytes()
    if as_json:
        _write(data.decode())
    else:
        print_report(report, console)
    return report.holds, data


def print_report(report: BlockReport, console: Console) -> None:
    """The whole report: stakes, assignments, payments, verdicts, penalties, totals, balances, checks."""
    console.width = min(console.width, MAXIMUM_WIDTH)
    for line in _head(report):
        console.print(Text(line))
    for title, columns, rows in _tables(report):
        if rows:
            _print_table(console, f"{title} ({len(rows)})", columns, rows)
    _print_table(console, "Totals", ("", "start", "in", "out", "end"), list(_totals(report)))
    columns = ("contract", "on chain", "by the books", "forced on it")
    _print_table(console, "Balances after the last block", columns, list(_balances(report)))
    print_checks(report.checks, console)


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """One line for each check, and how many hold."""
    console.width = min(console.width, MAXIMUM_WIDTH)
    for item in checks:
        line = f"{'ok    ' if item.ok else 'FAILED'}  {item.name}: {printable(item.detail)}"
        console.print(Text(textwrap.fill(line, console.width, subsequent_indent=" " * 8, break_on_hyphens=False)))
    failed = sum(not item.ok for item in checks)
    console.print(f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks, all hold")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A Progress on standard error; shows nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with ProgressBar(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as display:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done, total=total)

        yield show


# ------------------------------------------------------------------------------------------------------------ sections


def _head(report: BlockReport) -> Iterator[str]:
    domain, first, last = report.domain, report.first, report.last
    yield f"Blocks       {first.number} to {last.number} of chain {domain.chain_id}"
    yield f"             {_time(first.timestamp)} to {_time(last.timestamp)}"
    yield f"Last block   0x{last.hash.hex()}"
    yield f"Contracts    {domain.node_registry} NodeRegistry"
    yield f"             {domain.shard_assignments} ShardAssignments"
    yield f"             {domain.inference_escrow} InferenceEscrow"
    yield f"             {domain.output_verification} OutputVerification"
    yield f"             {domain.request_tabs} RequestTabs"
    yield "Amounts      in ether"


def _tables(report: BlockReport) -> Iterator[tuple[str, Row, list[Row]]]:
    where = ("block", "log", "transaction")
    yield "Stakes", ("node", "start", "added", "withdrawn", "slashed", "end", "status"), list(_nodes(report))
    yield "Stake movements", (*where, "what", "node", "amount", "staked after"), list(_movements(report))
    yield "Models, plans, routes", (*where, "what", "which", "details"), list(_assignments(report))
    yield (
        "Requests",
        ("request", "requester", "deposit", "executors", "verifiers", "fee", "refunded", "status"),
        [_request(item) for item in report.payments.requests],
    )
    yield "Payments", (*where, "what", "account", "amount", "request"), list(_payments(report))
    yield "Credits", ("contract", "account", "start", "credited", "withdrawn", "end"), list(_accounts(report))
    yield (
        "Tabs",
        ("requester", "collector", "start", "funded", "restored", "charged", "withdrawn", "end"),
        list(_tab_states(report)),
    )
    yield "Tab movements", (*where, "what", "requester", "amount", "balance", "batch"), list(_tab_movements(report))
    yield (
        "Batches",
        ("batch", "collector", "tickets", "tokens", "charged", "opened", "paid", "fee", "restored", "status"),
        list(_batches(report)),
    )
    yield (
        "Verdicts",
        ("request", "commitments", "draw", "attested", "opened", "rounds", "outcome"),
        [_verdict(item) for item in report.verdicts],
    )
    yield "Tallies", (*where, "request", "round", "stage", "verdict", "distance", "support"), list(_tallies(report))
    yield "Challenges", (*where, "request", "stage", "challenger", "bond", "outcome"), list(_challenges(report))
    yield (
        "Slashes and jailings",
        (*where, "node", "what", "why", "request", "stage"),
        [_penalty(item) for item in _in_order(report)],
    )


def _nodes(report: BlockReport) -> Iterator[Row]:
    for item in report.stakes.nodes:
        amounts = (item.start, item.added, item.withdrawn, item.slashed, item.end)
        status = f"{item.status}, {_ether(item.end_thawing)} thawing" if item.end_thawing else item.status
        yield (_account(item.node), *(_ether(amount) for amount in amounts), status)


def _movements(report: BlockReport) -> Iterator[Row]:
    for item in report.stakes.movements:
        amount = "" if item.kind in ("removed", "released") else _ether(item.amount)
        yield (*_where(item.at), item.kind, _account(item.node), amount, _ether(item.staked))


def _assignments(report: BlockReport) -> Iterator[Row]:
    found = report.assignments
    rows: list[tuple[Place, Row]] = []
    for model in found.models:
        details = f"{printable(model.name)}, {model.unit_count} units, by {_account(model.registrant)}"
        rows.append((model.at, (*_where(model.at), "model registered", _hash(model.model_id), details)))
    for plan in found.plans:
        stages = len({item.stage for item in plan.assignments})
        details = f"epoch {plan.epoch} of {_account(plan.publisher)}: {stages} stages, {len(plan.consents)} consents"
        rows.append((plan.at, (*_where(plan.at), "plan published", _hash(plan.plan_id), details)))
    for active in found.activations:
        details = f"epoch {active.epoch} of {_account(active.publisher)}, from {_time(active.effective_at)}"
        row = (str(active.block.number), "", "", "plan in effect", _hash(active.plan_id), details)
        rows.append((Place(active.block.number, b"", -1), row))
    for route in found.routes:
        nodes = " ".join(_account(node) for node in route.nodes)
        rows.append((route.at, (*_where(route.at), "request routed", _hash(route.request_id), nodes)))
    for change in found.replacements:
        details = f"stage {change.stage}: {_account(change.replaced)} stopped, {_account(change.node)} went on"
        rows.append((change.at, (*_where(change.at), "stage replaced", _hash(change.request_id), details)))
    yield from (row for _, row in sorted(rows, key=lambda item: (item[0].block, item[0].log_index)))


def _request(item: RequestMoney) -> Row:
    ending = item.ending
    amounts = ["", "", "", ""]
    status = item.status
    if ending is not None:
        parts = (ending.paid_to_executors, ending.paid_to_verifiers, ending.protocol_fee, ending.refunded)
        amounts = [_ether(amount) for amount in parts]
        why = "" if ending.because == "settled" else f" ({ending.because})"
        status = f"{item.status}{why}, block {ending.at.block}"
    return (_hash(item.request_id), _account(item.requester), _ether(item.deposit), *amounts, status)


def _payments(report: BlockReport) -> Iterator[Row]:
    rows: list[tuple[Place, Row]] = []
    for item in report.payments.credits:
        request = "" if item.request_id is None else _hash(item.request_id)
        row = (*_where(item.at), f"credit: {item.role}", _account(item.account), _ether(item.amount), request)
        rows.append((item.at, row))
    for paid in report.payments.withdrawals:
        row = (*_where(paid.at), "withdrawal", _account(paid.account), _ether(paid.amount), "")
        rows.append((paid.at, row))
    yield from (row for _, row in sorted(rows, key=lambda item: (item[0].block, item[0].log_index)))


def _accounts(report: BlockReport) -> Iterator[Row]:
    for item in report.payments.accounts:
        amounts = (item.start, item.credited, item.withdrawn, item.end)
        yield (item.contract, _account(item.account), *(_ether(amount) for amount in amounts))


def _tab_states(report: BlockReport) -> Iterator[Row]:
    for item in report.tabs.states:
        amounts = (item.start, item.funded, item.restored, item.charged, item.withdrawn, item.end)
        yield (_account(item.requester), _account(item.collector), *(_ether(amount) for amount in amounts))


def _tab_movements(report: BlockReport) -> Iterator[Row]:
    for item in report.tabs.movements:
        batch = "" if item.batch_id is None else _hash(item.batch_id)
        amounts = _ether(item.amount), _ether(item.balance)
        yield (*_where(item.at), item.kind, _account(item.requester), *amounts, batch)


def _batches(report: BlockReport) -> Iterator[Row]:
    for item in report.tabs.batches:
        opened = f"{item.opened} for {_ether(item.taken)}" if item.opened else ""
        amounts = (_ether(amount) for amount in (item.paid, item.protocol_fee, item.restored))
        status = item.status if item.ended is None else f"{item.status}, block {item.ended.block}"
        counts = str(item.tickets), str(item.tokens), _ether(item.charged)
        yield (_hash(item.batch_id), _account(item.collector), *counts, opened, *amounts, status)


def _verdict(item: RequestVerdicts) -> Row:
    draw = {None: "not in range", True: "sampled", False: "not sampled"}[item.sampled]
    outcome = {None: "open", True: "accepted", False: "not accepted"}[item.accepted]
    if item.blamed_stage not in (None, NO_STAGE):
        outcome += f", stage {item.blamed_stage} to blame"
    counts = (item.commitments, item.attestations, item.reveals, item.rounds)
    commitments, attestations, reveals, rounds = (str(count) for count in counts)
    return (_hash(item.request_id), commitments, draw, attestations, reveals, rounds, outcome)


def _tallies(report: BlockReport) -> Iterator[Row]:
    for request in report.verdicts:
        for item in request.tallies:
            distance = "none" if item.distance == NO_DISTANCE else str(item.distance)
            support = f"{_ether(item.support)} of {_ether(item.revealed_stake)}"
            details = (str(item.round), str(item.stage), item.verdict, distance, support)
            yield (*_where(item.at), _hash(request.request_id), *details)


def _challenges(report: BlockReport) -> Iterator[Row]:
    for request in report.verdicts:
        for item in request.challenges:
            outcome = "open"
            if item.outcome is not None and item.resolved is not None:
                outcome = f"{item.outcome}, block {item.resolved.block}"
            details = (str(item.stage), _account(item.challenger), _ether(item.bond), outcome)
            yield (*_where(item.at), _hash(request.request_id), *details)


def _in_order(report: BlockReport) -> Iterable[SlashEntry | JailEntry]:
    found: list[SlashEntry | JailEntry] = [*report.slashes, *report.jailings]
    return sorted(found, key=lambda item: (item.at.block, item.at.log_index))


def _penalty(item: SlashEntry | JailEntry) -> Row:
    if isinstance(item, SlashEntry):
        what = f"slashed {_ether(item.amount)}, {_ether(item.burned)} burned"
    else:
        what = "jailed for ever" if item.until == FOR_EVER else f"jailed until {_time(item.until)}"
    request = "" if item.request_id is None else _hash(item.request_id)
    stage = "" if item.stage is None else str(item.stage)
    return (*_where(item.at), _account(item.node), what, item.reason, request, stage)


def _totals(report: BlockReport) -> Iterator[Row]:
    sums = report.totals
    paid = sums.paid_to_executors + sums.paid_to_verifiers + sums.protocol_fees
    back = sums.refunded_at_settlement + sums.refunded_by_verdict + sums.refunded_after_expiry
    yield (
        "stakes",
        _ether(sums.stake_start),
        f"{_ether(sums.stake_added)} added",
        f"{_ether(sums.stake_withdrawn)} withdrawn, {_ether(sums.stake_slashed)} slashed "
        f"({_ether(sums.stake_burned)} burned)",
        _ether(sums.stake_end),
    )
    yield (
        "deposits",
        _ether(sums.deposits_start),
        f"{_ether(sums.deposits_opened)} opened",
        f"{_ether(paid)} paid ({_ether(sums.paid_to_executors)} executors, {_ether(sums.paid_to_verifiers)} "
        f"verifiers, {_ether(sums.protocol_fees)} fee), {_ether(back)} refunded",
        _ether(sums.deposits_end),
    )
    bonds = (sums.bonds_start, sums.bonds_put_down, sums.bonds_ended, sums.bonds_end)
    yield ("bonds", *(_ether(amount) for amount in bonds))
    spent = f"{_ether(sums.tabs_charged)} charged, {_ether(sums.tabs_withdrawn)} withdrawn"
    into = f"{_ether(sums.tabs_funded)} funded, {_ether(sums.tabs_restored)} restored"
    yield ("tabs", _ether(sums.tabs_start), into, spent, _ether(sums.tabs_end))
    out = (
        f"{_ether(sums.pots_taken)} into requests, {_ether(sums.pots_paid)} paid, {_ether(sums.pots_fees)} fee, "
        f"{_ether(sums.tabs_restored)} restored"
    )
    yield ("batches", _ether(sums.pots_start), f"{_ether(sums.tabs_charged)} charged", out, _ether(sums.pots_end))
    ended = f"{_ether(sums.tab_bonds_returned)} credited, {_ether(sums.tab_bonds_burned)} burned"
    put_down = f"{_ether(sums.tab_bonds_put_down)} put down"
    yield ("bonds of batches", _ether(sums.tab_bonds_start), put_down, ended, _ether(sums.tab_bonds_end))
    credits_ = (sums.credits_start, sums.credited, sums.credits_withdrawn, sums.credits_end)
    yield ("credits", *(_ether(amount) for amount in credits_))


def _balances(report: BlockReport) -> Iterator[Row]:
    for item in report.balances:
        yield (item.contract, _ether(item.balance), _ether(item.books), _ether(item.forced))


# ------------------------------------------------------------------------------------------------------------- drawing


def _print_table(console: Console, title: str, columns: Row, rows: list[Row]) -> None:
    more = len(rows) - MAXIMUM_ROWS
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=f"and {more} more: all of them are in the file of --out" if more > 0 else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in rows[:MAXIMUM_ROWS]:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(table)
    console.print()


def _where(at: Place) -> tuple[str, str, str]:
    return str(at.block), str(at.log_index), _hash(at.transaction)


def _hash(value: bytes) -> str:
    return f"0x{value[:4].hex()}"


def _account(value: str) -> str:
    return f"{value[:6]}…{value[-4:]}"


def _ether(wei: int) -> str:
    whole, rest = divmod(wei, _ETHER)
    return f"{whole:,}" + (f".{rest:018d}".rstrip("0") if rest else "")


def _time(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # an endpoint may say anything
        return f"second {seconds}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
