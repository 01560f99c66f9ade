"""Signing, behind a boundary: a key in memory here, a remote signer or a hardware key elsewhere.

A Signer signs two things: 32-byte EIP-712 digests (bsns.protocol.typed_data) and transactions. It decides nothing;
the node's signing guard does.
"""

from __future__ import annotations

from typing import Any, Protocol

from eth_account import Account
from eth_keys.datatypes import PrivateKey
from eth_typing import ChecksumAddress
from eth_utils.exceptions import ValidationError

from bsns.protocol.identifiers import address


class Signer(Protocol):
    """Who can sign for one address."""

    @property
    def address(self) -> ChecksumAddress: ...

    def sign_digest(self, digest: bytes) -> bytes:
        """65 bytes r, s, v (27 or 28) over a 32-byte digest, s in the lower half of the curve order."""
        ...

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """The raw signed transaction."""
        ...


class KeySigner:
    """A private key in this process's memory. Never shows it: repr is the address alone.

    ValueError if the bytes are no private key; the message does not hold them.
    """

    def __init__(self, private_key: bytes) -> None:
        try:
            self._key = PrivateKey(private_key)
        except ValidationError:  # its message shows the number
            raise ValueError("a private key is 32 bytes, not zero and below the curve order") from None
        self._address = address(self._key.public_key.to_canonical_address())

    @property
    def address(self) -> ChecksumAddress:
        return self._address

    def sign_digest(self, digest: bytes) -> bytes:
        signature = self._key.sign_msg_hash(digest)
        return signature.to_bytes()[:64] + bytes([signature.v + 27])

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        return bytes(Account.sign_transaction(transaction, self._key.to_bytes()).raw_transaction)

    def __repr__(self) -> str:
        return f"KeySigner({self._address})"
