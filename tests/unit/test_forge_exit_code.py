"""A failing Solidity test must fail the build.

The `.bin` shims of npm's meta packages exit 0 whatever the tool returned, so a red suite would look green. Here a
throw-away project with one failing test and one passing test goes through the same `forge` and the same compiler as
`make test-contracts`. Nothing of the real suite is run.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORGE = ROOT / "contracts" / "node_modules" / ".bin" / "forge"
COMPILER = ROOT / "contracts" / "solc"
FORGE_TIMEOUT_S = 120


def _run_forge(folder: Path, assertion: str) -> subprocess.CompletedProcess[str]:
    (folder / "tests").mkdir()
    (folder / "src").mkdir()
    modules = ROOT / "contracts" / "node_modules"
    (folder / "foundry.toml").write_text(
        "[profile.default]\n"
        'src = "src"\n'
        'test = "tests"\n'
        "libs = []\n"
        "auto_detect_remappings = false\n"
        f'remappings = ["solady/={modules}/solady/src/"]\n'
        f'allow_paths = ["{modules}"]\n'
        f'solc = "{COMPILER}"\n'
        "offline = true\n"
        "auto_detect_solc = false\n"
    )
    (folder / "tests" / "Deliberate.t.sol").write_text(
        "// SPDX-License-Identifier: Apache-2.0\n"
        "pragma solidity 0.8.30;\n"
        'import {FixedPointMathLib} from "solady/utils/FixedPointMathLib.sol";\n'
        "contract DeliberateTest {\n"
        "    function test_deliberate() external pure {\n"
        f"        assert(FixedPointMathLib.sqrt(4) == {assertion});\n"
        "    }\n"
        "}\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "DAPP_"))}
    # The compiler is a Node script; where the system has no Node, the one of the virtual environment serves.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.run(
        [str(FORGE), "test", "--root", str(folder), "--color", "never"],
        capture_output=True,
        text=True,
        timeout=FORGE_TIMEOUT_S,
        env=environment,
        check=False,
    )


def test_forge_test_deliberately_failing_exits_nonzero(tmp_path: Path) -> None:
    result = _run_forge(tmp_path, assertion="3")
    # The failure has to be the test's own, not one of the compiler or of the configuration.
    assert "1 failed" in result.stdout, result.stdout + result.stderr
    assert result.returncode != 0


def test_forge_test_passing_exits_zero(tmp_path: Path) -> None:
    result = _run_forge(tmp_path, assertion="2")
    assert "1 passed" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0
