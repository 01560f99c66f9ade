"""A chain client for whoever asks the same of a long history again and again: what was read of it is kept.

Owns the memory of events by query. Promises the answer that the chain gives now, as long as no reorganisation is deeper
than `margin` blocks: those newest are read again each time. Everything else is asked of the chain, with patience.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from bsns.chain.client import ChainClient, ChainEvent
from bsns.chain.patient_client import PatientChainClient

MARGIN_BLOCKS: Final = 256
REMEMBERED_QUERIES: Final = 256
_Key = tuple[int, str | None, str | None, tuple[tuple[str, Any], ...]]


class RememberingChainClient(PatientChainClient):
    """ChainClient over another one. Of `queries` different ones, those asked longest ago are forgotten."""

    def __init__(
        self,
        client: ChainClient,
        patience_s: float,
        *,
        margin: int = MARGIN_BLOCKS,
        queries: int = REMEMBERED_QUERIES,
    ) -> None:
        super().__init__(client, patience_s)
        self._margin, self._queries = margin, queries
        # By query the last block that was read, and the events up to it.
        self._known: OrderedDict[_Key, tuple[int, tuple[ChainEvent, ...]]] = OrderedDict()

    async def events_between(
        self,
        first: int,
        last: int,
        *,
        contract: str | None = None,
        name: str | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> tuple[ChainEvent, ...]:
        key = first, contract, name, tuple(sorted((filters or {}).items()))
        through, events = self._known.get(key, (first - 1, ()))
        start = max(first, through - self._margin + 1)
        if last < start:
            # Of an older state than the one remembered.
            return await super().events_between(first, last, contract=contract, name=name, filters=filters)
        fresh = await super().events_between(start, last, contract=contract, name=name, filters=filters)
        found = (*(item for item in events if item.block_number < start), *fresh)
        self._known[key] = last, found
        self._known.move_to_end(key)
        while len(self._known) > self._queries:
            self._known.popitem(last=False)
        return found
