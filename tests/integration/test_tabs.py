"""Requests that are paid out of tabs, on real processes: many in one batch, a collector that dies, and one that is lied
to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bsns.audit.block_report import make_report
from bsns.audit.block_report_view import print_report
from bsns.audit.pinned_history import UNSETTLED_BLOCKS
from bsns.chain.deployment import TabTerms, Terms
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import secret_hash
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.plan import Assignment
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.tabs import (
    CollectedTicket,
    Segment,
    SignedTicket,
    StageResult,
    Ticket,
    TicketGrant,
    Voucher,
    drawn_tokens,
)
from bsns.protocol.typed_data import tabs_domain
from bsns.requester.client import Client
from bsns.requester.collector import CollectorConnection
from bsns.requester.errors import TicketRefusedError, UnavailableError
from bsns.requester.journal import Journal
from bsns.requester.tab import Tab
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.weight_store import WeightStore
from bsns.v1 import tabs_pb2
from tests.integration.network import Network, run_command, running_network
from tests.unit.runtime_models import greedy, prepared_tiny_model

PROMPTS = ((5, 17, 60, 33), (8, 2, 71), (90, 4, 4, 4, 12), (33, 1))
GREEDY = SamplingParameters(maximum_tokens=9)
FUNDS = 10**17
WAIT_S = 90.0


def short_terms() -> Terms:
    tabs = TabTerms(secret_window=12, draw_window=40, opening_window=16, close_period=60, tokens_per_draw=40)
    return dataclasses.replace(Terms.for_devnet(), tabs=tabs)


@dataclass
class Requester:
    client: Client
    tab: Tab
    connection: CollectorConnection
    journal: Journal

    async def ask(self, prompt: tuple[int, ...]) -> Any:
        return await self.client.request(list(prompt), GREEDY, tab=self.tab)


@asynccontextmanager
async def requester(
    network: Network, folder: Path, signer: KeySigner, *, funds: int = FUNDS
) -> AsyncIterator[Requester]:
    endpoint = str(network.devnet.coordinator.ready["endpoint"])
    async with await Client.connect(network.devnet.rpc_url, network.devnet.deployment, signer, folder) as client:
        connection = CollectorConnection(endpoint)
        try:
            tab = client.tab(await client.publisher(), connection)
            if funds:
                await tab.fund(funds)
            yield Requester(client, tab, connection, Journal(folder))
        finally:
            await connection.close()


async def funded_signer(network: Network) -> KeySigner:
    """Another requester, who was sent money by the first."""
    key = KeySigner(bytes.fromhex(network.devnet.requester_key_file.read_text().strip()))
    other = KeySigner(secrets.token_bytes(32))
    await Submitter(network.chain, key).transfer(other.address, 10**18)
    return other


@asynccontextmanager
async def tiny_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stages: int = 3, replicas: int = 1
) -> AsyncIterator[tuple[Network, WeightStore]]:
    monkeypatch.setenv("BSNS_COORDINATOR_BATCH_SECONDS", "6")
    monkeypatch.setenv("BSNS_NODE_BATCH_PATIENCE_SECONDS", "2")
    folder = prepared_tiny_model(tmp_path / "cache")
    async with running_network(
        tmp_path / "net", folder, node_count=4, stage_count=stages, replicas=replicas, terms=short_terms()
    ) as network:
        yield network, WeightStore(folder)


def expected_answer(store: WeightStore, prompt: tuple[int, ...]) -> tuple[int, ...]:
    answer = greedy([StageExecutor(store, 0, len(store.manifest.units))], prompt, GREEDY.maximum_tokens)
    ends = [index for index, token in enumerate(answer) if token in store.manifest.end_token_ids]
    return tuple(answer[: ends[0] + 1] if ends else answer)


@pytest.mark.timeout(420)
async def test_eight_requests_of_two_requesters_are_one_batch_of_which_one_leaf_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiny_network(tmp_path, monkeypatch) as (network, store):
        chain, deployment = network.chain, network.devnet.deployment
        domain = tabs_domain(deployment.chain_id, deployment.request_tabs)
        first = KeySigner(bytes.fromhex(network.devnet.requester_key_file.read_text().strip()))
        second = await funded_signer(network)
        async with (
            requester(network, tmp_path / "first", first) as one,
            requester(network, tmp_path / "second", second) as two,
        ):
            answers = []
            for prompt in PROMPTS:
                answers += await asyncio.gather(one.ask(prompt), two.ask(prompt))
            for number, answer in enumerate(answers):
                assert answer.token_ids == expected_answer(store, PROMPTS[number // 2])
                assert (answer.status, answer.transactions) == ("Delivered", {})
            assert not await network.events("RequestOpened"), "nothing was sent for them"

            posted = (await network.await_event("BatchPosted", WAIT_S)).arguments
            batch, batch_id = posted["batch"], bytes(posted["batchId"])
            segments = tuple(Segment(*item) for item in batch[5])
            assert sum(item.tickets for item in segments) == len(answers)
            assert {item.requester for item in segments} == {first.address, second.address}
            await asyncio.gather(one.tab.follow(WAIT_S), two.tab.follow(WAIT_S))
            drawn = (await network.await_event("BatchDrawn", WAIT_S)).arguments
            own = [item.tab.voucher_secret for who in (one, two) for item in who.journal.entries() if item.tab]
            by_hash = {secret_hash(item): item for item in own}
            offsets = drawn_tokens(batch_id, segments, bytes(drawn["entropy"]), by_hash, 40)
            assert tuple(drawn["offsets"]) == offsets, "both secrets counted"
            await challenge_one_that_was_not_drawn(network, two)
            settled = (await network.await_event("BatchSettled", WAIT_S)).arguments

            opened = await network.events("LeafOpened")
            assert opened
            for event in opened:
                request_id = bytes(event.arguments["requestId"])
                assert await status_when_over(network, request_id) == RequestStatus.SETTLED, "a committee judged it"
            assert len(await network.events("AttestationRevealed")) >= 3 * len(opened)

            # The challenged one was in order: the bond is its nodes'.
            [challenged] = await network.events("LeafChallenged")
            assert challenged.arguments["challenger"] == second.address
            assert await status_when_over(network, bytes(challenged.arguments["requestId"])) == RequestStatus.SETTLED
            await two.tab.see_through()
            [resolved] = await network.events("ChallengeResolved")
            assert (resolved.arguments["upheld"], resolved.contract) == (False, "RequestTabs")

            # Money: what was charged went into opened requests, to the nodes and to the treasury, and nowhere else.
            charged = sum(event.arguments["amount"] for event in await network.events("TabCharged"))
            assert charged == sum(answer.charged for answer in answers)
            assert charged == settled["taken"] + settled["paidToExecutors"] + settled["protocolFee"]
            for who in (one, two):
                standing = await who.tab.standing()
                assert standing.balance == FUNDS - standing.collected
                assert (standing.outstanding, standing.tickets, standing.next_ticket) == (0, 4, 4)
            shares = dict(batch[6])
            fee_bps = (await chain.call("InferenceEscrow", "terms")).protocolFeeBps
            assert sum(shares.values()) == charged - charged * fee_bps // 10_000
            assert len(shares) == 3, "each stage's node"

            # The collector has its bond back, an operator takes its pay out.
            await until_no_credit(network, one.tab.collector)
            operator = (await chain.call("NodeRegistry", "accountOf", next(iter(shares)))).operator
            owed = await chain.call("RequestTabs", "creditOf", operator)
            assert owed
            number = [child.ready["node"] for child in network.devnet.nodes].index(next(iter(shares)))
            known = ["--rpc", network.devnet.rpc_url, "--deployment", str(network.devnet.deployment_file)]
            known += ["--data-dir", str(network.devnet.folder / f"node-{number}")]
            monkeypatch.setenv("BSNS_NODE_PASSWORD", "devnet")
            done = await run_command([sys.executable, "-m", "node_client.cli", "withdraw", *known])
            assert "credit of RequestTabs" in done.output, done.error
            assert await chain.call("RequestTabs", "creditOf", operator) == 0

            # An auditor finds the same from the chain alone.
            # So far back that logs are read by ranges of blocks, and no longer by the hash of each.
            await chain._web3.provider.make_request("anvil_mine", [hex(UNSETTLED_BLOCKS + 8)])  # type: ignore[arg-type]
            report = await make_report(chain, deployment, None, None)
            assert report.holds, [check for check in report.checks if not check.ok]
            [audited] = report.tabs.batches
            assert (audited.status, audited.tickets, audited.charged) == ("Settled", len(answers), charged)
            assert (audited.taken, audited.paid) == (settled["taken"], settled["paidToExecutors"])
            assert {item.requester: item.funded for item in report.tabs.states} == {
                first.address: FUNDS, second.address: FUNDS,
            }  # fmt: skip
            assert report.totals.tabs_charged == charged
            assert (report.totals.pots_end, report.totals.tab_bonds_end) == (0, 0)
            print_report(report, Console(file=StringIO()))

            # The same digests by the contract.
            entry = one.journal.entries()[0]
            ticket = one.tab.signed_ticket(entry).ticket
            assert bytes(await chain.call("RequestTabs", "requestIdOf", ticket.as_tuple())) == entry.request_id
            assert entry.tab is not None
            grant = TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(entry.tab.grant))
            results = tuple(StageResult.from_message(tabs_pb2.StageResult.FromString(it)) for it in entry.tab.results)
            plan = await chain.call("ShardAssignments", "planOf", entry.plan_id)
            collected = CollectedTicket(grant.ticket, results)
            assert collected.check(domain, entry.plan_id, bytes(plan.root)) == entry.request_id


@pytest.mark.timeout(420)
async def test_nodes_see_a_batch_through_whose_collector_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiny_network(tmp_path, monkeypatch) as (network, _):
        first = KeySigner(bytes.fromhex(network.devnet.requester_key_file.read_text().strip()))
        async with requester(network, tmp_path / "first", first) as one:
            answer = await one.ask(PROMPTS[0])
            await network.await_event("BatchPosted", WAIT_S)
            network.devnet.coordinator.process.send_signal(signal.SIGKILL)
            await network.devnet.coordinator.process.wait()
            network.devnet.take_dead()
            for name in ("BatchDrawn", "LeafOpened"):
                await network.await_event(name, WAIT_S)
            # With the collector dead its requester has nobody to show secrets to; it sees its request through itself.
            alone = one.client.tab(one.tab.collector)
            settlement = asyncio.ensure_future(status_when_over(network, answer.request_id, alone))
            await network.await_event("BatchSettled", WAIT_S)
            assert await settlement == RequestStatus.SETTLED


async def challenge_one_that_was_not_drawn(network: Network, who: Requester) -> None:
    """As soon as the drawn leaves are open."""
    async with asyncio.timeout(WAIT_S):
        while True:
            opened = await network.events("LeafOpened")
            if opened and opened[-1].arguments["pending"] == 0:
                break
            await asyncio.sleep(0.2)
    drawn = {bytes(event.arguments["requestId"]) for event in opened}
    left = [item.request_id for item in who.journal.entries() if bytes(item.request_id) not in drawn]
    await who.tab.challenge(left[0])


async def until_no_credit(network: Network, account: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if not await network.chain.call("RequestTabs", "creditOf", account):
                return
            await asyncio.sleep(0.5)


async def status_when_over(network: Network, request_id: bytes, alone: Tab | None = None) -> RequestStatus:
    """What becomes of a request on the chain, for which `alone`'s requester does what is overdue."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if alone is not None:
                await alone.see_through()
            status = RequestStatus((await network.chain.call("InferenceEscrow", "requestOf", request_id)).status)
            if status.is_over:
                return status
            await asyncio.sleep(0.5)


@pytest.mark.timeout(420)
async def test_node_that_dies_in_mid_answer_is_replaced_and_its_replacement_signs_and_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiny_network(tmp_path, monkeypatch, stages=2, replicas=2) as (network, _):
        first = KeySigner(bytes.fromhex(network.devnet.requester_key_file.read_text().strip()))
        sampling = SamplingParameters(temperature=1.5, seed=48, maximum_tokens=40)
        async with requester(network, tmp_path / "first", first) as one:
            undisturbed = await one.client.request(list(PROMPTS[2]), sampling, tab=one.tab)
            assert len(undisturbed.token_ids) > 6, "long enough to be interrupted"
            killed: list[str] = []
            known = {child.ready["node"]: child for child in network.devnet.nodes}

            def kill_the_last_stage(_token: int, _text: str) -> None:
                if killed:
                    return
                entry = max(one.journal.entries(), key=lambda item: item.tab.number if item.tab else -1)
                assert entry.tab is not None
                grant = TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(entry.tab.grant))
                killed.append(grant.route[-1].assignment.node)
                known[killed[0]].process.kill()

            answer = await one.client.request(list(PROMPTS[2]), sampling, tab=one.tab, on_token=kill_the_last_stage)
            assert answer.token_ids == undisturbed.token_ids
            assert answer.status == "Delivered"
            entry = one.journal.read(answer.request_id)
            assert entry.tab is not None
            results = [StageResult.from_message(tabs_pb2.StageResult.FromString(it)) for it in entry.tab.results]
            assert results[-1].served_by.assignment.node not in killed
            assert [item.node for item in answer.route] == [item.served_by.assignment.node for item in results]
            posted = (await network.await_event("BatchPosted", WAIT_S)).arguments
            paid = {node for node, _ in posted["batch"][6]}
            assert results[-1].served_by.assignment.node in paid


@pytest.mark.timeout(420)
async def test_collector_takes_nothing_that_is_not_covered_signed_or_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiny_network(tmp_path, monkeypatch) as (network, _):
        deployment = network.devnet.deployment
        domain = tabs_domain(deployment.chain_id, deployment.request_tabs)
        signer = await funded_signer(network)
        async with requester(network, tmp_path / "state", signer, funds=0) as one:
            plan = (await network.events("PlanPublished"))[-1].arguments
            told = await one.connection.tab(signer.address)
            now = (await network.chain.head()).timestamp

            def signed(**changes: Any) -> SignedTicket:
                values: dict[str, Any] = {
                    "plan_id": bytes(plan["planId"]), "requester": signer.address, "number": told.next_ticket,
                    "input_commitment": b"\1" * 32, "secret_hash": b"\2" * 32, "prompt_tokens": 4,
                    "maximum_tokens": 9, "deadline": now + told.ticket_seconds,
                }  # fmt: skip
                ticket = Ticket(**{**values, **changes})
                return SignedTicket(ticket, signer.sign_digest(ticket.request_id(domain)))

            async def refusal(ticket: SignedTicket) -> str:
                with pytest.raises(TicketRefusedError) as found:
                    await one.connection.take(ticket, ())
                return found.value.reason.removeprefix("ERROR_REASON_")

            assert await refusal(signed()) == "NOT_COVERED", "nothing is on the tab"
            await one.tab.fund(13 * int(plan["feePerToken"]) * 3)
            assert await refusal(signed(number=1)) == "TICKET_OUT_OF_ORDER"
            assert await refusal(signed(plan_id=b"\7" * 32)) == "WRONG_PLAN"
            assert await refusal(signed(deadline=now + 5)) == "NOT_COVERED"
            assert await refusal(signed(maximum_tokens=2**31)) == "NOT_COVERED"
            assert await refusal(signed(input_commitment=bytes(32))) == "NOT_COVERED"
            forged = signed()
            assert await refusal(SignedTicket(forged.ticket, signed(number=7).signature)) == "SIGNATURE_INVALID"
            grant = await one.connection.take(signed(), ())
            assert await one.connection.take(signed(), ()) == grant, "taken once"
            assert await refusal(signed(secret_hash=b"\3" * 32)) == "TICKET_OUT_OF_ORDER"
            everywhere = {Assignment.from_tuple(tuple(item)).node for item in plan["assignments"]}
            assert (await one.tab.standing()).next_ticket == 1
            with pytest.raises(TicketRefusedError, match="no node"):
                await one.connection.take(signed(number=1), everywhere)

            # Served for real; then the delivery is tampered with in each of its parts.
            answer = await one.ask(PROMPTS[0])
            assert answer.status == "Delivered"
            entry = one.journal.read(answer.request_id)
            assert entry.tab is not None
            results = [StageResult.from_message(tabs_pb2.StageResult.FromString(it)) for it in entry.tab.results]
            ticket = TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(entry.tab.grant)).ticket
            plan_root = bytes((await network.chain.call("ShardAssignments", "planOf", entry.plan_id)).root)
            for changed in (
                dataclasses.replace(results[0], commitment=b"\5" * 32),
                dataclasses.replace(results[0], output_tokens=results[0].output_tokens + 1),
                dataclasses.replace(results[0], served_by=results[1].served_by),
            ):
                with pytest.raises(ValueError, match=r"stage|token|signed"):
                    CollectedTicket(ticket, (changed, *results[1:])).check(domain, entry.plan_id, plan_root)
            first = TicketGrant.from_message(grant).ticket.ticket.request_id(domain)
            voucher = Voucher(signer.address, one.tab.collector, 2**90, b"\6" * 32)
            voucher = dataclasses.replace(voucher, signature=signer.sign_digest(voucher.digest(domain)))
            with pytest.raises(TicketRefusedError, match=r"not signed|plan|stage"):
                await one.connection.deliver(first, results, voucher)
            # An answer to the delivery that is lost: the same voucher is sent again, the answer is not promised twice.
            deliver = one.connection.deliver

            async def deliver_and_lose_the_answer(*given: Any) -> None:
                await deliver(*given)
                raise UnavailableError("the connection broke")

            monkeypatch.setattr(one.connection, "deliver", deliver_and_lose_the_answer)
            with pytest.raises(UnavailableError):
                await one.ask(PROMPTS[0])
            monkeypatch.setattr(one.connection, "deliver", deliver)
            [lost] = [item for item in one.journal.entries() if item.stage == "answered"]
            again = await one.client.resume_on_tab(one.tab, lost.request_id)
            assert again.token_ids == answer.token_ids
            paid = one.journal.read(lost.request_id).tab
            assert paid is not None
            assert lost.tab is not None
            assert (paid.delivered, paid.cumulative) == (True, answer.charged + again.charged)
            assert paid.voucher_secret == lost.tab.voucher_secret
            newest = (await one.connection.tab(signer.address)).newest_voucher
            assert int.from_bytes(newest.cumulative) == paid.cumulative
            await one.tab.close()
            assert await refusal(signed(number=3)) == "NOT_COVERED", "the tab is closing"


@pytest.mark.timeout(300)
async def test_commands_fund_ask_show_close_and_withdraw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiny_network(tmp_path, monkeypatch) as (network, store):
        devnet = network.devnet
        known = ["--rpc", devnet.rpc_url, "--deployment", str(devnet.deployment_file)]
        known += ["--key-file", str(devnet.requester_key_file), "--state-dir", str(tmp_path / "state")]
        collector = ["--coordinator", str(devnet.coordinator.ready["endpoint"])]

        async def bsns(*command: str, status: int = 0) -> Any:
            done = await run_command([sys.executable, "-m", "bsns.cli", *command])
            assert done.status == status, done.error
            return json.loads(done.output) if "--json" in command else done.output + done.error

        funded = await bsns("tab", "fund", str(FUNDS), *known, "--json")
        assert (int(funded["balance"]), funded["tickets"]) == (FUNDS, 0)
        prompt = ["--prompt-ids", ",".join(map(str, PROMPTS[0])), "--max-tokens", "9"]
        model = ["--model-folder", str(network.model_folder)]
        refused = await bsns("request", "--tab", *prompt, *known, *model, status=2)
        assert "--coordinator" in refused
        refused = await bsns("request", "--tab", "--record", "r.json", *collector, *prompt, *known, *model, status=2)
        assert "--record" in refused
        answer = await bsns("request", "--tab", *collector, *prompt, *known, *model, "--json", "--token-ids")
        assert (answer["status"], tuple(answer["token_ids"])) == ("Delivered", expected_answer(store, PROMPTS[0]))
        listed = await bsns("requests", *known, "--json")
        assert [item["status"] for item in listed["requests"]] == ["Delivered"]
        shown = await bsns("tab", "show", *collector, *known)
        assert "next ticket is 1" in " ".join(shown.split())
        await network.await_event("BatchPosted", WAIT_S)
        followed = await bsns("tab", "follow", *collector, *known, "--json")
        assert followed["batches_waiting"] == 0
        await network.await_event("BatchDrawn", WAIT_S)
        await bsns("tab", "close", *known)
        early = await bsns("tab", "withdraw", *known, status=3)
        assert "TabStillOpen" in early
        await asyncio.sleep(short_terms().tabs.close_period)
        back = await bsns("tab", "withdraw", *known, "--json")
        left = int((await bsns("tab", "show", *known, "--json"))["balance"])
        assert int(back["withdrawn_wei"]) == FUNDS - int(answer["charged"])
        assert left == 0
        assert "owes anything" in await bsns("tab", "withdraw", *known, status=2)
