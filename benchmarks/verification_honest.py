"""False slashes: distances between honest executions of the same inputs, over everything that honest nodes differ in.

Threads, pieces of a re-execution, decoding alone and in batches, oneDNN and the kernels that take its place, another
attention kernel, the instructions of an older processor, in each arithmetic that can be declared; and every cut of the
model. The reference is token-by-token decoding by one thread; its rows, as they are handed on in each encoding, are
compared with what the others compute, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.result import Figure
from benchmarks.verification_detection import ENCODINGS, WORKERS, sampling_of, texts
from benchmarks.verification_judge import Outcome, first_refused, outcome, request_seed, sketches_at
from benchmarks.verification_statistics import clopper_pearson
from benchmarks.verification_traces import (
    CUTS,
    Outputs,
    Recording,
    answer,
    honest_stages,
    honest_ways,
    on_older_processor,
)
from bsns.protocol.sketch import TOLERANCES, distance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.executor import reexecute
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_formats import ARITHMETICS

EVERY_CUT = "honest: every cut, one pass"


@dataclass(frozen=True)
class Size:
    """`cuts_*`: for the comparisons at every cut, in float32."""

    prompts: int = 4
    seeds: int = 8
    lengths: tuple[int, ...] = (1, 8, 32)
    cut_prompts: int = 2
    cut_seeds: int = 12
    arithmetics: tuple[str, ...] = ARITHMETICS
    comparisons: int = 10_000


QUICK = Size(1, 2, (1, 4), 1, 2, ("float32",), 100)


@dataclass
class Honest:
    """Distances by (arithmetic, way of executing); how often the rows of an answer, handed on in one encoding, were
    refused (True) and not.
    """

    distances: dict[tuple[str, str], list[int]] = field(default_factory=partial(defaultdict, list))
    refused: Counter[bool] = field(default_factory=Counter)

    def compare(
        self, key: tuple[str, str], reference: Outputs, others: Outputs, number: int, last: bool, place: int, size: Size
    ) -> None:
        tolerance = TOLERANCES[f"torch-cpu/{key[0]}/sdpa"]
        seeds = size.cut_seeds if number >= len(CUTS) else size.seeds
        for sample in range(seeds):
            seed = request_seed(number, "honest", place, sample)
            mine, theirs = (
                sketches_at(rows, seed, tolerance.unit, size.lengths, centred=last) for rows in (reference, others)
            )
            self.distances[key] += [distance(mine[length], theirs[length]) for length in size.lengths]
        if not last:
            self.refused.update(
                first_refused(reference, others, encoding, tolerance) is not None for encoding in ENCODINGS
            )

    def add(self, other: Honest) -> None:
        self.distances.update(other.distances)
        self.refused += other.refused


def _recordings(
    folder: Path, cuts: tuple[int, ...], arithmetic: str, prompts: int, tokens: int
) -> list[list[Recording]]:
    """Answers decoded one by one, [stage][prompt]."""
    tokenizer, stages = ChatTokenizer(folder), honest_stages(folder, cuts, arithmetic)
    answers = [
        answer(stages, [tokenizer.prompt_token_ids(text)], tokens, [sampling_of(place)])[0]
        for place, text in enumerate(texts()[:prompts])
    ]
    return [[recording[number] for recording in answers] for number in range(len(stages))]


def of_arithmetic(case: tuple[str, Size]) -> Honest:
    """All ways of executing the three stages in one arithmetic."""
    arithmetic, size = case
    torch.set_num_threads(1)
    folder, last = prepare(), len(CUTS) - 2
    recordings = _recordings(folder, CUTS, arithmetic, size.prompts, max(size.lengths))
    older = on_older_processor(arithmetic, recordings)
    found, old = Honest(), (arithmetic, "honest: one pass, instructions of an older processor")
    for number, row in enumerate(recordings):
        for place, recording in enumerate(row):
            found.compare(old, recording.outputs, older[number][place], number, number == last, place, size)
        for name, execute in honest_ways(folder, (CUTS[number], CUTS[number + 1]), arithmetic, row):
            for place, recording in enumerate(row):
                key, own = (arithmetic, name), execute(recording)
                found.compare(key, recording.outputs, own, number, number == last, place, size)
    return found


def of_every_cut(size: Size) -> Honest:
    """Each stage that begins with the model and each that ends with it, decoded and in one pass. Stages of one unit are
    run one after the other, which is what a longer stage does.
    """
    torch.set_num_threads(1)
    folder, found, key = prepare(), Honest(), ("float32", EVERY_CUT)
    units = CUTS[-1]
    stages = honest_stages(folder, tuple(range(units + 1)), "float32")
    recordings = _recordings(folder, tuple(range(units + 1)), "float32", size.cut_prompts, max(size.lengths))

    def passes(place: int, first: int) -> list[Outputs]:
        """Outputs of the units from `first` on, each on those before it, in one pass."""
        steps, given = recordings[first][place].steps, []
        for stage in stages[first:]:
            outputs: list[Tensor] = reexecute(stage, steps)
            given.append([output.numpy() for output in outputs])
            if stage is not stages[-1]:
                steps = [type(step)(step.position, output) for step, output in zip(steps, outputs, strict=True)]
        return given

    for place in range(size.cut_prompts):
        for cut, outputs in enumerate(passes(place, 0)[:-1], 1):
            reference = recordings[cut - 1][place].outputs
            found.compare(key, reference, outputs, units + cut, False, place, size)
        for cut in range(1, units):
            outputs = passes(place, cut)[-1]
            found.compare(key, recordings[-1][place].outputs, outputs, 2 * units + cut, True, place, size)
    return found


def measure(size: Size, report: Callable[[str], None]) -> Honest:
    report(f"honest: {', '.join(size.arithmetics)}, and every cut")
    honest = Honest()
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as workers:
        cuts = workers.submit(of_every_cut, size)
        for found in workers.map(of_arithmetic, [(arithmetic, size) for arithmetic in size.arithmetics]):
            honest.add(found)
        honest.add(cuts.result())
    return honest


def show(honest: Honest) -> None:
    print(f"\n{'class':10} {'way of executing':54} {'comparisons':>11} {'median':>7} {'largest':>8}   r, τ, 2τ")
    for (arithmetic, name), gaps in honest.distances.items():
        tolerance = TOLERANCES[f"torch-cpu/{arithmetic}/sdpa"]
        edges = f"{tolerance.honest_radius}, {tolerance.pay_within}, {tolerance.slash_beyond}"
        print(f"{arithmetic:10} {name[8:]:54} {len(gaps):11} {np.median(gaps):7.1f} {max(gaps):8}   {edges}")


def figures(honest: Honest, size: Size) -> list[Figure]:
    counted: Counter[Outcome] = Counter()
    beyond_radius, largest = 0, {}
    for (arithmetic, _), gaps in honest.distances.items():
        tolerance = TOLERANCES[f"torch-cpu/{arithmetic}/sdpa"]
        counted.update(outcome(gap, tolerance) for gap in gaps)
        beyond_radius += sum(gap > tolerance.honest_radius for gap in gaps)
        largest[arithmetic] = max(largest.get(arithmetic, 0), *gaps)
    total = counted.total()
    slashed = sum(count for verdict, count in counted.items() if verdict.is_slashed)
    bound = f"95 % upper bound of the share {100 * clopper_pearson(slashed, total)[1]:.3f} %"
    found = [
        Figure("honest comparisons", total, "comparisons", total, total, total, f">= {size.comparisons}"),
        Figure("honest stages slashed", slashed, "comparisons", slashed, slashed, total, "== 0", bound),
        Figure("honest stages not paid", counted[Outcome.UNPAID], "comparisons", 0, total, total, "== 0"),
        Figure("honest answers whose rows handed on are refused", honest.refused[True], "answers", 0,
               honest.refused.total(), honest.refused.total(), "== 0", "all stages but the last, in three encodings"),
        Figure("honest distances beyond r", beyond_radius, "comparisons", 0, total, total, "== 0",
               f"95 % upper bound of the share {100 * clopper_pearson(beyond_radius, total)[1]:.3f} %"),
    ]  # fmt: skip
    for arithmetic, gap in largest.items():
        radius = TOLERANCES[f"torch-cpu/{arithmetic}/sdpa"].honest_radius
        samples = sum(len(gaps) for (declared, _), gaps in honest.distances.items() if declared == arithmetic)
        found.append(
            Figure(f"largest honest distance, {arithmetic}", gap, "sketch distance", 0, gap, samples, f"<= {radius}")
        )
    return found
