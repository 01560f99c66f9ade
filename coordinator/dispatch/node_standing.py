"""What the chain shows of each node's conduct, and what follows from it for plans and routes.

Owns the reputation of nodes (`bsns.protocol.reputation`) and the evidence that accumulates against those whose outputs
stay within the tolerance but never within the honest radius (`bsns.protocol.accumulated_evidence`). Both are a fold
over finished requests in the order of the chain, so that anybody who reads the same chain finds the same numbers; a
reorganisation folds anew. Slashes nobody: what one request proves is the contract's business, what many suggest only
steers where work goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from bsns.protocol import reputation
from bsns.protocol.accumulated_evidence import AccumulatedEvidence
from bsns.protocol.contract_states import StageVerdict
from bsns.protocol.sketch import TOLERANCES, distance, member_distance
from coordinator.network_state import RequestState, Reveal, TallyState
from coordinator.storage import ChainPlace, Storage
from coordinator.transaction_outbox import WorkerThread

_REQUESTS_A_READ: Final = 256
# A node of low reputation still gets some work, or it could never earn it back; one of high reputation is not flooded.
_WEIGHT_BOUNDS: Final = (0.1, 2.0)
# Radius and tolerance are the same in every execution class, only the unit of the sketch differs.
_TOLERANCE: Final = TOLERANCES["torch-cpu/float32/sdpa"]
_BEGINNING: Final[ChainPlace] = (-1, -1)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Duty:
    """How a node did one duty of one request. `distance` of its sketch from the medoid that decided, if there was one
    and the numbers of tokens agree.
    """

    node: str
    kept: bool
    distance: int | None = None


class NodeStanding:
    """What is known of one node: reputation, and the evidence that its distances are not those of honest executions."""

    def __init__(self) -> None:
        self.reputation = reputation.INITIAL
        self._evidence = AccumulatedEvidence(_TOLERANCE)
        # Once raised the alarm stays: acting on the first one is what its false alarm rate is promised for.
        self.is_suspect = False

    @property
    def weight(self) -> float:
        """Share of work beside a node of reputation 1; 0 for a suspect."""
        low, high = _WEIGHT_BOUNDS
        return 0.0 if self.is_suspect else min(high, max(low, self.reputation))

    def take(self, duty: Duty) -> None:
        """One more duty."""
        self.reputation = reputation.after_duty(self.reputation, duty.kept)
        if duty.distance is not None:
            self.is_suspect |= self._evidence.observe(duty.distance)


def duties_of(request: RequestState, tolerance: int) -> Iterator[Duty]:
    """The duties of a finished request: first of its executors by stage, then of its members in the order they
    committed in. A duty that nothing was found out about is left out; `tolerance` is the contract's tau.
    """
    complete = all(stage.commitment is not None for stage in request.stages)
    for stage in request.stages:
        for replaced in stage.replaced:
            # Its neighbour and the requester agree that it stopped.
            yield Duty(replaced, False)
        if not complete:
            # The answer ended early. Who committed did its part; who did not is not always at fault, but often enough:
            # not where the requester chose the nodes itself, who could choose a rival and never come.
            if stage.commitment is None and not request.routed_by_requester:
                yield Duty(stage.node, False)
            continue
        tally = _last_tally(request, stage.stage)
        if tally is not None and tally.verdict != StageVerdict.NO_QUORUM:
            yield Duty(stage.node, tally.verdict == StageVerdict.ACCEPTED, _executor_distance(tally, request))
    for member in request.attestations:
        tally = request.tally(member.round, member.stage)
        if tally is None:
            continue  # the round was cut short: nobody was asked to reveal to its end
        if member.reveal is None:
            yield Duty(member.node, False)
            continue
        medoid = _revealed_by(request, tally)
        if medoid is None:
            continue
        if medoid.output_tokens != member.reveal.output_tokens:
            yield Duty(member.node, False)
            continue
        agrees = member_distance(medoid.sketches, member.reveal.sketches) <= tolerance
        away = distance(medoid.sketch, member.reveal.sketch)
        yield Duty(member.node, agrees, None if member.reveal.output_tokens == 0 else away)


class NodeStandings:
    """Standing of every node that ever had a duty, up to the newest block that was stored."""

    def __init__(self, storage: Storage, run_blocking: WorkerThread = asyncio.to_thread) -> None:
        self._storage = storage
        self._blocking = run_blocking
        self._place = _BEGINNING
        self._standings: dict[str, NodeStanding] = {}

    def of(self, node: str) -> NodeStanding:
        """The node's standing; a node without history is neither good nor bad."""
        return self._standings.get(node) or NodeStanding()

    def forget(self) -> None:
        """The chain was rewritten: the next `step` folds everything again."""
        self._place = _BEGINNING
        self._standings.clear()

    async def step(self, tolerance: int) -> None:
        """Take in what has finished since the last call."""
        while True:
            place = self._place
            found = await self._blocking(lambda: self._storage.finished_requests(place, _REQUESTS_A_READ))  # noqa: B023
            for place, request in found:
                for duty in duties_of(request, tolerance):
                    self._take(duty, request)
                self._place = place
            if len(found) < _REQUESTS_A_READ:
                return

    def _take(self, duty: Duty, request: RequestState) -> None:
        standing = self._standings.setdefault(duty.node, NodeStanding())
        was_suspect = standing.is_suspect
        standing.take(duty)
        if standing.is_suspect and not was_suspect:
            _log.warning(
                "node_suspect",
                node=duty.node,
                request_id="0x" + request.request_id.hex(),
                hint="its outputs differ from honest ones by more than noise explains; it gets no more work from us",
            )


def _last_tally(request: RequestState, stage: int) -> TallyState | None:
    return next((item for item in reversed(request.tallies) if item.stage == stage), None)


def _executor_distance(tally: TallyState, request: RequestState) -> int | None:
    """None where there was no committee, or where the numbers of tokens differ: then it is no distance of sketches."""
    medoid = _revealed_by(request, tally)
    reveal = request.stages[tally.stage].reveal
    if medoid is None or reveal is None or medoid.output_tokens != reveal.output_tokens:
        return None
    return tally.distance


def _revealed_by(request: RequestState, tally: TallyState) -> Reveal | None:
    """What the medoid of a tally revealed."""
    members = request.members(tally.round, tally.stage)
    return next((item.reveal for item in members if item.node == tally.medoid), None)
