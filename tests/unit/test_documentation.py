"""What the documentation says is so: links lead somewhere, commands and settings exist, vectors are computed."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from coordinator.gateway.settings import GatewaySettings
from node_client.settings import NodeSettings
from tests import vectors
from tests.unit.test_deploy_files import PROGRAMS, check_command, check_variable

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def names(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs and GitHub make them."""
    found = set()
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            text = re.sub(r"[^\w\s-]", "", line.lstrip("#").strip().lower())
            found.add(re.sub(r"[\s]+", "-", text))
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = page if not file else (page.parent / file).resolve()
        assert found.exists(), f"{target} is not there"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{target}: no such heading"


def commands_of(page: Path) -> Iterator[str]:
    """Lines of code that begin with one of our programs or make, continued lines joined."""
    text = page.read_text()
    blocks = re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL)
    blocks += ["\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\s*(bsns|bsns-node|bsns-coordinator|make)\s", line):
                yield line.strip()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_their_options_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    inline = re.findall(r"`((?:bsns|bsns-node|bsns-coordinator|make) [^`\n]+)`", page.read_text())
    for line in [*commands_of(page), *inline]:
        for command in re.split(r"\s+(?:#.*|;.*|\|.*|&&.*)$", line)[:1]:
            try:
                words = [word for word in shlex.split(command) if word not in ("…", "...")]
            except ValueError:
                words = command.split()
            # `exit`, `status`: a list of verbs in prose is no command line.
            words = [word.rstrip(",.") for word in words]
            if words[0] == "make":
                for word in words[1:]:
                    assert "=" in word or word.startswith("-") or word in targets, f"{line}: there is no target {word}"
            elif words[0] in PROGRAMS and not words[1][:1].isupper():  # `bsns Gateway` is the name of a domain
                check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_variables_and_python_in_it_are_right(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`(BSNS_[A-Z_]+)`", text):
        if not name.startswith(("BSNS_NODE_", "BSNS_COORDINATOR_", "BSNS_GATEWAY_")) or name.endswith("_"):
            continue
        if name in ("BSNS_COORDINATOR", "BSNS_COORDINATOR_CERTIFICATE"):
            continue
        check_variable(name)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, names(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


def test_settings_in_tables_exist() -> None:
    for page, settings in (("operator.md", NodeSettings), ("gateway.md", GatewaySettings)):
        table = (REPOSITORY / "docs" / page).read_text().split("| setting | default |")[1].split("\n\n")[0]
        for line in table.splitlines()[2:]:
            for name in re.findall(r"`([a-z_]+)`", line.split("|")[1]):
                assert name in settings.model_fields, f"{page}: {name} is no setting"


def test_vectors_are_what_the_code_computes() -> None:
    assert vectors.FILE.read_text() == vectors.text(), "run `python -m tests.vectors`, and say in the changelog why"


def test_vectors_of_typed_data_are_those_of_another_library() -> None:
    key = bytes([3]) * 32
    cases: list[dict[str, Any]] = json.loads(vectors.FILE.read_text())["typed_data"]
    assert len(cases) == 10
    for case in cases:
        kind = case["type"]
        fields = [item.split(" ") for item in kind[kind.index("(") + 1 : -1].split(",")]
        values = {
            name: int(value) if type_.startswith("uint") else value
            for (type_, name), value in zip(fields, case["values"], strict=True)
        }
        message = encode_typed_data(
            case["domain"], {kind.split("(")[0]: [{"name": name, "type": type_} for type_, name in fields]}, values
        )
        assert (
            "0x" + Account.sign_message(message, key).signature.hex().removeprefix("0x") == case["signature_by_key_3"]
        )
        assert Account.recover_message(message, signature=case["signature_by_key_3"]) == Account.from_key(key).address


def test_nothing_of_a_workplace_is_named() -> None:
    for page in PAGES:
        text = page.read_text()
        for word in ("/work/", "/root/", "localhost:8080", "shared/design"):
            assert word not in text, f"{names(page)} names {word}"
