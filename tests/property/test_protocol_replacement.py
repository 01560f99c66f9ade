"""Who may replace whom on a route: only what requester, witness and plan agree on changes it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import ProtocolError, address, keccak256
from bsns.protocol.plan import Assignment, ShardPlan
from bsns.protocol.replacement import MAXIMUM_REPLACEMENTS, StageReplacement, route_after, witness_of
from bsns.protocol.typed_data import escrow_domain

STAGES, REPLICAS = 4, 3
DOMAIN = escrow_domain(31_337, address("0x" + "ab" * 20))
REQUEST = keccak256(b"request")
REQUESTER = KeySigner(keccak256(b"requester"))
KEYS = {
    (stage, replica): KeySigner(keccak256(b"%d %d" % (stage, replica)))
    for stage in range(STAGES)
    for replica in range(REPLICAS)
}
PLAN = ShardPlan(
    2 * STAGES,
    tuple(
        Assignment(stage, replica, 2 * stage, 2 * stage + 2, KEYS[stage, replica].address, 1, bytes(32))
        for stage in range(STAGES)
        for replica in range(REPLICAS)
    ),
)
SIGNERS = {signer.address: signer for signer in KEYS.values()}
ROUTE = tuple(KEYS[stage, 0].address for stage in range(STAGES))


def replaced(route: tuple[str, ...], stage: int, replica: int) -> StageReplacement:
    """A replacement that holds on `route`."""
    assignment = PLAN.replicas(stage)[replica]
    item = StageReplacement(REQUEST, address(route[stage]), assignment, PLAN.proof(assignment))
    digest = item.digest(DOMAIN)
    witness = witness_of([address(node) for node in route], stage, item.replaced)
    assert witness is not None
    return dataclasses.replace(
        item, consent=REQUESTER.sign_digest(digest), witness=SIGNERS[witness].sign_digest(digest)
    )


def after(replacements: list[StageReplacement], route: tuple[str, ...] = ROUTE) -> tuple[str, ...]:
    return route_after(
        [address(node) for node in route],
        replacements,
        requester=REQUESTER.address,
        domain=DOMAIN,
        plan_root=PLAN.root,
    )


@given(st.lists(st.tuples(st.integers(0, STAGES - 1), st.integers(0, REPLICAS - 1)), max_size=8))
def test_replacements_in_order_put_each_stage_on_its_newest_node_and_repeating_them_changes_nothing(
    changes: list[tuple[int, int]],
) -> None:
    route: tuple[str, ...] = ROUTE
    made: list[StageReplacement] = []
    for stage, replica in changes:
        made.append(replaced(route, stage, replica))
        route = after(made)
        assert route[stage] == KEYS[stage, replica].address
    assert after(made) == route


@given(
    st.integers(0, STAGES - 1),
    st.integers(1, REPLICAS - 1),
    st.sampled_from(["consent", "witness"]),
    st.binary(min_size=65, max_size=65),
)
def test_replacement_without_both_signatures_is_refused(stage: int, replica: int, which: str, forged: bytes) -> None:
    item = replaced(ROUTE, stage, replica)
    for value in (b"", forged, item.witness if which == "consent" else item.consent):
        with pytest.raises(ProtocolError, match="not signed by"):
            after([dataclasses.replace(item, **{which: value})])


def test_replacement_that_the_plan_does_not_assign_is_refused() -> None:
    item = replaced(ROUTE, 1, 1)
    with pytest.raises(ProtocolError, match="not assigned"):
        after([dataclasses.replace(item, proof=item.proof[1:])])
    elsewhere = dataclasses.replace(item.assignment, stage=2)
    with pytest.raises(ProtocolError, match="not assigned"):
        after([dataclasses.replace(item, assignment=elsewhere, replaced=address(ROUTE[2]))])
    with pytest.raises(ProtocolError, match="no stage 4"):
        after([dataclasses.replace(item, assignment=dataclasses.replace(item.assignment, stage=4))])
    with pytest.raises(ProtocolError, match="at most 64"):
        after([item] * (MAXIMUM_REPLACEMENTS + 1))


def test_witness_is_the_nearest_node_before_that_is_another() -> None:
    a, b, c = (address(KEYS[stage, 0].address) for stage in range(3))
    assert witness_of([a, b, c], 1, b) == a
    assert witness_of([a, b, c], 0, a) == c
    assert witness_of([b, b, c], 1, b) == c
    assert witness_of([b, b], 0, b) is None
    assert witness_of([b], 0, b) is None
