"""The distribution sketch and the step fingerprint: short values that survive honest float noise and separate cheats.

Owns how a stage's output rows become 32 bytes (sketch) and each step's rows 8 bytes (fingerprint), and the two
distances, which are metrics and equal to what the contracts compute. Promises that the sketch does not depend on how
rows were grouped into steps (sums are integers) and that it is the same on every machine for equal rows. Does not
decide who is paid: the tolerance per execution class is in `TOLERANCES`, measured by `benchmarks/sketch_separation.py`;
the contracts apply it (field-notes §2.4).

A row is scaled to length one, then hashed by a seeded count sketch (Charikar, Chen, Farach-Colton 2002) to 32 signed
bucket sums; rows are rotated, signed and added, the sum divided by the square root of the number of rows. Each
coordinate then has a standard deviation near 1, is dithered, cut at `unit` and **wrapped** to a byte. Wrapping is the
point: a coordinate reveals only the position within 256 units, so all of the byte's resolution goes to small
differences, and a cheat many units away lands on a random byte.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

_Indices = npt.NDArray[np.int64]

BUCKETS: Final = 32
SKETCH_BYTES: Final = 32
FINGERPRINT_BYTES: Final = 8
MAXIMUM_DISTANCE: Final = SKETCH_BYTES * 128
_FINGERPRINT_COORDINATES: Final = 4
# A fingerprint has 16 bits a coordinate: it can afford to resolve honest noise, which keeps rounding out of the
# comparison.
_FINGERPRINT_RESOLUTION: Final = 8
# Bucket sums are added as integers of this many fractional bits: 2^40 leaves 2^23 rows before an int64 can overflow.
_FRACTION_BITS: Final = 40
_MAXIMUM_ROWS: Final = 1 << 22
# Eight a bucket: narrower rows are spread until they have as many.
_LEAST_PLACES: Final = 256
# Bounds the float64 working copy of one call: 32 rows of a 49,152-token vocabulary are 12 MB.
_BLOCK_ELEMENTS: Final = 1 << 20


class SketchError(ValueError):
    """Rows or bytes cannot be sketched or compared. The message names what was expected."""


@dataclass(frozen=True, slots=True)
class SketchTolerance:
    """What honest execution in one class may differ by.

    `unit` is the width of one step of a coordinate (standard deviations of the sketch). `honest_radius` r bounds the
    distance of any two honest sketches, `pay_within` τ = 2r pays, beyond `slash_beyond` = 2τ blame is certain
    (field-notes §2.4). `fingerprint_radius` is the same bound for a step's fingerprint, `logit_tolerance` for one logit
    of the stage with the head (absolute): what a token's draw is judged with.
    """

    unit: float
    honest_radius: int
    fingerprint_radius: int
    logit_tolerance: float = 1e-3

    @property
    def pay_within(self) -> int:
        """τ = 2r."""
        return 2 * self.honest_radius

    @property
    def row_tolerance(self) -> float:
        """What a row of one honest execution differs from another's by at the most, as a share of its length: 8 units,
        which is 7 times and more the largest that was measured.
        """
        return 8 * self.unit

    @property
    def slash_beyond(self) -> int:
        """2τ = 4r."""
        return 4 * self.honest_radius


# Measured by benchmarks/sketch_separation.py (on a GPU: benchmarks/cuda.py) on one machine, 3 stages (field-notes §2.4:
# r must be measured for each class). Distances are from token-by-token decoding by itself; r leaves room for processors
# that were not at hand. The prompts that chose units and radii also measured them.
TOLERANCES: Final[dict[str, SketchTolerance]] = {
    # 5 prompts. Largest honest distance: 9 for sketches, 10 for fingerprints, 6.4e-5 for a logit; smallest of a cheat:
    # 921 (one block with bfloat16 weights) and 233 (fp16 products; the next is 358).
    "torch-cpu/float32/sdpa": SketchTolerance(unit=1e-5, honest_radius=64, fingerprint_radius=48),
    # 3 prompts. Rounding to 8 bits of mantissa after each matrix turns any noise into noise of its own size: honest
    # rows differ by up to 2e-2, more than bfloat16 differs from float32. Largest honest distance 24, fingerprint 42,
    # logit 0.5. Weights in 4 bits and a block left out lie at 141 and more, which is beyond τ and not beyond 2τ; all
    # that is finer lies within r or near it (int8: 15 to 62) and goes unseen. A smaller unit would put honest
    # executions of stages of more than ten blocks at risk.
    "torch-cpu/bfloat16/sdpa": SketchTolerance(unit=2e-2, honest_radius=64, fingerprint_radius=96, logit_tolerance=1.0),
    # 3 prompts. Products are exact, so what is left is the noise of attention, norms and activations, and a batch
    # leaves a decoding step's bits alone. Largest honest distance 10, fingerprint 14, logit 1.4e-4; smallest of a
    # cheat 1338 and 259.
    "torch-cpu/int8/sdpa": SketchTolerance(unit=2e-5, honest_radius=64, fingerprint_radius=32),
    # On one GPU (H200, torch 2.11), 5 and 3 prompts, by benchmarks/cuda.py: one pass, pieces, batches of 1 to 201
    # sessions, recorded or not, with our attention and torch's two. The noise is that of the CPU, so the values are: in
    # float32 at most 10 and 13 and 6.5e-5 of a logit (smallest of a cheat: 811, TF32 products, and 301, fp16 products);
    # in bfloat16 25, 36 and 0.5. Another generation of GPUs chooses other kernels and was not measured.
    "torch-cuda/float32/sdpa": SketchTolerance(unit=1e-5, honest_radius=64, fingerprint_radius=48),
    "torch-cuda/bfloat16/sdpa": SketchTolerance(
        unit=2e-2, honest_radius=64, fingerprint_radius=96, logit_tolerance=1.0
    ),
    # Captured models, which hand on one row: EfficientNet-Lite0 on 8 pictures, single units to the whole model. Largest
    # honest distance (threads, oneDNN on and off, SSE instead of AVX): 18 and 21; smallest of a cheat with bfloat16 or
    # 8-bit weights, or bfloat16 arithmetic: 1402 and 612. One row averages nothing: a unit as wide as that of decoders
    # would put weights that are off by a thousandth within 7 r.
    "torch-cpu/float32/aten": SketchTolerance(unit=2e-6, honest_radius=64, fingerprint_radius=32),
}


class StageSketch:
    """Accumulates one stage's output rows of one request.

    `seed` is 32 bytes (hash of request id and stage), `width` the row length, `unit` the step of a coordinate. For a
    stage that holds the head, add logits: `centred` takes each row's mean away first, since logits are
    log-probabilities up to a constant.
    """

    def __init__(self, seed: bytes, width: int, unit: float, *, centred: bool = False) -> None:
        if len(seed) != 32:
            raise SketchError(f"seed has {len(seed)} bytes, expected 32")
        if width < 1 or not (math.isfinite(unit) and unit > 0):
            raise SketchError(f"width is {width} and unit is {unit}; both must be positive")
        self._seed, self._width, self._unit, self._centred = seed, width, unit, centred
        self._dither = self._fractions(b"dither", 0, BUCKETS)
        self._sums = np.zeros(BUCKETS, dtype=np.int64)
        self._rows = 0
        self._steps = 0

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return self._rows

    def add(self, rows: npt.NDArray[np.float32]) -> bytes:
        """Adds one step's rows, float32 [n, width], n ≥ 1, and returns the step's fingerprint, 8 bytes.

        Raises `SketchError` for a wrong shape or values that are not finite; nothing was added then.
        """
        if rows.ndim != 2 or rows.shape[1] != self._width or rows.shape[0] < 1:
            raise SketchError(f"rows have shape {rows.shape}, expected [n, {self._width}] with n ≥ 1")
        if self._rows + rows.shape[0] > _MAXIMUM_ROWS:
            raise SketchError(f"more than {_MAXIMUM_ROWS} rows in one sketch; end the session")
        step = np.zeros(BUCKETS, dtype=np.int64)
        block = max(1, _BLOCK_ELEMENTS // self._width)
        for first in range(0, rows.shape[0], block):
            step += self._bucket_sums(rows[first : first + block], self._rows + first)
        fingerprint = self._fingerprint(step, rows.shape[0])
        self._sums += step
        self._rows += rows.shape[0]
        self._steps += 1
        return fingerprint

    def value(self) -> bytes:
        """The sketch of all rows added so far, 32 bytes. Raises `SketchError` where there are none."""
        if self._rows == 0:
            raise SketchError("no rows were added; a stage without output has no sketch")
        scale = math.sqrt(BUCKETS / self._rows) / float(1 << _FRACTION_BITS) / self._unit
        wrapped: bytes = np.mod(np.floor(self._sums * scale + self._dither), 256).astype(np.uint8).tobytes()
        return wrapped

    @cached_property
    def _channels(self) -> tuple[_Indices, npt.NDArray[np.float64], _Indices, _Indices]:
        """The channels in the order of their buckets, their signs, the buckets that hold any, and where each of those
        begins.

        Drawn when the first rows come: that takes 20 ms for 400,000 channels, and sessions open on an event loop.
        """
        # Channels of a narrow row lie in several buckets each: a head of ten classes would fill a few coordinates only,
        # and whatever differs would be far from it by chance alone.
        copies = max(1, -(-_LEAST_PLACES // self._width))
        places = copies * self._width
        drawn = np.frombuffer(self._random_bytes(b"channels", 0, places), dtype=np.uint8)
        bucket = drawn & 31
        order = np.argsort(bucket, kind="stable")
        sign = np.where(drawn[order] & 128, -1.0, 1.0) / math.sqrt(copies)
        starts = np.searchsorted(bucket[order], np.arange(BUCKETS))
        # np.add.reduceat gives a wrong sum for an empty bucket (narrow rows), so only buckets that hold a channel take
        # part.
        filled = np.flatnonzero(np.diff(np.append(starts, places)) > 0)
        return order % self._width, sign, filled, starts[filled]

    def _bucket_sums(self, rows: npt.NDArray[np.float32], first_row: int) -> npt.NDArray[np.int64]:
        values = rows.astype(np.float64)
        if self._centred:
            values -= values.mean(axis=1, keepdims=True)
        length = np.sqrt(np.square(values).sum(axis=1))
        if not np.isfinite(length).all():
            raise SketchError("rows hold NaN or infinity; the stage that made them is faulty, replay it elsewhere")
        values /= np.where(length > 0, length, 1.0)[:, None]
        order, sign, filled, starts = self._channels
        sums = np.zeros((rows.shape[0], BUCKETS))
        sums[:, filled] = np.add.reduceat(values[:, order] * sign, starts, axis=1)
        fixed = np.rint(sums * float(1 << _FRACTION_BITS)).astype(np.int64)
        total = np.zeros(BUCKETS, dtype=np.int64)
        for number in range(rows.shape[0]):
            # A channel that is large in every row would otherwise fill one coordinate with T times the same number.
            noise = self._random_bytes(b"row", first_row + number, 5)
            signs = np.unpackbits(np.frombuffer(noise[:4], dtype=np.uint8)).astype(np.int64) * 2 - 1
            total += signs * np.roll(fixed[number], noise[4] & 31)
        return total

    def _fingerprint(self, step: npt.NDArray[np.int64], rows: int) -> bytes:
        sums = step.reshape(_FINGERPRINT_COORDINATES, -1).sum(axis=1)
        step_width = self._unit / _FINGERPRINT_RESOLUTION
        scale = math.sqrt(_FINGERPRINT_COORDINATES / rows) / float(1 << _FRACTION_BITS) / step_width
        dither = self._fractions(b"fingerprint", self._steps, _FINGERPRINT_COORDINATES)
        wrapped: bytes = np.mod(np.floor(sums * scale + dither), 65536).astype(">u2").tobytes()
        return wrapped

    def _random_bytes(self, purpose: bytes, number: int, length: int) -> bytes:
        return hashlib.shake_256(self._seed + purpose + b":" + number.to_bytes(8, "big")).digest(length)

    def _fractions(self, purpose: bytes, number: int, count: int) -> npt.NDArray[np.float64]:
        raw = np.frombuffer(self._random_bytes(purpose, number, 4 * count), dtype=">u4")
        return raw.astype(np.float64) / 2.0**32


def distance(a: bytes, b: bytes) -> int:
    """Circular L1 distance of two sketches: Σ min(|aᵢ−bᵢ|, 256−|aᵢ−bᵢ|), 0 to 4096. A metric; the contracts compute the
    same.
    """
    return _circular(_integers(a, SKETCH_BYTES, ">u1"), _integers(b, SKETCH_BYTES, ">u1"), 256)


def member_distance(a: tuple[bytes, bytes], b: tuple[bytes, bytes]) -> int:
    """The larger distance of two members' attestations, each (sketch of the outputs, sketch of the rows inside)."""
    return max(distance(a[0], b[0]), distance(a[1], b[1]))


def disowned(sketch: bytes, seed: bytes, entropy: bytes) -> bytes:
    """What a member attests whose own `sketch` says nothing for the stage, because the stage handed on other rows than
    it computed or tokens that are no draws: the sketch moved by 32 bytes that follow from the stage's `seed` and from
    `entropy`, the hash of a block after all commitments.

    Whatever the stage had sealed is as far from it as a guess. Members who find the same stay as near to one another.
    """
    shift = hashlib.shake_256(b"disowned:" + seed + entropy).digest(SKETCH_BYTES)
    return bytes((value + moved) % 256 for value, moved in zip(sketch, shift, strict=True))


def fingerprint_distance(a: bytes, b: bytes) -> int:
    """Circular L1 distance of two fingerprints over four big-endian uint16, 0 to 131072. A metric."""
    return _circular(_integers(a, FINGERPRINT_BYTES, ">u2"), _integers(b, FINGERPRINT_BYTES, ">u2"), 65536)


def _integers(value: bytes, length: int, dtype: str) -> npt.NDArray[np.int64]:
    if len(value) != length:
        raise SketchError(f"value has {len(value)} bytes, expected {length}")
    return np.frombuffer(value, dtype=dtype).astype(np.int64)


def _circular(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], modulus: int) -> int:
    gap = np.abs(a - b)
    return int(np.minimum(gap, modulus - gap).sum())
