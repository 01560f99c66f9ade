"""The committed code under bsns/v1 is what the .proto files generate (`make proto`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_generated_wire_code_equals_the_committed(tmp_path: Path) -> None:
    sources = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("proto/bsns/v1/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{tmp_path}" for kind in ("mypy", "mypy_grpc")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # protoc finds its plugins there
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, *sources],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        check=True,
    )
    generated = {item.name: item.read_text() for item in (tmp_path / "bsns" / "v1").iterdir()}
    committed = {item.name: item.read_text() for item in (REPOSITORY / "bsns" / "v1").glob("*_pb2*")}
    assert sorted(generated) == sorted(committed)
    stale = [name for name, text in generated.items() if committed[name] != text]
    assert not stale, f"run `make proto`: {', '.join(stale)}"
