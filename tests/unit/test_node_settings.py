"""Settings: sources, relations, and that no secret is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from node_client.errors import SettingsError
from node_client.settings import NodeSettings

REQUIRED = {"rpc_url": "http://127.0.0.1:8545", "deployment": Path("d.json"), "data_dir": Path("n")}


def test_settings_shown_mask_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNS_NODE_PASSWORD", "hunter2")
    shown = json.dumps(NodeSettings.load(**{**REQUIRED, "rpc_url": "https://rpc.example/?key=hunter2"}).shown())
    assert "hunter2" not in shown
    assert "**********" in shown


def test_option_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 2\nmaximum_sessions = 5\nlog_level = 'debug'\n")
    monkeypatch.setenv("BSNS_NODE_CONFIG_FILE", str(file))
    monkeypatch.setenv("BSNS_NODE_MAXIMUM_SESSIONS", "6")
    settings = NodeSettings.load(**REQUIRED, threads=3)
    assert (settings.threads, settings.maximum_sessions, settings.log_level) == (3, 6, "debug")


def test_a_settings_file_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNS_NODE_CONFIG_FILE", str(tmp_path / "missing.toml"))
    with pytest.raises(SettingsError, match="no settings file"):
        NodeSettings.load(**REQUIRED)


@pytest.mark.parametrize(
    "bad",
    [
        {"listen": "nowhere"},
        {"listen": "host:70000"},
        {"listen": "0.0.0.0:4000"},
        {"coordinator": "coordinator.example:4000"},
        {"threads": 0},
        {"speculation_tokens": 17},
        {"gas_balance_minimum_wei": 10**18},
        {"unknown": 1},
        {"password": "x", "log_level": "loud"},
    ],
)
def test_bad_settings_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as raised:
        NodeSettings.load(**REQUIRED, **bad)
    assert "settings cannot be used" in str(raised.value)
