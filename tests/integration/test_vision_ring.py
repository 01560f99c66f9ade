"""A captured model on nodes in this process: rows of more than a frame, the committee, and inputs that are none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bsns.protocol.commitments import token_bytes
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.sketch import distance as sketch_distance
from bsns.requester.request_input import RequestInput
from bsns.runtime.program_executor import ProgramExecutor
from bsns.runtime.weight_store import WeightStore
from bsns.v1 import common_pb2
from node_client.settings import MAXIMUM_FRAME_BYTES
from tests.integration.node_fixtures import Network, OpenedRequest, read_answer, running_network, until
from tests.integration.vision_model import SKIPPING, WIDE, save_picture

pytestmark = pytest.mark.chain

CLASS = SamplingParameters(maximum_tokens=1)


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    async with running_network(tmp_path, model=WIDE, source=WIDE.source) as found:
        readies = [(await found.start_node(name))[1] for name in ("a", "b", "c")]
        await found.until_active(*(ready.node for ready in readies))
        end = len(found.manifest.units)
        found.plan = await found.publish_plan([("a", 0, 1), ("b", 1, 2), ("c", 2, end)])
        yield found


async def opened_request(network: Network, given: RequestInput, sampling: SamplingParameters = CLASS) -> OpenedRequest:
    assert network.plan is not None
    return await network.open_request(network.plan, given, sampling)


async def rejection(network: Network, opened: OpenedRequest, **changed: Any) -> str:
    """Why stage 0 rejects a first frame with these fields."""
    async with network.stub("a") as stub:
        call = stub.Forward(timeout=30)
        await call.write(network.prompt_frame(opened, **changed))
        answer = await read_answer(call)
        call.cancel()
    assert answer.rejected is not None
    return common_pb2.ErrorReason.Name(answer.rejected.reason).removeprefix("ERROR_REASON_")


async def test_rows_of_several_frames_give_the_whole_models_class_and_the_committee_agrees(
    network: Network, tmp_path: Path
) -> None:
    assert 4 * network.manifest.row_width(1) > MAXIMUM_FRAME_BYTES, "the first cut takes more than one frame"
    picture = save_picture(tmp_path / "picture.png", 1)
    opened = await opened_request(network, RequestInput.of_row(WIDE.row(picture)))
    answer = await network.ask(opened, ("a", "b", "c"))
    assert answer.tokens == [WIDE.classify(picture)]
    assert answer.ended is not None
    assert answer.ended.finish_reason == common_pb2.FINISH_REASON_LENGTH
    await network.draw(opened)

    async def revealed() -> bool:
        return len(await network.stage_events(opened, "AttestationRevealed")) >= 6

    await until(revealed, "two members of each stage")
    staged = {item.arguments["stage"]: item.arguments for item in await network.stage_events(opened, "StageRevealed")}
    assert set(staged) == {0, 1, 2}
    inside: dict[int, bytes] = {}
    for item in await network.stage_events(opened, "AttestationRevealed"):
        own = staged[item.arguments["stage"]]
        first = inside.setdefault(item.arguments["stage"], bytes(item.arguments["innerSketch"]))
        assert sketch_distance(first, bytes(item.arguments["innerSketch"])) <= 128
        assert item.arguments["outputTokens"] == 1
        distance = await network.client.call(
            "OutputVerification", "sketchDistance", item.arguments["sketch"], own["sketch"]
        )
        assert distance <= 128


async def test_inputs_that_are_no_row_of_the_model_are_refused_and_the_next_is_served(
    network: Network, tmp_path: Path
) -> None:
    picture = save_picture(tmp_path / "picture.png", 2)
    row = WIDE.row(picture)
    two_tokens = await opened_request(network, RequestInput.of_row(row), SamplingParameters(maximum_tokens=2))
    tokens = await opened_request(network, RequestInput.of_tokens((1, 2)))
    async with network.stub("a") as stub:
        for opened in (two_tokens, tokens):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.OpenSession(network.session_request(opened, 0), timeout=20)
            assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
    good = await opened_request(network, RequestInput.of_row(row))
    await network.open_sessions(good, ("a", "b", "c"))
    nan = np.full_like(row, np.nan).tobytes()
    assert await rejection(network, good, encoding=common_pb2.TENSOR_ENCODING_TOKEN_IDS) == "MALFORMED_TENSOR"
    assert await rejection(network, good, rows=2) == "MALFORMED_TENSOR"
    assert await rejection(network, good, payload=token_bytes([1])) == "MALFORMED_TENSOR"
    assert await rejection(network, good, payload=nan) == "DIGEST_MISMATCH"
    answer = await network.ask(good, ("a", "b", "c"))
    assert answer.tokens == [WIDE.classify(picture)]


def test_executor_of_the_tiny_model_carries_two_tensors_over_one_of_its_cuts(tmp_path: Path) -> None:
    store = WeightStore(SKIPPING.prepared(tmp_path))
    carried = [len(ProgramExecutor(store, unit, unit + 1)._given) for unit in range(len(store.manifest.units) - 1)]
    assert max(carried) == 2, "the networks here are to have a skip over a cut"
