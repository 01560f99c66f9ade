"""What the parts of `benchmarks.compression` share: the configurations, and three stages that run several at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from bsns.protocol.manifest import ModelManifest
from bsns.runtime.activation_codec import TensorEncoding, decode, encode
from bsns.runtime.executor import ShardExecutor, StageSession

STAGES: Final = 3
NEAR: Final = 0.05  # of the work
# Where `make bench-compression` puts the packages that carry the texts and pictures; none of them is ever imported.
DATA: Final = Path(__file__).parents[1] / "build" / "benchmark-data"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A format of the weights (`open_stage`'s `arithmetic`) with one of the activations between stages."""

    name: str
    weights: str
    wire: TensorEncoding


REFERENCE: Final = Configuration("fp32", "float32", TensorEncoding.RAW_FLOAT32)
CONFIGURATIONS: Final = (
    REFERENCE,
    Configuration("16-bit weights", "bfloat16", TensorEncoding.RAW_FLOAT32),
    Configuration("16-bit wire", "float32", TensorEncoding.FLOAT16),
    Configuration("16-bit weights and wire", "bfloat16", TensorEncoding.FLOAT16),
    Configuration("8-bit weights", "int8", TensorEncoding.RAW_FLOAT32),
    Configuration("8-bit wire", "float32", TensorEncoding.BLOCKWISE_INT8),
    Configuration("8-bit weights and wire", "int8", TensorEncoding.BLOCKWISE_INT8),
)
PUBLISHED: Final = "LLM.int8() as published"


@dataclass
class WireCount:
    """What was sent in one encoding: bytes, and the bytes that float32 would have taken."""

    messages: int = 0
    bytes: int = 0
    float32_bytes: int = 0

    def add(self, other: "WireCount") -> None:
        self.messages += other.messages
        self.bytes += other.bytes
        self.float32_bytes += other.float32_bytes


@dataclass(frozen=True)
class Measured:
    """One task: by configuration a score for each item, in equal order.

    `kind` "accuracy": whether the item was answered rightly, 0 or 1. `kind` "perplexity": the mean loss of a document,
    in nats a token.
    """

    task: str
    model: str
    kind: str
    scores: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
    sent: Mapping[TensorEncoding, WireCount]
    note: str


@dataclass
class Scores:
    """The scores of one task while it runs."""

    by_configuration: dict[str, list[float]] = field(default_factory=dict)
    sent: dict[TensorEncoding, WireCount] = field(default_factory=dict)

    def add(self, configuration: str, score: float) -> None:
        self.by_configuration.setdefault(configuration, []).append(score)

    def count(self, pipelines: "Pipelines") -> None:
        """Adds what the pipelines have sent."""
        for wire, count in pipelines.sent.items():
            self.sent.setdefault(wire, WireCount()).add(count)

    def measured(self, task: str, model: str, kind: str, note: str) -> Measured:
        scores = {name: np.array(values, dtype=np.float64) for name, values in self.by_configuration.items()}
        return Measured(task, model, kind, scores, self.sent, note)


def data_file(name: str) -> Path:
    """The file `name` of a data package. FileNotFoundError says how to get it."""
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `make bench-compression` installs it")
    return path


def configurations_by_weights() -> dict[str, list[Configuration]]:
    groups: dict[str, list[Configuration]] = {}
    for item in CONFIGURATIONS:
        groups.setdefault(item.weights, []).append(item)
    return groups


def stage_ranges(manifest: ModelManifest) -> list[tuple[int, int]]:
    """The units [first, end) of each stage: cut near thirds of the work, where the row that crosses is narrowest."""
    work = np.array([unit.flops_per_token for unit in manifest.units])
    shares = work.cumsum() / work.sum()
    places = [0]
    for number in range(1, STAGES):
        distances = {place + 1: abs(share - number / STAGES) for place, share in enumerate(shares[:-1])}
        near = [place for place, gap in distances.items() if gap <= NEAR]
        places.append(min(near, key=lambda place: (manifest.row_width(place), distances[place])))
    return list(pairwise([*places, len(manifest.units)]))


class Pipelines:
    """Stages of one weight format, with a pipeline through them for each of several encodings of the activations.

    The first stage takes the same inputs in all of them and runs once. One request at a time: `open`, then steps.
    """

    def __init__(self, stages: Sequence[ShardExecutor], wires: Sequence[TensorEncoding]) -> None:
        self._stages = stages
        self.sent = {wire: WireCount() for wire in wires}
        self._first: StageSession
        self._later: dict[TensorEncoding, list[StageSession]]

    def open(self, max_rows: int) -> None:
        """Begins a request of at most `max_rows` rows and forgets the one before."""
        self._first = self._stages[0].new_session(max_rows)
        self._later = {wire: [stage.new_session(max_rows) for stage in self._stages[1:]] for wire in self.sent}

    def step(
        self, inputs: Tensor, *, position: int, logit_rows: Sequence[int] | None = None
    ) -> dict[TensorEncoding, Tensor]:
        """The last stage's outputs by encoding."""
        first = self._stages[0].forward(self._first, inputs, position=position)
        outputs = {}
        for wire, count in self.sent.items():
            values = first
            for stage, session in zip(self._stages[1:], self._later[wire], strict=True):
                data = encode(wire, values)
                count.add(WireCount(1, len(data), 4 * values.numel()))
                received = decode(wire, data, rows=values.shape[0], width=values.shape[1])
                values = stage.forward(session, received, position=position, logit_rows=logit_rows)
            outputs[wire] = values
        return outputs

    def truncate(self, position: int) -> None:
        """Forgets every row from `position` on."""
        for session in (self._first, *(item for sessions in self._later.values() for item in sessions)):
            session.truncate(position)
