"""The `bsns` command as a person runs it: a process of its own, its output and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from eth_account import Account

from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import keccak256
from bsns.protocol.record import VerificationRecord
from tests.integration.recorded_network import PROMPT, REPOSITORY, RecordedNetwork
from tests.integration.synthetic_nodes import ANSWER, Misbehaviour, SyntheticSwarm

pytestmark = [pytest.mark.chain]

IDS = ",".join(map(str, PROMPT))


class Desk:
    """A network and the command line options that reach it."""

    def __init__(self, network: RecordedNetwork, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.deployment = folder / "deployment.json"
        self.key = folder / "key"
        network.deployment.save(self.deployment)
        self.key.write_text(keccak256(b"requester").hex())
        self.key.chmod(0o600)

    @property
    def chain(self) -> list[str]:
        return ["--rpc", self.network.anvil.rpc_url, "--deployment", str(self.deployment)]

    @property
    def payer(self) -> list[str]:
        return [*self.chain, "--key-file", str(self.key), "--state-dir", str(self.folder / "state")]

    async def run(self, *arguments: str, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bsns.cli", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "BSNS_CACHE": str(self.folder / "cache"), "COLUMNS": "200", **environment},
        )
        async with asyncio.timeout(60):
            out, err = await process.communicate(stdin)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with RecordedNetwork.running() as network:
        yield Desk(network, tmp_path)


async def test_bsns_request_with_record_then_audit_verify_holds(desk: Desk) -> None:
    record = desk.folder / "record.json"
    async with SyntheticSwarm(desk.network).serving():
        options = ["--prompt-ids", IDS, "--max-tokens", "8", "--record", str(record), "--token-ids", "--json"]
        code, out, err = await desk.run("request", *desk.payer, *options)
        assert code == 0, err
    answer = json.loads(out)
    assert answer["token_ids"] == list(ANSWER)
    assert answer["prompt_token_ids"] == list(PROMPT)
    assert answer["status"] == "Settled"
    assert "collecting the evidence" in err
    assert VerificationRecord.from_bytes(record.read_bytes()).tokens is not None

    rpc = ["--rpc", desk.network.anvil.rpc_url]
    code, out, err = await desk.run("audit", "verify", str(record), *rpc)
    assert (code, err) == (0, "")
    assert "all hold" in out
    code, out, _ = await desk.run("audit", "verify", str(record), *desk.chain, "--json")
    assert code == 0
    assert json.loads(out)["holds"]
    code, out, _ = await desk.run("audit", "show", str(record))
    assert code == 0
    assert answer["request_id"] in out

    record.write_text(record.read_text().replace(f'"output_tokens":{len(ANSWER)}', '"output_tokens":4', 1))
    code, out, _ = await desk.run("audit", "verify", str(record), *rpc)
    assert code == 1
    assert "FAILED  " in out
    record.write_text("{}")
    code, out, _ = await desk.run("audit", "verify", str(record), *rpc)
    assert code == 1
    assert "FAILED  record format" in out

    exported = desk.folder / "exported.json"
    code, _, err = await desk.run("audit", "export", answer["request_id"], *desk.chain, "-o", str(exported))
    assert code == 0, err
    assert VerificationRecord.from_bytes(exported.read_bytes()).input is None
    code, out, _ = await desk.run("requests", *desk.payer, "--json")
    assert code == 0
    assert [item["status"] for item in json.loads(out)["requests"]] == ["Settled"]


async def test_bsns_quote_needs_no_key(desk: Desk) -> None:
    code, out, err = await desk.run("quote", *desk.chain, "--prompt-ids", IDS, "--max-tokens", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["fee_wei"] == json.loads(out)["fee_per_token"] * 8
    code, out, _ = await desk.run("quote", *desk.chain, "--prompt-ids", IDS)
    assert code == 0
    assert "deposit" in out


async def test_bsns_request_that_is_not_served_exits_5_and_refund_brings_it_back(desk: Desk) -> None:
    async with SyntheticSwarm(desk.network, Misbehaviour(refuse_at_stage=1)).serving():
        code, out, err = await desk.run("request", *desk.payer, "--prompt-ids", IDS, "--max-tokens", "8")
        assert (code, out) == (5, "")
        assert "node of stage 1 refused" in err
    request_id = err.split("`bsns refund ")[1].split("`")[0]
    code, _, err = await desk.run("refund", request_id, *desk.payer)
    assert code == 3
    assert "can be taken back in" in err.replace("\n", " ")
    await desk.network.anvil.pass_time(301)
    code, out, err = await desk.run("refund", request_id, *desk.payer, "--json")
    assert code == 0, err
    assert json.loads(out)["withdrawn_wei"] > 0


async def test_bsns_keystore_is_opened_with_its_password_only(desk: Desk) -> None:
    keystore, password = desk.folder / "keystore.json", desk.folder / "password"
    keystore.write_text(json.dumps(Account.encrypt(keccak256(b"requester"), "right", kdf="pbkdf2", iterations=1_000)))
    keystore.chmod(0o600)
    password.write_text("right\n")
    options = [*desk.chain, "--key-file", str(keystore), "--state-dir", str(desk.folder / "state"), "--json"]
    assert (await desk.run("requests", *options, "--password-file", str(password)))[0] == 0
    assert (await desk.run("requests", *options, BSNS_KEYSTORE_PASSWORD="right"))[0] == 0
    code, _, err = await desk.run("requests", *options, BSNS_KEYSTORE_PASSWORD="wrong")
    assert code == 2
    assert "wrong password" in err
    code, _, err = await desk.run("requests", *options)
    assert code == 2
    assert "BSNS_KEYSTORE_PASSWORD" in err


async def test_bsns_wrong_use_exits_2_and_unavailable_4(desk: Desk) -> None:
    cases: list[tuple[int, str, list[str]]] = [
        (2, "give a prompt", ["request", *desk.payer]),
        (2, "numbers with commas", ["request", *desk.payer, "--prompt-ids", "1,x"]),
        (2, "tokenizer", ["request", *desk.payer, "hello"]),
        (2, "the prompt is empty", ["request", *desk.payer, " "]),
        (2, "top_p", ["request", *desk.payer, "--prompt-ids", "1", "--top-p", "2"]),
        (2, "either an image or a prompt", ["request", *desk.payer, "--image", "picture.png", "hello"]),
        (2, "leave --max-tokens out", ["request", *desk.payer, "--image", "picture.png", "--max-tokens", "2"]),
        (2, "needs the model's preprocessing", ["request", *desk.payer, "--image", "picture.png"]),
        (2, "needs the model's preprocessing", ["quote", *desk.chain, "--image", "picture.png"]),
        (2, "is not a request id", ["refund", "0x12", *desk.payer]),
        (2, "is not on this chain", ["refund", "0x" + "12" * 32, *desk.payer]),
        (2, "is not in", ["requests", *desk.payer, "--resume", "0x" + "12" * 32]),
        (2, "cannot be read", ["audit", "show", str(desk.folder / "nothing")]),
        (2, "another chain or deployment", ["audit", "export", "0x" + "12" * 32, *desk.chain]),
        (
            2,
            "not a deployment file",
            ["quote", "--rpc", "http://x", "--deployment", str(desk.key), "--prompt-ids", "1"],
        ),
        (4, "no answer", ["quote", "--rpc", "http://127.0.0.1:9", *desk.chain[2:], "--prompt-ids", "1"]),
    ]
    for expected, text, arguments in cases:
        code, out, err = await desk.run(*arguments)
        assert (code, out) == (expected, ""), (arguments, err)
        assert text in err.replace("\n", " "), (arguments, err)
    desk.key.chmod(0o644)
    code, _, err = await desk.run("requests", *desk.payer)
    assert code == 2
    assert "chmod 600" in err
    desk.key.chmod(0o600)
    desk.key.write_text("0" * 64)
    code, _, err = await desk.run("requests", *desk.payer)
    assert (code, "Traceback" in err) == (2, False), err
    assert "below the curve order" in err


async def test_bsns_request_by_an_account_that_cannot_pay_exits_3_and_names_it(desk: Desk) -> None:
    desk.key.write_text(keccak256(b"nobody ever funded this").hex())
    account = KeySigner(keccak256(b"nobody ever funded this")).address
    options = ["--prompt-ids", IDS, "--max-tokens", "8"]
    code, out, err = await desk.run("request", *desk.payer, *options)
    assert (code, out) == (3, "")
    assert f"account {account} has 0 wei" in err
    code, out, _ = await desk.run("quote", *desk.chain, *options, "--json")
    await desk.network.anvil.rpc("anvil_setBalance", account, hex(json.loads(out)["fee_wei"]))
    code, out, err = await desk.run("request", *desk.payer, *options)
    assert (code, out) == (3, ""), err
    assert f"{account} cannot pay" in err
    assert "fund it" in err


async def test_bsns_request_interrupted_says_how_to_go_on_and_resume_shows_the_answer_again(desk: Desk) -> None:
    # Where tests run in the background, SIGINT is ignored, and children would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bsns.cli", "request", *desk.payer, "--prompt-ids", IDS, "--max-tokens", "8", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "BSNS_CACHE": str(desk.folder / "cache")},
    )
    signal.signal(signal.SIGINT, inherited)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        # Nobody routes it yet: it waits.
        while b"waiting for a route" not in await process.stderr.readline():
            continue
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, out) == (4, b"")
    assert "--resume" in err.decode()
    assert "Traceback" not in err.decode()
    code, listed, _ = await desk.run("requests", *desk.payer, "--json")
    assert code == 0
    [request] = json.loads(listed)["requests"]
    async with SyntheticSwarm(desk.network).serving():
        code, listed, err = await desk.run("requests", *desk.payer, "--resume", request["request_id"], "--json")
        assert code == 0, err
        first = json.loads(listed)
        assert (first["status"], first["token_count"]) == ("Settled", len(ANSWER))
        code, listed, err = await desk.run("requests", *desk.payer, "--resume", request["request_id"], "--json")
        assert code == 0, err
        assert json.loads(listed)["text"] == first["text"]


async def test_bsns_prompt_from_standard_input_may_not_be_empty(desk: Desk) -> None:
    code, _, err = await desk.run("quote", *desk.chain, "-", stdin=b"\n")
    assert code == 2
    assert "empty" in err


async def test_bsns_help_starts_without_heavy_imports(desk: Desk) -> None:
    heavy = (
        "import sys, bsns.cli; print(sorted(m for m in ('torch', 'web3', 'grpc', 'transformers') if m in sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", heavy, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
    )
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"
    code, text, _ = await desk.run("--help")
    assert code == 0
    assert "audit" in text
