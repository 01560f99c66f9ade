"""What the protocol does with a stage, as `node_client.reexecution` and the tally of OutputVerification.sol decide it.

A member sketches its own execution of the stage's inputs and checks that what was handed on can come from it: at the
last stage that the tokens are draws from its own logits, at the others that the rows are its own but for float noise
and the rounding of their encoding. Where that is false they attest a sketch that nothing sealed before the draw can be
near (`bsns.protocol.sketch.disowned`); where the executor lied about a hop, that there was no valid evidence. This
module takes distances, rows and draws apart from processes
and chain, so that tens of thousands of cases can be judged; that the real processes come to the same verdicts is what
tests/integration/test_node_ring.py and test_network.py show.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.verification_traces import Outputs
from bsns.protocol.commitments import sketch_seed
from bsns.protocol.identifiers import RequestId
from bsns.protocol.sampling import SamplingParameters, draw, is_consistent_draw
from bsns.protocol.sketch import SketchTolerance, StageSketch
from bsns.runtime import activation_codec
from bsns.runtime.activation_codec import TensorEncoding


class Outcome(enum.Enum):
    """What becomes of an executor whose stage was judged by honest committees."""

    INCORRECT = "beyond 2τ: slashed"
    NO_EVIDENCE = "hops are false: members attest no valid evidence, slashed as withheld"
    UNPAID = "between τ and 2τ: not paid"
    PAID = "within τ: paid"

    @property
    def is_slashed(self) -> bool:
        return self in (Outcome.INCORRECT, Outcome.NO_EVIDENCE)


def outcome(distance: int, tolerance: SketchTolerance, *, evidence_holds: bool = True) -> Outcome:
    """The verdict on a stage `distance` from the members' medoid; `evidence_holds`: what it shows of its hops."""
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


def first_refused(
    handed_on: Outputs, computed: Outputs, encoding: TensorEncoding, tolerance: SketchTolerance
) -> int | None:
    """The first step whose rows `handed_on` a member refuses that `computed` others; None where it takes all."""
    for step, (rows, own) in enumerate(zip(handed_on, computed, strict=True)):
        data = activation_codec.encode(encoding, torch.from_numpy(rows))
        if not activation_codec.can_be_handed_on(encoding, data, torch.from_numpy(own), tolerance.row_tolerance):
            return step
    return None


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
