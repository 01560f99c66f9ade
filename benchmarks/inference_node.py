"""The product's own node client, with what a benchmark asks of it and a devnet does not.

Options before `--` are added to those of the command after it, and win over them. A node of a benchmark measures its
model for longer than a devnet's, so that the plan is not made of noise. With `--passes FILE` it also writes when each
forward pass of its executors began and ended; nothing else about it changes.

    python -m benchmarks.inference_node [--passes FILE] [OPTION ...] -- join ...
"""

from __future__ import annotations

import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PROFILE_SECONDS = 1.5
_RECORD = struct.Struct("<qqq")


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One call of an executor, in seconds of the machine's monotonic clock, which all processes share."""

    first_unit: int
    began: float
    ended: float


def read_passes(file: Path) -> list[ForwardPass]:
    """What a node has written so far, in the order of the calls."""
    return [
        ForwardPass(first_unit, began / 1e9, ended / 1e9)
        for first_unit, began, ended in _RECORD.iter_unpack(file.read_bytes())
    ]


class TimedExecutor:
    """Any executor; each of its forward passes is written to `file`."""

    def __init__(self, executor: Any, file: BinaryIO) -> None:
        self._executor, self._file = executor, file

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._executor, name)
        if not name.startswith("forward"):
            return attribute

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic_ns()
            output = attribute(*arguments, **options)
            ended = time.monotonic_ns()
            self._file.write(_RECORD.pack(self._executor.first_unit, began, ended))
            return output

        return timed


def main() -> None:
    separator = sys.argv.index("--")
    added, command = sys.argv[1:separator], sys.argv[separator + 1 :]
    os.environ["BSNS_NODE_PROFILE_SECONDS"] = str(PROFILE_SECONDS)
    from node_client import cli
    from node_client.service import NodeService

    if added[:1] == ["--passes"]:
        file = open(added[1], "ab", buffering=0)  # noqa: SIM115 - as long as the process
        added = added[2:]
        defaults = NodeService.__init__.__kwdefaults__
        assert defaults is not None
        open_stage = defaults["executor_factory"]
        defaults["executor_factory"] = lambda *given, **options: TimedExecutor(open_stage(*given, **options), file)
    sys.argv = [sys.argv[0], *command, *added]
    cli.main()


if __name__ == "__main__":
    main()
