"""Tabs without a chain: the sum tree, the shares and the draw, for any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol.commitments import secret_hash
from bsns.protocol.identifiers import ProtocolError, abi_hash, address
from bsns.protocol.merkle import MerkleTree
from bsns.protocol.plan import Assignment
from bsns.protocol.tabs import (
    BatchStatus,
    CollectedBatch,
    CollectedTicket,
    PostedState,
    RouteStage,
    Segment,
    SignedTicket,
    StageResult,
    SumTree,
    Ticket,
    drawn_tokens,
    due_calls,
    shares_of,
    stage_result_digest,
)
from bsns.protocol.typed_data import tabs_domain
from bsns.v1 import tabs_pb2

DOMAIN = tabs_domain(31337, address("0x" + "ab" * 20))
SIGNERS = [KeySigner(bytes([number + 1]) * 32) for number in range(4)]
REQUESTER = SIGNERS[3]
WEIGHTS = st.lists(st.integers(1, 10**12), min_size=3, max_size=3)
HASHES = st.binary(min_size=32, max_size=32)


def ticket(number: int, prompt: int = 3) -> SignedTicket:
    made = Ticket(b"\1" * 32, address(REQUESTER.address), number, b"\2" * 32, b"\3" * 32, prompt, 50, 10**9)
    return SignedTicket(made, REQUESTER.sign_digest(made.request_id(DOMAIN)))


def served(number: int, tokens: int, weights: list[int]) -> CollectedTicket:
    results = tuple(
        StageResult(
            RouteStage(Assignment(stage, 0, stage, stage + 1, address(SIGNERS[stage].address), weight, bytes(32)), ()),
            bytes([stage]) * 32,
            tokens,
            b"",
        )
        for stage, weight in enumerate(weights)
    )
    return CollectedTicket(ticket(number), results)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=40), st.data())
def test_way_of_any_leaf_leads_to_the_root_and_tells_its_place(tokens: list[int], data: st.DataObject) -> None:
    leaves = [(bytes([index]) * 32, count) for index, count in enumerate(tokens)]
    tree = SumTree(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    # As RequestTabs._requirePlace has it.
    node, mine, count, first, place = leaves[index][0], leaves[index][1], 1, 0, 0
    types = ["bytes32", "uint256", "uint256"] * 2
    for step in tree.path(index):
        if step.is_left:
            node = abi_hash(types, [step.hash, step.tokens, step.leaves, node, mine, count])
            first, place = first + step.tokens, place + step.leaves
        else:
            node = abi_hash(types, [node, mine, count, step.hash, step.tokens, step.leaves])
        mine, count = mine + step.tokens, count + step.leaves
    assert node == tree.root
    assert (first, place, mine, count) == (sum(tokens[:index]), index, sum(tokens), len(tokens))


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.lists(st.integers(1, 10**12), min_size=3, max_size=3)), min_size=1, max_size=8
    ),
    st.integers(0, 10**15),
    st.integers(0, 5_000),
)
def test_shares_add_up_and_are_by_work(batch: list[tuple[int, list[int]]], fee: int, protocol_bps: int) -> None:
    tickets = [served(number, tokens, weights) for number, (tokens, weights) in enumerate(batch)]
    shares = shares_of(tickets, fee, protocol_bps)
    pot = sum(item.tokens for item in tickets) * fee
    assert sum(amount for _, amount in shares) == pot - pot * protocol_bps // 10_000
    assert [node for node, _ in shares] == sorted(node for node, _ in shares)
    for node, amount in shares:
        stage = [signer.address for signer in SIGNERS].index(node)
        fair = sum(
            item.tokens * fee * weights[stage] / sum(weights) for item, (_, weights) in zip(tickets, batch, strict=True)
        ) * (1 - protocol_bps / 10_000)
        assert amount == pytest.approx(fair, rel=1e-9, abs=len(shares) + 1)


@given(
    st.lists(st.integers(1, 1_000), min_size=1, max_size=6), st.integers(100, 400), st.binary(min_size=32, max_size=32)
)
def test_draws_lie_in_the_segment_that_the_entropy_names(tokens: list[int], each: int, entropy: bytes) -> None:
    segments = [
        Segment(address(SIGNERS[0].address), 0, 1, count, 0, bytes([number]) * 32)
        for number, count in enumerate(tokens)
    ]
    drawn = drawn_tokens(b"\4" * 32, segments, entropy, {}, each)
    other = drawn_tokens(b"\4" * 32, segments, entropy, {bytes([0]) * 32: b"\5" * 32}, each)
    assert len(drawn) == -(-sum(tokens) // each)
    for one, two in zip(drawn, other, strict=True):
        # A secret moves a draw inside its own segment and nowhere else.
        assert 0 <= one < sum(tokens)
        assert (one < tokens[0]) == (two < tokens[0])
        assert one == two or one < tokens[0]


def test_secret_moves_the_draws_of_its_segment() -> None:
    segment = Segment(address(SIGNERS[0].address), 0, 1, 1_000, 0, b"\6" * 32)
    without = drawn_tokens(b"\4" * 32, [segment], b"\7" * 32, {}, 100)
    drawn = drawn_tokens(b"\4" * 32, [segment], b"\7" * 32, {b"\6" * 32: b"\5" * 32}, 100)
    assert len(drawn) == len(without) == 10
    assert sum(one != two for one, two in zip(drawn, without, strict=True)) > 5


def test_batch_with_a_ticket_out_of_place_is_none() -> None:
    requester = address(REQUESTER.address)
    tickets = (served(0, 4, [1, 1, 1]), served(1, 5, [1, 1, 1]))
    segment = Segment(requester, 0, 2, 15, 100, b"\6" * 32)
    batch = CollectedBatch(b"\1" * 32, requester, 7, 10**9, (segment,), shares_of(tickets, 7, 0), tickets)
    assert (batch.tokens, batch.pot, batch.first_tokens) == (15, 105, (0, 7))
    assert [batch.leaf_at(token) for token in (0, 6, 7, 14)] == [0, 0, 1, 1]
    again = CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(batch.to_message().SerializeToString()))
    assert again == batch
    assert again.batch_id(DOMAIN) == batch.batch_id(DOMAIN)
    for wrong in (
        Segment(requester, 1, 2, 15, 100, b"\6" * 32),
        Segment(requester, 0, 1, 15, 100, b"\6" * 32),
        Segment(requester, 0, 2, 16, 100, b"\6" * 32),
        Segment(address(SIGNERS[0].address), 0, 2, 15, 100, b"\6" * 32),
    ):
        with pytest.raises(ProtocolError):
            CollectedBatch(b"\1" * 32, requester, 7, 10**9, (wrong,), batch.shares, tickets)
    with pytest.raises(ProtocolError, match="not among"):
        batch.leaf_at(15)


def test_batch_whose_ticket_lapses_before_it_must_be_posted_is_refused() -> None:
    requester = address(REQUESTER.address)
    plan = [Assignment(0, 0, 0, 1, address(SIGNERS[0].address), 1, bytes(32))]
    tree = MerkleTree([item.leaf for item in plan])
    item = ticket(0)
    digest = stage_result_digest(DOMAIN, item.ticket.request_id(DOMAIN), 0, b"\7" * 32, 4)
    result = StageResult(RouteStage(plan[0], tree.proof(0)), b"\7" * 32, 4, SIGNERS[0].sign_digest(digest))
    collected = (CollectedTicket(item, (result,)),)
    segment = Segment(requester, 0, 1, 7, 49, b"\6" * 32)
    for deadline in (10**9, 10**9 + 1):
        batch = CollectedBatch(b"\1" * 32, requester, 7, deadline, (segment,), shares_of(collected, 7, 100), collected)
        if deadline == item.ticket.deadline:
            batch.check(DOMAIN, tree.root, 100)
            continue
        with pytest.raises(ProtocolError, match="may lapse"):
            batch.check(DOMAIN, tree.root, 100)
    with pytest.raises(ProtocolError, match="shares"):
        replace(batch, deadline=10**9).check(DOMAIN, tree.root, 5_000)


def test_what_is_due_of_a_batch_follows_from_its_state_and_the_time() -> None:
    requester = address(REQUESTER.address)
    tickets = (served(0, 4, [1, 1, 1]), served(1, 5, [1, 1, 1]))
    segment = Segment(requester, 0, 2, 15, 100, secret_hash(b"\5" * 32))
    batch = CollectedBatch(b"\1" * 32, requester, 7, 10**9, (segment,), shares_of(tickets, 7, 0), tickets)
    posted = PostedState(BatchStatus.POSTED, 50, 200, 300, 0, ())
    drawn = PostedState(BatchStatus.DRAWN, 50, 200, 400, 0b101, (1, 2, 9))

    def due(state: PostedState, now: int, *, head: int = 60, shown: bool = False, patience: int = 0) -> list[str]:
        secrets = {secret_hash(b"\5" * 32): b"\5" * 32} if shown else {}
        calls = due_calls(
            batch, DOMAIN, state, secrets, now=now, head_number=head, opening_window=100, patience=patience
        )
        return [call.key for call in calls]

    assert due(posted, 100) == [], "a secret is awaited"
    assert due(posted, 100, shown=True) == ["draw/50"]
    assert due(posted, 100, shown=True, head=49) == [], "the entropy block is not there"
    assert due(posted, 201) == ["draw/50"], "the wait is over"
    assert due(posted, 201, patience=60) == due(posted, 100, shown=True, patience=60) == []
    assert due(posted, 261, patience=60) == ["draw/50"]
    assert due(posted, 301) == ["voidBatch"]
    assert due(posted, 301, patience=60) == []
    assert due(drawn, 320) == ["openLeaf/0", "openLeaf/1"], "the second draw is served"
    assert due(drawn, 320, patience=60) == []
    assert due(drawn, 361, patience=60) == ["openLeaf/0", "openLeaf/1"]
    assert due(drawn, 401) == ["voidBatch"]
    assert due(replace(drawn, pending=0), 320) == []
    assert due(replace(drawn, pending=0), 401) == ["settle"]
    for over in (BatchStatus.SETTLED, BatchStatus.VOID, BatchStatus.ABSENT):
        assert due(replace(drawn, status=over), 401) == []


def test_digests_are_those_of_eip_712_libraries() -> None:
    signed = ticket(5)
    fields = [
        ("bytes32", "planId"), ("address", "requester"), ("uint64", "number"), ("bytes32", "inputCommitment"),
        ("bytes32", "secretHash"), ("uint32", "promptTokens"), ("uint32", "maximumTokens"), ("uint64", "deadline"),
    ]  # fmt: skip
    message = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"}, {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"}, {"name": "verifyingContract", "type": "address"},
            ],
            "Ticket": [{"name": name, "type": kind} for kind, name in fields],
        },
        "primaryType": "Ticket",
        "domain": {
            "name": DOMAIN.name, "version": "1", "chainId": 31337, "verifyingContract": DOMAIN.verifying_contract,
        },
        "message": {name: value for (_, name), value in zip(fields, signed.ticket.as_tuple(), strict=True)},
    }  # fmt: skip
    theirs = Account.sign_typed_data(b"\4" * 32, full_message=message)
    assert bytes(theirs.message_hash) == signed.ticket.request_id(DOMAIN)
    assert signed.check(DOMAIN) == signed.ticket.request_id(DOMAIN)
    with pytest.raises(ProtocolError, match="not signed"):
        SignedTicket(signed.ticket, ticket(6).signature).check(DOMAIN)
