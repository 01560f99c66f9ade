"""`make lock-hashes`: the hash of every file that `make setup` installs, from requirements.lock to requirements.hashes.

For Python 3.11 on Linux x86-64, where pip then refuses any other file. Without torch, whose builds differ from place to
place under one version; it is installed first, and by version alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK, HASHES = REPOSITORY / "requirements.lock", REPOSITORY / "requirements.hashes"
UNHASHED = {"torch"}


def main() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    hashed = [line for line in lines if line.split("==")[0].lower() not in UNHASHED]
    with tempfile.TemporaryDirectory() as folder:
        report, wanted = Path(folder) / "report.json", Path(folder) / "wanted.txt"
        wanted.write_text("\n".join(hashed) + "\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*pip, "--report", str(report), "--requirement", str(wanted)], check=True)
        found = {}
        for item in json.loads(report.read_text())["install"]:
            name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
            found[name] = item["download_info"]["archive_info"]["hashes"]["sha256"]
    text = ["# Made by `make lock-hashes` from requirements.lock: the files that Python 3.11 on Linux x86-64 takes."]
    for line in hashed:
        name = line.split("==")[0].lower().replace("_", "-").replace(".", "-")
        text.append(f"{line} --hash=sha256:{found[name]}")
    HASHES.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
