"""The Python names of the contracts' states are the Solidity enums, in order."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

from bsns.protocol.contract_states import NodeStatus, Phase, RequestStatus, StageVerdict

INTERFACES = Path(__file__).resolve().parents[2] / "contracts" / "interfaces"


@pytest.mark.parametrize(
    ("interface", "states"),
    [
        ("INodeRegistry", NodeStatus),
        ("IInferenceEscrow", RequestStatus),
        ("IOutputVerification", Phase),
        ("IOutputVerification", StageVerdict),
    ],
)
def test_states_equal_the_solidity_enum(interface: str, states: type[IntEnum]) -> None:
    source = (INTERFACES / f"{interface}.sol").read_text()
    found = re.search(rf"enum {states.__name__} \{{(.*?)\}}", source, re.DOTALL)
    assert found is not None
    body = re.sub(r"//.*", "", found.group(1))
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", name.strip()).upper() for name in body.split(",") if name.strip()]
    assert names == [state.name for state in states]
    assert [int(state) for state in states] == list(range(len(names)))
