"""The gateway on real processes, spoken to by OpenAI's own clients: what they get, what it costs, what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from bsns.chain.client import Web3ChainClient
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol.identifiers import address
from bsns.protocol.typed_data import ACCOUNT_KEY_REQUEST, gateway_domain, signing_digest
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.prepare import prepare
from tests.integration.gateway_network import GatewayNetwork, running_gateway
from tests.integration.network import run_command
from tests.unit.runtime_models import embedded_reference

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "Write a long story about the sea."}]
TOKENS = 12
POLL_S = 0.1
WAIT_S = 60.0

pytestmark = [pytest.mark.timeout(420), pytest.mark.model, pytest.mark.chain]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNetwork]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), prepare()) as found:
        yield found


@pytest.fixture(scope="module")
def key(network: GatewayNetwork) -> str:
    return network.account()


@pytest.fixture
def client(network: GatewayNetwork, key: str) -> Iterator[openai.OpenAI]:
    with network.client(key) as found:
        yield found


def ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, **options}
    )


def refused(client: openai.OpenAI, model: str, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, model, **options)
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    return caught.value


# ---------------------------------------------------------------------------------------------------------- conformance


def test_models_are_listed_and_found(network: GatewayNetwork, client: openai.OpenAI) -> None:
    assert [item.id for item in client.models.list()] == [network.model]
    assert client.models.retrieve(network.model).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_answer_is_the_models_own_greedy_one(network: GatewayNetwork, client: openai.OpenAI) -> None:
    folder = prepare()
    tokenizer = ChatTokenizer(folder)
    prompt = tokenizer.conversation_token_ids(QUESTION)
    with torch.inference_mode():
        output = embedded_reference(folder).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, do_sample=False
        )
    tokens = output[0, len(prompt) :].tolist()
    answer = ask(client, network.model)
    assert answer.choices[0].message.content == tokenizer.decode(tokens)
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + len(tokens)


def test_stream_adds_up_to_the_whole_answer(network: GatewayNetwork, client: openai.OpenAI) -> None:
    whole = ask(client, network.model)
    chunks = list(ask(client, network.model, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, network.model, stream=True))


def test_asynchronous_client_streams(network: GatewayNetwork, key: str) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{network.url}/v1", api_key=key, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=network.model, messages=QUESTION, max_tokens=TOKENS, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    with network.client(key) as client:
        assert asyncio.run(run()) == ask(client, network.model).choices[0].message.content


def test_length_ends_an_answer(network: GatewayNetwork, client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 3}, {"max_tokens": 60, "max_completion_tokens": 3}):
        answer = ask(client, network.model, messages=LONG, **limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_stop_string_ends_an_answer_and_is_left_out(network: GatewayNetwork, client: openai.OpenAI) -> None:
    whole = ask(client, network.model).choices[0].message.content
    assert "Paris" in whole
    for stop in ("Paris", ["nowhere in it", "Paris"]):
        answer = ask(client, network.model, stop=stop)
        assert answer.choices[0].message.content == whole[: whole.index("Paris")]
        assert answer.choices[0].finish_reason == "stop"
        streamed = ask(client, network.model, stop=stop, stream=True)
        assert "".join(item.choices[0].delta.content or "" for item in streamed if item.choices) == (
            answer.choices[0].message.content
        )


def test_seed_repeats_an_answer_and_choices_differ(network: GatewayNetwork, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"messages": LONG, "temperature": 1, "n": 3, "max_tokens": 8}
    texts = [[item.message.content for item in ask(client, network.model, seed=5, **options).choices] for _ in "ab"]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert [item.index for item in ask(client, network.model, **options).choices] == [0, 1, 2]
    # One choice asked for alone is the first of several.
    assert ask(client, network.model, seed=5, **{**options, "n": 1}).choices[0].message.content == texts[0][0]
    negative = ask(client, network.model, seed=-1, **{**options, "n": 1})
    assert negative.choices[0].message.content


def test_streamed_choices_are_told_apart(network: GatewayNetwork, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"messages": LONG, "temperature": 1, "n": 2, "max_tokens": 8, "seed": 9}
    whole = ask(client, network.model, **options)
    texts = {0: "", 1: ""}
    for chunk in ask(client, network.model, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {item.index: item.message.content for item in whole.choices}
    assert whole.usage.completion_tokens == 16


def test_conversation_may_hold_what_a_client_was_answered(network: GatewayNetwork, client: openai.OpenAI) -> None:
    first = ask(client, network.model).choices[0].message
    messages = [
        {"role": "developer", "content": "Answer with one word."},
        {
            "role": "user",
            "content": [{"type": "text", "text": item} for item in ("What is the capital ", "of France?")],
        },
        first.to_dict(),
        {"role": "user", "content": "Really?"},
    ]
    assert ask(client, network.model, messages=messages).choices[0].message.content


def test_completions_go_on_with_a_text(network: GatewayNetwork, client: openai.OpenAI) -> None:
    tokenizer = ChatTokenizer(prepare())
    one = client.completions.create(model=network.model, prompt="The capital of France is", temperature=0, max_tokens=4)
    assert one.object == "text_completion"
    tokens = tokenizer.text_token_ids("The capital of France is")
    for prompt in (tokens, [tokens]):
        same = client.completions.create(model=network.model, prompt=prompt, temperature=0, max_tokens=4)
        assert same.choices[0].text == one.choices[0].text
    both = client.completions.create(
        model=network.model, prompt=["The capital of France is", "Once"], temperature=0, max_tokens=4, n=2, echo=True
    )
    assert [item.index for item in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == "The capital of France is" + one.choices[0].text
    assert both.choices[2].text.startswith("Once")
    pieces = client.completions.create(
        model=network.model, prompt="The capital of France is", temperature=0, max_tokens=4, stream=True, echo=True
    )
    assert "".join(item.choices[0].text for item in pieces if item.choices) == both.choices[0].text
    assert client.completions.create(model=network.model, prompt="Once", temperature=0).usage.completion_tokens <= 16


def test_what_the_documentation_shows_runs(
    network: GatewayNetwork, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REPOSITORY / "docs/gateway.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = program.replace("https://gateway.example", network.url).replace("bsns-…", key)
    exec(compile(program, "gateway.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert "Paris" in shown[0]
    price, record = shown[-1].split()
    assert int(price) > 0
    assert record.startswith(f"{network.url}/requests/0x")
    (curl,) = re.findall(r"```\n(curl .*?)\n```", text)
    command = shlex.split(curl.replace("https://gateway.example", network.url).replace("$OPENAI_API_KEY", key))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_what_cannot_be_done_is_said_in_openais_shape(network: GatewayNetwork, client: openai.OpenAI) -> None:
    model = network.model
    assert (error := refused(client, "gpt-4")).status_code == 404
    assert error.code == "model_not_found"
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"max_tokens": 100_000}, "messages"),
        ({"n": 100}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, "messages[0].content"),
        ({"stop": ["x"] * 9}, None),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
    ]
    for options, param in cases:
        error = refused(client, model, **options)
        assert error.status_code == 400, options
        assert param is None or error.param == param, options
        assert not isinstance(error, openai.InternalServerError)
    assert refused(client, model, max_tokens=100_000).code == "context_length_exceeded"
    # What changes nothing is fine.
    assert ask(client, model, presence_penalty=0, logit_bias={}, user="u", response_format={"type": "text"}).choices
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model=model, input="hello")
    with pytest.raises(openai.NotFoundError):
        client.files.list()
    with network.client("bsns-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_npm_client_gets_the_same(network: GatewayNetwork, key: str) -> None:
    node = shutil.which("node", path=f"{REPOSITORY / '.venv/bin'}:/usr/local/bin:/usr/bin:/bin")
    assert node is not None, "`make setup` brings node"
    done = subprocess.run(
        [node, "conformance.mjs", f"{network.url}/v1", key, network.model],
        cwd=REPOSITORY / "tests/clients", capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with network.client(key) as client:
        mine = ask(client, network.model)
    assert found["models"] == [network.model]
    assert found["model"] == network.model
    text = mine.choices[0].message.content
    assert (found["text"], "".join(found["pieces"]), found["assembled"]) == (text, text, text)
    assert (found["role"], found["finish"], found["streamedFinish"]) == (
        "assistant",
        *[mine.choices[0].finish_reason] * 2,
    )
    assert found["usage"] == found["streamedUsage"] == mine.usage.model_dump(exclude_none=True)
    assert found["requestHeader"].startswith("0x")
    assert int(found["price"]) > 0
    assert [item[:2] for item in found["legacy"]] == [[index, True] for index in range(4)]
    errors = found["errors"]
    assert [errors[name]["name"] for name in ("model", "parameter", "key")] == found["classes"]
    assert [errors[name]["status"] for name in ("model", "parameter", "key")] == [404, 400, 401]


# ---------------------------------------------------------------------------------------------------------------- money


def test_answer_says_what_it_rests_on_and_costs(network: GatewayNetwork) -> None:
    key = network.account()
    with network.client(key) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=network.model, messages=QUESTION, max_tokens=40, temperature=0
        )
    extra = json.loads(raw.content)["bsns"]
    (request,) = extra["requests"]
    assert raw.headers["x-bsns-request-id"] == request["request_id"]
    assert raw.headers["x-bsns-record"] == f"{network.url}/requests/{request['request_id']}"
    nodes = {child.ready["node"] for child in network.devnet.nodes}
    assert {item["node"] for item in request["route"]} == nodes
    usage = json.loads(raw.content)["usage"]
    assert int(extra["price_wei"]) == usage["total_tokens"] * network.devnet.fee_per_token
    assert int(extra["held_wei"]) == (usage["prompt_tokens"] + 40) * network.devnet.fee_per_token
    assert network.balance(key) == 10**18 - int(extra["price_wei"])
    with network.http(key) as http:
        lines = http.get("/v1/account/movements").json()["data"]
        assert sum(int(item["amount_wei"]) for item in lines) == network.balance(key)
        assert [item["kind"] for item in lines] == ["release", "hold", "deposit"]
        (charge,) = http.get("/v1/account/charges").json()["data"]
    assert (charge["state"], charge["charged_wei"]) == ("charged", extra["price_wei"])
    assert charge["requests"] == [request["request_id"]]


def test_quote_is_the_most_that_is_set_aside(network: GatewayNetwork, key: str) -> None:
    body = {"model": network.model, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "n": 2}
    with network.http(key) as http:
        before = network.balance(key)
        quote = http.post("/v1/quote", json=body).json()
        assert network.balance(key) == before
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["bsns"]["held_wei"] == quote["price_wei"]
        assert int(answer["bsns"]["price_wei"]) <= int(quote["price_wei"])
        capped = {"X-BSNS-Max-Price-Wei": str(int(quote["price_wei"]) - 1)}
        refusal = http.post("/v1/chat/completions", json=body, headers=capped)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (402, "price_above_maximum")
        assert http.post("/v1/quote", json={"model": network.model, "prompt": "Once"}).json()["choices"] == 1


def test_idempotency_key_gives_the_same_answer_once_charged(network: GatewayNetwork) -> None:
    key = network.account()
    options: dict[str, Any] = {"temperature": 1, "messages": LONG, "extra_headers": {"Idempotency-Key": "order-1"}}
    with network.client(key) as client:
        first = ask(client, network.model, **options)
        after = network.balance(key)
        again = ask(client, network.model, **options)
        assert again.model_dump() == first.model_dump()
        streamed = list(ask(client, network.model, stream=True, **options))
        text = "".join(item.choices[0].delta.content or "" for item in streamed if item.choices)
        assert text == first.choices[0].message.content
        assert network.balance(key) == after < 10**18
        other = refused(client, network.model, **{**options, "messages": QUESTION})
        assert (other.status_code, other.code) == (422, "idempotency_key_reused")


def test_two_with_one_idempotency_key_at_once_are_answered_once(network: GatewayNetwork) -> None:
    key = network.account()
    body = {"model": network.model, "messages": LONG, "max_tokens": 40, "temperature": 0}
    statuses: list[int] = []

    def post() -> None:
        with network.http(key) as http:
            done = http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "twice"})
            statuses.append(done.status_code)

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(statuses)) in ([200], [200, 409])
    with network.http(key) as http:
        assert len(http.get("/v1/account/charges").json()["data"]) == 1


def test_nobody_spends_more_than_there_is_or_than_a_key_may(network: GatewayNetwork) -> None:
    fee = network.devnet.fee_per_token
    with network.client(network.account(wei=fee)) as poor:
        error = refused(poor, network.model)
        assert (error.status_code, error.code) == (429, "insufficient_quota")
        assert isinstance(error, openai.RateLimitError)
        assert error.response.headers["x-should-retry"] == "false"
    with network.client(network.account(per_request_wei=10 * fee)) as frugal:
        assert refused(frugal, network.model).code == "spending_limit_exceeded"
    daily = network.account(per_day_wei=120 * fee)
    with network.client(daily) as client:
        # What an answer did not cost of what was set aside may be spent again on the same day.
        ask(client, network.model)
        ask(client, network.model)
        assert refused(client, network.model, max_tokens=100).code == "spending_limit_exceeded"
    with network.http(daily) as http:
        smaller = http.post("/v1/account/keys", json={"name": "robot", "per_day_wei": str(10**18)}).json()
        assert smaller["per_day_wei"] == str(120 * fee)
        assert http.post("/v1/account/withdrawals", json={"amount_wei": "1"}).status_code == 403


def test_who_leaves_pays_for_what_was_streamed(network: GatewayNetwork) -> None:
    key = network.account()
    with network.client(key) as client:
        stream = ask(client, network.model, messages=LONG, max_tokens=400, stream=True)
        seen = 0
        for chunk in stream:
            seen += bool(chunk.choices and chunk.choices[0].delta.content)
            if seen == 3:
                stream.close()
                break
    charge = settled(network, key)
    assert charge["state"] == "charged"
    assert 0 < int(charge["charged_wei"]) < int(charge["held_wei"]) // 2
    assert network.balance(key) == 10**18 - int(charge["charged_wei"])


def settled(network: GatewayNetwork, key: str) -> dict[str, Any]:
    """The newest charge of an account, once it is settled."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with network.http(key) as http:
            charges = http.get("/v1/account/charges").json()["data"]
        if charges and charges[0]["state"] != "held":
            found: dict[str, Any] = charges[0]
            return found
        time.sleep(POLL_S)
    raise AssertionError(f"not settled within {WAIT_S} s: {charges}")


def test_account_is_opened_by_signature_filled_and_emptied_on_the_chain(network: GatewayNetwork) -> None:
    signer = network.funded_key("customer")
    with network.http() as http:
        about = http.get("/v1/gateway").json()
        opened = http.post("/v1/accounts", json=signed_request(signer, about, "mine"))
        assert opened.status_code == 201, opened.text
        key = opened.json()["secret"]
        again = http.post("/v1/accounts", json=signed_request(signer, about, "mine"))
        assert (again.status_code, again.json()["error"]["code"]) == (409, "duplicate")
        second = http.post("/v1/accounts", json=signed_request(signer, about, "another")).json()
        assert second["account"]["id"] == opened.json()["account"]["id"]
        stranger = {**signed_request(signer, about, "theft"), "address": "0x" + "11" * 20}
        assert http.post("/v1/accounts", json=stranger).json()["error"]["code"] == "wrong_signature"
        late = signed_request(signer, about, "late", lifetime_s=-5)
        assert http.post("/v1/accounts", json=late).status_code == 400
    wei = 3 * 10**17
    transaction = network.run(transfer(network, signer, about["deposit_address"], wei))
    with network.http(key) as http:
        credited = eventually(lambda: http.post("/v1/account/deposits", json={"transaction": transaction}), 201)
        assert credited["balance_wei"] == str(wei)
        twice = http.post("/v1/account/deposits", json={"transaction": transaction})
        assert twice.json()["error"]["code"] == "duplicate"
    other = network.funded_key("other customer")
    foreign = network.run(transfer(network, other, about["deposit_address"], wei))
    elsewhere = network.run(transfer(network, signer, other.address, 5))
    with network.http(key) as http:
        assert http.post("/v1/account/deposits", json={"transaction": foreign}).status_code == 403
        assert http.post("/v1/account/deposits", json={"transaction": elsewhere}).status_code == 400
        assert http.post("/v1/account/deposits", json={"transaction": "0x" + "ab" * 32}).status_code == 409
        assert http.post("/v1/account/deposits", json={"transaction": "nonsense"}).status_code == 400
        before = network.run(balance_of(network, signer.address))
        assert http.post("/v1/account/withdrawals", json={"amount_wei": str(wei + 1)}).status_code == 429
        wanted = http.post("/v1/account/withdrawals", json={"amount_wei": str(wei)}).json()
        done = eventually(
            lambda: http.get(f"/v1/account/withdrawals/{wanted['id']}"), 200, lambda item: item["state"] == "done"
        )
        assert done["transaction"].startswith("0x")
        assert network.run(balance_of(network, signer.address)) == before + wei
        assert http.get("/v1/account").json()["balance_wei"] == "0"
        lines = http.get("/v1/account/movements").json()["data"]
        assert [item["kind"] for item in lines] == ["withdrawal", "deposit"]
        # A key that was revoked is none.
        assert http.delete(f"/v1/account/keys/{second['id']}").json()["revoked"] is True
        assert http.delete(f"/v1/account/keys/{second['id']}").status_code == 404
    with network.http(second["secret"]) as http:
        assert http.get("/v1/account").status_code == 401


def test_account_from_the_command_line(network: GatewayNetwork, tmp_path: Path) -> None:
    devnet = network.devnet
    network.funded_key("typist")
    key_file, api_key_file = devnet.folder / "keys/typist.key", tmp_path / "api.key"
    mine = ["--gateway", network.url, "--api-key-file", str(api_key_file)]
    chain = ["--rpc", devnet.rpc_url, "--deployment", str(devnet.deployment_file), "--key-file", str(key_file)]

    def bsns(*arguments: str) -> Any:
        done = network.run(run_command([sys.executable, "-m", "bsns.cli", "account", *arguments, "--json"]))
        assert done.status == 0, done.error
        return json.loads(done.output)

    opened = bsns("open", *mine, "--key-file", str(key_file), "--per-day-wei", str(10**16))
    assert api_key_file.stat().st_mode & 0o777 == 0o600
    secret = api_key_file.read_text().strip()
    assert secret not in json.dumps(opened)
    assert bsns("deposit", str(10**15), *mine, *chain)["balance_wei"] == str(10**15)
    with network.client(secret) as client:
        ask(client, network.model, max_tokens=2)
    shown = bsns("show", *mine)
    assert int(shown["balance_wei"]) < 10**15
    assert shown["key"]["per_day_wei"] == str(10**16)
    assert [item["kind"] for item in shown["movements"]][-2:] == ["hold", "deposit"]
    # A key with a limit takes nothing out, and says so.
    refused_ = network.run(run_command([sys.executable, "-m", "bsns.cli", "account", "withdraw", "1", *mine]))
    assert (refused_.status, "spending limit" in refused_.error) == (3, True)
    again = network.run(
        run_command([sys.executable, "-m", "bsns.cli", "account", "open", *mine, "--key-file", str(key_file)])
    )
    assert (again.status, "exists already" in again.error) == (2, True)
    plain = ["--gateway", "http://gateway.example", "--api-key-file", str(api_key_file)]
    clear = network.run(run_command([sys.executable, "-m", "bsns.cli", "account", "show", *plain]))
    assert (clear.status, "not on loopback" in clear.error) == (2, True)


def signed_request(signer: KeySigner, about: dict[str, Any], name: str, lifetime_s: int = 300) -> dict[str, Any]:
    # Rounded, so that the same request twice is the same signature.
    deadline = (int(time.time()) // 60) * 60 + lifetime_s + (60 if lifetime_s > 0 else -60)
    domain = gateway_domain(about["chain_id"], address(about["deposit_address"]))
    digest = signing_digest(domain, ACCOUNT_KEY_REQUEST, (signer.address, name, deadline))
    signature = "0x" + signer.sign_digest(digest).hex()
    return {"address": signer.address, "name": name, "deadline": deadline, "signature": signature}


async def transfer(network: GatewayNetwork, signer: KeySigner, recipient: str, wei: int) -> str:
    async with await Web3ChainClient.connect(network.devnet.rpc_url, network.devnet.deployment) as chain:
        receipt = await Submitter(chain, signer).transfer(recipient, wei)
    return "0x" + receipt.transaction_hash.hex()


async def balance_of(network: GatewayNetwork, account: str) -> int:
    async with await Web3ChainClient.connect(network.devnet.rpc_url, network.devnet.deployment) as chain:
        return await chain.balance(account)


def eventually(ask_again: Any, status: int, is_done: Any = lambda _body: True) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while True:
        response: httpx2.Response = ask_again()
        if response.status_code == status and is_done(response.json()):
            found: dict[str, Any] = response.json()
            return found
        assert time.monotonic() < deadline, response.text
        time.sleep(POLL_S)


# --------------------------------------------------------------------------------------------- limits, crashes, the end


def test_health_readiness_and_headers(network: GatewayNetwork, client: openai.OpenAI) -> None:
    ask(client, network.model, max_tokens=1)
    with network.http() as http:
        assert http.get("/healthz").json() == {"status": "alive"}
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert "default-src 'none'" in ready.headers["content-security-policy"]
        assert ready.headers["x-content-type-options"] == "nosniff"
        assert http.get("/healthz", headers={"X-Request-Id": "mine-12345"}).headers["x-request-id"] == "mine-12345"
        assert http.get("/healthz", headers={"X-Request-Id": "no\tgood"}).headers["x-request-id"].startswith("req_")
        assert (
            "access-control-allow-origin" not in http.get("/healthz", headers={"Origin": "https://a.example"}).headers
        )
        assert http.options("/v1/models", headers={"Origin": "https://a.example"}).status_code == 405
    with httpx2.Client(base_url=f"http://{network.devnet.gateway.ready['health']}") as health:
        assert health.get("/readyz").json() == {"status": "ready", "reason": None}
        text = health.get("/metrics").text
    assert 'bsns_tokens_total{model="smollm2-135m-instruct"}' in text
    assert "bsns_ready 1.0" in text
    assert "bsns_gateway_owed_wei" in text


def test_secrets_are_in_no_log(network: GatewayNetwork, key: str) -> None:
    with network.client(key) as client:
        ask(client, network.model, messages=[{"role": "user", "content": "swordfish"}], max_tokens=2)
    log = network.devnet.gateway.log.read_text()
    assert '"event": "http"' in log
    gateway_key = (network.devnet.folder / "keys/gateway.key").read_text().strip()
    for secret in (key, gateway_key, "swordfish", "Authorization"):
        assert secret not in log
    command = Path(f"/proc/{network.devnet.gateway.process.pid}/cmdline").read_bytes().decode()
    assert gateway_key not in command


def test_limits_of_size_and_rate_hold_and_pass(network: GatewayNetwork, key: str) -> None:
    network.restart({"key_requests_a_minute": 5, "body_bytes": 2048, "cors_origins": ["https://app.example"]})
    try:
        with network.http(key) as http:
            large = {"model": network.model, "messages": [{"role": "user", "content": "x" * 4096}]}
            assert http.post("/v1/chat/completions", json=large).status_code == 413
            chunks = (b"x" * 512 for _ in range(16))
            assert http.post("/v1/chat/completions", content=chunks).status_code == 413
            statuses = [http.get("/v1/models").status_code for _ in range(7)]
            assert statuses == [200] * 5 + [429] * 2
            limited = http.get("/v1/models")
            assert int(limited.headers["retry-after"]) >= 1
            assert limited.json()["error"]["code"] == "rate_limit_exceeded"
            allowed = http.get("/healthz", headers={"Origin": "https://app.example"})
            assert allowed.headers["access-control-allow-origin"] == "https://app.example"
            other = http.get("/healthz", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers
    finally:
        network.restart()


def test_killed_gateway_gives_back_what_it_had_set_aside(network: GatewayNetwork) -> None:
    key = network.account()
    with network.client(key) as client:
        stream = ask(client, network.model, messages=LONG, max_tokens=600, stream=True)
        next(iter(stream))
        network.restart(kill=True)
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(stream)
    assert settled(network, key)["state"] == "released"
    assert network.balance(key) == 10**18
    with network.client(key) as client:
        assert ask(client, network.model).choices[0].message.content


def test_damaged_file_of_one_request_stops_nobody_else(network: GatewayNetwork) -> None:
    key = network.account()
    with network.client(key) as client:
        ask(client, network.model)
    file = next((network.devnet.folder / "gateway").rglob("0x*.json"))
    kept = file.read_bytes()
    file.write_text('{"format": 4, "deposit": 1e999')
    try:
        network.restart()
        with network.client(key) as client, network.http() as http:
            assert ask(client, network.model).choices[0].message.content
            assert http.get("/readyz").status_code == 200
    finally:
        file.write_bytes(kept)
        network.restart()


def test_stopped_gateway_finishes_what_it_began(network: GatewayNetwork) -> None:
    key = network.account()
    with network.client(key) as client:
        stream = iter(ask(client, network.model, messages=LONG, max_tokens=60, stream=True))
        next(stream)
        stopping = threading.Thread(target=network.restart)
        stopping.start()
        rest = list(stream)
        stopping.join()
    assert [item.choices[0].finish_reason for item in rest if item.choices][-1] in ("length", "stop")
    assert settled(network, key)["state"] == "charged"


def test_command_line_says_what_is_wrong(network: GatewayNetwork, tmp_path: Path) -> None:
    command = ["-m", "coordinator.cli", "gateway", "serve", "--listen", "0.0.0.0:0", "--coordinator", "127.0.0.1:1"]
    devnet = network.devnet
    options = [
        *("--rpc", devnet.rpc_url, "--deployment", str(devnet.deployment_file), "--database-url", devnet.database_url),
        *("--key-file", str(devnet.folder / "keys/gateway.key"), "--state-dir", str(tmp_path)),
        *("--model-folder", str(devnet.manifest.parent)),
    ]
    done = network.run(run_command([sys.executable, *command, *options]))
    assert done.status == 2
    assert "not on loopback" in done.error
    shown = network.run(
        run_command([sys.executable, *command[:-4], *options, "--coordinator", "a:1", "--print-config"])
    )
    assert json.loads(shown.output)["tab_minimum_wei"] == 10**16
