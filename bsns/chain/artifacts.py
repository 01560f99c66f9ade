"""ABI and bytecode of the five contracts.

Owns how the sources are compiled from Python (py-solc-x over the pinned compiler, with the settings of foundry.toml)
and the packaged result under `bsns/chain/artifacts/`, so that an installed wheel needs neither compiler nor
repository. `python -m bsns.chain.artifacts` renews the packaged files; a test compares them, this compilation and
forge's with one another.
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

CONTRACT_NAMES = ("NodeRegistry", "ShardAssignments", "InferenceEscrow", "OutputVerification", "RequestTabs")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract. `bytecode` is the creation code without constructor arguments."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: str


@lru_cache(maxsize=len(CONTRACT_NAMES))
def contract_artifact(name: str) -> Artifact:
    """The packaged artifact of one of CONTRACT_NAMES; FileNotFoundError says how to make it."""
    source = resources.files("bsns.chain") / "artifacts" / f"{name}.json"
    if not source.is_file():
        raise FileNotFoundError(f"no compiled contract {name}: run `make contracts`")
    content = json.loads(source.read_text())
    return Artifact(name, content["abi"], content["bytecode"])


def compile_contracts(repository: Path) -> dict[str, Artifact]:
    """Compile the sources under `repository`/contracts as forge does; needs `contracts/node_modules` (`make setup`)."""
    import solcx  # only a developer compiles

    profile = tomllib.loads((repository / "foundry.toml").read_text())["profile"]["default"]
    roots = ("", "interfaces", "libraries", "types")
    paths = sorted(path for root in roots for path in (repository / "contracts" / root).glob("*.sol"))
    standard_input = {
        "language": "Solidity",
        "sources": {str(path.relative_to(repository)): {"content": path.read_text()} for path in paths},
        "settings": {
            "remappings": profile["remappings"],
            "optimizer": {"enabled": profile["optimizer"], "runs": profile["optimizer_runs"]},
            "evmVersion": profile["evm_version"],
            "viaIR": profile["via_ir"],
            "metadata": {
                "useLiteralContent": False,
                "bytecodeHash": profile["bytecode_hash"],
                "appendCBOR": profile["cbor_metadata"],
            },
            "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object"]}},
        },
    }
    output = solcx.compile_standard(
        standard_input,
        solc_binary=repository / "contracts" / "solc",
        base_path=repository,
        allow_paths=[repository],
    )
    compiled = {}
    for name in CONTRACT_NAMES:
        contract = output["contracts"][f"contracts/{name}.sol"][name]
        compiled[name] = Artifact(name, contract["abi"], "0x" + contract["evm"]["bytecode"]["object"])
    return compiled


def write_artifacts(artifacts: dict[str, Artifact], folder: Path) -> None:
    """Write `artifacts` as the packaged JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, artifact in artifacts.items():
        content = {"abi": artifact.abi, "bytecode": artifact.bytecode}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    _repository = Path(__file__).resolve().parents[2]
    write_artifacts(compile_contracts(_repository), Path(__file__).parent / "artifacts")
    sys.stdout.write(f"wrote {', '.join(CONTRACT_NAMES)}\n")
