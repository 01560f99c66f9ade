"""A little of `make fuzz` with every run: nothing that strangers send ends a process or looks like its failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bsns.runtime.prepare import prepare
from tests.fuzz.__main__ import fuzz_alone, fuzz_network
from tests.integration.gateway_network import running_gateway

SEED = 20_261_127


def test_decoders_and_commands_take_anything(tmp_path: Path) -> None:
    found = fuzz_alone(tmp_path, SEED, 0.04, Console(stderr=True))
    assert found.findings == []
    assert found.tried > 3_000


@pytest.mark.chain
@pytest.mark.model
@pytest.mark.timeout(420)
def test_services_take_anything(tmp_path: Path) -> None:
    with running_gateway(tmp_path, prepare()) as network:
        found = fuzz_network(network, SEED, 0.05, Console(stderr=True))
    assert found.findings == []
    assert found.tried > 1_000
