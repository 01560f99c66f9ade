"""The requester's client over real gRPC and a real chain, with nodes that compute nothing: every way a request can
go.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bsns.audit import export, verify
from bsns.protocol.commitments import token_bytes
from bsns.protocol.sampling import SamplingParameters
from bsns.requester import (
    AnswerInvalidError,
    Client,
    InsufficientFundsError,
    InvalidRequestError,
    NotServedError,
    RefundNotDueError,
    RequestLimits,
    UnavailableError,
)
from bsns.requester.journal import Journal
from bsns.requester.route_choice import RouteWishes
from tests.integration.recorded_network import FEE_PER_TOKEN, PROMPT, RecordedNetwork, key, quick_terms, until
from tests.integration.synthetic_nodes import ANSWER, Misbehaviour, SyntheticSwarm

pytestmark = [pytest.mark.chain]

LIMITS = RequestLimits(
    connect_s=5, open_session_s=10, first_token_s=10, next_token_s=10, close_s=5, evidence_s=10, settlement_grace_s=0.3,
    settlement_s=60,
)  # fmt: skip
SAMPLING = SamplingParameters(maximum_tokens=8)


@contextlib.asynccontextmanager
async def running(
    state: Path, wrong: Misbehaviour | None = None, *, sampled: bool = True, share_prompt: bool = True
) -> AsyncIterator[tuple[SyntheticSwarm, Client]]:
    terms = quick_terms(sampling_rate_bps=10_000 if sampled else 0)
    async with (
        RecordedNetwork.running(terms) as network,
        SyntheticSwarm(network, wrong or Misbehaviour()).serving() as swarm,
        asyncio.timeout(90),
    ):
        client = await Client.connect(
            network.anvil.rpc_url,
            network.deployment,
            network.requester,
            state,
            limits=LIMITS,
            share_prompt=share_prompt,
        )
        async with client:
            yield swarm, client


async def balance(client: Client) -> int:
    return await client.chain.balance(client.address)


async def test_request_honest_network_answers_and_settles(tmp_path: Path) -> None:
    async with running(tmp_path) as (swarm, client):
        seen: list[int] = []
        said: list[str] = []
        answer = await client.request(
            PROMPT, SAMPLING, on_token=lambda token, _: seen.append(token), on_progress=said.append
        )
        assert answer.token_ids == tuple(seen) == ANSWER
        assert (answer.status, answer.finish_reason) == ("Settled", "stop")
        quote = await client.quote(PROMPT, 8)
        assert answer.fee_wei == quote.fee_wei == quote.fee_per_token * (len(PROMPT) + 8)
        assert answer.charged == quote.fee_per_token * (len(PROMPT) + len(ANSWER))
        assert answer.time_to_first_token_s is not None
        assert [item.node for item in answer.route] == [node.address for node in swarm.network.nodes[:3]]
        assert set(answer.transactions) >= {"open", "draw"}
        assert any("route" in text for text in said)
        disclosure = client.disclosure(answer.request_id, with_tokens=True)
        record = await export(client.chain, client.deployment, answer.request_id, disclosure)
        assert record.tokens is not None
        assert record.tokens.answer == ANSWER
        assert record.has_full_evidence
        assert [item for item in await verify(record, client.chain, client.deployment) if not item.ok] == []


@pytest.mark.parametrize("share_prompt", [True, False])
async def test_request_shows_its_prompt_to_the_last_stage_unless_it_declines(
    tmp_path: Path, share_prompt: bool
) -> None:
    async with running(tmp_path, sampled=False, share_prompt=share_prompt) as (swarm, client):
        await client.request(PROMPT, SAMPLING, wait_for_settlement=False)
        assert swarm.shown == {0: b"", 1: b"", 2: token_bytes(PROMPT) if share_prompt else b""}


async def test_request_secrets_are_on_disk_before_the_deposit_is_paid(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(never_route=True)) as (_, client):
        submit = client._submitter.submit
        found: list[Any] = []

        async def watched(*arguments: Any, **options: Any) -> Any:
            found.extend(Journal(tmp_path).entries())
            raise RuntimeError("power cut")

        client._submitter.submit = watched  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="power cut"):
            await client.request(PROMPT, SAMPLING)
        client._submitter.submit = submit  # type: ignore[method-assign]
        (entry,) = found
        assert entry.input.tokens == PROMPT
        assert len(entry.secret) == len(entry.salt) == 32
        (path,) = (tmp_path / "requests").iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(UnavailableError, match="never opened"):
            await client.resume(entry.request_id)


async def test_request_that_chooses_its_route_needs_nobody_to_route_it(tmp_path: Path) -> None:
    async with running(tmp_path) as (swarm, client):
        answer = await client.request(PROMPT, SAMPLING, wishes=RouteWishes(within_s=5.0))
        assert (answer.token_ids, answer.status) == (ANSWER, "Settled")
        head = await client.chain.head()
        opened, routed = [
            (await client.chain.events_between(0, head.number, contract="InferenceEscrow", name=name))[-1]
            for name in ("RequestOpened", "RequestRouted")
        ]
        assert opened.transaction_hash == routed.transaction_hash
        assert list(routed.arguments["nodes"]) == [node.address for node in swarm.network.nodes[:3]]
        record = await export(client.chain, client.deployment, answer.request_id, client.disclosure(answer.request_id))
        assert [item for item in await verify(record, client.chain, client.deployment) if not item.ok] == []


async def test_request_that_avoids_the_only_node_of_a_stage_says_so_and_pays_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, sampled=False) as (swarm, client):
        before = await balance(client)
        avoided = frozenset({swarm.network.nodes[1].address})
        with pytest.raises(UnavailableError, match="stage 1 has nobody left: of 1 nodes 1 are avoided"):
            await client.request(PROMPT, SAMPLING, wishes=RouteWishes(avoided))
        assert await balance(client) == before
        assert not list(Journal(tmp_path).entries())


async def test_request_whose_plan_is_replaced_before_it_is_paid_is_quoted_again(tmp_path: Path) -> None:
    async with running(tmp_path, sampled=False) as (swarm, client):
        submit, plans, said = client._submitter.submit, list[bytes](), list[str]()

        async def overtaken(*arguments: Any, **options: Any) -> Any:
            if arguments[1] == "open":
                plans.append(arguments[2])
                if len(plans) == 1:
                    await swarm.network.publish_plan(2, swarm.network.plan, 2 * FEE_PER_TOKEN)
                    await swarm.network.anvil.pass_time(2)  # the new one is active
            return await submit(*arguments, **options)

        client._submitter.submit = overtaken  # type: ignore[method-assign]
        answer = await client.request(PROMPT, SAMPLING, on_progress=said.append, wait_for_settlement=False)
        assert answer.token_ids == ANSWER
        assert plans[1] == swarm.network.plan_id != plans[0]
        assert answer.fee_wei == 2 * FEE_PER_TOKEN * (len(PROMPT) + 8)
        assert any("quoting again" in line for line in said)
        [entry] = Journal(tmp_path).entries()
        assert (entry.plan_id, entry.deposit) == (plans[1], answer.fee_wei)


async def test_request_whose_new_plan_costs_more_than_allowed_is_not_paid(tmp_path: Path) -> None:
    async with running(tmp_path, sampled=False) as (swarm, client):
        submit = client._submitter.submit
        quote = await client.quote(PROMPT, 8)

        async def overtaken(*arguments: Any, **options: Any) -> Any:
            await swarm.network.publish_plan(2, swarm.network.plan, 2 * FEE_PER_TOKEN)
            await swarm.network.anvil.pass_time(2)
            return await submit(*arguments, **options)

        client._submitter.submit = overtaken  # type: ignore[method-assign]
        with pytest.raises(InvalidRequestError, match="more than the"):
            await client.request(PROMPT, SAMPLING, fee_wei=quote.fee_wei)


async def test_request_without_a_desk_tallies_and_settles_itself(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(silent_desk=True)) as (_, client):
        answer = await client.request(PROMPT, SAMPLING)
        assert answer.status == "Settled"
        assert set(answer.transactions) >= {"open", "draw", "tally", "settle"}


async def test_request_unsampled_without_a_desk_settles_itself(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(silent_desk=True), sampled=False) as (_, client):
        assert (await client.request(PROMPT, SAMPLING)).status == "Settled"


async def test_request_stage_that_refuses_is_named_with_the_way_back(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(refuse_at_stage=2)) as (swarm, client):
        with pytest.raises(NotServedError) as caught:
            await client.request(PROMPT, SAMPLING)
        message = str(caught.value)
        assert message.startswith("node of stage 2 refused: CAPACITY_EXHAUSTED: four sessions are open")
        assert f"bsns refund 0x{caught.value.request_id.hex()}" in message
        with pytest.raises(RefundNotDueError) as early:
            await client.refund(caught.value.request_id)
        assert early.value.seconds_left is not None
        assert 0 < early.value.seconds_left <= 301
        before = await balance(client)
        await swarm.network.anvil.pass_time(early.value.seconds_left)
        refund = await client.refund(caught.value.request_id)
        assert set(refund.transactions) == {"claim_refund", "withdraw_credit"}
        assert refund.withdrawn_wei == (await client.quote(PROMPT, 8)).fee_wei
        assert await balance(client) > before
        with pytest.raises(RefundNotDueError, match="withdrawn already"):
            await client.refund(caught.value.request_id)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Misbehaviour(forge_statement=True), "not signed by the last stage"),
        (Misbehaviour(swap_token=True), "not those that the last stage signed"),
        (Misbehaviour(accept_too_many=True, claim_more_tokens=True), "not those that the last stage signed"),
        (Misbehaviour(accept_more_than_drafted=True), "accepts 9 of 2 drafts"),
        (Misbehaviour(claim_more_tokens=True), "ended with 4 tokens"),
    ],
)
async def test_request_tokens_that_the_last_stage_did_not_sign_are_refused(
    tmp_path: Path, wrong: Misbehaviour, message: str
) -> None:
    async with running(tmp_path, wrong) as (_, client):
        with pytest.raises(AnswerInvalidError, match=message):
            await client.request(PROMPT, SAMPLING)
        (entry,) = Journal(tmp_path).entries()
        assert (entry.stage, entry.answer) == ("opened", ())


async def test_request_that_nobody_routes_expires_with_the_way_back(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(never_route=True)) as (swarm, client):
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(catch(client.request(PROMPT, SAMPLING)))
            await until(lambda: opened(client))
            await swarm.network.anvil.pass_time(61)
        assert isinstance(request.result(), NotServedError)
        (summary,) = await client.requests()
        assert (summary.status, summary.refundable_in_s) == ("Expired", None)
        assert (await client.refund(summary.request_id)).withdrawn_wei == summary.fee_wei


async def test_request_stream_that_breaks_after_tokens_still_comes_to_an_end(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(break_stream_after=1)) as (_, client):
        answer = await client.request(PROMPT, SAMPLING)
        assert answer.token_ids == ANSWER[:1]
        assert answer.finish_reason == "interrupted"
        assert answer.status == "Settled"


async def test_request_nodes_that_do_not_commit_leave_the_deposit_refundable(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(commit_nothing=True)) as (swarm, client):
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(catch(client.request(PROMPT, SAMPLING)))
            await until(lambda: answered(tmp_path))
            await swarm.network.anvil.pass_time(301)
        assert isinstance(request.result(), NotServedError)
        assert "did not all commit" in str(request.result())


async def test_request_whose_expired_deposit_somebody_else_claimed_is_not_served_either(
    network: RecordedNetwork, tmp_path: Path
) -> None:
    """The coordinator claims in the very block that passes the deadline: "expired" may never be seen."""
    async with await Client.connect(
        network.anvil.rpc_url, network.deployment, network.requester, tmp_path, limits=LIMITS
    ) as client:
        request = asyncio.create_task(catch(client.request(PROMPT, SAMPLING)))
        await until(lambda: opened(client))
        await network.anvil.pass_time(301)
        assert isinstance(await request, NotServedError)
        (entry,) = Journal(tmp_path).entries()
        await network.send(network.nodes[0], "InferenceEscrow", "claimRefund", entry.request_id)
        with pytest.raises(NotServedError, match="can be taken back now") as refused:
            await client.resume(entry.request_id)
        assert refused.value.refundable_at is not None
        assert (await client.refund(entry.request_id)).withdrawn_wei == entry.deposit


async def test_resume_after_a_crash_between_answer_and_draw_finishes_the_request(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        request = asyncio.create_task(client.request(PROMPT, SAMPLING))
        await until(lambda: answered(tmp_path))
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        (entry,) = Journal(tmp_path).entries()
        answer = await client.resume(entry.request_id)
        assert (answer.status, answer.token_ids) == ("Settled", ANSWER)
        assert (await client.resume(entry.request_id)).charged == answer.charged


async def test_resume_of_a_request_that_was_only_opened_serves_it(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        carry_on = client._carry_on

        async def crash(*_: Any) -> Any:
            raise RuntimeError("power cut")

        client._carry_on = crash  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            await client.request(PROMPT, SAMPLING)
        client._carry_on = carry_on  # type: ignore[method-assign]
        (entry,) = Journal(tmp_path).entries()
        # As if the crash had come before the journal heard of the receipt.
        Journal(tmp_path).write(replace(entry, stage="prepared", transactions={}))
        assert (await client.resume(entry.request_id)).token_ids == ANSWER


async def test_request_without_waiting_returns_after_the_draw(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(silent_desk=True)) as (_, client):
        answer = await client.request(PROMPT, SAMPLING, wait_for_settlement=False)
        assert (answer.status, answer.charged) == ("Committed", None)
        assert (await client.resume(answer.request_id)).status == "Settled"


async def test_request_stage_without_evidence_makes_the_record_shorter(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(hide_evidence_at=1)) as (_, client):
        answer = await client.request(PROMPT, SAMPLING)
        disclosure = client.disclosure(answer.request_id)
        assert [item.stage for item in disclosure.evidence] == [0, 2]
        record = await export(client.chain, client.deployment, answer.request_id, disclosure)
        assert [item for item in await verify(record, client.chain, client.deployment) if not item.ok] == []


async def test_request_stop_string_closes_the_session_and_pays_for_what_was_drawn(tmp_path: Path) -> None:
    async with running(tmp_path, Misbehaviour(wait_for_close=True)) as (swarm, client):
        client._tokenizer = LetterTokenizer()  # type: ignore[assignment]
        answer = await client.request(PROMPT, SAMPLING, stop=["w"])
        assert (answer.text, answer.finish_reason) == ("v", "stop")
        assert answer.token_ids == ANSWER[:2]
        assert answer.request_id in swarm.closed
        assert answer.charged == FEE_PER_TOKEN * (len(PROMPT) + 2)


class LetterTokenizer:
    """Token n is the n-th letter."""

    def decode(self, token_ids: Any) -> str:
        return "".join(chr(97 + token) for token in token_ids)

    def stream_decoder(self, stop: Any) -> Any:
        from bsns.requester.chat_tokenizer import StreamDecoder

        return StreamDecoder(self, stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "tokens", "options", "message"),
    [
        ((), 8, {}, "empty"),
        ((-1,), 8, {}, "outside the vocabulary"),
        ("text", 8, {}, "tokenizer"),
        (PROMPT, 200_000, {}, "the contracts allow"),
        (PROMPT, 8, {"fee_wei": 1}, "allow more"),
        (PROMPT, 8, {"stop": ["x"]}, "stop strings need"),
    ],
)
async def test_request_that_cannot_be_pays_nothing(
    network: RecordedNetwork, tmp_path: Path, prompt: Any, tokens: int, options: Any, message: str
) -> None:
    async with await Client.connect(
        network.anvil.rpc_url, network.deployment, network.requester, tmp_path, limits=LIMITS
    ) as client:
        before = await balance(client)
        with pytest.raises(InvalidRequestError, match=message):
            await client.request(prompt, SamplingParameters(maximum_tokens=tokens), **options)
        assert await balance(client) == before
        assert Journal(tmp_path).entries() == ()


async def test_quote_without_a_plan_of_that_publisher_says_so(network: RecordedNetwork, tmp_path: Path) -> None:
    async with await Client.connect(
        network.anvil.rpc_url, network.deployment, network.requester, tmp_path, limits=LIMITS
    ) as client:
        with pytest.raises(UnavailableError, match="no active plan"):
            await client.quote(PROMPT, 8, publisher=network.nodes[0].address)


async def test_request_from_an_account_that_cannot_pay_says_what_it_needs(
    network: RecordedNetwork, tmp_path: Path
) -> None:
    pauper = key("pauper")
    async with await Client.connect(
        network.anvil.rpc_url, network.deployment, pauper, tmp_path, limits=LIMITS
    ) as client:
        with pytest.raises(InsufficientFundsError, match=f"account {pauper.address} has 0 wei"):
            await client.request(PROMPT, SAMPLING)
        assert Journal(tmp_path).entries() == ()


async def test_connect_wrong_endpoint_is_unavailable(network: RecordedNetwork, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        await Client.connect("http://127.0.0.1:9", network.deployment, network.requester, tmp_path)


@pytest.fixture
async def network() -> AsyncIterator[RecordedNetwork]:
    async with RecordedNetwork.running(stages=1) as found:
        yield found


async def opened(client: Client) -> bool:
    return any(item.status == "Open" for item in await client.requests())


async def answered(folder: Path) -> bool:
    return any(entry.stage == "answered" for entry in Journal(folder).entries())


async def catch(work: Any) -> Any:
    try:
        return await work
    except NotServedError as error:
        return error
