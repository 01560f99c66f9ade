"""Links: two nodes that measure each other over loopback, peers that lie, hang or are not there, and the limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest
from eth_typing import ChecksumAddress

from bsns.chain.signer import KeySigner
from bsns.protocol.commitments import content_digest
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.identifiers import address, keccak256
from bsns.protocol.measurements import LinkTiming
from bsns.protocol.typed_data import registry_domain
from bsns.v1 import execution_pb2, execution_pb2_grpc
from node_client import link_probe
from node_client.chain_view import ChainView, NodeEndpoint, SigningDomains
from node_client.errors import ErrorReason, Refusal
from node_client.grpc_service import ShardExecutionServicer
from node_client.link_probe import (
    MAXIMUM_PROBE_BYTES,
    LinkProber,
    ProbeFailedError,
    ProbeResponder,
    differ_materially,
    time_link,
)
from node_client.peers import PeerPool
from node_client.settings import MIB, NodeSettings

PATIENCE_S = 30.0
REGISTRY = registry_domain(31_337, address(bytes([9]) * 20))
A, B = (address(bytes([number]) * 20) for number in (1, 2))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Registry:
    """What nodes know from the chain: who is registered, where, and in which state."""

    endpoints: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, NodeStatus] = field(default_factory=dict)
    status_reads: int = 0

    async def registered_nodes(self) -> tuple[ChecksumAddress, ...]:
        return tuple(cast(ChecksumAddress, node) for node in self.endpoints)

    async def node_status(self, node: str) -> NodeStatus:
        self.status_reads += 1
        return self.statuses.get(node, NodeStatus.ACTIVE if node in self.endpoints else NodeStatus.ABSENT)

    async def endpoint(self, node: str, *, fresh: bool = False) -> NodeEndpoint | None:
        return NodeEndpoint(self.endpoints[node], bytes(32)) if node in self.endpoints else None


class Watched(execution_pb2_grpc.ShardExecutionServicer):
    """Counts what one node is asked before its servicer answers."""

    def __init__(self, answer: Callable[[Any, Any], Awaitable[execution_pb2.ProbeResponse]]) -> None:
        self.answer = answer
        self.sizes: list[int] = []

    async def Probe(self, request: execution_pb2.ProbeRequest, context: Any) -> execution_pb2.ProbeResponse:
        self.sizes.append(len(request.payload))
        return await self.answer(request, context)


@dataclass
class Node:
    key: KeySigner
    watched: Watched
    prober: LinkProber
    responder: ProbeResponder
    peers: PeerPool


class Swarm:
    """Nodes with real gRPC servers on loopback, a real peer pool each, and no chain."""

    def __init__(self, folder: Path, stack: contextlib.AsyncExitStack, **changed: Any) -> None:
        self.registry, self.clock, self.stack = Registry(), Clock(), stack
        values = {
            "rpc_url": "http://127.0.0.1:1",
            "deployment": folder / "deployment.json",
            "data_dir": folder,
            "chain_poll_seconds": 0.02,
            **changed,
        }
        self.settings = NodeSettings(**values)

    async def start(
        self, name: str, answer: Callable[[Any, Any], Awaitable[execution_pb2.ProbeResponse]] | None = None
    ) -> Node:
        key, chain = KeySigner(keccak256(name.encode())), cast(ChainView, self.registry)
        peers = PeerPool(
            self.settings, key, REGISTRY, chain,
            on_response=lambda *_: None, on_reconnect=lambda _: None, on_lost=lambda *_: None,
            start=asyncio.ensure_future,
        )  # fmt: skip
        responder = ProbeResponder(self.settings, chain, clock=self.clock)
        domains = cast(SigningDomains, SimpleNamespace(registry=REGISTRY))
        nothing: Any = None
        servicer = ShardExecutionServicer(
            self.settings, key.address, domains, chain, nothing, nothing, nothing, nothing, responder, nothing
        )
        watched = Watched(answer or servicer.Probe)
        server = grpc.aio.server()
        execution_pb2_grpc.add_ShardExecutionServicer_to_server(watched, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.stack.push_async_callback(server.stop, 0)
        self.registry.endpoints[key.address] = f"127.0.0.1:{port}"
        prober = LinkProber(self.settings, key.address, chain, peers, clock=self.clock)
        return Node(key, watched, prober, responder, peers)

    def run(self, node: Node) -> None:
        task = asyncio.ensure_future(node.prober.run())

        async def stop() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.stack.push_async_callback(stop)


@contextlib.asynccontextmanager
async def swarm(folder: Path, **changed: Any) -> AsyncIterator[Swarm]:
    async with contextlib.AsyncExitStack() as stack:
        yield Swarm(folder, stack, **changed)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (what changes is not ours to signal)
            await asyncio.sleep(0.01)


async def test_two_nodes_measure_the_link_to_each_other_with_bounded_bytes(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        first, second = await net.start("first"), await net.start("second")
        for node in (first, second):
            net.run(node)
        await until(lambda: first.prober.links and second.prober.links)
        for node, other in ((first, second), (second, first)):
            [link] = node.prober.links
            assert link.node == other.key.address
            # Loopback, on a machine that may be busy.
            assert 10_000 < link.round_trip_nanoseconds < 1_000_000_000
            assert link.bytes_per_second > MIB
            assert sum(other.watched.sizes) < 1.25 * MIB
            assert max(other.watched.sizes) <= MAXIMUM_PROBE_BYTES
        # Nothing is measured again before it is time.
        asked = len(second.watched.sizes)
        net.clock.now = net.settings.link_refresh_seconds - 1
        third = await net.start("third")
        await until(lambda: len(first.prober.links) == len(second.prober.links) == 2)
        assert len(second.watched.sizes) == asked
        assert len(third.watched.sizes) == 2 * asked
        net.clock.now += 1
        await until(lambda: len(second.watched.sizes) == len(first.watched.sizes) == 2 * asked)


async def test_peers_that_lie_hang_or_are_gone_are_left_out_and_the_others_measured(tmp_path: Path) -> None:
    async def early(request: Any, context: Any) -> execution_pb2.ProbeResponse:
        return execution_pb2.ProbeResponse(digest=content_digest(request.payload[:-1]))

    async def nothing(request: Any, context: Any) -> execution_pb2.ProbeResponse:
        return execution_pb2.ProbeResponse()

    async def hang(request: Any, context: Any) -> execution_pb2.ProbeResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async def broken(request: Any, context: Any) -> execution_pb2.ProbeResponse:
        await context.abort(grpc.StatusCode.INTERNAL, "no")
        raise AssertionError

    async with swarm(tmp_path, link_probe_seconds=1.0) as net:
        honest = await net.start("honest")
        bad = [await net.start(item.__name__, item) for item in (early, nothing, hang, broken)]
        gone, leaving = await net.start("gone"), await net.start("leaving")
        net.registry.endpoints[gone.key.address] = "127.0.0.1:1"
        net.registry.statuses[leaving.key.address] = NodeStatus.EXITING
        prober = await net.start("prober")
        net.run(prober)
        await until(lambda: all(node.watched.sizes for node in bad) and prober.prober.links)
        await until(lambda: len(prober.prober._failures) == 6)
        assert [link.node for link in prober.prober.links] == [honest.key.address]
        assert leaving.watched.sizes == []
        # Each small message that failed was the only one.
        assert [len(node.watched.sizes) for node in bad] == [1, 1, 1, 1]


async def test_peer_out_of_reach_is_asked_ever_more_seldom_and_measured_when_it_is_back(tmp_path: Path) -> None:
    answers = False

    async def perhaps(request: Any, context: Any) -> execution_pb2.ProbeResponse:
        if not answers:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return execution_pb2.ProbeResponse(digest=content_digest(request.payload))

    async with swarm(tmp_path, link_backoff_seconds=4.0, link_backoff_maximum_seconds=10.0) as net:
        peer, prober = await net.start("peer", perhaps), await net.start("prober")
        net.run(prober)
        for attempts, pause in enumerate((4.0, 8.0, 10.0, 10.0), start=1):
            await until(lambda: prober.prober._failures.get(peer.key.address, None))
            await until(lambda: prober.prober._failures[peer.key.address].attempts == attempts)  # noqa: B023
            assert prober.prober._failures[peer.key.address].retry_at == net.clock.now + pause
            net.clock.now += pause
        assert prober.prober.links == ()
        answers = True
        await until(lambda: prober.prober.links)
        # A measured peer that is jailed is left out again.
        net.registry.statuses[peer.key.address] = NodeStatus.JAILED
        net.clock.now += net.settings.link_refresh_seconds
        await until(lambda: not prober.prober.links)


async def test_no_more_links_are_measured_than_the_limit(tmp_path: Path) -> None:
    async with swarm(tmp_path, maximum_links=2) as net:
        others = [await net.start(str(number)) for number in range(4)]
        prober = await net.start("prober")
        net.run(prober)
        await until(lambda: len(prober.prober.links) == 2)
        seen = {link.node for link in prober.prober.links}
        net.clock.now = net.settings.link_refresh_seconds
        asked = sum(len(node.watched.sizes) for node in others)
        await until(lambda: sum(len(node.watched.sizes) for node in others) == 2 * asked)
        assert {link.node for link in prober.prober.links} == seen
        assert sum(bool(node.watched.sizes) for node in others) == 2


@pytest.mark.parametrize(
    ("known", "now", "differ"),
    [
        ((), (), False),
        ((), (LinkTiming(A, 1, 1),), True),
        ((LinkTiming(A, 1, 1),), (LinkTiming(B, 1, 1),), True),
        ((LinkTiming(A, 100_000_000, 100),), (LinkTiming(A, 80_000_000, 80),), False),
        ((LinkTiming(A, 100_000_000, 100),), (LinkTiming(A, 74_000_000, 100),), True),
        ((LinkTiming(A, 100_000_000, 100),), (LinkTiming(A, 100_000_000, 74),), True),
        ((LinkTiming(A, 100_000_000, 74),), (LinkTiming(A, 100_000_000, 100),), True),
        # Three times as long, and of no consequence.
        ((LinkTiming(A, 300_000, 100),), (LinkTiming(A, 900_000, 100),), False),
    ],
)
def test_links_differ_materially_by_presence_and_by_more_than_the_share(
    known: tuple[LinkTiming, ...], now: tuple[LinkTiming, ...], differ: bool
) -> None:
    assert differ_materially(known, now, 0.25) is differ


class Wire:
    """A link of known properties on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, round_trip: float, bytes_per_second: float) -> None:
        self.now, self.sent = 0.0, 0
        self.round_trip, self.rate = round_trip, bytes_per_second
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter_ns=lambda: round(self.now * 1e9))
        monkeypatch.setattr(link_probe, "time", clock)

    async def probe(self, payload: bytes, seconds: float) -> bytes:
        takes = self.round_trip + len(payload) / self.rate
        self.now += min(takes, seconds)
        if takes > seconds:
            raise TimeoutError
        self.sent += len(payload)
        return content_digest(payload)


@pytest.mark.parametrize(
    ("round_trip", "rate"), [(0.000_3, 1e9), (0.02, 12.5e6), (0.1, 12.5e6), (0.2, 1e6), (0.005, 125e6)]
)
async def test_time_link_tells_the_throughput_from_the_latency(
    round_trip: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(monkeypatch, round_trip, rate)
    measured_trip, measured_rate = await time_link(wire.probe, 5.0)
    assert measured_trip == pytest.approx(round_trip * 1e9, rel=0.01)
    assert measured_rate == pytest.approx(rate, rel=0.05)
    assert wire.now <= 5.0
    assert wire.sent < 1.25 * MIB


async def test_time_link_of_a_fast_link_far_away_claims_no_more_than_it_can_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Half a megabyte takes 0.4 ms, lost in a round trip of 100 ms.
    _, rate = await time_link(Wire(monkeypatch, 0.1, 1.25e9).probe, 5.0)
    assert rate == pytest.approx(8 * MIB / 2 / 0.1, rel=0.02)


@pytest.mark.parametrize(("rate", "at_most"), [(50_000, 100_000), (2_000, 14_000)])
async def test_time_link_of_a_slow_link_ends_in_time_with_what_it_was_at_most(
    rate: float, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(monkeypatch, 0.02, rate)
    _, measured = await time_link(wire.probe, 5.0)
    assert rate * 0.95 <= measured <= at_most
    assert wire.now <= 5.0


async def test_time_link_without_answers_in_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProbeFailedError, match=r"not answered in 2\.5 s"):
        await time_link(Wire(monkeypatch, 2.0, 1e6).probe, 5.0)


async def test_time_link_of_a_peer_that_spends_the_time_on_small_messages_claims_no_throughput(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All six small messages arrive, and no time is left in which a large one could show how slow the link is.
    wire = Wire(monkeypatch, 0.833, 1e9)
    with pytest.raises(ProbeFailedError, match="small messages"):
        await time_link(wire.probe, 5.0)
    assert wire.now <= 5.0


async def refusal_of(answer: Awaitable[bytes]) -> str:
    with pytest.raises(Refusal) as caught:
        await answer
    return str(ErrorReason.Name(caught.value.reason)).removeprefix("ERROR_REASON_")


async def test_probe_of_strangers_and_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    async with swarm(tmp_path, probe_bytes_a_minute=6 * MIB) as net:
        node, first, second = [await net.start(name) for name in ("node", "first", "second")]
        answer = node.responder.answer
        payload = bytes(MAXIMUM_PROBE_BYTES)
        assert await refusal_of(answer(None, b"1")) == "SIGNATURE_INVALID"
        assert await refusal_of(answer(A, b"1")) == "NODE_NOT_ACTIVE"
        net.registry.statuses[second.key.address] = NodeStatus.JAILED
        assert await refusal_of(answer(second.key.address, b"1")) == "NODE_NOT_ACTIVE"
        del net.registry.statuses[second.key.address]
        assert await refusal_of(answer(first.key.address, payload + b"1")) == "MESSAGE_TOO_LARGE"
        reads = net.registry.status_reads
        for _ in range(4):
            assert await answer(first.key.address, payload) == content_digest(payload)
        assert net.registry.status_reads == reads + 1
        assert await refusal_of(answer(first.key.address, b"1")) == "CAPACITY_EXHAUSTED"
        for _ in range(2):
            await answer(second.key.address, payload)
        # The second has some left, the node has not.
        assert await refusal_of(answer(second.key.address, b"1")) == "CAPACITY_EXHAUSTED"
        net.clock.now = 60.0
        assert await answer(first.key.address, b"1") == content_digest(b"1")


async def test_probes_that_arrive_together_are_all_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as net:
        node, caller = await net.start("node"), await net.start("caller")
        asked, read = asyncio.Event(), net.registry.node_status

        async def slow_status(who: str) -> NodeStatus:
            await asked.wait()
            return await read(who)

        monkeypatch.setattr(net.registry, "node_status", slow_status)
        payload = bytes(MAXIMUM_PROBE_BYTES)
        probes = [asyncio.ensure_future(node.responder.answer(caller.key.address, payload)) for _ in range(8)]
        await asyncio.sleep(0)
        asked.set()
        answers = await asyncio.gather(*probes, return_exceptions=True)
        assert sum(isinstance(answer, bytes) for answer in answers) == 4


async def test_many_small_probes_use_up_the_callers_part(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        node, caller = await net.start("node"), await net.start("caller")
        for _ in range(256):
            await node.responder.answer(caller.key.address, b"1")
        assert await refusal_of(node.responder.answer(caller.key.address, b"1")) == "CAPACITY_EXHAUSTED"


async def test_probe_over_the_wire_needs_the_callers_proof_for_this_node(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        node, other, caller = [await net.start(name) for name in ("node", "other", "caller")]
        request = execution_pb2.ProbeRequest(payload=b"probe")
        codes = []

        async def use(stub: Any) -> None:
            for metadata in ((), caller.peers.proof_metadata(other.key.address)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Probe(request, metadata=metadata)
                codes.append(caught.value.code())
            proof = caller.peers.proof_metadata(node.key.address)
            assert (await stub.Probe(request, metadata=proof)).digest == content_digest(b"probe")

        await caller.peers.with_channel(node.key.address, use)
        assert codes == [grpc.StatusCode.PERMISSION_DENIED] * 2
