"""The package as somebody installs it: a wheel in an empty environment, without the repository."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bsns.chain.signer import KeySigner
from tests.anvil import running_anvil

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = str(REPOSITORY / "requirements.lock")
PACKAGES = ("bsns", "coordinator", "node_client", "migrations")
INSTALL_S = 540

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.chain]


def run(command: list[str], folder: Path, *, timeout_s: float = 120) -> str:
    """Standard output of a command that must succeed, in an environment that knows nothing of this one."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "SSL_", "http", "no_proxy"))}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **kept}
    if "PIP_CONFIG_FILE" not in environment and (own := Path.home() / ".config/pip/pip.conf").exists():
        environment["PIP_CONFIG_FILE"] = str(own)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2_000:]}\n{done.stderr[-4_000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    command.append(str(folder))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with nothing in it but the wheel, its extras, and what they ask for."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    programs = folder / "venv/bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--constraint", LOCK]
    run([*pip, f"{wheel}[coordinator,node]"], folder, timeout_s=INSTALL_S)
    return programs


def test_extra_for_developers_can_be_resolved(wheel: Path, installed: Path, tmp_path: Path) -> None:
    pip = [str(installed / "python"), "-m", "pip", "install", "--quiet", "--dry-run", "--constraint", LOCK]
    run([*pip, f"{wheel}[dev,tracing]"], tmp_path, timeout_s=INSTALL_S)


def test_commands_are_there_and_say_what_they_do(installed: Path, tmp_path: Path) -> None:
    commands = {"bsns": "Ask a question", "bsns-node": "Stake, serve", "bsns-coordinator": "Deploy contracts"}
    for name, words in commands.items():
        assert words in run([str(installed / name), "--help"], tmp_path)
    where = run([str(installed / "python"), "-c", "import bsns, coordinator; print(bsns.__file__)"], tmp_path)
    assert str(REPOSITORY) not in where


async def test_wheel_deploys_migrates_and_shows_pages(installed: Path, tmp_path: Path) -> None:
    """Contracts' artifacts, migrations, templates and stylesheets are inside."""
    key, deployment = tmp_path / "deployer.key", tmp_path / "deployment.json"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    command = [str(installed / "bsns-coordinator"), "deploy", "--key-file", str(key), "--network", "devnet"]
    async with running_anvil() as anvil:
        signer = KeySigner(bytes.fromhex(key.read_text()))
        await anvil.rpc("anvil_setBalance", signer.address, hex(10**20))
        options = ["--rpc", anvil.rpc_url, "--deployment", str(deployment)]
        made = json.loads(await asyncio.to_thread(run, [*command, *options], tmp_path))
    assert made["chain_id"] == 31337
    assert json.loads(deployment.read_text())["request_tabs"] == made["request_tabs"]
    database = f"sqlite:///{tmp_path / 'c.sqlite'}"
    assert json.loads(run([str(installed / "bsns-coordinator"), "migrate", "--database-url", database], tmp_path))
    opening = ["gateway", "open-account", "somebody", "--database-url", database]
    opened = run([str(installed / "bsns-coordinator"), *opening], tmp_path)
    assert json.loads(opened)["secret"].startswith("bsns-")
    program = (
        "from coordinator.gateway.explorer import _environment\n"
        "made = _environment()\n"
        "print(len([made.get_template(name) for name in made.list_templates()]))\n"
        "from importlib.resources import files\n"
        "print(files('coordinator.gateway').joinpath('static', 'explorer.css').is_file())\n"
        "import torch, bsns.runtime.decoder_executor\n"
        "import node_client.service\n"
    )
    shown = run([str(installed / "python"), "-c", program], tmp_path).split()
    assert int(shown[0]) > 20
    assert shown[1] == "True"
