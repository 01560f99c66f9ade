"""Everything a stranger can send: each gets its reason, and the node goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from bsns.protocol.commitments import content_digest, step_digest, token_bytes
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.typed_data import EVIDENCE_QUERY, signing_digest
from bsns.v1 import common_pb2, execution_pb2
from node_client.errors import ErrorReason, PortInUseError, SettingsError
from node_client.peers import PEER_PROOF_KEY, make_peer_proof
from node_client.service import NodeService, open_keystore
from tests.integration.node_fixtures import (
    Network,
    OpenedRequest,
    named_key,
    read_answer,
    running_network,
    short_terms,
)

pytestmark = [pytest.mark.chain, pytest.mark.asyncio(loop_scope="module")]

PROMPT = (5, 17, 60)
SHORT = SamplingParameters(maximum_tokens=4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def network(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Network]:
    """Two nodes, one plan of two stages; shared, since no bad input may change anything."""
    async with running_network(tmp_path_factory.mktemp("network"), short_terms(sampling_rate_bps=0)) as running:
        readies = [(await running.start_node(name))[1] for name in ("a", "b")]
        await running.until_active(*(ready.node for ready in readies))
        plan = await running.publish_plan([("a", 0, 3), ("b", 3, 6)])
        running.plan = plan
        yield running


async def routed(network: Network, **changed: Any) -> OpenedRequest:
    values = {"prompt": PROMPT, "sampling": SHORT, **changed}
    return await network.open_request(
        network.plan, values["prompt"], values["sampling"], route=values.get("route", True)
    )


def error_info(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo.reason of a failed call."""
    details = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
    assert details, error.details()
    status = status_pb2.Status.FromString(details[0])
    assert status.code == error.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "bsns"
    return str(info.reason)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status code and ErrorInfo.reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), error_info(raised.value)


async def rejected(network: Network, name: str, *messages: Any, metadata: Any = None) -> Any:
    """Reason of the first rejection on a stream that sends `messages`."""
    async with network.stub(name) as stub:
        call = stub.Forward(timeout=30, metadata=metadata)
        for message in messages:
            await call.write(message)
        answer = await read_answer(call)
        call.cancel()
        assert answer.rejected is not None
        return answer.rejected.reason


async def still_serves(network: Network) -> None:
    answer = await network.ask(await routed(network), ("a", "b"))
    assert answer.ended is not None
    assert answer.tokens


async def test_session_for_a_wrong_token_stage_opening_or_status_is_refused(network: Network) -> None:
    opened = await routed(network)
    good = network.session_request(opened, 0)

    def changed(**fields: Any) -> execution_pb2.OpenSessionRequest:
        request = execution_pb2.OpenSessionRequest()
        request.CopyFrom(good)
        for name, value in fields.items():
            part, _, leaf = name.rpartition("__")
            target = getattr(request, part) if part else request
            if isinstance(value, bytes | int):
                setattr(target, leaf, value)
            else:
                getattr(target, leaf).CopyFrom(value)
        return request

    unrouted = await routed(network, route=False)
    foreign = await routed(network)
    cases = [
        (changed(request_id=b"short"), "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        (changed(request_id=b"\x09" * 32), "FAILED_PRECONDITION", "REQUEST_NOT_ROUTED"),
        (changed(stage=1), "FAILED_PRECONDITION", "WRONG_STAGE"),
        (changed(stage=4_000_000_000), "FAILED_PRECONDITION", "WRONG_STAGE"),
        (
            changed(token=network.token(opened, signer=named_key("stranger"))),
            "UNAUTHENTICATED",
            "SESSION_TOKEN_INVALID",
        ),
        (changed(token=network.token(foreign)), "UNAUTHENTICATED", "SESSION_TOKEN_INVALID"),
        (changed(token=network.token(opened, lifetime=-5)), "UNAUTHENTICATED", "SESSION_TOKEN_EXPIRED"),
        (changed(token=network.token(opened, lifetime=10**7)), "UNAUTHENTICATED", "SESSION_TOKEN_INVALID"),
        (changed(token__signature=b"\x01" * 64), "UNAUTHENTICATED", "SESSION_TOKEN_INVALID"),
        (changed(input__salt=b"\x01" * 32), "INVALID_ARGUMENT", "INPUT_COMMITMENT_MISMATCH"),
        (changed(input__prompt_tokens=4), "INVALID_ARGUMENT", "INPUT_COMMITMENT_MISMATCH"),
        (changed(input__prompt_digest=b""), "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        (
            changed(input__sampling=common_pb2.SamplingParameters(temperature=float("nan"))),
            "INVALID_ARGUMENT",
            "MALFORMED_MESSAGE",
        ),
        (network.session_request(unrouted, 0), "FAILED_PRECONDITION", "REQUEST_NOT_ROUTED"),
    ]
    async with network.stub("a") as stub:
        for request, code, reason in cases:
            got = await refused(stub.OpenSession(request, timeout=20))
            assert got == (grpc.StatusCode[code], f"ERROR_REASON_{reason}"), request
        first = await stub.OpenSession(good, timeout=20)
        assert await stub.OpenSession(good, timeout=20) == first, "opening is idempotent"
    await still_serves(network)


async def test_session_beyond_the_context_or_the_cache_is_refused(network: Network) -> None:
    long = await routed(network, sampling=SamplingParameters(maximum_tokens=64))
    async with network.stub("a") as stub:
        got = await refused(stub.OpenSession(network.session_request(long, 0), timeout=20))
        assert got == (grpc.StatusCode.OUT_OF_RANGE, "ERROR_REASON_CONTEXT_LIMIT")
    await network.start_node("small", cache_memory_bytes=64)
    await network.until_active(network.services["small"].ready.node)  # type: ignore[union-attr]
    old, network.plan = network.plan, await network.publish_plan([("small", 0, 3), ("b", 3, 6)])
    try:
        opened = await routed(network)
        async with network.stub("small") as stub:
            got = await refused(stub.OpenSession(network.session_request(opened, 0), timeout=20))
            assert got == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ERROR_REASON_CAPACITY_EXHAUSTED")
    finally:
        network.plan = await network.publish_plan([("a", 0, 3), ("b", 3, 6)])
        assert network.plan.root == old.root


async def test_prompt_frames_that_are_no_prompt_are_rejected_and_the_right_one_still_runs(network: Network) -> None:
    opened = await routed(network)
    await network.open_sessions(opened, ("a", "b"))
    other = token_bytes((1, 2, 3))
    outside = token_bytes((1, 2, 96 + 1))
    cases: list[tuple[dict[str, Any], int]] = [
        ({"request_id": b"\x01" * 32}, ErrorReason.ERROR_REASON_UNKNOWN_SESSION),
        ({"stage": 7}, ErrorReason.ERROR_REASON_UNKNOWN_SESSION),
        ({"rows": 2}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"rows": 4_000_000_000}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"position": 1}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"encoding": common_pb2.TENSOR_ENCODING_RAW_FLOAT32}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"encoding": 99}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"payload": token_bytes(PROMPT)[:-1]}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"payload": token_bytes(PROMPT) * 2}, ErrorReason.ERROR_REASON_MALFORMED_TENSOR),
        ({"payload": b"\x00" * (2**20 + 1)}, ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE),
        ({"payload": other}, ErrorReason.ERROR_REASON_DIGEST_MISMATCH),
        ({"payload": other, "digest": content_digest(other)}, ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH),
        ({"payload": outside, "digest": content_digest(outside)}, ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH),
        ({"digest": b""}, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE),
        ({"frame_count": 0}, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE),
        ({"frame_count": 4_000_000_000}, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE),
        ({"frame_index": 3}, ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER),
        ({"step": 1, "rows": 1, "position": 3}, ErrorReason.ERROR_REASON_SIGNATURE_INVALID),
        ({"step": 4_000_000_000}, ErrorReason.ERROR_REASON_SIGNATURE_INVALID),
    ]
    for changed, reason in cases:
        assert await rejected(network, "a", network.prompt_frame(opened, **changed)) == reason, changed
    assert await rejected(network, "a", execution_pb2.ForwardRequest()) == ErrorReason.ERROR_REASON_MALFORMED_MESSAGE
    async with network.stub("a") as stub:
        call = stub.Forward(timeout=30)
        await call.write(network.prompt_frame(opened))
        answer = await read_answer(call)
        call.cancel()
        assert answer.ended is not None


async def test_activations_of_a_stranger_or_rubbish_of_a_peer_are_rejected(network: Network) -> None:
    opened = await routed(network)
    await network.open_sessions(opened, ("a", "b"))
    rows, width = len(PROMPT), network.manifest.row_width(1)
    rubbish = b"\xff" * (4 * rows * width)  # NaN

    def frame(payload: bytes, **changed: Any) -> execution_pb2.ForwardRequest:
        return network.prompt_frame(
            opened,
            **{
                "stage": 1,
                "encoding": common_pb2.TENSOR_ENCODING_RAW_FLOAT32,
                "payload": payload,
                "digest": step_digest(payload, changed.get("position", 0), changed.get("rows", rows)),
                **changed,
            },
        )

    receiver = network.services["b"].ready
    assert receiver is not None
    peer = open_keystore(network.settings("a")).node_signer()

    def proof(signer: Any, deadline: int | None = None) -> tuple[tuple[str, bytes]]:
        until = int(time.time()) + 30 if deadline is None else deadline
        return ((PEER_PROOF_KEY, make_peer_proof(network.domains.registry, signer, receiver.node, until)),)

    invalid = ErrorReason.ERROR_REASON_SIGNATURE_INVALID
    assert await rejected(network, "b", frame(rubbish)) == invalid, "no proof"
    assert await rejected(network, "b", frame(rubbish), metadata=proof(named_key("stranger"))) == invalid
    malformed = ErrorReason.ERROR_REASON_MALFORMED_TENSOR
    assert await rejected(network, "b", frame(rubbish), metadata=proof(peer)) == malformed
    assert await rejected(network, "b", frame(rubbish[:-4]), metadata=proof(peer)) == malformed
    late = frame(b"\x00" * 4 * width, step=2, rows=1, position=rows + 1)
    assert await rejected(network, "b", late, metadata=proof(peer)) == ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER
    end = execution_pb2.ForwardRequest(end=execution_pb2.EndOfSession(request_id=opened.id, stage=1, steps=0))
    assert await rejected(network, "b", end, metadata=proof(peer)) == ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER
    assert await rejected(network, "b", end) == invalid
    async with network.stub("b") as stub:
        for bad in (((PEER_PROOF_KEY, b"rubbish"),), proof(peer, int(time.time()) - 10_000)):
            call = stub.Forward(timeout=30, metadata=bad)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
    await still_serves(network)


async def send_and_read(call: Any, payload: bytes) -> None:
    await call.write(payload)
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_bytes_that_are_no_message_and_messages_too_large_break_only_their_stream(network: Network) -> None:
    ready = network.services["a"].ready
    assert ready is not None
    for payload in (b"\xff\xff\xff rubbish", b"\x00" * (5 * 2**20)):
        async with grpc.aio.insecure_channel(ready.endpoint) as channel:
            call = channel.stream_stream("/bsns.v1.ShardExecution/Forward")(timeout=20)
            with pytest.raises(grpc.aio.AioRpcError):
                await send_and_read(call, payload)
    await still_serves(network)


async def test_evidence_for_strangers_is_refused_and_for_the_requester_has_no_inputs(network: Network) -> None:
    opened = await routed(network)
    assert (await network.ask(opened, ("a", "b"))).ended is not None

    def query(signer: Any, *, inputs: bool, lifetime: int = 60) -> execution_pb2.GetStageEvidenceRequest:
        deadline = int(time.time()) + lifetime
        digest = signing_digest(network.domains.verification, EVIDENCE_QUERY, (opened.id, 0, max(0, deadline)))
        return execution_pb2.GetStageEvidenceRequest(
            request_id=opened.id,
            stage=0,
            deadline=deadline,
            signature=signer.sign_digest(digest),
            with_inputs=inputs,
        )

    async with network.stub("a") as stub:
        for request, code in (
            (query(named_key("stranger"), inputs=False), grpc.StatusCode.PERMISSION_DENIED),
            (query(network.requester, inputs=True), grpc.StatusCode.PERMISSION_DENIED),
            (query(network.requester, inputs=False, lifetime=-10), grpc.StatusCode.PERMISSION_DENIED),
            (query(network.requester, inputs=False, lifetime=10**6), grpc.StatusCode.PERMISSION_DENIED),
            (execution_pb2.GetStageEvidenceRequest(request_id=b"x"), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.GetStageEvidence(request, timeout=20).read()
            assert raised.value.code() == code
        messages = [item async for item in stub.GetStageEvidence(query(network.requester, inputs=False), timeout=20)]
        assert [item.WhichOneof("body") for item in messages] == ["evidence"]
        neighbour = open_keystore(network.settings("b")).node_signer()
        messages = [item async for item in stub.GetStageEvidence(query(neighbour, inputs=True), timeout=20)]
        inputs = b"".join(item.input.payload for item in messages[1:] if item.input.step == 0)
        assert inputs == token_bytes(PROMPT)
        assert messages[0].evidence.neighbour_statements


async def test_preparing_what_is_not_there_is_refused(network: Network) -> None:
    async with network.stub("a") as stub:
        for model, first, end, reason in (
            (b"\x01" * 32, 0, 1, "WEIGHTS_UNAVAILABLE"),
            (network.model_id, 2, 2, "WRONG_PLAN"),
            (network.model_id, 0, 99, "WRONG_PLAN"),
            (b"", 0, 1, "MALFORMED_MESSAGE"),
        ):
            request = execution_pb2.PrepareShardRequest(model_id=model, first_unit=first, end_unit=end)
            _, got = await refused(stub.PrepareShard(request, timeout=20).read())
            assert got == f"ERROR_REASON_{reason}"
        request = execution_pb2.PrepareShardRequest(model_id=network.model_id, first_unit=1, end_unit=3)
        progress = [item async for item in stub.PrepareShard(request, timeout=20)]
        assert progress[-1].ready
        assert progress[-1].bytes_done == progress[-1].bytes_total


async def reason_of_refusal(network: Network) -> int | None:
    """Why one more request fails; None if it does not."""
    try:
        answer = await network.ask(await routed(network), ("a", "b"))
    except grpc.aio.AioRpcError as error:
        return int(ErrorReason.Value(error_info(error)))
    return None if answer.rejected is None else int(answer.rejected.reason)


async def test_disk_full_while_evidence_is_stored_rejects_the_session_and_the_node_lives(network: Network) -> None:
    opened = await routed(network)
    await network.open_sessions(opened, ("a", "b"))
    evidence = network.services["b"].evidence
    assert evidence is not None
    pages = evidence._database.execute("PRAGMA page_count").fetchone()[0]
    evidence._database.execute(f"PRAGMA max_page_count = {pages}")
    try:
        for _ in range(40):
            reason = await reason_of_refusal(network)
            if reason is not None:
                assert reason == ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED
                break
        else:
            pytest.fail("the disk never filled")
    finally:
        evidence._database.execute("PRAGMA max_page_count = 1000000")
    await still_serves(network)


async def test_jailed_or_unknown_node_refuses_sessions(network: Network) -> None:
    opened = await routed(network)
    node = network.services["a"].ready
    assert node is not None
    verification = network.deployment.output_verification
    await network.anvil.rpc("anvil_impersonateAccount", verification)
    await network.fund(verification)
    snapshot = await network.anvil.rpc("evm_snapshot")
    data = network.client._contracts["NodeRegistry"].encode_abi("jail", args=[node.node, 2**63])
    await network.anvil.rpc(
        "eth_sendTransaction", {"from": verification, "to": network.deployment.node_registry, "data": data}
    )
    try:
        deadline = time.monotonic() + 20
        while await network.client.call("NodeRegistry", "statusOf", node.node) != 3:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        async with network.stub("a") as stub:
            got = await refused(stub.OpenSession(network.session_request(opened, 0), timeout=20))
            assert got == (grpc.StatusCode.FAILED_PRECONDITION, "ERROR_REASON_NODE_NOT_ACTIVE")
    finally:
        await network.anvil.rpc("evm_revert", snapshot)
        await network.anvil.rpc("anvil_stopImpersonatingAccount", verification)


async def test_second_node_on_a_port_or_folder_in_use_says_so(network: Network) -> None:
    ready = network.services["a"].ready
    assert ready is not None
    with pytest.raises(PortInUseError, match="in use"):
        await NodeService(network.settings("c", listen=ready.endpoint)).run(lambda _: None)
    with pytest.raises(SettingsError, match="one folder belongs to one process"):
        await NodeService(network.settings("a")).run(lambda _: None)


async def test_chain_out_of_reach_is_answered_unavailable(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await routed(network)
    service = network.services["a"]
    assert service.chain is not None
    provider = service.chain.client._web3.provider
    monkeypatch.setattr(provider, "endpoint_uri", "http://127.0.0.1:9")
    async with network.stub("a") as stub:
        got = await refused(stub.OpenSession(network.session_request(opened, 0), timeout=20))
        assert got == (grpc.StatusCode.UNAVAILABLE, "ERROR_REASON_CHAIN_UNAVAILABLE")
    monkeypatch.undo()
    await still_serves(network)
