"""What the demo asks which kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from coordinator.demo import Demo, DemoSettings, example_image, load_manifest
from coordinator.devnet import DevnetError
from tests.unit.shape_manifests import TEXT, VISION

PHOTOGRAPH = Path("photograph.jpg")


def demo(tmp_path: Path, manifest: bytes, image: Path | None) -> Demo:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(manifest)
    settings = DemoSettings("shapes", "What is this?", image, 8, 2, 7, tmp_path / "demo")
    return Demo(settings, Console(), folder)


def test_example_image_is_a_photograph_that_is_installed() -> None:
    with Image.open(example_image()) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 224


@pytest.mark.parametrize(("image", "shown"), [(None, example_image()), (PHOTOGRAPH, PHOTOGRAPH)])
def test_demo_of_a_classifier_shows_the_image_and_asks_for_one_class(
    tmp_path: Path, image: Path | None, shown: Path
) -> None:
    command = demo(tmp_path, VISION.to_bytes(), image)._request_command(tmp_path / "record.json")
    assert command[-2:] == ["--image", str(shown)]
    assert "--max-tokens" not in command
    assert "What is this?" not in command


def test_demo_of_a_language_model_asks_the_prompt(tmp_path: Path) -> None:
    command = demo(tmp_path, TEXT.to_bytes(), None)._request_command(tmp_path / "record.json")
    assert command[-4:] == ["--max-tokens", "8", "--", "What is this?"]
    assert "--image" not in command


def test_demo_of_a_language_model_with_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DevnetError, match="model shapes takes no image"):
        demo(tmp_path, TEXT.to_bytes(), PHOTOGRAPH)


def test_manifest_that_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(DevnetError, match=r"manifest\.json"):
        load_manifest(tmp_path)
