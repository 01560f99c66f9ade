"""Manifests of a decoder and of an exported classifier whose units have chosen widths and no weights."""

from __future__ import annotations

from collections.abc import Sequence

from bsns.protocol.manifest import EXPORTED, ModelFile, ModelManifest, ShardUnit, UnitKind

WIDTHS = (12, 20, 6, 5)  # of the input row, after each unit, and of the logits


def manifest_of(kinds: Sequence[UnitKind], widths: Sequence[int], input_width: int) -> ModelManifest:
    units = tuple(
        ShardUnit(number, f"{kind}-{number}", kind, bytes([number]) * 32, 10, 1, 1, 4 * width, 8)
        for number, (kind, width) in enumerate(zip(kinds, widths, strict=True))
    )
    is_exported = kinds[0] == "operators"
    return ModelManifest(
        name="shapes",
        task="image-classification" if is_exported else "text-generation",
        architecture=EXPORTED if is_exported else "llama",
        files=(ModelFile("config.json", bytes(32)),),
        dtype="float32",
        input_width=input_width,
        vocabulary_size=widths[-1],
        context_limit=1 if is_exported else 16,
        end_token_ids=(),
        kv_bytes_per_token_per_block=0,
        units=units,
    )


VISION = manifest_of(("operators", "operators", "operators"), WIDTHS[1:], WIDTHS[0])
TEXT = manifest_of(("embedding", "block", "head"), (8, 8, 97), 0)
