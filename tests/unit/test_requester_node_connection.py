"""TLS without authorities: the certificate on chain, and no other."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bsns.protocol.identifiers import address
from bsns.requester import UnavailableError
from bsns.requester.node_connection import NodeEndpoint, open_channel
from bsns.v1 import execution_pb2, execution_pb2_grpc

NODE = address("0x" + "11" * 20)


class FarEndpoint(NodeEndpoint):
    """As if the address were not on loopback."""

    @property
    def is_loopback(self) -> bool:
        return False


@dataclass(frozen=True)
class Identity:
    certificate: bytes
    key: bytes
    certificate_hash: bytes


def identity(name: str) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=7_300))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest(),
    )


class Node(execution_pb2_grpc.ShardExecutionServicer):
    async def CloseSession(self, request: object, context: object) -> execution_pb2.CloseSessionResponse:
        return execution_pb2.CloseSessionResponse(steps=7)


@pytest.fixture
async def far_node() -> AsyncIterator[FarEndpoint]:
    own = identity("bsns-node")
    server = grpc.aio.server()
    execution_pb2_grpc.add_ShardExecutionServicer_to_server(Node(), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(own.key, own.certificate)]))
    await server.start()
    yield FarEndpoint(NODE, f"127.0.0.1:{port}", own.certificate_hash)
    await server.stop(0)


async def test_channel_to_the_pinned_certificate_works(far_node: FarEndpoint) -> None:
    async with await open_channel(far_node, 5) as channel:
        stub = execution_pb2_grpc.ShardExecutionStub(channel)
        response = await stub.CloseSession(execution_pb2.CloseSessionRequest(), timeout=5)
        assert response.steps == 7


async def test_channel_to_another_certificate_is_refused(far_node: FarEndpoint) -> None:
    with pytest.raises(UnavailableError, match="another certificate"):
        await open_channel(replace(far_node, certificate_hash=identity("bsns-node").certificate_hash), 5)


async def test_channel_to_plaintext_off_loopback_is_refused() -> None:
    server = grpc.aio.server()
    execution_pb2_grpc.add_ShardExecutionServicer_to_server(Node(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(UnavailableError, match="does not answer"):
            await open_channel(FarEndpoint(NODE, f"127.0.0.1:{port}", bytes(32)), 5)
    finally:
        await server.stop(0)


async def test_channel_on_loopback_is_plaintext() -> None:
    server = grpc.aio.server()
    execution_pb2_grpc.add_ShardExecutionServicer_to_server(Node(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with await open_channel(NodeEndpoint(NODE, f"127.0.0.1:{port}", bytes(32)), 5) as channel:
        stub = execution_pb2_grpc.ShardExecutionStub(channel)
        assert (await stub.CloseSession(execution_pb2.CloseSessionRequest(), timeout=5)).steps == 7
    await server.stop(0)


@pytest.mark.parametrize(
    ("endpoint", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("10.0.0.1:1", False),
        ("127.0.0.1.example.org:1", False),
        ("localhost.example.org:1", False),
        ("0.0.0.0:1", False),
    ],
)
def test_endpoint_loopback_is_told_from_names_that_look_like_it(endpoint: str, loopback: bool) -> None:
    assert NodeEndpoint(NODE, endpoint, bytes(32)).is_loopback is loopback


async def test_channel_to_an_endpoint_without_port_is_refused() -> None:
    with pytest.raises(UnavailableError, match="not host:port"):
        await open_channel(NodeEndpoint(NODE, "example.org", bytes(32)), 1)
