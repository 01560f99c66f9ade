"""The whole product on real processes: one verified inference, a dishonest node, a coordinator that is killed.

In one file, so that tests run side by side never start two networks at once.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bsns.protocol.record import VerificationRecord
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.prepare import prepare
from tests.integration.network import run_command, running_network
from tests.unit.runtime_models import embedded_reference, prepared_tiny_model

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a haiku about the sea.",
    'He said "¿cuánto es 17 × 3?" & left; answer him — briefly!',
)
ANSWER_TOKENS = 20
# Every kind of event that moves a request on, in the order in which they come.
STEPS = (
    "RequestOpened",
    "RequestRouted",
    "StageCommitted",
    "CommitmentsComplete",
    "CommitteeDrawn",
    "AttestationCommitted",
    "StageRevealed",
    "AttestationRevealed",
    "StageTallied",
    "VerdictReached",
)
STEP_TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return prepare()


def greedy_tokens(model: Any, prompt: list[int], maximum_tokens: int) -> list[int]:
    """What transformers' own generate gives in one process."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=maximum_tokens,
            do_sample=False,
        )
    return output[0, len(prompt) :].tolist()


@pytest.mark.timeout(420)
async def test_answers_equal_transformers_greedy_and_their_records_verify(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(model_folder)
    model = embedded_reference(model_folder)
    async with running_network(tmp_path, model_folder, node_count=4, stage_count=4) as network:
        for number, prompt in enumerate(PROMPTS):
            record_file = tmp_path / f"record-{number}.json"
            answer = await network.request(prompt, record_file, maximum_tokens=ANSWER_TOKENS)
            prompt_ids = tokenizer.prompt_token_ids(prompt)
            assert answer["prompt_token_ids"] == prompt_ids
            assert answer["token_ids"] == greedy_tokens(model, prompt_ids, ANSWER_TOKENS)
            audited = await network.audit(record_file)
            assert audited.status == 0, audited.output
            record = VerificationRecord.from_bytes(record_file.read_bytes())
            assert record.has_full_evidence
            assert record.conclusion is not None
            assert record.conclusion.accepted
            assert record.payment is not None
            payment = record.payment
            paid = payment.paid_to_executors + payment.paid_to_verifiers + payment.protocol_fee
            assert paid + payment.refunded == record.request.deposit
            assert not record.slashes


@pytest.mark.timeout(420)
async def test_dishonest_node_and_no_other_is_slashed_and_the_requester_refunded(
    model_folder: Path, tmp_path: Path
) -> None:
    dishonest_index = 2

    def node_command(index: int) -> tuple[str, ...]:
        module = "tests.harness.dishonest_node" if index == dishonest_index else "node_client.cli"
        return (sys.executable, "-m", module)

    record_file = tmp_path / "record.json"
    async with running_network(
        tmp_path, model_folder, node_count=4, stage_count=4, node_command=node_command
    ) as network:
        answer = await network.request(PROMPTS[0], record_file, maximum_tokens=6)
        dishonest = network.devnet.nodes[dishonest_index].ready["node"]
        slashed = await network.events("NodeSlashed")
        assert {event.arguments["node"] for event in slashed} == {dishonest}
        (refund,) = await network.events("RequestRefunded")
        record = VerificationRecord.from_bytes(record_file.read_bytes())
        assert refund.arguments["refunded"] == record.request.deposit
        assert refund.arguments["requester"] == record.request.requester
        assert not await network.events("RequestSettled")
        assert record.conclusion is not None
        assert not record.conclusion.accepted
        assert record.route is not None
        blamed = record.route.stages[record.conclusion.blamed_stage]
        assert blamed.node == dishonest
        assert answer["status"].lower() == "refunded"
        audited = await network.audit(record_file)
        assert audited.status == 0, audited.output


@pytest.mark.timeout(420)
async def test_coordinator_killed_after_every_chain_step_settles_exactly_once(tmp_path: Path) -> None:
    """kill -9 of the coordinator between any two chain steps of a request."""
    model_folder = prepared_tiny_model(tmp_path / "model")
    async with running_network(tmp_path / "network", model_folder, node_count=3, stage_count=3) as network:
        command = network.request_command("a b c", tmp_path / "record.json", maximum_tokens=4)
        requesting = asyncio.ensure_future(run_command(command))
        for step in STEPS:
            await network.await_event(step, STEP_TIMEOUT_S, unless=requesting)
            victim = network.devnet.coordinator.process
            victim.send_signal(signal.SIGKILL)
            await victim.wait()
            network.devnet.processes.remove(network.devnet.coordinator)
            await network.devnet.start_coordinator()
        await network.await_event("RequestSettled", STEP_TIMEOUT_S)
        done = await requesting
        assert done.status == 0, done.error
        assert json.loads(done.output)["token_ids"]
        counts = Counter(event.name for event in await network.events())
        assert counts["RequestRouted"] == 1
        assert counts["RequestSettled"] == 1
        assert counts["RequestRefunded"] == 0
        assert counts["RequestConcluded"] == 1
        assert counts["StageTallied"] == counts["StageCommitted"] == 3
        assert (await network.audit(tmp_path / "record.json")).status == 0
    with sqlite3.connect(tmp_path / "network" / "coordinator.sqlite") as database:
        keys = [row[0] for row in database.execute("select key from intents")]
    assert len(keys) == len(set(keys))
