"""`bsns audit report` over an Anvil: everything that happened is in it, every change of it is found, and no two forks
get mixed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from bsns.audit import AuditError, Check, pinned_history
from bsns.audit.block_report import BlockReport, first_difference, make_report, verify_report
from bsns.audit.block_report_view import MAXIMUM_WIDTH, print_report
from bsns.audit.entries import Place
from bsns.chain.client import ChainClient
from bsns.chain.deployment import ETHER
from bsns.chain.errors import ChainUnavailableError, EndpointRefusedError
from bsns.cli import app
from tests.anvil import running_anvil
from tests.integration.recorded_network import RecordedNetwork, RequestInFlight, key
from tests.integration.test_audit_record import RememberingClient, canonical, leaves, mutations, set_at, value_at

pytestmark = [pytest.mark.chain]


@dataclasses.dataclass
class Scene:
    """A network after everything that the report is about; `middle` is a block between the first requests and the
    rest.
    """

    network: RecordedNetwork
    honest: RequestInFlight
    expired: RequestInFlight
    challenged: RequestInFlight
    cheated: RequestInFlight
    waiting: RequestInFlight
    middle: int
    last: int

    async def report(self, first: int | None = None, last: int | None = None) -> BlockReport:
        return await make_report(self.network.client, self.network.deployment, first, last or self.last)

    async def verify(self, data: bytes, client: object | None = None) -> list[Check]:
        chain = cast("ChainClient", client or self.network.client)
        return await verify_report(data, chain, self.network.deployment)


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with RecordedNetwork.running(archive=True) as network:
        operators, nodes = network.operators, [item.address for item in network.nodes]
        honest = await network.honest_request()
        expired = await network.open()
        await network.anvil.pass_time(61)
        await network.send(network.publisher, "InferenceEscrow", "claimRefund", expired.request_id)
        await network.send(network.publisher, "InferenceEscrow", "withdrawCredit", network.requester.address)
        challenged = await network.open()
        await network.route(challenged)
        middle = (await network.client.head()).number
        await finish_challenged(network, challenged)
        await network.publish_plan(2, network.plan)
        await network.send(operators[0], "NodeRegistry", "addStake", nodes[0], value=ETHER)
        await network.send(operators[2], "NodeRegistry", "thaw", nodes[2], ETHER // 2)
        await network.anvil.pass_time(5)
        cheated = await network.cheated_request()
        await network.send(network.publisher, "NodeRegistry", "withdrawCredit", operators[0].address)
        await network.send(operators[3], "NodeRegistry", "beginExit", nodes[3])
        await network.anvil.pass_time(20_001)
        await network.send(operators[2], "NodeRegistry", "withdraw", nodes[2])
        await network.send(operators[3], "NodeRegistry", "withdraw", nodes[3])
        waiting = await network.open()
        await network.anvil.mine(3)
        last = (await network.client.head()).number
        await network.anvil.mine(2)
        yield Scene(network, honest, expired, challenged, cheated, waiting, middle, last)


async def finish_challenged(network: RecordedNetwork, request: RequestInFlight) -> None:
    """Everybody honest, and somebody challenges stage 1 all the same."""
    await network.commit(request)
    await network.draw(request)
    made = await network.attest(request, 1)
    await network.reveal_stages(request)
    await network.reveal_attestations(request, made)
    await network.tally(request)
    bond = (await network.client.call("OutputVerification", "terms")).challengeBond
    await network.send(key("challenger"), "OutputVerification", "challenge", request.request_id, 1, value=bond)
    made = await network.attest(request, 2)
    await network.reveal_attestations(request, made)
    await network.tally(request, [1])
    await network.settle(request)


def failed(checks: tuple[Check, ...] | list[Check]) -> list[str]:
    return [f"{item.name}: {item.detail}" for item in checks if not item.ok]


# --------------------------------------------------------------------------------------------------- what a report says


async def test_report_has_everything_and_every_check_holds() -> None:
    async with scene() as on:
        report = await on.report()
        assert failed(report.checks) == []
        nodes = {item.node: item for item in report.stakes.nodes}
        names = [item.address for item in on.network.nodes]
        assert (nodes[names[0]].added, nodes[names[0]].end, nodes[names[0]].status) == (3 * ETHER, 3 * ETHER, "Active")
        assert (nodes[names[1]].slashed, nodes[names[1]].status) == (3 * ETHER // 2, "Jailed")
        assert (nodes[names[2]].withdrawn, nodes[names[2]].thaw_started) == (ETHER // 2, ETHER // 2)
        assert (nodes[names[3]].withdrawn, nodes[names[3]].end, nodes[names[3]].status) == (5 * ETHER, 0, "Absent")

        found = report.assignments
        assert [item.name for item in found.models] == ["toy"]
        assert [(item.epoch, item.consents) for item in found.plans] == [(1, tuple(names[:3])), (2, tuple(names[:3]))]
        assert [item.epoch for item in found.activations] == [1, 2]
        for item in found.activations:
            before = await on.network.client.block(item.block.number - 1)
            assert before is not None
            assert before.timestamp < item.effective_at <= item.block.timestamp
        routed = [on.honest, on.challenged, on.cheated]
        assert [item.request_id for item in found.routes] == [item.request_id for item in routed]

        requests = {item.request_id: item for item in report.payments.requests}
        endings = {key: item.ending and item.ending.because for key, item in requests.items()}
        assert endings == {
            on.honest.request_id: "settled",
            on.expired.request_id: "expired",
            on.challenged.request_id: "settled",
            on.cheated.request_id: "verdict",
            on.waiting.request_id: None,
        }
        assert requests[on.waiting.request_id].status == "Open"
        sums = report.totals
        deposit = requests[on.honest.request_id].deposit
        assert (sums.deposits_opened, sums.deposits_end) == (5 * deposit, deposit)
        assert sums.refunded_by_verdict == sums.refunded_after_expiry == deposit
        withdrawals = [(item.contract, item.account) for item in report.payments.withdrawals]
        assert withdrawals == [
            ("InferenceEscrow", on.network.requester.address),
            ("NodeRegistry", on.network.operators[0].address),
        ]

        verdicts = {item.request_id: item for item in report.verdicts}
        assert verdicts[on.honest.request_id].accepted
        (challenge,) = verdicts[on.challenged.request_id].challenges
        assert (challenge.stage, challenge.outcome) == (1, "refuted")
        cheat = verdicts[on.cheated.request_id]
        assert (cheat.sampled, cheat.rounds, cheat.accepted, cheat.blamed_stage) == (True, 2, False, 1)
        assert [(item.round, item.stage, item.verdict) for item in cheat.tallies][-1] == (2, 1, "Rejected")
        (slash,) = report.slashes
        assert (slash.node, slash.reason, slash.request_id, slash.stage) == (
            names[1],
            "IncorrectOutput",
            on.cheated.request_id,
            1,
        )
        assert [item.node for item in report.jailings] == [names[1]]
        await every_place_holds_a_log(on, report)
        text = shown(report)
        assert max(len(line) for line in text.splitlines()) <= MAXIMUM_WIDTH
        assert "checks, all hold" in text
        assert "refuted" in text
        assert text.count("FAILED") == 0


async def every_place_holds_a_log(on: Scene, report: BlockReport) -> None:
    """Each `at` of the report is the place of a log on chain, and each log that matters is in the report."""
    events = await on.network.client.events_between(0, on.last)
    there = {Place(e.block_number, e.transaction_hash, e.log_index): e.name for e in events}
    named = set(places(report))
    assert named <= set(there)
    silent = {"DutyOpened", "DutyClosed", "RequestConcluded", "EndpointChanged", "DocumentAnnounced"}
    assert {there[at] for at in set(there) - named} <= silent


def places(value: Any) -> list[Place]:
    if isinstance(value, Place):
        return [value]
    if isinstance(value, tuple):
        return [at for item in value for at in places(item)]
    if dataclasses.is_dataclass(value):
        return [at for item in dataclasses.fields(value) for at in places(getattr(value, item.name))]
    return []


def shown(report: BlockReport) -> str:
    page = io.StringIO()
    print_report(report, Console(width=200, highlight=False, markup=False, file=page))
    return page.getvalue()


async def test_ranges_that_meet_say_what_one_range_says() -> None:
    async with scene() as on:
        whole, early, late = await on.report(), await on.report(None, on.middle), await on.report(on.middle + 1)
        assert failed(early.checks) == failed(late.checks) == []
        assert early.stakes.movements + late.stakes.movements == whole.stakes.movements
        assert early.payments.credits + late.payments.credits == whole.payments.credits
        assert early.assignments.activations + late.assignments.activations == whole.assignments.activations
        ends = {item.node: (item.end, item.end_thawing) for item in early.stakes.nodes}
        assert ends == {item.node: (item.start, item.start_thawing) for item in late.stakes.nodes}
        credit = {(item.contract, item.account): item.end for item in early.payments.accounts if item.end}
        begun = {(item.contract, item.account): item.start for item in late.payments.accounts if item.start}
        assert credit == begun
        # The challenged request was routed before the ranges meet and settled after.
        (before,) = [item for item in early.payments.requests if item.request_id == on.challenged.request_id]
        (after,) = [item for item in late.payments.requests if item.request_id == on.challenged.request_id]
        assert (before.status, after.status) == ("Routed", "Settled")
        assert before.opened == after.opened
        assert early.totals.deposits_end == late.totals.deposits_start == before.deposit
        # A range of one block, and one without any event.
        one = await on.report(on.middle, on.middle)
        assert [item.request_id for item in one.assignments.routes] == [on.challenged.request_id]
        none = await on.report(on.last, on.last)
        assert none.stakes.movements == none.payments.credits == none.verdicts == ()
        assert failed(none.checks) == []


async def test_report_with_any_single_value_changed_is_found_and_the_field_named() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chooser = random.Random(seed)
    async with scene() as on:
        data = (await on.report(on.middle)).to_bytes()
        client = RememberingClient(on.network.client)
        assert failed(await on.verify(data, client)) == []
        document, derived = json.loads(data), json.loads(data)
        paths = list(leaves(document))
        header = [path for path in paths if path[0] in ("format", "domain", "first", "last")]
        sample = {*header, *chooser.sample(paths, 40)}
        for path in paths:
            before = value_at(document, path)
            for after in mutations(before, chooser):
                set_at(document, path, after)
                found = first_difference(document, derived, "")
                problems = failed(await on.verify(canonical(document), client)) if path in sample else []
                set_at(document, path, before)
                assert found is not None
                assert found.startswith(dotted(path)), f"{found} is not about {dotted(path)}"
                if path in sample:
                    assert problems, f"{dotted(path)}: {before!r} -> {after!r} was not noticed"
                if path in sample and path not in header:
                    assert f"first difference: {found}" in problems[0]
        print(f"{len(paths)} values, {len(sample)} of them by the whole verification")
        assert len(paths) > 1_000


def dotted(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


async def test_report_that_lost_or_repeats_an_entry_or_is_no_report_is_found() -> None:
    async with scene() as on:
        data = (await on.report(on.middle)).to_bytes()
        client = RememberingClient(on.network.client)
        for section in (("stakes", "movements"), ("payments", "credits"), ("slashes",), ("checks",)):
            for change in (lambda entries: entries[:-1], lambda entries: [*entries, entries[-1]]):
                document = json.loads(data)
                set_at(document, section, change(value_at(document, section)))
                assert failed(await on.verify(canonical(document), client)), f"{section}: was not noticed"
        for wrong in (b"", b"{}\n", b"[]\n", b"\xff", data[:-1], data.replace(b":", b": ", 1), data + b"\n"):
            (problem,) = failed(await on.verify(wrong, client))
            assert problem.startswith("report format: ")
        other = dataclasses.replace(on.network.deployment, treasury=on.network.requester.address)
        checks = await verify_report(data, cast("ChainClient", client), other)
        assert "first difference: domain.treasury" in failed(checks)[0]


# ------------------------------------------------------------------------------------------------------- what is wrong


async def test_balance_below_the_books_fails_and_money_forced_on_a_contract_does_not() -> None:
    async with RecordedNetwork.running(stages=1, archive=True) as network:
        await network.open()
        escrow, registry = network.deployment.inference_escrow, network.deployment.node_registry
        money = {name: await network.client.balance(name) for name in (escrow, registry)}
        await network.anvil.rpc("anvil_setBalance", escrow, hex(money[escrow] + 5))
        await network.anvil.rpc("anvil_setBalance", registry, hex(money[registry] - 1))
        await network.anvil.mine()
        report = await make_report(network.client, network.deployment, None, None)
        (problem,) = failed(report.checks)
        assert problem.startswith(f"STAKE-01: balance of NodeRegistry: {money[registry] - 1} wei on chain")
        assert [item.forced for item in report.balances if item.contract == "InferenceEscrow"] == [5]
        assert any("5 more on chain" in item.detail for item in report.checks)
        # The report says truly that the chain does not add up; whoever verifies it learns the same.
        checks = await verify_report(report.to_bytes(), network.client, network.deployment)
        assert failed(checks) == [problem]


class Meddling:
    """A chain client whose method `name` is replaced by `instead`, called with the real one and its arguments."""

    def __init__(self, client: ChainClient, name: str, instead: Callable[..., Awaitable[Any]]) -> None:
        self._client, self._name, self._instead = client, name, instead

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name != self._name:
            return real
        return lambda *arguments, **options: self._instead(real, *arguments, **options)


@pytest.mark.parametrize(
    ("function", "field", "check"),
    [
        ("accountOf", "staked", "STAKE-01: registry's view of each node"),
        ("accountOf", "jailedUntil", "STAKE-01: registry's view of each node"),
        ("totalSortitionStake", None, "registry's view of all stake that draws count"),
        ("creditOf", None, "contracts' view of each credit"),
        ("requestOf", "deposit", "MONEY-02: escrow's view of each request"),
        ("treasury", None, "treasury"),
    ],
)
async def test_view_that_contradicts_the_books_fails_its_check(function: str, field: str | None, check: str) -> None:
    async with RecordedNetwork.running(stages=1) as network:
        request = await network.open()
        await network.anvil.pass_time(61)
        await network.send(network.publisher, "InferenceEscrow", "claimRefund", request.request_id)

        async def wrong(real: Any, contract: str, name: str, *arguments: Any, block: Any = None) -> Any:
            answer = await real(contract, name, *arguments, block=block)
            if name != function:
                return answer
            if field is not None:
                return answer._replace(**{field: getattr(answer, field) + 1})
            return network.requester.address if isinstance(answer, str) else answer + 1

        client = cast("ChainClient", Meddling(network.client, "call", wrong))
        problems = failed((await make_report(client, network.deployment, None, None)).checks)
        assert [text.split(": ")[0] for text in problems] == [check.split(": ", maxsplit=1)[0]]
        assert problems[0].startswith(check)


async def test_ranges_that_cannot_be_reported_on_are_refused_with_advice() -> None:
    async with RecordedNetwork.running(stages=1) as network:
        head, deployment = (await network.client.head()).number, network.deployment
        hasty = cast("Any", network.client).client

        async def refusal(first: int | None, last: int | None, **changes: Any) -> str:
            known = dataclasses.replace(deployment, **changes)
            with pytest.raises(AuditError) as caught:
                await make_report(hasty, known, first, last)
            return str(caught.value)

        assert "give the earlier block with --from" in await refusal(5, 4)
        assert f"give --to {head} or less" in await refusal(1, head + 1)
        assert f"give --to {head} or more" in await refusal(1, head - 1, first_block=head)
        # Anvil without history keeps the newest state only.
        assert "archive node" in await refusal(1, head - 1)
        # Nothing after that block tells of the nodes before it; the registry's sums do.
        late = dataclasses.replace(deployment, first_block=head - 2)
        problems = failed((await make_report(network.client, late, None, None)).checks)
        assert [text.split(":")[0] for text in problems] == ["registry's view of all stake that draws count"]


async def test_fork_that_changes_while_it_is_read_gives_no_report() -> None:
    async with RecordedNetwork.running(stages=1, archive=True) as network:
        snapshot = await network.anvil.rpc("evm_snapshot")
        await network.open()
        before = await make_report(network.client, network.deployment, None, None)

        async def replace_fork(real: Any, block_hash: bytes) -> Any:
            nonlocal snapshot
            if snapshot is not None:
                await network.anvil.rpc("evm_revert", snapshot)
                snapshot = None
                await network.anvil.pass_time(7)
                await network.anvil.mine(3)
            return await real(block_hash)

        client = cast("ChainClient", Meddling(network.client, "events", replace_fork))
        with pytest.raises(ChainUnavailableError, match="reorganised"):
            await make_report(client, network.deployment, None, None)
        # The report of the other fork is true to that fork, and is not this chain's.
        checks = await verify_report(before.to_bytes(), network.client, network.deployment)
        assert "last.hash" in failed(checks)[0]
        assert failed((await make_report(network.client, network.deployment, None, None)).checks) == []


async def test_old_blocks_in_small_chunks_give_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as on:
        expected = (await on.report(on.middle)).to_bytes()
        monkeypatch.setattr(pinned_history, "UNSETTLED_BLOCKS", 5)
        monkeypatch.setattr(pinned_history, "BLOCKS_A_CHUNK", 16)
        sizes: list[int] = []
        seen: list[tuple[str, int, int]] = []

        async def narrow(real: Any, first: int, last: int, **options: Any) -> Any:
            sizes.append(last - first + 1)
            if last - first >= 6:
                raise EndpointRefusedError("the RPC endpoint refused: query returned more than 10000 results")
            return await real(first, last, **options)

        client = cast("ChainClient", Meddling(on.network.client, "events_between", narrow))
        report = await make_report(client, on.network.deployment, on.middle, on.last, lambda *step: seen.append(step))
        assert report.to_bytes() == expected
        assert max(sizes) == 16
        reading = [step for step in seen if step[0] == "reading the range"]
        assert [step[1] for step in reading] == sorted({step[1] for step in reading})
        assert reading[-1][1:] == (on.last - on.middle + 1, on.last - on.middle + 1)

        async def replaced(real: Any, number: int) -> Any:
            block = await real(number)
            return dataclasses.replace(block, hash=bytes(32)) if asked(number) else block

        anchor, questions = on.last - 5, iter(range(100))

        def asked(number: int) -> bool:
            return number == anchor and next(questions) > 2

        client = cast("ChainClient", Meddling(on.network.client, "block", replaced))
        with pytest.raises(ChainUnavailableError, match=f"block {anchor} was replaced"):
            await make_report(client, on.network.deployment, on.middle, on.last)


async def test_name_that_is_no_text_spoils_nobodys_report() -> None:
    """The contract takes any bytes for a model's name; whoever reads logs has to."""
    async with RecordedNetwork.running(stages=1) as network:
        artifact = network.client.client._contracts["ShardAssignments"]  # type: ignore[attr-defined]
        data = artifact.encode_abi("registerModel", args=[bytes([1] * 32), bytes([2] * 32), 3, "A\x1b[31mZZZZ"])
        await network.anvil.rpc("anvil_impersonateAccount", network.publisher.address)
        call = {"from": network.publisher.address, "to": network.deployment.shard_assignments}
        await network.anvil.rpc("eth_sendTransaction", {**call, "data": data.replace("5a5a5a5a", "ff5afe5a")})
        await network.anvil.mine()
        report = await make_report(network.client, network.deployment, None, None)
        assert report.assignments.models[-1].name == "A\x1b[31m\\xffZ\\xfeZ"
        assert failed(await verify_report(report.to_bytes(), network.client, network.deployment)) == []
        assert "\x1b[31m" not in shown(report)


# --------------------------------------------------------------------------------------------------------- the command


async def command(network: RecordedNetwork, folder: Path, *arguments: str, rpc: str | None = None) -> Result:
    """`bsns audit report` with these arguments."""
    network.deployment.save(folder / "deployment.json")
    where = ["--rpc", rpc or network.anvil.rpc_url, "--deployment", str(folder / "deployment.json")]
    return await asyncio.to_thread(CliRunner().invoke, app, ["audit", "report", *where, *arguments])


async def test_command_writes_shows_and_verifies_a_report(tmp_path: Path) -> None:
    async with scene() as on:
        file, blocks = tmp_path / "report.json", ("--from", str(on.middle), "--to", str(on.last))
        made = await command(on.network, tmp_path, *blocks, "--out", str(file))
        assert (made.exit_code, made.stderr) == (0, "")
        assert "Slashes and jailings (2)" in made.stdout
        assert made.stdout.endswith("checks, all hold\n")
        assert max(len(line) for line in made.stdout.splitlines()) <= MAXIMUM_WIDTH
        as_json = await command(on.network, tmp_path, *blocks, "--json")
        assert as_json.stdout.encode() == file.read_bytes() == (await on.report(on.middle)).to_bytes()
        verified = await command(on.network, tmp_path, "--verify", str(file))
        assert verified.exit_code == 0
        assert "ok      every field: derived again" in verified.stdout
        document = json.loads(file.read_bytes())
        document["slashes"][0]["amount"] = str(int(document["slashes"][0]["amount"]) + 1)
        file.write_bytes(canonical(document))
        forged = await command(on.network, tmp_path, "--verify", str(file), "--json")
        assert forged.exit_code == 1
        found = json.loads(forged.stdout)
        assert not found["holds"]
        (problem,) = [item for item in found["checks"] if not item["ok"]]
        assert problem["name"] == "every field"
        assert problem["detail"].startswith('first difference: slashes[0].amount: "15000000')
        whole = await command(on.network, tmp_path)
        assert whole.exit_code == 0
        assert f"Blocks       {on.network.deployment.first_block} to " in whole.stdout


async def test_command_says_what_to_do_about_wrong_input(tmp_path: Path) -> None:
    async with RecordedNetwork.running(stages=1) as network, running_anvil(chain_id=1) as other:
        head = (await network.client.head()).number

        async def told(code: int, *arguments: str, rpc: str | None = None) -> str:
            result = await command(network, tmp_path, *arguments, rpc=rpc)
            assert result.exit_code == code, result.output
            return result.stderr

        assert "give the earlier block" in await told(2, "--from", "3", "--to", "2")
        assert f"give --to {head} or less" in await told(2, "--to", str(head + 1))
        assert "archive node" in await told(2, "--to", str(head - 1))
        assert "leave --from, --to and --out out" in await told(2, "--verify", str(tmp_path / "x"), "--from", "1")
        assert "cannot be read" in await told(2, "--verify", str(tmp_path / "x"))
        assert "is not a folder" in await told(2, "--out", str(tmp_path / "x" / "y"))
        assert "is on chain 1" in await told(4, rpc=other.rpc_url)
        assert "no answer" in await told(4, rpc="http://127.0.0.1:9")
        network.deployment = dataclasses.replace(network.deployment, node_registry=network.requester.address)
        assert "there is no NodeRegistry at" in await told(4)
