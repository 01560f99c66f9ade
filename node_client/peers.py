"""Connections to other nodes: one long-lived Forward stream a peer, shared by all sessions, and calls for evidence.

Owns dialling (plaintext on loopback only, else TLS with the certificate pinned on chain), the proof by which a node
shows its peer who it is, and reconnecting with back-off. Promises that messages to one peer go out in order, that a
broken stream is dialled again until `peer_retry_seconds` are over and the pipeline is asked what to repeat, and that a
peer out of reach holds up only the sessions that need it. Does not look into messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio
import structlog
from eth_typing import ChecksumAddress

from bsns.chain.errors import ChainError
from bsns.chain.signer import Signer
from bsns.protocol.endpoints import is_loopback, split_endpoint
from bsns.protocol.identifiers import ProtocolError, address
from bsns.protocol.typed_data import PEER_PROOF, SIGNATURE_LENGTH, Domain, recover, signing_digest
from bsns.v1 import execution_pb2, execution_pb2_grpc
from node_client.chain_view import ChainView, NodeEndpoint
from node_client.errors import ErrorReason, Refusal
from node_client.keystore import CERTIFICATE_NAME
from node_client.settings import NodeSettings

if TYPE_CHECKING:
    from bsns.v1.execution_pb2_grpc import ShardExecutionAsyncStub

PEER_PROOF_KEY: Final = "bsns-peer-proof-bin"
_ADDRESS_LENGTH: Final = 20
_DEADLINE_LENGTH: Final = 8
CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnecting is done here, with its own back-off.
    ("grpc.enable_retries", 0),
    # Two nodes of one process must not share a connection: each proves its own identity on its own.
    ("grpc.use_local_subchannel_pool", 1),
)

log = structlog.get_logger(__name__)


def make_peer_proof(domain: Domain, signer: Signer, receiver: str, deadline: int) -> bytes:
    """What a node sends in the metadata of Forward and Probe so that `receiver` knows who it is: address, deadline,
    signature.
    """
    digest = signing_digest(domain, PEER_PROOF, (signer.address, address(receiver), deadline))
    return bytes.fromhex(signer.address[2:]) + deadline.to_bytes(_DEADLINE_LENGTH, "big") + signer.sign_digest(digest)


def check_peer_proof(domain: Domain, proof: bytes, receiver: str, now: int, lifetime: int) -> ChecksumAddress:
    """The node that made `proof` for `receiver`; Refusal if it did not, or if the proof is not of now."""
    if len(proof) != _ADDRESS_LENGTH + _DEADLINE_LENGTH + SIGNATURE_LENGTH:
        raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, "the peer proof is malformed")
    node = address(proof[:_ADDRESS_LENGTH])
    deadline = int.from_bytes(proof[_ADDRESS_LENGTH : _ADDRESS_LENGTH + _DEADLINE_LENGTH], "big")
    # Twice the lifetime: the clocks of strangers differ.
    if not now - lifetime <= deadline <= now + 2 * lifetime:
        raise Refusal(
            ErrorReason.ERROR_REASON_SIGNATURE_INVALID, "the peer proof has expired; check the clocks of both nodes"
        )
    digest = signing_digest(domain, PEER_PROOF, (node, address(receiver), deadline))
    try:
        signed_by = recover(digest, proof[_ADDRESS_LENGTH + _DEADLINE_LENGTH :])
    except ProtocolError as error:
        raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, f"the peer proof is malformed: {error}") from error
    if signed_by != node:
        raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, "the peer proof is not signed by the node it names")
    return node


async def open_channel(endpoint: NodeEndpoint, timeout_s: float) -> grpc.aio.Channel:
    """A channel to a node. Off loopback its certificate must be the one on chain; Refusal otherwise."""
    if is_loopback(endpoint.endpoint):
        return grpc.aio.insecure_channel(endpoint.endpoint, options=CHANNEL_OPTIONS)
    host, port = split_endpoint(endpoint.endpoint)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # No authority vouches for the certificate: its hash on chain does, and is compared below.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise Refusal(
            ErrorReason.ERROR_REASON_PEER_UNAVAILABLE, f"{endpoint.endpoint} cannot be reached: {error}"
        ) from error
    if certificate is None or hashlib.sha256(certificate).digest() != endpoint.certificate_hash:
        raise Refusal(
            ErrorReason.ERROR_REASON_PEER_UNAVAILABLE,
            f"{endpoint.endpoint} shows another certificate than its node registered on chain",
        )
    credentials = grpc.ssl_channel_credentials(ssl.DER_cert_to_PEM_cert(certificate).encode())
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", CERTIFICATE_NAME))
    return grpc.aio.secure_channel(endpoint.endpoint, credentials, options=options)


def shard_execution(channel: grpc.aio.Channel) -> ShardExecutionAsyncStub:
    """The stub with its asyncio types."""
    return execution_pb2_grpc.ShardExecutionStub(channel)


async def _connected(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is connected. ConnectionError as soon as an attempt fails, where `channel_ready` would
    wait for gRPC to try again: who is refused looks for another node, or up where this one is now.
    """
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            raise ConnectionError("the node cannot be connected to")
        await channel.wait_for_state_change(state)


class PeerConnection:
    """One peer: messages that wait, a stream, a task that keeps it up. One message is written at a time, in the order
    given. All but `write_now` is for the event loop.
    """

    def __init__(self, node: ChecksumAddress, limit: int) -> None:
        self.node = node
        self.task: asyncio.Task[None] | None = None
        self._limit = limit
        self._outbox: deque[execution_pb2.ForwardRequest] = deque()
        # Set when a message may be there to be written and none is being written.
        self._may_write = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # Whose turn it is to write is decided under the lock. No call: the stream is not up.
        self._turn = threading.Lock()
        self._is_writing = False
        self._call: Any = None

    def queue(self, message: execution_pb2.ForwardRequest) -> bool:
        """Leave a message to `write_queued`; False where too many wait."""
        if len(self._outbox) >= self._limit:
            return False
        self._outbox.append(message)
        self._may_write.set()
        return True

    def write_now(self, message: execution_pb2.ForwardRequest) -> bool:
        """Write in the calling thread, which spares the message the way through the event loop. False where others come
        first or the stream is down: queue it then.

        gRPC's core takes a message in any thread. Its asyncio call begins a write in the first step of a coroutine and
        needs the loop only for what comes after it.
        """
        with self._turn:
            if self._call is None or self._is_writing or self._outbox:
                return False
            self._is_writing = True
            writing = self._call.write(message)
        try:
            waits_for = writing.send(None)
        except Exception:  # the stream's end, most likely: the next write on the loop meets it too
            self._loop.call_soon_threadsafe(self._end_writing)
            return False
        self._loop.call_soon_threadsafe(self._follow, _Begun(writing, waits_for))
        return True

    async def write_queued(self, call: Any) -> None:
        """Write to `call`, the stream, until it breaks. `write_now` writes there too once the first message is out: the
        call waits for its connection on the loop only.
        """
        try:
            while True:
                await self._may_write.wait()
                with self._turn:
                    if self._is_writing or not self._outbox:
                        self._may_write.clear()
                        continue
                    self._is_writing = True
                    message = self._outbox.popleft()
                try:
                    await call.write(message)
                    self._call = call
                finally:
                    self._end_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the reader sees the same end and says why
        finally:
            with self._turn:
                self._call = None

    def _follow(self, writing: _Begun) -> None:
        async def rest() -> None:
            try:
                await writing
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                pass  # as above
            finally:
                self._end_writing()

        self._rest = self._loop.create_task(rest())

    def _end_writing(self) -> None:
        self._is_writing = False
        self._may_write.set()


class _Begun:
    """A coroutine that ran up to its first wait; the rest of it runs where this is awaited."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coroutine, self._waits_for = coroutine, waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                result = yield waits_for
                step = partial(self._coroutine.send, result)
            except BaseException as error:  # the coroutine's to handle
                step = partial(self._coroutine.throw, error)
            try:
                waits_for = step()
            except StopIteration:
                return


class PeerPool:
    """All peers. `on_response(node, message)`, `on_reconnect(node)` and, at every break of a stream and every vain
    attempt to make it again, `on_lost(node, why)` are the pipeline's; none may block.
    """

    def __init__(
        self,
        settings: NodeSettings,
        signer: Signer,
        domain: Domain,
        chain: ChainView,
        *,
        on_response: Callable[[ChecksumAddress, execution_pb2.ForwardResponse], None],
        on_reconnect: Callable[[ChecksumAddress], None],
        on_lost: Callable[[ChecksumAddress, str], None],
        start: Callable[[Any], asyncio.Task[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._signer, self._domain, self._chain = settings, signer, domain, chain
        self._on_response, self._on_reconnect, self._on_lost = on_response, on_reconnect, on_lost
        self._start, self._clock = start, clock
        self._peers: dict[ChecksumAddress, PeerConnection] = {}

    def send(self, node: ChecksumAddress, message: execution_pb2.ForwardRequest) -> None:
        """Queue a message. Refusal if the peer does not take its messages."""
        peer = self._peers.get(node)
        if peer is None:
            if len(self._peers) >= self._settings.maximum_peers:
                raise Refusal(
                    ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "this node has too many peers; try again later"
                )
            peer = self._peers[node] = PeerConnection(node, self._settings.stream_outbox_limit)
            peer.task = self._start(self._keep(peer))
        if not peer.queue(message):
            raise Refusal(ErrorReason.ERROR_REASON_PEER_UNAVAILABLE, f"node {node} does not take its messages")

    def write_now(self, node: ChecksumAddress, message: execution_pb2.ForwardRequest) -> bool:
        """Write a message in the calling thread, if nothing else is to be written before it; else `send` it."""
        peer = self._peers.get(node)
        return peer is not None and peer.write_now(message)

    def abort(self) -> None:
        """Close every connection."""
        for peer in self._peers.values():
            if peer.task is not None:
                peer.task.cancel()
        self._peers.clear()

    def proof_metadata(self, node: ChecksumAddress) -> tuple[tuple[str, bytes], ...]:
        """Metadata of a call to `node` by which it knows who calls; good for the lifetime of a proof."""
        deadline = int(self._clock()) + self._settings.peer_proof_lifetime_seconds
        return ((PEER_PROOF_KEY, make_peer_proof(self._domain, self._signer, node, deadline)),)

    async def with_channel(
        self, node: ChecksumAddress, use: Callable[[ShardExecutionAsyncStub], Awaitable[None]]
    ) -> None:
        """Run `use` with a channel of its own to `node`; for evidence and probes, away from the live streams."""
        channel = await self._dial(node)
        try:
            await use(shard_execution(channel))
        finally:
            await channel.close()

    async def _dial(self, node: ChecksumAddress) -> grpc.aio.Channel:
        try:
            endpoint = await self._chain.endpoint(node, fresh=True)
        except ChainError as error:
            # Most nodes stay where they are; a chain that is out of reach must not keep us from a peer that is not.
            endpoint = self._chain.known_endpoint(node)
            if endpoint is None:
                raise Refusal(ErrorReason.ERROR_REASON_CHAIN_UNAVAILABLE, str(error)) from error
        if endpoint is None:
            raise Refusal(ErrorReason.ERROR_REASON_PEER_UNAVAILABLE, f"node {node} has no usable endpoint on chain")
        return await open_channel(endpoint, self._settings.peer_connect_seconds)

    async def _keep(self, peer: PeerConnection) -> None:
        """Serve the peer until it stays out of reach for too long."""
        settings = self._settings
        out_since: float | None = None
        backoff = settings.peer_backoff_seconds
        connected_before = False
        while True:
            connected_at: float | None = None

            def now_connected() -> None:
                nonlocal connected_at, connected_before
                connected_at = time.monotonic()
                if connected_before:
                    self._on_reconnect(peer.node)
                connected_before = True

            try:
                reason = await self._stream(peer, now_connected)
            except Refusal as refusal:
                reason = refusal.detail
            except (grpc.aio.AioRpcError, OSError) as error:
                reason = error.details() or error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
            now = time.monotonic()
            # A peer that accepts and hangs up at once is not a peer that works.
            if connected_at is not None and now - connected_at > settings.peer_backoff_maximum_seconds:
                out_since, backoff = None, settings.peer_backoff_seconds
            out_since = now if out_since is None else out_since
            log.warning("peer_stream_broken", peer=peer.node, reason=reason)
            if now - out_since > settings.peer_retry_seconds and self._peers.get(peer.node) is peer:
                del self._peers[peer.node]
            self._on_lost(peer.node, reason)
            if self._peers.get(peer.node) is not peer:
                return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, settings.peer_backoff_maximum_seconds)

    async def _stream(self, peer: PeerConnection, now_connected: Callable[[], None]) -> str:
        """One stream until it ends; returns why."""
        settings = self._settings
        channel = await self._dial(peer.node)
        try:
            async with asyncio.timeout(settings.peer_connect_seconds):
                await _connected(channel)
            call = shard_execution(channel).Forward(metadata=self.proof_metadata(peer.node))
            now_connected()
            writer = asyncio.create_task(peer.write_queued(call))
            try:
                while True:
                    response = await call.read()
                    if response is grpc.aio.EOF:
                        break
                    self._on_response(peer.node, cast(execution_pb2.ForwardResponse, response))
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                call.cancel()
            return (await call.details()) or "the peer closed the stream"
        except TimeoutError:
            return "no connection in time"
        finally:
            await channel.close()
