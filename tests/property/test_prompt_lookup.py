"""Prompt lookup: whatever is drafted, the answer is that of drawing one token at a time from the same logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.commitments import MAXIMUM_DRAFTS, SPARE_DRAFTS
from bsns.protocol.sampling import SamplingError, SamplingParameters, draw, draw_accepted
from node_client.prompt_lookup import NGRAM_SIZES, NgramIndex, SpeculatedAnswer

VOCABULARY = 7
END = 6
Logits = npt.NDArray[np.float32]
Model = Callable[[Sequence[int]], Logits]


def model(memory: int, salt: int) -> Model:
    """Logits that are a function of the last `memory` tokens: with few of them the text soon repeats itself."""

    def logits(text: Sequence[int]) -> Logits:
        seen = bytes([salt, *text[-memory:]])
        values = np.frombuffer(hashlib.sha256(seen).digest(), np.uint8)[:VOCABULARY].astype(np.float32) / 16
        values[END] -= 8  # seldom
        return values

    return logits


def plain(logits: Model, prompt: Sequence[int], sampling: SamplingParameters) -> list[int]:
    answer: list[int] = []
    while len(answer) < sampling.maximum_tokens and not (answer and answer[-1] == END):
        answer.append(draw(logits([*prompt, *answer]), sampling, len(answer)))
    return answer


def rows(logits: Model, text: Sequence[int], drafts: Sequence[int]) -> Logits:
    """One pass over the newest token and the drafts behind it: a row for each."""
    return np.stack([logits([*text, *drafts[:count]]) for count in range(len(drafts) + 1)])


models = st.builds(model, st.integers(1, 3), st.integers(0, 255))
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
parameters = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**64 - 1),
    maximum_tokens=st.integers(1, 40),
)


@given(models, prompts, parameters, st.integers(0, MAXIMUM_DRAFTS), st.booleans())
@settings(max_examples=150, deadline=None)
def test_answer_with_looked_up_drafts_is_the_plain_answer(
    logits: Model, prompt: list[int], sampling: SamplingParameters, most: int, is_shown: bool
) -> None:
    speculated = SpeculatedAnswer(sampling, [END], prompt if is_shown else ())
    answer: list[int] = []
    passes = 0
    while len(answer) < sampling.maximum_tokens and not (answer and answer[-1] == END):
        drafts = speculated.drafts
        # A draft never lies beyond the last token that may be drawn: there is no room in the cache for its row.
        assert len(answer) + len(drafts) < max(2, sampling.maximum_tokens)
        assert len(drafts) <= most
        drawn = speculated.take(rows(logits, [*prompt, *answer], drafts), most)
        assert tuple(drawn.tokens[:-1]) == drafts[: len(drawn.tokens) - 1]
        answer += drawn.tokens
        passes += 1
    assert answer == plain(logits, prompt, sampling)
    assert speculated.count == len(answer)
    assert speculated.drafts == ()
    assert passes <= len(answer)


@given(models, prompts, parameters, st.data())
@settings(max_examples=150, deadline=None)
def test_answer_with_arbitrary_drafts_is_the_plain_answer(
    logits: Model, prompt: list[int], sampling: SamplingParameters, data: st.DataObject
) -> None:
    expected, answer = plain(logits, prompt, sampling), list[int]()
    while answer != expected:
        right = expected[len(answer) : len(answer) + data.draw(st.integers(0, 3))]
        drafts = right + data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5))
        tokens = draw_accepted(rows(logits, [*prompt, *answer], drafts), sampling, len(answer), drafts, [END])
        answer += tokens
        assert tokens
        assert answer == expected[: len(answer)]


def test_draws_of_another_number_of_rows_than_drafts_are_refused() -> None:
    with pytest.raises(SamplingError, match="2 drafts"):
        draw_accepted(np.zeros((2, VOCABULARY), np.float32), SamplingParameters(), 0, (1, 2))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, MAXIMUM_DRAFTS), st.lists(st.integers(1, 9)))
@settings(max_examples=150, deadline=None)
def test_continuation_is_what_a_search_of_the_whole_text_finds(text: list[int], count: int, pieces: list[int]) -> None:
    index = NgramIndex()
    rest = list(text)
    for piece in pieces:
        index.extend(rest[:piece])
        del rest[:piece]
    index.extend(rest)
    expected: tuple[int, ...] = ()
    for size in NGRAM_SIZES:
        places = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if places:
            followed = text[places[-1] :]
            expected = tuple((followed * (count // len(followed) + 1))[:count])
            break
    assert index.continuation(count) == expected


def certain(tokens: Sequence[int]) -> Logits:
    """Logits of which each row's draw is the token."""
    found = np.zeros((len(tokens), 100), np.float32)
    found[np.arange(len(tokens)), tokens] = 1
    return found


def drafted(answer: SpeculatedAnswer, *draws: int) -> int:
    return len(answer.take(certain(draws), MAXIMUM_DRAFTS).drafts)


def test_drafts_double_while_they_are_right_and_shrink_when_they_are_wrong() -> None:
    answer = SpeculatedAnswer(SamplingParameters(maximum_tokens=200), (), [1, 2, 3] * 9)
    lengths = [drafted(answer, 1)]
    while lengths[-1] < MAXIMUM_DRAFTS:
        follows = [1 + (answer.count + offset) % 3 for offset in range(lengths[-1] + 1)]
        lengths.append(drafted(answer, *follows))
    assert lengths == [2, 4, 8, 16]
    # Of 16 drafts three are right: the next time three, of something that was seen before.
    follows = [1 + (answer.count + offset) % 3 for offset in range(3)]
    assert drafted(answer, *follows, *[50] * 14) == 0, "nothing that ends with 50 was there before"
    text = [token for _ in range(2) for token in (60, 61, 62, 63)]
    assert [drafted(answer, token) for token in text[:6]] == [0, 0, 0, 0, 0, 3]


def test_drafts_rest_when_even_a_single_one_was_wrong_and_begin_again() -> None:
    answer = SpeculatedAnswer(SamplingParameters(maximum_tokens=200), (), [1, 2] * 9)
    assert drafted(answer, 1) == 2
    assert drafted(answer, 5, 0, 0) == 0
    assert [drafted(answer, token) for token in (1, 2)] == [0, 1]
    assert drafted(answer, 9, 0) == 0
    assert [drafted(answer, token) for token in (1, 2, 1, 2)] == [0, 0, 0, 1]


def test_drafts_that_are_never_right_end_before_the_other_stages_refuse_them() -> None:
    answer = SpeculatedAnswer(SamplingParameters(maximum_tokens=4_000), ())
    rejected = 0
    for step in range(1_500):
        # Of two tokens the one that was not drafted: whatever the text says, the draft is wrong.
        drafts = answer.drafts
        logits = certain([1 - drafts[0] if drafts else step % 2, *[99] * len(drafts)])
        drawn = answer.take(logits, MAXIMUM_DRAFTS)
        rejected += len(drafts) - (len(drawn.tokens) - 1)
        assert rejected + len(drawn.drafts) <= answer.count + SPARE_DRAFTS
    assert rejected > 0


def test_drafts_of_a_busy_node_are_none() -> None:
    answer = SpeculatedAnswer(SamplingParameters(maximum_tokens=200), (), [1, 2] * 9)
    assert answer.take(certain([1]), 0).drafts == ()
    assert len(answer.take(certain([2]), 1).drafts) == 1
