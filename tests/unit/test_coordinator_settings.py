"""Settings and key files: sources, ranges, secrets; the CLI's answers to wrong use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from eth_account import Account
from typer.testing import CliRunner

from bsns.chain.signer import KeySigner
from bsns.planning import Objective
from coordinator.cli import app
from coordinator.demo import clear_network_folder
from coordinator.devnet import MARKER_FILE
from coordinator.dispatch import PlanPolicy
from coordinator.settings import CoordinatorSettings, SettingsError, load_key
from coordinator.storage import migrate
from tests.integration.coordinator_fixtures import tiny_manifest

_KEY = bytes([7]) * 32


@pytest.fixture(autouse=True)
def _no_outer_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import os

    for name in list(os.environ):
        if name.startswith("BSNS_COORDINATOR_"):
            monkeypatch.delenv(name)
    # `load` sets it for --config; this puts it back afterwards.
    monkeypatch.setenv("BSNS_COORDINATOR_CONFIG_FILE", "")
    yield
    structlog.reset_defaults()  # `serve` logs to the runner's standard error, which is closed now


def _options(**changes: Any) -> dict[str, Any]:
    return {
        "rpc_url": "http://127.0.0.1:8545",
        "deployment": Path("deployment.json"),
        "database_url": "sqlite:///c.sqlite",
        "key_file": Path("publisher.key"),
        "fee_per_token": 5,
        **changes,
    }


def test_settings_from_option_environment_and_file_take_the_strongest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text("minimum_nodes = 2\nreplicas = 2\nheartbeat_seconds = 5.0\n")
    monkeypatch.setenv("BSNS_COORDINATOR_REPLICAS", "3")
    monkeypatch.setenv("BSNS_COORDINATOR_HEARTBEAT_SECONDS", "4")
    settings = CoordinatorSettings.load(config, **_options(heartbeat_seconds=3.0, minimum_nodes=None))
    assert (settings.minimum_nodes, settings.replicas, settings.heartbeat_seconds) == (2, 3, 3.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"listen": "nowhere"}, "listen"),
        ({"listen": "0.0.0.0:5000"}, "certificate_file"),
        ({"certificate_file": Path("a.pem")}, "certificate_key_file"),
        ({"fee_per_token": -1}, "fee_per_token"),
        ({"fee_per_token": None}, "fee_per_token"),
        ({"minimum_nodes": 0}, "minimum_nodes"),
        ({"objective": "profit"}, "objective"),
        ({"planned_batch": 2}, "planned_batch"),
        ({"prior_bytes_per_second": 0}, "prior_bytes_per_second"),
        ({"planner_seed": -1}, "planner_seed"),
        ({"maximum_reorganisation_depth": 2}, "transaction_confirmations"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        CoordinatorSettings.load(**_options(**changes))


def test_policy_has_every_planning_setting() -> None:
    settings = CoordinatorSettings.load(
        **_options(
            objective="latency",
            stage_count=3,
            replicas=2,
            spread_leftover=False,
            planned_sessions=5,
            planned_session_tokens=6,
            planned_batch=8,
            planner_seed=7,
            prior_latency_nanoseconds=9,
            prior_bytes_per_second=10,
        )
    )
    assert settings.policy == PlanPolicy(
        fee_per_token=5,
        stage_count=3,
        replicas=2,
        spread_leftover=False,
        objective=Objective.LATENCY,
        concurrent_sessions=5,
        session_tokens=6,
        seed=7,
        batch=8,
        prior_latency_ns=9,
        prior_bytes_per_second=10,
    )


def test_settings_shown_hold_no_secret() -> None:
    settings = CoordinatorSettings.load(
        **_options(
            database_url="postgresql://bsns:hunter2@db/bsns",
            rpc_url="https://rpc.example/?key=hunter2",
            keystore_password="hunter2",
        )
    )
    assert "hunter2" not in json.dumps(settings.shown())
    assert "hunter2" not in repr(settings.keystore_password)


def _key_file(folder: Path, content: str, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(content)
    path.chmod(mode)
    return path


def test_load_key_reads_raw_hex_and_keystores(tmp_path: Path) -> None:
    expected = KeySigner(_KEY).address
    assert load_key(_key_file(tmp_path, "0x" + _KEY.hex() + "\n")).address == expected
    keystore = json.dumps(Account.encrypt(_KEY, "secret", kdf="pbkdf2", iterations=10))
    path = _key_file(tmp_path, keystore)
    assert load_key(path, "secret").address == expected
    password = tmp_path / "password"
    password.write_text("secret\n")
    assert load_key(path, None, password).address == expected
    for wrong in (None, "other"):
        with pytest.raises(SettingsError):
            load_key(path, wrong)


@pytest.mark.parametrize("content", ["", "0x12", "not hex", "{}", '{"crypto": 1}', "0" * 64, "f" * 64])
def test_load_key_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(SettingsError):
        load_key(_key_file(tmp_path, content), "secret")


def test_load_key_that_others_may_read_is_refused_with_the_command_to_fix_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        load_key(_key_file(tmp_path, _KEY.hex(), 0o640))
    with pytest.raises(SettingsError, match="cannot be read"):
        load_key(tmp_path / "missing")


def test_cli_without_settings_ends_with_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "missing.toml")])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, ["serve"], env={"BSNS_COORDINATOR_CONFIG_FILE": str(tmp_path / "gone.toml")})
    assert result.exit_code == 2
    assert "gone.toml" in result.stderr
    result = CliRunner().invoke(app, ["serve"], env={"BSNS_COORDINATOR_CONFIG_FILE": ""})
    assert result.exit_code == 2
    assert "rpc_url" in result.stderr


def test_cli_print_config_masks_and_does_not_start() -> None:
    arguments = [
        *("serve", "--print-config", "--rpc", "http://127.0.0.1:1", "--deployment", "d.json"),
        *("--database-url", "postgresql://u:hunter2@h/n", "--key-file", "k", "--fee-per-token", "3"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fee_per_token"] == 3
    assert "hunter2" not in result.stdout


def test_cli_migrate_status_and_plan_on_an_empty_database_say_what_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.sqlite'}"
    result = CliRunner().invoke(app, ["status", "--database-url", url, "--json"])
    assert (result.exit_code, "no database" in result.stderr) == (2, True)
    (tmp_path / "c.sqlite").touch()
    result = CliRunner().invoke(app, ["status", "--database-url", url, "--json"])
    assert result.exit_code == 3
    assert "migrate" in result.stderr
    assert CliRunner().invoke(app, ["migrate", "--database-url", url]).exit_code == 0
    result = CliRunner().invoke(app, ["status", "--database-url", url, "--json"])
    assert json.loads(result.stdout)["nodes"] == []
    assert CliRunner().invoke(app, ["status", "--database-url", url]).exit_code == 0
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(tiny_manifest().to_bytes())
    result = CliRunner().invoke(app, ["plan", "--database-url", url, "--manifest", str(manifest)])
    assert result.exit_code == 2
    assert "nodes" in result.stderr
    arguments = ["plan", "--database-url", url, "--manifest", str(manifest), "--measurements-hash", "zz"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "not a hash" in result.stderr) == (2, True)
    manifest.write_text("{}")
    assert CliRunner().invoke(app, ["plan", "--database-url", url, "--manifest", str(manifest)]).exit_code == 2
    migrate(url, "base")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "--database-url", "mysql://u@h/n"], "mysql is not supported"),
        (["status", "--database-url", "nonsense"], "database URL cannot be used"),
        (["migrate", "--database-url", "sqlite://", "--to", "nowhere"], "cannot be migrated"),
        (["status", "--database-url", "sqlite://", "--rpc", "http://127.0.0.1:1"], "--deployment"),
    ],
)
def test_cli_with_wrong_database_settings_is_usage(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_cli_status_with_something_else_than_a_deployment_is_usage(tmp_path: Path) -> None:
    wrong = tmp_path / "deployment.json"
    wrong.write_text("[1]")
    arguments = ["status", "--database-url", "sqlite://", "--rpc", "http://127.0.0.1:1", "--deployment", str(wrong)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "not a deployment file" in result.stderr) == (2, True), result.stderr


def test_devnet_folder_that_another_network_did_not_make_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("dear to me")
    result = CliRunner().invoke(app, ["devnet", "--folder", str(tmp_path)])
    assert (result.exit_code, "not emptied" in result.stderr) == (2, True), result.stderr
    assert mine.read_text() == "dear to me"
    (tmp_path / MARKER_FILE).touch()
    clear_network_folder(tmp_path)
    assert not tmp_path.exists()
    clear_network_folder(tmp_path)


def test_cli_deploy_does_not_overwrite_a_deployment(tmp_path: Path) -> None:
    deployment = tmp_path / "deployment.json"
    deployment.write_text("{}")
    arguments = ["--rpc", "http://127.0.0.1:1", "--key-file", "k", "--deployment", str(deployment)]
    result = CliRunner().invoke(app, ["deploy", *arguments])
    assert result.exit_code == 2
    assert deployment.read_text() == "{}"


def test_cli_with_an_endpoint_that_does_not_answer_ends_with_unavailable(tmp_path: Path) -> None:
    key = _key_file(tmp_path, _KEY.hex())
    arguments = ["--rpc", "http://127.0.0.1:1", "--key-file", str(key), "--deployment", str(tmp_path / "d.json")]
    result = CliRunner().invoke(app, ["deploy", *arguments])
    assert result.exit_code == 4
    terms = tmp_path / "terms.json"
    terms.write_text('{"registry": {"surprise": 1}}')
    result = CliRunner().invoke(app, ["deploy", *arguments, "--terms-file", str(terms)])
    assert result.exit_code == 2
