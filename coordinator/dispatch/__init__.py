"""Who is there, what they are to serve, and who serves which request.

`node_pool` knows the attached nodes, `plan_publication` brings a plan from measurements to the chain,
`request_routing` picks one replica a stage for each request, `node_standing` says how nodes kept their duties so far,
`topology_watch` what their network looks like.
What they want of the chain becomes intents for the outbox; none of them sends anything to the chain itself.
"""

from coordinator.dispatch.node_pool import AttachedNode, NodePool, PoolLimits
from coordinator.dispatch.node_standing import NodeStandings
from coordinator.dispatch.plan_publication import PlanPolicy, PlanPublication, PublicationLimits
from coordinator.dispatch.request_routing import RequestRouting
from coordinator.dispatch.topology_watch import TopologyWatch

__all__ = [
    "AttachedNode",
    "NodePool",
    "NodeStandings",
    "PlanPolicy",
    "PlanPublication",
    "PoolLimits",
    "PublicationLimits",
    "RequestRouting",
    "TopologyWatch",
]
