"""The `bsns-node` program as an operator runs it: one ready line, exit codes, and going on after kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bsns.protocol.contract_states import Phase
from bsns.protocol.sampling import SamplingParameters
from node_client.service import NodeService
from tests.integration.node_fixtures import Network, named_key, running_network, short_terms, until

pytestmark = pytest.mark.chain

READY_TIMEOUT_S = 60.0


def arguments(network: Network, name: str, *more: str) -> list[str]:
    settings = network.settings(name)
    return [
        sys.executable, "-m", "node_client.cli", "join", "--rpc", network.anvil.rpc_url,
        "--deployment", str(network.deployment_file), "--data-dir", str(settings.data_dir), "--stake", "2",
        "--listen", "127.0.0.1:0", "--model-cache", str(network.cache),
        "--operator-key-file", str(settings.operator_key_file), *more,
    ]  # fmt: skip


def environment(**changed: str) -> dict[str, str]:
    return {
        **os.environ,
        "BSNS_NODE_KEYSTORE_SCRYPT_COST": "2",
        "BSNS_NODE_CHAIN_POLL_SECONDS": "0.2",
        "BSNS_NODE_PASSWORD": "correct horse",
        **changed,
    }


@contextlib.asynccontextmanager
async def node_process(network: Network, name: str, *more: str) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """A node in a child process and its ready line; ended with its own pid."""
    process = await asyncio.create_subprocess_exec(
        *arguments(network, name, *more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(READY_TIMEOUT_S):
            line = await process.stdout.readline()
        yield process, json.loads(line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_to_end(network: Network, command: list[str], **changed: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(**changed)
    )
    async with asyncio.timeout(READY_TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_node_killed_between_commit_and_reveal_reveals_after_its_restart_and_stops_on_sigterm(
    tmp_path: Path,
) -> None:
    async with running_network(tmp_path, short_terms(sampling_rate_bps=0)) as network:
        network.password = "correct horse"
        await network.fund(named_key("operator a").address)
        async with node_process(network, "a") as (process, ready):
            assert ready["event"] == "ready"
            assert ready["operator"] == named_key("operator a").address
            await network.until_active(ready["node"])
            network.services["a"] = service = NodeService(network.settings("a"))
            service.ready = _Endpoint(ready["endpoint"])  # type: ignore[assignment]
            plan = await network.publish_plan([("a", 0, 6)])
            opened = await network.open_request(plan, (5, 17), SamplingParameters(maximum_tokens=4))
            answer = await network.ask(opened, ("a",))
            assert answer.ended is not None

            async def committed() -> bool:
                view = await network.client.call("OutputVerification", "verificationOf", opened.id)
                return bool(view.phase != Phase.COMMITTING)

            await until(committed, "commitment")
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await network.draw(opened)
        async with node_process(network, "a") as (process, again):
            assert again["node"] == ready["node"], "the same keys"
            assert again["endpoint"] != ready["endpoint"], "a new free port, announced on chain"

            async def revealed() -> bool:
                return bool(await network.stage_events(opened, "StageRevealed"))

            await until(revealed, "reveal after the restart")
            known = await network.client.events_between(
                network.deployment.first_block,
                (await network.client.head()).number,
                contract="NodeRegistry",
                name="EndpointChanged",
            )
            assert [event.arguments["endpoint"] for event in known] == [again["endpoint"]]
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await process.wait() == 0
        command = [sys.executable, "-m", "node_client.cli", "status", "--rpc", network.anvil.rpc_url]
        command += ["--deployment", str(network.deployment_file), "--data-dir", str(tmp_path / "a"), "--json"]
        code, out, _ = await run_to_end(network, command)
        assert code == 0
        assert json.loads(out)["status"] == "active"
        assert json.loads(out)["staked_wei"] == 2 * 10**18


class _Endpoint:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint


async def test_start_that_cannot_succeed_ends_with_its_exit_code_and_says_why(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        network.password = "correct horse"
        await network.fund(named_key("operator a").address)
        settings = network.settings("a")
        from node_client.service import open_keystore

        open_keystore(settings).node_signer()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, _, err = await run_to_end(network, arguments(network, "a", "--listen", f"127.0.0.1:{port}"))
            assert (code, "in use" in err) == (2, True), err
        code, _, err = await run_to_end(network, arguments(network, "a"), BSNS_NODE_PASSWORD="wrong")
        assert (code, "password is wrong" in err) == (2, True), err
        code, _, err = await run_to_end(network, arguments(network, "a", "--rpc", "http://127.0.0.1:9"))
        assert (code, "check that it runs" in err) == (4, True), err
        code, _, err = await run_to_end(network, arguments(network, "a", "--stake", "0.000001"))
        assert (code, "minimum stake" in err) == (2, True), err
        node = open_keystore(settings).node_signer().address
        assert await network.client.balance(node) == 0, "no money moved for a join that is refused"
        code, _, err = await run_to_end(network, arguments(network, "a", "--stake", "much"))
        assert code == 2
        other = json.loads(network.deployment_file.read_text())
        other["chain_id"] = 1
        wrong = tmp_path / "wrong.json"
        wrong.write_text(json.dumps(other))
        code, _, err = await run_to_end(network, arguments(network, "a", "--deployment", str(wrong)))
        assert (code, "on chain 1" in err) == (4, True), err
        poor = arguments(network, "a", "--stake", "1000000")
        code, _, err = await run_to_end(network, poor)
        assert (code, named_key("operator a").address in err, "fund it" in err) == (3, True, True), err
        assert await network.client.balance(node) == 0
        code, _, err = await run_to_end(network, arguments(network, "a", "--config", str(tmp_path / "none.toml")))
        assert (code, "no settings file" in err) == (2, True), err
        none = [sys.executable, "-m", "node_client.cli", "keys", "show", "--data-dir", str(tmp_path / "nowhere")]
        code, _, err = await run_to_end(network, none)
        assert (code, "no keys" in err, (tmp_path / "nowhere").exists()) == (2, True, False), err
        code, out, _ = await run_to_end(network, arguments(network, "a", "--print-config"))
        assert code == 0
        assert "correct horse" not in out
        doctor = [sys.executable, "-m", "node_client.cli", "doctor", "--rpc", network.anvil.rpc_url, "--json"]
        doctor += ["--deployment", str(network.deployment_file), "--data-dir", str(tmp_path / "a")]
        code, out, _ = await run_to_end(network, [*doctor, "--model-cache", str(network.cache)])
        assert code == 4, "the node is not registered"
        assert json.loads(out)["ok"] is False
        assert {item["check"] for item in json.loads(out)["checks"]} >= {
            "chain",
            "clock",
            "models",
            "disk",
            "registration",
        }


async def test_serve_exit_and_withdraw_say_what_stands_in_the_way(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        network.password = "correct horse"
        await network.fund(named_key("operator a").address)
        place = ["--rpc", network.anvil.rpc_url, "--deployment", str(network.deployment_file)]
        place += ["--data-dir", str(network.settings("a").data_dir)]
        program = [sys.executable, "-m", "node_client.cli"]
        async with node_process(network, "a") as (_, ready):
            code, _, err = await run_to_end(network, arguments(network, "a"))
            assert (code, "another bsns-node serves" in err) == (2, True), err
            await network.until_active(ready["node"])
        code, out, err = await run_to_end(network, [*program, "serve", *place, "--listen", "127.0.0.1:0"])
        assert (code, out, f"registered at {ready['endpoint']}" in err) == (2, "", True), err
        for _ in range(2):
            code, out, err = await run_to_end(network, [*program, "exit", *place])
            assert (code, "exit has begun" in out) == (0, True), err
        code, out, err = await run_to_end(network, [*program, "withdraw", *place])
        assert (code, "thaws until" in out) == (0, True), err
        code, _, err = await run_to_end(network, [*program, "withdraw", *place], BSNS_NODE_PASSWORD="wrong")
        assert (code, "password is wrong" in err) == (2, True), err
