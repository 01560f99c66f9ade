"""From moments of tokens and forward passes to figures: rates, hops, paired ratios. Pure functions over seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.inference_node import ForwardPass
from benchmarks.result import Figure


def decode_rate(arrivals: Sequence[float]) -> float:
    """Tokens per second of one answer, from its first token to its last: the prompt is left out."""
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def middle_rate(streams: Sequence[Sequence[float]]) -> float:
    """Tokens per second of several concurrent answers together, over the middle half of their tokens in the order of
    arrival: prompts that are still being read at the start, and streams that are left alone at the end, are left out.
    """
    arrivals = sorted(moment for stream in streams for moment in stream)
    first, last = len(arrivals) // 4, (3 * len(arrivals)) // 4
    return (last - first) / (arrivals[last] - arrivals[first])


def whole_rate(began: float, streams: Sequence[Sequence[float]]) -> float:
    """Tokens per second of several concurrent answers together, from the moment they were asked for to the last token:
    with everything.
    """
    return sum(map(len, streams)) / (max(stream[-1] for stream in streams) - began)


def hop_seconds(stages: Sequence[Sequence[ForwardPass]]) -> list[float]:
    """Time of each hop of one answer: from the end of a stage's forward pass to the beginning of the next stage's, and
    from the last stage back to the first. `stages` in route order, each with one pass a token.

    A ring's time per token is the sum of its passes and its hops, so the mean of these is (time per token - compute
    per token) / stages. ValueError if the stages did not run equally often.
    """
    if len({len(passes) for passes in stages}) != 1:
        raise ValueError(f"the stages ran {[len(passes) for passes in stages]} passes, not equally many")
    found = []
    for token, passes in enumerate(zip(*stages, strict=True)):
        found += [after.began - before.ended for before, after in pairwise(passes)]
        if token + 1 < len(stages[0]):
            found.append(stages[0][token + 1].began - passes[-1].ended)
    return found


def compute_seconds(stages: Sequence[Sequence[ForwardPass]]) -> float:
    """Median over the tokens of the time that all stages together computed for one."""
    tokens = [sum(item.ended - item.began for item in passes) for passes in zip(*stages, strict=True)]
    return statistics.median(tokens)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], goal: str | None = None, note: str = "") -> Figure:
    """Ours over theirs, of samples taken in turn: the median of the ratios of neighbours, with the extremes."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    medians = f"medians {statistics.median(ours):.4g} and {statistics.median(theirs):.4g}"
    return Figure(
        name,
        statistics.median(ratios),
        "ratio",
        min(ratios),
        max(ratios),
        len(ratios),
        goal,
        f"{medians}; {note}" if note else medians,
    )


def middle(name: str, values: Sequence[float], unit: str, goal: str | None = None, note: str = "") -> Figure:
    """The median of samples, with the extremes."""
    return Figure(name, statistics.median(values), unit, min(values), max(values), len(values), goal, note)
