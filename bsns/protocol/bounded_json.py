"""JSON from strangers, parsed without letting its nesting decide how deep the parser recurses.

Owns the one way in which this package parses JSON that it did not write. Promises a ValueError, never a crash: the
parser of the standard library recurses in C and relies on the interpreter's recursion limit, which a dependency
(py_ecc) raises on import beyond what the stack holds, so that a few kilobytes of brackets would end the process. Does
not limit the length of a document; callers do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

MAXIMUM_DEPTH: Final = 64
"""Lists and objects inside one another; documents of this package have at most ten."""
# Possessive, so that a text which is never closed is passed over once and not once for each quote in it.
_TEXT: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEP: Final = np.zeros(256, dtype=np.int32)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def parse_json(
    data: bytes,
    *,
    parse_float: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """The document in UTF-8 `data`, as `json.loads`. ValueError if it is not JSON or nested beyond MAXIMUM_DEPTH."""
    if data.count(b"[") + data.count(b"{") > MAXIMUM_DEPTH:
        depth = np.cumsum(_STEP[np.frombuffer(_TEXT.sub(b"", data), dtype=np.uint8)])
        if depth.size and int(depth.max()) > MAXIMUM_DEPTH:
            raise ValueError(f"nested {int(depth.max())} deep, at most {MAXIMUM_DEPTH} are taken")
    return json.loads(data.decode(), parse_float=parse_float, parse_constant=parse_constant)
