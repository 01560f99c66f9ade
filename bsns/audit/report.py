"""A record as text for people: who asked, who computed, who checked, what it cost, and where on chain each of it lies.

Shows what the record says, not that it is true: that is `verify`. Never shows token ids or text.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from bsns.audit.chain_facts import NO_DISTANCE
from bsns.protocol.record import NO_STAGE, Member, Round, VerificationRecord


def show(record: VerificationRecord) -> str:
    """A summary of `record`, several lines, the last without a newline."""
    return "\n".join(_lines(record))


def printable(text: str) -> str:
    """`text` of anybody's as it may reach a terminal: what is no letter or sign of a script is replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _lines(record: VerificationRecord) -> Iterator[str]:
    request, domain = record.request, record.domain
    opened = datetime.fromtimestamp(request.opened_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"Request      0x{request.request_id.hex()}"
    yield f"             {record.status} as of block {record.as_of.number}, opened {opened}"
    yield f"Chain        {domain.chain_id}, escrow {domain.inference_escrow}, verification {domain.output_verification}"
    yield f"Requester    {request.requester}, deposit {request.deposit} wei, {request.fee_per_token} wei a token"
    name, units = printable(record.model.name), record.model.unit_count
    yield f"Model        {name} 0x{record.model.model_id.hex()} ({units} units)"
    yield f"Plan         0x{record.plan.plan_id.hex()} epoch {record.plan.epoch} of {record.plan.publisher}"
    yield f"Tokens       {request.prompt_tokens} of prompt, at most {request.maximum_tokens} of answer"
    yield f"Disclosed    {_disclosed(record)}"
    yield from _stages(record)
    yield from _draw(record)
    for round_ in record.rounds:
        yield from _round(round_)
    yield from _ending(record)
    gas = sum(item.gas_used for item in record.transactions)
    yield f"Chain cost   {len(record.transactions)} transactions, {gas} gas"


def _disclosed(record: VerificationRecord) -> str:
    parts = []
    if record.input is not None:
        parts.append("input opening")
    if record.evidence:
        parts.append(f"evidence of {len(record.evidence)} stages")
    if record.tokens is not None:
        parts.append("token ids")
    return ", ".join(parts) or "nothing beyond the chain"


def _stages(record: VerificationRecord) -> Iterator[str]:
    if record.route is None:
        yield "Route        none"
        return
    commitments = {item.stage: item for item in record.commitments}
    for item in record.route.stages:
        assignment = record.plan.assignments[item.assignment]
        commitment = commitments.get(item.stage)
        state = "not committed" if commitment is None else "committed, not opened"
        if commitment is not None and commitment.reveal is not None:
            state = f"committed and opened, {commitment.reveal.output_tokens} tokens"
        units = f"units {assignment.first_unit} to {assignment.end_unit - 1}"
        yield f"Stage {item.stage:<6} {item.node} ({units}): {state}"


def _draw(record: VerificationRecord) -> Iterator[str]:
    if record.draw is None or record.entropy is None:
        yield "Draw         none"
        return
    how = "a committee sits" if record.draw.sampled else "not sampled: no committee"
    yield f"Draw         {how}; seed 0x{record.draw.seed.hex()} with block {record.draw.entropy_block.number}"
    yield f"             {record.entropy.snapshot_stake} wei of stake at the snapshot"


def _round(round_: Round) -> Iterator[str]:
    for tally in round_.tallies:
        members = [item for item in round_.members if item.stage == tally.stage]
        away = "no distance" if tally.distance == NO_DISTANCE else f"distance {tally.distance}"
        support = f"{tally.support} of {tally.revealed_stake} wei agree"
        detail = f"{len(members)} members, {support}, {away}" if members else "without a committee"
        yield f"Round {round_.number}      stage {tally.stage}: {tally.verdict} ({detail})"
        for item in members:
            yield f"               {item.node} {item.stake} wei: {_voted(item)}"
    if not round_.tallies:
        yield f"Round {round_.number}      not tallied, {len(round_.members)} attestations"


def _voted(member: Member) -> str:
    if member.reveal is None:
        return "committed, never opened"
    if member.reveal.output_tokens == 0:
        return "says it was not given valid evidence"
    return f"{member.reveal.output_tokens} tokens, sketch 0x{member.reveal.sketch.hex()}"


def _ending(record: VerificationRecord) -> Iterator[str]:
    for challenge in record.challenges:
        outcome = "open"
        if challenge.resolution is not None:
            outcome = "upheld" if challenge.resolution.upheld else "refuted or returned"
        yield f"Challenge    stage {challenge.stage} by {challenge.challenger}, bond {challenge.bond} wei: {outcome}"
    for slash in record.slashes:
        yield f"Slashed      {slash.node}: {slash.amount} wei for {slash.reason}, {slash.burned} of them burned"
    for jailing in record.jailings:
        until = "for ever" if jailing.until == 2**64 - 1 else f"until {jailing.until}"
        yield f"Jailed       {jailing.node} {until}"
    if record.conclusion is not None:
        blamed = (
            "" if record.conclusion.blamed_stage == NO_STAGE else f", stage {record.conclusion.blamed_stage} to blame"
        )
        verdict = "accepted" if record.conclusion.accepted else "not accepted"
        yield f"Conclusion   {verdict}{blamed}"
    if record.payment is not None:
        money = record.payment
        yield (
            f"Payment      executors {money.paid_to_executors}, verifiers {money.paid_to_verifiers}, "
            f"protocol {money.protocol_fee}, refunded {money.refunded} wei"
        )
