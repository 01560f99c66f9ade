"""The Python names of the contracts' states are the Solidity enums, in order."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

from bsns.protocol.contract_states import SLASH_REASONS, NodeStatus, Phase, RequestStatus, StageVerdict

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
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() for name in _members(interface, states.__name__)]
    assert names == [state.name for state in states]
    assert [int(state) for state in states] == list(range(len(names)))


def test_slash_reasons_are_those_of_the_registry() -> None:
    assert list(SLASH_REASONS) == _members("INodeRegistry", "SlashReason")


def _members(interface: str, enum: str) -> list[str]:
    source = (INTERFACES / f"{interface}.sol").read_text()
    found = re.search(rf"enum {enum} \{{(.*?)\}}", source, re.DOTALL)
    assert found is not None
    body = re.sub(r"//.*", "", found.group(1))
    return [name.strip() for name in body.split(",") if name.strip()]
