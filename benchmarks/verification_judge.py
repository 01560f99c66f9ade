"""What the protocol does with a stage, as `node_client.reexecution` and the tally of OutputVerification.sol decide it.

A member sketches its own execution of the stage's inputs and, at the last stage, checks that the tokens are draws from
its own logits. Members that find the draws false, or a hop that the executor lied about, attest that there was no valid
evidence. This module takes distances and draws apart from processes and chain, so that tens of thousands of cases can
be judged; that the real processes come to the same verdicts is what tests/integration/test_node_ring.py and
test_network.py show.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.verification_traces import Outputs
from bsns.protocol.commitments import sketch_seed
from bsns.protocol.identifiers import RequestId
from bsns.protocol.sampling import SamplingParameters, draw, is_consistent_draw
from bsns.protocol.sketch import SketchTolerance, StageSketch


class Outcome(enum.Enum):
    """What becomes of an executor whose stage was judged by honest committees."""

    INCORRECT = "beyond 2τ: slashed"
    NO_EVIDENCE = "draws or hops are false: members attest no valid evidence, slashed as withheld"
    UNPAID = "between τ and 2τ: not paid"
    PAID = "within τ: paid"

    @property
    def is_slashed(self) -> bool:
        return self in (Outcome.INCORRECT, Outcome.NO_EVIDENCE)


def outcome(distance: int, tolerance: SketchTolerance, *, evidence_holds: bool = True) -> Outcome:
    """The verdict on a stage `distance` from the members' medoid; `evidence_holds`: draws and hops."""
    if not evidence_holds:
        return Outcome.NO_EVIDENCE
    if distance > tolerance.slash_beyond:
        return Outcome.INCORRECT
    return Outcome.UNPAID if distance > tolerance.pay_within else Outcome.PAID


def request_seed(stage: int, *names: object) -> bytes:
    """The sketch seed of `stage` in a made-up request, which `names` tell apart."""
    return sketch_seed(RequestId(random.Random("/".join(map(str, names))).randbytes(32)), stage)


def sketches_at(
    outputs: Outputs, seed: bytes, unit: float, lengths: Collection[int], *, centred: bool
) -> dict[int, bytes]:
    """The sketch of an answer that ended after each of `lengths` tokens."""
    sketch = StageSketch(seed, outputs[0].shape[1], unit, centred=centred)
    values = {}
    for number, rows in enumerate(outputs, 1):
        sketch.add(rows)
        if number in lengths:
            values[number] = sketch.value()
    return values


@dataclass(frozen=True)
class Departure:
    """The first step whose token is not the honest draw, and the first whose token no honest draw can give; None where
    there is none.
    """

    differs: int | None = None
    is_false: int | None = None


def first_departure(
    logits: Sequence[npt.NDArray[np.float32]],
    parameters: SamplingParameters,
    sent: Callable[[int], int],
    tolerance: float,
) -> Departure:
    """Where the tokens `sent(step)` of an answer leave the draws from `logits`, as far as a member can tell."""
    differs = None
    for step, row in enumerate(logits):
        token = sent(step)
        if token == draw(row, parameters, step):
            continue
        differs = step if differs is None else differs
        if not is_consistent_draw(row, parameters, step, token, tolerance):
            return Departure(differs, step)
    return Departure(differs)
