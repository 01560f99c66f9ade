"""Errors of the auditor: one, because there is one thing to do about it, which its message says."""

from __future__ import annotations


class AuditError(Exception):
    """There is nothing to audit: the request is not on this chain, or the RPC endpoint gives half of it."""
