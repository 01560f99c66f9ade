from pathlib import Path

import pytest

from bsns.model_description import ModelUnavailableError, describe, prepared_folder


@pytest.mark.parametrize("name", ["", "no such model", "/etc/passwd", "../..", "smollm2-135m-instruct/../x", "a\0b"])
def test_name_of_no_model_is_refused_with_those_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelUnavailableError, match="is unknown; this release prepares"):
        prepared_folder(name)


def test_folder_without_a_manifest_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"has no manifest\.json"):
        prepared_folder(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"[" * 1000, b'{"name":1}'])
def test_folder_with_a_malformed_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    assert prepared_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelUnavailableError, match="manifest"):
        describe(tmp_path)
