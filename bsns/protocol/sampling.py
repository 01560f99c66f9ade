"""Sampling: from one row of logits to one token, the same on every machine and checkable by anyone.

Owns `SamplingParameters`, their digest (which a request commits to), the draw and the verifier's test of a draw.
Promises that a draw depends on nothing but logits, parameters and step number. Does not run a model and keeps no state.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bsns.protocol.identifiers import keccak256

FloatRow = npt.NDArray[np.float32]

_MILLION: Final = 1_000_000
_TYPE_HASH: Final = keccak256(
    b"SamplingParameters(uint32 temperatureMillionths,uint32 topK,uint32 topPMillionths,"
    b"uint64 seed,uint32 maximumTokens)"
)


class SamplingError(ValueError):
    """Sampling parameters or logits cannot be used. The message names the field and its range."""


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How tokens are drawn. Temperature and `top_p` are rounded to millionths, so that both sides compute with equal
    numbers.

    `temperature` 0 is greedy (0 to 10). `top_k` 0 keeps all tokens. `top_p` in (0, 1], 1 keeps all. `seed` is uint64.
    Stop strings are not here: only the requester sees text, and it ends the session (`bsns.requester.chat_tokenizer`).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    maximum_tokens: int = 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise SamplingError(f"temperature is {self.temperature}, expected 0 (greedy) to 10")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise SamplingError(f"top_p is {self.top_p}, expected more than 0 and at most 1 (1 keeps every token)")
        for field, limit in (("top_k", 2**31), ("seed", 2**64), ("maximum_tokens", 2**31)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
                raise SamplingError(f"{field} is {value!r}, expected an integer from 0 to {limit - 1}")
        if self.maximum_tokens < 1:
            raise SamplingError("maximum_tokens is 0; ask for at least one token")
        object.__setattr__(self, "temperature", round(self.temperature * _MILLION) / _MILLION)
        object.__setattr__(self, "top_p", max(1, round(self.top_p * _MILLION)) / _MILLION)

    @property
    def is_greedy(self) -> bool:
        """True where the draw is the most likely token."""
        return self.temperature == 0

    def digest(self) -> bytes:
        """EIP-712 `hashStruct` of the parameters (temperature and top_p in millionths), 32 bytes."""
        temperature, top_p = round(self.temperature * _MILLION), round(self.top_p * _MILLION)
        words = (temperature, self.top_k, top_p, self.seed, self.maximum_tokens)
        return keccak256(_TYPE_HASH + b"".join(word.to_bytes(32, "big") for word in words))


def uniform(seed: int, step: int) -> float:
    """The step's uniform number in [0, 1): the top 53 bits of sha256(seed ‖ step), both as 8 bytes big-endian."""
    digest = hashlib.sha256(seed.to_bytes(8, "big") + step.to_bytes(8, "big")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / float(1 << 53)


def draw(logits: FloatRow, parameters: SamplingParameters, step: int) -> int:
    """Draws a token id from `logits` float32 [vocabulary].

    Greedy: the largest logit, the lowest id among equals. Otherwise a float64 softmax over the `top_k` largest, cut to
    the smallest prefix with mass `top_p` (nucleus sampling, Holtzman et al. 2020), then the inverse of the cumulative
    mass over tokens in order of descending probability and ascending id. Raises `SamplingError` for logits that are not
    finite.
    """
    row = _checked_row(logits)
    if parameters.is_greedy:
        return int(np.argmax(row))
    order, mass = _ordered_mass(row, parameters.temperature, _top_k_threshold(row, parameters.top_k))
    if 0 < parameters.top_k < order.size:
        order, mass = order[: parameters.top_k], mass[: parameters.top_k]
    cumulative = np.cumsum(mass)
    kept = (
        int(np.searchsorted(cumulative, parameters.top_p * cumulative[-1])) + 1 if parameters.top_p < 1 else order.size
    )
    kept = min(kept, order.size)
    target = uniform(parameters.seed, step) * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative[:kept], target, side="right")), kept - 1)])


def draw_accepted(
    logits: FloatRow,
    parameters: SamplingParameters,
    first: int,
    drafts: Sequence[int],
    end_tokens: Collection[int] = (),
) -> tuple[int, ...]:
    """The answer's tokens from number `first` on that one pass over a token and the `drafts` behind it gives.

    `logits` is float32 [1 + drafts, vocabulary]. Row i is drawn from as long as each draw before it was the draft from
    which its row was computed, so the tokens are those of drawing one at a time from the same logits, greedy or not.
    Ends with an end token and with the last token of `parameters`. Raises `SamplingError` as `draw` does.
    """
    if logits.ndim != 2 or len(logits) != 1 + len(drafts):
        raise SamplingError(f"logits have shape {logits.shape}, expected a row for a token and {len(drafts)} drafts")
    tokens: list[int] = []
    for row, draft in zip(logits[: parameters.maximum_tokens - first], (*drafts, None)):
        tokens.append(draw(row, parameters, first + len(tokens)))
        if tokens[-1] != draft or draft in end_tokens:
            break
    return tuple(tokens)


def is_consistent_draw(
    logits: FloatRow, parameters: SamplingParameters, step: int, token: int, tolerance: float
) -> bool:
    """Whether logits that differ from `logits` by at most `tolerance` each (absolute) can make `token` the draw of this
    step.

    Never false for an honest draw within the tolerance. Errs on the side of true by no more than the mass that the
    tolerance can move: a token's place in the order, the edges of `top_k` and `top_p`, and every boundary of the
    cumulative mass.
    """
    if tolerance < 0 or not math.isfinite(tolerance):
        raise SamplingError(f"tolerance is {tolerance}, expected a finite number of at least 0")
    row = _checked_row(logits)
    if not 0 <= token < row.size:
        return False
    own = float(row[token])
    if parameters.is_greedy:
        return own >= float(row.max()) - 2 * tolerance
    threshold = _top_k_threshold(row, parameters.top_k)
    if own < threshold - 2 * tolerance:
        return False
    order, mass = _ordered_mass(row, parameters.temperature, threshold - 2 * tolerance)
    values = row[order].astype(np.float64)
    # One logit within the tolerance scales its mass by at most this factor either way; the last term is float64
    # rounding.
    factor = math.exp(min(tolerance / parameters.temperature, 700.0)) * (1 + 1e-12)
    cumulative = np.cumsum(mass)
    surely_kept = order.size if parameters.top_k == 0 else min(parameters.top_k, order.size)
    # Sets compatible with the tolerance hold between `smallest` and `largest` tokens of this order.
    largest_total, smallest_total = float(cumulative[-1]) * factor, float(cumulative[surely_kept - 1]) / factor
    if parameters.top_p < 1:
        largest = min(int(np.searchsorted(cumulative / factor, parameters.top_p * largest_total)) + 1, order.size)
        smallest = min(int(np.searchsorted(cumulative * factor, parameters.top_p * smallest_total)) + 1, surely_kept)
    else:
        largest, smallest = order.size, surely_kept
    if own < values[largest - 1] - 2 * tolerance:
        return False
    own_mass = float(mass[int(np.flatnonzero(order == token)[0])])
    surely_before = float(mass[values > own + 2 * tolerance].sum())
    possibly_before = float(mass[values >= own - 2 * tolerance].sum()) - own_mass
    point = uniform(parameters.seed, step)
    least = point * float(cumulative[smallest - 1]) / factor
    most = point * float(cumulative[largest - 1]) * factor
    return least <= (possibly_before + own_mass) * factor and most >= surely_before / factor


def _checked_row(logits: FloatRow) -> FloatRow:
    if logits.ndim != 1 or logits.size == 0:
        raise SamplingError(f"logits have shape {logits.shape}, expected one row [vocabulary]")
    if not np.isfinite(logits).all():
        raise SamplingError("logits hold NaN or infinity; the stage that made them is faulty, replay it elsewhere")
    return logits


def _top_k_threshold(row: FloatRow, top_k: int) -> float:
    if not 0 < top_k < row.size:
        return -math.inf
    return float(np.partition(row, row.size - top_k)[row.size - top_k])


def _ordered_mass(
    row: FloatRow, temperature: float, threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Token ids with a logit of at least `threshold`, by descending logit then ascending id, and their unnormalised
    mass.
    """
    candidates = np.flatnonzero(row >= threshold) if math.isfinite(threshold) else np.arange(row.size)
    order = candidates[np.argsort(-row[candidates], kind="stable")].astype(np.int64)
    values = row[order].astype(np.float64)
    return order, np.exp((values - values[0]) / temperature)
