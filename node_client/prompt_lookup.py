"""Prompt lookup: the last stage's drafts of tokens that may follow, taken from the text itself.

Owns the answer as the last stage draws it. Text repeats itself: names, phrases, code, what the prompt says and the
answer quotes. After each step the last few tokens are looked up in the text so far; what followed them the last time is
drafted, and the next step computes those rows together with the newest token's (prompt lookup decoding, Saxena 2023).
Promises that the tokens are those of drawing one at a time from the same logits, whatever is drafted; that a draft
never lies beyond the answer's last token; and that a step costs the same however long the text is. Drafts less where
drafts were rejected, and nothing where nothing matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bsns.protocol.commitments import MAXIMUM_DRAFTS, SPARE_DRAFTS
from bsns.protocol.sampling import SamplingParameters, draw_accepted

# The longest that matches wins. One token alone says too little: see docs/performance.md.
NGRAM_SIZES: Final = (3, 2)
# How many tokens are drafted at first. All of them right: twice as many the next time; all wrong: half as many.
_FIRST_DRAFTS: Final = 2
# Where even a single draft was wrong, drafting rests for so many tokens.
_REST_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one step gave: the answer's next `tokens`, and `drafts` of those that may follow."""

    tokens: tuple[int, ...]
    drafts: tuple[int, ...]


class NgramIndex:
    """A text that grows, and where each of its n-grams was last followed by something."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._followed: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in NGRAM_SIZES}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens`; each n-gram that one of them follows is remembered with its place."""
        text = self._text
        for token in tokens:
            for size, places in self._followed.items():
                if len(text) >= size:
                    places[tuple(text[-size:])] = len(text)
            text.append(token)

    def continuation(self, count: int) -> tuple[int, ...]:
        """`count` tokens that followed the longest n-gram at the end of the text the last time; empty if none did.
        Where they reach the end of the text, they go on with themselves.
        """
        for size, places in self._followed.items():
            place = places.get(tuple(self._text[-size:]))
            if place is not None:
                found = self._text[place : place + count]
                period = len(self._text) - place
                while len(found) < count:
                    found.append(found[len(found) - period])
                return tuple(found)
        return ()


class SpeculatedAnswer:
    """One answer at the last stage: what was drawn of it, and the drafts that the next step computes."""

    def __init__(self, sampling: SamplingParameters, end_tokens: Sequence[int], prompt: Sequence[int] = ()) -> None:
        """`prompt` is looked up too, if it is known."""
        self.drafts: tuple[int, ...] = ()
        self._sampling, self._end_tokens = sampling, frozenset(end_tokens)
        self._count, self._rejected = 0, 0
        self._length, self._rests_until = _FIRST_DRAFTS, 0
        self._index = NgramIndex()
        # Of the text what is not in the index yet: it is taken up in the compute thread, and only where it is needed.
        self._unread = list(prompt)

    @property
    def count(self) -> int:
        """Tokens drawn so far."""
        return self._count

    def take(self, logits: npt.NDArray[np.float32], most_drafts: int) -> Drawn:
        """Draw from the logits of a step, float32 [1 + drafts, vocabulary], and draft at most `most_drafts` tokens for
        the next. SamplingError for logits that cannot be drawn from; nothing is drawn then.
        """
        tokens = draw_accepted(logits, self._sampling, self._count, self.drafts, self._end_tokens)
        self._count += len(tokens)
        self._unread += tokens
        if self.drafts:
            self._adapt(len(self.drafts), len(tokens) - 1)
        most = min(
            self._length,
            most_drafts,
            # The token behind the last draft is drawn from the last draft's row.
            self._sampling.maximum_tokens - self._count - 1,
            # The other stages take no more.
            self._count + SPARE_DRAFTS - self._rejected,
        )
        self.drafts = ()
        if most > 0 and tokens[-1] not in self._end_tokens and self._count >= self._rests_until:
            self._index.extend(self._unread)
            self._unread.clear()
            self.drafts = self._index.continuation(most)
        return Drawn(tokens, self.drafts)

    def adopt(self, drawn: Drawn) -> None:
        """Go on behind what another node drew and drafted."""
        self._count += len(drawn.tokens)
        self._unread += drawn.tokens
        if self.drafts:
            self._adapt(len(self.drafts), len(drawn.tokens) - 1)
        self.drafts = drawn.drafts

    def _adapt(self, drafted: int, accepted: int) -> None:
        self._rejected += drafted - accepted
        if accepted == drafted:
            self._length = min(MAXIMUM_DRAFTS, 2 * max(self._length, drafted))
        elif accepted:
            self._length = accepted
        else:
            self._length = max(1, drafted // 2)
            if drafted == 1:
                self._rests_until = self._count + _REST_TOKENS
