"""The explorer in a real browser, on a real network: what pages show and check, and what strangers cannot do."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bsns.chain.client import Web3ChainClient
from bsns.chain.submitter import Submitter
from bsns.protocol.record import VerificationRecord
from bsns.protocol.tabs import CollectedTicket
from bsns.runtime.prepare import prepare
from bsns.v1 import tabs_pb2
from tests.integration.gateway_network import GatewayNetwork, running_gateway
from tests.integration.network import run_command

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
FORMULA = '=HYPERLINK("http://evil.example")'
WAIT_MS = 30_000
WAIT_S = 60.0

pytestmark = [pytest.mark.timeout(420), pytest.mark.model, pytest.mark.chain]


def chromium() -> str:
    """Debian's Chromium; the test fails with what to do where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("there is no Chromium here: `apt-get install chromium`")
    return found


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNetwork]:
    with running_gateway(tmp_path_factory.mktemp("explorer"), prepare()) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox to give; the pages are our own.
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, network: GatewayNetwork) -> Iterator[Page]:
    """A page that must not log an error, nor leave the gateway."""
    context = browser.new_context(base_url=network.url, viewport={"width": 1180, "height": 900})
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith((network.url, "data:")) else problems.append(f"asked {asked.url}"),
    )
    yield opened
    context.close()
    # That a page was not found, or asked for wrongly, is said in the console, too.
    assert [text for text in problems if "status of 40" not in text] == []


def ask(network: GatewayNetwork, key: str, tokens: int = 6) -> str:
    """A request paid by the gateway's tab; its id."""
    with network.client(key) as client:
        answer = client.chat.completions.create(
            model=network.model, messages=QUESTION, max_tokens=tokens, temperature=0
        )
    request_id: str = answer.model_extra["bsns"]["requests"][0]["request_id"]  # type: ignore[index]
    return request_id


@pytest.fixture(scope="module")
def tab_request(network: GatewayNetwork) -> str:
    """A request on a tab whose batch is on the chain."""
    request = ask(network, network.account())
    deadline = time.monotonic() + WAIT_S
    with network.http() as http:
        while "none yet" in http.get(f"/requests/{request}", headers={"Accept": "text/html"}).text:
            assert time.monotonic() < deadline, "the batch was not posted"
            time.sleep(0.2)
    return request


@pytest.fixture(scope="module")
def settled_request(network: GatewayNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A request that was paid for directly, and is settled."""
    devnet = network.devnet
    command = [
        *(sys.executable, "-m", "bsns.cli", "request", "--rpc", devnet.rpc_url),
        *("--deployment", str(devnet.deployment_file), "--key-file", str(devnet.requester_key_file)),
        *("--model-folder", str(devnet.manifest.parent), "--state-dir", str(tmp_path_factory.mktemp("state"))),
        *("--max-tokens", "6", "--json", "--", "Name a colour."),
    ]
    done = network.run(run_command(command))
    assert done.status == 0, done.error
    answer = json.loads(done.output)
    assert answer["status"] == "Settled"
    request_id: str = answer["request_id"]
    return request_id


def test_overview_shows_swarm_charts_and_what_was_asked_last(
    page: Page, network: GatewayNetwork, settled_request: str, tab_request: str
) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    expect(page.locator("svg.swarm circle.node.active")).to_have_count(len(network.devnet.nodes))
    expect(page.locator("svg.swarm path.link")).to_have_count(2)
    expect(page.locator("svg.chart")).to_have_count(3)
    expect(page.locator("svg.chart rect.series-1").first).to_be_attached()
    for picture in page.locator("svg").all():
        assert picture.get_attribute("role") == "img"
        assert picture.get_attribute("aria-label")
    for request in (settled_request, tab_request):
        expect(page.locator(f'a[href="/requests/{request}"]').first).to_be_visible()
    page.locator("svg.swarm a").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Node 0x")


def test_record_is_checked_against_the_chain_in_front_of_the_reader(
    page: Page, network: GatewayNetwork, settled_request: str
) -> None:
    page.goto("/requests?status=settled")
    page.locator(f'a[href="/requests/{settled_request}"]').click()
    expect(page.locator("svg.states .current")).to_contain_text("Settled")
    expect(page.locator("svg.states .reached")).to_have_count(4)
    expect(page.get_by_text("medoid").first).to_be_visible()
    page.get_by_role("link", name="Verify against the chain").click()
    expect(page.locator("#outcome")).to_have_text("passed", timeout=WAIT_MS)
    expect(page.locator("tr.wrong")).to_have_count(0)
    assert page.locator("tr.ok").count() > 40
    page.go_back()
    with page.expect_download() as download:
        page.get_by_role("link", name="Record (JSON)").click()
    record = VerificationRecord.from_bytes(Path(download.value.path()).read_bytes())
    assert "0x" + record.request.request_id.hex() == settled_request
    assert record.status == "Settled"


def test_request_on_a_tab_is_checked_by_what_was_signed(page: Page, network: GatewayNetwork, tab_request: str) -> None:
    page.goto(f"/requests/{tab_request}")
    page.get_by_role("link", name="Verify").click()
    expect(page.locator("#outcome")).to_have_text("passed", timeout=WAIT_MS)
    for name in ("ticket", "route", "results", "charge", "batch", "leaf", "chain"):
        expect(page.get_by_role("rowheader", name=name, exact=True)).to_be_visible()


def test_forged_result_in_the_database_is_found_out(page: Page, network: GatewayNetwork) -> None:
    request = ask(network, network.account())
    file = network.devnet.database_url.removeprefix("sqlite:///")
    with sqlite3.connect(file, timeout=30) as database:
        (collected,) = database.execute("select collected from tab_tickets where request_id = ?", (request,)).fetchone()
        message = tabs_pb2.CollectedTicket.FromString(collected)
        message.results[1].commitment = bytes(32)
        assert CollectedTicket.from_message(message)
        database.execute(
            "update tab_tickets set collected = ? where request_id = ?", (message.SerializeToString(), request)
        )
    try:
        page.goto(f"/requests/{request}/verification")
        expect(page.locator("#outcome")).to_have_text("failed", timeout=WAIT_MS)
        expect(page.locator("tr.wrong")).to_contain_text("is not signed by")
    finally:
        with sqlite3.connect(file, timeout=30) as database:
            database.execute("update tab_tickets set collected = ? where request_id = ?", (collected, request))


def test_pages_follow_the_chain_without_being_loaded_again(page: Page, network: GatewayNetwork) -> None:
    page.goto("/tickets")
    page.evaluate("window.stayed = true")
    request = ask(network, network.account())
    expect(page.locator(f'a[href="/requests/{request}"]')).to_be_visible(timeout=WAIT_MS)
    before = page.locator("#head").inner_text()
    expect(page.locator("#head")).not_to_have_text(before, timeout=WAIT_MS)
    assert page.evaluate("window.stayed") is True


def test_pages_work_without_scripts(browser: Browser, network: GatewayNetwork, settled_request: str) -> None:
    context = browser.new_context(base_url=network.url, java_script_enabled=False)
    page = context.new_page()
    page.goto("/")
    for name in ("Requests", "Tabs", "Batches", "Nodes", "Plans", "Models", "Slashes", "Blocks"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.locator('nav a[aria-current="page"]')).to_have_count(0 if name in ("Tabs",) else 1)
    page.goto(f"/requests/{settled_request}/verification")
    expect(page.locator("#outcome")).to_have_text("passed", timeout=WAIT_MS)
    context.close()


def test_search_finds_everything_that_has_a_name(
    page: Page, network: GatewayNetwork, settled_request: str, tab_request: str
) -> None:
    with network.http() as http:
        plan = http.get("/export/plans.json").json()[0]
        block = http.get("/export/blocks.json").json()[0]
        (node, *_) = http.get("/export/nodes.json").json()
        batch = http.get("/export/tickets.json").json()[-1]["batch_id"]
    page.goto(f"/requests/{settled_request}")
    transaction = page.locator('a[href^="/transactions/"]').first.get_attribute("href")
    assert transaction is not None
    cases = {
        settled_request: f"/requests/{settled_request}",
        tab_request.upper().replace("0X", "0x"): f"/requests/{tab_request}",
        plan["plan_id"]: f"/plans/{plan['plan_id']}",
        plan["model_id"]: f"/models/{plan['model_id']}",
        batch: f"/batches/{batch}",
        block["hash"]: f"/blocks/{block['number']}",
        str(block["number"]): f"/blocks/{block['number']}",
        transaction.rsplit("/", 1)[1]: transaction,
        node["node"].lower(): f"/nodes/{node['node']}",
        node["operator"]: f"/accounts/{node['operator']}",
        "smollm": f"/models/{plan['model_id']}",
    }
    for text, target in cases.items():
        page.goto("/")
        page.get_by_role("searchbox").fill(text)
        page.get_by_role("searchbox").press("Enter")
        page.wait_for_url(f"**{target}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.goto("/search?q=" + "nothing <b>of</b> that name")
    expect(page.locator("main q")).to_have_text("nothing <b>of</b> that name")


def test_what_strangers_write_is_shown_and_never_run(page: Page, network: GatewayNetwork) -> None:
    for number, name in enumerate((HOSTILE, FORMULA)):
        network.run(register_model(network, name, number))
    wait_for(network, "/models", "onerror")
    page.goto("/models")
    expect(page.get_by_role("link", name=HOSTILE)).to_be_visible()
    assert page.title().startswith("Models")
    page.get_by_role("link", name=HOSTILE).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Model {HOSTILE}")
    assert page.title() != "owned"
    for path in (f"/search?q={HOSTILE}", "/requests?status=%3Cscript%3E", f"/nodes/{HOSTILE}", "/%3Cscript%3E"):
        page.goto(path)
        assert page.title() != "owned"
        assert page.locator("img").count() == 0
        assert page.locator("script").count() <= 1
    with network.http() as http:
        rows = list(csv.DictReader(io.StringIO(http.get("/export/models.csv").text)))
        names = {row["name"] for row in rows}
        assert f"'{FORMULA}" in names
        assert HOSTILE in names
        exported = http.get("/export/models.json")
        assert FORMULA in {row["name"] for row in exported.json()}
        assert exported.headers["content-disposition"].startswith("attachment")


async def register_model(network: GatewayNetwork, name: str, number: int) -> None:
    signer = await network.devnet.fund_key("registrant")
    async with await Web3ChainClient.connect(network.devnet.rpc_url, network.devnet.deployment) as chain:
        submitter = Submitter(chain, signer)
        manifest = bytes([number + 1]) * 32
        await submitter.submit("ShardAssignments", "registerModel", manifest, manifest, 3, name)


def wait_for(network: GatewayNetwork, path: str, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    with network.http() as http:
        while text not in http.get(path, headers={"Accept": "text/html"}).text:
            assert time.monotonic() < deadline, f"no {text} on {path}"
            time.sleep(0.2)


def test_lists_are_exported_exactly(network: GatewayNetwork, settled_request: str) -> None:
    with network.http() as http:
        rows = http.get("/export/requests.json").json()
        table = list(csv.DictReader(io.StringIO(http.get("/export/requests.csv").text)))
        assert http.get("/export/secrets.csv").status_code == 404
    assert [row["request_id"] for row in rows] == [row["request_id"] for row in table]
    (mine,) = (row for row in rows if row["request_id"] == settled_request)
    record: Any
    with network.http() as http:
        record = VerificationRecord.from_bytes(http.get(f"/requests/{settled_request}/record.json").content)
    assert mine["deposit_wei"] == str(record.request.deposit)
    assert mine["output_tokens"] > 0


def test_narrow_and_dark_screens_are_served_too(
    browser: Browser, network: GatewayNetwork, settled_request: str
) -> None:
    context = browser.new_context(
        base_url=network.url, viewport={"width": 380, "height": 800}, color_scheme="dark", reduced_motion="reduce"
    )
    page = context.new_page()
    for path in ("/", "/requests", f"/requests/{settled_request}", "/nodes", "/plans", "/blocks"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 29)"
    # Everything that can be used is reached by the keyboard, the content first.
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    context.close()


def test_what_is_not_there_is_said_as_a_page(page: Page, network: GatewayNetwork) -> None:
    for path in ("/requests/0x12", "/requests/0x" + "ab" * 32, "/nodes/0x" + "11" * 20, "/blocks/999999", "/nowhere"):
        response = page.goto(path)
        assert response is not None
        assert response.status == 404
        expect(page.get_by_role("link", name="To the overview")).to_be_visible()
    with network.http() as http:
        assert http.get("/requests/0x12").json()["error"]["code"] == "not_found"
