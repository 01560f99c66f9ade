"""What stage 0 says of a step a second time: the same, or other drafts where both nodes that had them are gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bsns.protocol.commitments import extend_chain, step_digest, token_bytes
from bsns.protocol.sampling import SamplingParameters
from bsns.requester.execution_session import ExecutionSession, SessionError
from bsns.v1 import execution_pb2

ROWS = 5


@pytest.fixture
def session() -> ExecutionSession:
    sampling = SamplingParameters(maximum_tokens=20)
    entry = SimpleNamespace(tab=None, input=SimpleNamespace(rows=ROWS), sampling=sampling)
    anything = cast(Any, None)
    made = ExecutionSession(cast(Any, entry), [], anything, anything, anything, 0, 0)
    made._take_output(output(0, 0, 7, 8, 9))
    made._take_output(output(1, 1, 3, 4))
    return made


def output(step: int, accepted: int, *tokens: int) -> execution_pb2.StepOutput:
    return execution_pb2.StepOutput(step=step, accepted=accepted, token_ids=tokens)


def test_repeated_output_gives_no_tokens(session: ExecutionSession) -> None:
    assert session._take_output(output(1, 1, 3, 4)) == ()
    assert session._received == [7, 8, 3]


def test_newest_output_with_other_drafts_is_taken_once_both_ends_were_replaced(session: ExecutionSession) -> None:
    before = session._chain_before
    with pytest.raises(SessionError, match="two different outputs"):
        session._take_output(output(1, 1, 3))
    session._ends_are_new = True
    assert session._take_output(output(1, 1, 3)) == ()
    assert session._received == [7, 8, 3]
    assert session._chain == extend_chain(before, step_digest(token_bytes([3]), ROWS + 2, 1))
    assert session._take_output(output(2, 0, 6)) == (6,)  # none of the former drafts


@pytest.mark.parametrize("other", [output(1, 1, 5), output(1, 0, 3, 4), output(0, 0, 7), output(1, 1)])
def test_output_with_other_tokens_or_of_an_older_step_is_refused_all_the_same(
    session: ExecutionSession, other: execution_pb2.StepOutput
) -> None:
    session._ends_are_new = True
    with pytest.raises(SessionError, match="two different outputs"):
        session._take_output(other)
