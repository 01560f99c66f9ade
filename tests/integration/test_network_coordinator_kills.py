"""kill -9 of the coordinator between any two chain steps of a request: the request still settles exactly once."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.network import run_command, running_network
from tests.unit.runtime_models import prepared_tiny_model

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


@pytest.mark.timeout(420)
async def test_coordinator_killed_after_every_chain_step_settles_exactly_once(tmp_path: Path) -> None:
    model_folder = prepared_tiny_model(tmp_path / "model")
    async with running_network(tmp_path / "network", model_folder, node_count=3) as network:
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
