"""Records of real requests on a real chain: complete, verified, and broken by every single change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
from eth_utils.address import to_checksum_address

from bsns.audit import AuditError, Check, export, show, verify, verify_bytes
from bsns.audit.rules import RULES
from bsns.chain.client import ChainClient
from bsns.chain.errors import ContractError
from bsns.protocol.record import Disclosure, VerificationRecord
from tests.integration.recorded_network import RecordedNetwork, RequestInFlight, key, quick_terms

pytestmark = [pytest.mark.chain]


@contextlib.asynccontextmanager
async def recorded(kind: str) -> AsyncIterator[tuple[RecordedNetwork, VerificationRecord]]:
    terms = quick_terms(sampling_rate_bps=0) if kind == "unsampled" else quick_terms()
    async with RecordedNetwork.running(terms) as network:
        request = await (network.cheated_request() if kind == "cheated" else network.honest_request())
        yield network, await export(network.client, network.deployment, request.request_id, request.disclosure())


def failed(checks: list[Check]) -> list[str]:
    return [f"{item.name}: {item.detail}" for item in checks if not item.ok]


@pytest.mark.parametrize("kind", ["honest", "cheated", "unsampled"])
async def test_record_of_a_concluded_request_holds(kind: str) -> None:
    async with recorded(kind) as (network, record):
        assert failed(await verify(record, network.client, network.deployment)) == []
        data = record.to_bytes()
        assert VerificationRecord.from_bytes(data) == record
        assert failed(await verify_bytes(data, network.client)) == []
        assert record.has_full_evidence
        assert record.status == ("Refunded" if kind == "cheated" else "Settled")
        assert len(record.rounds) == (2 if kind == "cheated" else 1)
        assert bool(record.slashes) == (kind == "cheated")
        text = show(record)
        assert record.request.request_id.hex() in text
        assert ("Slashed" in text) == (kind == "cheated")


@pytest.mark.parametrize("kind", ["honest", "cheated", "unsampled"])
async def test_record_with_any_one_character_changed_fails_and_names_a_check(kind: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chooser = random.Random(seed)
    async with recorded(kind) as (network, record):
        client = cast("ChainClient", RememberingClient(network.client))
        document = json.loads(record.to_bytes())
        tried = 0
        named: set[str] = set()
        for path in leaves(document):
            before = value_at(document, path)
            for after in mutations(before, chooser):
                set_at(document, path, after)
                data = canonical(document)
                set_at(document, path, before)
                found = failed(await verify_bytes(data, client))
                assert found, f"{'.'.join(map(str, path))}: {before!r} -> {after!r} was not noticed"
                named |= {text.split(": ")[1] for text in found if text.startswith("rule: ")}
                tried += 1
        print(f"{tried} changes, all noticed; rules that noticed: {sorted(named)}")
        assert tried > 400
        # The rules see what they are for by themselves, not only the comparison with the chain.
        idle = {"slashes", "jailings"} if kind != "cheated" else set()
        idle |= {"committee seats", "attestation reveals", "distances"} if kind == "unsampled" else set()
        assert {name.split(": ")[0] for name, _ in RULES} - named <= idle


async def test_record_that_lost_or_repeats_an_entry_fails() -> None:
    async with recorded("cheated") as (network, record):
        client = cast("ChainClient", RememberingClient(network.client))
        document = json.loads(record.to_bytes())
        lists = [path for path in containers(document) if value_at(document, path)]
        for path in lists:
            entries = value_at(document, path)
            for changed in (entries[:-1], [*entries, entries[-1]]):
                set_at(document, path, changed)
                found = failed(await verify_bytes(canonical(document), client))
                set_at(document, path, entries)
                # Evidence is the requester's to show or not; a whole stage may be missing if no token ids lean on it.
                assert found, f"{path}: an entry less or more was not noticed"


async def test_record_that_promises_other_contracts_fails_against_the_known_deployment() -> None:
    async with recorded("unsampled") as (network, record):
        other = dataclasses.replace(network.deployment, treasury=network.requester.address)
        assert any(
            text.startswith(("contracts", "chain: domain"))
            for text in failed(await verify(record, network.client, other))
        )


async def test_record_as_of_an_earlier_block_still_holds_after_more_happened() -> None:
    async with RecordedNetwork.running() as network:
        request = await network.open()
        await network.route(request)
        early = await export(network.client, network.deployment, request.request_id)
        await network.commit(request)
        await network.draw(request)
        late = await export(network.client, network.deployment, request.request_id)
        assert (early.status, late.status) == ("Routed", "Committed")
        for record in (early, late):
            assert failed(await verify(record, network.client, network.deployment)) == []


async def test_record_of_an_expired_request_shows_the_whole_refund() -> None:
    async with RecordedNetwork.running() as network:
        request = await network.open()
        await network.anvil.pass_time(61)
        await network.send(network.publisher, "InferenceEscrow", "claimRefund", request.request_id)
        record = await export(network.client, network.deployment, request.request_id, request_nonce(request))
        assert failed(await verify(record, network.client, network.deployment)) == []
        assert record.payment is not None
        assert record.payment.refunded == record.request.deposit
        assert "Route        none" in show(record)


async def test_record_of_a_withheld_reveal_blames_and_slashes_the_silent_stage() -> None:
    async with RecordedNetwork.running() as network:
        request = await network.open()
        await network.route(request)
        await network.commit(request)
        await network.draw(request)
        made = await network.attest(request, 1)
        await network.reveal_stages(request, request.work[:2])
        await network.reveal_attestations(request, {k: v for k, v in made.items() if k != (0, 3)})
        await network.anvil.pass_time(80)
        await network.tally(request)
        record = await export(network.client, network.deployment, request.request_id, request.disclosure())
        assert failed(await verify(record, network.client, network.deployment)) == []
        assert record.conclusion is not None
        assert record.conclusion.blamed_stage == 2
        assert [item.reason for item in record.slashes] == ["RevealWithheld"]
        assert network.nodes[3].address in {item.node for item in record.jailings}


async def test_record_of_a_refuted_challenge_keeps_the_verdict() -> None:
    async with RecordedNetwork.running(quick_terms(sampling_rate_bps=0)) as network:
        request = await network.open()
        await network.route(request)
        await network.commit(request)
        await network.draw(request)
        await network.reveal_stages(request)
        await network.tally(request)
        bond = (await network.client.call("OutputVerification", "terms")).challengeBond
        await network.send(key("challenger"), "OutputVerification", "challenge", request.request_id, 1, value=bond)
        made = await network.attest(request, 2)
        await network.reveal_attestations(request, made)
        await network.tally(request, [1])
        await network.settle(request)
        record = await export(network.client, network.deployment, request.request_id, request.disclosure())
        assert failed(await verify(record, network.client, network.deployment)) == []
        (challenge,) = record.challenges
        assert challenge.resolution is not None
        assert not challenge.resolution.upheld
        assert record.status == "Settled"


async def test_export_of_an_unknown_request_says_what_may_be_wrong() -> None:
    async with RecordedNetwork.running(stages=1) as network:
        with pytest.raises(AuditError, match="another chain or deployment"):
            await export(network.client, network.deployment, bytes(32))


async def test_export_with_a_false_disclosure_is_refused() -> None:
    async with RecordedNetwork.running(quick_terms(sampling_rate_bps=0)) as network:
        request = await network.honest_request()
        false = dataclasses.replace(request.disclosure(), nonce=1)
        with pytest.raises(AuditError, match="request id"):
            await export(network.client, network.deployment, request.request_id, false)


async def test_verify_stakes_are_folded_through_top_ups_thaws_and_slashes() -> None:
    """The second request's snapshot needs every kind of change to the stakes before it."""
    async with RecordedNetwork.running() as network:
        await network.cheated_request()
        operators, nodes = network.operators, [item.address for item in network.nodes]
        await network.send(operators[0], "NodeRegistry", "addStake", nodes[0], value=10**18)
        await network.send(operators[2], "NodeRegistry", "thaw", nodes[2], 10**18)
        await network.send(operators[3], "NodeRegistry", "addStake", nodes[3], value=10**17)
        await network.anvil.pass_time(61)
        await network.send(operators[1], "NodeRegistry", "addStake", nodes[1], value=3 * 10**18)
        await network.send(operators[1], "NodeRegistry", "leaveJail", nodes[1])
        await network.anvil.pass_time(5)
        request = await network.honest_request()
        record = await export(network.client, network.deployment, request.request_id, request.disclosure())
        assert failed(await verify(record, network.client, network.deployment)) == []
        assert record.entropy is not None
        assert record.entropy.snapshot_stake > 10 * 10**18


def request_nonce(request: RequestInFlight) -> Disclosure:
    disclosure = request.disclosure(tokens=False)
    return dataclasses.replace(disclosure, evidence=())


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def containers(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all lists in a JSON document."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from containers(item, (*path, name))
    elif isinstance(value, list):
        yield path
        for index, item in enumerate(value):
            yield from containers(item, (*path, index))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all values in a JSON document that are not null."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif value is not None:
        yield path


def value_at(document: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        document = document[part]
    return document


def set_at(document: Any, path: tuple[str | int, ...], value: Any) -> None:
    value_at(document, path[:-1])[path[-1]] = value


def mutations(value: Any, chooser: random.Random) -> list[Any]:
    """The value with one character changed; for an address also another one that is well-formed."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value ^ 1 << chooser.randrange(1, 16)]
    alphabet = "0123456789abcdef" if value.startswith("0x") else "0123456789" if value.isdigit() else "abcXYZ9"
    at = chooser.randrange(2 if value.startswith("0x") else 0, len(value)) if value else 0
    present = value[at : at + 1]
    # Neither the same letter, nor one that differs in its case alone: for an address that is no change.
    other = chooser.choice([letter for letter in alphabet if letter.lower() != present.lower()])
    found = [value[:at] + other + value[at + 1 :]]
    if value.startswith("0x") and len(value) == 42:
        found.append(to_checksum_address(bytes(byte ^ 1 for byte in bytes.fromhex(value[2:]))))
    return found


class RememberingClient:
    """A chain that answers each question once over the wire: nothing on it changes during these tests."""

    def __init__(self, client: ChainClient) -> None:
        self._client = client
        self._answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def ask(*arguments: Any, **options: Any) -> Any:
            question = repr((name, arguments, sorted(options.items())))
            if question not in self._answers:
                try:
                    self._answers[question] = await method(*arguments, **options)
                except ContractError as error:
                    self._answers[question] = error
            answer = self._answers[question]
            if isinstance(answer, ContractError):
                raise answer
            return answer

        return ask
