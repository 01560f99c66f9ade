"""Ideals: the sets of operators that may lie before a cut, and what stages between two of them cost.

A set that holds with every operator all it depends on is an ideal (a down-set). A partition with an acyclic quotient
graph is a chain of ideals, empty set to whole graph, whose differences are the stages. Owns the array form of a graph,
the enumeration of ideals and the cost matrices between two families of them, on which the refinement of
`bsns.planning.genetic` and the exact search of `bsns.planning.bounds` stand. Knows bytes and work, not nodes and links.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from bsns.planning.problem import Transfers
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph

Bits = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FORBIDDEN: Final = 2.0**43
"""More than any sum of bytes that is compared; what lies above it in a matrix is no pair of nested ideals. Sums stay
below 2**53, so that floating-point matrix products of integers are exact."""


@dataclass(frozen=True)
class GraphArrays:
    """A graph as arrays: only tensors that one operator makes and another reads, as only they cross links."""

    count: int
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    producers: Integers
    consumers: tuple[tuple[int, ...], ...]
    sizes: Integers
    relayed: bool

    @classmethod
    def of(cls, graph: ModelGraph, transfers: Transfers) -> GraphArrays:
        """The arrays of `graph`."""
        predecessors = tuple(tuple(sorted(found)) for found in graph.predecessors())
        successors: list[list[int]] = [[] for _ in predecessors]
        for operator, found in enumerate(predecessors):
            for predecessor in found:
                successors[predecessor].append(operator)
        tensors = [
            item for item in graph.tensors if item.producer != MODEL_INPUT and item.consumers and item.size_bytes
        ]
        return cls(
            len(graph.operators),
            predecessors,
            tuple(map(tuple, successors)),
            np.array([item.producer for item in tensors], np.int64),
            tuple(item.consumers for item in tensors),
            np.array([item.size_bytes for item in tensors], np.int64),
            transfers is Transfers.RELAYED,
        )

    @cached_property
    def reads(self) -> npt.NDArray[np.float32]:
        """[operator, tensor] is 1 where the operator reads the tensor."""
        found = np.zeros((self.count, len(self.sizes)), np.float32)
        for number, readers in enumerate(self.consumers):
            found[list(readers), number] = 1
        return found

    @cached_property
    def touches(self) -> Bits:
        """[operator, tensor]: the operator makes or reads the tensor."""
        found = self.reads > 0
        found[self.producers, np.arange(len(self.sizes))] = True
        return found

    @cached_property
    def ancestors(self) -> Bits:
        """[v, u]: operator v is u or depends on it."""
        found = np.eye(self.count, dtype=np.bool_)
        for operator, before in enumerate(self.predecessors):
            for predecessor in before:
                found[operator] |= found[predecessor]
        return found

    def ideals_between(self, forced: Bits, free: npt.NDArray[np.intp], limit: int) -> Bits | None:
        """All ideals that hold `forced` and some of `free`, as rows; None if the search holds more than `limit`."""
        found = forced[None, :].copy()
        for operator in free:
            may = found[:, list(self.predecessors[operator])].all(1)
            more = found[may]
            more[:, operator] = True
            found = np.concatenate([found, more])
            if len(found) > limit:
                return None
        return found

    def transfers(self, before: Bits, after: Bits) -> tuple[Floats, Floats]:
        """Bytes in and bytes out of the stage `after[j]` minus `before[i]`, at [i, j]; bytes in are at least FORBIDDEN
        where `before[i]` is no subset of `after[j]`. Both families are rows of n booleans, at least one each.

        Counts of consumers make "a consumer lies in the stage" a comparison of two numbers, one for each family, and
        the sum over tensors a matrix product. Only tensors that touch what varies within a family enter the product.
        """
        y, x = before, after
        varying = (y.any(0) & ~y.all(0)) | (x.any(0) & ~x.all(0))
        active = self.touches[varying].any(0)
        fixed = ~active
        outside = np.flatnonzero(y.any(0) & ~x.all(0))
        y_read, x_read = y.astype(np.float32) @ self.reads[:, active], x.astype(np.float32) @ self.reads[:, active]
        y_made, x_made = y[:, self.producers[active]], x[:, self.producers[active]]
        readers, sizes = self.reads[:, active].sum(0), self.sizes[active].astype(np.float64)
        still = self.sizes[fixed].astype(np.float64)
        still_readers = self.reads[:, fixed].sum(0)
        y_still_made, x_still_made = y[0, self.producers[fixed]], x[0, self.producers[fixed]]
        y_still = y[0].astype(np.float32) @ self.reads[:, fixed]
        x_still = x[0].astype(np.float32) @ self.reads[:, fixed]
        beyond = y[:, outside].astype(np.float32) @ (~x[:, outside]).T.astype(np.float32)
        not_nested = np.where(beyond > 0, FORBIDDEN, 0.0)
        x_cut = (x_made & (x_read < readers)) @ sizes + float(still @ (x_still_made & (x_still < still_readers)))
        if self.relayed:
            y_cut = (y_made & (y_read < readers)) @ sizes + float(still @ (y_still_made & (y_still < still_readers)))
            return not_nested + y_cut[:, None], np.broadcast_to(x_cut[None, :], not_nested.shape)
        left, right = [], []
        for reader in range(int(readers.max(initial=0))):
            first, later = y_made & (y_read == reader), x_read > reader
            used = np.flatnonzero(first.any(0) & later.any(0) & (readers > reader))
            left.append(first[:, used] * sizes[used])
            right.append(later[:, used])
        received = not_nested + float(still @ (y_still_made & (x_still > y_still)))
        if left:
            received += np.concatenate(left, 1) @ np.concatenate(right, 1).T.astype(np.float64)
        passing = (y_made * sizes) @ (x_read < readers).T.astype(np.float64)
        passing += float(still @ (y_still_made & (x_still < still_readers)))
        return received, x_cut[None, :] - passing

    def stage_order(self, chain: Bits) -> list[int]:
        """Operators in the order of the stages of `chain`, within a stage in that of the graph."""
        stage = (~chain).sum(0)
        return [int(operator) for operator in np.argsort(stage, kind="stable")]
