"""The verification record: everything that happened to one request, in one file that anyone can check against the
chain alone.

Owns the types of the record and their one canonical form: UTF-8 JSON with sorted keys and no spaces, byte strings as
lower-case hex with `0x`, addresses in checksum form, wei and other numbers beyond 2**53 as decimal strings. Promises
that equal records have equal bytes, that `from_bytes` accepts nothing but canonical bytes of format 1, and that an
error names the field. Does not fetch a record and does not judge one; that is `bsns.audit`.

What only the requester knows (the nonce, the opening of the input, evidence steps, token ids) is optional: a record
without it proves less, never something else. Each fact names the transaction it came from, and `transactions` says
where that transaction lies.
"""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Final, Union, cast, get_args, get_origin, get_type_hints

from eth_typing import ChecksumAddress

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.commitments import FINGERPRINT_LENGTH, EvidenceStep
from bsns.protocol.identifiers import ProtocolError, address
from bsns.protocol.plan import Assignment

RECORD_FORMAT: Final = 3
# A record is sent around between strangers; one of 32 stages and 4,096 steps has about 60 MB.
MAXIMUM_RECORD_BYTES: Final = 128 * 1024 * 1024
NO_STAGE: Final = 2**16 - 1
"""`blamed_stage` when no stage is to blame."""

Hash = Annotated[bytes, 32]
Fingerprint = Annotated[bytes, FINGERPRINT_LENGTH]
Big = Annotated[int, 256]
"""An integer that JSON readers would round: wei, nonces, 64-bit seeds, stakes. Up to 256 bits."""

_SAFE_INTEGER: Final = 2**53
_UINT256: Final = 2**256


class RecordError(ProtocolError):
    """The bytes are not a verification record of this format. The message names the field; ask for the record again."""


@dataclass(frozen=True, slots=True)
class ContractDomain:
    """The deployment. `first_block` is where the registry's events or the model begin, whichever is earlier."""

    chain_id: int
    node_registry: ChecksumAddress
    shard_assignments: ChecksumAddress
    inference_escrow: ChecksumAddress
    output_verification: ChecksumAddress
    request_tabs: ChecksumAddress
    treasury: ChecksumAddress
    first_block: int


@dataclass(frozen=True, slots=True)
class Term:
    """One immutable number of the contracts, under the name of its Solidity getter, for example
    `OutputVerification.tau`.
    """

    name: str
    value: Big


@dataclass(frozen=True, slots=True)
class BlockReference:
    number: int
    hash: Hash


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction that facts of this record came from; `events` are the names of those it emitted, in log order."""

    hash: Hash
    block_number: int
    block_hash: Hash
    gas_used: int
    events: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecordedModel:
    model_id: Hash
    manifest_hash: Hash
    weight_root: Hash
    unit_count: int
    name: str
    registrant: ChecksumAddress
    transaction: Hash


@dataclass(frozen=True, slots=True)
class RecordedAssignment:
    """One leaf of the plan, fields as in contracts/types/Assignment.sol."""

    stage: int
    replica: int
    first_unit: int
    end_unit: int
    node: ChecksumAddress
    work_weight: Big
    execution_class: Hash

    @classmethod
    def of(cls, assignment: Assignment) -> RecordedAssignment:
        return cls(*assignment.as_tuple())

    def assignment(self) -> Assignment:
        return Assignment(
            self.stage, self.replica, self.first_unit, self.end_unit, self.node, self.work_weight, self.execution_class
        )


@dataclass(frozen=True, slots=True)
class RecordedPlan:
    plan_id: Hash
    publisher: ChecksumAddress
    epoch: int
    effective_at: int
    fee_per_token: Big
    root: Hash
    measurements_hash: Hash
    assignments: tuple[RecordedAssignment, ...]
    transaction: Hash


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """`opened_at` is the time of the block; `nonce` is known to the requester only (it opens the request id)."""

    request_id: Hash
    requester: ChecksumAddress
    deposit: Big
    fee_per_token: Big
    prompt_tokens: int
    maximum_tokens: int
    input_commitment: Hash
    secret_hash: Hash
    opened_at: int
    deadline: int
    transaction: Hash
    nonce: Big | None


@dataclass(frozen=True, slots=True)
class RouteStage:
    """The node of one stage, its operator (who is paid) and the proof that the plan assigned it; `assignment` indexes
    the plan's list.
    """

    stage: int
    node: ChecksumAddress
    operator: ChecksumAddress
    assignment: int
    leaf: Hash
    proof: tuple[Hash, ...]


@dataclass(frozen=True, slots=True)
class RouteReplacement:
    """`node` took the place of `replaced`, which had stopped (InferenceEscrow.replaceStages)."""

    stage: int
    replaced: ChecksumAddress
    node: ChecksumAddress
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Route:
    """The nodes that answer for the stages, after the `replacements` in their order."""

    deadline: int
    stages: tuple[RouteStage, ...]
    transaction: Hash
    replacements: tuple[RouteReplacement, ...]


@dataclass(frozen=True, slots=True)
class RecordedSampling:
    """Sampling parameters in the integers that are hashed (`bsns.protocol.sampling`)."""

    temperature_millionths: int
    top_k: int
    top_p_millionths: int
    seed: Big
    maximum_tokens: int


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """Opening of the input commitment. The requester decides whether to show it; the salt hides short prompts
    otherwise.
    """

    prompt_digest: Hash
    prompt_tokens: int
    sampling: RecordedSampling
    sampling_digest: Hash
    salt: Hash


@dataclass(frozen=True, slots=True)
class RecordedTokens:
    """Token ids of prompt and answer, if the requester shows them. `drafts` has for each step the tokens that the last
    stage drafted to follow those it gave: the digests of its outputs cover them.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    drafts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One leaf of a stage's evidence (IOutputVerification.EvidenceStep)."""

    step: int
    position: int
    rows: int
    input_digest: Hash
    output_digest: Hash
    input_chain: Hash
    output_chain: Hash
    fingerprint: Fingerprint

    @classmethod
    def of(cls, step: EvidenceStep) -> RecordedStep:
        return cls(*step.as_tuple())

    def evidence_step(self) -> EvidenceStep:
        return EvidenceStep(
            self.step, self.position, self.rows, self.input_digest, self.output_digest, self.input_chain,
            self.output_chain, self.fingerprint,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordedEvidence:
    """What one executor showed the requester: the leaves under its evidence root and the outer layer of its
    commitment.
    """

    stage: int
    evidence_root: Hash
    sealed_sketch: Hash
    output_tokens: int
    steps: tuple[RecordedStep, ...]


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What a requester adds to the record of its request, beyond what is on chain."""

    nonce: int
    input: RecordedInput | None
    tokens: RecordedTokens | None
    evidence: tuple[RecordedEvidence, ...]


@dataclass(frozen=True, slots=True)
class RecordedReveal:
    """An opened commitment. Of a committee member `evidence_root` is the sketch of the rows inside the stage, which
    takes the root's place.
    """

    evidence_root: Hash
    sketch: Hash
    output_tokens: int
    salt: Hash
    transaction: Hash


@dataclass(frozen=True, slots=True)
class RecordedCommitment:
    """What the executor of a stage committed, and what it opened (None while or because it did not)."""

    stage: int
    node: ChecksumAddress
    commitment: Hash
    transaction: Hash
    reveal: RecordedReveal | None


@dataclass(frozen=True, slots=True)
class EntropyRenewal:
    """A draw came too late to read the hash of the entropy block; another block took its place."""

    entropy_block: int
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Entropy:
    """All stages have committed: the snapshot of stakes, and the block whose hash was to be used first."""

    block: int
    snapshot_time: int
    snapshot_stake: Big
    secret_deadline: int
    commitments_digest: Hash
    transaction: Hash
    renewals: tuple[EntropyRenewal, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """The draw of the committee. `secret` is zero if somebody drew without it after the deadline.

    `entropy_block` is the block whose hash went into the seed: the last one that was set.
    """

    entropy_block: BlockReference
    secret: Hash
    seed: Hash
    sampled: bool
    attest_deadline: int
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Member:
    """A committee member of one stage. `stake` is what counted in the draw; what the vote weighs follows
    from it (`bsns.protocol.commitments.vote_weight`).
    """

    stage: int
    node: ChecksumAddress
    operator: ChecksumAddress
    stake: Big
    commitment: Hash
    transaction: Hash
    reveal: RecordedReveal | None


@dataclass(frozen=True, slots=True)
class MemberDistance:
    """Circular L1 distance of a member's sketch from the medoid's."""

    node: ChecksumAddress
    distance: Big


@dataclass(frozen=True, slots=True)
class Tally:
    """Judgement of one stage in one round. `verdict` is a name of IOutputVerification.StageVerdict.

    `distance` is the executor's from the medoid, 2**256-1 if the token counts differ or there is no medoid.
    `member_distances` lists the revealed members likewise. The medoid is the zero address where none was used.
    """

    stage: int
    verdict: str
    medoid: ChecksumAddress
    support: Big
    revealed_stake: Big
    distance: Big
    member_distances: tuple[MemberDistance, ...]
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Round:
    """One committee: round 1 by the draw, rounds 2 and 3 by escalation."""

    number: int
    seed: Hash
    attest_deadline: int
    transaction: Hash
    members: tuple[Member, ...]
    tallies: tuple[Tally, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: bool
    challenge_deadline: int
    transaction: Hash


@dataclass(frozen=True, slots=True)
class ChallengeResolution:
    upheld: bool
    bond: Big
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Challenge:
    stage: int
    challenger: ChecksumAddress
    bond: Big
    transaction: Hash
    resolution: ChallengeResolution | None


@dataclass(frozen=True, slots=True)
class Conclusion:
    """`blamed_stage` is NO_STAGE (65535) if none is."""

    accepted: bool
    blamed_stage: int
    output_tokens: int
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Credit:
    """Wei credited to an account out of this request; `balance` is the account's credit afterwards."""

    account: ChecksumAddress
    amount: Big
    balance: Big
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Payment:
    """Where the deposit went: paid + protocol fee + refunded = deposit (MONEY-02)."""

    settled: bool
    paid_to_executors: Big
    paid_to_verifiers: Big
    protocol_fee: Big
    refunded: Big
    credits: tuple[Credit, ...]
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Slash:
    """Stake taken in a transaction that judged this request. `reason` is the name in INodeRegistry.SlashReason."""

    node: ChecksumAddress
    reason: str
    amount: Big
    burned: Big
    staked: Big
    thawing: Big
    transaction: Hash


@dataclass(frozen=True, slots=True)
class Jailing:
    """A node kept out of new duties until `until` (2**64-1: for ever) by a transaction that judged this request."""

    node: ChecksumAddress
    until: Big
    transaction: Hash


@dataclass(frozen=True, slots=True)
class VerificationRecord:
    """The record of one request as of the block `as_of`. Lists follow stage order, or log order where there is no
    stage.
    """

    domain: ContractDomain
    terms: tuple[Term, ...]
    as_of: BlockReference
    status: str
    model: RecordedModel
    plan: RecordedPlan
    request: RecordedRequest
    route: Route | None
    input: RecordedInput | None
    tokens: RecordedTokens | None
    evidence: tuple[RecordedEvidence, ...]
    commitments: tuple[RecordedCommitment, ...]
    entropy: Entropy | None
    draw: Draw | None
    rounds: tuple[Round, ...]
    verdicts: tuple[Verdict, ...]
    challenges: tuple[Challenge, ...]
    conclusion: Conclusion | None
    payment: Payment | None
    slashes: tuple[Slash, ...]
    jailings: tuple[Jailing, ...]
    transactions: tuple[Transaction, ...]
    format: int = RECORD_FORMAT

    def __post_init__(self) -> None:
        if self.format != RECORD_FORMAT:
            raise RecordError(
                f"format is {self.format!r}, this release reads {RECORD_FORMAT}; install a release that knows it"
            )
        stages = [item.stage for item in self.evidence]
        if stages != sorted(set(stages)):
            raise RecordError(f"evidence lists stages {stages}, expected each at most once and in order")
        if self.tokens is not None and (self.input is None or not self.has_full_evidence):
            # Nothing else on chain or in the file would tie the token ids to the request.
            raise RecordError("tokens are shown without the opening of the input and the evidence of every stage")

    @property
    def has_full_evidence(self) -> bool:
        """Whether the steps of every stage of the route are in the record."""
        return self.route is not None and len(self.evidence) == len(self.route.stages)

    def term(self, name: str) -> int:
        """Value of a term; RecordError if the record does not have it."""
        for item in self.terms:
            if item.name == name:
                return item.value
        raise RecordError(f"terms: {name} is missing")

    def to_document(self) -> dict[str, Any]:
        """The record as JSON values."""
        return cast("dict[str, Any]", _encode(self, type(self)))

    def to_bytes(self) -> bytes:
        """Canonical UTF-8 JSON with a final newline."""
        document = self.to_document()
        return (
            json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
            + b"\n"
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> VerificationRecord:
        """Parse canonical bytes; RecordError, which names the field, for anything that `to_bytes` would not have
        written.
        """
        if len(data) > MAXIMUM_RECORD_BYTES:
            raise RecordError(f"record has {len(data)} bytes, more than the limit of {MAXIMUM_RECORD_BYTES}")
        try:
            document = parse_json(data, parse_float=_refuse_float, parse_constant=_refuse_float)
        except RecordError:
            raise
        except ValueError as error:
            raise RecordError(f"record is not UTF-8 JSON: {error}") from error
        record = cast("VerificationRecord", _decode(document, cls, "record"))
        if record.to_bytes() != data:
            raise RecordError(
                "record is not in canonical form (sorted keys, no spaces, one final newline); use to_bytes()"
            )
        return record


def differences(left: object, right: object, path: str = "") -> list[str]:
    """Paths of fields in which two values of the same record type differ, each with both values; empty if they are
    equal.
    """
    if dataclasses.is_dataclass(left) and type(left) is type(right):
        found = []
        for field in dataclasses.fields(left):
            where = f"{path}.{field.name}" if path else field.name
            found += differences(getattr(left, field.name), getattr(right, field.name), where)
        return found
    if isinstance(left, tuple) and isinstance(right, tuple):
        if len(left) != len(right):
            return [f"{path}: {len(left)} entries in the record, {len(right)} on chain"]
        return [text for index, pair in enumerate(zip(left, right)) for text in differences(*pair, f"{path}[{index}]")]
    if left == right and type(left) is type(right):
        return []
    return [f"{path}: {_short(left)} in the record, {_short(right)} on chain"]


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return "nothing" if value is None else f"{value!r:.120}"


def _refuse_float(text: str) -> Any:
    raise RecordError(f"record holds the number {text}; all its numbers are integers")


@lru_cache(maxsize=64)
def _field_types(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _encode(value: Any, kind: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case bytes():
            return f"0x{value.hex()}"
        case int():
            return str(value) if kind == Big else value
        case tuple():
            return [_encode(item, get_args(kind)[0]) for item in value]
        case _:
            owner: type = type(value)
            hints = _field_types(owner)
            return {name: _encode(getattr(value, name), _present(hint)) for name, hint in hints.items()}


def _present(kind: Any) -> Any:
    """The type without `| None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(item for item in get_args(kind) if item is not type(None))
    return kind


def _decode(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _decode(value, _present(kind), where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{where} is {_kind_of(value)}, expected a list")
        return tuple(_decode(item, get_args(kind)[0], f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(kind) is Annotated:
        base, size = get_args(kind)
        return _decode_bytes(value, size, where) if base is bytes else _decode_big(value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(value, cast("type", kind), where)
    if kind is bool:
        if not isinstance(value, bool):
            raise RecordError(f"{where} is {_kind_of(value)}, expected true or false")
        return value
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _SAFE_INTEGER:
            raise RecordError(f"{where} is {value!r:.40}, expected an integer from 0 to 2**53-1")
        return value
    if not isinstance(value, str):
        raise RecordError(f"{where} is {_kind_of(value)}, expected text")
    if kind is str:
        return value
    try:
        checksummed = address(value)
    except ProtocolError as error:
        raise RecordError(f"{where} is {value!r:.60}, expected an address") from error
    if checksummed != value:
        raise RecordError(f"{where} is {value!r:.60}, not an address in checksum form")
    return checksummed


def _decode_fields(value: Any, owner: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {_kind_of(value)}, expected an object")
    hints = _field_types(owner)
    if set(value) != set(hints):
        missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
        raise RecordError(f"{where}: missing fields {missing}, unknown fields {unknown!r:.200}")
    prefix = "" if where == "record" else f"{where}."
    return owner(**{name: _decode(value[name], hint, prefix + name) for name, hint in hints.items()})


def _decode_bytes(value: Any, size: int, where: str) -> bytes:
    if not isinstance(value, str) or len(value) != 2 + 2 * size or not value.startswith("0x"):
        raise RecordError(f"{where} is {value!r:.80}, expected 0x and {2 * size} hexadecimal digits")
    try:
        decoded = bytes.fromhex(value[2:])
    except ValueError as error:
        raise RecordError(f"{where} is not hexadecimal: {error}") from error
    if f"0x{decoded.hex()}" != value:
        raise RecordError(f"{where} is {value!r:.80}, expected lower-case hexadecimal digits")
    return decoded


def _decode_big(value: Any, where: str) -> int:
    # Not str.isdigit(): it accepts digits of other scripts.
    if not isinstance(value, str) or not 1 <= len(value) <= 78 or not set(value) <= set("0123456789"):
        raise RecordError(f"{where} is {value!r:.90}, expected an integer as decimal text")
    number = int(value)
    if str(number) != value or number >= _UINT256:
        raise RecordError(f"{where} is {value!r:.90}, expected a canonical integer below 2**256")
    return number


def _kind_of(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
