"""A classifier's folder as its requester reads it: preprocessing, labels, and what a client makes of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bsns.chain.deployment import Deployment
from bsns.chain.signer import KeySigner
from bsns.protocol.commitments import content_digest
from bsns.protocol.manifest import EXPORTED, ModelFile, ModelManifest, ShardUnit
from bsns.requester import Client, InvalidRequestError
from bsns.requester.client import load_model_folder
from bsns.requester.image_processor import ImageProcessor, ImageProcessorError
from bsns.requester.journal import Journal

PREPROCESSING = {"size": 4, "crop": 0.5, "mean": [10, 20, 30], "std": [1, 2, 4], "layout": "CHW"}
LABELS = ["cat", "dog", "fox"]


def write_folder(folder: Path, preprocessing: Any = PREPROCESSING, labels: Any = LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"preprocessing": preprocessing}))
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def write_model_folder(folder: Path) -> Path:
    write_folder(folder)
    manifest = ModelManifest(
        name="pets",
        task="image-classification",
        architecture=EXPORTED,
        files=tuple(
            ModelFile(name, content_digest((folder / name).read_bytes())) for name in ("config.json", "labels.json")
        ),
        dtype="float32",
        input_width=48,
        vocabulary_size=3,
        context_limit=1,
        end_token_ids=(),
        kv_bytes_per_token_per_block=0,
        units=(ShardUnit(0, "operators-0", "operators", bytes(32), 1, 1, 1, 12, 1),),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return folder


def test_row_is_the_scaled_centre_of_the_picture_channels_first(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[2:6, 6:10] = (110, 120, 130)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    row = ImageProcessor(write_folder(tmp_path / "model")).row(tmp_path / "picture.png")
    assert row.dtype == np.float32
    assert row.tolist() == [[100.0] * 16 + [50.0] * 16 + [25.0] * 16]


def test_labels_stand_for_classes_and_a_class_without_one_for_itself(tmp_path: Path) -> None:
    decoder = ImageProcessor(write_folder(tmp_path)).label_decoder()
    assert [decoder.push(1), decoder.push(7), decoder.finish()] == ["dog", "class 7", ""]
    assert decoder.stopped_by is None


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        (None, "no object 'preprocessing'"),
        ({**PREPROCESSING, "size": 0}, "size is 0"),
        ({**PREPROCESSING, "size": True}, "size is True"),
        ({**PREPROCESSING, "size": 100_000}, "1 to 4096"),
        ({**PREPROCESSING, "crop": 0}, "crop is 0"),
        ({**PREPROCESSING, "crop": float("nan")}, "crop is nan"),
        ({**PREPROCESSING, "mean": [1, 2]}, "mean is"),
        ({**PREPROCESSING, "std": [1, 0, 1]}, "std is"),
        ({**PREPROCESSING, "layout": "HWC"}, "layout is 'HWC'"),
        ({}, "size is None"),
    ],
)
def test_preprocessing_that_cannot_be_used_names_the_field(tmp_path: Path, preprocessing: Any, message: str) -> None:
    with pytest.raises(ImageProcessorError, match=message):
        ImageProcessor(write_folder(tmp_path, preprocessing))


@pytest.mark.parametrize("labels", [[], {}, ["a", 1], ["a\x1b[2J"]])
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(ImageProcessorError, match="not a list of labels"):
        ImageProcessor(write_folder(tmp_path, labels=labels))


def test_file_that_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    processor = ImageProcessor(write_folder(tmp_path))
    for path in (tmp_path / "config.json", tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(ImageProcessorError, match=path.name):
            processor.row(path)


def test_model_folder_whose_labels_were_changed_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "labels.json").write_text('["dog","cat","fox"]')
    with pytest.raises(InvalidRequestError, match=r"labels\.json .* is not the one of its manifest"):
        load_model_folder(folder)


def client_of(tmp_path: Path, folder: Path | None) -> Client:
    """A client without a chain: what it does before it asks one."""
    manifest, codec = load_model_folder(folder) if folder is not None else (None, None)
    zero = "0x" + "00" * 20
    deployment = Deployment(31_337, zero, zero, zero, zero, zero, zero, 0)
    signer = KeySigner(b"\1" * 32)
    return Client(None, deployment, signer, Journal(tmp_path / "state"), manifest=manifest, codec=codec)  # type: ignore[arg-type]


async def test_client_of_a_classifier_takes_rows_of_its_width_and_nothing_else(tmp_path: Path) -> None:
    client = client_of(tmp_path, write_model_folder(tmp_path / "model"))
    cases: list[tuple[Any, str]] = [
        ("what is this?", "model pets classifies images, it takes no text"),
        ((1, 2), "takes a row of 48 values, not token ids"),
        (np.zeros((1, 47), np.float32), "the row holds 47 values, model pets takes 48"),
        (np.zeros((2, 48), np.float32), r"float32 \[1, width\]"),
        (np.full((1, 48), np.nan, np.float32), "NaN"),
    ]
    for prompt, message in cases:
        with pytest.raises(InvalidRequestError, match=message):
            await client.quote(prompt, 1)
    with pytest.raises(InvalidRequestError, match="one answer, 2 tokens were asked for"):
        await client._check_lengths(client._request_input(np.zeros((1, 48), np.float32)), 2)


async def test_client_without_a_classifier_makes_no_row_of_an_image(tmp_path: Path) -> None:
    client = client_of(tmp_path, None)
    with pytest.raises(InvalidRequestError, match="give the prepared folder of an image classifier"):
        client.image_row(tmp_path / "picture.png")


def test_reading_an_image_loads_no_torch(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    program = (
        "import sys; from pathlib import Path; from bsns.requester.image_processor import ImageProcessor;"
        "ImageProcessor(Path(sys.argv[1])).row(Path(sys.argv[2])); sys.exit('torch' in sys.modules)"
    )
    folder = write_folder(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(tmp_path / "picture.png")], check=False)
    assert done.returncode == 0
