"""The whole product on real processes: a paid, sharded, verified inference with the real language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bsns.protocol.record import VerificationRecord
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.prepare import prepare
from tests.integration.network import running_network
from tests.unit.runtime_models import embedded_reference

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a haiku about the sea.",
    'He said "¿cuánto es 17 × 3?" & left; answer him — briefly!',
)
ANSWER_TOKENS = 20


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
    async with running_network(tmp_path, model_folder, node_count=4) as network:
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
    async with running_network(tmp_path, model_folder, node_count=4, node_command=node_command) as network:
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
