"""Hand-over statements, and the rule that links the evidence of neighbouring stages.

Owns what makes a hop of the ring right (what one stage sent is what the next one received), and who is to blame where
it is not: the node whose signed statement contradicts the evidence it committed to itself. Promises that nobody can be
blamed by what another node signed or claims, and that honest nodes are never blamed, because they sign what their
evidence says. All functions are pure. Does not fetch evidence nor check that it opens its commitment: see
node_client.reexecution.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from bsns.protocol.commitments import EvidenceStep, StageEvidence
from bsns.protocol.identifiers import BYTES32, RequestId
from bsns.protocol.typed_data import HAND_OVER, Domain, is_signed_by, signing_digest

# A bundle holds what two neighbours signed last. A longer one is not searched to its end: each signature costs time.
MAXIMUM_STATEMENTS = 8


@dataclass(frozen=True, slots=True)
class Statement:
    """A node's signed hand-over statement (IOutputVerification.HandOver). `stage` is the stage that made it; `chain`
    covers all steps up to `step`.
    """

    stage: int
    sent: bool
    step: int
    chain: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class ShownStage:
    """A stage as its node shows it: evidence that opens its commitment, and the statements it holds of its
    neighbours.
    """

    stage: int
    node: str
    evidence: StageEvidence
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A statement and the leaf of its signer's own evidence that it contradicts: what
    OutputVerification.reportContradiction takes.
    """

    statement: Statement
    step: EvidenceStep
    proof: tuple[bytes, ...]


class Linkage(enum.Enum):
    """What the two ends of a hop show. UNRESOLVED: they disagree, and no statement says who lies."""

    HOLDS = "holds"
    SENDER_LIED = "sender-lied"
    RECEIVER_LIED = "receiver-lied"
    BOTH_LIED = "both-lied"
    UNRESOLVED = "unresolved"

    @property
    def blames_sender(self) -> bool:
        return self in (Linkage.SENDER_LIED, Linkage.BOTH_LIED)

    @property
    def blames_receiver(self) -> bool:
        return self in (Linkage.RECEIVER_LIED, Linkage.BOTH_LIED)


def linkage(domain: Domain, request: RequestId, sender: ShownStage, receiver: ShownStage) -> Linkage:
    """Whether `receiver`'s inputs are `sender`'s outputs, and if not, who contradicts itself.

    The receiver is the sender's successor on the ring: stage 0 takes the last stage's token t as its input t + 1, and
    the last token is nobody's input. `domain` is that of OutputVerification.
    """
    sent = [step.output_digest for step in sender.evidence.steps]
    received = [step.input_digest for step in receiver.evidence.steps]
    if receiver.stage == 0:
        sent, received = sent[:-1], received[1:]
    if sent == received:
        return Linkage.HOLDS
    if sender.node == receiver.node:
        # One node committed to two stories about what it handed to itself; it needs nobody's statement.
        return Linkage.BOTH_LIED
    sender_lied = contradicting_statement(domain, request, sender, receiver.statements, sent=True) is not None
    receiver_lied = contradicting_statement(domain, request, receiver, sender.statements, sent=False) is not None
    match sender_lied, receiver_lied:
        case True, True:
            return Linkage.BOTH_LIED
        case True, False:
            return Linkage.SENDER_LIED
        case False, True:
            return Linkage.RECEIVER_LIED
    return Linkage.UNRESOLVED


def contradicting_statement(
    domain: Domain, request: RequestId, accused: ShownStage, statements: Iterable[Statement], *, sent: bool
) -> Statement | None:
    """A statement that `accused`'s node signed about what its stage `sent` (or received) and that its own evidence
    contradicts; None if there is none. Evidence contradicts a statement about a step that it leaves out, too.
    """
    steps = accused.evidence.steps
    for statement in tuple(statements)[:MAXIMUM_STATEMENTS]:
        if statement.stage != accused.stage or statement.sent is not sent or len(statement.chain) != BYTES32:
            continue
        if statement.step < len(steps):
            own = steps[statement.step]
            if statement.chain == (own.output_chain if sent else own.input_chain):
                continue
        values = (request, statement.stage, statement.sent, statement.step, statement.chain)
        if is_signed_by(signing_digest(domain, HAND_OVER, values), statement.signature, accused.node):
            return statement
    return None


def contradictions(
    domain: Domain, request: RequestId, sender: ShownStage, receiver: ShownStage
) -> tuple[Contradiction, ...]:
    """What of a hop that does not hold can be proven on chain, at most one for each end. A statement about a step that
    the evidence leaves out cannot: there is no leaf to show.
    """
    found = []
    for accused, witness, sent in ((sender, receiver, True), (receiver, sender, False)):
        statement = contradicting_statement(domain, request, accused, witness.statements, sent=sent)
        if statement is not None and statement.step < len(accused.evidence.steps):
            step = accused.evidence.steps[statement.step]
            found.append(Contradiction(statement, step, accused.evidence.tree.proof(statement.step)))
    return tuple(found)
