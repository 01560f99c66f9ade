"""The auditor's side: build the record of a request from the chain, and check anybody's record against the chain alone.

Needs an RPC endpoint that keeps logs and headers, no archived state, no coordinator and no node. `verify` recomputes
every derived value and compares every recorded one; see `bsns.audit.rules` for what is recomputed. Imports no torch
and nothing of `bsns.requester`.
"""

from bsns.audit.errors import AuditError
from bsns.audit.report import show
from bsns.audit.verification import Check, checks, deployment_of, export, verify, verify_bytes

__all__ = ["AuditError", "Check", "checks", "deployment_of", "export", "show", "verify", "verify_bytes"]
