"""`make devnet` as a person uses it: it says what to open and what to type, and what it says works."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import httpx2
import pytest

from tests.integration.network import run_command

READY_S = 180.0
STOP_S = 60.0

pytestmark = [pytest.mark.timeout(420), pytest.mark.model, pytest.mark.chain]


async def test_devnet_prints_addresses_and_commands_that_work(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator.cli", "devnet", "--nodes", "2", "--folder", str(tmp_path / "network")),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(READY_S):
            while not lines or "Ctrl-C" not in lines[-1]:
                line = await process.stderr.readline()
                assert line, "\n".join(lines)
                lines.append(line.decode().rstrip())
        text = "\n".join(lines)
        url = re.search(r"pages to look at\s+(\S+)", text)
        metrics = re.search(r"metrics\s+(\S+)\s+(\S+)", text)
        assert url is not None
        assert metrics is not None
        async with httpx2.AsyncClient(timeout=60) as http:
            assert "Swarm of plan" in (await http.get(url.group(1), headers={"Accept": "text/html"})).text
            for address in metrics.groups():
                assert "bsns_ready 1.0" in (await http.get(address)).text
        begin = next(number for number, line in enumerate(lines) if "three commands to try" in line)
        request, verify, curl = (line.strip() for line in lines[begin + 1 : begin + 4])
        words = shlex.split(request)
        assert Path(words[0]).name == "bsns"
        record = tmp_path / "record.json"
        words[words.index("--record") + 1] = str(record)
        words[words.index("--max-tokens") + 1] = "6"
        state = ["--state-dir", str(tmp_path / "state"), "--json"]
        asked = await run_command([sys.executable, "-m", "bsns.cli", words[1], *state, *words[2:]])
        assert asked.status == 0, asked.error
        assert json.loads(asked.output)["status"] == "Settled"
        checked = [*shlex.split(verify)[1:3], str(record), *shlex.split(verify)[4:]]
        audited = await run_command([sys.executable, "-m", "bsns.cli", *checked])
        assert audited.status == 0, audited.error
        streamed = await run_command(shlex.split(curl))
        assert streamed.output.rstrip().endswith("data: [DONE]"), streamed.output
    finally:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(STOP_S):
            await process.communicate()
    assert process.returncode == 0
