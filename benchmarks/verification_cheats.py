"""What dishonest nodes do instead of executing their stage: fewer bits, other weights, left out work, other rows.

Used by `benchmarks.sketch_separation` and `benchmarks.verification`. A `Cheat` departs from the declared execution
class in its weights, its arithmetic or its blocks; the other cheats change what goes in, what comes out, or what the
attention sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.verification_traces import ChangedWeights, Execute, Outputs, Recording, arrays
from bsns.runtime import decoder_blocks, decoder_executor
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import StepInput, reexecute
from bsns.runtime.ragged_attention import RaggedBatch


class UndeclaredProduct:
    """Stands where a packed matrix does, and multiplies by `product` of inputs and weight."""

    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.out_features, self.in_features = weight.shape
        self.memory_bytes = weight.nbytes
        self._weight, self._product = weight, product

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight)


@dataclass(frozen=True)
class Cheat:
    """How a dishonest node's stage departs from the declared class: its weights, the executor's arithmetic, or another
    arithmetic altogether; in all of its blocks and the head, or in the middle block only.
    """

    change: Callable[[Tensor], Tensor] = lambda weight: weight
    arithmetic: str | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    one_block: bool = False
    skips_one: bool = False

    def stage(self, folder: Path, bounds: tuple[int, int], declared: str) -> StageExecutor:
        """The dishonest node's stage of the units of `bounds`."""
        first, end = bounds
        if not (self.one_block or self.skips_one):
            return self._built(folder, first, end, declared)
        executor = StageExecutor(ChangedWeights(folder), first, end, arithmetic=declared)
        middle = len(executor._blocks) // 2
        if self.skips_one:
            del executor._blocks[middle]
        else:
            unit = first + middle + int(executor.has_embedding)
            executor._blocks[middle] = self._built(folder, unit, unit + 1, declared)._blocks[0]
        return executor

    def _built(self, folder: Path, first: int, end: int, declared: str) -> StageExecutor:
        with ExitStack() as patches:
            if (product := self.product) is not None:
                for module in (decoder_blocks, decoder_executor):
                    made = mock.patch.object(module, "pack", lambda weight, *_: UndeclaredProduct(weight, product))
                    patches.enter_context(made)
            return StageExecutor(
                ChangedWeights(folder, self.change), first, end, arithmetic=self.arithmetic or declared
            )


# ---------------------------------------------------------------------------------------------- weights and arithmetic


def integer_rows(bits: int, group: int | None = None) -> Callable[[Tensor], Tensor]:
    """Weights in `bits` bits, with a scale for each row or for each `group` of a row."""
    largest = 2 ** (bits - 1) - 1

    def change(weight: Tensor) -> Tensor:
        grouped = weight.reshape(-1, group or weight.shape[1])
        scale = grouped.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / largest
        return (torch.round(grouped / scale).clamp(-largest, largest) * scale).view_as(weight)

    return change


def nf4(weight: Tensor) -> Tensor:
    """Sixteen levels by the quantiles of a normal distribution, a scale for each 64 (QLoRA, arXiv 2305.14314)."""
    levels = torch.tensor(
        [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
         0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    )  # fmt: skip
    grouped = weight.reshape(-1, 64)
    scale = grouped.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    nearest = torch.bucketize(grouped / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).view_as(weight)


def percent_noise(percent: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(weight.shape[0])
        return weight + percent / 100 * weight.std() * torch.randn(weight.shape, generator=generator)

    return change


def other_weights(weight: Tensor) -> Tensor:
    """Weights of the same shape, mean and spread that nobody trained."""
    generator = torch.Generator().manual_seed(weight.numel())
    return weight.mean() + weight.std() * torch.randn(weight.shape, generator=generator)


def in_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.half() @ weight.half().t()).float()


def eight_bit_inputs(x: Tensor, weight: Tensor) -> Tensor:
    return integer_rows(8)(x) @ weight.t()


def llm_int8(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs in 8 bits a row, but for the channels in which some row exceeds 6 (LLM.int8(), arXiv 2208.07339)."""
    large = (x.abs() > 6).any(dim=0)
    return integer_rows(8)(x.masked_fill(large, 0.0)) @ weight.t() + x[:, large] @ weight[:, large].t()


# -------------------------------------------------------------------------------------------- inputs, state and outputs


def one_row_changed(stage: StageExecutor) -> Execute:
    """One pass with a row in the middle of the prompt exchanged for its neighbour (the first stage: another token)."""
    return lambda recording: arrays(reexecute(stage, with_one_row_changed(recording.steps)))


def with_one_row_changed(steps: Sequence[StepInput]) -> list[StepInput]:
    """The steps with a row in the middle of the first exchanged for its neighbour (of tokens: the next id)."""
    first = steps[0].inputs.clone()
    middle = len(first) // 2
    first[middle] = first[middle] + 1 if first.ndim == 1 else first[middle - 1]
    return [StepInput(0, first), *steps[1:]]


def last_step_only(cheat: Execute) -> Execute:
    """A node that cheats in the last step and was honest before."""
    return lambda recording: [*recording.outputs[:-1], cheat(recording)[-1]]


@contextmanager
def truncated_cache(window: int) -> Iterator[None]:
    """Attention sees the newest `window` positions and nothing older, as if the rest of the KV cache had been freed."""
    whole = RaggedBatch._mask

    def mask(batch: RaggedBatch, segment: Any, group: int) -> Tensor:
        visible = whole(batch, segment, group)
        place = torch.arange(visible.shape[1])
        newest = segment.position + torch.arange(segment.rows).repeat_interleave(group)
        return visible & (place[None, :] > newest[:, None] - window)

    with mock.patch.object(RaggedBatch, "_mask", mask):
        yield


def with_truncated_cache(stage: StageExecutor, window: int) -> Execute:
    """One pass in which every row sees at most the `window` newest positions."""

    def execute(recording: Recording) -> Outputs:
        with truncated_cache(window):
            return arrays(reexecute(stage, recording.steps))

    return execute


def replayed(other: Recording) -> Execute:
    """Outputs of another request, from the beginning as often as it takes to fill every step."""

    def execute(recording: Recording) -> Outputs:
        rows = np.concatenate(other.outputs)
        outputs, taken = [], 0
        for own in recording.outputs:
            outputs.append(np.take(rows, range(taken, taken + len(own)), axis=0, mode="wrap"))
            taken += len(own)
        return outputs

    return execute


def random_outputs(seed: int) -> Execute:
    """Rows of noise, as long as the true ones."""
    return lambda recording: [noise.astype(np.float32) for noise in _noise_like(recording.outputs, seed)]


def perturbed(relative: float, seed: int) -> Execute:
    """The true rows with noise of `relative` times their length (the last stage: of their centred length)."""

    def execute(recording: Recording) -> Outputs:
        noises = _noise_like(recording.outputs, seed)
        return [
            (own + relative * noise).astype(np.float32) for own, noise in zip(recording.outputs, noises, strict=True)
        ]

    return execute


def _noise_like(outputs: Outputs, seed: int) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    generator = np.random.default_rng(seed)
    for own in outputs:
        noise = generator.standard_normal(own.shape)
        noise -= noise.mean(axis=1, keepdims=True)
        length = np.linalg.norm(own - own.mean(axis=1, keepdims=True), axis=1, keepdims=True)
        yield noise * length / np.linalg.norm(noise, axis=1, keepdims=True)


# ----------------------------------------------------------------------------------------------- by declared arithmetic

INT8_ROWS = "int8 weights, per row"
# More bits than a class declares: nobody gains by that, so it has no goal.
MORE_BITS = frozenset({"cheat: float32 arithmetic", "cheat: bf16 arithmetic in place of int8"})
FEWER_BITS: dict[str, Cheat] = {
    "int4 weights, per row": Cheat(integer_rows(4)),
    "int4 weights, groups of 32": Cheat(integer_rows(4, 32)),
    "nf4 weights": Cheat(nf4),
    "LLM.int8() arithmetic": Cheat(integer_rows(8), "float32", llm_int8),
    "8-bit weights and inputs, per row": Cheat(integer_rows(8), "float32", eight_bit_inputs),
    "one block skipped": Cheat(skips_one=True),
    "weights + 1 % noise": Cheat(percent_noise(1)),
    "weights + 0.1 % noise": Cheat(percent_noise(0.1)),
    "one block with int4 weights, groups of 32": Cheat(integer_rows(4, 32), one_block=True),
}
CHEATS: dict[str, dict[str, Cheat]] = {
    "float32": {
        INT8_ROWS: Cheat(integer_rows(8)),
        "int8 arithmetic": Cheat(arithmetic="int8"),
        "bf16 weights": Cheat(in_bfloat16),
        "bf16 arithmetic": Cheat(arithmetic="bfloat16"),
        "fp16 arithmetic": Cheat(product=half_product),
        "one block with bf16 weights": Cheat(in_bfloat16, one_block=True),
        **FEWER_BITS,
    },
    "bfloat16": {
        INT8_ROWS: Cheat(integer_rows(8)),
        "int8 arithmetic": Cheat(arithmetic="int8"),
        "one block in int8 arithmetic": Cheat(arithmetic="int8", one_block=True),
        "float32 arithmetic": Cheat(arithmetic="float32"),
        **FEWER_BITS,
    },
    "int8": {
        "bf16 arithmetic in place of int8": Cheat(arithmetic="bfloat16"),
        "float32 arithmetic": Cheat(arithmetic="float32"),
        "one block with 8-bit weights and inputs": Cheat(integer_rows(8), "float32", eight_bit_inputs, one_block=True),
        **FEWER_BITS,
    },
}
