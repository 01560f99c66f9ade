"""Links between nodes, measured: both ends of ShardExecution.Probe.

`LinkProber` owns what this node knows of its ways to the nodes it may follow or precede, and when to look again.
Promises that a link is reported only if the peer proved to have received every byte that was timed, that one peer at a
time costs bounded bytes and seconds, and that a peer out of reach is left out and asked again ever more seldom.
`ProbeResponder` answers others: registered nodes only, within a budget of bytes a minute. Does not decide what a link
is good for.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio
import structlog
from eth_typing import ChecksumAddress

from bsns.chain.errors import ChainError
from bsns.protocol.commitments import content_digest
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.endpoints import is_loopback
from bsns.protocol.identifiers import keccak256
from bsns.protocol.measurements import LinkTiming
from bsns.v1 import execution_pb2
from node_client.chain_view import ChainView
from node_client.errors import ErrorReason, Refusal
from node_client.peers import PeerPool
from node_client.settings import MIB, NodeSettings

if TYPE_CHECKING:
    from bsns.v1.execution_pb2_grpc import ShardExecutionAsyncStub

log = structlog.get_logger(__name__)

MAXIMUM_PROBE_BYTES: Final = MIB
_ROUND_TRIPS: Final = 5
_SMALL_BYTES: Final = 32
# The first also opens the connection's windows; a slow link ends with it, the others tell a fast one from its latency.
_BULK_BYTES: Final = (MIB // 16, MIB // 2, MIB // 2)
# Round trips vary: what is left after taking one off is believed down to this part of the whole.
_SMALLEST_TRANSFER_SHARE: Final = 8
_NANOSECONDS: Final = 1_000_000_000
# Round trips that differ by less than this change no plan, whatever their ratio.
_NEGLIGIBLE_NANOSECONDS: Final = 1_000_000
_SERVING: Final = (NodeStatus.PENDING, NodeStatus.ACTIVE)

_WINDOW_SECONDS: Final = 60.0
# A question costs the one who answers it at least the check of a signature.
_LEAST_COST_BYTES: Final = MIB // 64
# Three measurements a minute.
_CALLER_BYTES_A_MINUTE: Final = 4 * MIB

# Sends the payload, returns the answer's digest, within the seconds given.
Probe = Callable[[bytes, float], Awaitable[bytes]]


class ProbeFailedError(Exception):
    """A link could not be measured. The message says why; the peer is left out for a while."""


async def time_link(probe: Probe, seconds: float) -> tuple[int, int]:
    """Round trip in nanoseconds (median of small messages) and throughput to the peer in bytes a second.

    Takes at most `seconds`, and half of them at most for small messages. Of a link on which no large message arrives
    in what is left, the throughput is what it was at most. ProbeFailedError where small messages are not answered in
    time, or an answer proves nothing.
    """
    began = time.monotonic()

    async def elapsed(size: int, deadline: float) -> int:
        payload = secrets.token_bytes(size)
        started = time.perf_counter_ns()
        digest = await probe(payload, max(0.0, deadline - time.monotonic()))
        taken = time.perf_counter_ns() - started
        if digest != content_digest(payload):
            raise ProbeFailedError("the answer is not the digest of the payload: it was not received whole")
        return taken

    try:
        # What is left tells how slow the link is: a peer that takes its time here would leave none, and look fast.
        await elapsed(_SMALL_BYTES, began + seconds / 2)  # connects, and lets the peer look up who asks
        round_trips = [await elapsed(_SMALL_BYTES, began + seconds / 2) for _ in range(_ROUND_TRIPS)]
    except TimeoutError:
        raise ProbeFailedError(f"{_ROUND_TRIPS + 1} small messages were not answered in {seconds / 2:g} s") from None
    throughput = 0
    for size in _BULK_BYTES:
        started = time.perf_counter_ns()
        try:
            taken = await elapsed(size, began + seconds)
        except TimeoutError:
            if not throughput:
                throughput = size * _NANOSECONDS // (time.perf_counter_ns() - started)
            break
        transfer = max(taken - min(round_trips), taken // _SMALLEST_TRANSFER_SHARE)
        throughput = max(throughput, size * _NANOSECONDS // transfer)
    return int(statistics.median(round_trips)), max(1, throughput)


def differ_materially(known: Iterable[LinkTiming], now: Iterable[LinkTiming], share: float) -> bool:
    """Whether a link came or went, or one of its numbers changed by more than `share` of the larger."""
    before, after = {link.node: link for link in known}, {link.node: link for link in now}
    if before.keys() != after.keys():
        return True
    for node, old in before.items():
        new = after[node]
        trips = (old.round_trip_nanoseconds, new.round_trip_nanoseconds)
        if max(trips) - min(trips) > max(share * max(trips), _NEGLIGIBLE_NANOSECONDS):
            return True
        rates = (old.bytes_per_second, new.bytes_per_second)
        if max(rates) - min(rates) > share * max(rates):
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Failure:
    attempts: int
    retry_at: float


class LinkProber:
    """This node's links, kept up to date while `run` runs. `clock` counts seconds and never runs backwards."""

    def __init__(
        self,
        settings: NodeSettings,
        node: ChecksumAddress,
        chain: ChainView,
        peers: PeerPool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._node, self._chain, self._peers, self._clock = settings, node, chain, peers, clock
        self._measured: dict[ChecksumAddress, tuple[LinkTiming, float]] = {}
        self._failures: dict[ChecksumAddress, _Failure] = {}
        # Peers on this machine: what a busy processor makes of their links says nothing about a network.
        self._here: set[ChecksumAddress] = set()

    def bandwidth_to(self, node: ChecksumAddress) -> float | None:
        """Measured bytes a second to `node`; None where that is unknown or the way does not leave the machine."""
        known = self._measured.get(node)
        return None if known is None or node in self._here else float(known[0].bytes_per_second)

    @property
    def links(self) -> tuple[LinkTiming, ...]:
        """What is known now, by node."""
        return tuple(sorted(link for link, _ in self._measured.values()))

    async def run(self) -> None:
        """Measure one link after the other, new ones first; until cancelled."""
        while True:
            try:
                node = await self._next()
                if node is not None:
                    await self._measure(node)
                    continue
            except ChainError as error:
                log.info("links_wait_for_chain", detail=str(error))
            await asyncio.sleep(self._settings.chain_poll_seconds)

    async def _next(self) -> ChecksumAddress | None:
        """The node to measure now: one without a link, else the nearest whose link is old, else None."""
        now = self._clock()
        if len(self._measured) < self._settings.maximum_links:
            waiting = [
                node
                for node in await self._chain.registered_nodes()
                if node != self._node and node not in self._measured and self._failure(node).retry_at <= now
            ]
            if waiting:
                # Each node in an order of its own, so that in a large network every pair has a chance.
                own = self._node.encode()
                return min(waiting, key=lambda node: (self._failure(node).attempts, keccak256(own + node.encode())))
        old = [link for link, at in self._measured.values() if now - at >= self._settings.link_refresh_seconds]
        return min(old, key=lambda link: link.round_trip_nanoseconds).node if old else None

    async def _measure(self, node: ChecksumAddress) -> None:
        settings = self._settings
        try:
            status = await self._chain.node_status(node)
            if status not in _SERVING:
                raise ProbeFailedError(f"the node is {status.name} in the registry")
            link = await self._time(node)
            endpoint = await self._chain.endpoint(node)
            (self._here.add if endpoint is not None and is_loopback(endpoint.endpoint) else self._here.discard)(node)
        except (ProbeFailedError, Refusal, OSError) as error:
            self._measured.pop(node, None)
            attempts = self._failure(node).attempts + 1
            pause = min(settings.link_backoff_seconds * 2 ** (attempts - 1), settings.link_backoff_maximum_seconds)
            self._failures[node] = _Failure(min(attempts, 32), self._clock() + pause)
            log.info("link_not_measured", peer=node, detail=str(error), retry_seconds=pause)
        else:
            self._failures.pop(node, None)
            self._measured[node] = link, self._clock()
            log.debug(
                "link_measured",
                peer=node,
                round_trip_nanoseconds=link.round_trip_nanoseconds,
                bytes_per_second=link.bytes_per_second,
            )

    async def _time(self, node: ChecksumAddress) -> LinkTiming:
        found: list[tuple[int, int]] = []

        async def use(stub: ShardExecutionAsyncStub) -> None:
            metadata = self._peers.proof_metadata(node)

            async def probe(payload: bytes, seconds: float) -> bytes:
                request = execution_pb2.ProbeRequest(payload=payload)
                try:
                    return bytes((await stub.Probe(request, metadata=metadata, timeout=seconds)).digest)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                        raise TimeoutError from error
                    raise ProbeFailedError(error.details() or error.code().name) from error

            found.append(await time_link(probe, self._settings.link_probe_seconds))

        await self._peers.with_channel(node, use)
        round_trip, throughput = found[0]
        return LinkTiming(node, round_trip, throughput)

    def _failure(self, node: ChecksumAddress) -> _Failure:
        return self._failures.get(node, _Failure(0, 0.0))


class ProbeResponder:
    """Answers probes. `clock` counts seconds and never runs backwards."""

    def __init__(
        self, settings: NodeSettings, chain: ChainView, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._chain, self._clock = settings.probe_bytes_a_minute, chain, clock
        self._window_began = clock()
        # By registered node, in this window.
        self._spent: dict[ChecksumAddress, int] = {}

    async def answer(self, caller: ChecksumAddress | None, payload: bytes) -> bytes:
        """The digest of `payload`. Refusal for a caller who is no serving node, or who asks for too much."""
        if caller is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                "only nodes measure links: send the proof that Forward takes",
            )
        if len(payload) > MAXIMUM_PROBE_BYTES:
            raise Refusal(
                ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE,
                f"a probe of {len(payload)} bytes, at most {MAXIMUM_PROBE_BYTES} are taken",
            )
        if caller not in self._spent and (status := await self._chain.node_status(caller)) not in _SERVING:
            raise Refusal(ErrorReason.ERROR_REASON_NODE_NOT_ACTIVE, f"node {caller} is {status.name} in the registry")
        # Nothing is awaited from here on: probes that arrive together are all counted.
        if self._clock() - self._window_began >= _WINDOW_SECONDS:
            self._window_began = self._clock()
            self._spent.clear()
        cost = max(len(payload), _LEAST_COST_BYTES)
        if self._spent.get(caller, 0) + cost > _CALLER_BYTES_A_MINUTE or sum(self._spent.values()) + cost > self._limit:
            raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too many probes; measure again in a minute")
        self._spent[caller] = self._spent.get(caller, 0) + cost
        return content_digest(payload)
