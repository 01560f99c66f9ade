"""A plan from its planning record: the one function that the publisher runs before and every auditor after.

Owns which planner the name in a record stands for. Promises the same partition for the same record and manifest on any
machine: integers throughout, a seed, and no deadline. Does not publish and does not judge measurements.
"""

from __future__ import annotations

from typing import Final

from bsns.planning import partition
from bsns.planning.measured import planning_links, planning_node
from bsns.planning.problem import Link, Objective, Partition, PlanningError, Problem, Terms, Transfers
from bsns.planning.rebalancing import Change, Decision, MoveTerms, rebalance
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.model_graph import ModelGraph
from bsns.protocol.plan import ShardPlan
from bsns.protocol.planning_record import PlanningRecord

PLANNER: Final = "bsns.planning"
PLANNER_VERSION: Final = 3
"""Counts up with every change by which equal inputs could give another plan: old plans need the old release."""

MAXIMUM_UNITS: Final = 4_096
"""Units of a model that is planned: an auditor's tables grow with their square, to 0.1 GB there, and a manifest is a
stranger's."""


def plan_of_record(record: PlanningRecord, manifest: ModelManifest, previous: ShardPlan | None = None) -> Partition:
    """The partition that `record` gives for the model of `manifest`. `previous` is the plan that
    `record.rebalancing` names, None if it names none.

    PlanningError if there is none, if the plan in force should have stayed, if the model has too many units, or if the
    record is of a planner that this release does not have.
    """
    if record.rebalancing is None:
        problem = _problem(record, manifest)
        return partition(
            problem.graph, problem.nodes, problem.links, problem.objective, terms=problem.terms, seed=record.seed
        )
    decision = decision_of_record(record, manifest, previous)
    if decision.change is Change.STAY:
        raise PlanningError("by its record the plan in force should have stayed: no change was worth its cost")
    return decision.partition


def decision_of_record(record: PlanningRecord, manifest: ModelManifest, previous: ShardPlan | None) -> Decision:
    """What is to become of `previous`, the plan that `record.rebalancing` names. PlanningError as `plan_of_record`."""
    terms = record.rebalancing
    if terms is None or previous is None:
        raise PlanningError("a decision about a plan needs the terms of rebalancing and the plan in force")
    moves = MoveTerms(
        terms.horizon_seconds, terms.load_bytes_per_second, terms.minimum_gain_bps, terms.minimum_drift_gain_bps
    )
    return rebalance(previous, _problem(record, manifest), moves, seed=record.seed)


def _problem(record: PlanningRecord, manifest: ModelManifest) -> Problem:
    if (record.planner, record.planner_version) != (PLANNER, PLANNER_VERSION):
        raise PlanningError(
            f"the record is of planner {record.planner} version {record.planner_version}, this release has {PLANNER} "
            f"version {PLANNER_VERSION}: take the release that published the plan"
        )
    if len(manifest.units) > MAXIMUM_UNITS:
        raise PlanningError(
            f"the model {manifest.name!r} has {len(manifest.units)} units, at most {MAXIMUM_UNITS} are planned"
        )
    try:
        objective, transfers = Objective(record.objective), Transfers(record.transfers)
    except ValueError as error:
        raise PlanningError(f"the record names what this planner does not know: {error}") from error
    measured = [item.measurements for item in record.measurements]
    return Problem(
        ModelGraph.of_manifest(manifest),
        tuple(planning_node(item, batch=record.batch) for item in measured),
        planning_links(measured, prior=Link(record.prior_latency_ns, record.prior_bytes_per_second)),
        objective,
        Terms(
            replicas=record.replicas,
            stage_count=record.stage_count,
            spread_leftover=record.spread_leftover,
            concurrent_sessions=record.concurrent_sessions,
            session_tokens=min(record.session_tokens, manifest.context_limit),
            transfers=transfers,
        ),
    )
