"""A tiny CNN with random weights and a skip, captured and prepared as a network serves it, and pictures for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from bsns.protocol.manifest import ModelManifest
from bsns.runtime.capture import BATCH, capture
from bsns.runtime.exported_models import Preprocessing, Report, image_row, write_exported
from bsns.runtime.prepare import ModelSource, prepare
from tests.unit.runtime_models import silent

LABELS = ("apple", "bicycle", "cloud", "door", "egg")


class _Skipping(nn.Module):
    """Convolutions with a skip around the second and third, so that a cut between them carries two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(12, len(LABELS))

    def forward(self, image: Tensor) -> Tensor:
        early = torch.relu(self.stem(image))
        late = torch.relu(self.deep(torch.relu(self.inner(early))))
        return self.head(torch.cat([early.mean(dim=(2, 3)), late.mean(dim=(2, 3))], dim=1))


class _Wide(nn.Module):
    """64 channels of full size between two convolutions: a row of more than a megabyte."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.inner = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64 * 12 * 12, len(LABELS))

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(torch.relu(self.stem(image))))
        return self.head(torch.flatten(nn.functional.avg_pool2d(hidden, 6), 1))


@dataclass(frozen=True)
class VisionModel:
    """A classifier of pictures of `side` by `side` pixels."""

    network: type[nn.Module]
    side: int

    @property
    def module(self) -> nn.Module:
        """The whole network, the same each time, with weights large enough that pictures of other colours get other
        labels.
        """
        torch.manual_seed(0)
        module = self.network().eval()
        head: Any = module.head
        nn.init.normal_(head.weight, std=3.0)
        nn.init.zeros_(head.bias)
        return module

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.side, 1.0, (127.0, 120.0, 110.0), (64.0, 64.0, 64.0))

    @property
    def source(self) -> ModelSource:
        """How the classifier is captured and written."""
        return ModelSource("tiny-classifier", self._write)

    def prepared(self, cache: Path) -> Path:
        """Its folder under `cache`."""
        return prepare(self.source, cache, report=silent)

    def row(self, picture: Path) -> npt.NDArray[np.float32]:
        """The input row of a picture."""
        return image_row(picture, self.preprocessing)

    def classify(self, picture: Path) -> int:
        """What the whole module, uncut and in this process, says about a picture."""
        row = torch.from_numpy(self.row(picture)).view(1, 3, self.side, self.side)
        with torch.inference_mode():
            return int(self.module(row).argmax())

    def _write(self, name: str, folder: Path, report: Report) -> ModelManifest:
        example = torch.rand(2, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        dynamic = ({0: Dim(BATCH, min=1, max=8)},)
        captured = capture(self.module, (example,), dynamic_shapes=dynamic, name=name)
        return write_exported(
            name, captured, folder, report,
            task="image-classification", labels=LABELS, preprocessing=self.preprocessing,
        )  # fmt: skip


SKIPPING = VisionModel(_Skipping, 12)
WIDE = VisionModel(_Wide, 72)


def save_picture(path: Path, seed: int) -> Path:
    """A picture of one colour with some noise, as a file."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 200, 3) + random.integers(0, 56, (20, 30, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path
