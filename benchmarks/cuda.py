"""A stage on a GPU: tokens per second against transformers on the same GPU, and how far honest executions lie apart.

Needs a GPU that torch can use. `speed`: random weights in the shape of two models, both engines with the same ones and
in turns. `spread`: SmolLM2 in 3 stages, executed in every honest way and by cheats, as `benchmarks.sketch_separation`
does it on a CPU. Writes benchmarks/results/cuda.json.

    python -m benchmarks.cuda [--only speed|spread] [--folder MODEL_FOLDER] [--quick]
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import verification_cheats
from benchmarks.inference_statistics import middle, ratio
from benchmarks.result import Figure, print_table, write_result
from benchmarks.sketch_separation import (
    LENGTHS,
    LONG_PROMPT,
    LONG_PROMPT_TOKENS,
    Comparison,
    Figures,
    by_name,
    honest_logits,
)
from benchmarks.verification_cheats import (
    Cheat,
    half_product,
    in_bfloat16,
    integer_rows,
    one_row_changed,
    percent_noise,
)
from benchmarks.verification_traces import (
    CUTS,
    PROMPTS,
    ChangedWeights,
    Execute,
    Recording,
    answer,
    in_one_pass,
    step_by_step,
)
from bsns.protocol.sketch import TOLERANCES, SketchTolerance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, StageSession
from bsns.runtime.prepare import ImportedDecoder, prepare, write_decoder
from bsns.runtime.weight_store import WeightStore

DEVICE = "cuda"
ARITHMETICS = ("float32", "bfloat16")
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
BATCHES = (1, 8, 32, 128)
PAST, STEPS, PROMPT_ROWS = 128, 32, 512
# Without the kernels a batch of 128 takes seconds for a token.
LARGEST_PLAIN_BATCH = 32
SEEDS = 4
SHORT_PROMPTS = {"float32": 4, "bfloat16": 2}


# ---------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Ours:
    """The whole model as one stage. Logits of every step come to the CPU, as a node needs them."""

    stage: StageExecutor

    def prompt(self, tokens: Tensor) -> None:
        self.stage.forward(self.stage.new_session(len(tokens)), tokens, position=0)

    def decoding(self, tokens: Tensor) -> Callable[[], None]:
        """`tokens` [sessions, PAST + STEPS]: a function that runs the steps behind the past, again at each call."""
        sessions: list[StageSession] = [self.stage.new_session(PAST + STEPS) for _ in tokens]
        for session, row in zip(sessions, tokens, strict=True):
            self.stage.forward(session, row[:PAST], position=0)

        def run() -> None:
            for step in range(PAST, PAST + STEPS):
                outputs = self.stage.forward_batch(
                    [
                        BatchStep(session, row[step : step + 1], step)
                        for session, row in zip(sessions, tokens, strict=True)
                    ]
                )
                assert all(isinstance(item, Tensor) for item in outputs), outputs
            for session in sessions:
                session.truncate(PAST)

        return run


@dataclass(frozen=True)
class Theirs:
    """transformers' own model with its own cache. Logits stay on the GPU; each step is waited for, as drawing needs."""

    model: Any

    def prompt(self, tokens: Tensor) -> None:
        with torch.inference_mode():
            self.model(tokens[None].to(DEVICE), use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()

    def decoding(self, tokens: Tensor) -> Callable[[], None]:
        there = tokens.to(DEVICE)
        with torch.inference_mode():
            cache = self.model(there[:, :PAST], use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            with torch.inference_mode():
                for step in range(PAST, PAST + STEPS):
                    self.model(there[:, step : step + 1], past_key_values=cache, use_cache=True)
                    torch.cuda.synchronize()
                cache.crop(-STEPS)

        return run


def seconds(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def in_turns(sides: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each side in each round, after one that does not count; the order turns around every time."""
    taken: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for number in range(rounds):
        order = range(len(sides))
        for place in order if number % 2 == 0 else reversed(order):
            taken[place].append(seconds(sides[place]))
    return taken


def speed_of(shape: str, rounds: int, batches: Sequence[int]) -> list[Figure]:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    figures: list[Figure] = []
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, attn_implementation="sdpa")
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as name:
        weights = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
        manifest = write_decoder(
            "random", ImportedDecoder(config.to_dict(), weights, "{}", ""), Path(name), lambda _: None
        )
        del weights
        for arithmetic in ARITHMETICS:
            stage = StageExecutor(WeightStore(Path(name)), 0, len(manifest.units), device=DEVICE, arithmetic=arithmetic)
            ours, theirs = Ours(stage), Theirs(model.to(getattr(torch, arithmetic)))
            sides = f"{shape}, {arithmetic}"
            generator = torch.Generator().manual_seed(1)
            for batch in batches:
                tokens = torch.randint(0, config.vocab_size, (batch, PAST + STEPS), generator=generator)
                runs = [ours.decoding(tokens), theirs.decoding(tokens)]
                figures += rates(f"{sides}: decode, {batch} sessions", batch * STEPS, in_turns(runs, rounds))
                progress(figures[-3:])
                if arithmetic == "float32" and batch <= LARGEST_PLAIN_BATCH:
                    figures += plain_rates(stage, f"{sides}: decode, {batch} sessions", batch, runs[0], rounds)
                    progress(figures[-2:])
                del runs
            tokens = torch.randint(0, config.vocab_size, (PROMPT_ROWS,), generator=generator)
            prompts = in_turns([partial(side.prompt, tokens) for side in (ours, theirs)], rounds)
            figures += rates(f"{sides}: prompt of {PROMPT_ROWS}", PROMPT_ROWS, prompts)
            progress(figures[-3:])
            del stage, ours
            torch.cuda.empty_cache()
    return figures


def rates(name: str, tokens: int, taken: list[list[float]]) -> list[Figure]:
    ours, theirs = ([tokens / item for item in side] for side in taken)
    return [
        middle(name, ours, "tokens/s"),
        middle(f"{name}, transformers", theirs, "tokens/s"),
        ratio(f"{name} / transformers", ours, theirs),
    ]


def plain_rates(stage: StageExecutor, name: str, batch: int, run: Callable[[], None], rounds: int) -> list[Figure]:
    """What decoding is without recorded steps, and without the kernels that serve all sessions at once."""
    found = []
    for without, changed in (
        ("recorded steps", {"_graphs": None}),
        ("recorded steps and kernels", {"_graphs": None, "_kernels": False}),
    ):
        with mock.patch.multiple(stage, **changed):
            (taken,) = in_turns([run], max(1, rounds // 2))
        found.append(middle(f"{name}, without {without}", [batch * STEPS / item for item in taken], "tokens/s"))
    return found


# --------------------------------------------------------------------------------------------------------------- spread


def tf32_product(x: Tensor, weight: Tensor) -> Tensor:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return x @ weight.t()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


CHEATS = {
    "int8 weights, per row": Cheat(integer_rows(8)),
    "int4 weights, groups of 32": Cheat(integer_rows(4, 32)),
    "one block skipped": Cheat(skips_one=True),
    "weights + 0.1 % noise": Cheat(percent_noise(0.1)),
}
# Fewer bits than float32 has; of bfloat16 the same or more, which is no gain.
HALF_THE_BITS = {
    "TF32 products": Cheat(product=tf32_product),
    "fp16 products": Cheat(product=half_product),
    "bf16 weights": Cheat(in_bfloat16),
    "one block with bf16 weights": Cheat(in_bfloat16, one_block=True),
    "bf16 arithmetic": Cheat(arithmetic="bfloat16"),
}
NOT_OF_THE_CLASS = "the CPU's class"


def ways(folder: Path, number: int, arithmetic: str, recordings: Sequence[Recording]) -> Iterator[tuple[str, Execute]]:
    """Every way in which a stage is executed again; `recordings` are of decoding token by token, alone, recorded."""
    bounds = CUTS[number], CUTS[number + 1]

    def stage(**options: Any) -> StageExecutor:
        return StageExecutor(ChangedWeights(folder), *bounds, arithmetic=arithmetic, **{"device": DEVICE, **options})

    here = stage()
    yield "honest: one pass", in_one_pass(here)
    yield "honest: pieces of 32", in_one_pass(here, 32)
    yield "honest: pieces of 7", in_one_pass(here, 7)
    rows = torch.cat([step.inputs for recording in recordings for step in recording.steps])
    for others in (2, 8, 32, 100):
        yield f"honest: decode beside {others} sessions", step_by_step(here, others, rows)
    here._graphs = None
    yield "honest: decode, not recorded", step_by_step(here)
    yield "honest: decode beside 200 sessions, not recorded", step_by_step(here, 200, rows)
    here._kernels = False
    yield "honest: decode, torch's attention", step_by_step(here)
    eager = stage(attention="eager")
    yield "honest: eager, one pass", in_one_pass(eager)
    yield "honest: eager, decode", step_by_step(eager)
    yield "cheat: one prompt row changed", one_row_changed(here)
    cpu = stage(device="cpu")
    yield f"{NOT_OF_THE_CLASS}, one pass", in_one_pass(cpu)
    yield f"{NOT_OF_THE_CLASS}, decode", step_by_step(cpu)
    cheats = CHEATS | (HALF_THE_BITS if arithmetic == "float32" else {})
    for name, cheat in cheats.items():
        with mock.patch.object(verification_cheats, "StageExecutor", partial(StageExecutor, device=DEVICE)):
            made = cheat.stage(folder, bounds, arithmetic)
        yield f"cheat: {name}", in_one_pass(made)


def spread_of(folder: Path, arithmetic: str, units: Sequence[float], seeds: int = SEEDS) -> dict[float, Figures]:
    """Distances from decoding token by token on the GPU, for each unit of the sketch."""
    tokenizer = ChatTokenizer(folder)
    stages = [
        StageExecutor(WeightStore(folder), first, end, device=DEVICE, arithmetic=arithmetic)
        for first, end in pairwise(CUTS)
    ]
    asked = [(prompt, max(LENGTHS)) for prompt in PROMPTS[: SHORT_PROMPTS[arithmetic]]]
    asked.append((LONG_PROMPT, LONG_PROMPT_TOKENS))
    answers = [answer(stages, [tokenizer.prompt_token_ids(prompt)], tokens)[0] for prompt, tokens in asked]
    figures: dict[float, Figures] = {unit: defaultdict(lambda: defaultdict(list)) for unit in units}
    for number in range(len(stages)):
        recordings = [recording[number] for recording in answers]
        comparison = Comparison(figures, number, recordings, seeds)
        for name, execute in ways(folder, number, arithmetic, recordings):
            comparison.add(name, [execute(recording) for recording in recordings])
            print(f"{arithmetic}, stage {number + 1}: {name}", file=sys.stderr, flush=True)
    return figures


def spread_figures(figures: Figures, arithmetic: str, tolerance: SketchTolerance) -> list[Figure]:
    """Honest distances by their largest, cheats' by their smallest, against the tolerance."""
    found = []
    for kind, radius in (("sketch", tolerance.honest_radius), ("fingerprint", tolerance.fingerprint_radius)):
        for name, row in sorted(by_name(figures).items()):
            values = row[kind]
            honest, cheat = name.startswith("honest"), name.startswith("cheat: ")
            goal = f"<= {radius}" if honest else f"> {7 * radius}" if cheat and arithmetic == "float32" else None
            found.append(
                Figure(
                    f"{arithmetic}: {kind}, {name}", min(values) if cheat else max(values), "distance",
                    min(values), max(values), len(values), goal, "smallest" if cheat else "largest",
                )
            )  # fmt: skip
    logits, errors = (
        honest_logits(figures),
        [value for name, row in by_name(figures).items() if name.startswith("honest") for value in row["relative"]],
    )
    for what, values, limit in (
        ("difference of a logit", logits, f"<= {tolerance.logit_tolerance:g}"),
        ("relative difference of a row", errors, None),
    ):
        found.append(
            Figure(f"{arithmetic}: honest, {what}", max(values), "", min(values), max(values), len(values), limit)
        )
    return found


def tolerance_for(arithmetic: str) -> SketchTolerance:
    return TOLERANCES[f"torch-cuda/{arithmetic}/sdpa"]


def progress(figures: Sequence[Figure]) -> None:
    for item in figures:
        print(f"{item.name}: {item.value:.4g} {item.unit}", file=sys.stderr, flush=True)


def seed_line() -> str:
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}; weights and tokens "
        f"from seeds 0 and 1, past of {PAST} tokens, {STEPS} steps a sample; spread: {SEEDS} sketch seeds"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "spread"), help="one section; printed only")
    parser.add_argument("--folder", type=Path, help="a prepared SmolLM2 (default: the embedded one)")
    parser.add_argument("--quick", action="store_true", help="two rounds and batches; printed only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"error: this benchmark needs a GPU, and torch {torch.__version__} sees none: install torch built for CUDA "
            "(`pip install torch` from https://download.pytorch.org/whl/) on a machine with an NVIDIA driver",
            file=sys.stderr,
        )
        return 1
    figures: list[Figure] = []
    if options.only != "spread":
        for shape in SHAPES:
            figures += speed_of(shape, 2 if options.quick else 5, BATCHES[::2] if options.quick else BATCHES)
    if options.only != "speed":
        folder = options.folder or prepare()
        for arithmetic in ARITHMETICS:
            tolerance = tolerance_for(arithmetic)
            found = spread_of(folder, arithmetic, [tolerance.unit], 1 if options.quick else SEEDS)
            figures += spread_figures(found[tolerance.unit], arithmetic, tolerance)
    met = print_table(figures)
    if not (options.only or options.quick):
        write_result("cuda", seed_line(), figures)
    return 0 if met else 2


if __name__ == "__main__":
    raise SystemExit(main())
