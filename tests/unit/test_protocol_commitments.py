"""Evidence, commitments and the draw. The contracts' side of the same numbers is compared in tests/integration."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bsns.protocol import commitments
from bsns.protocol.commitments import EvidenceBuilder, StageEvidence
from bsns.protocol.identifiers import (
    ProtocolError,
    RequestId,
    abi_hash,
    address,
    keccak256,
    model_id,
    plan_id,
    request_id,
)
from bsns.protocol.merkle import verify

digests = st.binary(min_size=32, max_size=32)
Step = tuple[int, bytes, bytes, bytes, int]
# The last number says how many rows of a step are not kept, as far as it has so many.
rows = st.lists(
    st.tuples(st.integers(1, 9), digests, digests, st.binary(min_size=8, max_size=8), st.integers(0, 9)),
    min_size=1,
    max_size=12,
)


def evidence(steps: list[Step]) -> StageEvidence:
    builder = EvidenceBuilder()
    position = 0
    for count, received, sent, fingerprint, rejected in steps:
        builder.add(count, received, sent, fingerprint, position=position)
        position += max(1, count - rejected)
    return builder.finish()


def speculated(*steps: tuple[int, int]) -> StageEvidence:
    """Evidence of steps at (position, rows)."""
    builder = EvidenceBuilder()
    for position, count in steps:
        builder.add(count, bytes(32), bytes(32), bytes(8), position=position)
    return builder.finish()


@given(rows)
@settings(deadline=None, max_examples=40)
def test_evidence_built_step_by_step_is_accepted_and_proven(steps: list[Step]) -> None:
    built = evidence(steps)
    assert StageEvidence(built.steps).root == built.root
    for index, step in enumerate(built.steps):
        assert verify(built.root, step.leaf, built.tree.proof(index))
    chain = bytes(32)
    for step, (_, received, *_) in zip(built.steps, steps):
        chain = keccak256(chain + received)
        assert step.input_chain == chain


@given(rows, st.data())
@settings(deadline=None, max_examples=100)
def test_evidence_with_one_field_changed_is_refused_or_has_another_root(steps: list[Step], data: st.DataObject) -> None:
    built = evidence(steps)
    index = data.draw(st.integers(0, len(built.steps) - 1))
    step = built.steps[index]
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(step)]))
    value = getattr(step, name)
    changed = value + 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:]
    forged = (*built.steps[:index], dataclasses.replace(step, **{name: changed}), *built.steps[index + 1 :])
    try:
        root = StageEvidence(forged).root
    except ProtocolError:
        return
    assert root != built.root


def test_evidence_without_steps_is_refused() -> None:
    with pytest.raises(ProtocolError, match="at least one step"):
        EvidenceBuilder().finish()


@pytest.mark.parametrize(
    "steps",
    [
        ((1, 3),),
        ((0, 3), (4, 1)),
        ((0, 3), (0, 1)),
        ((0, 3), (3, 4), (3, 1)),
        ((0, 3), (3, 4), (8, 1)),
        ((0, 3), (3, 4), (2, 1)),
        ((0, 3), (3, 0)),
    ],
    ids=["begins late", "gap", "keeps nothing of the prompt", "keeps nothing", "keeps too much", "goes back", "empty"],
)
def test_evidence_whose_steps_do_not_follow_one_another_is_refused(steps: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ProtocolError, match="has position"):
        speculated(*steps)


def test_kept_rows_follow_from_positions_and_the_number_of_tokens() -> None:
    assert commitments.kept_rows(speculated((0, 5)), 5, 1, 8) == (5,)
    built = speculated((0, 5), (5, 1), (6, 4), (8, 3))
    for tokens, last in ((5, 1), (6, 2), (7, 3)):
        assert commitments.kept_rows(built, 5, tokens, 8) == (5, 1, 2, last)


@pytest.mark.parametrize(
    ("steps", "prompt", "tokens", "maximum", "message"),
    [
        (((0, 5),), 5, 2, 8, "6 of the 5 rows of step 0"),
        (((0, 5),), 4, 1, 8, "the prompt 4"),
        (((0, 5), (4, 1)), 5, 2, 8, "4 of the 5 rows of step 0"),
        (((0, 5), (5, 3)), 5, 1, 8, "2 steps for 1 answer tokens"),
        (((0, 5), (5, 3)), 5, 5, 8, "4 of the 3 rows of step 1"),
        (((0, 5), (5, 3)), 5, 9, 8, "of which 8 are paid"),
        (((0, 5), (5, 4), (6, 1)), 5, 2, 8, "3 steps for 2"),
        (((0, 5), (5, 18)), 5, 3, 99, "at most 17"),
        (((0, 5), (5, 4)), 5, 3, 4, "behind the 4 tokens that are paid"),
    ],
)
def test_kept_rows_of_steps_that_are_no_answer_are_refused(
    steps: tuple[tuple[int, int], ...], prompt: int, tokens: int, maximum: int, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        commitments.kept_rows(speculated(*steps), prompt, tokens, maximum)


def test_step_digest_covers_position_and_rows_behind_the_prompt() -> None:
    assert commitments.step_digest(b"abc", 0, 7) == commitments.content_digest(b"abc")
    digests = {commitments.step_digest(b"abc", position, rows) for position in (0, 1, 2) for rows in (1, 2)}
    assert len(digests) == 5


def test_token_ids_are_read_back_and_no_part_of_one() -> None:
    assert commitments.token_ids(commitments.token_bytes([1, 2**31, 7])) == (1, 2**31, 7)
    with pytest.raises(ProtocolError, match="5 bytes"):
        commitments.token_ids(b"12345")


def test_token_bytes_are_little_endian_int32() -> None:
    assert commitments.token_bytes([1, 256, 2**31 - 1]) == b"\1\0\0\0\0\1\0\0\xff\xff\xff\x7f"
    assert commitments.content_digest(b"abc") == hashlib.sha256(b"abc").digest()


def test_identifiers_depend_on_every_part() -> None:
    a, b = address("0x" + "11" * 20), address("0x" + "22" * 20)
    model = model_id(b"\1" * 32, b"\2" * 32, 3)
    plans = {
        plan_id(1, a, b, model, 1),
        plan_id(2, a, b, model, 1),
        plan_id(1, b, a, model, 1),
        plan_id(1, a, b, model, 2),
    }
    requests = {request_id(1, a, b, 1), request_id(2, a, b, 1), request_id(1, b, a, 1), request_id(1, a, b, 2)}
    assert len(plans | requests) == 8
    assert model == abi_hash(["bytes32", "bytes32", "uint32"], [b"\1" * 32, b"\2" * 32, 3])


@given(st.integers(0, 3), st.integers(0, 31), digests, digests, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_stage_commitment_binds_round_stage_and_node(
    round_: int, stage: int, root: bytes, sealed: bytes, tokens: int
) -> None:
    request, a, b = RequestId(b"\3" * 32), address("0x" + "11" * 20), address("0x" + "22" * 20)
    made = {
        commitments.stage_commitment(request, round_, stage, a, root, sealed, tokens),
        commitments.stage_commitment(request, round_, stage, b, root, sealed, tokens),
        commitments.stage_commitment(request, round_ + 1, stage, a, root, sealed, tokens),
        commitments.stage_commitment(request, round_, stage + 1, a, root, sealed, tokens),
        commitments.stage_commitment(RequestId(b"\4" * 32), round_, stage, a, root, sealed, tokens),
    }
    assert len(made) == 5


def test_seats_over_many_draws_are_proportional_to_stake() -> None:
    """Chi-square over 4,000 draws: each node's seats against seats · stake / total; and splitting stake changes
    nothing.
    """
    stakes = {address(bytes([n]) * 20): stake for n, stake in ((1, 10), (2, 20), (3, 30), (4, 40), (5, 100))}
    split = [address(bytes([0x50 + n]) * 20) for n in range(10)]
    total, seats, draws = sum(stakes.values()), 1, 4_000
    counts, split_seats = dict.fromkeys(stakes, 0), 0
    for number in range(draws):
        seed = keccak256(number.to_bytes(8))
        for node, stake in stakes.items():
            counts[node] += commitments.is_seated(seed, 1, 0, node, stake, total, seats)
        split_seats += sum(commitments.is_seated(seed, 1, 0, node, 10, total, seats) for node in split)
    for node, stake in stakes.items():
        expected = draws * stake / total
        assert chisquare([counts[node], draws - counts[node]], [expected, draws - expected]).pvalue > 1e-3
    spread = (draws * 10 * (10 / total) * (1 - 10 / total)) ** 0.5
    assert abs(split_seats - draws * 100 / total) < 4 * spread


def test_seats_double_with_each_round_and_never_exceed_certainty() -> None:
    node = address("0x" + "11" * 20)
    seeds = [keccak256(n.to_bytes(8)) for n in range(2_000)]
    shares = [sum(commitments.is_seated(s, r, 0, node, 5, 100, 2) for s in seeds) / 2_000 for r in (1, 2, 3)]
    assert [abs(share - expected) < 0.04 for share, expected in zip(shares, (0.1, 0.2, 0.4))] == [True] * 3
    assert all(commitments.is_seated(seed, 1, 0, node, 100, 100, 5) for seed in seeds)
    assert not any(commitments.is_seated(seed, 1, 0, node, 0, 100, 5) for seed in seeds)
    assert not commitments.is_seated(seeds[0], 1, 0, node, 5, 0, 5)


def test_sampling_hits_its_rate() -> None:
    seeds = [keccak256(n.to_bytes(8)) for n in range(5_000)]
    hits = sum(commitments.is_sampled(seed, 1_000) for seed in seeds)
    assert chisquare([hits, 5_000 - hits], [500, 4_500]).pvalue > 1e-3
    assert all(commitments.is_sampled(seed, 10_000) for seed in seeds[:50])
    assert not any(commitments.is_sampled(seed, 0) for seed in seeds[:50])
