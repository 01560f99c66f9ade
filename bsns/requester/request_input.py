"""The input of a request: the exact bytes of step 0, as nodes receive them and as the input commitment covers them.

Owns the type `RequestInput`: token ids for a model that takes tokens, else one row of float32 values. Promises that
equal inputs have equal bytes and that values are finite. Does not know the model: whether it takes such an input is for
`bsns.requester.client` to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from bsns.protocol.commitments import content_digest, token_bytes

InputEncoding = Literal["token-ids", "float32"]
_VALUE_BYTES: Final = 4
# An uncompressed picture of 4096 by 4096 pixels with three channels takes this much.
MAXIMUM_INPUT_BYTES: Final = 192 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RequestInput:
    """Make it with `of_tokens` or `of_row`. `data` is int32 token ids, or float32 values, little-endian. ValueError for
    bytes that are neither.
    """

    encoding: InputEncoding
    data: bytes

    def __post_init__(self) -> None:
        if self.encoding not in ("token-ids", "float32"):
            raise ValueError(f"input encoding is {self.encoding!r}, expected 'token-ids' or 'float32'")
        if not 1 <= len(self.data) <= MAXIMUM_INPUT_BYTES or len(self.data) % _VALUE_BYTES:
            raise ValueError(
                f"an input of {len(self.data)} bytes; expected values of four bytes, up to {MAXIMUM_INPUT_BYTES} bytes"
            )
        if self.encoding == "float32" and not np.isfinite(np.frombuffer(self.data, "<f4")).all():
            raise ValueError("the input row holds NaN or infinity")

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int]) -> RequestInput:
        """A prompt of token ids; OverflowError for one that is not in 0 to 2**32-1."""
        return cls("token-ids", token_bytes(token_ids))

    @classmethod
    def of_row(cls, row: npt.NDArray[np.float32]) -> RequestInput:
        """One row, float32 [1, width]; ValueError for another shape or type."""
        if row.dtype != np.float32 or row.ndim != 2 or row.shape[0] != 1:
            raise ValueError(f"an input row is float32 [1, width], got {row.dtype} {list(row.shape)}")
        return cls("float32", row.astype("<f4", copy=False).tobytes())

    @property
    def rows(self) -> int:
        """Rows of step 0, which is what is paid for: one for each token id, one for a row of values."""
        return len(self.data) // _VALUE_BYTES if self.encoding == "token-ids" else 1

    @property
    def width(self) -> int:
        """Values in one row."""
        return len(self.data) // _VALUE_BYTES // self.rows

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids; empty for a row of values."""
        return tuple(np.frombuffer(self.data, "<u4").tolist()) if self.encoding == "token-ids" else ()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: the `promptDigest` of the input commitment."""
        return content_digest(self.data)
