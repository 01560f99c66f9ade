"""2026-11: a document of brackets ended the process.

py_ecc raises the interpreter's recursion limit to 100,000 when it is imported, and the parser of the standard library
then recurses until the stack ends, where before it had given up with an error.
"""

import json
import subprocess
import sys

import pytest

from bsns.protocol.bounded_json import MAXIMUM_DEPTH, parse_json

_READ = """
import sys
import py_ecc
from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.record import RecordError, VerificationRecord

assert sys.getrecursionlimit() >= 100_000
for kind, error in ((ModelManifest, ManifestError), (VerificationRecord, RecordError)):
    for data in (b"[" * 1_000_000, b'{"a":' * 500_000, b'["' + b"[" * 100 + b'",' + b"[" * 1_000_000):
        try:
            kind.from_bytes(data)
        except error as refusal:
            print(refusal)
"""


def test_manifest_and_record_of_brackets_are_refused_and_the_process_lives() -> None:
    done = subprocess.run([sys.executable, "-c", _READ], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("deep, at most") == 6, done.stdout


def test_parse_json_counts_only_brackets_outside_of_texts() -> None:
    shallow = {"[[[[": ["]" * 200, "[" * 200, '"[' * 100, "\\" * 3 + "[" * 100], "a": [1, 2.5, None, True]}
    assert parse_json(json.dumps(shallow).encode()) == shallow
    deepest: object = 1
    for _ in range(MAXIMUM_DEPTH):
        deepest = [deepest]
    assert parse_json(json.dumps(deepest).encode()) == deepest
    with pytest.raises(ValueError, match=f"{MAXIMUM_DEPTH + 1} deep"):
        parse_json(json.dumps([deepest]).encode())


def test_parse_json_of_a_text_that_never_ends_takes_linear_time() -> None:
    with pytest.raises(ValueError):
        parse_json(b"[" * 100 + b'"\\' * 2_000_000)
