"""A model that is not a decoder, on the whole product in real processes: paid for, verified, audited like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bsns.protocol.commitments import step_digest, token_bytes
from bsns.protocol.record import VerificationRecord
from tests.integration.network import Network, run_command, running_network
from tests.integration.vision_model import LABELS, SKIPPING, save_picture

pytestmark = [pytest.mark.chain, pytest.mark.timeout(420)]


async def classified(network: Network, picture: Path, record: Path) -> dict[str, object]:
    done = await run_command([*network.requester_command(record), "--image", str(picture)])
    assert done.status == 0, done.error
    return json.loads(done.output)


async def test_pictures_get_the_whole_models_labels_and_their_records_verify(tmp_path: Path) -> None:
    folder = SKIPPING.prepared(tmp_path / "cache")
    async with running_network(tmp_path / "network", folder, node_count=3, stage_count=3) as network:
        labels = set()
        for seed in (1, 2):
            picture, record_file = save_picture(tmp_path / f"{seed}.png", seed), tmp_path / f"{seed}.json"
            answer = await classified(network, picture, record_file)
            label = LABELS[SKIPPING.classify(picture)]
            labels.add(label)
            assert answer["text"] == label
            assert answer["token_ids"] == [LABELS.index(label)]
            assert answer["finish_reason"] == "length"
            audited = await network.audit(record_file)
            assert audited.status == 0, audited.output
            record = VerificationRecord.from_bytes(record_file.read_bytes())
            assert record.has_full_evidence
            assert record.conclusion is not None
            assert record.conclusion.accepted
            assert (record.request.prompt_tokens, record.conclusion.output_tokens) == (1, 1)
            assert record.evidence[-1].steps[0].output_digest == step_digest(token_bytes([LABELS.index(label)]), 1, 1)
            assert record.payment is not None
            payment = record.payment
            paid = payment.paid_to_executors + payment.paid_to_verifiers + payment.protocol_fee
            assert paid + payment.refunded == record.request.deposit
            assert not record.slashes
        assert len(labels) == 2, "the pictures were chosen to differ"

        before = len(await network.events("RequestOpened"))
        asked = await run_command([*network.requester_command(tmp_path / "none.json"), "--", "what is this?"])
        assert asked.status == 2
        assert "tiny-classifier classifies images, it takes no text" in asked.error
        unreadable = await run_command([*network.requester_command(tmp_path / "none.json"), "--image", __file__])
        assert unreadable.status == 2
        assert "is no picture that can be read" in unreadable.error
        assert len(await network.events("RequestOpened")) == before == 2


async def test_dishonest_node_of_a_vision_model_and_no_other_is_slashed_and_the_requester_refunded(
    tmp_path: Path,
) -> None:
    folder = SKIPPING.prepared(tmp_path / "cache")
    dishonest_index = 2

    def node_command(index: int) -> tuple[str, ...]:
        module = "tests.harness.dishonest_node" if index == dishonest_index else "node_client.cli"
        return (sys.executable, "-m", module)

    record_file = tmp_path / "record.json"
    async with running_network(
        tmp_path / "network", folder, node_count=4, stage_count=4, node_command=node_command
    ) as network:
        answer = await classified(network, save_picture(tmp_path / "1.png", 1), record_file)
        dishonest = network.devnet.nodes[dishonest_index].ready["node"]
        assert answer["status"] == "Refunded"
        slashed = await network.events("NodeSlashed")
        assert {event.arguments["node"] for event in slashed} == {dishonest}
        record = VerificationRecord.from_bytes(record_file.read_bytes())
        (refund,) = await network.events("RequestRefunded")
        assert refund.arguments["refunded"] == record.request.deposit
        assert record.conclusion is not None
        assert not record.conclusion.accepted
        assert record.route is not None
        assert record.route.stages[record.conclusion.blamed_stage].node == dishonest
        audited = await network.audit(record_file)
        assert audited.status == 0, audited.output
