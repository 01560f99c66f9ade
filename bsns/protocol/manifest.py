"""The model manifest: the one document that says which shard units make up a model and which bytes each of them is.

Owns the types `ShardUnit` and `ModelManifest`, their canonical JSON and the two values that go on chain: the manifest
hash and the weight root. Promises that equal manifests have equal bytes, that `from_bytes` accepts nothing but
canonical bytes, and that a manifest which parses is consistent (units in order, hashes of the right length, sizes not
negative). Does not read files or weights; that is `bsns.runtime.weight_store`.

A unit is a contiguous piece of a topological order: a part of a decoder (embedding, block, head), or captured operators
of any other network. Either way what crosses the cut after a unit is one row of values for each row that went in: a
hidden state, or the concatenation of every tensor that later units still need.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, cast, get_args

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.identifiers import keccak256
from bsns.protocol.merkle import MerkleTree, leaf_hash

MANIFEST_FORMAT: Final = 2
# A manifest is fetched from strangers; the largest real one (200 blocks) has about 60 KB.
MAXIMUM_MANIFEST_BYTES: Final = 4 * 1024 * 1024
MAXIMUM_UNITS: Final = 65_536
# Every value that crosses a cut is a float32 (token ids: an int32).
VALUE_BYTES: Final = 4

# The runtime's name for a model that is not a decoder but a captured program of operators.
EXPORTED: Final = "exported"

UnitKind = Literal["embedding", "block", "head", "operators"]
Task = Literal["text-generation", "image-classification"]
_UNIT_KINDS: Final = frozenset(get_args(UnitKind))
_TASKS: Final = frozenset(get_args(Task))


MAXIMUM_FILES: Final = 16
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class ManifestError(ValueError):
    """A manifest is malformed. The message names the field; fetch the manifest again or from another holder."""


@dataclass(frozen=True, slots=True)
class ShardUnit:
    """The smallest piece of a model that a node can hold: one safetensors file.

    `sha256` is of the whole file, `size_bytes` its length. `flops_per_token` counts two operations for each weight of a
    matrix product (a convolution: for each use of a weight) and leaves out attention scores, which grow with the
    context. `output_bytes_per_token` is what crosses a cut after this unit for each row, four bytes a value.
    `peak_bytes` is the most that one row's activations take while the unit runs, its inputs and outputs included.
    """

    index: int
    name: str
    kind: UnitKind
    sha256: bytes
    size_bytes: int
    parameter_count: int
    flops_per_token: int
    output_bytes_per_token: int
    peak_bytes: int

    def __post_init__(self) -> None:
        where = f"shard unit {self.index!r}"
        _require_integer(self.index, f"{where}: index")
        _require_text(self.name, f"{where}: name")
        if self.kind not in _UNIT_KINDS:
            raise ManifestError(f"{where}: kind is {self.kind!r}, expected one of {sorted(_UNIT_KINDS)}")
        _require_digest(self.sha256, f"{where}: sha256")
        for field in ("size_bytes", "parameter_count", "flops_per_token", "output_bytes_per_token", "peak_bytes"):
            _require_integer(getattr(self, field), f"{where}: {field}")
        if self.output_bytes_per_token == 0 or self.output_bytes_per_token % VALUE_BYTES:
            raise ManifestError(
                f"{where}: output_bytes_per_token is {self.output_bytes_per_token}, "
                f"expected a positive multiple of {VALUE_BYTES}"
            )

    @property
    def timing_key(self) -> str:
        """What measurements call units that take equally long on one machine: the kind, or the unit's own name where
        it is made of captured operators.
        """
        return self.name if self.kind == "operators" else self.kind

    @property
    def weight_leaf(self) -> bytes:
        """The unit's leaf in the weight root: `leaf_hash(abi.encode(uint256 index, bytes32 sha256))`, 32 bytes."""
        return leaf_hash(self.index.to_bytes(32, "big") + self.sha256)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of the model folder that is not weights: configuration, tokenizer, program, labels."""

    name: str
    sha256: bytes

    def __post_init__(self) -> None:
        _require_text(self.name, "files: name")
        # A name becomes a path on the machine of whoever reads the manifest.
        if not _FILE_NAME.fullmatch(self.name):
            raise ManifestError(f"files: {self.name!r} is not a plain file name (letters, digits, '.', '_', '-')")
        _require_digest(self.sha256, f"files: {self.name}")


@dataclass(frozen=True)
class ModelManifest:
    """A model as the chain knows it. Units are in execution order and numbered from 0; `files` in order of their names.

    `architecture` is a decoder family of transformers (such as `llama`) or `exported`. `input_width` is the number of
    float32 values in one input row, or 0 where rows are token ids. `vocabulary_size` counts what can be drawn from the
    last unit's output: tokens, or the classes of a classifier. `context_limit` and `kv_bytes_per_token_per_block` bound
    a session's memory: one session of n tokens over b blocks holds `n * b * kv_bytes_per_token_per_block` bytes; an
    exported model takes one row and keeps nothing. `dtype` is the declared arithmetic: a committee re-executes in
    exactly this one.
    """

    name: str
    task: Task
    architecture: str
    files: tuple[ModelFile, ...]
    dtype: str
    input_width: int
    vocabulary_size: int
    context_limit: int
    end_token_ids: tuple[int, ...]
    kv_bytes_per_token_per_block: int
    units: tuple[ShardUnit, ...]
    format: int = MANIFEST_FORMAT

    def __post_init__(self) -> None:
        if self.format != MANIFEST_FORMAT or isinstance(self.format, bool):
            raise ManifestError(
                f"manifest format is {self.format!r}, this release reads {MANIFEST_FORMAT}; "
                "install a release that knows it"
            )
        for field in ("name", "architecture", "dtype"):
            _require_text(getattr(self, field), field)
        if self.task not in _TASKS:
            raise ManifestError(f"task is {self.task!r}, expected one of {sorted(_TASKS)}")
        names = [file.name for file in self.files]
        if names != sorted(set(names)) or not 1 <= len(names) <= MAXIMUM_FILES:
            raise ManifestError(
                f"files are not 1 to {MAXIMUM_FILES} in order of their names, each once: {names!r:.200}"
            )
        for field in ("vocabulary_size", "context_limit"):
            _require_integer(getattr(self, field), field, minimum=1)
        for field in ("input_width", "kv_bytes_per_token_per_block"):
            _require_integer(getattr(self, field), field)
        for token_id in self.end_token_ids:
            _require_integer(token_id, "end_token_ids")
            if token_id >= self.vocabulary_size:
                raise ManifestError(f"end_token_ids holds {token_id}, outside the vocabulary of {self.vocabulary_size}")
        if not 1 <= len(self.units) <= MAXIMUM_UNITS:
            raise ManifestError(f"units holds {len(self.units)} entries, expected 1 to {MAXIMUM_UNITS}")
        for expected, unit in enumerate(self.units):
            if unit.index != expected:
                raise ManifestError(f"units[{expected}] has index {unit.index}; units are listed in order from 0")
        if self.units[-1].output_bytes_per_token != VALUE_BYTES * self.vocabulary_size:
            raise ManifestError(
                f"the last unit gives {self.units[-1].output_bytes_per_token} bytes, "
                f"a vocabulary of {self.vocabulary_size} takes {VALUE_BYTES * self.vocabulary_size}"
            )
        kinds = [unit.kind for unit in self.units]
        if self.architecture == EXPORTED:
            if set(kinds) != {"operators"}:
                raise ManifestError("an exported model consists of units of kind 'operators'")
            if len({unit.name for unit in self.units}) != len(self.units):
                raise ManifestError("two units of an exported model have one name")
            if self.input_width < 1 or self.context_limit != 1 or self.kv_bytes_per_token_per_block:
                raise ManifestError("an exported model takes one row of at least one value, and keeps no cache")
        elif kinds != ["embedding"] + ["block"] * (len(kinds) - 2) + ["head"]:
            raise ManifestError(
                "a decoder model is one embedding unit, then block units, then one head unit, in this order"
            )
        elif self.input_width:
            raise ManifestError("a decoder takes token ids: its input_width is 0")

    @property
    def takes_token_ids(self) -> bool:
        """Whether an input row is one token id; else it is `input_width` float32 values."""
        return self.input_width == 0

    def row_width(self, unit: int) -> int:
        """Values in one row that enters unit `unit`; for the number of units, in one row that leaves the model."""
        if unit == 0:
            return self.input_width or 1
        return self.units[unit - 1].output_bytes_per_token // VALUE_BYTES

    def file_sha256(self, name: str) -> bytes:
        """SHA-256 of the file `name`, 32 bytes; `ManifestError` if the model has no such file."""
        for file in self.files:
            if file.name == name:
                return file.sha256
        raise ManifestError(f"model {self.name} has no file {name!r}, only {[file.name for file in self.files]}")

    @property
    def block_count(self) -> int:
        """Number of units of kind `block`."""
        return sum(unit.kind == "block" for unit in self.units)

    def to_bytes(self) -> bytes:
        """Canonical UTF-8 JSON: sorted keys, no spaces, byte strings as lower-case hex without prefix."""
        document = _to_json(dataclasses.asdict(self))
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ModelManifest":
        """Parses canonical bytes. Raises `ManifestError` for anything that `to_bytes` would not have written."""
        if len(data) > MAXIMUM_MANIFEST_BYTES:
            raise ManifestError(f"manifest has {len(data)} bytes, more than the limit of {MAXIMUM_MANIFEST_BYTES}")
        try:
            document = parse_json(data)
        except ValueError as error:
            raise ManifestError(f"manifest is not UTF-8 JSON: {error}; fetch it again") from error
        fields = _checked_fields(document, cls, "manifest")
        units = fields["units"]
        if not isinstance(units, list):
            raise ManifestError("units is not a list")
        if len(units) > MAXIMUM_UNITS:
            raise ManifestError(f"units holds {len(units)} entries, expected 1 to {MAXIMUM_UNITS}")
        end_token_ids = fields["end_token_ids"]
        if not isinstance(end_token_ids, list):
            raise ManifestError("end_token_ids is not a list")
        files = fields["files"]
        if not isinstance(files, list) or len(files) > MAXIMUM_FILES:
            raise ManifestError(f"files is not a list of 1 to {MAXIMUM_FILES} entries")
        parsed: dict[str, Any] = dict(fields)
        parsed["files"] = tuple(_file_from_json(file, number) for number, file in enumerate(files))
        parsed["end_token_ids"] = tuple(end_token_ids)
        parsed["units"] = tuple(_unit_from_json(unit, number) for number, unit in enumerate(units))
        manifest = cls(**parsed)
        if manifest.to_bytes() != data:
            # Otherwise one model could have many manifest hashes.
            raise ManifestError(
                "manifest bytes are not canonical (sorted keys, no spaces, lower-case hex); use to_bytes()"
            )
        return manifest

    @cached_property
    def manifest_hash(self) -> bytes:
        """keccak256 of the canonical bytes; the model's identifier on chain, 32 bytes."""
        return keccak256(self.to_bytes())

    @cached_property
    def _weight_tree(self) -> MerkleTree:
        return MerkleTree([unit.weight_leaf for unit in self.units])

    @property
    def weight_root(self) -> bytes:
        """Merkle root over every unit's `weight_leaf`, 32 bytes."""
        return self._weight_tree.root

    def weight_proof(self, index: int) -> list[bytes]:
        """Merkle proof that unit `index` belongs to `weight_root`."""
        return list(self._weight_tree.proof(index))


def _unit_from_json(document: Any, number: int) -> ShardUnit:
    fields = _checked_fields(document, ShardUnit, f"units[{number}]")
    return ShardUnit(**{**fields, "sha256": _from_hex(fields["sha256"], f"units[{number}].sha256")})


def _file_from_json(document: Any, number: int) -> ModelFile:
    fields = _checked_fields(document, ModelFile, f"files[{number}]")
    return ModelFile(fields["name"], _from_hex(fields["sha256"], f"files[{number}].sha256"))


def _checked_fields(document: Any, owner: type, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ManifestError(f"{where} is not a JSON object")
    expected = {field.name for field in dataclasses.fields(cast(Any, owner))}
    if set(document) != expected:
        missing, surplus = sorted(expected - set(document)), sorted(map(repr, set(document) - expected))
        raise ManifestError(f"{where}: missing fields {missing}, unknown fields {surplus}")
    return document


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_hex(value: Any, where: str) -> bytes:
    if not isinstance(value, str) or len(value) != 64:
        raise ManifestError(f"{where} is not 64 hexadecimal digits")
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise ManifestError(f"{where} is not hexadecimal: {error}") from error


def _require_integer(value: Any, where: str, minimum: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**63:
        raise ManifestError(f"{where} is {value!r}, expected an integer from {minimum} to 2**63-1")


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        raise ManifestError(f"{where} is {value!r:.80}, expected 1 to 128 printable characters")


def _require_digest(value: Any, where: str) -> None:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ManifestError(f"{where} is {value!r:.80}, expected 32 bytes")
