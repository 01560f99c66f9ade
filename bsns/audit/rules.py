"""The protocol's rules, recomputed over a record alone: ids, roots, commitments, draw, seats, distances, verdicts,
money.

Each rule is a function from a record to the problems it found; RULES gives them names. Promises that a rule finds
nothing in the record of a request that the contracts handled as specified, and that it never reads the chain. Whether
the record is what the chain says is `bsns.audit.verification`'s part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from bsns.audit.chain_facts import NO_DISTANCE, NOBODY, members_distance, sketch_distance
from bsns.protocol import commitments, identifiers
from bsns.protocol.commitments import StageEvidence, content_digest, token_bytes
from bsns.protocol.identifiers import ZERO_HASH, ModelId, RequestId
from bsns.protocol.merkle import verify as verify_proof
from bsns.protocol.plan import ShardPlan
from bsns.protocol.record import (
    NO_STAGE,
    Member,
    RecordedEvidence,
    RecordedReveal,
    Round,
    Slash,
    Tally,
    VerificationRecord,
)
from bsns.protocol.sampling import SamplingParameters

Problems = Iterator[str]
Rule = Callable[[VerificationRecord], Problems]

BASIS_POINTS: Final = 10_000
TOMBSTONE: Final = 2**64 - 1


def _request_id(record: VerificationRecord) -> Problems:
    request, domain = record.request, record.domain
    if request.nonce is None:
        return
    expected = identifiers.request_id(domain.chain_id, domain.inference_escrow, request.requester, request.nonce)
    if request.request_id != expected:
        yield f"request.request_id is not that of requester and nonce, expected 0x{expected.hex()}"


def _model_id(record: VerificationRecord) -> Problems:
    model = record.model
    if model.model_id != identifiers.model_id(model.manifest_hash, model.weight_root, model.unit_count):
        yield "model.model_id is not the hash of manifest hash, weight root and unit count"


def _plan(record: VerificationRecord) -> Problems:
    plan, domain = record.plan, record.domain
    expected = identifiers.plan_id(
        domain.chain_id, domain.shard_assignments, plan.publisher, ModelId(record.model.model_id), plan.epoch
    )
    if plan.plan_id != expected:
        yield f"plan.plan_id is not that of publisher, model and epoch, expected 0x{expected.hex()}"
    shards = ShardPlan(record.model.unit_count, tuple(item.assignment() for item in plan.assignments))
    if shards.root != plan.root:
        yield f"plan.root is not the root over its assignments, expected 0x{shards.root.hex()}"
    if plan.effective_at > record.request.opened_at:
        yield "request was opened before its plan was in effect"
    if record.request.fee_per_token != plan.fee_per_token:
        yield "request.fee_per_token is not that of the plan"


def _route(record: VerificationRecord) -> Problems:
    if record.route is None:
        return
    assignments = record.plan.assignments
    if len(record.route.stages) != assignments[-1].stage + 1:
        yield "route does not have one node per stage of the plan"
    for number, item in enumerate(record.route.stages):
        where = f"route.stages[{number}]"
        assignment = assignments[item.assignment]
        if item.stage != number or assignment.stage != item.stage or assignment.node != item.node:
            yield f"{where} is not the assignment it names"
        if assignment.assignment().leaf != item.leaf:
            yield f"{where}.leaf is not the hash of the assignment"
        if not verify_proof(record.plan.root, item.leaf, item.proof):
            yield f"{where}.proof does not lead to the plan's root"
    assigned = {(item.stage, item.node) for item in assignments}
    newest: dict[int, str] = {}
    for number, change in enumerate(record.route.replacements):
        where = f"route.replacements[{number}]"
        if not {(change.stage, change.replaced), (change.stage, change.node)} <= assigned:
            yield f"{where} is between nodes that the plan did not assign to the stage"
        if newest.get(change.stage, change.replaced) != change.replaced:
            yield f"{where} replaces a node that no longer served the stage"
        newest[change.stage] = change.node
    for stage, node in newest.items():
        if stage >= len(record.route.stages) or record.route.stages[stage].node != node:
            yield f"route.stages[{stage}] is not the node that replaced the others"


def _input(record: VerificationRecord) -> Problems:
    opening = record.input
    if opening is None:
        return
    values = opening.sampling
    sampling = SamplingParameters(
        values.temperature_millionths / 1_000_000,
        values.top_k,
        values.top_p_millionths / 1_000_000,
        values.seed,
        values.maximum_tokens,
    )
    if sampling.digest() != opening.sampling_digest:
        yield "input.sampling_digest is not the digest of the sampling parameters"
    committed = commitments.input_commitment(
        opening.prompt_digest, opening.prompt_tokens, opening.sampling_digest, opening.salt
    )
    if committed != record.request.input_commitment:
        yield "input does not open the commitment on chain"
    if opening.prompt_tokens != record.request.prompt_tokens:
        yield "input.prompt_tokens is not the number that was paid for"
    if values.maximum_tokens != record.request.maximum_tokens:
        yield "input.sampling.maximum_tokens is not the number that was paid for"


def _evidence(record: VerificationRecord) -> Problems:
    by_stage = {item.stage: item for item in record.commitments}
    for item in record.evidence:
        where = f"evidence of stage {item.stage}"
        shown = _stage_evidence(item)
        if shown.root != item.evidence_root:
            yield f"{where}: evidence_root is not the root over its steps"
        executor = by_stage.get(item.stage)
        if executor is None:
            yield f"{where}: the stage has not committed"
            continue
        opened = commitments.stage_commitment(
            RequestId(record.request.request_id),
            0,
            item.stage,
            executor.node,
            item.evidence_root,
            item.sealed_sketch,
            item.output_tokens,
        )
        if opened != executor.commitment:
            yield f"{where} does not open the executor's commitment"
        try:
            commitments.kept_rows(
                shown, record.request.prompt_tokens, item.output_tokens, record.request.maximum_tokens
            )
        except identifiers.ProtocolError as error:
            yield f"{where}: {error}"


def _ring(record: VerificationRecord) -> Problems:
    """Output of stage i is input of stage i+1; output of the last is the next input of stage 0; the first input is
    the prompt.
    """
    shown = {item.stage: item for item in record.evidence}
    last = len(record.route.stages) - 1 if record.route else -1
    for stage, item in shown.items():
        follower = shown.get(stage + 1)
        if follower is not None:
            for left, right in zip(item.steps, follower.steps):
                if left.output_digest != right.input_digest:
                    yield f"step {left.step}: output of stage {stage} is not the input of stage {stage + 1}"
                if (left.position, left.rows) != (right.position, right.rows):
                    yield f"step {left.step}: stages {stage} and {stage + 1} computed different rows"
    if last in shown and 0 in shown:
        for left, right in zip(shown[last].steps, shown[0].steps[1:]):
            if left.output_digest != right.input_digest:
                yield f"step {left.step}: the output of the last stage is not the next input of stage 0"
    if record.input is not None and 0 in shown and shown[0].steps[0].input_digest != record.input.prompt_digest:
        yield "the first input of stage 0 is not the prompt of the request"


def _tokens(record: VerificationRecord) -> Problems:
    if record.tokens is None or record.input is None or not record.evidence:
        return
    if content_digest(token_bytes(record.tokens.prompt)) != record.input.prompt_digest:
        yield "tokens.prompt is not the prompt of the request"
    if len(record.tokens.prompt) != record.input.prompt_tokens:
        yield "tokens.prompt has another length than the prompt of the request"
    last = record.evidence[-1]
    answer, drafts = record.tokens.answer, record.tokens.drafts
    if len(answer) != last.output_tokens:
        yield f"tokens.answer has {len(answer)} tokens, the last stage drew {last.output_tokens}"
    if len(drafts) != len(last.steps):
        yield f"tokens.drafts has entries for {len(drafts)} steps, the last stage made {len(last.steps)}"
    drawn = 0
    before: tuple[int, ...] = ()
    kept = commitments.kept_rows(
        _stage_evidence(last), len(record.tokens.prompt), last.output_tokens, record.request.maximum_tokens
    )
    for step, count, following in zip(last.steps, kept, drafts):
        # Of the prompt only the last row gives a token.
        tokens = answer[drawn : drawn + (count if step.step else 1)]
        if tokens[:-1] != before[: len(tokens) - 1]:
            yield f"tokens.answer takes tokens of step {step.step} that were not drafted"
        handed_on = token_bytes((tokens[-1], *following))
        if commitments.step_digest(handed_on, step.position + count, 1 + len(following)) != step.output_digest:
            yield f"tokens.answer[{drawn + len(tokens) - 1}] or its drafts are not what the last stage handed on"
        drawn, before = drawn + len(tokens), following


def _stage_evidence(item: RecordedEvidence) -> StageEvidence:
    return StageEvidence(tuple(step.evidence_step() for step in item.steps))


def _reveals(record: VerificationRecord) -> Problems:
    if record.route is not None and record.entropy is not None:
        expected = [(item.stage, item.node) for item in record.route.stages]
        if [(item.stage, item.node) for item in record.commitments] != expected:
            yield "commitments are not one by each node of the route"
    for item in record.commitments:
        if item.reveal and _opened(record, 0, item.stage, item.node, item.reveal) != item.commitment:
            yield f"reveal of stage {item.stage} does not open the executor's commitment"
        evidence = next((e for e in record.evidence if e.stage == item.stage), None)
        if item.reveal and evidence:
            sealed = commitments.sealed_sketch(item.reveal.sketch, item.reveal.salt)
            shown = (evidence.evidence_root, evidence.sealed_sketch, evidence.output_tokens)
            if shown != (item.reveal.evidence_root, sealed, item.reveal.output_tokens):
                yield f"evidence of stage {item.stage} is not what its executor revealed"


def _attestations(record: VerificationRecord) -> Problems:
    for round_ in record.rounds:
        for item in round_.members:
            if item.reveal and _opened(record, round_.number, item.stage, item.node, item.reveal) != item.commitment:
                where = f"round {round_.number}, stage {item.stage}"
                yield f"{where}: reveal of {item.node} does not open its commitment"


def _opened(record: VerificationRecord, round_: int, stage: int, node: str, reveal: RecordedReveal) -> bytes:
    sealed = commitments.sealed_sketch(reveal.sketch, reveal.salt)
    request = RequestId(record.request.request_id)
    return commitments.stage_commitment(
        request, round_, stage, node, reveal.evidence_root, sealed, reveal.output_tokens
    )


def _secret(record: VerificationRecord) -> Problems:
    draw = record.draw
    if draw is None:
        return
    if draw.secret != ZERO_HASH and commitments.secret_hash(draw.secret) != record.request.secret_hash:
        yield "draw.secret is not the one whose hash the request fixed"


def _draw(record: VerificationRecord) -> Problems:
    entropy, draw = record.entropy, record.draw
    if entropy is None:
        return
    digest = commitments.commitments_digest(item.commitment for item in record.commitments)
    if digest != entropy.commitments_digest:
        yield "entropy.commitments_digest is not the chain over the commitments"
    if draw is None:
        return
    number = entropy.renewals[-1].entropy_block if entropy.renewals else entropy.block
    if draw.entropy_block.number != number:
        yield f"draw.entropy_block is not block {number}, which was set"
    seed = commitments.draw_seed(draw.secret, digest, draw.entropy_block.hash, RequestId(record.request.request_id))
    if seed != draw.seed:
        yield "draw.seed is not the hash of secret, commitments, entropy block and request"
    rate = record.term("OutputVerification.samplingRateBps")
    if commitments.is_sampled(draw.seed, rate) != draw.sampled:
        yield f"draw.sampled does not follow from the seed at {rate} basis points"


def _escalation(record: VerificationRecord) -> Problems:
    if record.draw is None:
        if record.rounds:
            yield "rounds without a draw"
        return
    seed = record.draw.seed
    for index, round_ in enumerate(record.rounds):
        if round_.number != index + 1 or round_.number > commitments.MAXIMUM_ROUNDS:
            yield f"rounds[{index}] is numbered {round_.number}"
        if index:
            seed = commitments.next_round_seed(seed, round_.number)
        if round_.seed != seed:
            yield f"rounds[{index}].seed does not follow from the seed of the draw"
    if record.rounds and record.rounds[0].attest_deadline != record.draw.attest_deadline:
        yield "rounds[0].attest_deadline is not that of the draw"


def _seats(record: VerificationRecord) -> Problems:
    if record.entropy is None or record.route is None:
        return
    executors = {item.stage: item for item in record.route.stages}
    seats = record.term("OutputVerification.committeeSeats")
    for round_ in record.rounds:
        taken = Counter((item.stage, item.node) for item in round_.members)
        for item in round_.members:
            where = f"round {round_.number}: {item.node} at stage {item.stage}"
            executor = executors.get(item.stage)
            if executor is None or item.node == executor.node or item.operator == executor.operator:
                yield f"{where} may not sit there: it is the executor or of its operator"
            if taken[item.stage, item.node] > 1:
                yield f"{where} sits there twice"
            if not commitments.is_seated(
                round_.seed, round_.number, item.stage, item.node, item.stake, record.entropy.snapshot_stake, seats
            ):
                yield f"{where} has no seat by the draw"


def _distances(record: VerificationRecord) -> Problems:
    for round_ in record.rounds:
        for tally in round_.tallies:
            bench = {m.node: m.reveal for m in round_.members if m.stage == tally.stage and m.reveal}
            medoid = bench.get(tally.medoid)
            where = f"round {round_.number}, stage {tally.stage}"
            if medoid is None:
                if tally.member_distances:
                    yield f"{where}: distances without a medoid"
                continue
            expected = [(node, members_distance(medoid, reveal)) for node, reveal in bench.items()]
            if [(item.node, item.distance) for item in tally.member_distances] != expected:
                yield f"{where}: member_distances are not those of the revealed sketches"


def _verdicts(record: VerificationRecord) -> Problems:
    """Each tally by the rules of CDV, and what had to follow it."""
    for round_ in record.rounds:
        judged = Counter(item.stage for item in round_.tallies)
        if any(count > 1 for count in judged.values()):
            yield f"round {round_.number}: a stage was judged twice"
        for tally in round_.tallies:
            expected = _expected_tally(record, round_, tally)
            actual = (tally.verdict, tally.support, tally.revealed_stake, tally.distance)
            if isinstance(expected, str):
                yield f"round {round_.number}, stage {tally.stage}: {expected}"
            elif actual != expected:
                yield f"round {round_.number}, stage {tally.stage}: {actual} recorded, {expected} by the rules"
    yield from _succession(record)


def _expected_tally(record: VerificationRecord, round_: Round, tally: Tally) -> tuple[str, int, int, int] | str:
    executor = next((item.reveal for item in record.commitments if item.stage == tally.stage), None)
    if executor is None:
        return ("Withheld", 0, 0, 0) if tally.medoid == NOBODY else "a medoid for an executor that revealed nothing"
    if record.draw is not None and not record.draw.sampled and round_.number == 1:
        return ("Accepted", 0, 0, 0) if tally.medoid == NOBODY else "a medoid in a round without a committee"
    bench = _bench(round_, tally.stage)
    revealed = sum(_vote(record, round_, item) for item, _ in bench)
    if tally.medoid == NOBODY:
        for item, reveal in bench:
            if _has_quorum(record, bench, _support(record, round_, tally.stage, reveal), revealed):
                return f"no quorum recorded, but {item.node} has one"
        return "NoQuorum", 0, revealed, NO_DISTANCE
    medoid = next((reveal for item, reveal in bench if item.node == tally.medoid), None)
    if medoid is None:
        return "the medoid is not a member that revealed"
    support = _support(record, round_, tally.stage, medoid)
    if not _has_quorum(record, bench, support, revealed):
        return f"the medoid has {support} of {revealed} wei behind it, which is no quorum"
    away = sketch_distance(medoid, executor)
    return _verdict_at(record, away), support, revealed, away


def _bench(round_: Round, stage: int) -> list[tuple[Member, RecordedReveal]]:
    return [(item, item.reveal) for item in round_.members if item.stage == stage and item.reveal is not None]


def _vote(record: VerificationRecord, round_: Round, member: Member) -> int:
    seats = record.term("OutputVerification.committeeSeats")
    total = record.entropy.snapshot_stake if record.entropy else 0
    return commitments.vote_weight(round_.number, member.stake, total, seats)


def _support(record: VerificationRecord, round_: Round, stage: int, medoid: RecordedReveal) -> int:
    tolerance = record.term("OutputVerification.tolerance")
    return sum(
        _vote(record, round_, item)
        for item, reveal in _bench(round_, stage)
        if members_distance(medoid, reveal) <= tolerance
    )


def _has_quorum(record: VerificationRecord, bench: Sequence[object], support: int, revealed: int) -> bool:
    return len(bench) >= record.term("OutputVerification.minimumReveals") and support * 3 >= revealed * 2


def _verdict_at(record: VerificationRecord, away: int) -> str:
    tolerance = record.term("OutputVerification.tolerance")
    if away <= tolerance:
        return "Accepted"
    return "Tolerated" if away <= 2 * tolerance else "Rejected"


def _contradicts(record: VerificationRecord, medoid: RecordedReveal, reveal: RecordedReveal) -> bool:
    """Beyond 2 tau, unless either says that it was not given the evidence."""
    if 0 in (medoid.output_tokens, reveal.output_tokens):
        return False
    return members_distance(medoid, reveal) > 2 * record.term("OutputVerification.tolerance")


def _medoid(round_: Round, tally: Tally) -> RecordedReveal | None:
    return next((reveal for item, reveal in _bench(round_, tally.stage) if item.node == tally.medoid), None)


def _escalating(record: VerificationRecord, round_: Round) -> set[int]:
    """Stages that need another round after this one."""
    found = set()
    for tally in round_.tallies:
        medoid = _medoid(round_, tally)
        if tally.verdict == "NoQuorum" and round_.number < commitments.MAXIMUM_ROUNDS:
            found.add(tally.stage)
        elif medoid is not None and round_.number == 1:
            disputed = any(_contradicts(record, medoid, reveal) for _, reveal in _bench(round_, tally.stage))
            if disputed or tally.verdict == "Rejected":
                found.add(tally.stage)
    return found


def _fails(round_: Round) -> bool:
    """Whether a verdict of this round turns the request down."""
    return any(
        tally.verdict == "Withheld"
        or (tally.verdict == "Rejected" and round_.number > 1)
        or (tally.verdict == "NoQuorum" and round_.number == commitments.MAXIMUM_ROUNDS)
        for tally in round_.tallies
    )


def _succession(record: VerificationRecord) -> Problems:
    """Rounds follow one another only for a disagreement or a challenge, and the conclusion follows from the last."""
    failed = False
    for index, round_ in enumerate(record.rounds):
        is_last = index == len(record.rounds) - 1
        failed = failed or _fails(round_)
        if is_last:
            continue
        following = {item.stage for item in record.rounds[index + 1].tallies}
        needed = _escalating(record, round_)
        challenged = {item.stage for item in record.challenges}
        if failed and not needed:
            yield f"round {round_.number + 1} sat although round {round_.number} had turned the request down"
        if not needed and not challenged:
            yield f"round {round_.number + 1} sat without a disagreement or a challenge"
        if not following <= needed | challenged:
            surplus = sorted(following - needed - challenged)
            yield f"round {round_.number + 1} judged stages {surplus} that nobody disputed"
    conclusion = record.conclusion
    if conclusion is None:
        return
    if conclusion.accepted and failed:
        yield "the request was accepted although a verdict was against it"
    if conclusion.accepted and record.rounds and _escalating(record, record.rounds[-1]):
        yield "the request was accepted although a stage needed another round"
    if conclusion.accepted and record.route and set(_final_tallies(record)) != set(range(len(record.route.stages))):
        yield "the request was accepted although a stage was never judged"
    if record.verdicts and record.verdicts[-1].accepted and failed:
        yield "the last verdict accepts a request that was turned down"
    blamed = [
        tally.stage
        for round_ in record.rounds
        for tally in round_.tallies
        if tally.verdict == "Withheld" or (tally.verdict == "Rejected" and round_.number > 1)
    ]
    contradicted = any(item.reason == "Equivocation" for item in record.slashes)
    expected = min(blamed, default=NO_STAGE)
    if conclusion.blamed_stage != expected and not (contradicted and conclusion.blamed_stage < expected):
        yield f"conclusion.blamed_stage is {conclusion.blamed_stage}, {expected} by the verdicts"


def _final_tallies(record: VerificationRecord) -> dict[int, str]:
    """Last verdict of each stage."""
    return {tally.stage: tally.verdict for round_ in record.rounds for tally in round_.tallies}


def _slashes(record: VerificationRecord) -> Problems:
    allowed = _allowed_slashes(record)
    seen: Counter[tuple[str, str]] = Counter()
    for index, slash in enumerate(record.slashes):
        where = f"slashes[{index}]: {slash.node}"
        seen[slash.node, slash.reason] += 1
        if slash.reason != "Equivocation" and seen[slash.node, slash.reason] > allowed[slash.node, slash.reason]:
            yield f"{where} was slashed for {slash.reason}, which no verdict says"
        share = _slash_share(record, slash)
        amount = (slash.amount + slash.staked) * share // BASIS_POINTS
        if slash.amount != amount:
            yield f"{where} lost {slash.amount} wei, {amount} by the terms"
        rewards = record.term("OutputVerification.memberShareBps") + record.term("OutputVerification.reporterShareBps")
        if not slash.amount - slash.amount * rewards // BASIS_POINTS <= slash.burned <= slash.amount:
            yield f"{where}: {slash.burned} of {slash.amount} wei burned is outside the terms"
        if slash.thawing > slash.staked:
            yield f"{where}: more is thawing than staked"
    # A node without any stake left is judged all the same, and there is nothing to take.
    exhausted = {item.node for item in record.slashes if item.staked == 0}
    for (node, reason), count in allowed.items():
        if seen[node, reason] < count and node not in exhausted:
            yield f"{node} should have been slashed {count} times for {reason}, was {seen[node, reason]} times"


def _slash_share(record: VerificationRecord, slash: Slash) -> int:
    match slash.reason:
        case "Equivocation":
            return BASIS_POINTS
        case "EvidenceWithheld" | "RevealWithheld":
            return record.term("OutputVerification.withholdSlashBps")
        case _:
            return record.term("OutputVerification.incorrectSlashBps")


def _allowed_slashes(record: VerificationRecord) -> Counter[tuple[str, str]]:
    """How often each node had to be slashed for which reason by the verdicts of this record."""
    found: Counter[tuple[str, str]] = Counter()
    executors = {item.stage: item.node for item in record.commitments}
    already: set[tuple[int, int, str]] = set()
    for round_ in record.rounds:
        for tally in round_.tallies:
            if tally.verdict == "Withheld":
                found[executors[tally.stage], "RevealWithheld"] += 1
            medoid = _medoid(round_, tally)
            if round_.number == 1 or medoid is None:
                continue
            if tally.verdict == "Rejected":
                withheld = medoid.output_tokens == 0
                found[executors[tally.stage], "EvidenceWithheld" if withheld else "IncorrectOutput"] += 1
            for earlier in record.rounds[: round_.number]:
                for item, reveal in _bench(earlier, tally.stage):
                    key = (earlier.number, tally.stage, item.node)
                    if _contradicts(record, medoid, reveal) and key not in already:
                        already.add(key)
                        found[item.node, "IncorrectAttestation"] += 1
    return found


def _jailings(record: VerificationRecord) -> Problems:
    silent = {item.node for round_ in record.rounds for item in round_.members if item.reveal is None}
    punished = {item.node for item in record.slashes} | {node for node, _ in _allowed_slashes(record)}
    for index, item in enumerate(record.jailings):
        if item.node not in silent | punished:
            yield f"jailings[{index}]: {item.node} was jailed without having been slashed or silent"
        equivocated = any(s.node == item.node and s.reason == "Equivocation" for s in record.slashes)
        if item.until == TOMBSTONE and not equivocated:
            yield f"jailings[{index}]: {item.node} is out for ever without an equivocation"


def _payments(record: VerificationRecord) -> Problems:
    payment, request = record.payment, record.request
    if payment is None:
        if record.status in ("Settled", "Refunded"):
            yield "the request is over and no payment is recorded"
        return
    total = payment.paid_to_executors + payment.paid_to_verifiers + payment.protocol_fee + payment.refunded
    if total != request.deposit:
        yield f"MONEY-02: paid, fee and refund are {total} wei, the deposit was {request.deposit}"
    credited = sum(item.amount for item in payment.credits)
    if credited != request.deposit:
        yield f"MONEY-02: credits are {credited} wei, the deposit was {request.deposit}"
    if payment.settled != (record.status == "Settled"):
        yield f"the payment does not fit the status {record.status}"
    expected = _expected_credits(record) if payment.settled else [(request.requester, request.deposit)]
    expected = [(account, amount) for account, amount in expected if amount]
    actual = [(item.account, item.amount) for item in payment.credits]
    if actual != expected:
        yield f"credits are {actual}, {expected} by the terms"
    if payment.settled and not (record.conclusion and record.conclusion.accepted):
        yield "the request was settled without an accepting conclusion"
    if payment.settled and record.conclusion:
        tokens = [item.reveal.output_tokens for item in record.commitments if item.reveal]
        if record.conclusion.output_tokens != min([request.maximum_tokens, *tokens]):
            yield "conclusion.output_tokens is not the least number that a stage revealed"
    if not payment.settled and (payment.paid_to_executors, payment.paid_to_verifiers, payment.protocol_fee) != (
        0,
        0,
        0,
    ):
        yield "a refund that pays somebody else"
    if payment.settled:
        yield from _fee_parts(record)


def _fee_parts(record: VerificationRecord) -> Problems:
    assert record.payment is not None
    protocol, verifiers, executors = _pots(record)
    if record.payment.protocol_fee != protocol:
        yield f"payment.protocol_fee is {record.payment.protocol_fee}, {protocol} by the terms"
    if record.payment.paid_to_verifiers != verifiers:
        yield f"payment.paid_to_verifiers is {record.payment.paid_to_verifiers}, {verifiers} by the terms"
    if record.payment.paid_to_executors > executors:
        yield f"payment.paid_to_executors is more than the {executors} wei of the terms"


def _pots(record: VerificationRecord) -> tuple[int, int, int]:
    """Protocol fee, verifiers' and executors' parts of the charge."""
    assert record.conclusion is not None
    request = record.request
    charge = request.fee_per_token * (request.prompt_tokens + record.conclusion.output_tokens)
    charge = min(charge, request.deposit)
    protocol = charge * record.term("InferenceEscrow.protocolFeeBps") // BASIS_POINTS
    verifiers = 0
    if _agreeing(record):
        verifiers = charge * record.term("InferenceEscrow.verifierShareBps") // BASIS_POINTS
    return protocol, verifiers, charge - protocol - verifiers


def _agreeing(record: VerificationRecord) -> list[Member]:
    """Members within tau of the medoid that decided their stage, in the order in which they are paid."""
    deciding: dict[int, tuple[int, RecordedReveal]] = {}
    for round_ in record.rounds:
        for tally in round_.tallies:
            medoid = _medoid(round_, tally)
            if medoid is not None:
                deciding[tally.stage] = (round_.number, medoid)
    tolerance = record.term("OutputVerification.tolerance")
    found = []
    for round_ in record.rounds:
        for item in sorted(round_.members, key=lambda member: member.stage):
            number, medoid = deciding.get(item.stage, (0, None))
            if medoid is None or item.reveal is None or round_.number > number:
                continue
            if members_distance(medoid, item.reveal) <= tolerance:
                found.append(item)
    return found


def _expected_credits(record: VerificationRecord) -> list[tuple[str, int]]:
    """Treasury, executors, verifiers, requester: who is credited what, in order."""
    if record.route is None or record.conclusion is None:
        return []
    protocol, verifier_pot, pot = _pots(record)
    found: list[tuple[str, int]] = [(record.domain.treasury, protocol)]
    paid = [stage for stage, verdict in sorted(_final_tallies(record).items()) if verdict == "Accepted"]
    weights = {item.stage: record.plan.assignments[item.assignment].work_weight for item in record.route.stages}
    shares: Mapping[int, int] = {stage: pot * weight // sum(weights.values()) for stage, weight in weights.items()}
    for stage in paid:
        dust = pot - sum(shares.values()) if stage == paid[-1] else 0
        found.append((record.route.stages[stage].operator, shares[stage] + dust))
    members = _agreeing(record)
    for index, member in enumerate(members):
        share = verifier_pot // len(members)
        if index == len(members) - 1:
            share = verifier_pot - share * index
        found.append((member.operator, share))
    found.append((record.request.requester, record.request.deposit - sum(amount for _, amount in found)))
    return found


def _transactions(record: VerificationRecord) -> Problems:
    known = {item.hash for item in record.transactions}
    if len(known) != len(record.transactions):
        yield "a transaction is listed twice"
    for item in record.transactions:
        if item.block_number > record.as_of.number:
            yield f"transaction 0x{item.hash.hex()} lies after the block of the record"


RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("request id", _request_id),
    ("model id", _model_id),
    ("plan: id, coverage, root", _plan),
    ("route: assignments and proofs", _route),
    ("input commitment", _input),
    ("evidence: roots, chains, commitments", _evidence),
    ("ring: outputs are inputs", _ring),
    ("token ids", _tokens),
    ("stage reveals", _reveals),
    ("secret", _secret),
    ("draw: commitments, entropy, seed, sampling", _draw),
    ("escalation seeds", _escalation),
    ("committee seats", _seats),
    ("attestation reveals", _attestations),
    ("distances", _distances),
    ("verdicts", _verdicts),
    ("slashes", _slashes),
    ("jailings", _jailings),
    ("payments (MONEY-02)", _payments),
    ("transactions", _transactions),
)
