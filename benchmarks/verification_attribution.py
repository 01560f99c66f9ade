"""Who is blamed: pipelines of four stages with one cheat each, every stage judged as its committee would.

The cheat takes part in real decoding, so that all stages behind it work on what it handed on. Each node keeps its
evidence and signs for what it received and sent; each stage is executed again from the inputs of its evidence, sketched
under several request seeds, its hops are checked with its neighbours' evidence and statements, the rows it handed on
with those computed, the last stage's tokens with their draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from benchmarks.result import Figure
from benchmarks.verification_cheats import (
    CHEATS,
    INT8_ROWS,
    Cheat,
    integer_rows,
    other_weights,
    perturbed,
    random_outputs,
    with_one_row_changed,
)
from benchmarks.verification_detection import (
    DECLARED,
    EXECUTION_CLASS,
    WORKERS,
    sampling_of,
    texts,
)
from benchmarks.verification_judge import (
    Outcome,
    first_departure,
    first_refused,
    outcome,
    request_seed,
    sketches_at,
)
from benchmarks.verification_statistics import shown_share
from benchmarks.verification_traces import Outputs, Recording, Rows, honest_stages, in_one_pass
from bsns.chain.signer import KeySigner
from bsns.protocol.commitments import EvidenceBuilder, StageEvidence, content_digest, token_bytes
from bsns.protocol.hand_over import ShownStage, Statement, linkage
from bsns.protocol.identifiers import RequestId, address, keccak256
from bsns.protocol.sampling import draw
from bsns.protocol.sketch import TOLERANCES, disowned, distance
from bsns.protocol.typed_data import HAND_OVER, signing_digest, verification_domain
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, StepInput
from bsns.runtime.prepare import prepare

CUTS = (0, 9, 17, 25, 32)
STAGES = len(CUTS) - 1
LAST = STAGES - 1
DOMAIN = verification_domain(31337, address("0x" + "ab" * 20))
# The hash of the block that the draw waited for.
ENTROPY = keccak256(b"entropy")
# Relative noise on the bytes that one cheat hands on while it sketches the true rows: as much as 8-bit weights make.
HANDED_ON_NOISE = 1e-2


@dataclass(frozen=True)
class Size:
    """How much is judged. `stages`: those that cheat, one at a time."""

    prompts: int = 3
    tokens: int = 32
    seeds: int = 4
    stages: tuple[int, ...] = tuple(range(STAGES))


QUICK = Size(prompts=1, tokens=6, seeds=2, stages=(0, LAST))


@dataclass(frozen=True)
class Deviation:
    """How one node of the pipeline cheats; what is None it does honestly.

    `weights`: another executor. `inputs`: what it computes on, of what it received in step 0. `outputs`: what it has
    for its rows. `handed_on`: what it hands on in place of the rows that it sketches. `claims_inputs`,
    `claims_outputs`: its evidence is over other bytes than it received or sent. `tokens`: the last stage exchanges the
    token of the last step.
    """

    weights: Cheat | None = None
    inputs: Callable[[Tensor], Tensor] | None = None
    outputs: Callable[[Rows], Rows] | None = None
    handed_on: Callable[[Rows], Rows] | None = None
    claims_inputs: bool = False
    claims_outputs: bool = False
    tokens: bool = False

    def is_possible_at(self, stage: int) -> bool:
        """Tokens are the last stage's; there the bytes handed on are tokens."""
        return (stage == LAST) if self.tokens else not (self.handed_on and stage == LAST)


def _of_rows(make: Callable[[Recording], Outputs]) -> Callable[[Rows], Rows]:
    return lambda rows: make(Recording(outputs=[rows]))[0]


DEVIATIONS = {
    INT8_ROWS: Deviation(Cheat(integer_rows(8))),
    "int4 weights, groups of 32": Deviation(Cheat(integer_rows(4, 32))),
    "bf16 arithmetic": Deviation(CHEATS[DECLARED]["bf16 arithmetic"]),
    "one block skipped": Deviation(Cheat(skips_one=True)),
    "another model (same shape, other weights)": Deviation(Cheat(other_weights)),
    "one input row changed": Deviation(inputs=lambda rows: with_one_row_changed([StepInput(0, rows)])[0].inputs),
    "random outputs": Deviation(outputs=_of_rows(random_outputs(0))),
    "evidence over inputs that it did not receive": Deviation(claims_inputs=True),
    "evidence over outputs that it did not send": Deviation(claims_outputs=True),
    "honest sketch, other bytes handed on": Deviation(handed_on=_of_rows(perturbed(HANDED_ON_NOISE, 0))),
    "a token that is not the draw": Deviation(tokens=True),
}


@dataclass
class Node:
    """One stage of one request: what it received, computed on, sketches, and what its evidence says."""

    stage: int
    recording: Recording = field(default_factory=Recording)
    received: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    handed_on: Outputs = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def evidence(self, deviation: Deviation | None) -> StageEvidence:
        builder = EvidenceBuilder()
        for number, step in enumerate(self.recording.steps):
            received, sent = self.received[number], self.sent[number]
            # In the first step, which every later statement covers.
            if deviation is not None and number == 0:
                received = content_digest(b"invented") if deviation.claims_inputs else received
                sent = content_digest(b"invented") if deviation.claims_outputs else sent
            builder.add(len(step.inputs), received, sent, bytes(8))
        return builder.finish()


def _signer(stage: int) -> KeySigner:
    return KeySigner(keccak256(f"stage {stage}".encode()))


def _statement(request: RequestId, node: Node, *, sent: bool) -> Statement:
    """What the node signed while the request ran: over what it really received or sent, up to the last step."""
    leaf = node.evidence(None).steps[-1]
    chain = leaf.output_chain if sent else leaf.input_chain
    digest = signing_digest(DOMAIN, HAND_OVER, (request, node.stage, sent, leaf.step, chain))
    return Statement(node.stage, sent, leaf.step, chain, _signer(node.stage).sign_digest(digest))


@cache
def _honest() -> list[StageExecutor]:
    torch.set_num_threads(1)
    return honest_stages(prepare(), CUTS, DECLARED)


def decode(stages: Sequence[StageExecutor], cheating: int, deviation: Deviation, size: Size) -> list[list[Node]]:
    """Answers with one cheat in the pipeline, [prompt][stage]."""
    tokenizer = ChatTokenizer(prepare())
    prompts = [tokenizer.prompt_token_ids(text) for text in texts()[: size.prompts]]
    nodes = [[Node(stage) for stage in range(STAGES)] for _ in prompts]
    sessions = [[stage.new_session(len(prompt) + size.tokens) for stage in stages] for prompt in prompts]
    rows = [torch.tensor(prompt) for prompt in prompts]
    position = [0] * len(prompts)
    for step in range(size.tokens):
        values = list(rows)
        for number, stage in enumerate(stages):
            deviates = deviation if number == cheating else Deviation()
            batch = []
            for prompt, given in enumerate(values):
                node = nodes[prompt][number]
                node.received.append(content_digest(given.numpy().tobytes()))
                node.recording.steps.append(StepInput(position[prompt], given))
                taken = deviates.inputs(given) if deviates.inputs is not None and step == 0 else given
                batch.append(BatchStep(sessions[prompt][number], taken, position[prompt]))
            for prompt, output in enumerate(stage.forward_batch(batch)):
                assert isinstance(output, Tensor), output
                node = nodes[prompt][number]
                own = deviates.outputs(output.numpy()) if deviates.outputs is not None else output.numpy()
                node.recording.outputs.append(own)
                handed_on = deviates.handed_on(own) if deviates.handed_on is not None else own
                values[prompt] = torch.from_numpy(handed_on)
                if number < LAST:
                    node.handed_on.append(handed_on)
                    node.sent.append(content_digest(handed_on.tobytes()))
        for prompt, output in enumerate(values):
            node = nodes[prompt][LAST]
            logits = output[-1].numpy()
            token = draw(logits, sampling_of(prompt), step)
            if deviation.tokens and step == size.tokens - 1:
                token = next(int(item) for item in np.argsort(-logits, kind="stable")[:2] if item != token)
            node.tokens.append(token)
            position[prompt] += len(rows[prompt])
            rows[prompt] = torch.tensor([token])
            # Hashed as stage 0 takes it; on the wire a token has four bytes, and both ends hash the same.
            node.sent.append(content_digest(rows[prompt].numpy().tobytes()))
    return nodes


def verdicts(nodes: Sequence[Node], cheating: int, deviation: Deviation, place: int, seeds: int) -> list[list[Outcome]]:
    """The verdict on each stage of one request under each of `seeds` request seeds, [seed][stage]."""
    request = RequestId(keccak256(token_bytes([place])))
    shown = []
    for node in nodes:
        before, after = nodes[node.stage - 1], nodes[(node.stage + 1) % STAGES]
        statements = _statement(request, before, sent=True), _statement(request, after, sent=False)
        evidence = node.evidence(deviation if node.stage == cheating else None)
        shown.append(ShownStage(node.stage, _signer(node.stage).address, evidence, statements))
    lied = set()
    for sender, receiver in zip(shown, [*shown[1:], shown[0]], strict=True):
        link = linkage(DOMAIN, request, sender, receiver)
        lied |= {sender.stage} if link.blames_sender else set()
        lied |= {receiver.stage} if link.blames_receiver else set()
    tolerance = TOLERANCES[EXECUTION_CLASS]
    found: list[list[Outcome]] = [[] for _ in range(seeds)]
    for node, stage in zip(nodes, _honest(), strict=True):
        outputs, length = in_one_pass(stage)(node.recording), len(node.recording.steps)
        # The first stage's input in step 0 is the prompt, which the request's commitment fixes.
        holds = node.stage not in lied and (node.stage > 0 or _first_input(shown[0]) == node.received[0])
        if node.stage < LAST:
            follows = first_refused(node.handed_on, outputs, TensorEncoding.RAW_FLOAT32, tolerance) is None
        else:
            logits = [rows[-1] for rows in outputs]
            tokens = node.tokens
            departure = first_departure(logits, sampling_of(place), tokens.__getitem__, tolerance.logit_tolerance)
            follows = departure.is_false is None
        for sample in range(seeds):
            seed = request_seed(node.stage, "attribution", place, sample)
            mine, theirs = (
                sketches_at(rows, seed, tolerance.unit, (length,), centred=node.stage == LAST)[length]
                for rows in (outputs, node.recording.outputs)
            )
            attested = mine if follows else disowned(mine, seed, ENTROPY)
            found[sample].append(outcome(distance(attested, theirs), tolerance, evidence_holds=holds))
    return found


def _first_input(shown: ShownStage) -> bytes:
    return shown.evidence.steps[0].input_digest


def judge(case: tuple[str, int, Size]) -> tuple[str, int, list[list[Outcome]]]:
    """One cheat at one stage: its name, the stage, and the verdicts on all stages of each request and seed."""
    name, cheating, size = case
    deviation = DEVIATIONS[name]
    stages = list(_honest())
    if deviation.weights is not None:
        stages[cheating] = deviation.weights.stage(prepare(), (CUTS[cheating], CUTS[cheating + 1]), DECLARED)
    found = []
    for place, nodes in enumerate(decode(stages, cheating, deviation, size)):
        found += verdicts(nodes, cheating, deviation, place, size.seeds)
    return name, cheating, found


@dataclass
class Attribution:
    """By cheat: requests in which the liar and nobody else was slashed and everybody else paid, and all; what went
    otherwise.
    """

    right: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    by_hops: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def measure(size: Size, report: Callable[[str], None]) -> Attribution:
    cases = [
        (name, stage, size)
        for name, deviation in DEVIATIONS.items()
        for stage in size.stages
        if deviation.is_possible_at(stage)
    ]
    report(f"attribution: {len(cases)} pipelines of {STAGES} stages")
    result = Attribution()
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as workers:
        for name, cheating, requests in workers.map(judge, cases):
            for number, found in enumerate(requests):
                result.judged[name] += 1
                slashed = [stage for stage, verdict in enumerate(found) if verdict.is_slashed]
                rest_paid = all(found[stage] is Outcome.PAID for stage in range(STAGES) if stage != cheating)
                if slashed == [cheating] and rest_paid:
                    result.right[name] += 1
                    result.by_hops[name] += found[cheating] is Outcome.NO_EVIDENCE
                else:
                    result.wrong.append(
                        f"{name}, stage {cheating + 1}, case {number}: {[verdict.name for verdict in found]}"
                    )
    return result


def show(result: Attribution) -> None:
    print(f"\nrequests in which the liar, and nobody else of {STAGES} stages, was slashed, of all judged")
    for name, judged in result.judged.items():
        means = f"{result.by_hops[name]} as withheld, by hops, the others as incorrect"
        print(f"{name:46} {result.right[name]:5} of {judged:5}   {means}")
    for line in result.wrong:
        print(f"  {line}")


def figures(result: Attribution) -> list[Figure]:
    right = sum(result.right[name] for name in DEVIATIONS)
    judged = sum(result.judged[name] for name in DEVIATIONS)
    share = 100 * right / judged
    note = f"{right} of {judged}; {len(DEVIATIONS)} cheats, {STAGES} stages"
    return [
        Figure("right stage blamed", share, "% of requests", share, share, judged, "== 100", note),
        shown_share("right stage blamed, share that is shown", right, judged),
    ]
