"""A node client that computes something else than the model: every output is off by one per cent of its size.

It is the product's own node in everything but the executor, which is wrapped at the boundary that the product has
anyway. It cheats when it serves and when it attests, as a node with other weights would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsns.runtime.executor import BatchStep, InsideRows, ShardExecutor, StageSession, forward_each, open_stage
from bsns.runtime.weight_store import WeightStore
from node_client import cli
from node_client.service import NodeService

NOISE = 0.01


class CheatingExecutor:
    """Any executor, with noise on its outputs that is the same for equal inputs."""

    def __init__(self, honest: ShardExecutor) -> None:
        self._honest = honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def forward(
        self,
        session: StageSession,
        inputs: Tensor,
        *,
        position: int,
        logit_rows: Sequence[int] | None = None,
        inside: InsideRows | None = None,
    ) -> Tensor:
        within = None if inside is None else (lambda rows: inside(_noisy(rows, position)))
        output = self._honest.forward(session, inputs, position=position, logit_rows=logit_rows, inside=within)
        return _noisy(output, position)

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        return forward_each(self, steps)  # type: ignore[arg-type]


def _noisy(rows: Tensor, position: int) -> Tensor:
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(position))
    return rows + NOISE * rows.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)


def cheating_executor(store: WeightStore, first_unit: int, end_unit: int, **options: Any) -> ShardExecutor:
    """Takes the place of bsns.runtime.executor.open_stage."""
    return CheatingExecutor(open_stage(store, first_unit, end_unit, **options))


if __name__ == "__main__":
    defaults = NodeService.__init__.__kwdefaults__
    assert defaults is not None
    assert "executor_factory" in defaults
    defaults["executor_factory"] = cheating_executor
    cli.main()
