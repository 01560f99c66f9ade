"""Rows of the explorer's lists and parts of its pages, out of what the database holds.

Owns how amounts, times and ids are written for people, and what a row of an export has. Promises that what a reader
sees rounded is there exactly, too. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from markupsafe import Markup, escape

from bsns.chain.client import Block, ChainEvent
from bsns.chain.deployment import ETHER
from bsns.protocol.contract_states import SLASH_REASONS, STATUS_AFTER, StageVerdict
from bsns.protocol.sketch import distance, member_distance
from coordinator.network_state import ModelState, NodeState, PlanState, RequestState, Reveal
from coordinator.storage import StampedEvent, TicketRecord

GWEI: Final = 10**9
SMALLEST_ETHER: Final = ETHER // 1_000
_CAPITAL_INSIDE: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request on the chain. Times in Unix seconds."""

    request_id: str
    status: str
    requester: str
    opened_at: int
    block: int
    stages: int
    prompt_tokens: int
    output_tokens: int
    deposit_wei: int
    refunded_wei: int
    accepted: bool | None
    plan_id: str

    @classmethod
    def of(cls, item: RequestState) -> RequestRow:
        return cls(
            _hex(item.request_id), item.status.name.capitalize(), item.requester, item.opened_at, item.opened_block,
            len(item.stages), item.prompt_tokens, item.output_tokens, item.deposit, item.refunded, item.accepted,
            _hex(item.plan_id),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TicketRow:
    """A request on a tab."""

    request_id: str
    state: str
    requester: str
    number: int
    changed_at: int
    charge_wei: int
    batch_id: str | None
    plan_id: str

    @classmethod
    def of(cls, item: TicketRecord) -> TicketRow:
        batch = None if item.batch_id is None else _hex(item.batch_id)
        return cls(
            _hex(item.request_id), str(item.state), item.requester, item.number, item.changed_at, item.charge, batch,
            _hex(item.plan_id),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node. `endpoint` is what its operator wrote."""

    node: str
    status: str
    operator: str | None
    staked_wei: int
    thawing_wei: int
    slashed_wei: int
    open_duties: int
    registered_at: int
    endpoint: str

    @classmethod
    def of(cls, item: NodeState, now: int) -> NodeRow:
        return cls(
            item.node, item.status_at(now).name.lower(), item.operator, item.staked, item.thawing, item.slashed,
            item.open_duties, item.registered_at, item.endpoint,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan."""

    plan_id: str
    model_id: str
    publisher: str
    epoch: int
    effective_at: int
    fee_per_token_wei: int
    stages: int
    assignments: int
    root: str
    measurements_hash: str

    @classmethod
    def of(cls, item: PlanState) -> PlanRow:
        return cls(
            _hex(item.plan_id), _hex(item.model_id), item.publisher, item.epoch, item.effective_at, item.fee_per_token,
            item.assignments[-1].stage + 1, len(item.assignments), _hex(item.root), _hex(item.measurements_hash),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model. `name` is what its registrant wrote."""

    model_id: str
    name: str
    units: int
    registrant: str
    manifest_hash: str
    weight_root: str

    @classmethod
    def of(cls, item: ModelState) -> ModelRow:
        return cls(
            _hex(item.model_id), item.name, item.unit_count, item.registrant, _hex(item.manifest_hash),
            _hex(item.weight_root),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PenaltyRow:
    """A slash, or a jailing."""

    kind: str
    node: str
    reason: str
    amount_wei: int
    burned_wei: int
    jailed_until: int | None
    at: int
    block: int
    transaction: str

    @classmethod
    def of(cls, event: ChainEvent, block: Block) -> PenaltyRow:
        is_slash = event.name == "NodeSlashed"
        number = int(event.arguments.get("reason", 0))
        reason = words(SLASH_REASONS[number]) if is_slash and number < len(SLASH_REASONS) else ""
        return cls(
            "slash" if is_slash else "jail", event.arguments["node"], reason, event.arguments.get("amount", 0),
            event.arguments.get("burned", 0), event.arguments.get("jailedUntil"), block.timestamp, block.number,
            _hex(event.transaction_hash),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockRow:
    """A block, and how many events of the contracts it has."""

    number: int
    hash: str
    timestamp: int
    events: int

    @classmethod
    def of(cls, item: Block, events: int) -> BlockRow:
        return cls(item.number, _hex(item.hash), item.timestamp, events)


Row = RequestRow | TicketRow | NodeRow | PlanRow | ModelRow | PenaltyRow | BlockRow
"""A row of a list; its fields are the columns."""


# -------------------------------------------------------------------------------------------------- parts of a request


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of a request: who computed it, and what was said of it."""

    stage: int
    node: str
    units: str
    replaced: tuple[str, ...]
    commitment: str | None
    is_revealed: bool
    verdict: str
    distance: int | None


def stages_of(item: RequestState, plan: PlanState | None) -> list[StageView]:
    """The stages with their last verdicts."""
    units: dict[tuple[int, str], str] = (
        {}
        if plan is None
        else {(one.stage, one.node): f"{one.first_unit} to {one.end_unit - 1}" for one in plan.assignments}
    )
    found = []
    for stage in item.stages:
        tallies = [tally for tally in item.tallies if tally.stage == stage.stage]
        last = tallies[-1] if tallies else None
        found.append(
            StageView(
                stage.stage,
                stage.node,
                units.get((stage.stage, stage.node), "unknown"),
                stage.replaced,
                None if stage.commitment is None else _hex(stage.commitment),
                stage.reveal is not None,
                "" if last is None else words(StageVerdict(last.verdict).name),
                None if last is None or last.distance > 2**64 else last.distance,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class MemberView:
    """One seat of the committee: how far its sketches lie from the medoid's, None while they are not revealed."""

    round: int
    stage: int
    node: str
    stake: int
    is_revealed: bool
    is_medoid: bool
    distance: int | None
    is_other_length: bool


def members_of(item: RequestState) -> list[MemberView]:
    """All who attested, by round and stage."""
    found = []
    for member in sorted(item.attestations, key=lambda one: (one.round, one.stage, one.node)):
        tally = item.tally(member.round, member.stage)
        bench = {one.node: one.reveal for one in item.members(member.round, member.stage)}
        chosen = bench.get(tally.medoid) if tally is not None else None
        same = None if chosen is None or member.reveal is None else chosen.output_tokens == member.reveal.output_tokens
        found.append(
            MemberView(
                member.round, member.stage, member.node, member.stake, member.reveal is not None,
                tally is not None and tally.medoid == member.node,
                _apart(chosen, member.reveal) if same else None, same is False,
            )
        )  # fmt: skip
    return found


def _apart(first: Reveal | None, second: Reveal | None) -> int | None:
    if first is None or second is None:
        return None
    inner = first.evidence_root, second.evidence_root
    if any(inner):
        return member_distance(first.sketches, second.sketches)
    return distance(first.sketch, second.sketch)


def reached(history: Sequence[StampedEvent]) -> dict[str, str]:
    """States that a request has been in, and when it came there."""
    return {
        STATUS_AFTER[event.name].name.capitalize(): datetime.fromtimestamp(block.timestamp, UTC).strftime("%H:%M:%S")
        for event, block in history
        if event.name in STATUS_AFTER
    }


def transactions_of(history: Sequence[StampedEvent]) -> list[dict[str, Any]]:
    """Transactions with the names of what they did, the oldest first."""
    found: dict[bytes, dict[str, Any]] = {}
    for event, block in history:
        entry = found.setdefault(
            event.transaction_hash,
            {"hash": _hex(event.transaction_hash), "block": block.number, "at": block.timestamp, "events": []},
        )
        entry["events"].append(event.name)
    return list(found.values())


# --------------------------------------------------------------------------------------------------- how it is written


def money(wei: int) -> Markup:
    """Wei for people, in ether or, where it is little, in gwei; exactly, in the title."""
    little = 0 < abs(int(wei)) < SMALLEST_ETHER
    amount = Decimal(int(wei)) / (GWEI if little else ETHER)
    text = f"{amount:,.6f}".rstrip("0").rstrip(".") if abs(amount) >= Decimal("0.000001") else f"{amount:f}"
    return Markup('<span class="money" title="{} wei">{} {}</span>').format(
        f"{int(wei):,}", "0" if not wei else text, "gwei" if little else "ETH"
    )


def moment(seconds: int) -> Markup:
    """A Unix second, UTC; an end that never comes is none."""
    if not 0 < seconds < 2**40:
        return Markup("never")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), at.strftime("%Y-%m-%d %H:%M:%S"))


def short(text: str) -> Markup:
    """The ends of a long id; all of it in the title."""
    if len(text) <= 16:
        return escape(text)
    return Markup('<span class="id" title="{}">{}</span>').format(text, f"{text[:10]}…{text[-4:]}")


def words(name: str) -> str:
    """The name of a constant, of Python's or of a contract's, as words."""
    return _CAPITAL_INSIDE.sub(" ", name.replace("_", " ")).lower()


def _hex(value: bytes) -> str:
    return "0x" + value.hex()
