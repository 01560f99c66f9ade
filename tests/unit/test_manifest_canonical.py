"""Manifests: one model, one byte string, one hash; everything else is refused."""

import dataclasses
import json

import pytest

from bsns.protocol import merkle
from bsns.protocol.manifest import ManifestError, ModelFile, ModelManifest, ShardUnit


def example(blocks: int = 3) -> ModelManifest:
    kinds = ["embedding"] + ["block"] * blocks + ["head"]
    units = tuple(
        ShardUnit(i, f"unit {i}", kind, bytes([i + 1]) * 32, 100 + i, 10, 20, 256 if kind == "head" else 64, 512)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    )
    files = tuple(ModelFile(name, name[:1].encode() * 32) for name in ("config.json", "tokenizer.json"))
    return ModelManifest("tiny", "text-generation", "llama", files, "float32", 0, 64, 128, (2,), 64, units)


def exported() -> ModelManifest:
    """Three units of captured operators: 12 values in, 8 and 20 across the cuts, 5 classes out."""
    units = tuple(
        ShardUnit(i, f"stage-{i}", "operators", bytes([i + 1]) * 32, 100, 10, 20, 4 * width, 512)
        for i, width in enumerate((8, 20, 5))
    )
    files = (ModelFile("program.json", b"p" * 32),)
    return ModelManifest("net", "image-classification", "exported", files, "float32", 12, 5, 1, (), 0, units)


@pytest.mark.parametrize("manifest", [example(), exported()], ids=lambda manifest: manifest.name)
def test_manifest_round_trip_gives_equal_value_and_hash(manifest: ModelManifest) -> None:
    again = ModelManifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.manifest_hash == manifest.manifest_hash
    assert len(manifest.manifest_hash) == 32


def test_manifest_any_field_changed_changes_hash() -> None:
    manifest = example()
    others = [
        dataclasses.replace(manifest, name="other"),
        dataclasses.replace(manifest, context_limit=129),
        dataclasses.replace(manifest, files=(manifest.files[0], ModelFile("tokenizer.json", b"x" * 32))),
        dataclasses.replace(
            manifest, units=(*manifest.units[:-1], dataclasses.replace(manifest.units[-1], sha256=b"x" * 32))
        ),
    ]
    assert len({other.manifest_hash for other in [manifest, *others]}) == 5
    assert others[-1].weight_root != manifest.weight_root
    assert others[0].weight_root == manifest.weight_root


@pytest.mark.parametrize("blocks", [0, 1, 2, 5, 30])
def test_weight_proof_of_each_unit_verifies_and_only_there(blocks: int) -> None:
    manifest = example(blocks)
    for unit in manifest.units:
        proof = manifest.weight_proof(unit.index)
        assert merkle.verify(manifest.weight_root, unit.weight_leaf, proof)
        moved = dataclasses.replace(unit, index=unit.index + 1)
        assert not merkle.verify(manifest.weight_root, moved.weight_leaf, proof)


def test_row_width_is_what_crosses_each_cut() -> None:
    assert [exported().row_width(unit) for unit in range(4)] == [12, 8, 20, 5]
    assert [example(1).row_width(unit) for unit in range(4)] == [1, 16, 16, 64]
    assert example().takes_token_ids
    assert not exported().takes_token_ids


def test_timing_key_is_shared_by_blocks_and_own_for_operators() -> None:
    assert [unit.timing_key for unit in example(2).units] == ["embedding", "block", "block", "head"]
    assert [unit.timing_key for unit in exported().units] == ["stage-0", "stage-1", "stage-2"]


def test_file_sha256_of_an_absent_file_names_those_there_are() -> None:
    assert example().file_sha256("config.json") == b"c" * 32
    with pytest.raises(ManifestError, match=r"no file 'labels.txt', only .*tokenizer"):
        example().file_sha256("labels.txt")


def test_manifest_bytes_not_canonical_are_refused() -> None:
    document = json.loads(example().to_bytes())
    with pytest.raises(ManifestError, match="canonical"):
        ModelManifest.from_bytes(json.dumps(document).encode())
    upper = example().to_bytes().replace(b"63" * 32, b"6B" * 32)
    with pytest.raises(ManifestError, match="canonical"):
        ModelManifest.from_bytes(upper)


def broken(manifest: ModelManifest | None = None, **changes: object) -> bytes:
    document = json.loads((manifest or example()).to_bytes())
    document.update(changes)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def units_with(manifest: ModelManifest, number: int, **changes: object) -> list[dict[str, object]]:
    units: list[dict[str, object]] = json.loads(manifest.to_bytes())["units"]
    units[number].update(changes)
    return units


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "sha256": "aa" * 32} for name in names]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff", "UTF-8"),
        (b"[]", "object"),
        (b"{}", "missing fields"),
        (broken(format=1), "format is 1"),
        (broken(format=3), "format"),
        (broken(format=True), "format"),
        (broken(surplus=1), "unknown fields"),
        (broken(task="translation"), "task"),
        (broken(files=[{"name": "config.json", "sha256": "zz" * 32}]), "hexadecimal"),
        (broken(files=[{"name": "config.json", "sha256": "aa"}]), "64 hexadecimal"),
        (broken(files=[]), "files"),
        (broken(files="config.json"), "files is not a list"),
        (broken(files=["config.json"]), r"files\[0\] is not a JSON object"),
        (broken(files=named("b", "a")), "in order of their names"),
        (broken(files=named("a", "a")), "in order of their names"),
        (broken(files=named("../key.json")), "plain file name"),
        (broken(files=named(".hidden")), "plain file name"),
        (broken(files=named(*(f"{number:02}" for number in range(17)))), "1 to 16"),
        (broken(vocabulary_size=0), "vocabulary_size"),
        (broken(vocabulary_size=1.5), "vocabulary_size"),
        (broken(vocabulary_size=True), "vocabulary_size"),
        (broken(vocabulary_size=63), "the last unit gives 256 bytes"),
        (broken(input_width=3), "input_width is 0"),
        (broken(end_token_ids=[64]), "vocabulary"),
        (broken(end_token_ids="2"), "list"),
        (broken(units=[]), "units"),
        (broken(units=[1]), "object"),
        (broken(name="a\nb"), "printable"),
        (broken(units=list(reversed(json.loads(example().to_bytes())["units"]))), "order"),
        (broken(units=units_with(example(), 1, output_bytes_per_token=6)), "multiple of 4"),
        (broken(units=units_with(example(), 1, output_bytes_per_token=0)), "multiple of 4"),
        (broken(units=units_with(example(), 1, peak_bytes=-1)), "peak_bytes"),
        (broken(units=units_with(example(), 1, kind="head")), "one embedding unit, then block"),
        (broken(units=units_with(example(), 1, kind="operators")), "one embedding unit, then block"),
        (broken(exported(), units=units_with(exported(), 1, kind="block")), "kind 'operators'"),
        (broken(exported(), units=units_with(exported(), 1, name="stage-0")), "one name"),
        (broken(exported(), input_width=0), "one row of at least one value"),
        (broken(exported(), context_limit=2), "one row"),
        (broken(exported(), kv_bytes_per_token_per_block=4), "keeps no cache"),
    ],
)
def test_manifest_malformed_is_refused_by_field(data: bytes, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        ModelManifest.from_bytes(data)
