"""Detection of each cheat by answer length and stage, and the smallest deviation that is detected.

The traces are those of honest stages that answer with tokens drawn at a temperature. From the same inputs each stage is
executed by an honest member (one pass) and by the cheat; both are sketched under many request seeds and judged at each
answer length. The cheats of the last stage that send other tokens than the seed's draw are judged by their draws. What
the first and the middle stage hand on is judged once more by itself, in each encoding, as if the cheat had executed
honestly besides and sketched that.
"""

from __future__ import annotations

import pickle
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import Figure
from benchmarks.verification_cheats import (
    CHEATS,
    INT8_ROWS,
    Cheat,
    in_bfloat16,
    integer_rows,
    one_row_changed,
    other_weights,
    percent_noise,
    perturbed,
    random_outputs,
    replayed,
    with_truncated_cache,
)
from benchmarks.verification_judge import (
    Outcome,
    first_departure,
    first_refused,
    outcome,
    request_seed,
    sketches_at,
)
from benchmarks.verification_statistics import shown_share
from benchmarks.verification_traces import (
    CUTS,
    PROMPTS,
    Execute,
    Outputs,
    Recording,
    Rows,
    answer,
    honest_stages,
    in_one_pass,
    rows_inside,
)
from bsns.protocol.sampling import SamplingParameters, draw, is_consistent_draw
from bsns.protocol.sketch import MAXIMUM_DISTANCE, TOLERANCES, distance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime import activation_codec
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.prepare import prepare

DECLARED = "float32"
EXECUTION_CLASS = f"torch-cpu/{DECLARED}/sdpa"
LAST_STAGE = len(CUTS) - 2
STAGE_NAMES = ("first", "middle", "last")
WORKERS = 2
SAMPLING = SamplingParameters(temperature=0.8, top_k=50, top_p=0.95, seed=1)
MORE_PROMPTS = (
    "Name three animals that live in the sea.",
    "Translate to French: the weather is nice today.",
    "What is seventeen times twenty-three? Show how you got there, step by step.",
    "Summarise the plot of Romeo and Juliet in two sentences for somebody who has never seen it.",
    "Write a haiku about snow.",
    "Which planet is the largest, and how do we know?",
    "Give me a recipe for pancakes with exact amounts, and say what can be left out.",
    "Why do leaves change colour in autumn?",
    "A train leaves at nine and arrives at noon; how long was the journey, and what if it was forty minutes late?",
    "SELECT name, count(*) FROM orders GROUP BY name; -- what does this query return?",
    "List the first ten prime numbers.",
    "Tell me what photosynthesis is, who discovered it, and why it matters to everything that breathes.",
)
# Positions that the truncated cache keeps; the shortest prompt has 37 tokens.
KV_WINDOW = 32
ENCODINGS = (TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16, TensorEncoding.BLOCKWISE_INT8)
# Noise relative to the length of a row; honest executions reach 3e-6.
PERTURBATIONS = (3e-6, 1e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 1e-3)
GOAL = ">= 99.9"


@dataclass(frozen=True)
class Grid:
    """How much is measured. `token_seeds`: for the cheats in tokens; `threshold_*`: for the perturbations."""

    prompts: int = 16
    seeds: int = 16
    token_seeds: int = 64
    lengths: tuple[int, ...] = (1, 4, 10, 32, 128)
    threshold_prompts: int = 8
    threshold_seeds: int = 4

    @property
    def tokens(self) -> int:
        return max(self.lengths)


QUICK = Grid(prompts=2, seeds=4, token_seeds=8, lengths=(1, 4, 10), threshold_prompts=2, threshold_seeds=2)

# What a cheat needs: the stage's bounds, the stage's number, and the recordings of all prompts with the place of its
# own.
Makes = Callable[[Path, int], Callable[[list[Recording], int], Execute]]


def _whole_stage(cheat: Cheat) -> Makes:
    """A cheat in weights or arithmetic, whose stage is built once for all prompts."""

    def make(folder: Path, number: int) -> Callable[[list[Recording], int], Execute]:
        execute = in_one_pass(cheat.stage(folder, (CUTS[number], CUTS[number + 1]), DECLARED))
        return lambda _recordings, _place: execute

    return make


def _honest_stage(of: Callable[[StageExecutor], Execute]) -> Makes:
    """A cheat that runs the declared stage on something else."""

    def make(folder: Path, number: int) -> Callable[[list[Recording], int], Execute]:
        execute = of(honest_stages(folder, CUTS[number : number + 2], DECLARED)[0])
        return lambda _recordings, _place: execute

    return make


def _no_stage(of: Callable[[list[Recording], int], Execute]) -> Makes:
    """A cheat that executes nothing."""
    return lambda _folder, _number: of


SKETCH_CHEATS: dict[str, Makes] = {
    INT8_ROWS: _whole_stage(Cheat(integer_rows(8))),
    "int8 arithmetic": _whole_stage(CHEATS[DECLARED]["int8 arithmetic"]),
    "int4 weights, groups of 32": _whole_stage(Cheat(integer_rows(4, 32))),
    "bf16 weights": _whole_stage(Cheat(in_bfloat16)),
    "bf16 arithmetic": _whole_stage(CHEATS[DECLARED]["bf16 arithmetic"]),
    "one block skipped": _whole_stage(Cheat(skips_one=True)),
    "another model (same shape, other weights)": _whole_stage(Cheat(other_weights)),
    "another model (weights + 1 %)": _whole_stage(Cheat(percent_noise(1))),
    "one prompt token (input row) changed": _honest_stage(one_row_changed),
    "KV cache truncated to 32 positions": _honest_stage(partial(with_truncated_cache, window=KV_WINDOW)),
    "outputs of another request": _no_stage(lambda recordings, place: replayed(recordings[place - 1])),
    "random outputs": _no_stage(lambda _recordings, place: random_outputs(place)),
}
TOKEN_CHEATS = (
    "tokens drawn with another seed",
    "the likeliest token instead of the draw",
    "one token exchanged for the next likeliest",
)


@dataclass
class Detection:
    """Verdicts by (cheat, stage, answer length), distances for the picture, and every cheat that was paid."""

    outcomes: dict[tuple[str, int, int], Counter[Outcome]] = field(default_factory=lambda: defaultdict(Counter))
    distances: dict[tuple[str, int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    misses: list[str] = field(default_factory=list)
    # By what it sketches instead of the rows inside: distances of a member that copies, from one that executes.
    copies: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    # Between members that execute in one pass and in pieces.
    inside: list[int] = field(default_factory=list)
    # By relative size: verdicts over all stages and lengths.
    perturbations: dict[float, Counter[Outcome]] = field(default_factory=dict)
    # By (cheat, encoding): whether an answer's rows were refused by a member that compares them with its own.
    handed_on: dict[tuple[str, str], Counter[bool]] = field(default_factory=lambda: defaultdict(Counter))
    # Of the cheats that reach the head: how often their own tokens already were no draws, (number, of answers).
    false_draws: dict[str, tuple[int, int]] = field(default_factory=dict)


@cache
def texts() -> tuple[str, ...]:
    return (*PROMPTS, *MORE_PROMPTS)


def sampling_of(place: int) -> SamplingParameters:
    return SamplingParameters(SAMPLING.temperature, SAMPLING.top_k, SAMPLING.top_p, seed=1_000 + place)


def record(folder: Path, grid: Grid, arithmetic: str = DECLARED) -> list[list[Recording]]:
    """Honest answers to all prompts, [stage][prompt]."""
    tokenizer = ChatTokenizer(folder)
    torch.set_num_threads(1)
    prompts = [tokenizer.prompt_token_ids(text) for text in texts()[: grid.prompts]]
    sampling = [sampling_of(place) for place in range(len(prompts))]
    answers = answer(honest_stages(folder, CUTS, arithmetic), prompts, grid.tokens, sampling)
    return [[recording[number] for recording in answers] for number in range(len(CUTS) - 1)]


def seeds_of(number: int, place: int, count: int) -> Iterator[bytes]:
    return (request_seed(number, "detection", place, sample) for sample in range(count))


@dataclass(frozen=True)
class _Job:
    """What one worker process is to do, in files that all of them share."""

    shared: Path
    grid: Grid
    number: int
    cheat: str = ""

    @property
    def centred(self) -> bool:
        return self.number == LAST_STAGE

    def load(self, name: str) -> Any:
        return pickle.loads((self.shared / f"{name}-{self.number}").read_bytes())

    def save(self, name: str, content: Any) -> None:
        (self.shared / f"{name}-{self.number}").write_bytes(pickle.dumps(content))

    def sketched(self, outputs: Outputs, place: int, seeds: int) -> list[dict[int, bytes]]:
        """The sketches of one prompt's outputs under each request seed, by answer length."""
        unit = TOLERANCES[EXECUTION_CLASS].unit
        return [
            sketches_at(outputs, seed, unit, self.grid.lengths, centred=self.centred)
            for seed in seeds_of(self.number, place, seeds)
        ]


def _judge_honestly(job: _Job) -> list[str]:
    """The member's side: its outputs and sketches of every prompt. Returns what honest executors would lose, which is
    nothing.
    """
    torch.set_num_threads(1)
    recordings: list[Recording] = job.load("recordings")
    (stage,) = honest_stages(prepare(), CUTS[job.number : job.number + 2], DECLARED)
    outputs = [in_one_pass(stage)(recording) for recording in recordings]
    job.save("inside", [rows_inside(stage, recording.steps) for recording in recordings])
    job.save("inside in pieces", [rows_inside(stage, recording.steps, chunk_rows=7) for recording in recordings])
    expected = [job.sketched(item, place, job.grid.seeds) for place, item in enumerate(outputs)]
    job.save("expected", expected)
    job.save("outputs", outputs)
    if job.centred:
        job.save("logits", [np.concatenate([rows[-1:] for rows in item]) for item in outputs])
    tolerance, wrong = TOLERANCES[EXECUTION_CLASS], []
    for place, recording in enumerate([] if job.centred else recordings):
        for encoding in ENCODINGS:
            if (step := first_refused(recording.outputs, outputs[place], encoding, tolerance)) is not None:
                wrong.append(f"honest stage {job.number}, prompt {place}: step {step} refused as {encoding.name}")
    for place, recording in enumerate(recordings[:1]):
        own = job.sketched(recording.outputs, place, job.grid.seeds)
        for length in job.grid.lengths:
            gap = max(distance(a[length], b[length]) for a, b in zip(own, expected[place], strict=True))
            if outcome(gap, tolerance) is not Outcome.PAID:
                wrong.append(f"honest stage {job.number}, {length} tokens: {gap}")
    return wrong


@dataclass
class _Judged:
    """Distances of one cheat at one stage, (prompt, seed, length, distance); at the last stage also in how many answers
    its own draws are false, and of how many; at the others, by encoding, whether its rows were refused at a length.
    """

    distances: list[tuple[int, int, int, int]] = field(default_factory=list)
    false_draws: tuple[int, int] | None = None
    handed_on: dict[str, Counter[bool]] = field(default_factory=lambda: {item.name: Counter() for item in ENCODINGS})


def _judge_cheat(job: _Job) -> _Judged:
    torch.set_num_threads(1)
    recordings: list[Recording] = job.load("recordings")
    expected: list[list[dict[int, bytes]]] = job.load("expected")
    computed: list[Outputs] = job.load("outputs")
    of = SKETCH_CHEATS[job.cheat](prepare(), job.number)
    found = _Judged()
    false, tolerance = 0, TOLERANCES[EXECUTION_CLASS]
    logits = job.load("logits") if job.centred else []
    for place, recording in enumerate(recordings):
        outputs = of(recordings, place)(recording)
        for sample, values in enumerate(job.sketched(outputs, place, job.grid.seeds)):
            gaps = ((length, distance(value, expected[place][sample][length])) for length, value in values.items())
            found.distances += [(place, sample, length, gap) for length, gap in gaps]
        for encoding in [] if job.centred else ENCODINGS:
            refused = first_refused(outputs, computed[place], encoding, tolerance)
            found.handed_on[encoding.name].update(refused is not None and refused < at for at in job.grid.lengths)
        if job.centred:
            parameters = sampling_of(place)
            departure = first_departure(
                logits[place],
                parameters,
                partial(_drawn, [rows[-1] for rows in outputs], parameters),
                tolerance.logit_tolerance,
            )
            false += departure.is_false is not None
    found.false_draws = (false, len(recordings)) if job.centred else None
    return found


def _judge_perturbations(job: _Job) -> dict[float, list[int]]:
    """Distances of honest outputs with noise, by its relative size."""
    grid = job.grid
    recordings: list[Recording] = job.load("recordings")[: grid.threshold_prompts]
    expected: list[list[dict[int, bytes]]] = job.load("expected")
    seeds = min(grid.threshold_seeds, grid.seeds)
    found: dict[float, list[int]] = defaultdict(list)
    for place, recording in enumerate(recordings):
        for relative in PERTURBATIONS:
            outputs = perturbed(relative, place)(recording)
            for sample, values in enumerate(job.sketched(outputs, place, seeds)):
                found[relative] += [distance(value, expected[place][sample][at]) for at, value in values.items()]
    return dict(found)


def _judge_copies(job: _Job) -> dict[str, list[int]]:
    """Distances in the sketch of the rows inside, by what a member that executes nothing sketches instead: the next
    stage's input in each encoding, or its own; "" those of a member that executes in pieces.
    """
    unit = TOLERANCES[EXECUTION_CLASS].unit
    recordings: list[Recording] = job.load("recordings")
    inside: list[Outputs] = job.load("inside")
    in_pieces: list[Outputs] = job.load("inside in pieces")
    found: dict[str, list[int]] = defaultdict(list)
    for place, recording in enumerate(recordings):
        tried = {"": in_pieces[place]}
        if job.number:
            tried["own input"] = [step.inputs.numpy() for step in recording.steps]
        if not job.centred:
            tried |= {f"next stage's {item.name} input": [_over_the_wire(rows, item) for rows in recording.outputs]
                      for item in ENCODINGS}  # fmt: skip
        # Twice as many as of each cheat: there are two stages of each kind, and not three.
        for sample in range(2 * job.grid.seeds):
            seed = request_seed(job.number, "inside", place, sample)
            honest, *others = (
                sketches_at(rows, seed, unit, job.grid.lengths, centred=False)
                for rows in (inside[place], *tried.values())
            )
            for name, values in zip(tried, others, strict=True):
                found[name] += [distance(value, honest[at]) for at, value in values.items()]
    return dict(found)


def _over_the_wire(rows: Rows, encoding: TensorEncoding) -> Rows:
    data = activation_codec.encode(encoding, torch.from_numpy(rows))
    decoded: Rows = activation_codec.decode(encoding, data, rows=rows.shape[0], width=rows.shape[1]).numpy()
    return decoded


def _judge_tokens(job: _Job) -> dict[tuple[str, int], Counter[Outcome]]:
    """The cheats that send other tokens than the draw, by (cheat, answer length). Answers in which no token differs are
    no cheats and are not counted.
    """
    grid, tolerance = job.grid, TOLERANCES[EXECUTION_CLASS].logit_tolerance
    found: dict[tuple[str, int], Counter[Outcome]] = defaultdict(Counter)
    for place, logits in enumerate(job.load("logits")):
        for sample in range(grid.token_seeds):
            parameters = SamplingParameters(SAMPLING.temperature, SAMPLING.top_k, SAMPLING.top_p, seed=sample)
            other = SamplingParameters(SAMPLING.temperature, SAMPLING.top_k, SAMPLING.top_p, seed=sample + 2**32)
            for name, sent in (
                (TOKEN_CHEATS[0], partial(_drawn, logits, other)),
                (TOKEN_CHEATS[1], partial(_drawn, logits, SamplingParameters())),
            ):
                departure = first_departure(logits, parameters, sent, tolerance)
                for length in grid.lengths:
                    if departure.differs is not None and departure.differs < length:
                        is_false = departure.is_false is not None and departure.is_false < length
                        found[name, length][_by_draws(is_false)] += 1
            for length in grid.lengths:
                step = random.Random(f"{place}/{sample}/{length}").randrange(length)
                row, honest = logits[step], draw(logits[step], parameters, step)
                token = next(int(item) for item in np.argsort(-row, kind="stable")[:2] if item != honest)
                is_false = not is_consistent_draw(row, parameters, step, token, tolerance)
                found[TOKEN_CHEATS[2], length][_by_draws(is_false)] += 1
    return dict(found)


def _drawn(logits: Sequence[Rows], parameters: SamplingParameters, step: int) -> int:
    return draw(logits[step], parameters, step)


def _by_draws(is_false: bool) -> Outcome:
    # The sketch of such a stage is honest; members disown theirs, which then lies far from any.
    return outcome(MAXIMUM_DISTANCE // 2 if is_false else 0, TOLERANCES[EXECUTION_CLASS])


def measure(folder: Path, grid: Grid, report: Callable[[str], None]) -> Detection:
    """All cheats on all stages, in two processes of one thread."""
    detection, tolerance = Detection(), TOLERANCES[EXECUTION_CLASS]
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(WORKERS, get_context("spawn")) as workers:
        shared = Path(name)
        report("detection: honest traces")
        for number, recordings in enumerate(record(folder, grid)):
            _Job(shared, grid, number).save("recordings", recordings)
        jobs = [_Job(shared, grid, number) for number in reversed(range(len(CUTS) - 1))]
        for wrong in workers.map(_judge_honestly, jobs):
            detection.misses += wrong
        report(f"detection: {len(SKETCH_CHEATS)} cheats at {len(jobs)} stages")
        cheats = [_Job(shared, grid, job.number, cheat) for job in jobs for cheat in SKETCH_CHEATS]
        perturbations = [workers.submit(_judge_perturbations, job) for job in jobs]
        tokens = workers.submit(_judge_tokens, jobs[0])
        copies = [workers.submit(_judge_copies, job) for job in jobs]
        for job, judged in zip(cheats, workers.map(_judge_cheat, cheats), strict=True):
            for encoding, refused in judged.handed_on.items():
                detection.handed_on[job.cheat, encoding] += refused
            for place, sample, length, gap in judged.distances:
                verdict = outcome(gap, tolerance)
                detection.outcomes[job.cheat, job.number, length][verdict] += 1
                detection.distances[job.cheat, job.number, length].append(gap)
                if not verdict.is_slashed:
                    detection.misses.append(
                        f"{job.cheat}, {STAGE_NAMES[job.number]} stage, {length} tokens, prompt {place}, "
                        f"seed {sample}: distance {gap}, {verdict.value}"
                    )
            if judged.false_draws is not None:
                detection.false_draws[job.cheat] = judged.false_draws
        for (name_, length), verdicts in tokens.result().items():
            detection.outcomes[name_, LAST_STAGE, length] += verdicts
        for future in copies:
            for copied, gaps in future.result().items():
                if copied:
                    detection.copies[copied] += gaps
                else:
                    detection.inside += gaps
        for future in perturbations:
            for relative, gaps in future.result().items():
                counted = detection.perturbations.setdefault(relative, Counter())
                counted.update(outcome(gap, tolerance) for gap in gaps)
    return detection


def show(detection: Detection, grid: Grid) -> None:
    """The tables: verdicts by cheat, stage and length; misses; the threshold."""
    print("\nslashed, of judged, by answer length (tokens); smallest distance over the lengths (2τ = 256)")
    print(f"{'cheat':44} {'stage':7}" + "".join(f"{length:>12}" for length in grid.lengths) + f"{'smallest':>10}  by")
    for name in [*SKETCH_CHEATS, *TOKEN_CHEATS]:
        for number, stage in enumerate(STAGE_NAMES):
            cells = [detection.outcomes.get((name, number, length), Counter()) for length in grid.lengths]
            if not any(cells):
                continue
            gaps = [gap for at in grid.lengths for gap in detection.distances.get((name, number, at), [])]
            means = "sketch" if gaps else "draw check"
            row = "".join(f"{sum(n for v, n in c.items() if v.is_slashed):>7}/{c.total():<4}" for c in cells)
            print(f"{name:44} {stage:7}{row}{min(gaps) if gaps else '-':>10}  {means}")
    for name, (false, answers) in detection.false_draws.items():
        print(f"{name:44} last    its own tokens are no draws in {false} of {answers} answers, besides the sketch")
    print(f"not slashed: {len(detection.misses)}")
    for miss in detection.misses:
        print(f"  {miss}")
    print("\nrows handed on that a member refuses, of judged, if the cheat had sketched an honest execution besides")
    print(f"{'cheat':44}" + "".join(f"{encoding.name:>18}" for encoding in ENCODINGS))
    for name in SKETCH_CHEATS:
        counts = [detection.handed_on[name, encoding.name] for encoding in ENCODINGS]
        print(f"{name:44}" + "".join(f"{count[True]:>12}/{count.total():<5}" for count in counts))
    print("\nrows inside a stage: distance of two members that execute, and of one that executes nothing and sketches")
    for name, gaps in {"(both execute)": detection.inside, **detection.copies}.items():
        print(f"  {name:36} {min(gaps)} to {max(gaps)}")
    print("\nnoise relative to a row's length, all stages and lengths: slashed / unpaid / paid of all")
    for relative, verdicts in sorted(detection.perturbations.items()):
        slashed, unpaid, paid = (verdicts[item] for item in (Outcome.INCORRECT, Outcome.UNPAID, Outcome.PAID))
        print(f"{relative:10.1e}  {slashed:6} / {unpaid:6} / {paid:6} of {verdicts.total()}")


def threshold(perturbations: dict[float, Counter[Outcome]], wanted: Callable[[Outcome], bool]) -> float:
    """The smallest relative noise from which on every sample, also of all larger noises, has a `wanted` verdict;
    infinite if the largest noise still has others.
    """
    smallest = float("inf")
    for relative, verdicts in sorted(perturbations.items(), reverse=True):
        if not all(wanted(verdict) for verdict in verdicts):
            break
        smallest = relative
    return smallest


def figures(detection: Detection, goal: str | None = GOAL) -> list[Figure]:
    found = []
    for name in [*SKETCH_CHEATS, *TOKEN_CHEATS]:
        verdicts: Counter[Outcome] = sum((c for (it, _, _), c in detection.outcomes.items() if it == name), Counter())
        slashed = sum(count for verdict, count in verdicts.items() if verdict.is_slashed)
        gaps = [gap for (it, _, _), values in detection.distances.items() if it == name for gap in values]
        note = f"smallest distance {min(gaps)}" if gaps else "by the draw check; only answers in which a token differs"
        if unpaid := verdicts[Outcome.UNPAID]:
            note += f"; {unpaid} more not paid"
        found.append(shown_share(f"slashed, {name}", slashed, verdicts.total(), goal, note))
    for encoding_ in ENCODINGS:
        counts = {name: detection.handed_on[name, encoding_.name] for name in SKETCH_CHEATS}
        refused, judged = (sum(of(count) for count in counts.values()) for of in (lambda it: it[True], Counter.total))
        share, passed = (
            100 * refused / judged,
            [f"{name} {it[False]} times" for name, it in counts.items() if it[False]],
        )
        # 8 bits round by 0.8 % of a row, and twice that is taken.
        wanted = None if encoding_ is TensorEncoding.BLOCKWISE_INT8 else "== 100"
        note = f"{refused} of {judged}" + (f"; taken: {', '.join(passed)}" if passed else "")
        label = f"refused, other rows handed on as {encoding_.name}"
        found.append(Figure(label, share, "% of answers", share, share, judged, wanted, note))
    tolerance = TOLERANCES[EXECUTION_CLASS]
    for copied, gaps in detection.copies.items():
        caught = sum(gap > tolerance.slash_beyond for gap in gaps)
        label = f"slashed, lazy member that sketches the {copied}"
        found.append(shown_share(label, caught, len(gaps), goal, f"smallest distance {min(gaps)}"))
    gap = max(detection.inside)
    found.append(
        Figure("largest honest distance of the rows inside", gap, "sketch distance", 0, gap, len(detection.inside),
               f"<= {tolerance.honest_radius}", "in one pass and in pieces of 7")
    )  # fmt: skip
    sizes = detection.perturbations
    samples = sum(verdicts.total() for verdicts in sizes.values())
    note = f"of {len(sizes)} sizes tried; honest executions reach 3e-6"
    for name, edge in (
        ("all are slashed", threshold(sizes, lambda verdict: verdict.is_slashed)),
        ("none is paid", threshold(sizes, lambda verdict: verdict is not Outcome.PAID)),
    ):
        label = f"relative noise from which on {name}"
        found.append(Figure(label, edge, "of a row's length", min(sizes), max(sizes), samples, None, note))
    return found
