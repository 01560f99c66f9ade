"""An image file to the input row of a classifier, and a drawn class to its label, without torch or transformers.

Owns what the files of a prepared classifier say about its input and its classes: preprocessing and labels, which come
with the model, from strangers, and are checked before they are used. Promises the row that the model was trained to
see, whatever the format and size of the image. Does not fetch files; the folder is a prepared model
(`bsns.runtime.prepare`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

CONFIG_FILE: Final = "config.json"
LABELS_FILE: Final = "labels.json"
MAXIMUM_LABELS: Final = 1 << 20
MAXIMUM_SIDE: Final = 4096


class ImageProcessorError(ValueError):
    """The classifier's files or an image cannot be used. The message says what to do."""


class ImageProcessor:
    """Preprocessing and labels of the prepared classifier in `folder`. Raises `ImageProcessorError` for missing or
    broken files.
    """

    def __init__(self, folder: Path) -> None:
        # The runtime that wrote the folder reads it; of the runtime this loads nothing that needs torch.
        from bsns.runtime.exported_models import Preprocessing

        stated = _object(_document(folder / CONFIG_FILE), "preprocessing", folder)
        size, crop = stated.get("size"), stated.get("crop")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAXIMUM_SIDE:
            _refuse(folder, f"size is {size!r:.40}, expected 1 to {MAXIMUM_SIDE} pixels")
        if not _is_number(crop) or not 0 < crop <= 1:
            _refuse(folder, f"crop is {crop!r:.40}, expected more than 0 and at most 1")
        if stated.get("layout") != "CHW":
            _refuse(folder, f"layout is {stated.get('layout')!r:.40}, this release knows 'CHW'")
        mean, std = _triple(stated.get("mean"), "mean", folder), _triple(stated.get("std"), "std", folder)
        if min(std) <= 0:
            _refuse(folder, f"std is {std}, expected positive numbers")
        self._preprocessing = Preprocessing(size, float(crop), mean, std)
        labels = _document(folder / LABELS_FILE)
        if (
            not isinstance(labels, list)
            or not 1 <= len(labels) <= MAXIMUM_LABELS
            or not all(isinstance(label, str) and label.isprintable() for label in labels)
        ):
            raise ImageProcessorError(f"{LABELS_FILE} in {folder} is not a list of labels; prepare the model again")
        self._labels = tuple(labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each class."""
        return self._labels

    def row(self, image: Path) -> npt.NDArray[np.float32]:
        """The input row of an image file, float32 [1, 3 * size * size]; ImageProcessorError if it is none."""
        try:
            from PIL import Image
        except ImportError as error:
            raise ImageProcessorError(f"{error}; reading images needs `pip install pillow`") from error

        from bsns.runtime.exported_models import image_row

        try:
            return image_row(image, self._preprocessing)
        except (ValueError, Image.DecompressionBombError) as error:
            raise ImageProcessorError(str(error)) from error

    def label_decoder(self) -> LabelDecoder:
        """A decoder for one answer."""
        return LabelDecoder(self._labels)


class LabelDecoder:
    """Decodes the one class of an answer to its label, in the place of a `StreamDecoder`: nothing is held back, and
    nothing stops it.
    """

    stopped_by: Final[str | None] = None

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels

    def push(self, class_id: int) -> str:
        """The label of the class; the number itself where the model has no such class (its stage is then at fault)."""
        return self._labels[class_id] if class_id < len(self._labels) else f"class {class_id}"

    def finish(self) -> str:
        """Nothing is left."""
        return ""


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ImageProcessorError(f"cannot read {path}: {error.strerror}; prepare the model first") from error
    except (ValueError, RecursionError) as error:
        raise ImageProcessorError(f"{path} is broken: {error}; prepare the model again") from error


def _object(document: Any, field: str, folder: Path) -> dict[str, Any]:
    found = document.get(field) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        _refuse(folder, f"there is no object {field!r}")
    return found


def _triple(value: Any, field: str, folder: Path) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(_is_number(item) for item in value):
        _refuse(folder, f"{field} is {value!r:.80}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(folder: Path, what: str) -> NoReturn:
    raise ImageProcessorError(f"{CONFIG_FILE} in {folder} cannot be used: {what}; prepare the model again")
