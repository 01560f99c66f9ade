"""Keys on disk: readable by their owner only, useless without the password."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from node_client.errors import KeystoreError
from node_client.keystore import NODE_KEY_FILE, Keystore, read_password, read_private_key

COST = 2


def test_keys_made_once_are_the_same_after_reopening(tmp_path: Path) -> None:
    first = Keystore(tmp_path / "keys", "right", COST)
    node, operator = first.node_signer().address, first.operator_signer().address
    again = Keystore(tmp_path / "keys", "right", COST)
    assert (again.node_signer().address, again.operator_signer().address) == (node, operator)
    assert again.addresses() == {"node": node, "operator": operator}
    for file in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "crypto" in json.loads(file.read_text())


def test_wrong_password_is_named_and_empty_is_refused(tmp_path: Path) -> None:
    Keystore(tmp_path, "right", COST).node_signer()
    with pytest.raises(KeystoreError, match="password is wrong"):
        Keystore(tmp_path, "wrong", COST).node_signer()
    with pytest.raises(KeystoreError, match="empty"):
        Keystore(tmp_path, "", COST)


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Keystore(tmp_path, "right", COST).node_signer()
    (tmp_path / NODE_KEY_FILE).chmod(0o644)
    with pytest.raises(KeystoreError, match="chmod 600"):
        Keystore(tmp_path, "right", COST).node_signer()


@pytest.mark.parametrize("content", ["", "not hex", "00" * 32, "11" * 31, "ff" * 32])
def test_raw_key_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(content)
    with pytest.raises(KeystoreError):
        read_private_key(file)


def test_another_key_does_not_replace_an_existing_one(tmp_path: Path) -> None:
    store = Keystore(tmp_path, "right", COST)
    store.import_key(NODE_KEY_FILE, b"\x01" * 32)
    store.import_key(NODE_KEY_FILE, b"\x01" * 32)
    with pytest.raises(KeystoreError, match="already holds"):
        store.import_key(NODE_KEY_FILE, b"\x02" * 32)


def test_certificate_made_once_keeps_its_hash_and_password_file_is_one_line(tmp_path: Path) -> None:
    first = Keystore(tmp_path, "right", COST).tls_identity("192.0.2.7")
    assert (
        Keystore(tmp_path, "right", COST).tls_identity("elsewhere.example").certificate_hash == first.certificate_hash
    )
    assert first.key_pem.decode() not in repr(first)
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("secret\n")
    assert read_password(file) == "secret"
