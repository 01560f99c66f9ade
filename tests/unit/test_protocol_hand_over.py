"""The linkage rule: who is believed when two ends of a hop show different bytes."""

from __future__ import annotations

import pytest

from bsns.chain.signer import KeySigner
from bsns.protocol.commitments import EvidenceBuilder, StageEvidence, content_digest
from bsns.protocol.hand_over import (
    MAXIMUM_STATEMENTS,
    Linkage,
    ShownStage,
    Statement,
    contradictions,
    linkage,
)
from bsns.protocol.identifiers import RequestId, address, keccak256
from bsns.protocol.merkle import verify
from bsns.protocol.typed_data import HAND_OVER, signing_digest, verification_domain

DOMAIN = verification_domain(31337, address("0x" + "ab" * 20))
REQUEST = RequestId(keccak256(b"request"))
SENDER, RECEIVER, STRANGER = (KeySigner(keccak256(name)) for name in (b"sender", b"receiver", b"stranger"))
STEPS = 10


def evidence(received: str, sent: str, steps: int = STEPS) -> StageEvidence:
    """Evidence whose bytes at each step are named after `received` and `sent`."""
    builder = EvidenceBuilder()
    for step in range(steps):
        builder.add(
            3 if step == 0 else 1,
            content_digest(f"{received} {step}".encode()),
            content_digest(f"{sent} {step}".encode()),
            bytes(8),
        )
    return builder.finish()


def statement(
    signer: KeySigner, stage: int, evidence: StageEvidence, *, sent: bool, step: int = 8, request: bytes = REQUEST
) -> Statement:
    """What an honest node with this evidence signs."""
    leaf = evidence.steps[step]
    chain = leaf.output_chain if sent else leaf.input_chain
    digest = signing_digest(DOMAIN, HAND_OVER, (request, stage, sent, step, chain))
    return Statement(stage, sent, step, chain, signer.sign_digest(digest))


def sender(shown: StageEvidence, *statements: Statement, stage: int = 1) -> ShownStage:
    return ShownStage(stage, SENDER.address, shown, statements)


def receiver(shown: StageEvidence, *statements: Statement, stage: int = 2) -> ShownStage:
    return ShownStage(stage, RECEIVER.address, shown, statements)


HONEST_SENDER, HONEST_RECEIVER = evidence("a", "b"), evidence("b", "c")
RECEIPT = statement(RECEIVER, 2, HONEST_RECEIVER, sent=False)
SENT = statement(SENDER, 1, HONEST_SENDER, sent=True)


def judged(first: ShownStage, second: ShownStage) -> Linkage:
    """The linkage; checks that what can be proven on chain goes with it and opens the signer's own evidence root."""
    found = linkage(DOMAIN, REQUEST, first, second)
    if first.node != second.node:
        stages = {first.stage} if found.blames_sender else set()
        stages |= {second.stage} if found.blames_receiver else set()
        for item in contradictions(DOMAIN, REQUEST, first, second) if found is not Linkage.HOLDS else ():
            assert item.statement.stage in stages
            accused = first if item.statement.stage == first.stage else second
            assert verify(accused.evidence.root, item.step.leaf, item.proof)
            assert item.step.step == item.statement.step
            own = item.step.output_chain if item.statement.sent else item.step.input_chain
            assert own != item.statement.chain
    return found


def test_linkage_of_honest_neighbours_holds() -> None:
    assert judged(sender(HONEST_SENDER, RECEIPT), receiver(HONEST_RECEIVER, SENT)) is Linkage.HOLDS


def test_linkage_into_stage_0_is_shifted_by_one_step_and_leaves_the_last_token_out() -> None:
    builder = EvidenceBuilder()
    for step in range(STEPS):
        token = f"token {step - 1}" if step else "prompt"
        builder.add(1, content_digest(token.encode()), content_digest(b"x"), bytes(8))
    stage_0, last = builder.finish(), evidence("y", "token")
    assert judged(sender(last, stage=3), receiver(stage_0, stage=0)) is Linkage.HOLDS
    assert judged(sender(last), receiver(stage_0, stage=2)) is Linkage.UNRESOLVED
    other = evidence("y", "other token")
    said = statement(SENDER, 3, last, sent=True)
    assert judged(sender(other, stage=3), receiver(stage_0, said, stage=0)) is Linkage.SENDER_LIED
    receipt = statement(RECEIVER, 0, stage_0, sent=False)
    assert judged(sender(last, receipt, stage=3), receiver(evidence("i", "x"), stage=0)) is Linkage.RECEIVER_LIED
    assert judged(sender(last, stage=3), receiver(evidence("i", "x", 1), stage=0)) is Linkage.UNRESOLVED
    one = evidence("prompt", "token", 1)
    assert judged(sender(one, stage=1), receiver(one, stage=0)) is Linkage.HOLDS, "one step hands nothing over"


def test_linkage_with_invented_inputs_blames_the_receiver_by_its_receipt() -> None:
    invented = evidence("i", "c")
    link = judged(sender(HONEST_SENDER, RECEIPT), receiver(invented, SENT))
    assert link is Linkage.RECEIVER_LIED
    assert link.blames_receiver
    assert not link.blames_sender
    (proof,) = contradictions(DOMAIN, REQUEST, sender(HONEST_SENDER, RECEIPT), receiver(invented, SENT))
    assert proof.statement == RECEIPT


def test_linkage_with_one_step_changed_is_found_by_a_later_statement_and_not_by_an_earlier_one() -> None:
    builder = EvidenceBuilder()
    for step in HONEST_RECEIVER.steps:
        digest = content_digest(b"changed") if step.step == 5 else step.input_digest
        builder.add(step.rows, digest, step.output_digest, step.fingerprint)
    changed = builder.finish()
    assert judged(sender(HONEST_SENDER, RECEIPT), receiver(changed)) is Linkage.RECEIVER_LIED
    early = statement(RECEIVER, 2, HONEST_RECEIVER, sent=False, step=4)
    assert judged(sender(HONEST_SENDER, early), receiver(changed)) is Linkage.UNRESOLVED


def test_linkage_with_changed_outputs_blames_the_sender_by_its_own_statement() -> None:
    changed = evidence("a", "i")
    link = judged(sender(changed, RECEIPT), receiver(HONEST_RECEIVER, SENT))
    assert link is Linkage.SENDER_LIED
    assert link.blames_sender
    assert not link.blames_receiver


def test_linkage_with_both_ends_changed_blames_both() -> None:
    link = judged(sender(evidence("a", "i"), RECEIPT), receiver(evidence("j", "c"), SENT))
    assert link is Linkage.BOTH_LIED
    assert link.blames_sender
    assert link.blames_receiver


def test_linkage_with_evidence_shorter_than_what_was_signed_blames_without_a_proof_for_the_chain() -> None:
    short = receiver(evidence("b", "c", 5), SENT)
    assert judged(sender(HONEST_SENDER, RECEIPT), short) is Linkage.RECEIVER_LIED
    assert contradictions(DOMAIN, REQUEST, sender(HONEST_SENDER, RECEIPT), short) == ()
    assert judged(sender(evidence("a", "b", 5), RECEIPT), receiver(HONEST_RECEIVER, SENT)) is Linkage.SENDER_LIED


def test_linkage_with_one_node_at_both_ends_blames_it_without_statements() -> None:
    second = ShownStage(2, SENDER.address, evidence("i", "c"), ())
    assert linkage(DOMAIN, REQUEST, sender(HONEST_SENDER), second) is Linkage.BOTH_LIED
    second = ShownStage(2, SENDER.address, HONEST_RECEIVER, ())
    assert linkage(DOMAIN, REQUEST, sender(HONEST_SENDER), second) is Linkage.HOLDS


@pytest.mark.parametrize(
    "shown",
    [
        (),
        (statement(STRANGER, 2, HONEST_RECEIVER, sent=False),),
        (statement(SENDER, 2, HONEST_RECEIVER, sent=False),),
        (statement(RECEIVER, 1, HONEST_RECEIVER, sent=False),),
        (statement(RECEIVER, 2, HONEST_RECEIVER, sent=True),),
        (statement(RECEIVER, 2, evidence("i", "c"), sent=False),),
        (statement(RECEIVER, 2, HONEST_RECEIVER, sent=False, request=keccak256(b"another request")),),
        (Statement(2, False, 8, RECEIPT.chain, b""),),
        (Statement(2, False, 8, b"short", RECEIPT.signature),),
        (Statement(2, False, 7, RECEIPT.chain, RECEIPT.signature),),
        (Statement(2, False, 2**32 - 1, RECEIPT.chain, RECEIPT.signature),),
        (*(Statement(2, False, 8, RECEIPT.chain, b"rubbish"),) * MAXIMUM_STATEMENTS, RECEIPT),
    ],
    ids=[
        "none", "stranger's", "accuser's own", "another stage", "wrong direction", "agrees with the evidence",
        "another request", "unsigned", "malformed chain", "another step", "absurd step", "behind too much rubbish",
    ],
)  # fmt: skip
def test_linkage_without_a_statement_of_the_accused_that_contradicts_it_is_unresolved(
    shown: tuple[Statement, ...],
) -> None:
    assert judged(sender(HONEST_SENDER, *shown), receiver(evidence("i", "c"), SENT)) is Linkage.UNRESOLVED


def test_linkage_with_a_neighbour_that_made_its_evidence_up_does_not_blame_the_honest_end() -> None:
    honest_receiver = receiver(HONEST_RECEIVER, SENT)
    for shown in ((), (RECEIPT,), (RECEIPT, SENT), (statement(SENDER, 2, evidence("x", "y"), sent=False),)):
        assert not judged(sender(evidence("a", "i"), *shown), honest_receiver).blames_receiver
    honest_sender = sender(HONEST_SENDER, RECEIPT)
    for shown in ((), (SENT,), (SENT, RECEIPT), (statement(RECEIVER, 1, evidence("x", "y"), sent=True),)):
        assert not judged(honest_sender, receiver(evidence("i", "c"), *shown)).blames_sender
