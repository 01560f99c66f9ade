"""Key files of people who sign: 64 hexadecimal digits, or an Ethereum keystore v3, readable by their owner alone.

Owns the rule that a file which others can read holds no secret, and what a person is told when a file cannot be used.
Promises that no message holds a key or a password. Writes nothing: keys are made by node_client.keystore.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

from eth_account import Account

from bsns.chain.signer import KeySigner


class KeyFileError(Exception):
    """A key or password file cannot be used; the message says which and what to do."""


def read_secret(path: Path) -> bytes:
    """Bytes of a file that nobody but its owner can read; KeyFileError otherwise."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{path} can be read by others (mode {mode:o}): run `chmod 600 {path}`")
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from error


def load_key(path: Path, password: str | None, password_file: Path | None, *, password_advice: str) -> KeySigner:
    """The signer behind a key file. A keystore is opened with the content of `password_file`, else with `password`;
    `password_advice` says where a person gives one.
    """
    text = read_secret(path).decode(errors="replace").strip()
    if not text.startswith("{"):
        try:
            return KeySigner(bytes.fromhex(text.removeprefix("0x")))
        except ValueError:
            raise KeyFileError(
                f"{path} is neither a private key (64 hexadecimal digits, not zero, below the curve order) nor a "
                "keystore v3"
            ) from None
    if password_file is not None:
        try:
            password = password_file.read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"the password file {password_file} cannot be read: {error}") from error
    if not password:
        raise KeyFileError(f"{path} is a keystore: give {password_advice}")
    try:
        return KeySigner(bytes(Account.decrypt(json.loads(text), password)))
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise KeyFileError(f"the keystore {path} cannot be opened: wrong password, or not a keystore v3") from error
