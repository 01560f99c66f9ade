"""The part of `benchmarks.sketch_separation` about a captured vision model: one row a request.

Stages of EfficientNet-Lite0 (single units, thirds of the model, and the whole) are executed on eight pictures. From the
same input row each stage is executed honestly in several ways (two threads, oneDNN switched off, the instructions of
an older processor) and by cheats (bfloat16 arithmetic or weights, weights in 8 bit, noise on all weights or on those of
one unit, other weights, a changed pixel, noise on the smallest tensor of the row alone).

As a program it is the older processor: it executes the stages on the rows of one file and writes their outputs to
another.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bsns.protocol.sketch import StageSketch, distance, fingerprint_distance
from bsns.runtime.exported_models import EFFICIENTNET_PREPROCESSING, image_row
from bsns.runtime.prepare import prepare
from bsns.runtime.program_executor import ProgramExecutor
from bsns.runtime.weight_store import WeightStore

MODEL = "efficientnet-lite0"
EXECUTION_CLASS = "torch-cpu/float32/aten"
# No vector instructions beyond SSE: the sums of products come in another order.
OLDER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
# What may change nothing at all: a picture need not use a certain weight.
WITHOUT_GOAL = frozenset({"cheat: one weight off by a tenth"})
Rows = np.ndarray[Any, np.dtype[np.float32]]
# By stage, way of executing and tokens of the answer, which is always one.
Figures = dict[tuple[str, str, int], dict[str, list[float]]]


class LowerPrecision(TorchDispatchMode):
    """Every operator computes in `dtype` behind a float32 boundary."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def to(source: torch.dtype, target: torch.dtype) -> Callable[[Any], Any]:
            return lambda item: item.to(target) if isinstance(item, Tensor) and item.dtype == source else item

        taken = pytree.tree_map(to(torch.float32, self.dtype), (args, kwargs or {}))
        return pytree.tree_map(to(self.dtype, torch.float32), func(*taken[0], **taken[1]))


def int8_channels(weight: Tensor) -> Tensor:
    # Some channels of the trained model are zero throughout.
    scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-30) / 127
    return torch.round(weight / scale).clamp(-127, 127) * scale


def other_weights(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(weight.numel())
    return weight.mean() + weight.std() * torch.randn(weight.shape, generator=generator)


def percent_noise(percent: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(weight.numel())
        return weight + percent / 100 * weight.std() * torch.randn(weight.shape, generator=generator)

    return change


def one_weight(weight: Tensor) -> Tensor:
    """The largest weight of the tensor off by a tenth."""
    changed = weight.clone()
    changed.view(-1)[int(weight.abs().argmax())] *= 1.1
    return changed


# Names of those that change every weight tensor of the stage (biases and norms are left alone).
WEIGHT_CHEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8 weights, per channel": int8_channels,
    "bf16 weights": lambda weight: weight.bfloat16().float(),
    "weights of another seed": other_weights,
    "weights + 1 % noise": percent_noise(1),
    "weights + 0.1 % noise": percent_noise(0.1),
}


def pictures() -> list[Rows]:
    """Input rows of eight pictures: a photograph and parts of it, two drawings, noise."""
    from PIL import Image

    package = find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    samples = Path(package.origin).parent / "mpl-data" / "sample_data"
    with Image.open(samples / "grace_hopper.jpg") as photograph:
        whole = np.asarray(photograph.convert("RGB"))
    height, width = whole.shape[0] // 2, whole.shape[1] // 2
    shown = [whole, whole[:height, :width], whole[:height, width:], whole[height:, :width], whole[:, ::-1]]
    for name in ("Minduka_Present_Blue_Pack.png", "logo2.png"):
        with Image.open(samples / name) as drawing:
            shown.append(np.asarray(drawing.convert("RGB")))
    shown.append(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    return [image_row(np.ascontiguousarray(picture), EFFICIENTNET_PREPROCESSING) for picture in shown]


def forward(stage: ProgramExecutor, row: Rows) -> Rows:
    output: Rows = stage.forward(stage.new_session(1), torch.from_numpy(row.copy()), position=0).numpy()
    return output


def with_weights(stage: ProgramExecutor, changes: dict[str, Tensor], row: Rows) -> Rows:
    honest = stage._slice._parameters
    stage._slice._parameters = {**honest, **changes}
    try:
        return forward(stage, row)
    finally:
        stage._slice._parameters = honest


def pixel_changed(row: Rows) -> Rows:
    """The pixel in the middle of the picture 64 of 256 levels brighter."""
    size = EFFICIENTNET_PREPROCESSING.size
    changed = row.reshape(3, size, size).copy()
    changed[:, size // 2, size // 2] += 0.5
    return changed.reshape(1, -1)


def smallest_tensor_off(stage: ProgramExecutor, output: Rows) -> Rows | None:
    """The row with one per cent of noise on the tensor of smallest norm; None if the row is one tensor."""
    sizes = [int(np.prod(shape)) for shape in stage._given.values()]
    if len(sizes) < 2:
        return None
    pieces = np.split(output[0].copy(), np.cumsum(sizes)[:-1])
    smallest = min(pieces, key=lambda piece: float(np.linalg.norm(piece)))
    noise = np.random.default_rng(0).standard_normal(smallest.size).astype(np.float32)
    smallest += 0.01 * np.linalg.norm(smallest) / np.linalg.norm(noise) * noise
    return np.concatenate(pieces)[None]


def executions(stage: ProgramExecutor, threaded: ProgramExecutor, one_unit: set[str], row: Rows) -> dict[str, Rows]:
    """What honest and cheating nodes give for one input row, by name. `one_unit` names the weights of one unit."""
    runs = {"reference": forward(stage, row), "honest: 2 threads": forward(threaded, row)}
    with torch.backends.mkldnn.flags(enabled=False):
        runs["honest: without oneDNN"] = forward(stage, row)
    weights = {name: value for name, value in stage._slice._parameters.items() if value.ndim > 1}
    if weights:
        for name, change in WEIGHT_CHEATS.items():
            changed = {item: change(value) for item, value in weights.items()}
            runs[f"cheat: {name}"] = with_weights(stage, changed, row)
        changed = {item: percent_noise(1)(value) for item, value in weights.items() if item in one_unit}
        runs["cheat: weights of one unit + 1 % noise"] = with_weights(stage, changed, row)
        first = min(weights)
        runs["cheat: one weight off by a tenth"] = with_weights(stage, {first: one_weight(weights[first])}, row)
    with LowerPrecision(torch.bfloat16):
        runs["cheat: bf16 arithmetic"] = forward(stage, row)
    if stage.first_unit == 0:
        runs["cheat: one pixel changed"] = forward(stage, pixel_changed(row))
    if (off := smallest_tensor_off(stage, runs["reference"])) is not None:
        runs["cheat: 1 % noise on the smallest tensor"] = off
    return runs


def stages_of(count: int) -> list[tuple[int, int]]:
    """The stages that are looked at: every third unit alone, thirds of the model, the whole."""
    third = count // 3
    return [
        *((unit, unit + 1) for unit in range(1, count, 3)),
        (0, third),
        (third, 2 * third),
        (2 * third, count),
        (0, count),
    ]


def run(seeds: int, units: Sequence[float]) -> dict[float, Figures]:
    """Distances and relative errors, for each unit of the sketch."""
    store = WeightStore(prepare(MODEL))
    count = len(store.manifest.units)
    single = [ProgramExecutor(store, unit, unit + 1) for unit in range(count)]
    cuts: list[list[Rows]] = []
    for picture in pictures():
        rows = [picture]
        for stage in single:
            rows.append(forward(stage, rows[-1]))
        cuts.append(rows)
    older = _of_older_processor([[rows[first] for first, _ in stages_of(count)] for rows in cuts])
    figures: dict[float, Figures] = {unit: defaultdict(lambda: defaultdict(list)) for unit in units}
    for number, (first, end) in enumerate(stages_of(count)):
        stage, threaded = ProgramExecutor(store, first, end), ProgramExecutor(store, first, end, threads=2)
        # A unit in the middle that has weights of more than one dimension; most have.
        one_unit = set(single[(first + end) // 2]._slice.parameter_names)
        for picture, rows in enumerate(cuts):
            runs = executions(stage, threaded, one_unit, rows[first])
            reference = runs.pop("reference")
            runs["honest: instructions of an older processor"] = older[picture][number]
            for unit in units:
                for sample in range(seeds):
                    seed = random.Random(f"{picture}/{first}/{end}/{sample}").randbytes(32)
                    _compare(figures[unit], f"units [{first}, {end})", seed, unit, end == count, reference, runs)
    return figures


def _compare(
    figures: Figures, stage: str, seed: bytes, unit: float, centred: bool, reference: Rows, runs: dict[str, Rows]
) -> None:
    expected = StageSketch(seed, reference.shape[1], unit, centred=centred)
    mark = expected.add(reference)
    for name, output in runs.items():
        other = StageSketch(seed, reference.shape[1], unit, centred=centred)
        gap = fingerprint_distance(mark, other.add(output))
        entry = figures[stage, name, 1]
        entry["sketch"].append(distance(expected.value(), other.value()))
        entry["fingerprint"].append(gap)
        entry["relative"].append(float(np.linalg.norm(output - reference) / np.linalg.norm(reference)))


def _of_older_processor(inputs: list[list[Rows]]) -> list[list[Rows]]:
    """The outputs of each stage for its input, [picture][stage], in a process that may not use newer instructions."""
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **{f"{p}-{s}": row for p, rows in enumerate(inputs) for s, row in enumerate(rows)})
        command = [sys.executable, "-m", "benchmarks.sketch_separation_vision", str(given), str(taken)]
        subprocess.run(command, check=True, env={**os.environ, **OLDER_PROCESSOR})
        with np.load(taken) as outputs:
            return [[outputs[f"{p}-{s}"] for s in range(len(rows))] for p, rows in enumerate(inputs)]


def main() -> None:
    store = WeightStore(prepare(MODEL))
    stages = [ProgramExecutor(store, first, end) for first, end in stages_of(len(store.manifest.units))]
    with np.load(sys.argv[1]) as inputs:
        np.savez(sys.argv[2], **{key: forward(stages[int(key.split("-")[1])], inputs[key]) for key in inputs.files})


if __name__ == "__main__":
    main()
