"""Connections from a requester to nodes: who they are, where they are, and that it is really them.

Owns the address book (endpoint and certificate hash of each node, from the registry's events) and the channels.
Promises that off loopback a channel is TLS to the holder of the certificate whose SHA-256 is on chain, without any
certificate authority; plaintext happens on loopback only. Does not know the protocol of a session.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from bsns.chain.client import ChainClient, ChainEvent
from bsns.protocol.endpoints import is_loopback, split_endpoint
from bsns.protocol.identifiers import address
from bsns.requester.errors import UnavailableError

# Frames have at most 1 MiB; the evidence of a stage is one message of about 210 bytes a step.
MAXIMUM_MESSAGE_BYTES: Final = 4 * 1024 * 1024
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAXIMUM_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAXIMUM_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
)
ERROR_DOMAIN: Final = "bsns"


@dataclass(frozen=True, slots=True)
class NodeEndpoint:
    """Where a node listens, as its operator announced it on chain."""

    node: str
    endpoint: str
    certificate_hash: bytes

    @property
    def is_loopback(self) -> bool:
        """ValueError if the operator announced something that is not host:port."""
        return is_loopback(self.endpoint)


async def find_endpoints(
    client: ChainClient, nodes: Iterable[str], first_block: int, last_block: int
) -> dict[str, NodeEndpoint]:
    """The latest endpoint of each node that has one, from NodeRegistered and EndpointChanged."""
    found: dict[str, NodeEndpoint] = {}
    for node in nodes:
        events: list[ChainEvent] = []
        for name in ("NodeRegistered", "EndpointChanged"):
            events += await client.events_between(
                first_block, last_block, contract="NodeRegistry", name=name, filters={"node": node}
            )
        if events:
            latest = max(events, key=lambda item: (item.block_number, item.log_index))
            found[address(node)] = NodeEndpoint(
                address(node), str(latest.arguments["endpoint"]), bytes(latest.arguments["certificateHash"])
            )
    return found


async def open_channel(where: NodeEndpoint, timeout_s: float) -> grpc.aio.Channel:
    """A channel to the node; UnavailableError if it cannot be reached or shows another certificate than the one on
    chain.
    """
    try:
        host, port = split_endpoint(where.endpoint)
    except ValueError:
        raise UnavailableError(f"node {where.node} announced {where.endpoint!r}, which is not host:port") from None
    if where.is_loopback:
        return grpc.aio.insecure_channel(where.endpoint, options=CHANNEL_OPTIONS)
    certificate = await _pinned_certificate(where, host, port, timeout_s)
    credentials = grpc.ssl_channel_credentials(root_certificates=ssl.DER_cert_to_PEM_cert(certificate).encode())
    # The certificate is the identity; the name in it only has to be the one the handshake checks.
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", _certificate_name(certificate, host)))
    return grpc.aio.secure_channel(where.endpoint, credentials, options=options)


async def _pinned_certificate(where: NodeEndpoint, host: str, port: int, timeout_s: float) -> bytes:
    """The DER certificate that the node shows, if it is the one on chain. The channel then trusts this certificate
    alone.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise UnavailableError(
            f"node {where.node} does not answer at {where.endpoint} ({type(error).__name__}: {error})"
        ) from error
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
    if not shown or hashlib.sha256(shown).digest() != where.certificate_hash:
        raise UnavailableError(
            f"{where.endpoint} shows another certificate than node {where.node} registered on chain: somebody is "
            "in between, or its operator must announce the new certificate"
        )
    return bytes(shown)


def _certificate_name(certificate: bytes, fallback: str) -> str:
    try:
        names = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (x509.ExtensionNotFound, ValueError):
        return fallback
    dns = names.value.get_values_for_type(x509.DNSName)
    return dns[0] if dns else fallback


def explain_refusal(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Reason (an ErrorReason name, or the gRPC code) and detail of a refused call."""
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value if isinstance(value, bytes) else value.encode())
        except DecodeError:
            break
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                return info.reason, status.message
    return error.code().name, error.details() or "no detail given"
