"""What a model looks like to a planner, for people: its units, what crosses each cut, and the best cuts for a fleet.

Owns the figures behind `bsns model`. Promises that times are measured on this machine, by the same code by which a node
measures itself, and that cuts come from the planner that publishes plans. Does not write to a terminal.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bsns.planning import partition
from bsns.planning.problem import Link, Links, Objective, Partition, PlanningNode, Terms
from bsns.protocol.identifiers import address
from bsns.protocol.manifest import ManifestError, ModelManifest, ShardUnit
from bsns.protocol.model_graph import ModelGraph
from bsns.protocol.plan import execution_class_id

LOCAL_NETWORK: Final = Link(latency_ns=500_000, bytes_per_second=125_000_000)
"""Half a millisecond one way and 1 Gbit/s: machines on one switch."""
_WIDTH: Final = 120


class ModelUnavailableError(RuntimeError):
    """The model cannot be prepared or measured here. The message says what to do."""


@dataclass(frozen=True, slots=True)
class UnitRun:
    """Consecutive units [first, end) that look the same to a planner; `unit` is the first of them.

    `decode_ns`: one row through one of them on this machine.
    """

    first: int
    end: int
    unit: ShardUnit
    decode_ns: int


@dataclass(frozen=True)
class ModelDescription:
    """A model, measured on this machine, and its partition over equal machines like this one."""

    manifest: ModelManifest
    execution_class: str
    runs: tuple[UnitRun, ...]
    partition: Partition


def prepared_folder(model: str) -> Path:
    """The folder of a prepared model given as such, or prepared now by its name. ModelUnavailableError."""
    folder = Path(model)
    if (folder / "manifest.json").is_file():
        return folder
    from bsns.runtime.prepare import PreparationError, prepare

    try:
        return prepare(model, report=lambda line: print(line, file=sys.stderr, flush=True))
    except (PreparationError, OSError) as error:
        found = f"folder {folder} has no manifest.json, and " if model and folder.is_dir() else ""
        raise ModelUnavailableError(f"{found}{error}") from error


def describe(
    folder: Path,
    *,
    nodes: int = 4,
    link: Link = LOCAL_NETWORK,
    objective: Objective = Objective.THROUGHPUT,
    stage_count: int | None = None,
    time_limit_s: float = 5.0,
    report: Callable[[str], None] = lambda _: None,
) -> ModelDescription:
    """Measures the model in `folder` for about `time_limit_s` seconds and plans it for `nodes` machines like this one
    with `link` between any two. The memory of the machines is not limited here.

    Raises ModelUnavailableError and PlanningError.
    """
    from bsns.runtime.executor import ExecutionError
    from bsns.runtime.profile import measure
    from bsns.runtime.weight_store import WeightStore, WeightStoreError

    try:
        store = WeightStore(folder)
        manifest = store.manifest
        report(f"measuring {manifest.name} on this machine, about {time_limit_s:.0f} s")
        profile = measure(store, time_limit=time_limit_s)
    except (ExecutionError, WeightStoreError, ManifestError) as error:
        raise ModelUnavailableError(str(error)) from error
    times = {timing.unit_kind: timing.decode_nanoseconds for timing in profile.timings}
    graph = ModelGraph.of_manifest(manifest)
    terms = Terms(
        stage_count=min(nodes, len(manifest.units)) if stage_count is None else stage_count,
        session_tokens=min(Terms().session_tokens, manifest.context_limit),
    )
    fleet = [
        PlanningNode(address(number.to_bytes(20, "big")), 2**50, execution_class_id(profile.execution_class), times)
        for number in range(1, nodes + 1)
    ]
    return ModelDescription(
        manifest,
        profile.execution_class,
        _runs(manifest, times),
        partition(graph, fleet, Links(link), objective, terms=terms),
    )


def _runs(manifest: ModelManifest, times: dict[str, int]) -> tuple[UnitRun, ...]:
    runs: list[UnitRun] = []
    for unit in manifest.units:
        if runs and _alike(runs[-1].unit, unit):
            runs[-1] = UnitRun(runs[-1].first, unit.index + 1, runs[-1].unit, runs[-1].decode_ns)
        else:
            runs.append(UnitRun(unit.index, unit.index + 1, unit, times[unit.timing_key]))
    return tuple(runs)


def _alike(a: ShardUnit, b: ShardUnit) -> bool:
    return (a.timing_key, a.size_bytes, a.output_bytes_per_token, a.flops_per_token) == (
        b.timing_key,
        b.size_bytes,
        b.output_bytes_per_token,
        b.flops_per_token,
    )


def show_description(description: ModelDescription) -> str:
    """The description as text: the model, its units with costs, and the stages of the partition."""
    manifest, found = description.manifest, description.partition
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, highlight=False)
    parameters = sum(unit.parameter_count for unit in manifest.units)
    console.print(
        f"{manifest.name}: {manifest.task}, {manifest.architecture}, {manifest.dtype}\n"
        f"{len(manifest.units)} units, {parameters:,} parameters, "
        f"{sum(unit.size_bytes for unit in manifest.units):,} bytes of weights\n"
        f"manifest 0x{manifest.manifest_hash.hex()}\n"
    )
    units = Table(title=f"Units, timed here as {description.execution_class}", title_justify="left")
    for name in ("unit", "name", "parameters", "work", "time", "peak", "cut after it"):
        units.add_column(name, justify="left" if name == "name" else "right")
    for run in description.runs:
        unit = run.unit
        last = run.end - 1
        name = unit.name if run.end - run.first == 1 else f"{unit.name} … {manifest.units[last].name}"
        units.add_row(
            str(run.first) if last == run.first else f"{run.first}..{last}",
            name,
            f"{unit.parameter_count:,}",
            f"{unit.flops_per_token / 1e6:,.2f} MFLOP",
            _time(run.decode_ns),
            f"{unit.peak_bytes:,} B",
            f"{unit.output_bytes_per_token:,} B",
        )
    console.print(units)
    stages = Table(title="Best cuts found for equal machines like this one, one row at a time", title_justify="left")
    for name in ("stage", "units", "receive", "compute", "send", "together"):
        stages.add_column(name, justify="right")
    for number, stage in enumerate(found.stages):
        stages.add_row(
            str(number),
            f"{stage.first}..{stage.end - 1}",
            _time(stage.receive_ns),
            _time(stage.compute_ns),
            _time(stage.send_ns),
            _time(stage.cost_ns),
        )
    console.print(stages)
    console.print(
        f"{found.objective.value}: {_time(found.value_ns)}, found by {found.solver}\n"
        f"no plan is below {_time(found.lower_bound_ns)}, {found.ratio:.3f} of that ({found.bound})"
    )
    return output.getvalue().rstrip()


def _time(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:,.3f} ms"
