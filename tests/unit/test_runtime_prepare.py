"""Preparation: reproducible, idempotent, atomic, and damage is found."""

import dataclasses
import hashlib
import threading
from pathlib import Path

import pytest

from bsns.protocol.manifest import ModelManifest
from bsns.runtime import prepare as preparation
from bsns.runtime.prepare import PreparationError, Report, prepare
from bsns.runtime.weight_store import WeightMismatchError, WeightStore, WeightStoreError
from tests.unit.runtime_models import flip_byte, silent, tiny_llama, tiny_source


def test_prepare_twice_imports_once_and_folder_is_named_by_manifest(tmp_path: Path) -> None:
    source = tiny_source(tiny_llama())
    folder = prepare(source, tmp_path, report=silent)
    assert prepare(source, tmp_path, report=silent) == folder
    assert source.write.calls == 1  # type: ignore[attr-defined]
    assert folder.name == WeightStore(folder).manifest.manifest_hash.hex()
    assert [path.name for path in folder.parent.iterdir() if path.name != ".lock"] == [folder.name]


def test_prepare_in_two_caches_gives_equal_bytes(tmp_path: Path) -> None:
    folders = [prepare(tiny_source(tiny_llama()), tmp_path / name, report=silent) for name in ("a", "b")]
    for path in folders[0].glob("*"):
        if path.name != "checked.json":
            assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("file", ["unit-00002.safetensors", "manifest.json", "config.json", "tokenizer.json"])
def test_damaged_file_is_found_and_made_again(tmp_path: Path, file: str) -> None:
    source = tiny_source(tiny_llama())
    folder = prepare(source, tmp_path, report=silent)
    flip_byte(folder / file)
    lines: list[str] = []
    assert prepare(source, tmp_path, report=lines.append) == folder
    assert source.write.calls == 2  # type: ignore[attr-defined]
    assert any("damaged" in line for line in lines)
    WeightStore(folder).verify_all()


def test_missing_file_is_made_again(tmp_path: Path) -> None:
    source = tiny_source(tiny_llama())
    folder = prepare(source, tmp_path, report=silent)
    (folder / "unit-00000.safetensors").unlink()
    prepare(source, tmp_path, report=silent)
    WeightStore(folder).verify_all()


def test_interrupted_import_leaves_nothing_and_next_one_works(tmp_path: Path) -> None:
    source = tiny_source(tiny_llama())

    def interrupted(name: str, folder: Path, report: Report) -> ModelManifest:
        source.write(name, folder, report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(source, write=interrupted), tmp_path, report=silent)
    home = tmp_path / "models" / "tiny"
    (home / ".building-dead").mkdir()
    folder = prepare(source, tmp_path, report=silent)
    assert sorted(path.name for path in home.iterdir()) == sorted([".lock", folder.name])


def test_two_preparations_at_once_import_once(tmp_path: Path) -> None:
    source = tiny_source(tiny_llama())
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(prepare(source, tmp_path, report=silent))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert source.write.calls == 1  # type: ignore[attr-defined]


def test_import_other_than_pinned_is_refused_with_versions(tmp_path: Path) -> None:
    source = dataclasses.replace(
        tiny_source(tiny_llama()), expected_manifest_hash=bytes(32), expected_weight_root=bytes(32)
    )
    with pytest.raises(PreparationError, match=r"the weights differ.*transformers"):
        prepare(source, tmp_path, report=silent)
    assert [path.name for path in (tmp_path / "models" / "tiny").iterdir()] == [".lock"]


def test_unknown_model_is_refused_with_the_known_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert preparation.main(["--model", "nonesuch", "--cache", str(tmp_path)]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err


def test_weight_store_refuses_exchanged_unit_and_says_which(tmp_path: Path) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    store = WeightStore(folder)
    (folder / "unit-00001.safetensors").write_bytes((folder / "unit-00002.safetensors").read_bytes())
    with pytest.raises(WeightMismatchError, match=r"unit 1 \(block-0\)") as caught:
        store.load_unit(1)
    assert caught.value.expected == store.manifest.units[1].sha256
    assert caught.value.actual == store.manifest.units[2].sha256
    store.load_unit(2)


def test_weight_store_reports_progress_and_refuses_other_manifest(tmp_path: Path) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    store = WeightStore(folder)
    progress: list[tuple[int, int]] = []
    store.load_unit(1, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (store.manifest.units[1].size_bytes,) * 2
    with pytest.raises(WeightMismatchError, match="manifest"):
        WeightStore(folder, manifest_hash=bytes(32))
    with pytest.raises(WeightStoreError, match="no manifest"):
        WeightStore(tmp_path)


def test_tied_head_is_written_with_the_head_unit(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    store = WeightStore(prepare(tiny_source(model), tmp_path, report=silent))
    assert store.load_unit(5)["lm_head.weight"].equal(model.model.embed_tokens.weight)
    manifest: ModelManifest = store.manifest
    assert [unit.kind for unit in manifest.units] == ["embedding", *["block"] * 4, "head"]


def test_unit_of_the_right_hash_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    manifest = WeightStore(folder).manifest
    path = folder / "unit-00001.safetensors"
    path.write_bytes(b"\xff" * 64)
    units = list(manifest.units)
    units[1] = dataclasses.replace(units[1], sha256=hashlib.sha256(path.read_bytes()).digest())
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, units=tuple(units)).to_bytes())
    with pytest.raises(WeightStoreError, match="no safetensors file"):
        WeightStore(folder).load_unit(1)
