"""A neural network as planners see it: operators, the tensors between them, and the parameters they need.

Owns the one graph type that every capture produces and every planner takes (paper §1.4: V, E, work, sizeparam,
sizeout). Promises that a graph which constructs is a non-empty DAG given in a topological order, with costs that are
non-negative integers. Does not know torch, machines or plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bsns.protocol.identifiers import ProtocolError

if TYPE_CHECKING:
    from bsns.protocol.manifest import ModelManifest

MODEL_INPUT: Final = -1
"""Producer of a tensor that the requester sends."""
_MAXIMUM_COST: Final = 2**62


class GraphError(ProtocolError):
    """A graph is no DAG of operators with costs. The message names the operator or tensor and the rule it breaks."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of the graph.

    `timing_key`: operators with one key take equally long on one machine; nodes report measured times by it. `work`:
    floating-point operations for one row (paper: work(v)). `parameters`: indices into `ModelGraph.parameters`; one that
    several operators name is held once by each stage that needs it. `peak_bytes`: most bytes of activations one row
    takes while the operator runs, its inputs and outputs included. `cache_bytes`: what it keeps for each token of a
    session (KV cache). `nanoseconds`: measured where it was captured, 0 if it was not.
    """

    name: str
    timing_key: str
    work: int
    parameters: tuple[int, ...] = ()
    peak_bytes: int = 0
    cache_bytes: int = 0
    nanoseconds: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """What flows: made by operator `producer` (or MODEL_INPUT), read by `consumers` in ascending order; `size_bytes`
    for one row. The model's output has `is_output`, whether or not an operator reads it too.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    size_bytes: int
    is_output: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight by name, and its bytes."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class ModelGraph:
    """Operators in one topological order, numbered by their place in it."""

    name: str
    operators: tuple[Operator, ...]
    tensors: tuple[Tensor, ...]
    parameters: tuple[Parameter, ...] = ()

    def __post_init__(self) -> None:
        if not self.operators:
            raise GraphError(f"graph {self.name!r} has no operators")
        count = len(self.operators)
        for parameter in self.parameters:
            _require_cost(parameter.size_bytes, f"parameter {parameter.name!r}: size_bytes")
        for number, operator in enumerate(self.operators):
            where = f"operator {number} ({operator.name})"
            for field in ("work", "peak_bytes", "cache_bytes", "nanoseconds"):
                _require_cost(getattr(operator, field), f"{where}: {field}")
            for index in operator.parameters:
                if not 0 <= index < len(self.parameters):
                    raise GraphError(f"{where}: parameter {index} is not one of {len(self.parameters)}")
        for tensor in self.tensors:
            where = f"tensor {tensor.name!r}"
            _require_cost(tensor.size_bytes, f"{where}: size_bytes")
            if not MODEL_INPUT <= tensor.producer < count:
                raise GraphError(f"{where}: producer {tensor.producer} is not one of {count} operators")
            if list(tensor.consumers) != sorted(set(tensor.consumers)):
                raise GraphError(f"{where}: consumers are not in ascending order, each once")
            for consumer in tensor.consumers:
                if not 0 <= consumer < count:
                    raise GraphError(f"{where}: consumer {consumer} is not one of {count} operators")
                if consumer <= tensor.producer:
                    raise GraphError(
                        f"{where}: operator {consumer} ({self.operators[consumer].name}) reads it before operator "
                        f"{tensor.producer} ({self.operators[tensor.producer].name}) makes it: the graph is cyclic, or "
                        "its operators are not in a topological order"
                    )

    def predecessors(self) -> tuple[frozenset[int], ...]:
        """For each operator those whose tensors it reads."""
        found: list[set[int]] = [set() for _ in self.operators]
        for tensor in self.tensors:
            if tensor.producer != MODEL_INPUT:
                for consumer in tensor.consumers:
                    found[consumer].add(tensor.producer)
        return tuple(frozenset(item) for item in found)

    @classmethod
    def of_manifest(cls, manifest: ModelManifest) -> ModelGraph:
        """The chain of a manifest's units. What crosses a cut is one tensor: later stages get from the one before them
        all they need, so a skip connection over several cuts is in each of them.
        """
        units = manifest.units
        return cls(
            name=manifest.name,
            operators=tuple(
                Operator(
                    name=unit.name,
                    timing_key=unit.timing_key,
                    work=unit.flops_per_token,
                    parameters=(unit.index,),
                    peak_bytes=unit.peak_bytes,
                    cache_bytes=manifest.kv_bytes_per_token_per_block if unit.kind == "block" else 0,
                )
                for unit in units
            ),
            tensors=tuple(
                Tensor(
                    name=f"cut-{number}",
                    producer=number - 1,
                    consumers=(number,) if number < len(units) else (),
                    size_bytes=4 * manifest.row_width(number),
                    is_output=number == len(units),
                )
                for number in range(len(units) + 1)
            ),
            parameters=tuple(Parameter(unit.name, unit.size_bytes) for unit in units),
        )


def _require_cost(value: object, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAXIMUM_COST:
        raise GraphError(f"{where} is {value!r}, expected an integer from 0 to 2**62-1")
