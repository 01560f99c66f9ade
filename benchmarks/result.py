"""The result of a benchmark: figures with goals, as they are printed and as they are written to benchmarks/results.

Owns the format (architecture, "Figures"). A goal is a comparison such as "<= 1.005"; whether it is met is computed
from the value and never written by hand.
"""

import json
import operator
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured figure: `low` and `high` are the extremes of its `samples`."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    samples: int
    goal: str | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value meets the goal; None without one."""
        if self.goal is None:
            return None
        comparison, limit = self.goal.split()
        return _COMPARISONS[comparison](self.value, float(limit))


def print_table(figures: Sequence[Figure]) -> bool:
    """Print the figures with their goals. Whether every goal is met."""
    width = max(len(item.name) for item in figures)
    print(f"\n{'figure':{width}}  {'value':>12}  {'low':>12}  {'high':>12}  samples  goal")
    for item in figures:
        verdict = "" if item.goal is None else f"{item.goal}  {'met' if item.met else 'NOT MET'}"
        print(
            f"{item.name:{width}}  {item.value:12.5g}  {item.low:12.5g}  {item.high:12.5g}  {item.samples:7}  "
            f"{verdict or '-'} ({item.unit})"
        )
    return all(item.met is not False for item in figures)


def merge_result(name: str, seed: str, figures: Sequence[Figure]) -> None:
    """Write figures of a run of some sections in the place of those of the same names in results/`name`.json. The
    others stay, and say of which commit they are.
    """
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else {"commit": None, "figures": []}
    new = {item.name for item in figures}
    kept = [
        Figure(*(item[key] for key in ("name", "value", "unit", "low", "high", "samples", "goal")),
               note=item["note"] if "of commit" in item["note"] else f"{item['note']} (of commit {before['commit']})")
        for item in before["figures"]
        if item["name"] not in new
    ]  # fmt: skip
    write_result(name, seed, [*figures, *kept])


def write_result(name: str, seed: str, figures: Sequence[Figure]) -> None:
    """Write the figures to results/`name`.json."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    document = {
        "name": name, "commit": commit or None, "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "seed": seed,
        "figures": [
            {"name": item.name, "value": item.value, "unit": item.unit, "low": item.low, "high": item.high,
             "samples": item.samples, "goal": item.goal, "met": item.met, "note": item.note}
            for item in figures
        ],
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {name}.json")
