"""Keys of a node on disk: the hot node key, the operator's cold key, and the TLS certificate.

Owns the `keys` folder. Promises that secret files are created with mode 600 and refused when others can read them,
that private keys lie on disk only encrypted (Ethereum keystore v3, scrypt), that a password comes from a file or the
environment and never from an argument, and that a wrong password gives a KeystoreError. The TLS key is not encrypted:
it can be replaced by its owner on chain (changeEndpoint) and guards no stake. Does not use the keys: see
bsns.chain.signer.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from eth_account import Account

from bsns.chain import key_file
from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import address
from node_client.errors import KeystoreError

NODE_KEY_FILE: Final = "node.json"
OPERATOR_KEY_FILE: Final = "operator.json"
CERTIFICATE_FILE: Final = "tls-certificate.pem"
CERTIFICATE_KEY_FILE: Final = "tls-key.pem"
PASSWORD_FILE: Final = "password"
# Everyone who dials a node checks the pinned certificate under this name, whatever the address is.
CERTIFICATE_NAME: Final = "bsns-node"
# eth-account's own default; a devnet lowers it, since each start decrypts twice.
DEFAULT_SCRYPT_COST: Final = 2**18
_CERTIFICATE_YEARS: Final = 20


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """The node's certificate and its key, PEM; `certificate_hash` (SHA-256 of the DER form) goes on chain."""

    certificate_pem: bytes
    key_pem: bytes
    certificate_hash: bytes

    def __repr__(self) -> str:
        return f"TlsIdentity({self.certificate_hash.hex()})"


class Keystore:
    """The keys of one node in one folder."""

    def __init__(self, folder: Path, password: str, scrypt_cost: int = DEFAULT_SCRYPT_COST) -> None:
        if not password:
            raise KeystoreError("the keystore password is empty; give a password file or BSNS_NODE_PASSWORD")
        self._folder, self._password, self._cost = folder, password, scrypt_cost

    def has(self, file: str) -> bool:
        return (self._folder / file).exists()

    def node_signer(self) -> KeySigner:
        """The hot key, made at the first call."""
        return self._signer(NODE_KEY_FILE)

    def operator_signer(self) -> KeySigner:
        """The cold key, made at the first call."""
        return self._signer(OPERATOR_KEY_FILE)

    def import_key(self, file: str, private_key: bytes) -> KeySigner:
        """Keep `private_key` (32 bytes) as `file`; KeystoreError if another key is there."""
        signer = _parsed(private_key)
        path = self._folder / file
        if path.exists():
            existing = self._signer(file)
            if existing.address != signer.address:
                raise KeystoreError(
                    f"{path} already holds {existing.address}; a data folder belongs to one node, choose another "
                    "--data-dir"
                )
            return existing
        document = Account.encrypt(private_key, self._password, kdf="scrypt", iterations=self._cost)
        write_secret(path, json.dumps(document).encode())
        return signer

    def tls_identity(self, host: str) -> TlsIdentity:
        """The certificate, made at the first call. `host` is listed in it beside CERTIFICATE_NAME."""
        certificate_path, key_path = self._folder / CERTIFICATE_FILE, self._folder / CERTIFICATE_KEY_FILE
        if not (certificate_path.exists() and key_path.exists()):
            certificate_pem, key_pem = _new_certificate(host)
            write_secret(key_path, key_pem)
            write_secret(certificate_path, certificate_pem)
        certificate_pem, key_pem = read_secret(certificate_path), read_secret(key_path)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except ValueError as error:
            raise KeystoreError(
                f"{certificate_path} is damaged: {error}; delete it and {key_path} to make new ones"
            ) from error
        return TlsIdentity(
            certificate_pem, key_pem, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
        )

    def addresses(self) -> dict[str, str]:
        """Addresses by role of the keys that exist, without decrypting them."""
        found: dict[str, str] = {}
        for role, file in (("node", NODE_KEY_FILE), ("operator", OPERATOR_KEY_FILE)):
            if self.has(file):
                found[role] = address(str(_document(self._folder / file)["address"]))
        return found

    def _signer(self, file: str) -> KeySigner:
        path = self._folder / file
        if not path.exists():
            return self.import_key(file, secrets.token_bytes(32))
        try:
            return _parsed(bytes(Account.decrypt(_document(path), self._password)))
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise KeystoreError(
                f"{path} cannot be decrypted ({error}): the password is wrong, or the file is damaged"
            ) from error


def read_password(path: Path) -> str:
    """First line of a password file of mode 600; KeystoreError if there is no such file."""
    lines = read_secret(path).decode(errors="replace").splitlines()
    return lines[0] if lines else ""


def create_password(path: Path) -> str:
    """A random password in a new file of mode 600: for those who trust the file system as much as the key."""
    password = secrets.token_urlsafe(32)
    write_secret(path, password.encode() + b"\n")
    return password


def read_private_key(path: Path) -> bytes:
    """A raw private key in hex from a file of mode 600."""
    text = read_secret(path).decode(errors="replace").strip().removeprefix("0x")
    try:
        key = bytes.fromhex(text)
        KeySigner(key)
    except ValueError:
        raise KeystoreError(
            f"{path} holds no private key: 64 hexadecimal digits, not zero, below the curve order"
        ) from None
    return key


def read_secret(path: Path) -> bytes:
    """Bytes of a file that nobody but its owner can read; KeystoreError otherwise."""
    try:
        return key_file.read_secret(path)
    except key_file.KeyFileError as error:
        raise KeystoreError(str(error)) from error


def write_secret(path: Path, content: bytes) -> None:
    """Create `path` with mode 600, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise KeystoreError(f"{path} cannot be written: {error.strerror}") from error


def _document(path: Path) -> dict[str, object]:
    try:
        document = json.loads(read_secret(path))
    except ValueError as error:
        raise KeystoreError(f"{path} is not a keystore file: {error}; restore it from your backup") from error
    if not isinstance(document, dict) or "crypto" not in document:
        raise KeystoreError(f"{path} is not a keystore file; restore it from your backup")
    return document


def _parsed(private_key: bytes) -> KeySigner:
    try:
        return KeySigner(private_key)
    except ValueError as error:
        raise KeystoreError(str(error)) from error


def _new_certificate(host: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CERTIFICATE_NAME)])
    alternatives: list[x509.GeneralName] = [x509.DNSName(CERTIFICATE_NAME), x509.DNSName("localhost")]
    try:
        alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        if host and host.isascii() and host != "localhost":
            alternatives.append(x509.DNSName(host))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of strangers differ.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * _CERTIFICATE_YEARS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
