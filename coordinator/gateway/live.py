"""What changes, told to the pages that are open: one look at the database, however many readers.

Owns the readers and their queues. Promises that a slow reader misses lines and never holds up another, that there are
never more than allowed, and that each ends when its connection does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from coordinator.gateway.metrics import GatewayMetrics
from coordinator.storage import Storage, StorageError

QUEUED_LINES: Final = 8
SILENCE_S: Final = 15.0
POLL_S: Final = 1.0


class Viewer:
    """One open page."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.queue: asyncio.Queue[str | None] = asyncio.Queue(QUEUED_LINES)

    async def lines(self) -> AsyncIterator[str]:
        """Server-sent events until the reader goes, or the gateway does."""
        try:
            yield "retry: 5000\n\n"
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        line = await self.queue.get()
                except TimeoutError:
                    line = ": nothing new\n\n"
                if line is None:
                    return
                yield line
        finally:
            self._live.leave(self)


class Live:
    """Looks at `storage` once a second while somebody reads."""

    def __init__(self, storage: Storage, limit: int, metrics: GatewayMetrics) -> None:
        self._storage, self._limit, self._metrics = storage, limit, metrics
        self._viewers: set[Viewer] = set()
        self._is_over = False

    def join(self) -> Viewer | None:
        """A new reader; None if there are as many as may be."""
        if self._is_over or len(self._viewers) >= self._limit:
            return None
        viewer = Viewer(self)
        self._viewers.add(viewer)
        self._metrics.live_viewers.set(len(self._viewers))
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        self._metrics.live_viewers.set(len(self._viewers))

    def end(self) -> None:
        """Let every reader go."""
        self._is_over = True
        for viewer in tuple(self._viewers):
            while not viewer.queue.empty():
                viewer.queue.get_nowait()
            viewer.queue.put_nowait(None)

    async def run(self) -> None:
        """Tell of each new block, until cancelled."""
        last: Any = None
        while True:
            await asyncio.sleep(POLL_S)
            if not self._viewers:
                continue
            try:
                cursor = await asyncio.to_thread(self._storage.cursor)
            except StorageError:
                continue
            if cursor is None or cursor.hash == last:
                continue
            last = cursor.hash
            content = json.dumps({"block": cursor.number, "at": cursor.timestamp})
            for viewer in tuple(self._viewers):
                if not viewer.queue.full():
                    viewer.queue.put_nowait(f"event: block\ndata: {content}\n\n")
