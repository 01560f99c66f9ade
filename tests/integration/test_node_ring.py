"""The path of a request through real nodes on a real chain: sessions, ring, commitments, committee, reveals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bsns.chain.errors import ContractError
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import EvidenceBuilder, inner_sketch_seed, sketch_seed, step_digest
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import ZERO_HASH, ModelId, RequestId
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.sketch import distance
from bsns.runtime import activation_codec
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import forward_each, open_stage
from bsns.runtime.weight_store import WeightStore
from bsns.v1 import common_pb2, execution_pb2
from node_client.evidence_store import EvidenceStore, StageResult
from node_client.reexecution import FetchedEvidence, Reexecution
from node_client.shard_runtime import ShardRuntime, StepOutput, decode_input, inner_sketch, new_sketch
from tests.integration.node_fixtures import (
    Answer,
    Network,
    OpenedRequest,
    read_answer,
    running_network,
    short_terms,
    until,
)
from tests.unit.runtime_models import greedy

pytestmark = pytest.mark.chain

PROMPT = (5, 17, 60, 33, 8)
GREEDY = SamplingParameters(maximum_tokens=12)


def whole_model_answer(network: Network, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """What one process generates, up to and with an end token."""
    folder = next(network.cache.glob("models/*/*/manifest.json")).parent
    store = WeightStore(folder)
    answer = greedy([StageExecutor(store, 0, len(store.manifest.units))], prompt, tokens)
    ends = [index for index, token in enumerate(answer) if token in store.manifest.end_token_ids]
    return answer[: ends[0] + 1] if ends else answer


async def reveals(network: Network, opened: OpenedRequest, name: str, count: int) -> list[Any]:
    async def enough() -> list[Any]:
        found = await network.stage_events(opened, name)
        return found if len(found) >= count else []

    return await until(enough, f"{count} × {name}")


async def test_ring_of_three_stages_gives_the_tokens_of_one_process_and_survives_the_committee(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b", "c", "d")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await network.publish_plan([("a", 0, 2), ("b", 2, 4), ("c", 4, 6)])
        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a", "b", "c"))
        expected = whole_model_answer(network, PROMPT, GREEDY.maximum_tokens)
        assert answer.tokens == expected
        assert answer.rejected is None
        assert answer.ended is not None
        assert answer.ended.tokens == len(expected)
        assert answer.ended.steps == len(answer.outputs)
        assert answer.ended.finish_reason == common_pb2.FINISH_REASON_STOP, "the tiny model draws its end token"
        assert len(answer.ended.statement.signature) == 65
        assert answer.receipts, "stage 0 signs for the prompt"
        await network.draw(opened)
        attested = await reveals(network, opened, "AttestationRevealed", 9)
        staged = await reveals(network, opened, "StageRevealed", 3)
        for stage in staged:
            for attestation in attested:
                if attestation.arguments["stage"] == stage.arguments["stage"]:
                    assert attestation.arguments["outputTokens"] == len(expected)
                    distance = await network.client.call(
                        "OutputVerification",
                        "sketchDistance",
                        attestation.arguments["sketch"],
                        stage.arguments["sketch"],
                    )
                    assert distance <= 128
        anyone = Submitter(network.client, network.requester)
        for stage in range(3):
            await anyone.submit("OutputVerification", "tally", opened.id, stage, 0)
        view = await network.client.call("OutputVerification", "verificationOf", opened.id)
        assert view.phase == Phase.CHALLENGEABLE

        async def past_challenges() -> bool:
            return (await network.client.head()).timestamp > view.challengeDeadline

        await until(past_challenges, "challenge window")
        await anyone.submit("OutputVerification", "settle", opened.id)
        assert (await network.client.call("InferenceEscrow", "requestOf", opened.id)).status == RequestStatus.SETTLED
        stores = [service.evidence for service in network.services.values()]

        async def forgotten() -> bool:
            return all(store is not None and not store.bytes_used and not store.attested_requests() for store in stores)

        await until(forgotten, "evidence given up after the dispute")


async def test_one_stage_ring_repeated_prompt_and_cancel(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        ready = (await network.start_node("a"))[1]
        await network.until_active(ready.node)
        plan = await network.publish_plan([("a", 0, 6)])
        expected = whole_model_answer(network, PROMPT, GREEDY.maximum_tokens)

        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a",))
        assert answer.tokens == expected
        async with network.stub("a") as stub:
            # The same prompt on another stream is answered from memory, not executed again.
            call = stub.Forward(timeout=30)
            await call.write(network.prompt_frame(opened))
            again = await read_answer(call)
            call.cancel()
            assert (again.outputs, again.ended) == (answer.outputs, answer.ended)

        sampled = SamplingParameters(temperature=1.5, seed=3, maximum_tokens=40)
        other = await network.open_request(plan, PROMPT, sampled)
        await network.open_sessions(other, ("a",))
        async with network.stub("a") as stub:
            call = stub.Forward(timeout=30)
            await call.write(network.prompt_frame(other))
            first = await read_answer(call, stop_after=2)
            closed = await stub.CloseSession(
                execution_pb2.CloseSessionRequest(request_id=other.id, token=network.token(other)), timeout=20
            )
            rest = await read_answer(call, before=first)
            call.cancel()
            assert rest.ended is not None
            assert rest.ended.steps == closed.steps == len(rest.outputs)
            assert rest.ended.tokens == len(rest.tokens)
        # Not sampled: nobody attests, the executor reveals on its own.
        for item in (opened, other):
            await network.draw(item)
        (revealed,) = await reveals(network, opened, "StageRevealed", 1)
        assert revealed.arguments["outputTokens"] == len(expected)
        (revealed,) = await reveals(network, other, "StageRevealed", 1)
        assert revealed.arguments["outputTokens"] == rest.ended.tokens


class LyingExecutor:
    """A shard executor that runs the real one and hands on something else: what a node with other weights does."""

    def __init__(self, honest: Any) -> None:
        self._honest = honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def forward(self, session: Any, inputs: Any, **named: Any) -> Any:
        return self._honest.forward(session, inputs, **named) * 1.01 + 0.02

    def forward_batch(self, steps: Any) -> Any:
        return forward_each(self, steps)  # type: ignore[arg-type]


async def test_executor_that_hands_on_other_activations_is_far_from_what_the_committee_attests(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "c")]

        def lying(store: Any, first: int, end: int, **options: Any) -> Any:
            return LyingExecutor(open_stage(store, first, end, **options))

        readies.append((await network.start_node("b", executor_factory=lying))[1])
        await network.until_active(*(ready.node for ready in readies))
        plan = await network.publish_plan([("a", 0, 2), ("b", 2, 4), ("c", 4, 6)])
        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a", "b", "c"))
        assert answer.ended is not None
        await network.draw(opened)
        staged = await reveals(network, opened, "StageRevealed", 3)
        attested = await reveals(network, opened, "AttestationRevealed", 6)
        sketches = {item.arguments["stage"]: item.arguments["sketch"] for item in staged}
        liar = readies[2].node
        for item in attested:
            if item.arguments["node"] == liar:
                continue
            distance = await network.client.call(
                "OutputVerification", "sketchDistance", item.arguments["sketch"], sketches[item.arguments["stage"]]
            )
            assert (distance > 500) == (item.arguments["stage"] == 1), (item.arguments["stage"], distance)


def sealed_with_invented_inputs(store: EvidenceStore, executor: StageExecutor) -> Callable[..., None]:
    """EvidenceStore.seal of a node that serves honestly and then claims, and executes honestly, other inputs."""
    seal = store.seal

    def seal_something_else(request: bytes, stage: int, result: StageResult) -> None:
        session = executor.new_session(64)
        sketch, builder = new_sketch(sketch_seed(RequestId(request), stage), executor), EvidenceBuilder()
        for step in store.steps(request, stage).steps:
            encoding, data = store.step_input(request, stage, step.step)
            invented = (np.frombuffer(data, "<f4") * np.float32(1.5)).tobytes()
            session.truncate(step.position)
            output = executor.forward(session, decode_input(executor, invented, step.rows), position=step.position)
            payload = activation_codec.encode(TensorEncoding.RAW_FLOAT32, output)
            digests = (step_digest(item, step.position, step.rows) for item in (invented, payload))
            leaf = builder.add(step.rows, *digests, sketch.add(output.detach().numpy()), position=step.position)
            store.add_step(request, stage, leaf, encoding, invented, payload)
        root = builder.finish().root
        seal(request, stage, StageResult(root, sketch.value(), result.salt, result.output_tokens))

    return seal_something_else


def handing_on_other_rows(runtime: ShardRuntime, change: Callable[[npt.NDArray[np.float32]], Any]) -> Any:
    """ShardRuntime.step of a node that computes and sketches honestly, and hands other rows on."""
    step = runtime.step

    async def step_and_lie(*given: Any, write: Any, deliver: Any, **named: Any) -> StepOutput:
        output = await step(*given, **named)
        payload = change(np.frombuffer(output.payload, "<f4").copy()).astype("<f4").tobytes()
        digest = step_digest(payload, output.position, output.rows)
        output = dataclasses.replace(output, payload=payload, digest=digest)
        write(output)
        deliver(output)
        return output

    return step_and_lie


@pytest.mark.parametrize("share", [0.003, 0.3], ids=["as int8 weights would", "rubbish"])
async def test_stage_that_sketches_honestly_and_hands_on_other_rows_has_a_sketch_that_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    async with running_network(tmp_path) as network:
        names = ("a", "b", "c", "d")
        await network.until_active(*[(await network.start_node(name))[1].node for name in names])
        plan = await network.publish_plan([("a", 0, 2), ("b", 2, 4), ("c", 4, 6)])
        generator = np.random.default_rng(1)
        liar = network.services["b"].runtime
        assert liar is not None
        monkeypatch.setattr(
            liar,
            "step",
            handing_on_other_rows(liar, lambda rows: rows * (1 + share * generator.standard_normal(rows.shape))),
        )
        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a", "b", "c"))
        assert answer.ended is not None, answer.rejected
        await network.draw(opened)
        await near_their_own_commitment(network, opened, answer, 3, far={1})


async def near_their_own_commitment(
    network: Network, opened: OpenedRequest, answer: Answer, stages: int, far: Container[int] = ()
) -> None:
    """Everybody attests the answer's number of tokens. All members' sketches lie within the honest radius of the
    executor's, those of the stages `far` beyond 2 tau and still as near to one another as those of the rows inside.
    """
    attested = await reveals(network, opened, "AttestationRevealed", stages * (len(network.services) - 1))
    staged = {
        item.arguments["stage"]: item.arguments for item in await reveals(network, opened, "StageRevealed", stages)
    }
    for stage, own in staged.items():
        found = [item.arguments for item in attested if item.arguments["stage"] == stage]
        assert {own["outputTokens"], *(item["outputTokens"] for item in found)} == {len(answer.tokens)}
        for item in found:
            away = distance(bytes(item["sketch"]), bytes(own["sketch"]))
            assert away > 256 if stage in far else away <= 64, (stage, away)
            for name in ("sketch", "innerSketch"):
                assert distance(bytes(item[name]), bytes(found[0][name])) <= 64, (stage, name)


def copying_the_output(duties: Reexecution) -> Callable[..., Any]:
    """Reexecution's work of a member that sketches what the executor shows instead of executing the stage."""
    execute = duties._execute

    async def copy(case: Any, stage: int, model: ModelId, fetched: FetchedEvidence) -> StageResult:
        if not fetched.outputs:
            return await execute(case, stage, model, fetched)
        served = case.route[stage]
        runtime = duties._runtime
        executor = await runtime.executor(model, served.first_unit, served.end_unit)
        sketch = new_sketch(sketch_seed(case.request_id, stage), executor)
        width = case.manifest.row_width(served.end_unit)
        inside = inner_sketch(inner_sketch_seed(case.request_id, stage, case.entropy), executor, width)
        for data in fetched.outputs:
            rows = np.frombuffer(data, "<f4").reshape(-1, width)
            sketch.add(rows)
            inside.add(rows)
        runtime.release(executor)
        return StageResult(inside.value(), sketch.value(), bytes(32), fetched.output_tokens)

    return copy


async def tally_round(network: Network, opened: OpenedRequest, round_: int) -> None:
    """Judge each disputed stage by the first member that finds a quorum, once all have revealed."""
    anyone = Submitter(network.client, network.requester)

    async def judged(stage: int) -> bool:
        view = await network.client.call("OutputVerification", "verificationOf", opened.id)
        record = await network.client.call("OutputVerification", "stageRecordOf", opened.id, stage)
        if view.round != round_ or view.phase == Phase.CHALLENGEABLE or not record.disputed:
            return True
        members = await network.client.call("OutputVerification", "membersOf", opened.id, round_, stage)
        for medoid in range(len(members)):
            # Refused until all have revealed, and of a member that has no quorum.
            with suppress(ContractError):
                await anyone.submit("OutputVerification", "tally", opened.id, stage, medoid)
                return True
        return False

    for stage in range(3):
        await until(lambda stage=stage: judged(stage), f"tally of stage {stage} in round {round_}")  # type: ignore[misc]


async def test_member_that_copies_what_it_is_shown_loses_stake_and_nobody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_network(tmp_path) as network:
        names = ("a", "b", "c", "d")
        nodes = {name: (await network.start_node(name))[1].node for name in names}
        await network.until_active(*nodes.values())
        before = {name: await network.client.call("NodeRegistry", "stakeOf", node) for name, node in nodes.items()}
        plan = await network.publish_plan([("a", 0, 2), ("b", 2, 4), ("c", 4, 6)])
        lazy = network.services["d"].reexecution
        assert lazy is not None
        monkeypatch.setattr(lazy, "_execute", copying_the_output(lazy))
        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a", "b", "c"))
        await network.draw(opened)
        attested = await reveals(network, opened, "AttestationRevealed", 9)
        staged = {item.arguments["stage"]: item for item in await reveals(network, opened, "StageRevealed", 3)}
        for item in attested:
            values, own = item.arguments, staged[item.arguments["stage"]].arguments
            assert distance(bytes(values["sketch"]), bytes(own["sketch"])) <= 64, "the copy is as near as the computed"
            assert values["outputTokens"] == len(answer.tokens)
        await tally_round(network, opened, 1)
        assert (await network.client.call("OutputVerification", "verificationOf", opened.id)).round == 2
        await tally_round(network, opened, 2)
        view = await network.client.call("OutputVerification", "verificationOf", opened.id)
        assert view.phase == Phase.CHALLENGEABLE, "the executors did their work"
        for name, node in nodes.items():
            stake = await network.client.call("NodeRegistry", "stakeOf", node)
            assert (stake < before[name]) == (name == "d"), name


async def test_executor_that_invents_its_inputs_has_no_valid_evidence_and_loses_its_stake_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_network(tmp_path) as network:
        names = ("a", "b", "c", "d")
        nodes = {name: (await network.start_node(name))[1].node for name in names}
        await network.until_active(*nodes.values())
        plan = await network.publish_plan([("a", 0, 2), ("b", 2, 4), ("c", 4, 6)])
        attested: dict[tuple[int, str], StageResult] = {}
        for name in names:
            store = network.services[name].evidence
            assert store is not None

            def save(
                request: bytes, round_: int, stage: int, result: StageResult, name: str = name, store: Any = store
            ) -> StageResult:
                attested[stage, name] = result
                return EvidenceStore.save_attestation(store, request, round_, stage, result)

            monkeypatch.setattr(store, "save_attestation", save)
        liar = network.services["b"].evidence
        assert liar is not None
        weights = WeightStore(next(network.cache.glob("models/*/*/manifest.json")).parent)
        monkeypatch.setattr(liar, "seal", sealed_with_invented_inputs(liar, StageExecutor(weights, 2, 4)))

        opened = await network.open_request(plan, PROMPT, GREEDY)
        answer = await network.ask(opened, ("a", "b", "c"))
        assert answer.tokens == whole_model_answer(network, PROMPT, GREEDY.maximum_tokens), "it serves honestly"
        await network.draw(opened)
        seats = {(stage, name) for stage in range(3) for name in names if name != "abc"[stage]}

        async def all_attested() -> bool:
            return attested.keys() == seats

        await until(all_attested, "every member attested every stage")
        for (stage, name), result in attested.items():
            expected = (ZERO_HASH, 0) if stage == 1 else (result.evidence_root, len(answer.tokens))
            assert (result.evidence_root, result.output_tokens) == expected, (stage, name)
            assert (result.evidence_root == ZERO_HASH) == (stage == 1)

        async def proven_on_chain() -> bool:
            return bool(await network.stage_events(opened, "ContradictionProven"))

        await until(proven_on_chain, "contradiction reported")
        stores = [service.evidence for service in network.services.values()]

        async def all_reported() -> bool:
            return all(store is not None and not store.contradicted_requests() for store in stores)

        await until(all_reported, "nothing left to report")
        proven = await reveals(network, opened, "ContradictionProven", 1)
        assert {item.arguments["node"] for item in proven} == {nodes["b"]}
        for name, node in nodes.items():
            stake = await network.client.call("NodeRegistry", "stakeOf", node)
            assert (stake == 0) == (name == "b"), (name, stake)
        # The committee that sits goes on; nobody tallies here, so the deposit comes back after the deadline.
        request = await network.client.call("InferenceEscrow", "requestOf", opened.id)
        await network.anvil.pass_time(request.deadline - (await network.client.head()).timestamp + 1)
        await Submitter(network.client, network.requester).submit("InferenceEscrow", "claimRefund", opened.id)
        request = await network.client.call("InferenceEscrow", "requestOf", opened.id)
        assert request.status == RequestStatus.REFUNDED


async def test_peer_that_is_gone_is_reported_to_the_requester_and_the_node_lives(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await network.publish_plan([("a", 0, 3), ("b", 3, 6)])
        opened = await network.open_request(plan, PROMPT, GREEDY)
        await network.open_sessions(opened, ("a", "b"))
        network.services["b"].stop()
        await network.until_refused("b")
        async with network.stub("a") as stub:
            call = stub.Forward(timeout=30)
            await call.write(network.prompt_frame(opened))
            answer = await read_answer(call)
            call.cancel()
            assert answer.rejected is not None
            assert answer.rejected.reason == common_pb2.ERROR_REASON_PEER_UNAVAILABLE
            second = await network.open_request(plan, PROMPT, GREEDY)
            await stub.OpenSession(network.session_request(second, 0), timeout=20)
