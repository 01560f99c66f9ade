"""Many sessions on one ring: they share batches, keep their own answers, and none is harmed by another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from bsns.protocol.sampling import SamplingParameters
from bsns.v1 import common_pb2
from node_client.compute_thread import PIECE_ROWS_BESIDE
from tests.integration.node_fixtures import Network, OpenedRequest, read_answer, running_network, short_terms, until
from tests.integration.test_node_ring import near_their_own_commitment, whole_model_answer

pytestmark = [pytest.mark.chain, pytest.mark.slow]

# Short ones, and one that takes pieces.
PROMPTS = tuple(tuple(3 + (7 * first + step) % 90 for step in range(length)) for first, length in enumerate(
    (1, 4, 9, PIECE_ROWS_BESIDE + 9, 2, 17, 5, 3)
))  # fmt: skip


async def opened_requests(network: Network, plan: object, count: int, tokens: int = 12) -> list[OpenedRequest]:
    sampling = SamplingParameters(maximum_tokens=tokens)
    return [await network.open_request(plan, PROMPTS[number % len(PROMPTS)], sampling) for number in range(count)]  # type: ignore[arg-type]


def batch_sizes(network: Network, name: str) -> set[int]:
    runtime = network.services[name].runtime
    assert runtime is not None
    return set(runtime.compute.batches)


async def test_sessions_at_once_share_batches_and_each_gets_the_tokens_of_one_process(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        readies = [(await network.start_node(name, maximum_sessions=6))[1] for name in ("a", "b")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await network.publish_plan([("a", 0, 3), ("b", 3, 6)])
        opened = await opened_requests(network, plan, 8)
        admitted, refused = opened[:6], opened[6:]
        for request in admitted:
            await network.open_sessions(request, ("a", "b"))
        for request in refused:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await network.open_sessions(request, ("a", "b"))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "try again later" in str(error.value.details())
        answers = await asyncio.gather(*(network.ask(request, ("a", "b")) for request in admitted))
        for number, answer in enumerate(answers):
            assert answer.tokens == whole_model_answer(network, PROMPTS[number], 12), PROMPTS[number]
            assert answer.ended is not None
        assert max(batch_sizes(network, "a")) > 1, "no two steps ever ran together"
        # Whoever was refused is served as soon as the others have ended.
        for number, request in enumerate(refused, 6):
            answer = await network.ask(request, ("a", "b"))
            assert answer.tokens == whole_model_answer(network, PROMPTS[number], 12)


async def test_requesters_who_stop_reading_or_never_begin_harm_nobody_and_give_their_room_back(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        changed = {"session_idle_seconds": 2.0, "stream_outbox_limit": 16, "requester_reconnect_seconds": 0.2}
        readies = [(await network.start_node(name, **changed))[1] for name in ("a", "b")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await network.publish_plan([("a", 0, 3), ("b", 3, 6)])
        deaf, idle, good = await opened_requests(network, plan, 3, tokens=50)
        stores = [network.services[name].sessions for name in ("a", "b")]
        free = [store.free_cache_bytes for store in stores if store is not None]
        for request in (deaf, idle, good):
            await network.open_sessions(request, ("a", "b"))
        async with network.stub("a") as stub:
            unread = stub.Forward(timeout=60)
            await unread.write(network.prompt_frame(deaf))
            answer = await network.ask(good, ("a", "b"))
            assert answer.tokens == whole_model_answer(network, PROMPTS[2], 50)

            async def all_given_back() -> bool:
                return [store.free_cache_bytes for store in stores if store is not None] == free

            await until(all_given_back, "caches of the deaf and the idle session")
            # What was computed for the one who did not read is there once it does.
            late = await read_answer(unread)
            assert late.tokens == whole_model_answer(network, PROMPTS[0], 50)
            unread.cancel()
            call = stub.Forward(timeout=60)
            await call.write(network.prompt_frame(idle))
            rejected = (await read_answer(call)).rejected
            assert rejected is not None
            assert rejected.reason == common_pb2.ERROR_REASON_UNKNOWN_SESSION
            call.cancel()


async def test_eight_bit_weights_and_compressed_activations_are_judged_in_their_own_class(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        changed = {"arithmetic": "int8", "activation_encoding": "float16"}
        readies = [(await network.start_node(name, **changed))[1] for name in ("a", "b", "c")]
        readies.append((await network.start_node("d"))[1])  # serves in float32, and can judge any class
        await network.until_active(*(ready.node for ready in readies))
        stages = [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]
        wrong = await network.publish_plan(stages)
        with pytest.raises(grpc.aio.AioRpcError, match="another execution class"):
            await network.ask((await opened_requests(network, wrong, 1))[0], ("a", "b", "c"))
        plan = await network.publish_plan(stages, "torch-cpu/int8/sdpa")
        opened = await network.open_request(plan, PROMPTS[2], SamplingParameters(maximum_tokens=12))
        answer = await network.ask(opened, ("a", "b", "c"))
        assert answer.ended is not None
        assert len(answer.tokens) == answer.ended.tokens
        await network.draw(opened)
        await near_their_own_commitment(network, opened, answer, 3)
