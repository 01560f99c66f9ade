"""Model in, nodes in, plan out: pure functions from measured costs to shard plans.

`costs` holds the inputs every planner takes (units with costs, nodes with speeds and memory); `chain_partition` cuts
a chain of units into stages over nodes in a given order, exactly. Planners never talk to the chain, to nodes or to a
clock, so that anyone who has the same measurements gets the same plan.
"""

from coordinator.planning.chain_partition import ChainPartition, PlannedStage, plan_chain, to_shard_plan
from coordinator.planning.costs import NodeCapability, PlanningError, UnitCost, capability_of, unit_costs

__all__ = [
    "ChainPartition",
    "NodeCapability",
    "PlannedStage",
    "PlanningError",
    "UnitCost",
    "capability_of",
    "plan_chain",
    "to_shard_plan",
    "unit_costs",
]
