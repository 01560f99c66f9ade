"""`make pictures`: the pictures of the documentation, taken of a real network while it works.

Writes docs/figures/explorer-*.png with a real browser, and docs/figures/session.svg: the session of `make demo`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from bsns.runtime.prepare import prepare
from tests.browser.test_explorer import chromium
from tests.integration.gateway_network import GatewayNetwork, running_gateway
from tests.integration.network import run_command

FIGURES = Path(__file__).resolve().parents[2] / "docs/figures"
WIDTH, HEIGHT = 1180, 860
SESSION_COLUMNS = 116
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Write a haiku.")


def use(network: GatewayNetwork, folder: Path) -> None:
    """Something to see: answers on a tab, and one that is paid for directly."""
    with network.client(network.account()) as client:
        for number in range(8):
            question = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
            client.chat.completions.create(model=network.model, messages=question, max_tokens=12)
            time.sleep(1)
    devnet = network.devnet
    command = [
        *(sys.executable, "-m", "bsns.cli", "request", "--rpc", devnet.rpc_url, "--json"),
        *("--deployment", str(devnet.deployment_file), "--key-file", str(devnet.requester_key_file)),
        *("--model-folder", str(devnet.manifest.parent), "--state-dir", str(folder / "state"), "--max-tokens", "12"),
    ]
    for question in QUESTIONS[:2]:
        done = network.run(run_command([*command, "--", question]))
        assert done.status == 0, done.error


def photograph(network: GatewayNetwork) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(base_url=network.url, viewport={"width": WIDTH, "height": HEIGHT})
        page.goto("/")
        page.screenshot(path=FIGURES / "explorer-overview.png", full_page=True)
        page.goto("/requests")
        page.locator("tbody tr a").first.click()
        page.wait_for_load_state()
        page.screenshot(path=FIGURES / "explorer-request.png")
        page.get_by_role("link", name="Verify against the chain").click()
        page.locator("#outcome").wait_for()
        page.screenshot(path=FIGURES / "explorer-verification.png")
        dark = browser.new_page(base_url=network.url, viewport={"width": 400, "height": HEIGHT}, color_scheme="dark")
        dark.goto("/nodes")
        dark.locator("tbody tr a").first.click()
        dark.wait_for_load_state()
        dark.screenshot(path=FIGURES / "explorer-node-dark.png")
        browser.close()


def record_session() -> None:
    """What `make demo` prints, as a picture."""
    done = subprocess.run(
        ["make", "demo", "MAX_TOKENS=32"], capture_output=True, text=True, check=True, timeout=600,
        cwd=FIGURES.parents[1],
    )  # fmt: skip
    with tempfile.TemporaryFile("w") as nowhere:
        console = Console(record=True, width=SESSION_COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ make demo", style="bold"))
        for line in done.stderr.splitlines():
            if line.startswith(("make", ">>")):
                continue
            # A table keeps its edges.
            shown = line if "│" in line else re.sub(r"(0x[0-9a-fA-F]{6})[0-9a-fA-F]{20,}", r"\1…", line)
            console.print(Text(shown, style="dim" if re.match(r"\s+\d+\.\d s", line) else ""))
        console.save_svg(str(FIGURES / "session.svg"), title="make demo")


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_gateway(Path(folder) / "network", prepare(), node_count=4) as network,
    ):
        use(network, Path(folder))
        photograph(network)
    record_session()


if __name__ == "__main__":
    main()
