"""Every custom error, event and state-changing function of the contracts' interfaces is tested by some Solidity test.

Reads the sources only: which errors and events an interface declares, and which ones the `.t.sol` files name inside
`vm.expectRevert(...)` or emit after `vm.expectEmit(...)`; which functions change state, and which ones the table of
roles in Roles.t.sol calls (ROLE-01). That each of those expectations is met is forge's business: an expectation that is
not met fails the Solidity suite.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERFACES = sorted((ROOT / "contracts" / "interfaces").glob("I*.sol"))
TESTS = sorted((ROOT / "tests" / "contracts").rglob("*.t.sol"))

ROLE_TABLE = ROOT / "tests" / "contracts" / "Roles.t.sol"


def _without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def _declared(kind: str) -> list[str]:
    names = []
    for path in INTERFACES:
        for name in re.findall(rf"^\s*{kind}\s+(\w+)\s*\(", _without_comments(path.read_text()), flags=re.MULTILINE):
            names.append(f"{path.stem}.{name}")
    return names


def _call_arguments(source: str, call: str) -> list[str]:
    """Text between the parentheses of each `call(...)`, nested ones included."""
    spans = []
    for match in re.finditer(re.escape(call) + r"\s*\(", source):
        depth, position = 1, match.end()
        while depth and position < len(source):
            depth += {"(": 1, ")": -1}.get(source[position], 0)
            position += 1
        spans.append(source[match.end() : position - 1])
    return spans


def _expected_errors() -> set[str]:
    expected: set[str] = set()
    for path in TESTS:
        source = _without_comments(path.read_text())
        # Nothing but the reason of an expected revert is ever encoded with a selector there, often for a function that
        # expects it.
        for call in ("vm.expectRevert", "abi.encodeWithSelector"):
            for span in _call_arguments(source, call):
                expected.update(re.findall(r"\b(I\w+\.\w+)\.selector\b", span))
    return expected


def _expected_events() -> set[str]:
    expected: set[str] = set()
    for path in TESTS:
        source = _without_comments(path.read_text())
        # The emit that describes an expectation follows it at once; several expectations may stand in a row.
        for block in re.findall(r"vm\.expectEmit\s*\([^;]*;\s*emit\s+(I\w+\.\w+)\s*\(", source):
            expected.add(block)
    return expected


@pytest.mark.parametrize("error", _declared("error"))
def test_interface_error_is_expected_by_a_contract_test(error: str) -> None:
    assert error in _expected_errors(), f"no vm.expectRevert({error}.selector) in tests/contracts"


@pytest.mark.parametrize("event", _declared("event"))
def test_interface_event_is_expected_by_a_contract_test(event: str) -> None:
    assert event in _expected_events(), f"no vm.expectEmit(...) followed by emit {event}(...) in tests/contracts"


def _state_changing_functions() -> list[str]:
    names = []
    for path in INTERFACES:
        source = _without_comments(path.read_text())
        for name, rest in re.findall(r"\bfunction\s+(\w+)\s*\(([^;]*);", source):
            if not re.search(r"\b(view|pure)\b", rest):
                names.append(f"{path.stem}.{name}")
    return names


@pytest.mark.parametrize("function", _state_changing_functions())
def test_interface_function_is_in_the_table_of_roles(function: str) -> None:
    called = {span.split(",")[0].strip() for span in _call_arguments(ROLE_TABLE.read_text(), "abi.encodeCall")}
    assert function in called, f"Roles.t.sol does not say who may call {function}"


def test_declared_names_are_found() -> None:
    # Guards the parser: a change of layout that hides every declaration must not turn the checks above into no-ops.
    assert len(_declared("error")) > 50
    assert len(_declared("event")) > 30
    assert len(_state_changing_functions()) > 30
