"""The same cheats against a published check, TOPLOC (arXiv 2501.16007), on the same traces.

TOPLOC's own code (PyPI toploc 0.1.6, built by the Makefile into build/toploc) makes and checks its proofs: of the 128
largest values of the last hidden state, normalised as the head takes it, one proof of the prompt and one for every 32
tokens. Thresholds are those of its authors' experiments. Beside it our sketch of the same stage, all units but the
head. Where toploc is not there, the published figures are printed alone.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import Figure
from benchmarks.verification_cheats import INT8_ROWS, Cheat, integer_rows, one_row_changed
from benchmarks.verification_detection import sampling_of, texts
from benchmarks.verification_judge import Outcome, outcome, request_seed, sketches_at
from benchmarks.verification_traces import Execute, Outputs, answer, honest_stages, in_one_pass
from bsns.protocol.sketch import TOLERANCES, distance
from bsns.requester.chat_tokenizer import ChatTokenizer

TOPLOC = Path(__file__).parents[1] / "build" / "toploc"
CUTS = (0, 31, 32)
TOP_VALUES = 128
CHUNK_TOKENS = 32
# toploc-experiments/vllm_validate_poly.py: at least 90 of 128 exponents agree, mean and median error of the mantissas.
MOST_EXPONENT_MISMATCHES, MOST_MEAN, MOST_MEDIAN = 38, 10.0, 8.0
CHEATS: dict[str, Cheat | None] = {
    INT8_ROWS: Cheat(integer_rows(8)),
    "one prompt token changed": None,
    "int4 weights, groups of 32": Cheat(integer_rows(4, 32)),
    "one block skipped": Cheat(skips_one=True),
}
HONEST = "honest"
# peers.md §4.5 (2026-11-23, SmolLM2-135M, bf16 prover, 4 prompts of random tokens): exponent mismatches, mean, median.
PUBLISHED = (
    ("honest", "5, 1.54, 1", "passes"),
    (INT8_ROWS, "11, 3.78, 2", "passes"),
    ("one prompt token changed", "13, 5.10, 3", "passes"),
    ("int4 weights", "62, 24.8, 19.5", "caught"),
    ("one layer skipped", "50, 23.9, 21", "caught"),
)


@dataclass(frozen=True)
class Size:
    prompts: int = 8
    seeds: int = 4
    lengths: tuple[int, ...] = (1, 4, 10, 32, 128)
    arithmetics: tuple[str, ...] = ("bfloat16", "float32")


QUICK = Size(1, 2, (1, 10), ("float32",))


@dataclass
class Compared:
    """By (declared arithmetic, what the prover did, tokens): how many answers TOPLOC refuses, of how many; the worst
    mismatch, mean and median of its chunks; and verdicts on our sketch.
    """

    refused: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    worst: dict[tuple[str, str, int], tuple[int, float, float]] = field(default_factory=dict)
    ours: dict[tuple[str, str, int], Counter[Outcome]] = field(default_factory=lambda: defaultdict(Counter))


def toploc() -> Any | None:
    """The package, if the Makefile could build it."""
    if not TOPLOC.exists():
        return None
    if str(TOPLOC) not in sys.path:
        sys.path.append(str(TOPLOC))
    try:
        return importlib.import_module("toploc")
    except ImportError:
        return None


def is_refused(results: Sequence[tuple[int, float, float]]) -> bool:
    """Whether some chunk is beyond a threshold."""
    return any(
        mismatches > MOST_EXPONENT_MISMATCHES or mean > MOST_MEAN or median > MOST_MEDIAN
        for mismatches, mean, median in results
    )


def measure(folder: Path, size: Size, report: Callable[[str], None]) -> Compared | None:
    """None where toploc is not there."""
    package = toploc()
    if package is None:
        return None
    compared = Compared()
    torch.set_num_threads(1)
    tokenizer = ChatTokenizer(folder)
    prompts = [tokenizer.prompt_token_ids(text) for text in texts()[: size.prompts]]
    for arithmetic in size.arithmetics:
        report(f"published: TOPLOC with declared {arithmetic}")
        body, head = honest_stages(folder, CUTS, arithmetic)
        norm = head._norm
        assert norm is not None
        answers = answer(
            [body, head], prompts, max(size.lengths), [sampling_of(place) for place in range(len(prompts))]
        )
        check = in_one_pass(body)
        provers: dict[str, Execute] = {HONEST: lambda recording: recording.outputs}
        for name, cheat in CHEATS.items():
            stage = body if cheat is None else cheat.stage(folder, (CUTS[0], CUTS[1]), arithmetic)
            provers[name] = one_row_changed(stage) if cheat is None else in_one_pass(stage)

        for place, (recording, _) in enumerate(answers):
            honest = check(recording)
            for name, prover in provers.items():
                made = prover(recording)
                for length in size.lengths:
                    key = arithmetic, name, length
                    proofs = package.build_proofs_bytes(_states(norm, made[:length]), CHUNK_TOKENS, TOP_VALUES)
                    results = [
                        (int(item.exp_mismatches), float(item.mant_err_mean), float(item.mant_err_median))
                        for item in package.verify_proofs_bytes(
                            _states(norm, honest[:length]), proofs, CHUNK_TOKENS, TOP_VALUES
                        )
                    ]
                    compared.answers[key] += 1
                    compared.refused[key] += is_refused(results)
                    compared.worst[key] = max([*results, compared.worst.get(key, (0, 0.0, 0.0))])
                _judge_sketches(compared, (arithmetic, name), made, honest, place, size)
    return compared


def _states(norm: torch.nn.Module, outputs: Outputs) -> list[torch.Tensor]:
    """What TOPLOC looks at: the rows as the head takes them, in the precision of its proofs."""
    with torch.inference_mode():
        return [norm(torch.from_numpy(rows)).bfloat16().clone() for rows in outputs]


def _judge_sketches(
    compared: Compared, key: tuple[str, str], made: Outputs, honest: Outputs, place: int, size: Size
) -> None:
    tolerance = TOLERANCES[f"torch-cpu/{key[0]}/sdpa"]
    for sample in range(size.seeds):
        seed = request_seed(0, "published", place, sample)
        mine, theirs = (sketches_at(rows, seed, tolerance.unit, size.lengths, centred=False) for rows in (made, honest))
        for length in size.lengths:
            compared.ours[*key, length][outcome(distance(mine[length], theirs[length]), tolerance)] += 1


def show(compared: Compared | None) -> None:
    print(
        "\npublished figures (peers.md §4.5, their bf16 prover): exponent mismatches (limit 38), mean (10), median (8)"
    )
    for name, values, verdict in PUBLISHED:
        print(f"  {name:30} {values:18} {verdict}")
    if compared is None:
        print("toploc is not built here (make bench-verification tries it): only the published figures are shown")
        return
    print(
        f"\n{'declared':9} {'prover did':30} {'tokens':>6}  TOPLOC refuses   worst chunk          "
        "ours: slashed, unpaid, paid of all"
    )
    for (arithmetic, name, length), answers in compared.answers.items():
        key = arithmetic, name, length
        mismatches, mean, median = compared.worst[key]
        verdicts = compared.ours[key]
        slashed, unpaid, paid = (verdicts[item] for item in (Outcome.INCORRECT, Outcome.UNPAID, Outcome.PAID))
        print(
            f"{arithmetic:9} {name:30} {length:6}  {compared.refused[key]:5} of {answers:<5}   "
            f"{mismatches:3}, {mean:6.2f}, {median:5.1f}   {slashed:4} {unpaid:4} {paid:4} of {verdicts.total()}"
        )


def figures(compared: Compared | None) -> list[Figure]:
    if compared is None:
        return []
    found = []
    for arithmetic, name in dict.fromkeys((declared, did) for declared, did, _ in compared.answers):
        keys = [key for key in compared.answers if key[:2] == (arithmetic, name)]
        answers, refused = (sum(counts[key] for key in keys) for counts in (compared.answers, compared.refused))
        verdicts: Counter[Outcome] = sum((compared.ours[key] for key in keys), Counter())
        slashed = sum(count for verdict, count in verdicts.items() if verdict.is_slashed)
        share, ours = 100 * refused / answers, 100 * slashed / verdicts.total()
        note = f"our sketch of the same rows slashes {ours:.4g} % of {verdicts.total()}"
        values = [100 * compared.refused[key] / compared.answers[key] for key in keys]
        found.append(
            Figure(f"TOPLOC refuses, declared {arithmetic}, {name}", share, "% of answers", float(np.min(values)),
                   float(np.max(values)), answers, None, f"low and high by answer length; {note}")
        )  # fmt: skip
    return found
