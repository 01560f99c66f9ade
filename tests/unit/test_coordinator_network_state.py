"""apply handles every event the contracts declare, and each event belongs to one aggregate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bsns.chain.artifacts import CONTRACT_NAMES, contract_artifact
from bsns.chain.client import Block, ChainEvent
from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.identifiers import address
from coordinator.documents import DocumentError, decode_record, decode_values, encode_record, encode_values
from coordinator.network_state import (
    AGGREGATE_TYPES,
    NetworkState,
    NetworkStateError,
    NodeState,
    RequestState,
    StageState,
    UnknownEventError,
    aggregate_of,
    apply,
    fold,
)

_BLOCK = Block(7, bytes([7]) * 32, bytes([6]) * 32, 1_000)
_REPOSITORY = Path(__file__).resolve().parents[2]


def _event(contract: str, name: str, arguments: dict[str, Any], index: int = 0) -> ChainEvent:
    return ChainEvent(contract, name, arguments, _BLOCK.number, _BLOCK.hash, bytes(32), index)


def _sample(parameter: dict[str, Any]) -> Any:
    kind = parameter["type"]
    if kind.endswith("[]"):
        return (_sample({**parameter, "type": kind[:-2]}),)
    match kind:
        case "tuple":
            return (0, 0, 0, 1, address(bytes(20)), 1, bytes(32))
        case "address":
            return address(bytes(20))
        case "bytes32":
            return bytes(32)
        case "bytes":
            return b"document"
        case "string":
            return "text"
        case "bool":
            return True
        case _:
            return 1 if parameter["name"] == "round" else 0


def _declared() -> list[tuple[str, dict[str, Any]]]:
    return [
        (contract, item)
        for contract in CONTRACT_NAMES
        if contract != "RequestTabs"  # which the follower passes over
        for item in contract_artifact(contract).abi
        if item["type"] == "event"
    ]


def _opened() -> ChainEvent:
    [abi] = [item for contract, item in _declared() if item["name"] == "RequestOpened"]
    return _event("InferenceEscrow", "RequestOpened", {item["name"]: _sample(item) for item in abi["inputs"]})


@pytest.mark.parametrize(
    ("contract", "abi"), _declared(), ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_apply_of_every_event_in_the_abis_changes_its_aggregate_and_no_other(
    contract: str, abi: dict[str, Any]
) -> None:
    event = _event(contract, abi["name"], {item["name"]: _sample(item) for item in abi["inputs"]})
    routed = _event(
        "InferenceEscrow", "RequestRouted", {"requestId": bytes(32), "nodes": (address(bytes(20)),), "deadline": 5}
    )
    before = fold(NetworkState(), [(_opened(), _BLOCK), (routed, _BLOCK)])
    after = apply(before, event, _BLOCK)
    key = aggregate_of(event)
    assert isinstance(after.aggregates[key], AGGREGATE_TYPES[key[0]])
    assert {name: item for name, item in after.aggregates.items() if name != key} == {
        name: item for name, item in before.aggregates.items() if name != key
    }
    stored = after.aggregates[key]
    assert decode_record(type(stored), encode_record(stored)) == stored


def test_events_in_the_sources_are_those_of_the_abis() -> None:
    in_sources = set()
    for path in (_REPOSITORY / "contracts").glob("*.sol"):
        if path.stem == "RequestTabs":
            continue
        source = path.read_text() + (path.parent / "interfaces" / f"I{path.stem}.sol").read_text()
        in_sources |= {(path.stem, name) for name in re.findall(r"^\s*event (\w+)\(", source, re.MULTILINE)}
    assert in_sources == {(contract, abi["name"]) for contract, abi in _declared()}


def test_apply_of_an_unknown_event_names_it() -> None:
    with pytest.raises(UnknownEventError, match=r"NodeRegistry\.NodeTeleported"):
        apply(NetworkState(), _event("NodeRegistry", "NodeTeleported", {}), _BLOCK)
    with pytest.raises(UnknownEventError):
        apply(NetworkState(), _event("Elsewhere", "Credited", {"account": address(bytes(20))}), _BLOCK)


def test_apply_to_a_request_that_was_never_opened_is_an_error() -> None:
    event = _event("InferenceEscrow", "RequestVerified", {"requestId": bytes(32)})
    with pytest.raises(NetworkStateError, match="never opened"):
        apply(NetworkState(), event, _BLOCK)


def test_contradiction_about_a_request_nobody_opened_is_taken_for_its_node() -> None:
    arguments = {"requestId": bytes([9]) * 32, "stage": 1, "node": address(bytes(20)), "reporter": address(bytes(20))}
    state = apply(NetworkState(), _event("OutputVerification", "ContradictionProven", arguments), _BLOCK)
    assert state.nodes[address(bytes(20))].contradictions == 1


def test_request_challenged_after_its_verdict_is_committed_again() -> None:
    request = {"requestId": bytes(32)}
    state = fold(
        NetworkState(),
        [
            (_opened(), _BLOCK),
            (_event("InferenceEscrow", "RequestVerified", request), _BLOCK),
            (
                _event(
                    "OutputVerification",
                    "Challenged",
                    {**request, "stage": 0, "challenger": address(bytes(20)), "bond": 5},
                ),
                _BLOCK,
            ),
        ],
    )
    [found] = state.requests.values()
    assert isinstance(found, RequestState)
    assert found.status == RequestStatus.COMMITTED
    assert found.challenges[0].upheld is None


@pytest.mark.parametrize(
    ("node", "status"),
    [
        (NodeState("n"), NodeStatus.ABSENT),
        (NodeState("n", operator="o", active_from=101), NodeStatus.PENDING),
        (NodeState("n", operator="o", active_from=100), NodeStatus.ACTIVE),
        (NodeState("n", operator="o", jailed_until=50), NodeStatus.JAILED),
        (NodeState("n", operator="o", jailed_until=50, exiting=True), NodeStatus.EXITING),
    ],
)
def test_node_status_at_a_time_is_the_registrys(node: NodeState, status: NodeStatus) -> None:
    assert node.status_at(100) == status


def test_documents_give_back_what_was_encoded() -> None:
    values = {"a": (1, 2**255, -1, True, None, "0x00"), "b": bytes([0, 255]), "c": ((b"",), ())}
    assert decode_values(encode_values(values)) == values
    with pytest.raises(DocumentError):
        encode_values({"a": 1.5})
    for other in ('{"node": "n", "nodes": 1}', "{}", "[]"):
        with pytest.raises(DocumentError):
            decode_record(NodeState, other)


def test_document_of_an_older_release_lacks_fields_that_have_a_default() -> None:
    stored = '{"commitment": null, "node": "n", "reveal": null, "stage": 1}'
    assert decode_record(StageState, stored) == StageState(1, "n")


def test_stage_replaced_gives_the_stage_to_the_new_node_and_remembers_the_old_ones() -> None:
    nodes = [address(bytes([number]) * 20) for number in range(4)]
    routed = {"requestId": bytes(32), "nodes": tuple(nodes[:2]), "deadline": 5}
    events = [_opened(), _event("InferenceEscrow", "RequestRouted", routed)]
    for old, new in ((1, 2), (2, 3)):
        change = {"requestId": bytes(32), "stage": 1, "replaced": nodes[old], "node": nodes[new]}
        events.append(_event("InferenceEscrow", "StageReplaced", change))
    state = fold(NetworkState(), [(item, _BLOCK) for item in events])
    request = state.aggregates[aggregate_of(events[0])]
    assert isinstance(request, RequestState)
    assert request.stages == (StageState(0, nodes[0]), StageState(1, nodes[3], replaced=(nodes[1], nodes[2])))
