"""The money of the four contracts in memory: what a call would do to it, and the events that it would emit.

A second account of the same rules, for tests of the auditor's books: it holds ether where the contracts would hold it
and knows nothing of how the books are kept. Numbers of blocks and logs rise as on a chain; every call is a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bsns.chain.client import ChainEvent
from bsns.protocol.identifiers import address, keccak256

TREASURY = address("0x" + "fe" * 20)
BOND = 50
_SLASHED = {"IncorrectOutput": 0, "IncorrectAttestation": 1, "EvidenceWithheld": 2, "RevealWithheld": 3}

Transaction = tuple[ChainEvent, ...]


def account(number: int) -> Any:
    return address(number.to_bytes(20, "big"))


def hash_of(text: str) -> bytes:
    return keccak256(text.encode())


@dataclass
class _Node:
    operator: Any
    staked: int
    thawing: int = 0
    exiting: bool = False
    jailed: bool = False


@dataclass
class _Request:
    requester: Any
    deposit: int
    status: str = "Open"
    bonds: dict[int, Any] = field(default_factory=dict)


@dataclass(repr=False)
class ContractModel:
    """State after the transactions so far; `transactions` are theirs."""

    ether: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("NodeRegistry", "ShardAssignments", "InferenceEscrow", "OutputVerification"), 0
        )
    )
    nodes: dict[Any, _Node] = field(default_factory=dict)
    requests: dict[bytes, _Request] = field(default_factory=dict)
    credits: dict[tuple[str, Any], int] = field(default_factory=dict)
    transactions: list[Transaction] = field(default_factory=list)
    _logs: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    # --------------------------------------------------------------------------------------------------------- registry

    def register(self, node: Any, operator: Any, stake: int) -> None:
        self.nodes[node] = _Node(operator, stake)
        self._receive("NodeRegistry", stake)
        self._log("NodeRegistry", "NodeRegistered", node=node, operator=operator, staked=stake, activeFrom=10)
        self._end()

    def add_stake(self, node: Any, amount: int) -> None:
        item = self.nodes[node]
        item.staked += amount
        self._receive("NodeRegistry", amount)
        self._log("NodeRegistry", "StakeAdded", node=node, amount=amount, staked=item.staked, warmFrom=10)
        self._end()

    def thaw(self, node: Any, amount: int) -> None:
        item = self.nodes[node]
        item.thawing += amount
        self._log("NodeRegistry", "ThawStarted", node=node, amount=amount, thawing=item.thawing, thawEnd=10)
        self._end()

    def begin_exit(self, node: Any) -> None:
        item = self.nodes[node]
        item.exiting, item.thawing = True, item.staked
        self._log("NodeRegistry", "ExitStarted", node=node, thawEnd=10)
        self._end()

    def withdraw(self, node: Any) -> None:
        item = self.nodes[node]
        amount, item.staked, item.thawing = item.thawing, item.staked - item.thawing, 0
        self._receive("NodeRegistry", -amount)
        values = {"node": node, "operator": item.operator, "amount": amount, "staked": item.staked}
        self._log("NodeRegistry", "StakeWithdrawn", **values)
        if item.exiting:
            self._log("NodeRegistry", "NodeRemoved", node=node)
            del self.nodes[node]
        self._end()

    def leave_jail(self, node: Any) -> None:
        self.nodes[node].jailed = False
        self._log("NodeRegistry", "NodeReleased", node=node)
        self._end()

    # ----------------------------------------------------------------------------------------------------------- escrow

    def open(self, request_id: bytes, requester: Any, deposit: int, *, deadline: int = 100) -> None:
        self.requests[request_id] = _Request(requester, deposit)
        self._receive("InferenceEscrow", deposit)
        self._log(
            "InferenceEscrow",
            "RequestOpened",
            requestId=request_id,
            requester=requester,
            planId=hash_of("plan"),
            deposit=deposit,
            feePerToken=1,
            promptTokens=2,
            maximumTokens=3,
            inputCommitment=hash_of("input"),
            secretHash=hash_of("secret"),
            deadline=deadline,
        )
        self._end()

    def route(self, request_id: bytes, nodes: Sequence[Any], *, deadline: int = 200) -> None:
        self.requests[request_id].status = "Routed"
        self._log("InferenceEscrow", "RequestRouted", requestId=request_id, nodes=tuple(nodes), deadline=deadline)
        for node in nodes:
            self._log("NodeRegistry", "DutyOpened", node=node, openDuties=1)
        self._end()

    def replace_stage(self, request_id: bytes, stage: int, replaced: Any, node: Any) -> None:
        values = {"stage": stage, "replaced": replaced, "node": node}
        self._log("InferenceEscrow", "StageReplaced", requestId=request_id, **values)
        self._log("NodeRegistry", "DutyOpened", node=node, openDuties=1)
        self._log("NodeRegistry", "DutyClosed", node=replaced, openDuties=0)
        self._end()

    def settle(
        self, request_id: bytes, executors: Sequence[Any], verifiers: Sequence[Any], parts: Sequence[int]
    ) -> None:
        """`parts`: fee, for each executor, for each verifier; the rest is refunded."""
        request = self.requests.pop(request_id)
        fee, executed, verified = parts[0], parts[1 : 1 + len(executors)], parts[1 + len(executors) :]
        values = {"accepted": True, "blamedStage": 65_535, "outputTokens": 1}
        self._log("OutputVerification", "RequestConcluded", requestId=request_id, **values)
        self._credit("InferenceEscrow", TREASURY, fee, requestId=request_id)
        for who, amount in [*zip(executors, executed), *zip(verifiers, verified)]:
            self._credit("InferenceEscrow", who, amount, requestId=request_id)
        refunded = request.deposit - sum(parts)
        self._credit("InferenceEscrow", request.requester, refunded, requestId=request_id)
        self._log(
            "InferenceEscrow",
            "RequestSettled",
            requestId=request_id,
            paidToExecutors=sum(executed),
            paidToVerifiers=sum(verified),
            protocolFee=fee,
            refunded=refunded,
        )
        self._end()

    def claim_refund(self, request_id: bytes) -> None:
        request = self.requests.pop(request_id)
        self._refund(request_id, request)
        if request.status != "Open":
            self._return_bonds(request_id, request)
            self._conclude(request_id, 65_535)
        self._end()

    # ----------------------------------------------------------------------------------------------------- verification

    def challenge(self, request_id: bytes, stage: int, challenger: Any) -> None:
        self.requests[request_id].bonds[stage] = challenger
        self._receive("OutputVerification", BOND)
        values = {"requestId": request_id, "stage": stage, "challenger": challenger, "bond": BOND}
        self._log("OutputVerification", "Challenged", **values)
        self._end()

    def tally(
        self,
        request_id: bytes,
        stage: int,
        verdict: int,
        *,
        slashed: Any = None,
        amount: int = 0,
        rewards: Sequence[tuple[Any, int]] = (),
        silent: Sequence[Any] = (),
        members: Sequence[Any] = (),
        upheld: bool | None = None,
        rejects: bool = False,
    ) -> None:
        """A judgement with everything that follows it: a challenge that ends (`upheld`; its bond goes to `members` if
        it is refuted), a slash, jailings, and the refund if it `rejects` the request.
        """
        request = self.requests[request_id]
        self._tallied(request_id, stage, verdict)
        if upheld is not None:
            self._resolve(request_id, stage, request.bonds.pop(stage), upheld, members)
        if slashed is not None:
            self._slash(slashed, amount, "IncorrectOutput", rewards)
        for node in silent:
            self._log("NodeRegistry", "NodeJailed", node=node, jailedUntil=99)
            self.nodes[node].jailed = True
        if rejects:
            del self.requests[request_id]
            self._log("OutputVerification", "VerdictReached", requestId=request_id, accepted=False, challengeDeadline=0)
            self._return_bonds(request_id, request)
            self._conclude(request_id, stage)
            self._refund(request_id, request)
        self._end()

    # ---------------------------------------------------------------------------------------------------------- credits

    def withdraw_credit(self, contract: str, who: Any) -> None:
        amount = self.credits.pop((contract, who))
        self._receive(contract, -amount)
        self._log(contract, "CreditWithdrawn", account=who, amount=amount)
        self._end()

    # ----------------------------------------------------------------------------------------------------------- inside

    def _slash(self, node: Any, amount: int, reason: str, rewards: Sequence[tuple[Any, int]]) -> None:
        item = self.nodes[node]
        left = item.staked - amount
        item.thawing = item.thawing * left // item.staked
        item.staked = left
        for who, share in rewards:
            self._credit("NodeRegistry", who, share)
        burned = amount - sum(share for _, share in rewards)
        self._receive("NodeRegistry", -burned)
        self._log(
            "NodeRegistry",
            "NodeSlashed",
            node=node,
            reason=_SLASHED[reason],
            amount=amount,
            burned=burned,
            staked=left,
            thawing=item.thawing,
        )
        if not item.jailed:
            self._log("NodeRegistry", "NodeJailed", node=node, jailedUntil=99)
        item.jailed = True

    def _tallied(self, request_id: bytes, stage: int, verdict: int) -> None:
        self._log(
            "OutputVerification",
            "StageTallied",
            requestId=request_id,
            round=1,
            stage=stage,
            verdict=verdict,
            medoid=account(0),
            support=0,
            revealedStake=0,
            distance=0,
        )

    def _resolve(self, request_id: bytes, stage: int, challenger: Any, upheld: bool, members: Sequence[Any]) -> None:
        values = {"requestId": request_id, "stage": stage, "challenger": challenger, "upheld": upheld, "bond": BOND}
        self._log("OutputVerification", "ChallengeResolved", **values)
        bond, paid = BOND, [challenger] if upheld else members
        for index, who in enumerate(paid):
            share = bond // (len(paid) - index)
            bond -= share
            self._credit("OutputVerification", who, share)

    def _return_bonds(self, request_id: bytes, request: _Request) -> None:
        for stage, challenger in sorted(request.bonds.items()):
            self._resolve(request_id, stage, challenger, False, [challenger])

    def _conclude(self, request_id: bytes, blamed: int) -> None:
        values = {"accepted": False, "blamedStage": blamed, "outputTokens": 0}
        self._log("OutputVerification", "RequestConcluded", requestId=request_id, **values)

    def _refund(self, request_id: bytes, request: _Request) -> None:
        self._credit("InferenceEscrow", request.requester, request.deposit, requestId=request_id)
        values = {"requestId": request_id, "requester": request.requester, "refunded": request.deposit}
        self._log("InferenceEscrow", "RequestRefunded", **values)

    def _credit(self, contract: str, who: Any, amount: int, **more: Any) -> None:
        if amount:
            self.credits[contract, who] = self.credits.get((contract, who), 0) + amount
            self._log(contract, "Credited", account=who, amount=amount, credit=self.credits[contract, who], **more)

    def _receive(self, contract: str, amount: int) -> None:
        self.ether[contract] += amount

    def _log(self, contract: str, name: str, **arguments: Any) -> None:
        self._logs.append((contract, name, arguments))

    def _end(self) -> None:
        number = len(self.transactions) + 1
        block, transaction = hash_of(f"block {number}"), hash_of(f"transaction {number}")
        self.transactions.append(
            tuple(
                ChainEvent(contract, name, arguments, number, block, transaction, index)
                for index, (contract, name, arguments) in enumerate(self._logs)
            )
        )
        self._logs = []
