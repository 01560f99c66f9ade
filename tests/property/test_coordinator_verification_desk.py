"""The desk's decisions: a pure function whose medoid is the contract's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.commitments import vote_weight
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import PlanId, RequestId
from bsns.protocol.sketch import distance
from coordinator.network_state import AttestationState, RequestState, Reveal, StageState, TallyState
from coordinator.storage import Intent
from coordinator.verification_desk import (
    VerificationRules,
    VerificationView,
    best_medoid,
    wanted_intents,
)

_RULES = VerificationRules(tolerance=96, minimum_reveals=2, committee_seats=3)
_DEADLINE = 10_000


def _reveal(sketch: bytes = bytes(32), tokens: int = 3) -> Reveal:
    return Reveal(bytes(32), sketch, tokens, bytes(32))


def _member(
    number: int, stake: int = 1, reveal: Reveal | None = None, round_: int = 1, stage: int = 0
) -> AttestationState:
    return AttestationState(round_, stage, f"node-{number}", bytes(32), stake, reveal)


def _request(**changes: Any) -> RequestState:
    values: dict[str, Any] = {
        "request_id": RequestId(bytes([1]) * 32),
        "requester": "r",
        "plan_id": PlanId(bytes(32)),
        "status": RequestStatus.COMMITTED,
        "opened_at": 0,
        "opened_block": 1,
        "deadline": _DEADLINE,
        "deposit": 1,
        "fee_per_token": 1,
        "prompt_tokens": 1,
        "maximum_tokens": 1,
        "input_commitment": bytes(32),
        "secret_hash": bytes(32),
        "stages": (StageState(0, "a", bytes(32), _reveal()), StageState(1, "b", bytes(32), _reveal())),
        **changes,
    }
    return RequestState(**values)


def _view(phase: Phase, **changes: Any) -> VerificationView:
    values: dict[str, Any] = {
        "phase": phase,
        "round": 1,
        "sampled": True,
        "entropy_block": 50,
        "secret_deadline": 100,
        "attest_deadline": 110,
        "reveal_deadline": 200,
        "challenge_deadline": 300,
        "disputed": (True, True),
        **changes,
    }
    return VerificationView(**values)


def _wanted(request: RequestState, view: VerificationView | None, now: int, head: int = 60) -> list[Intent]:
    return list(wanted_intents(request, view, _RULES, now=now, head_number=head))


@settings(max_examples=300)
@given(
    members=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([0, 3, 4, 9, 200]), st.integers(0, 2), st.booleans()), max_size=6
    ),
    total_stake=st.integers(0, 60),
)
def test_best_medoid_has_the_most_support_and_a_quorum_or_there_is_none(
    members: list[tuple[int, int, int, bool]], total_stake: int
) -> None:
    ballots = tuple(
        _member(number, stake, _reveal(bytes([coordinate]) * 32, tokens) if revealed else None)
        for number, (stake, coordinate, tokens, revealed) in enumerate(members)
    )
    revealed = [(index, item) for index, item in enumerate(ballots) if item.reveal]
    weight = {index: vote_weight(1, item.stake, total_stake, _RULES.committee_seats) for index, item in revealed}
    total = sum(weight.values())
    support = {
        index: sum(
            weight[number]
            for number, other in revealed
            if other.reveal
            and item.reveal
            and other.reveal.output_tokens == item.reveal.output_tokens
            and distance(other.reveal.sketch, item.reveal.sketch) <= _RULES.tolerance
        )
        for index, item in revealed
    }
    quorum = {index for index, stake in support.items() if 3 * stake >= 2 * total}
    found = best_medoid(ballots, _RULES, total_stake)
    if not quorum or len(revealed) < _RULES.minimum_reveals:
        assert found is None
    else:
        assert found == min(index for index in quorum if support[index] == max(support.values()))


@pytest.mark.parametrize(("now", "head", "functions"), [(100, 60, []), (101, 49, []), (101, 50, ["drawCommittee"])])
def test_draw_is_wanted_after_the_secret_deadline_and_the_entropy_block(
    now: int, head: int, functions: list[str]
) -> None:
    intents = _wanted(_request(), _view(Phase.AWAITING_DRAW), now, head)
    assert [item.function for item in intents] == functions


def test_draw_after_a_renewal_of_the_entropy_is_another_intent() -> None:
    [first] = _wanted(_request(), _view(Phase.AWAITING_DRAW), 101)
    [second] = _wanted(_request(), _view(Phase.AWAITING_DRAW, entropy_block=55), 101)
    assert first.key != second.key
    assert first.arguments == (bytes([1]) * 32, bytes(32))


def test_tally_with_all_reveals_in_names_the_medoid_before_the_deadline() -> None:
    odd = _reveal(bytes([77]) * 32)
    request = _request(attestations=(_member(0, 1, odd), _member(1, 3, _reveal()), _member(2, 3, _reveal())))
    intents = _wanted(request, _view(Phase.REVEALING, disputed=(True, False)), 150)
    assert [(item.function, item.arguments[1:]) for item in intents] == [("tally", (0, 1))]


def test_tally_with_a_reveal_missing_waits_for_the_deadline() -> None:
    members = (_member(0, 1, _reveal()), _member(1, 1, _reveal()), _member(2, 1))
    request, view = _request(attestations=members), _view(Phase.REVEALING, disputed=(True, False))
    assert _wanted(request, view, 200) == []
    assert [item.function for item in _wanted(request, view, 201)] == ["tally"]


def test_tally_without_a_quorum_is_the_other_function_under_the_same_key() -> None:
    members = (_member(0, 1, _reveal()), _member(1, 1, _reveal(bytes([99]) * 32)))
    view = _view(Phase.REVEALING, disputed=(True, False))
    [split] = _wanted(_request(attestations=members), view, 201)
    assert (split.function, split.arguments[1:]) == ("tallyWithoutQuorum", (0,))
    [whole] = _wanted(_request(attestations=(members[0], _member(1, 1, _reveal()))), view, 201)
    assert (whole.function, whole.key) == ("tally", split.key)


def test_tally_of_a_withheld_stage_or_an_unsampled_request_needs_no_medoid() -> None:
    withheld = _request(stages=(StageState(0, "a", bytes(32)),))
    assert _wanted(withheld, _view(Phase.REVEALING, disputed=(True,)), 200) == []
    [intent] = _wanted(withheld, _view(Phase.REVEALING, disputed=(True,)), 201)
    assert (intent.function, intent.arguments[1:]) == ("tally", (0, 0))
    unsampled = _wanted(_request(), _view(Phase.REVEALING, sampled=False, disputed=()), 150)
    assert [item.arguments[1:] for item in unsampled] == [(0, 0), (1, 0)]


def test_tally_of_a_stage_already_tallied_in_this_round_is_not_wanted_again() -> None:
    done = TallyState(1, 0, 1, "n", 1, 1, 0)
    intents = _wanted(_request(tallies=(done,)), _view(Phase.REVEALING, sampled=False, disputed=()), 150)
    assert [item.arguments[1:] for item in intents] == [(1, 0)]
    # A new round begins anew.
    members = (_member(0, 1, _reveal(), round_=2), _member(1, 1, _reveal(), round_=2))
    again = _request(tallies=(done,), attestations=members)
    [intent] = _wanted(again, _view(Phase.REVEALING, round=2, disputed=(True, False)), 150)
    assert intent.key.endswith("/2/0")


@pytest.mark.parametrize(("now", "functions"), [(300, []), (301, ["settle"])])
def test_settlement_is_wanted_after_the_challenge_deadline(now: int, functions: list[str]) -> None:
    request = _request(status=RequestStatus.VERIFIED)
    assert [item.function for item in _wanted(request, _view(Phase.CHALLENGEABLE), now)] == functions


@pytest.mark.parametrize("status", list(RequestStatus))
def test_refund_is_wanted_after_the_deadline_unless_the_request_is_finished(status: RequestStatus) -> None:
    intents = _wanted(_request(status=status), _view(Phase.REVEALING), _DEADLINE + 1)
    assert [item.function for item in intents] == ([] if status.is_finished else ["claimRefund"])


@given(
    now=st.integers(0, 2 * _DEADLINE),
    phase=st.sampled_from(Phase),
    status=st.sampled_from(RequestStatus),
    concluded=st.booleans(),
)
def test_equal_views_want_equal_intents_with_distinct_keys(
    now: int, phase: Phase, status: RequestStatus, concluded: bool
) -> None:
    request = dataclasses.replace(_request(status=status), concluded=concluded)
    first, second = (_wanted(request, _view(phase), now) for _ in range(2))
    assert first == second
    assert len({item.key for item in first}) == len(first)
    if status.is_finished or concluded:
        assert first == []
