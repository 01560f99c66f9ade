"""What crosses into and out of a stage, for models that take tokens and models that take rows of values."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bsns.protocol.manifest import ModelManifest
from bsns.protocol.plan import execution_class_id
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.sketch import SketchError
from bsns.runtime.activation_codec import ActivationError, TensorEncoding
from bsns.runtime.executor import BatchStep, forward_each
from bsns.v1 import common_pb2
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import InputOpening
from node_client.prompt_lookup import Drawn, SpeculatedAnswer
from node_client.session_store import Session
from node_client.shard_runtime import (
    Rows,
    ShardRuntime,
    decode_input,
    encoding_of_input,
    input_bytes,
    input_encodings,
    new_sketch,
)
from tests.unit.shape_manifests import TEXT, VISION, manifest_of


class _NewSession:
    position = cache_bytes = cache_bytes_limit = 0

    def truncate(self, position: int) -> None:
        raise AssertionError(f"nothing was executed that could be taken back to {position}")


class _Stage:
    """An executor of units [first, end) that gives its input's sum plus 0, 1, 2 … in a row of the cut's width."""

    execution_class = "torch-cpu/float32/aten"

    def __init__(self, manifest: ModelManifest, first: int, end: int) -> None:
        self.manifest, self.first_unit, self.end_unit = manifest, first, end

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        return forward_each(self, steps)  # type: ignore[arg-type]

    def new_session(self, max_tokens: int) -> Any:
        raise AssertionError(f"a session of {max_tokens} is not needed here")

    def forward(
        self, session: Any, inputs: Tensor, *, position: int, logit_rows: Sequence[int] | None = None
    ) -> Tensor:
        del session, position, logit_rows
        return (inputs.sum() + torch.arange(self.manifest.row_width(self.end_unit)).float())[None]


@pytest.mark.parametrize(
    ("manifest", "unit", "encoding", "size"),
    [
        (TEXT, 0, TensorEncoding.TOKEN_IDS, 4),
        (TEXT, 1, TensorEncoding.RAW_FLOAT32, 4 * 8),
        (VISION, 0, TensorEncoding.RAW_FLOAT32, 4 * 12),
        (VISION, 1, TensorEncoding.RAW_FLOAT32, 4 * 20),
        (VISION, 2, TensorEncoding.RAW_FLOAT32, 4 * 6),
    ],
)
def test_input_of_a_stage_has_the_encoding_and_size_that_the_manifest_says(
    manifest: ModelManifest, unit: int, encoding: TensorEncoding, size: int
) -> None:
    assert input_encodings(manifest, unit)[0] is encoding
    assert input_bytes(manifest, unit, 1) == size
    assert input_bytes(manifest, unit, 3) == 3 * size


def test_input_between_stages_is_recognised_by_its_length_and_a_request_has_one_encoding_only() -> None:
    wide = manifest_of(("embedding", "block", "head"), (256, 256, 97), 0)
    for rows in (1, 2, 7):
        sizes = {encoding: input_bytes(wide, 1, rows, encoding) for encoding in input_encodings(wide, 1)}
        assert list(sizes) == [
            TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16, TensorEncoding.BLOCKWISE_INT8
        ]  # fmt: skip
        for encoding, size in sizes.items():
            assert encoding_of_input(wide, 1, rows, size) is encoding
            with pytest.raises(ActivationError, match=f"{size + 1} bytes received"):
                encoding_of_input(wide, 1, rows, size + 1)
    assert input_encodings(wide, 0) == (TensorEncoding.TOKEN_IDS,)
    assert input_encodings(VISION, 0) == (TensorEncoding.RAW_FLOAT32,)
    assert TensorEncoding.BLOCKWISE_INT8 not in input_encodings(TEXT, 1)


def test_decode_input_of_the_first_stage_is_a_row_where_the_model_takes_rows() -> None:
    row = np.arange(12, dtype="<f4")
    decoded = decode_input(_Stage(VISION, 0, 1), row.tobytes(), 1)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (1, 12)
    assert decoded[0].tolist() == row.tolist()
    tokens = decode_input(_Stage(TEXT, 0, 1), np.array([3, 96], "<i4").tobytes(), 2)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [3, 96]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.arange(11, dtype="<f4").tobytes(), "44 bytes received"),
        (np.array([np.nan] * 12, dtype="<f4").tobytes(), "NaN"),
    ],
)
def test_decode_input_of_something_else_than_a_row_says_what_was_expected(data: bytes, message: str) -> None:
    with pytest.raises(ActivationError, match=message):
        decode_input(_Stage(VISION, 0, 1), data, 1)


def test_new_sketch_takes_rows_as_wide_as_the_cut_and_centres_logits_only() -> None:
    inner, last = new_sketch(bytes(32), _Stage(VISION, 0, 1)), new_sketch(bytes(32), _Stage(VISION, 1, 3))
    with pytest.raises(SketchError, match="20"):
        inner.add(np.ones((1, 5), np.float32))
    values = np.random.default_rng(0).standard_normal((1, 20), dtype=np.float32)
    assert inner.add(values) != new_sketch(bytes(32), _Stage(VISION, 0, 1)).add(values + 1)
    exact = np.array([[1, 2, 4, 8, 16]], np.float32)
    assert last.add(exact) == new_sketch(bytes(32), _Stage(VISION, 1, 3)).add(exact + 32)


async def test_step_of_inner_stage_gives_its_rows_and_of_the_last_a_class(tmp_path: Path) -> None:
    runtime = ShardRuntime(tmp_path, threads=1, weight_memory_bytes=1)
    try:
        row = np.ones((1, 12), "<f4").tobytes()
        answer = SpeculatedAnswer(SamplingParameters(maximum_tokens=1), ())

        def take(logits: Rows) -> Drawn:
            return answer.take(logits, 4)

        inner = await runtime.step(_Stage(VISION, 0, 1), _NewSession(), row, rows=1, position=0, take=take)  # type: ignore[arg-type]
        expected = (12 + np.arange(20)).astype("<f4")
        assert inner.payload == expected.tobytes()
        assert inner.encoding is TensorEncoding.RAW_FLOAT32
        assert inner.drawn is None
        assert (inner.position, inner.rows) == (0, 1)
        assert inner.digest == hashlib.sha256(inner.payload).digest()
        last = await runtime.step(
            _Stage(VISION, 1, 3), _NewSession(), inner.payload, rows=1, position=0, take=take  # type: ignore[arg-type]
        )  # fmt: skip
        assert last.drawn == Drawn((4,), ())
        assert last.payload == (4).to_bytes(4, "little")
        assert (last.position, last.rows) == (1, 1)
        where = (1).to_bytes(4, "little") * 2
        assert last.digest == hashlib.sha256(last.payload + where).digest(), "position and rows are signed for"
        with pytest.raises(Refusal) as refused:
            await runtime.step(
                _Stage(VISION, 0, 1),
                _NewSession(),
                row[4:],
                rows=1,
                position=0,
                take=take,
            )  # type: ignore[arg-type]
        assert refused.value.reason == ErrorReason.ERROR_REASON_MALFORMED_TENSOR
    finally:
        runtime.close()


@pytest.mark.parametrize(
    ("stage", "first", "end", "encodings", "sizes"),
    [
        (0, 0, 1, (TensorEncoding.RAW_FLOAT32, TensorEncoding.TOKEN_IDS), (48, 4)),
        (1, 1, 3, (TensorEncoding.RAW_FLOAT32, TensorEncoding.RAW_FLOAT32), (80, 80)),
        (1, 1, 3, (TensorEncoding.FLOAT16, TensorEncoding.FLOAT16), (41, 41)),
    ],
)
async def test_session_of_a_vision_model_takes_a_row_first_and_tokens_back_at_stage_0(
    stage: int, first: int, end: int, encodings: tuple[TensorEncoding, ...], sizes: tuple[int, ...]
) -> None:
    executor = _Stage(VISION, first, end)
    session = Session(
        request_id=bytes(32),
        stage=stage,
        route=(),
        requester="0x" + "11" * 20,  # type: ignore[arg-type]
        opening=InputOpening(bytes(32), 1, SamplingParameters(maximum_tokens=1), bytes(32)),
        model=bytes(32),  # type: ignore[arg-type]
        executor=executor,
        cache=None,
        cache_bytes=0,
        sketch=new_sketch(bytes(32), executor),
        inbox=asyncio.Queue(1),
    )
    for step, (encoding, size) in enumerate(zip(encodings, sizes, strict=True)):
        assert encoding in session.encodings_of(step)
        assert session.input_bytes_of(step, 1, encoding) == size
    assert session.is_final(3, 1)
    assert session.reason_of(3) == common_pb2.FINISH_REASON_LENGTH


def test_class_of_a_stage_names_the_kind_of_device_and_not_its_number(tmp_path: Path) -> None:
    runtime = ShardRuntime(tmp_path, threads=1, weight_memory_bytes=1, device="cuda:1")
    try:
        assert runtime._arithmetic_of(execution_class_id("torch-cuda/bfloat16/sdpa"), TEXT) == "bfloat16"
        with pytest.raises(Refusal, match="torch-cuda/"):
            runtime._arithmetic_of(execution_class_id("torch-cpu/float32/sdpa"), TEXT)
    finally:
        runtime.close()
