"""py-solc-x and forge compile the same sources, with the same compiler and settings, to the same bytecode; what is
packaged is that bytecode.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from bsns.chain.artifacts import CONTRACT_NAMES, compile_contracts, contract_artifact

REPOSITORY = Path(__file__).resolve().parents[2]


def canonical(item: dict[str, object]) -> str:
    """One ABI entry as text: the two tools list entries and their keys in different orders."""
    return json.dumps(item, sort_keys=True)


def test_packaged_artifacts_equal_py_solc_x_and_forge(tmp_path: Path) -> None:
    forge = REPOSITORY / "contracts" / "node_modules" / ".bin" / "forge"
    environment = {
        "FOUNDRY_OUT": str(tmp_path / "out"),
        "FOUNDRY_CACHE_PATH": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    path = str(Path(shutil.which("node") or "node").parent) + ":/usr/bin:/bin"
    subprocess.run(
        [forge, "build", "--skip", "test"],
        cwd=REPOSITORY,
        env={**environment, "PATH": path},
        check=True,
        capture_output=True,
    )
    compiled = compile_contracts(REPOSITORY)
    for name in CONTRACT_NAMES:
        by_forge = json.loads((tmp_path / "out" / f"{name}.sol" / f"{name}.json").read_text())
        assert compiled[name].bytecode == by_forge["bytecode"]["object"], f"{name}: py-solc-x and forge differ"
        assert sorted(map(canonical, compiled[name].abi)) == sorted(map(canonical, by_forge["abi"])), name
        assert contract_artifact(name) == compiled[name], (
            f"{name}: the packaged artifact is stale; run `make contracts`"
        )
