"""Commitments, evidence and the committee draw: everything that OutputVerification.sol recomputes.

Owns the digests of a request's input, of each hand-over, of a stage's evidence tree and sealed sketch, and the rules
of the draw. All functions are pure and equal the Solidity ones bit for bit; tests compare them on a live chain. Does
not compute sketches (bsns.protocol.sketch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from eth_abi.abi import encode

from bsns.protocol.identifiers import ZERO_HASH, ProtocolError, RequestId, abi_hash, keccak256, require_bytes32
from bsns.protocol.merkle import MerkleTree, leaf_hash

INPUT_TYPEHASH = keccak256(b"BsnsInput(bytes32 promptDigest,uint32 promptTokens,bytes32 samplingDigest,bytes32 salt)")
STAGE_COMMITMENT_TYPEHASH = keccak256(
    b"StageCommitment(bytes32 requestId,uint8 round,uint16 stage,address node,"
    b"bytes32 evidenceRoot,bytes32 sealedSketch,uint32 outputTokens)"
)
MAXIMUM_SHOWN_PROMPT = 16_384
"""Tokens of the longest prompt that is shown to the last stage, which keeps it and an index of it in memory."""
FINGERPRINT_LENGTH = 8
TOKEN_BYTES = 4
BASIS_POINTS = 10_000
MAXIMUM_ROUNDS = 3
MAXIMUM_DRAFTS = 16
"""Tokens that the last stage may draft to follow a token it drew; a step behind the prompt has one row more at most."""
SPARE_DRAFTS = 32
"""Of an answer at most as many drafts may be rejected as it has tokens, and these besides: a last stage that drafts
badly cannot make the others compute for long.
"""
_UINT256_MAX = 2**256 - 1
_EVIDENCE_STEP_ABI = "(uint32,uint32,uint32,bytes32,bytes32,bytes32,bytes32,bytes8)"


def content_digest(data: bytes | memoryview) -> bytes:
    """SHA-256 of the exact bytes handed over (hardware-accelerated, and a precompile of the EVM)."""
    return hashlib.sha256(data).digest()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as they travel and are hashed: int32 little-endian."""
    return b"".join(token.to_bytes(4, "little") for token in token_ids)


def token_ids(data: bytes) -> tuple[int, ...]:
    """The inverse of `token_bytes`; ProtocolError for bytes that are no whole number of tokens."""
    if len(data) % TOKEN_BYTES:
        raise ProtocolError(f"{len(data)} bytes are no token ids of {TOKEN_BYTES} bytes each")
    return tuple(int.from_bytes(data[at : at + TOKEN_BYTES], "little") for at in range(0, len(data), TOKEN_BYTES))


def step_digest(data: bytes | memoryview, position: int, rows: int) -> bytes:
    """What both ends of a hop sign for: SHA-256 of the bytes of a step, behind the prompt followed by its position and
    number of rows (uint32 little-endian).

    The position says how many rows of the step before are kept. Were it not signed for, a stage could compute at other
    positions than it was told, and nobody could say who lied.
    """
    digest = hashlib.sha256(data)
    if position:
        digest.update(position.to_bytes(4, "little") + rows.to_bytes(4, "little"))
    return digest.digest()


def input_commitment(prompt_digest: bytes, prompt_tokens: int, sampling_digest: bytes, salt: bytes) -> bytes:
    """What a request fixes on chain about its input; `salt` (32 bytes) hides short prompts."""
    return abi_hash(
        ["bytes32", "bytes32", "uint32", "bytes32", "bytes32"],
        [INPUT_TYPEHASH, prompt_digest, prompt_tokens, sampling_digest, require_bytes32(salt, "salt")],
    )


def secret_hash(secret: bytes) -> bytes:
    """keccak256(abi.encode(secret)): the requester's half of the draw's entropy, fixed when the request is opened."""
    return abi_hash(["bytes32"], [require_bytes32(secret, "secret")])


def extend_chain(chain: bytes, digest: bytes) -> bytes:
    """Cumulative hand-over digest: chain(t) = keccak256(abi.encode(chain(t-1), digest(t))), chain(-1) = 0."""
    return keccak256(chain + digest)


def sketch_seed(request: RequestId, stage: int) -> bytes:
    """Seed of a stage's distribution sketch: keccak256(abi.encode(requestId, stage))."""
    return abi_hash(["bytes32", "uint16"], [request, stage])


def inner_sketch_seed(request: RequestId, stage: int, entropy: bytes) -> bytes:
    """Seed of the sketch that members make of the rows inside a stage: keccak256(abi.encode(requestId, stage,
    entropy)), where `entropy` is the hash of the block that drew the committee: nobody knows it while the stage serves.
    """
    return abi_hash(["bytes32", "uint16", "bytes32"], [request, stage, require_bytes32(entropy, "entropy")])


@dataclass(frozen=True, slots=True)
class EvidenceStep:
    """One leaf of a stage's evidence (IOutputVerification.EvidenceStep)."""

    step: int
    position: int
    rows: int
    input_digest: bytes
    output_digest: bytes
    input_chain: bytes
    output_chain: bytes
    fingerprint: bytes

    def as_tuple(self) -> tuple[int, int, int, bytes, bytes, bytes, bytes, bytes]:
        """Field values in the order of the Solidity struct."""
        return (
            self.step,
            self.position,
            self.rows,
            self.input_digest,
            self.output_digest,
            self.input_chain,
            self.output_chain,
            self.fingerprint,
        )

    @property
    def leaf(self) -> bytes:
        return leaf_hash(encode([_EVIDENCE_STEP_ABI], [self.as_tuple()]))


@dataclass(frozen=True)
class StageEvidence:
    """All steps of one stage of one request. Promises that steps are numbered from 0, that the first is at position 0,
    that each later one keeps at least one row of the step before it and leaves no gap, and that both chains are right.
    """

    steps: tuple[EvidenceStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ProtocolError("evidence needs at least one step")
        least, most, inputs, outputs = 0, 0, ZERO_HASH, ZERO_HASH
        for number, step in enumerate(self.steps):
            if step.step != number:
                raise ProtocolError(f"evidence step {number} is numbered {step.step}")
            if step.rows <= 0 or not least <= step.position <= most:
                raise ProtocolError(f"evidence step {number} has position {step.position}, expected {least} to {most}")
            if len(step.fingerprint) != FINGERPRINT_LENGTH:
                raise ProtocolError(f"evidence step {number}: a fingerprint has {FINGERPRINT_LENGTH} bytes")
            inputs, outputs = extend_chain(inputs, step.input_digest), extend_chain(outputs, step.output_digest)
            if (step.input_chain, step.output_chain) != (inputs, outputs):
                raise ProtocolError(f"evidence step {number}: its chain does not follow from the digests before it")
            least, most = step.position + 1, step.position + step.rows

    @cached_property
    def tree(self) -> MerkleTree:
        return MerkleTree([step.leaf for step in self.steps])

    @property
    def root(self) -> bytes:
        return self.tree.root


class EvidenceBuilder:
    """Collects the steps of one stage as they happen; `finish` gives the evidence."""

    def __init__(self) -> None:
        self._steps: list[EvidenceStep] = []

    @property
    def step_count(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> tuple[EvidenceStep, ...]:
        return tuple(self._steps)

    def add(
        self, rows: int, input_digest: bytes, output_digest: bytes, fingerprint: bytes, *, position: int | None = None
    ) -> EvidenceStep:
        """Append the next step, by default behind all rows of the last; returns the leaf with its chains filled in."""
        last = self._steps[-1] if self._steps else None
        if position is None:
            position = last.position + last.rows if last else 0
        step = EvidenceStep(
            step=len(self._steps),
            position=position,
            rows=rows,
            input_digest=input_digest,
            output_digest=output_digest,
            input_chain=extend_chain(last.input_chain if last else ZERO_HASH, input_digest),
            output_chain=extend_chain(last.output_chain if last else ZERO_HASH, output_digest),
            fingerprint=fingerprint,
        )
        self._steps.append(step)
        return step

    def finish(self) -> StageEvidence:
        """The evidence of all steps so far; ProtocolError if there is none."""
        return StageEvidence(tuple(self._steps))


def kept_rows(evidence: StageEvidence, prompt_tokens: int, output_tokens: int, maximum_tokens: int) -> tuple[int, ...]:
    """How many rows of each step the answer keeps: all of the prompt, and of a later step one for each token that was
    drawn from it.

    ProtocolError unless the steps are those of an answer of `output_tokens` tokens, of at most `maximum_tokens`: the
    prompt, then steps of one token and its drafts, no row behind the last position that such an answer has.
    """
    steps = evidence.steps
    if not len(steps) <= output_tokens <= maximum_tokens:
        raise ProtocolError(f"{len(steps)} steps for {output_tokens} answer tokens, of which {maximum_tokens} are paid")
    if steps[0].rows != prompt_tokens:
        raise ProtocolError(f"step 0 has {steps[0].rows} rows, the prompt {prompt_tokens}")
    ends = [step.position for step in steps[1:]] + [prompt_tokens + output_tokens - 1]
    kept = tuple(end - step.position for step, end in zip(steps, ends, strict=True))
    rejected = sum(step.rows for step in steps) - sum(kept)
    if rejected > output_tokens + SPARE_DRAFTS:
        raise ProtocolError(f"{rejected} drafts were rejected for {output_tokens} answer tokens")
    for step, count in zip(steps, kept, strict=True):
        if not 1 <= count <= step.rows or (step.step == 0 and count != prompt_tokens):
            raise ProtocolError(f"{count} of the {step.rows} rows of step {step.step} are kept")
        if step.step and step.rows > 1 + MAXIMUM_DRAFTS:
            raise ProtocolError(f"step {step.step} has {step.rows} rows, at most {1 + MAXIMUM_DRAFTS} are allowed")
        if step.position + step.rows > prompt_tokens + maximum_tokens - 1:
            raise ProtocolError(f"step {step.step} has rows behind the {maximum_tokens} tokens that are paid")
    return kept


def sealed_sketch(sketch: bytes, salt: bytes) -> bytes:
    """keccak256(abi.encode(sketch, salt)): lets a node show its evidence root to the committee while the sketch stays
    hidden.
    """
    return abi_hash(["bytes32", "bytes32"], [sketch, salt])


def stage_commitment(
    request: RequestId,
    round_: int,
    stage: int,
    node: str,
    evidence_root: bytes,
    sealed: bytes,
    output_tokens: int,
) -> bytes:
    """OutputVerification.commitmentOf; `round_` 0 for the executor, 1..3 for attestations, which have the sketch of
    the rows inside the stage in the place of `evidence_root`.
    """
    return abi_hash(
        ["bytes32", "bytes32", "uint8", "uint16", "address", "bytes32", "bytes32", "uint32"],
        [STAGE_COMMITMENT_TYPEHASH, request, round_, stage, node, evidence_root, sealed, output_tokens],
    )


def commitments_digest(commitments: Iterable[bytes]) -> bytes:
    """Chain of all stage commitments in stage order, part of the draw's seed."""
    digest = ZERO_HASH
    for commitment in commitments:
        digest = keccak256(digest + commitment)
    return digest


def draw_seed(secret: bytes, commitments: bytes, entropy_block_hash: bytes, request: RequestId) -> bytes:
    """Seed of round 1: keccak256(abi.encode(secret, commitmentsDigest, blockhash(entropyBlock), requestId))."""
    return abi_hash(["bytes32", "bytes32", "bytes32", "bytes32"], [secret, commitments, entropy_block_hash, request])


def next_round_seed(seed: bytes, round_: int) -> bytes:
    """Seed of backup round `round_`: keccak256(abi.encode(seed, round))."""
    return abi_hash(["bytes32", "uint8"], [seed, round_])


def is_sampled(seed: bytes, sampling_rate_bps: int) -> bool:
    """Whether a committee sits in the first round: keccak256(abi.encode(seed, "sample")) mod 10,000 < rate."""
    return int.from_bytes(abi_hash(["bytes32", "string"], [seed, "sample"])) % BASIS_POINTS < sampling_rate_bps


def is_seated(
    seed: bytes, round_: int, stage: int, node: str, stake: int, total_stake: int, committee_seats: int
) -> bool:
    """Self-sortition by stake (field notes §2.3): expected seats = committee_seats * 2^(round-1) of the whole stake.

    Splitting stake over several keys leaves the expected number of seats unchanged. Whether the node may sit at all
    (not the executor, not of its operator) is not decided here.
    """
    if stake <= 0 or total_stake <= 0:
        return False
    weight = min(total_stake, (committee_seats << (round_ - 1)) * stake)
    draw = int.from_bytes(abi_hash(["bytes32", "uint8", "uint16", "address"], [seed, round_, stage, node]))
    return draw <= _UINT256_MAX // total_stake * weight


def vote_weight(round_: int, stake: int, total_stake: int, committee_seats: int) -> int:
    """What a seated node's vote weighs, in wei: the stake that it was drawn from, that is its own, or one seat's part
    of all stake if that is more. Seats follow stake already; votes by stake alone would count it twice, and one large
    key would outvote the many small ones of which few are drawn.
    """
    return max(stake, total_stake // (committee_seats << (round_ - 1)))
