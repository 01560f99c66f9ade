"""Nodes of a route that are replaced while their request runs, and who has to agree.

A route fixes one replica per stage. If its node stops, the requester names another replica of the plan, and the node
before it on the ring, the witness, signs that it found it gone: so no requester can take the pay of a node that did its
work, and no node can push out another. Owns the rule, which is that of InferenceEscrow.replaceStages. Promises that
both say the same of every list of replacements. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from eth_typing import ChecksumAddress

from bsns.protocol import merkle
from bsns.protocol.identifiers import ProtocolError
from bsns.protocol.plan import Assignment
from bsns.protocol.typed_data import STAGE_REPLACEMENT, Domain, is_signed_by, signing_digest

MAXIMUM_REPLACEMENTS: Final = 64
"""InferenceEscrow takes no more at once."""


@dataclass(frozen=True, slots=True)
class StageReplacement:
    """`assignment`'s node in the place of `replaced` (InferenceEscrow.Replacement). `consent` is the requester's
    signature, `witness` that of the node which `witness_of` names; empty where there is none.
    """

    request_id: bytes
    replaced: ChecksumAddress
    assignment: Assignment
    proof: tuple[bytes, ...]
    consent: bytes = b""
    witness: bytes = b""

    @property
    def stage(self) -> int:
        return self.assignment.stage

    def digest(self, domain: Domain) -> bytes:
        """What requester and witness sign, under the domain of InferenceEscrow."""
        values = (self.request_id, self.stage, self.replaced, self.assignment.node)
        return signing_digest(domain, STAGE_REPLACEMENT, values)

    def as_tuple(self) -> tuple[object, ...]:
        """Field values in the order of the Solidity struct."""
        return (self.assignment.as_tuple(), list(self.proof), self.replaced, self.consent, self.witness)


def witness_of(route: Sequence[ChecksumAddress], stage: int, replaced: ChecksumAddress) -> ChecksumAddress | None:
    """Who has to find `replaced`, the node of `stage`, gone: the node of the stage before it on the ring, or the next
    one further back that is another; None if the whole route is its own.
    """
    stages = len(route)
    before = (route[(stage - back) % stages] for back in range(1, stages))
    return next((node for node in before if node != replaced), None)


def route_after(
    route: Sequence[ChecksumAddress],
    replacements: Sequence[StageReplacement],
    *,
    requester: ChecksumAddress,
    domain: Domain,
    plan_root: bytes,
) -> tuple[ChecksumAddress, ...]:
    """The nodes of `route`, one a stage, with `replacements` in place, in order. One of a node that no longer serves
    its stage is passed over. ProtocolError for one that the chain would refuse.
    """
    if len(replacements) > MAXIMUM_REPLACEMENTS:
        raise ProtocolError(f"{len(replacements)} replacements, at most {MAXIMUM_REPLACEMENTS} are taken")
    nodes = list(route)
    for item in replacements:
        stage, node = item.stage, item.assignment.node
        if stage >= len(nodes):
            raise ProtocolError(f"there is no stage {stage} to be replaced on a route of {len(nodes)}")
        if nodes[stage] != item.replaced:
            continue
        if not merkle.verify(plan_root, item.assignment.leaf, item.proof):
            raise ProtocolError(f"node {node} is not assigned to stage {stage} by the plan of the request")
        digest = item.digest(domain)
        if not is_signed_by(digest, item.consent, requester):
            raise ProtocolError(f"the replacement of stage {stage} by node {node} is not signed by the requester")
        witness = witness_of(nodes, stage, item.replaced)
        if witness is not None and not is_signed_by(digest, item.witness, witness):
            raise ProtocolError(
                f"the replacement of stage {stage} by node {node} is not signed by its witness {witness}"
            )
        nodes[stage] = node
    return tuple(nodes)
