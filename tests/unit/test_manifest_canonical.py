"""Manifests: one model, one byte string, one hash; everything else is refused."""

import dataclasses
import json

import pytest

from bsns.protocol import merkle
from bsns.protocol.manifest import ManifestError, ModelManifest, ShardUnit


def example(blocks: int = 3) -> ModelManifest:
    kinds = ["embedding"] + ["block"] * blocks + ["head"]
    units = tuple(
        ShardUnit(i, f"unit {i}", kind, bytes([i + 1]) * 32, 100 + i, 10, 20, 64)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    )
    return ModelManifest("tiny", "llama", b"a" * 32, b"b" * 32, b"c" * 32, "float32", 16, 64, 128, (2,), 64, units)


def test_manifest_round_trip_gives_equal_value_and_hash() -> None:
    manifest = example()
    again = ModelManifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.manifest_hash == manifest.manifest_hash
    assert len(manifest.manifest_hash) == 32


def test_manifest_any_field_changed_changes_hash() -> None:
    manifest = example()
    others = [
        dataclasses.replace(manifest, name="other"),
        dataclasses.replace(manifest, context_limit=129),
        dataclasses.replace(manifest, tokenizer_sha256=b"x" * 32),
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


def test_manifest_bytes_not_canonical_are_refused() -> None:
    document = json.loads(example().to_bytes())
    with pytest.raises(ManifestError, match="canonical"):
        ModelManifest.from_bytes(json.dumps(document).encode())
    upper = example().to_bytes().replace(b"61" * 32, b"6B" * 32)
    with pytest.raises(ManifestError, match="canonical"):
        ModelManifest.from_bytes(upper)


def broken(**changes: object) -> bytes:
    document = json.loads(example().to_bytes())
    document.update(changes)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff", "UTF-8"),
        (b"[]", "object"),
        (b"{}", "missing fields"),
        (broken(format=2), "format"),
        (broken(format=True), "format"),
        (broken(surplus=1), "unknown fields"),
        (broken(config_sha256="zz" * 32), "hexadecimal"),
        (broken(config_sha256="aa"), "64 hexadecimal"),
        (broken(hidden_size=0), "hidden_size"),
        (broken(hidden_size=1.5), "hidden_size"),
        (broken(hidden_size=True), "hidden_size"),
        (broken(end_token_ids=[64]), "vocabulary"),
        (broken(end_token_ids="2"), "list"),
        (broken(units=[]), "units"),
        (broken(units=[1]), "object"),
        (broken(name="a\nb"), "printable"),
        (broken(units=list(reversed(json.loads(example().to_bytes())["units"]))), "order"),
    ],
)
def test_manifest_malformed_is_refused_by_field(data: bytes, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        ModelManifest.from_bytes(data)
