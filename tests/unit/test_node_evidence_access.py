"""Who may see the evidence of a stage: decided by the chain alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bsns.chain.signer import KeySigner
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import address, keccak256
from bsns.protocol.typed_data import (
    EVIDENCE_QUERY,
    assignments_domain,
    escrow_domain,
    registry_domain,
    signing_digest,
    tabs_domain,
    verification_domain,
)
from bsns.v1 import execution_pb2
from node_client.chain_view import SigningDomains
from node_client.errors import ErrorReason, Refusal
from node_client.grpc_service import ShardExecutionServicer
from node_client.settings import NodeSettings

NOW = 1_700_000_000
REQUEST = keccak256(b"request")
STAGE = 2
CONTRACT = address("0x" + "ab" * 20)
DOMAINS = SigningDomains(
    registry_domain(1, CONTRACT),
    assignments_domain(1, CONTRACT),
    escrow_domain(1, CONTRACT),
    verification_domain(1, CONTRACT),
    tabs_domain(1, CONTRACT),
)
# A ring of six stages, so that the neighbours of a stage are not neighbours of each other.
EXECUTORS = [KeySigner(keccak256(b"executor %d" % number)) for number in range(6)]
MEMBER, REQUESTER = KeySigner(keccak256(b"member")), KeySigner(keccak256(b"requester"))


async def may_see(tmp_path: Path, caller: KeySigner, seats: set[int], *, stage: int = STAGE, inputs: bool) -> bool:
    """Whether `caller`, seated on `seats`, gets the evidence of `stage`."""

    async def request(_: bytes) -> Any:
        return SimpleNamespace(status=RequestStatus.COMMITTED, requester=REQUESTER.address)

    async def stages(_: bytes) -> Any:
        return tuple(SimpleNamespace(node=executor.address) for executor in EXECUTORS)

    async def is_seated(_: bytes, stage: int, node: str) -> bool:
        return node == caller.address and stage in seats

    recorded = SimpleNamespace(request=REQUEST, stage=stage)
    servicer = ShardExecutionServicer(
        NodeSettings(rpc_url="http://127.0.0.1:1", deployment=tmp_path / "deployment.json", data_dir=tmp_path),
        EXECUTORS[stage].address,
        DOMAINS,
        cast("Any", SimpleNamespace(request=request, stages=stages, is_seated=is_seated)),
        cast("Any", None),
        cast("Any", None),
        cast("Any", None),
        cast("Any", SimpleNamespace(sealed_stage=lambda *_: recorded)),
        cast("Any", None),
        cast("Any", None),
        clock=lambda: NOW,
    )
    digest = signing_digest(DOMAINS.verification, EVIDENCE_QUERY, (REQUEST, stage, NOW + 60))
    query = execution_pb2.GetStageEvidenceRequest(
        request_id=REQUEST, stage=stage, deadline=NOW + 60, signature=caller.sign_digest(digest), with_inputs=inputs
    )
    try:
        return await servicer._authorised_stage(query) is recorded
    except Refusal as refusal:
        if refusal.reason != ErrorReason.ERROR_REASON_NOT_SEATED:
            raise
        return False


@pytest.mark.parametrize(
    ("stage", "seats", "header", "tensors"),
    [
        (STAGE, {STAGE}, True, True),
        (STAGE, {STAGE - 1}, True, False),
        (STAGE, {STAGE + 1}, True, False),
        (STAGE, {STAGE + 2}, False, False),
        (STAGE, set(), False, False),
        (0, {5}, True, False),
        (5, {0}, True, False),
        (0, {4}, False, False),
    ],
)
async def test_evidence_for_a_member_is_what_its_seats_need(
    tmp_path: Path, stage: int, seats: set[int], header: bool, tensors: bool
) -> None:
    assert await may_see(tmp_path, MEMBER, seats, stage=stage, inputs=False) is header
    assert await may_see(tmp_path, MEMBER, seats, stage=stage, inputs=True) is tensors


async def test_evidence_for_the_requester_and_the_nodes_of_the_route(tmp_path: Path) -> None:
    assert await may_see(tmp_path, REQUESTER, set(), inputs=False)
    assert not await may_see(tmp_path, REQUESTER, set(), inputs=True)
    for number, executor in enumerate(EXECUTORS):
        assert await may_see(tmp_path, executor, set(), inputs=True) is (number in (STAGE - 1, STAGE + 1))
