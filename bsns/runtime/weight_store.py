"""Weights of one prepared model, read unit by unit and never trusted unread.

Owns the layout of a model folder (`unit_path` and the file names below) and the check of each unit file against the
manifest. Promises that `load_unit` returns only tensors of a file whose SHA-256 is the manifest's, mapped into memory
so that processes on one machine share the pages. Does not fetch or build anything (`bsns.runtime.prepare`) and never
reads a pickle: safetensors only.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bsns.protocol.manifest import ModelManifest

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_FILE: Final = "manifest.json"
CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
_READ_BYTES: Final = 4 * 1024 * 1024

HashProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while a file is checked."""


class WeightStoreError(RuntimeError):
    """A model folder cannot be used. The message says what to do."""


class WeightMismatchError(WeightStoreError):
    """A file is not the one that the manifest names. `unit`, `expected` and `actual` (SHA-256) say which and how."""

    def __init__(self, unit: str, expected: bytes, actual: bytes, path: Path) -> None:
        super().__init__(
            f"{unit}: {path} has SHA-256 {actual.hex()}, the manifest says {expected.hex()}. "
            "The file is damaged or was exchanged: "
            "run `python -m bsns.runtime.prepare` to make it again, and do not serve this unit until it matches"
        )
        self.unit, self.expected, self.actual = unit, expected, actual


def unit_file_name(index: int) -> str:
    """Name of a unit's file in the model folder."""
    return f"unit-{index:05d}.safetensors"


def file_sha256(path: Path, progress: HashProgress | None = None) -> bytes:
    """SHA-256 of a file, read in pieces. Raises `WeightStoreError` where it cannot be read."""
    digest, done = hashlib.sha256(), 0
    buffer = bytearray(_READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            total = path.stat().st_size
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                done += count
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise WeightStoreError(
            f"cannot read {path}: {error.strerror}; run `python -m bsns.runtime.prepare` to make the model folder again"
        ) from error
    return digest.digest()


class WeightStore:
    """One model folder. Reads and parses the manifest at once, unit files on demand.

    Raises `WeightStoreError` where there is no manifest, `ManifestError` where it is malformed. Pass `manifest_hash`
    where the model is named by the chain: another manifest is then refused.
    """

    def __init__(self, folder: Path, *, manifest_hash: bytes | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WeightStoreError(
                f"no manifest at {path} ({error.strerror}); run `python -m bsns.runtime.prepare`, "
                "which prints the folder to use"
            ) from error
        self.manifest = ModelManifest.from_bytes(data)
        if manifest_hash is not None and self.manifest.manifest_hash != manifest_hash:
            raise WeightMismatchError("manifest", manifest_hash, self.manifest.manifest_hash, path)

    def unit_path(self, index: int) -> Path:
        """The file of unit `index`."""
        return self.folder / unit_file_name(index)

    def verify_unit(self, index: int, progress: HashProgress | None = None) -> None:
        """Reads the unit's whole file and raises `WeightMismatchError` unless it is the manifest's."""
        unit = self.manifest.units[index]
        path = self.unit_path(index)
        actual = file_sha256(path, progress)
        if actual != unit.sha256:
            raise WeightMismatchError(f"unit {index} ({unit.name})", unit.sha256, actual, path)

    def load_unit(self, index: int, progress: HashProgress | None = None) -> "dict[str, Tensor]":
        """The unit's tensors by name, checked, mapped into memory, on the CPU. They share the file's pages: do not
        write to them.
        """
        from safetensors import SafetensorError, safe_open

        self.verify_unit(index, progress)
        path = self.unit_path(index)
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
        except SafetensorError as error:
            # A manifest can name any bytes: whoever registered the model decides what hashes to what.
            raise WeightStoreError(f"{path} is the file of the manifest and no safetensors file: {error}") from error

    def read_file(self, name: str) -> bytes:
        """The bytes of a file that is not weights, such as `config.json`, checked against the manifest."""
        expected, path = self.manifest.file_sha256(name), self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WeightStoreError(
                f"cannot read {path} ({error.strerror}); run `python -m bsns.runtime.prepare`"
            ) from error
        actual = hashlib.sha256(data).digest()
        if actual != expected:
            raise WeightMismatchError(name, expected, actual, path)
        return data

    def verify_all(self, progress: HashProgress | None = None) -> None:
        """Checks every file of the folder; raises `WeightMismatchError` or `WeightStoreError` for the first that is
        wrong.
        """
        manifest = self.manifest
        for file in manifest.files:
            self.read_file(file.name)
        done, total = 0, sum(unit.size_bytes for unit in manifest.units)
        for unit in manifest.units:
            self.verify_unit(unit.index)
            done += unit.size_bytes
            if progress is not None:
                progress(done, total)
