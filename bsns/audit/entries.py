"""What a report on a range of blocks consists of: one type for each line that an auditor may ask about.

Owns names and units only. Every entry names the log it comes from (`at`), so that whoever doubts it finds it on the
chain; wei are integers of up to 256 bits. `bsns.audit.books` makes them, `bsns.audit.block_report` writes them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eth_typing import ChecksumAddress

from bsns.protocol.record import Big, Hash, RecordedAssignment


@dataclass(frozen=True, slots=True)
class Place:
    """Where a log lies; whoever has an endpoint finds it again."""

    block: int
    transaction: Hash
    log_index: int


# -------------------------------------------------------------------------------------------------------------- stakes


@dataclass(frozen=True, slots=True)
class StakeMovement:
    """`kind`: registered, added, thaw started, exit started, withdrawn, removed, slashed or released (from jail).

    `amount` is what moved, in wei; `staked` and `thawing` are what the account had afterwards.
    """

    at: Place
    kind: str
    node: ChecksumAddress
    operator: ChecksumAddress
    amount: Big
    staked: Big
    thawing: Big


@dataclass(frozen=True, slots=True)
class NodeStake:
    """One node over the range: start + added - withdrawn - slashed = end. `status` is that of the end."""

    node: ChecksumAddress
    operator: ChecksumAddress
    start: Big
    start_thawing: Big
    added: Big
    thaw_started: Big
    withdrawn: Big
    slashed: Big
    end: Big
    end_thawing: Big
    status: str


# --------------------------------------------------------------------------------------------------------- assignments


@dataclass(frozen=True, slots=True)
class ModelEntry:
    at: Place
    model_id: Hash
    registrant: ChecksumAddress
    manifest_hash: Hash
    weight_root: Hash
    unit_count: int
    name: str


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A published plan. `consents` are the nodes whose signature under exactly this plan the contract checked."""

    at: Place
    plan_id: Hash
    model_id: Hash
    publisher: ChecksumAddress
    epoch: int
    effective_at: int
    fee_per_token: Big
    root: Hash
    measurements_hash: Hash
    consents: tuple[ChecksumAddress, ...]
    assignments: tuple[RecordedAssignment, ...]


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """The nodes that were given the stages of a request, in their order."""

    at: Place
    request_id: Hash
    deadline: int
    nodes: tuple[ChecksumAddress, ...]


@dataclass(frozen=True, slots=True)
class ReplacementEntry:
    """`node` took the place of `replaced`, which had stopped, as the node of a stage of a request."""

    at: Place
    request_id: Hash
    stage: int
    replaced: ChecksumAddress
    node: ChecksumAddress


@dataclass(frozen=True, slots=True)
class PendingPlan:
    """A plan whose time has not come. `at` is where it was published."""

    at: Place
    plan_id: Hash
    model_id: Hash
    publisher: ChecksumAddress
    epoch: int
    effective_at: int


# ------------------------------------------------------------------------------------------------------------ payments


@dataclass(frozen=True, slots=True)
class RequestStep:
    """`status`: Open, Routed, Committed or Verified; `deadline` is None for the last, which keeps the one before."""

    at: Place
    status: str
    deadline: int | None


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a deposit went. `because`: settled, verdict (against the pipeline, or none possible) or expired."""

    at: Place
    because: str
    paid_to_executors: Big
    paid_to_verifiers: Big
    protocol_fee: Big
    refunded: Big


@dataclass(frozen=True, slots=True)
class RequestMoney:
    """A request that was open at some time in the range. `steps` and `ending` are those within it; `status` is that of
    the end of the range, Expired if its deadline is over and nobody has claimed the refund.
    """

    request_id: Hash
    requester: ChecksumAddress
    plan_id: Hash
    opened: Place
    deposit: Big
    fee_per_token: Big
    prompt_tokens: int
    maximum_tokens: int
    steps: tuple[RequestStep, ...]
    ending: Ending | None
    status: str


@dataclass(frozen=True, slots=True)
class CreditEntry:
    """Wei credited by `contract` to `account`, whose credit there was `balance` afterwards.

    `role`: executor, verifier, requester or protocol (of the request); slash reward; bond returned, bond forfeited;
    batch (a share, the protocol fee or the collector's bond) or leaf challenge (a bond) of RequestTabs.
    """

    at: Place
    contract: str
    account: ChecksumAddress
    amount: Big
    balance: Big
    role: str
    request_id: Hash | None


@dataclass(frozen=True, slots=True)
class WithdrawalEntry:
    """A credit that `contract` paid out whole."""

    at: Place
    contract: str
    account: ChecksumAddress
    amount: Big


@dataclass(frozen=True, slots=True)
class AccountCredit:
    """One account's credit in one contract over the range: start + credited - withdrawn = end."""

    contract: str
    account: ChecksumAddress
    start: Big
    credited: Big
    withdrawn: Big
    end: Big


# ------------------------------------------------------------------------------------------------------------ verdicts


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A log as it is: the event, and its values under their Solidity names, numbers in decimal."""

    at: Place
    event: str
    values: Mapping[str, str | bool]


@dataclass(frozen=True, slots=True)
class StageTally:
    """What a tally said about a stage. `distance` is 2**256-1 without a medoid or with another number of tokens."""

    at: Place
    round: int
    stage: int
    verdict: str
    medoid: ChecksumAddress
    support: Big
    revealed_stake: Big
    distance: Big


@dataclass(frozen=True, slots=True)
class ChallengeEntry:
    """`outcome`: upheld (the bond goes back), refuted (the bond goes to the members), returned (never decided); None
    while it is open at the end of the range.
    """

    at: Place
    stage: int
    challenger: ChecksumAddress
    bond: Big
    outcome: str | None
    resolved: Place | None


@dataclass(frozen=True, slots=True)
class RequestVerdicts:
    """What was committed, drawn, revealed and judged about a request within the range, `entries` in full.

    None where the range does not say: the draw or the conclusion lies outside it.
    """

    request_id: Hash
    commitments: int
    sampled: bool | None
    rounds: int
    attestations: int
    reveals: int
    tallies: tuple[StageTally, ...]
    challenges: tuple[ChallengeEntry, ...]
    accepted: bool | None
    blamed_stage: int | None
    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class Reward:
    account: ChecksumAddress
    amount: Big


@dataclass(frozen=True, slots=True)
class SlashEntry:
    """Stake taken: amount = burned + rewards. `judgement` is the log that it follows in its transaction, and names
    request and stage.
    """

    at: Place
    node: ChecksumAddress
    operator: ChecksumAddress
    reason: str
    amount: Big
    burned: Big
    rewards: tuple[Reward, ...]
    staked: Big
    thawing: Big
    request_id: Hash | None
    stage: int | None
    judgement: Place | None


@dataclass(frozen=True, slots=True)
class JailEntry:
    """A node kept out of new duties until `until`, Unix seconds, 2**64-1 for ever. `reason` is that of the slash in the
    same judgement, or Silence: it committed an attestation and did not open it.
    """

    at: Place
    node: ChecksumAddress
    until: Big
    reason: str
    request_id: Hash | None
    stage: int | None
    judgement: Place | None


# ---------------------------------------------------------------------------------------------------------------- tabs


@dataclass(frozen=True, slots=True)
class TabMovement:
    """`kind`: funded, charged, restored (by a void batch) or withdrawn. `balance` is what the tab had afterwards."""

    at: Place
    kind: str
    requester: ChecksumAddress
    collector: ChecksumAddress
    amount: Big
    balance: Big
    batch_id: Hash | None


@dataclass(frozen=True, slots=True)
class TabState:
    """One tab over the range: start + funded + restored - charged - withdrawn = end."""

    requester: ChecksumAddress
    collector: ChecksumAddress
    start: Big
    funded: Big
    restored: Big
    charged: Big
    withdrawn: Big
    end: Big


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """A batch that was not over before the range: charged = taken + paid + fee + restored, once it is over. `taken`
    went into `opened` requests of the escrow. `draws` is None before its draw.
    """

    batch_id: Hash
    posted: Place
    collector: ChecksumAddress
    plan_id: Hash
    tickets: int
    tokens: int
    charged: Big
    bond: Big
    draws: int | None
    opened: int
    taken: Big
    paid: Big
    protocol_fee: Big
    restored: Big
    ended: Place | None
    status: str


# -------------------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the range, in wei; `start` and `end` are states, the rest are movements between them."""

    stake_start: Big
    stake_added: Big
    stake_withdrawn: Big
    stake_slashed: Big
    stake_burned: Big
    stake_end: Big
    deposits_start: Big
    deposits_opened: Big
    paid_to_executors: Big
    paid_to_verifiers: Big
    protocol_fees: Big
    refunded_at_settlement: Big
    refunded_by_verdict: Big
    refunded_after_expiry: Big
    deposits_end: Big
    bonds_start: Big
    bonds_put_down: Big
    bonds_ended: Big
    bonds_end: Big
    tabs_start: Big
    tabs_funded: Big
    tabs_restored: Big
    tabs_charged: Big
    tabs_withdrawn: Big
    tabs_end: Big
    pots_start: Big
    pots_taken: Big
    pots_paid: Big
    pots_fees: Big
    pots_end: Big
    tab_bonds_start: Big
    tab_bonds_put_down: Big
    tab_bonds_returned: Big
    tab_bonds_burned: Big
    tab_bonds_end: Big
    credits_start: Big
    credited: Big
    credits_withdrawn: Big
    credits_end: Big


@dataclass(frozen=True, slots=True)
class Entries:
    """Everything that the books say about a range, in the order of the chain. `plans_due` took or take effect later
    than the range begins.
    """

    totals: Totals
    nodes: tuple[NodeStake, ...]
    movements: tuple[StakeMovement, ...]
    models: tuple[ModelEntry, ...]
    plans: tuple[PlanEntry, ...]
    plans_due: tuple[PendingPlan, ...]
    routes: tuple[RouteEntry, ...]
    replacements: tuple[ReplacementEntry, ...]
    requests: tuple[RequestMoney, ...]
    credits: tuple[CreditEntry, ...]
    withdrawals: tuple[WithdrawalEntry, ...]
    accounts: tuple[AccountCredit, ...]
    verdicts: tuple[RequestVerdicts, ...]
    slashes: tuple[SlashEntry, ...]
    jailings: tuple[JailEntry, ...]
    tab_movements: tuple[TabMovement, ...]
    tabs: tuple[TabState, ...]
    batches: tuple[BatchEntry, ...]
