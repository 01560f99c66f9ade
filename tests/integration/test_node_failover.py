"""Nodes that stop in mid-answer are replaced: the requester's own session over real nodes and a real chain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from torch import Tensor

from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.replacement import StageReplacement
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.typed_data import is_signed_by
from bsns.requester.execution_session import (
    ExecutionSession,
    SessionDomains,
    SessionError,
    SessionLimits,
    replacement_message,
)
from bsns.requester.journal import JournalEntry
from bsns.requester.node_connection import NodeEndpoint, explain_refusal, find_endpoints
from bsns.requester.standby import Standby
from bsns.runtime.executor import BatchStep, open_stage
from bsns.v1 import execution_pb2
from tests.integration.node_fixtures import Network, OpenedRequest, running_network, until
from tests.integration.test_node_ring import LyingExecutor

pytestmark = [pytest.mark.chain, pytest.mark.slow]

PROMPT = (1, 5, 9, 2, 7)
LONG = SamplingParameters(temperature=1.5, seed=6, maximum_tokens=40)
# Greedy answers of a small model repeat themselves, so that there are drafts.
REPETITIVE = SamplingParameters(temperature=0.0, maximum_tokens=40)
UNITS = ((0, 2), (2, 4), (4, 6))
LIMITS = SessionLimits(5.0, 20.0, 30.0, 20.0, 5.0, 10.0, 0.3, 0.3)


class Gate:
    """Holds a node's executor before it computes the row at `position`, until it is opened."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self, end: int) -> None:
        if end > self.position:
            self.reached.set()
            assert self.opened.wait(60), "the test opens its gate"

    def executor(self, *given: Any, **options: Any) -> Any:
        return _HeldExecutor(open_stage(*given, **options), self)


class _HeldExecutor:
    def __init__(self, honest: Any, gate: Gate) -> None:
        self._honest, self._gate = honest, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        self._gate.pass_through(max(step.position + step.inputs.shape[0] for step in steps))
        return list(self._honest.forward_batch(steps))


async def started(network: Network, names: Sequence[str], **changed: Any) -> None:
    readies = [(await network.start_node(name, drain_seconds=0.0, **changed))[1] for name in names]
    await network.until_active(*(ready.node for ready in readies))


async def stopped(network: Network, name: str) -> None:
    """Gone at once, with everything that was under way: no session is drained (`started`)."""
    service = network.services[name]
    service.stop()
    await network.until_refused(name)

    async def given_up() -> bool:
        return service.sessions is not None and len(service.sessions) == 0

    await until(given_up, f"sessions of {name} gone")


@contextlib.asynccontextmanager
async def requester_session(
    network: Network, opened: OpenedRequest, progress: list[str]
) -> AsyncIterator[ExecutionSession]:
    nodes = {item.node for item in opened.plan.assignments}
    head = await network.client.head()
    endpoints = await find_endpoints(network.client, nodes, network.deployment.first_block, head.number)
    route: list[NodeEndpoint] = [
        endpoints[opened.plan.replicas(stage)[0].node] for stage in range(opened.plan.stage_count)
    ]

    async def standby() -> Standby:
        return Standby(opened.plan, endpoints)

    entry = JournalEntry(
        request_id=opened.id, chain_id=network.deployment.chain_id, escrow=network.deployment.inference_escrow,
        requester=network.requester.address, plan_id=bytes(32), publisher=network.publisher.address,
        nonce=0, secret=opened.secret, salt=opened.salt, input=opened.given, sampling=opened.sampling,
        stop=(), deposit=0, created_at=0,
    )  # fmt: skip
    now = int(time.time())
    domains = SessionDomains(network.domains.escrow, network.domains.verification)
    async with ExecutionSession(
        entry, route, network.requester, domains, LIMITS, now + 600, now + 300,
        standby=standby, on_progress=progress.append,
    ) as session:  # fmt: skip
        yield session


async def tokens_while(session: ExecutionSession, gate: Gate, disturb: Any) -> list[int]:
    """The answer, with `disturb` done while the gate holds the ring."""

    async def disturbed() -> None:
        assert await asyncio.to_thread(gate.reached.wait, 30), "the ring reaches the gate"
        await disturb()
        gate.opened.set()

    disturbance = asyncio.ensure_future(disturbed())
    try:
        await session.open()
        return [token async for token in session.stream()]
    finally:
        gate.opened.set()
        await disturbance


async def until_committed(network: Network, opened: OpenedRequest) -> None:
    async def committed() -> bool:
        request = await network.client.call("InferenceEscrow", "requestOf", opened.id)
        return bool(request.status == RequestStatus.COMMITTED)

    await until(committed, "all stages committed")


def replicated(*first: str, spare: str = "d") -> list[tuple[str, int, int]]:
    return [(name, *units) for node, units in zip(first, UNITS, strict=True) for name in (node, spare)]


@pytest.mark.parametrize("position", [0, 12], ids=["prompt", "answer"])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_stage_that_dies_in_mid_answer_is_taken_over_with_the_same_tokens(
    tmp_path: Path, victim: str, position: int
) -> None:
    holder = {"a": "b", "b": "c", "c": "a"}[victim]
    gate = Gate(position)
    async with running_network(tmp_path) as network:
        await started(network, [name for name in "abcd" if name != holder])
        await started(network, [holder], executor_factory=gate.executor)
        plan = await network.publish_plan(replicated("a", "b", "c"))
        expected = await undisturbed(network, plan)
        opened = await network.open_request(plan, PROMPT, LONG)
        progress: list[str] = []
        async with requester_session(network, opened, progress) as session:
            found = await tokens_while(session, gate, lambda: stopped(network, victim))
            assert found == expected
            spare = network.services["d"].ready
            assert spare is not None
            stage = "abc".index(victim)
            assert session.route[stage].node == spare.node
            assert len(progress) == 1, progress
        await until_committed(network, opened)
        route = await network.client.call("InferenceEscrow", "stagesOf", opened.id)
        assert route[stage].node == spare.node


async def undisturbed(network: Network, plan: Any, sampling: SamplingParameters = LONG) -> list[int]:
    """What the model answers to the same request in one process: drawn from its logits by the request's seed."""
    import torch

    from bsns.protocol.sampling import draw
    from bsns.runtime.decoder_executor import StageExecutor
    from bsns.runtime.weight_store import WeightStore

    folder = next(network.cache.glob("models/*/*/manifest.json")).parent
    store = WeightStore(folder)
    executor = StageExecutor(store, 0, len(store.manifest.units))
    cache = executor.new_session(len(PROMPT) + sampling.maximum_tokens)
    inputs, position, found = torch.tensor(PROMPT), 0, []
    while True:
        logits = executor.forward(cache, inputs, position=position)
        position += len(inputs)
        found.append(draw(logits[-1].numpy(), sampling, len(found)))
        if found[-1] in store.manifest.end_token_ids or len(found) == sampling.maximum_tokens:
            return found
        inputs = torch.tensor([found[-1]])


async def test_two_neighbouring_stages_that_die_at_once_are_taken_over(tmp_path: Path) -> None:
    gate = Gate(12)
    async with running_network(tmp_path) as network:
        await started(network, "bcde")
        await started(network, ["a"], executor_factory=gate.executor)
        plan = await network.publish_plan(
            [("a", 0, 2), ("b", 2, 4), ("d", 2, 4), ("e", 2, 4), ("c", 4, 6), ("d", 4, 6), ("e", 4, 6)]
        )
        expected = await undisturbed(network, plan)
        opened = await network.open_request(plan, PROMPT, LONG)
        progress: list[str] = []

        async def both() -> None:
            await stopped(network, "b")
            await stopped(network, "c")

        async with requester_session(network, opened, progress) as session:
            assert await tokens_while(session, gate, both) == expected
            assert len(progress) == 2, progress
        await until_committed(network, opened)


async def test_first_two_stages_that_die_at_once_are_taken_over(tmp_path: Path) -> None:
    # The new stage 1 takes over from the new stage 0, which takes over from the prompt.
    gate = Gate(12)
    async with running_network(tmp_path) as network:
        await started(network, "abde")
        await started(network, ["c"], executor_factory=gate.executor)
        plan = await network.publish_plan([("a", 0, 2), ("d", 0, 2), ("b", 2, 4), ("e", 2, 4), ("c", 4, 6)])
        expected = await undisturbed(network, plan)
        opened = await network.open_request(plan, PROMPT, LONG)
        progress: list[str] = []

        async def both() -> None:
            await asyncio.gather(stopped(network, "a"), stopped(network, "b"))

        async with requester_session(network, opened, progress) as session:
            assert await tokens_while(session, gate, both) == expected
            assert len(progress) >= 2, progress
        await until_committed(network, opened)


async def test_both_ends_of_the_ring_that_die_at_once_are_taken_over_with_their_drafts(
    tmp_path: Path,
) -> None:
    # Only the two of them had the tokens of a step whole: what was drafted shows in the rows of the stage between.
    gate = Gate(20)
    async with running_network(tmp_path) as network:
        await started(network, "acde")
        await started(network, ["b"], executor_factory=gate.executor)
        plan = await network.publish_plan([("a", 0, 2), ("d", 0, 2), ("b", 2, 4), ("c", 4, 6), ("e", 4, 6)])
        expected = await undisturbed(network, plan, REPETITIVE)
        opened = await network.open_request(plan, PROMPT, REPETITIVE)
        progress: list[str] = []
        rows: list[int] = []

        async def both() -> None:
            sessions = network.services["b"].sessions
            assert sessions is not None
            rows.extend(item.rows for session in sessions.all() for item in session.executed[1:])
            await stopped(network, "a")
            await stopped(network, "c")

        async with requester_session(network, opened, progress) as session:
            assert await tokens_while(session, gate, both) == expected
            assert len(progress) >= 2, progress
        assert max(rows) > 1, "no draft was under way"
        await until_committed(network, opened)


async def test_stage_without_another_replica_ends_with_an_error_that_names_it(tmp_path: Path) -> None:
    gate = Gate(12)
    async with running_network(tmp_path) as network:
        await started(network, "b")
        await started(network, ["a"], executor_factory=gate.executor)
        plan = await network.publish_plan([("a", 0, 3), ("b", 3, 6)])
        opened = await network.open_request(plan, PROMPT, LONG)
        async with requester_session(network, opened, []) as session:
            with pytest.raises(SessionError, match="no other replica") as failure:
                await tokens_while(session, gate, lambda: stopped(network, "b"))
            assert failure.value.stage == 1
        sessions = network.services["a"].sessions
        assert sessions is not None

        async def freed() -> bool:
            return len(sessions) == 0

        await until(freed, "the surviving stage gives its cache back")


async def test_witness_that_finds_the_node_in_its_place_refuses(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        await started(network, "abcd")
        plan = await network.publish_plan(replicated("a", "b", "c"))
        opened = await network.open_request(plan, PROMPT, LONG)
        await network.open_sessions(opened, "abc")
        spare = plan.replicas(1)[1]
        replacement = StageReplacement(opened.id, plan.replicas(1)[0].node, spare, plan.proof(spare))
        digest = replacement.digest(network.domains.escrow)
        signed = dataclasses.replace(replacement, consent=network.requester.sign_digest(digest))
        request = execution_pb2.ReplaceStageRequest(request_id=opened.id, replacements=[replacement_message(signed)])
        async with network.stub("a") as stub:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ReplaceStage(request, timeout=20)
            assert explain_refusal(refused.value)[0] == "ERROR_REASON_NODE_IN_PLACE"
            await stopped(network, "b")
            answer = await stub.ReplaceStage(request, timeout=20)
            assert is_signed_by(digest, answer.witness, plan.replicas(0)[0].node)
        # The stage behind takes no replacement without the witness, and none that is signed by another.
        async with network.stub("c") as stub:
            for witness in (b"", network.requester.sign_digest(digest)):
                forged = replacement_message(dataclasses.replace(signed, witness=witness))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ReplaceStage(
                        execution_pb2.ReplaceStageRequest(request_id=opened.id, replacements=[forged]), timeout=20
                    )
                assert explain_refusal(refused.value)[0] == "ERROR_REASON_SIGNATURE_INVALID"


async def test_new_node_takes_no_outputs_over_that_it_does_not_compute(tmp_path: Path) -> None:
    gate = Gate(12)

    def lying(*given: Any, **options: Any) -> Any:
        return LyingExecutor(open_stage(*given, **options))

    async with running_network(tmp_path) as network:
        await started(network, "cd")
        await started(network, ["a"], executor_factory=gate.executor)
        await started(network, ["b"], executor_factory=lying)
        plan = await network.publish_plan(replicated("a", "b", "c"))
        opened = await network.open_request(plan, PROMPT, LONG)
        async with requester_session(network, opened, []) as session:
            with pytest.raises(SessionError, match="not what the stage computes"):
                await tokens_while(session, gate, lambda: stopped(network, "b"))
