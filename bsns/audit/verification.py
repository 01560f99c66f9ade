"""Export and verification of records: the chain on one side, the protocol's rules on the other.

`export` builds the record of a request from logs, receipts and headers, plus what the requester discloses. `verify`
gathers the same facts again as of the record's block, compares every field, looks for the stakes and the entropy
itself, and applies the rules to the record. Promises one named check each, all of them run, no exception for whatever
a record holds. Trusts the RPC endpoint for logs and headers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.exceptions import EncodingError

from bsns.audit.chain_facts import ChainFacts, gather
from bsns.audit.errors import AuditError
from bsns.audit.rules import RULES
from bsns.chain.errors import ChainUnavailableError, ContractError
from bsns.protocol.record import (
    BlockReference,
    Disclosure,
    RecordError,
    VerificationRecord,
    differences,
)

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import ChainClient
    from bsns.chain.deployment import Deployment

MAXIMUM_PROBLEMS: Final = 5
"""Problems that a check names; there may be thousands."""
# Compared field by field with what the chain says, each under a name of its own.
_SECTIONS: Final = (
    "domain",
    "terms",
    "status",
    "model",
    "plan",
    "request",
    "route",
    "commitments",
    "entropy",
    "draw",
    "rounds",
    "verdicts",
    "challenges",
    "conclusion",
    "payment",
    "slashes",
    "jailings",
    "transactions",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked. `detail` says what is wrong, or what was compared."""

    name: str
    ok: bool
    detail: str


async def export(
    client: ChainClient, deployment: Deployment, request_id: bytes, disclosure: Disclosure | None = None
) -> VerificationRecord:
    """The record of `request_id` as of the chain's head. AuditError if there is no such request.

    A disclosure that does not fit the chain is refused too (AuditError): better no evidence than wrong evidence.
    """
    facts = await gather(client, deployment, request_id, await client.head())
    record = facts.record if disclosure is None else _disclose(facts.record, disclosure)
    wrong = [item for item in _apply_rules(record) if not item.ok]
    if disclosure is not None and wrong:
        without = {item.name for item in _apply_rules(facts.record) if not item.ok}
        for item in wrong:
            if item.name not in without:
                raise AuditError(f"what the requester discloses does not fit the chain: {item.name}: {item.detail}")
    return record


async def verify(record: VerificationRecord, client: ChainClient, deployment: Deployment | None = None) -> list[Check]:
    """All checks of `record`; it holds if all are ok.

    `deployment` fixes which contracts are meant; without it the addresses in the record are taken, and only their
    wiring is checked, so look at the domain that `show` prints. ChainUnavailableError if the chain does not answer:
    that says nothing about the record.
    """
    return [check async for check in checks(record, client, deployment)]


async def checks(
    record: VerificationRecord, client: ChainClient, deployment: Deployment | None = None
) -> AsyncIterator[Check]:
    """The checks of `verify`, each as soon as it is done."""
    for check in _apply_rules(record):
        yield check
    async for check in _against_chain(record, client, deployment):
        yield check


async def verify_bytes(data: bytes, client: ChainClient, deployment: Deployment | None = None) -> list[Check]:
    """`verify` of a record's file; bytes that are no record fail the check "record format"."""
    try:
        record = VerificationRecord.from_bytes(data)
    except RecordError as error:
        return [Check("record format", False, str(error))]
    return [Check("record format", True, "canonical JSON"), *await verify(record, client, deployment)]


def deployment_of(record: VerificationRecord) -> Deployment:
    """The deployment as the record names it."""
    from bsns.chain.deployment import Deployment

    return Deployment(**{field.name: getattr(record.domain, field.name) for field in dataclasses.fields(Deployment)})


def _disclose(record: VerificationRecord, disclosure: Disclosure) -> VerificationRecord:
    return dataclasses.replace(
        record,
        request=dataclasses.replace(record.request, nonce=disclosure.nonce),
        input=disclosure.input,
        tokens=disclosure.tokens,
        evidence=disclosure.evidence,
    )


def _apply_rules(record: VerificationRecord) -> Iterator[Check]:
    for name, rule in RULES:
        try:
            yield _check(f"rule: {name}", list(rule(record)), "holds")
        except (ValueError, LookupError, ArithmeticError, EncodingError, TypeError) as error:
            # A forged record may hold numbers that no honest one can; the rule cannot even be computed.
            yield Check(f"rule: {name}", False, f"cannot be computed: {type(error).__name__}: {error}")


async def _against_chain(
    record: VerificationRecord, client: ChainClient, deployment: Deployment | None
) -> AsyncIterator[Check]:
    where = deployment or deployment_of(record)
    yield _check("contracts", [text async for text in _wiring(client, where)], "wired to one another")
    header = await client.block(record.as_of.number)
    if header is None or header.hash != record.as_of.hash:
        shown = f"has 0x{header.hash.hex()}" if header else "has no such block"
        yield Check("block of the record", False, f"block {record.as_of.number}: the chain {shown}")
        return
    yield Check("block of the record", True, f"block {header.number} is on the chain")
    try:
        facts = await gather(client, where, record.request.request_id, header)
    except (AuditError, ContractError, RecordError) as error:
        yield Check("request on chain", False, str(error))
        return
    yield Check("request on chain", True, f"0x{record.request.request_id.hex()}")
    expected = facts.record
    # What only the requester knows has no counterpart on chain; the rules tie it to what has.
    expected = dataclasses.replace(expected, request=dataclasses.replace(expected.request, nonce=record.request.nonce))
    for section in _SECTIONS:
        found = differences(getattr(record, section), getattr(expected, section), section)
        yield _check(f"chain: {section}", found, "every field is what the chain says")
    yield await _entropy(record, client)
    yield _check("stakes: snapshot", list(_snapshot(record, facts)), "folded from the registry's events")
    yield _check("stakes: members", list(_member_stakes(record, facts)), "folded from the registry's events")
    yield _check("stakes: slashed", list(_slashed_stakes(record, facts)), "folded from the registry's events")


async def _wiring(client: ChainClient, where: Deployment) -> AsyncIterator[str]:
    wires = (
        ("NodeRegistry", "escrow", where.inference_escrow),
        ("NodeRegistry", "verification", where.output_verification),
        ("NodeRegistry", "tabs", where.request_tabs),
        ("ShardAssignments", "registry", where.node_registry),
        ("InferenceEscrow", "registry", where.node_registry),
        ("InferenceEscrow", "assignments", where.shard_assignments),
        ("InferenceEscrow", "verification", where.output_verification),
        ("InferenceEscrow", "tabs", where.request_tabs),
        ("InferenceEscrow", "treasury", where.treasury),
        ("OutputVerification", "registry", where.node_registry),
        ("OutputVerification", "escrow", where.inference_escrow),
        ("RequestTabs", "registry", where.node_registry),
        ("RequestTabs", "assignments", where.shard_assignments),
        ("RequestTabs", "escrow", where.inference_escrow),
    )
    chain_id = await client.chain_id()
    if chain_id != where.chain_id:
        yield f"the endpoint is on chain {chain_id}, the record on {where.chain_id}"
    for contract, function, expected in wires:
        try:
            actual = await client.call(contract, function)
        except (ContractError, ChainUnavailableError) as error:
            yield f"{contract}.{function} does not answer ({error}): it is not one of our contracts"
            return
        if actual != expected:
            yield f"{contract}.{function} is {actual}, expected {expected}"


async def _entropy(record: VerificationRecord, client: ChainClient) -> Check:
    name = "entropy block"
    if record.draw is None:
        return Check(name, True, "no draw yet")
    wanted: BlockReference = record.draw.entropy_block
    header = await client.block(wanted.number)
    if header is None or header.hash != wanted.hash:
        return Check(name, False, f"draw.entropy_block.hash is not the hash of block {wanted.number} on the chain")
    return Check(name, True, f"hash of block {wanted.number}")


def _snapshot(record: VerificationRecord, facts: ChainFacts) -> Iterator[str]:
    recorded = record.entropy.snapshot_stake if record.entropy else None
    if recorded != facts.stakes.snapshot_total:
        yield f"entropy.snapshot_stake is {recorded}, the registry's events give {facts.stakes.snapshot_total}"


def _member_stakes(record: VerificationRecord, facts: ChainFacts) -> Iterator[str]:
    for round_ in record.rounds:
        for item in round_.members:
            folded = facts.stakes.members.get((round_.number, item.stage, item.node))
            if item.stake != folded:
                yield (
                    f"round {round_.number}: {item.node} at stage {item.stage} counted {item.stake} wei, "
                    f"the registry's events give {folded}"
                )


def _slashed_stakes(record: VerificationRecord, facts: ChainFacts) -> Iterator[str]:
    for index, item in enumerate(record.slashes):
        before = facts.stakes.slashed.get(index)
        if before != item.amount + item.staked:
            yield f"slashes[{index}]: {item.node} had {before} wei at stake, the slash says {item.amount + item.staked}"


def _check(name: str, problems: list[str], fine: str) -> Check:
    if not problems:
        return Check(name, True, fine)
    more = f" (and {len(problems) - MAXIMUM_PROBLEMS} more)" if len(problems) > MAXIMUM_PROBLEMS else ""
    return Check(name, False, "; ".join(problems[:MAXIMUM_PROBLEMS]) + more)
