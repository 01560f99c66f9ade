"""Files under deploy/ name commands, options and settings that exist, and keep what they say about secrets."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from bsns.cli import app as requester
from coordinator.cli import app as coordinator
from coordinator.gateway.settings import GatewaySettings
from coordinator.settings import CoordinatorSettings
from node_client.cli import app as node
from node_client.settings import NodeSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROGRAMS = {"bsns": requester, "bsns-coordinator": coordinator, "bsns-node": node}
SETTINGS = {"BSNS_NODE_": NodeSettings, "BSNS_COORDINATOR_": CoordinatorSettings, "BSNS_GATEWAY_": GatewaySettings}
OTHERS = {"BSNS_CACHE"}


def check_command(words: list[str]) -> None:
    """The command and its options exist."""
    command: Any = typer.main.get_command(PROGRAMS[Path(words[0]).name])
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }
    for word in rest:
        assert not word.startswith("--") or word in options, f"{words}: there is no {word}"


def check_variable(name: str) -> None:
    if name in OTHERS or not name.startswith("BSNS_"):
        return
    for prefix, settings in SETTINGS.items():
        field = name.removeprefix(prefix).lower()
        if name.startswith(prefix) and (field in settings.model_fields or field == "config_file"):
            return
    raise AssertionError(f"{name} is no setting")


def documents(path: Path) -> Iterator[Any]:
    yield from (item for item in yaml.safe_load_all(path.read_text()) if item is not None)


def test_compose_file_starts_what_there_is() -> None:
    (content,) = documents(DEPLOY / "compose.yml")
    ours = [item for item in content["services"].values() if item.get("image") == "bsns"]
    assert len(ours) == 3
    for item in ours:
        check_command(item["command"])
        for name in item["environment"]:
            check_variable(name)
        for secret in item["secrets"]:
            assert secret in content["secrets"]
        assert item["read_only"]
        # Secrets come as files; the database's password is the one that cannot, and is asked for.
        assert not [name for name in item["environment"] if name.endswith(("PASSWORD", "_KEY"))]
    for name in re.findall(r"\./([a-z.-]+\.(?:yml|json)):", (DEPLOY / "compose.yml").read_text()):
        assert (DEPLOY / name).is_file(), name


@pytest.mark.parametrize("name", ["node", "coordinator"])
def test_kubernetes_examples_start_what_there_is(name: str) -> None:
    found = list(documents(DEPLOY / f"kubernetes/{name}.yaml"))
    (container,) = found[0]["spec"]["template"]["spec"]["containers"]
    check_command(container["command"])
    for variable in container["env"]:
        check_variable(variable["name"])
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert found[0]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    ports = {port["name"] for port in container["ports"]}
    assert container["readinessProbe"]["httpGet"]["port"] in ports


@pytest.mark.parametrize("name", ["node", "coordinator", "gateway"])
def test_systemd_units_start_what_there_is(name: str) -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / f"systemd/bsns-{name}.service")
    check_command(shlex.split(unit["Service"]["ExecStart"]))
    for word in unit["Service"]["Environment"].split():
        check_variable(word.split("=")[0])
    assert unit["Service"]["User"] == "bsns"
    assert unit["Service"]["NoNewPrivileges"] == "true"


def test_hashes_are_of_what_is_locked() -> None:
    """Of all but torch, whose builds differ from place to place."""
    lock = (DEPLOY.parent / "requirements.lock").read_text().splitlines()
    text = (DEPLOY.parent / "requirements.hashes").read_text()
    hashed = dict(re.findall(r"^(\S+==\S+) --hash=sha256:([0-9a-f]{64})$", text, re.M))
    assert [line for line in lock if "==" in line and not line.startswith("torch==")] == list(hashed)


def test_image_is_built_of_what_is_in_the_repository() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (DEPLOY.parent / source).exists(), source
    assert re.search(r"^USER bsns$", text, re.M)
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    for extra in re.search(r"'\.\[(.*)\]'", text).group(1).split(","):  # type: ignore[union-attr]
        assert f"\n{extra} = [" in project, extra
    command = re.search(r"^CMD (\[.*\])$", text, re.M)
    assert command is not None
    check_command(json.loads(command.group(1)))
