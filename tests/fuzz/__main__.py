"""`make fuzz`: at least 100,000 inputs at everything that strangers reach, on a real network. Ends with the line
`N inputs tried, M crashes, K server errors`, and with status 1 unless both are 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bsns.runtime.prepare import prepare
from tests.fuzz import surfaces
from tests.fuzz.decoders import decoders
from tests.fuzz.surfaces import Tally
from tests.integration.gateway_network import GatewayNetwork, running_gateway

# Nobody is told to come back later while what is behind the limits is tried.
UNLIMITED = {
    "key_requests_a_minute": 10**9, "address_requests_a_minute": 10**9, "queued_requests": 1_000, "audits": 4,
}  # fmt: skip


def fuzz_network(network: GatewayNetwork, seed: int, scale: float, console: Console) -> Tally:
    """HTTP and gRPC of a running network, whose processes must all be there at the end."""
    total, devnet = Tally(), network.devnet
    network.restart(UNLIMITED)
    began = time.monotonic()
    node, coordinator = devnet.nodes[0].ready["endpoint"], devnet.coordinator.ready["endpoint"]
    for name, run in (
        ("RPCs of a node", lambda: surfaces.fuzz_rpc("node", node, round(1_400 * scale), seed)),
        ("RPCs of the coordinator", lambda: surfaces.fuzz_rpc("coordinator", coordinator, round(1_400 * scale), seed)),
        ("HTTP", lambda: surfaces.fuzz_http(network.url, network.account(), network.model, round(120 * scale), seed)),
    ):
        found = run()
        _report(console, name, found, began)
        total.add(found)
        began = time.monotonic()
    for died in devnet.take_dead():
        total.crash(f"{died.name} died: {died.tail()}")
    # What is left of it all must still work.
    with network.client(network.account()) as client:
        client.chat.completions.create(
            model=network.model, messages=[{"role": "user", "content": "Still there?"}], max_tokens=2
        )
    return total


def fuzz_alone(folder: Path, seed: int, scale: float, console: Console) -> Tally:
    """Decoders and commands, which need no network."""
    total = Tally()
    for decoder in decoders(folder):
        began = time.monotonic()
        found = surfaces.fuzz_decoder(decoder, round(4_200 * scale), seed)
        _report(console, decoder[0], found, began)
        total.add(found)
    began = time.monotonic()
    found = surfaces.fuzz_commands(round(100 * scale), seed)
    _report(console, "commands", found, began)
    total.add(found)
    return total


def _report(console: Console, name: str, found: Tally, began: float) -> None:
    console.print(
        f"{name}: {found.tried:,} inputs, {found.crashes} crashes, {found.server_errors} server errors, "
        f"{time.monotonic() - began:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--scale", type=float, default=1.0, help="how many inputs; 1: at least 100,000")
    options = parser.parse_args()
    console, total = Console(stderr=True), Tally()
    console.print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        total.add(fuzz_alone(Path(folder), options.seed, options.scale, console))
        with running_gateway(Path(folder) / "network", prepare()) as network:
            total.add(fuzz_network(network, options.seed, options.scale, console))
    for finding in total.findings:
        console.print(finding, markup=False, highlight=False, soft_wrap=True)
    print(f"{total.tried} inputs tried, {total.crashes} crashes, {total.server_errors} server errors")
    sys.exit(1 if total.crashes or total.server_errors else 0)


if __name__ == "__main__":
    main()
