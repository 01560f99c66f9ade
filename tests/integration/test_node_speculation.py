"""Prompt lookup through the ring: no answer changes, the committee agrees, and nobody gains by claiming what was not
drawn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from bsns.protocol.commitments import MAXIMUM_DRAFTS, MAXIMUM_SHOWN_PROMPT, SPARE_DRAFTS, step_digest, token_bytes
from bsns.protocol.identifiers import ZERO_HASH
from bsns.protocol.sampling import SamplingParameters, draw
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.weight_store import WeightStore
from bsns.v1 import common_pb2, execution_pb2
from node_client import session_store
from node_client.errors import ErrorReason
from node_client.peers import PEER_PROOF_KEY, make_peer_proof
from node_client.pipeline import Pipeline
from node_client.prompt_lookup import Drawn, SpeculatedAnswer
from node_client.service import open_keystore
from tests.integration.node_fixtures import (
    Answer,
    Network,
    OpenedRequest,
    read_answer,
    running_network,
    short_terms,
    until,
)
from tests.integration.test_node_bad_inputs import refused
from tests.integration.test_node_ring import near_their_own_commitment, reveals

pytestmark = [pytest.mark.chain, pytest.mark.slow]

# The tiny model's answers to these repeat themselves in part, so that some drafts are right and some are wrong.
GREEDY = ((40, 4) * 3, SamplingParameters(maximum_tokens=30))
SAMPLED = ((89, 62, 63) * 5 + (89, 62), SamplingParameters(temperature=0.3, seed=84, maximum_tokens=30))
CUTS = {1: (0, 6), 2: (0, 3, 6), 3: (0, 2, 4, 6)}


def one_process(network: Network, prompt: Sequence[int], sampling: SamplingParameters) -> list[int]:
    """The answer of the whole model in one process, drawn token by token."""
    store = WeightStore(next(network.cache.glob("models/*/*/manifest.json")).parent)
    executor = StageExecutor(store, 0, len(store.manifest.units))
    session = executor.new_session(len(prompt) + sampling.maximum_tokens)
    rows, answer = torch.tensor(prompt), list[int]()
    while len(answer) < sampling.maximum_tokens and not (answer and answer[-1] in store.manifest.end_token_ids):
        logits = executor.forward(session, rows, position=session.position)[-1].numpy()
        answer.append(draw(logits, sampling, len(answer)))
        rows = torch.tensor(answer[-1:])
    return answer


async def planned(network: Network, names: Sequence[str]) -> Any:
    cuts = CUTS[len(names)]
    return await network.publish_plan([(name, cuts[at], cuts[at + 1]) for at, name in enumerate(names)])


async def answered(network: Network, plan: Any, names: Sequence[str], asked: Any) -> tuple[OpenedRequest, Answer]:
    opened = await network.open_request(plan, *asked)
    answer = await network.ask(opened, names)
    assert answer.ended is not None, answer.rejected
    assert (answer.ended.steps, answer.ended.tokens) == (len(answer.outputs), len(answer.tokens))
    return opened, answer


async def test_answers_with_drafts_are_those_of_one_process_through_one_two_and_three_stages(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b", "c")]
        readies.append((await network.start_node("plain", speculation_tokens=0))[1])
        await network.until_active(*(ready.node for ready in readies))
        expected = [one_process(network, *asked) for asked in (GREEDY, SAMPLED)]
        for names in (("a",), ("a", "b"), ("a", "b", "c"), ("a", "plain")):
            plan = await planned(network, names)
            for asked, tokens in zip((GREEDY, SAMPLED), expected, strict=True):
                _, answer = await answered(network, plan, names, asked)
                assert answer.tokens == tokens, names
                if names[-1] == "plain":
                    assert (answer.drafted, len(answer.outputs)) == (0, len(tokens))
                    continue
                assert answer.accepted > 5, "hardly any draft was right"
                assert answer.drafted - answer.accepted > 5, "hardly any draft was wrong"
                assert len(answer.outputs) == len(tokens) - answer.accepted, "each draft that is right saves a step"


async def test_committee_executes_rejected_drafts_too_and_agrees(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b", "c", "d")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "abc")
        for asked in (GREEDY, SAMPLED):
            opened, answer = await answered(network, plan, "abc", asked)
            assert 0 < answer.accepted < answer.drafted
            await network.draw(opened)
            await near_their_own_commitment(network, opened, answer, 3)


class CredulousAnswer(SpeculatedAnswer):
    """Takes its first draft for drawn, whatever the logits say: a longer answer for less work."""

    def take(self, logits: Any, most_drafts: int) -> Drawn:
        if self.drafts:
            logits = logits.copy()
            logits[0, self.drafts[0]] = np.inf if self._sampling.is_greedy else 1e4
        return super().take(np.nan_to_num(logits, posinf=1e9), most_drafts)


@pytest.mark.parametrize("asked", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_last_stage_that_accepts_a_draft_which_is_not_the_draw_has_a_sketch_that_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b", "c")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "ab")
        monkeypatch.setattr(session_store, "SpeculatedAnswer", CredulousAnswer)
        opened, answer = await answered(network, plan, "ab", asked)
        assert answer.tokens != one_process(network, *asked), "the lie is to change the answer"
        await network.draw(opened)
        await near_their_own_commitment(network, opened, answer, 2, far={1})


class WastefulAnswer(SpeculatedAnswer):
    """Drafts what is never right, so that the others compute for nothing."""

    def take(self, logits: Any, most_drafts: int) -> Drawn:
        drawn = super().take(logits, 0)
        left = self._sampling.maximum_tokens - self.count - 1
        wrong = 0 if drawn.tokens[-1] else 1
        self.drafts = (wrong,) * min(MAXIMUM_DRAFTS, left)
        return Drawn(drawn.tokens, self.drafts)


async def test_last_stage_that_drafts_for_nothing_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "ab")
        monkeypatch.setattr(session_store, "SpeculatedAnswer", WastefulAnswer)
        opened = await network.open_request(plan, *GREEDY)
        answer = await network.ask(opened, "ab")
        assert answer.rejected is not None
        assert answer.rejected.reason == ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED
        assert "must draft less" in answer.rejected.detail
        assert answer.drafted - answer.accepted <= len(answer.tokens) + SPARE_DRAFTS


async def test_last_stage_whose_outputs_do_not_open_its_digests_has_no_valid_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_network(tmp_path) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b", "c")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "ab")
        store = network.services["b"].evidence
        assert store is not None
        shown = store.step_output
        for lie in (
            lambda request, stage, step: None,
            lambda request, stage, step: (shown(request, stage, step) or b"") + token_bytes([3]) * (step == 1),
            lambda request, stage, step: b"" if step == 2 else shown(request, stage, step),
            lambda request, stage, step: token_bytes([3]) if step == 3 else shown(request, stage, step),
        ):
            monkeypatch.setattr(store, "step_output", lie)
            opened, answer = await answered(network, plan, "ab", GREEDY)
            await network.draw(opened)
            for item in await reveals(network, opened, "AttestationRevealed", 4):
                found = item.arguments["innerSketch"] == ZERO_HASH, item.arguments["outputTokens"]
                assert found == ((True, 0) if item.arguments["stage"] == 1 else (False, len(answer.tokens)))


async def test_close_between_drafts_ends_every_stage_with_the_tokens_that_were_drawn(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        readies = [(await network.start_node(name, requester_reconnect_seconds=0.3))[1] for name in ("a", "b", "c")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "abc")
        expected = one_process(network, *GREEDY)
        for wanted in (1, 5, 9, 14):
            opened = await network.open_request(plan, *GREEDY)
            await network.open_sessions(opened, "abc")
            async with network.stub("a") as stub:
                call = stub.Forward(timeout=30)
                await call.write(network.prompt_frame(opened))
                answer = await read_answer(call, stop_after=wanted)
                closing = execution_pb2.CloseSessionRequest(request_id=opened.id, token=network.token(opened))
                closed = await stub.CloseSession(closing, timeout=20)
                await read_answer(call, before=answer)
                call.cancel()
            assert answer.ended is not None
            assert answer.ended.finish_reason == common_pb2.FINISH_REASON_CANCELLED
            assert answer.ended.steps == closed.steps == len(answer.outputs)
            assert answer.ended.tokens == len(answer.tokens)
            assert answer.tokens == expected[: len(answer.tokens)]
            await network.draw(opened)
            for item in await reveals(network, opened, "StageRevealed", 3):
                assert item.arguments["outputTokens"] == len(answer.tokens)
        # A requester that only goes away ends its session likewise.
        opened = await network.open_request(plan, *GREEDY)
        await network.open_sessions(opened, "abc")
        async with network.stub("a") as stub:
            call = stub.Forward(timeout=30)
            await call.write(network.prompt_frame(opened))
            answer = await read_answer(call, stop_after=4)
            call.cancel()
        await network.draw(opened)
        tokens = {item.arguments["outputTokens"] for item in await reveals(network, opened, "StageRevealed", 3)}
        assert len(tokens) == 1
        assert min(tokens) >= len(answer.tokens)


class Frozen:
    """Stage 0 that keeps one step's output back until it is let go: so that a session stands still in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
        self.held: tuple[Pipeline, Any, Any] | None = None
        take = Pipeline._take_output

        async def hold(pipeline: Pipeline, session: Any, step: Any) -> None:
            if step.step == at_step and self.held is None:
                self.held = pipeline, session, step
            else:
                await take(pipeline, session, step)

        monkeypatch.setattr(Pipeline, "_take_output", hold)

    def let_go(self) -> None:
        assert self.held is not None
        pipeline, session, step = self.held
        pipeline._post(session, step)


async def test_steps_and_ends_that_cannot_follow_are_refused_and_the_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        readies = {name: (await network.start_node(name))[1] for name in "abc"}
        await network.until_active(*(ready.node for ready in readies.values()))
        plan = await planned(network, "abc")
        # Step 7 has eight drafts, of which the answer keeps two.
        frozen = Frozen(monkeypatch, at_step=8)
        opened = await network.open_request(plan, *GREEDY)
        await network.open_sessions(opened, "abc")

        async def sent_as(sender: str, receiver: str, message: execution_pb2.ForwardRequest) -> int:
            """Reason of the rejection of a message that `sender` sends on a stream of its own."""
            signer = open_keystore(network.settings(sender)).node_signer()
            proof = make_peer_proof(network.domains.registry, signer, readies[receiver].node, int(time.time()) + 30)
            async with network.stub(receiver) as stub:
                call = stub.Forward(timeout=30, metadata=((PEER_PROOF_KEY, proof),))
                await call.write(message)
                answer = await read_answer(call)
                call.cancel()
                assert answer.rejected is not None
                return int(answer.rejected.reason)

        async with network.stub("a") as stub:
            call = stub.Forward(timeout=60)
            await call.write(network.prompt_frame(opened))

            async def stands_still() -> bool:
                return frozen.held is not None

            await until(stands_still, "the last stage's output of step 7")
            assert frozen.held is not None
            _, session, due = frozen.held
            width = network.manifest.row_width(1)

            def frame(stage: int, **changed: Any) -> execution_pb2.ForwardRequest:
                values = {"step": 8, "position": due.position, "rows": due.rows, **changed}
                rows = min(values["rows"], 64)
                payload = due.data if stage == 0 else bytes(4 * width * rows)
                if stage == 0:
                    payload = changed.pop("payload", (due.data + token_bytes([3]) * rows)[: 4 * rows])
                encoding = common_pb2.TENSOR_ENCODING_RAW_FLOAT32 if stage else common_pb2.TENSOR_ENCODING_TOKEN_IDS
                digest = step_digest(payload, values["position"], values["rows"])
                return network.prompt_frame(
                    opened, stage=stage, encoding=encoding, **{**values, "payload": payload, "digest": digest}
                )

            last = session.executed[-1]
            assert (last.rows, due.position - last.position) == (9, 3), "the drafts are other ones than they were"
            late, malformed = ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, ErrorReason.ERROR_REASON_MALFORMED_TENSOR
            changed_step = ErrorReason.ERROR_REASON_DIGEST_MISMATCH
            for sender, receiver, stage in (("c", "a", 0), ("a", "b", 1), ("b", "c", 2)):
                cases: list[tuple[dict[str, int], int]] = [
                    ({"position": last.position}, late),  # keeps nothing of step 7
                    ({"position": last.position - 1}, late),  # takes back what was kept
                    ({"position": last.end + 1}, late),  # keeps more rows than there are
                    ({"position": len(GREEDY[0]) - 1}, malformed),  # goes back into the prompt
                    ({"rows": MAXIMUM_DRAFTS + 2}, malformed),
                    ({"rows": 0}, malformed),
                    ({"rows": 4_000_000_000}, malformed),
                    ({"position": 4_000_000_000}, malformed),
                    ({"position": session.positions - 3, "rows": 4}, malformed),  # beyond the tokens that are left
                    ({"step": 9, "position": last.end + 1}, late),
                    ({"step": 7, "position": last.position, "rows": last.rows}, changed_step),
                    ({"step": 7, "position": last.position, "rows": 1}, changed_step),
                ]
                if stage == 2:
                    cases.append(({"rows": due.rows + 1}, late))  # other drafts than it sent
                    cases.append(({"position": due.position + 1}, late))  # it kept fewer
                    cases.append(({"position": due.position - 1}, late))  # it kept more
                for changed, reason in cases:
                    got = await sent_as(sender, receiver, frame(stage, **changed))
                    assert got == reason, (receiver, changed, common_pb2.ErrorReason.Name(got))
                for steps, tokens in ((8, 99), (8, 1), (7, len(session.tokens)), (9, 9), (0, 0)):
                    end = execution_pb2.EndOfSession(request_id=opened.id, stage=stage, steps=steps, tokens=tokens)
                    got = await sent_as(sender, receiver, execution_pb2.ForwardRequest(end=end))
                    assert got == late, (receiver, steps, tokens)
            outside = frame(0, payload=token_bytes([97] * due.rows))
            assert await sent_as("c", "a", outside) == malformed
            frozen.let_go()
            answer = await read_answer(call)
            call.cancel()
            assert answer.ended is not None, answer.rejected
            assert answer.tokens == one_process(network, *GREEDY)
        _, other = await answered(network, plan, "abc", SAMPLED)
        assert other.tokens == one_process(network, *SAMPLED)


async def test_prompt_that_is_shown_to_the_last_stage_is_the_requests_or_is_refused(tmp_path: Path) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        readies = [(await network.start_node(name))[1] for name in ("a", "b")]
        await network.until_active(*(ready.node for ready in readies))
        plan = await planned(network, "ab")
        opened = await network.open_request(plan, *GREEDY)
        mismatch = (grpc.StatusCode.INVALID_ARGUMENT, "ERROR_REASON_INPUT_COMMITMENT_MISMATCH")
        cases = [
            ("b", 1, token_bytes(GREEDY[0][::-1]), mismatch),
            ("b", 1, token_bytes(GREEDY[0][:-1]), mismatch),
            ("b", 1, token_bytes(GREEDY[0])[:-1], mismatch),
            (
                "b",
                1,
                token_bytes([1] * (MAXIMUM_SHOWN_PROMPT + 1)),
                (grpc.StatusCode.INVALID_ARGUMENT, "ERROR_REASON_MESSAGE_TOO_LARGE"),
            ),
            (
                "a",
                0,
                token_bytes(GREEDY[0]),
                (grpc.StatusCode.INVALID_ARGUMENT, "ERROR_REASON_MALFORMED_MESSAGE"),
            ),
        ]
        for name, stage, prompt, expected in cases:
            request = network.session_request(opened, stage)
            request.prompt = prompt
            async with network.stub(name) as stub:
                assert await refused(stub.OpenSession(request, timeout=20)) == expected, len(prompt)
        # Without it the stage drafts from the answer alone.
        for stage, name in enumerate("ab"):
            request = network.session_request(opened, stage)
            request.prompt = b""
            async with network.stub(name) as stub:
                await stub.OpenSession(request, timeout=20)
        answer = await network.ask(opened, "ab")
        assert answer.tokens == one_process(network, *GREEDY)
        assert len(answer.outputs[0].token_ids) == 1
        repeated = (54, 35) * 5, SamplingParameters(maximum_tokens=12)
        _, shown = await answered(network, plan, "ab", repeated)
        assert shown.tokens == one_process(network, *repeated)
        assert shown.outputs[0].token_ids == [54, 35, 54], "what followed 35, 54 in the prompt"
