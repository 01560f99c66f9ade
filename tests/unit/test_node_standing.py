"""Reputation and accumulated evidence: what the chain's requests say about nodes, and what the routes make of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bsns.protocol import reputation
from bsns.protocol.contract_states import RequestStatus, StageVerdict
from bsns.protocol.identifiers import PlanId, RequestId
from coordinator.dispatch.node_standing import Duty, NodeStanding, NodeStandings, duties_of
from coordinator.network_state import AttestationState, RequestState, Reveal, StageState, TallyState
from coordinator.storage import ChainPlace

_TAU = 128


def _sketch(distance: int) -> bytes:
    """At `distance` (at most 4,096) from zeros."""
    return bytes(min(128, max(0, distance - 128 * place)) for place in range(32))


def _reveal(distance: int = 0, tokens: int = 4) -> Reveal:
    return Reveal(bytes(32), _sketch(distance), tokens, bytes(32))


def _request(**changes: Any) -> RequestState:
    """Two stages of nodes a and b, judged by m, n and o of whom m is the medoid."""
    members = tuple(
        AttestationState(1, stage, node, bytes(32), 1, _reveal()) for stage in (0, 1) for node in ("m", "n", "o")
    )
    values: dict[str, Any] = {
        "request_id": RequestId(bytes([1]) * 32),
        "requester": "r",
        "plan_id": PlanId(bytes(32)),
        "status": RequestStatus.SETTLED,
        "opened_at": 0,
        "opened_block": 1,
        "deadline": 10,
        "deposit": 1,
        "fee_per_token": 1,
        "prompt_tokens": 1,
        "maximum_tokens": 1,
        "input_commitment": bytes(32),
        "secret_hash": bytes(32),
        "stages": (StageState(0, "a", bytes(32), _reveal()), StageState(1, "b", bytes(32), _reveal(90))),
        "attestations": members,
        "tallies": (
            TallyState(1, 0, StageVerdict.ACCEPTED, "m", 3, 3, 0),
            TallyState(1, 1, StageVerdict.ACCEPTED, "m", 3, 3, 90),
        ),
        **changes,
    }
    return RequestState(**values)


def test_reputation_moves_as_the_paper_says_and_stays_in_its_bounds() -> None:
    value = reputation.INITIAL
    for _ in range(231):
        value = reputation.after_duty(value, True)
    assert 9.9 < value <= reputation.MAXIMUM
    for _ in range(1_000):
        value = reputation.after_duty(value, True)
    assert value == reputation.MAXIMUM
    value = reputation.INITIAL
    for _ in range(11):
        value = reputation.after_duty(value, False)
    assert value == reputation.MINIMUM
    assert abs(reputation.BREAK_EVEN_FAILURE_SHARE - 0.0427) < 1e-4


def test_duties_of_an_accepted_request_are_kept_and_carry_their_distances() -> None:
    assert list(duties_of(_request(), _TAU)) == [
        Duty("a", True, 0),
        Duty("b", True, 90),
        *(Duty(node, True, 0) for _ in range(2) for node in ("m", "n", "o")),
    ]


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        (StageVerdict.ACCEPTED, True),
        (StageVerdict.TOLERATED, False),
        (StageVerdict.REJECTED, False),
        (StageVerdict.WITHHELD, False),
    ],
)
def test_duty_of_an_executor_is_kept_if_its_last_verdict_accepts(verdict: StageVerdict, kept: bool) -> None:
    tallies = (
        TallyState(1, 0, StageVerdict.REJECTED, "m", 3, 3, 300),
        TallyState(2, 0, verdict, "m", 3, 3, 10),
        TallyState(1, 1, StageVerdict.NO_QUORUM, "m", 1, 3, 0),
    )
    duties = list(duties_of(_request(tallies=tallies, attestations=()), _TAU))
    assert duties == [Duty("a", kept)]  # no quorum says nothing about b


def test_duties_of_a_stage_that_was_replaced_are_failed_by_who_stopped() -> None:
    request = _request()
    stages = (request.stages[0], dataclasses.replace(request.stages[1], replaced=("x", "y")))
    duties = list(duties_of(dataclasses.replace(request, stages=stages), _TAU))
    assert [item for item in duties if item.node in ("x", "y")] == [Duty("x", False), Duty("y", False)]
    assert [item.kept for item in duties if item.node == "b"] == [True]


def test_duties_of_members_who_hide_deviate_or_count_other_tokens_are_failed() -> None:
    members = (
        AttestationState(1, 0, "m", bytes(32), 1, _reveal()),
        AttestationState(1, 0, "n", bytes(32), 1, None),
        AttestationState(1, 0, "o", bytes(32), 1, _reveal(_TAU + 1)),
        AttestationState(1, 0, "p", bytes(32), 1, _reveal(0, tokens=3)),
        AttestationState(1, 1, "q", bytes(32), 1, None),  # its round was cut short
    )
    tallies = (TallyState(1, 0, StageVerdict.ACCEPTED, "m", 3, 3, 0),)
    duties = list(duties_of(_request(attestations=members, tallies=tallies), _TAU))
    assert duties == [
        Duty("a", True, 0),
        Duty("m", True, 0),
        Duty("n", False),
        Duty("o", False, _TAU + 1),
        Duty("p", False),
    ]


def test_request_that_was_never_committed_blames_the_silent_stage_only() -> None:
    stages = (StageState(0, "a", bytes(32)), StageState(1, "b"))
    request = _request(status=RequestStatus.REFUNDED, stages=stages, attestations=(), tallies=())
    assert list(duties_of(request, _TAU)) == [Duty("b", False)]


def test_request_whose_requester_chose_the_nodes_and_never_came_blames_nobody() -> None:
    stages = (StageState(0, "a"), StageState(1, "b"))
    nothing = {"status": RequestStatus.REFUNDED, "stages": stages, "attestations": (), "tallies": ()}
    assert list(duties_of(_request(**nothing, routed_by_requester=True), _TAU)) == []
    # What it did do is judged as ever.
    assert list(duties_of(_request(routed_by_requester=True), _TAU)) == list(duties_of(_request(), _TAU))


def test_node_near_the_threshold_becomes_suspect_and_an_honest_one_never() -> None:
    near, honest = NodeStanding(), NodeStanding()
    for number in range(400):
        near.take(Duty("x", True, 100))
        honest.take(Duty("y", True, number % 11))
    assert near.is_suspect
    assert near.weight == 0
    assert not honest.is_suspect
    assert honest.weight == 2.0  # bounded: it is not flooded
    assert NodeStanding().weight == 1.0
    for _ in range(1_000):
        near.take(Duty("x", True, 0))
    assert near.is_suspect  # the alarm is not taken back


class _Storage:
    def __init__(self, requests: int) -> None:
        request = _request()
        self.found = [
            ((number // 3, number), dataclasses.replace(request, opened_block=number)) for number in range(requests)
        ]
        self.reads = 0

    def finished_requests(self, after: ChainPlace, limit: int) -> list[tuple[ChainPlace, RequestState]]:
        self.reads += 1
        return [item for item in self.found if item[0] > after][:limit]


async def _at_once(function: Any) -> Any:
    return function()


async def test_standings_fold_each_request_once_and_anew_after_a_rewritten_chain() -> None:
    storage = _Storage(600)
    standings = NodeStandings(storage, _at_once)  # type: ignore[arg-type]
    await standings.step(_TAU)
    assert storage.reads == 3
    once = standings.of("m").reputation
    assert once == reputation.MAXIMUM
    assert standings.of("a").reputation == pytest.approx(min(10.0, 1.01**600))
    assert standings.of("b").is_suspect
    await standings.step(_TAU)
    assert (storage.reads, standings.of("m").reputation) == (4, once)
    storage.found = storage.found[:2]
    standings.forget()
    assert standings.of("b").weight == 1.0
    await standings.step(_TAU)
    assert standings.of("a").reputation == pytest.approx(1.01**2)
    assert not standings.of("b").is_suspect
