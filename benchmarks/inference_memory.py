"""What a process holds in memory, by /proc (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(?P<file>.*)$")
_RESIDENT = re.compile(r"^Rss: +(?P<kilobytes>\d+) kB$")


def resident_bytes(process: int, folder: Path) -> tuple[int, int]:
    """Resident bytes of a process: all, and those that are mapped from files under `folder`.

    Shared pages count in full (RSS, not PSS), so that the figure does not depend on which other processes run.
    """
    return parse_mappings(Path(f"/proc/{process}/smaps").read_text(), folder)


def parse_mappings(smaps: str, folder: Path) -> tuple[int, int]:
    """`resident_bytes` of the text of a smaps file."""
    total = mapped = 0
    under = False
    for line in smaps.splitlines():
        if found := _MAPPING.match(line):
            under = found["file"].startswith(f"{folder}/")
        elif found := _RESIDENT.match(line):
            total += 1024 * int(found["kilobytes"])
            mapped += 1024 * int(found["kilobytes"]) * under
    return total, mapped
