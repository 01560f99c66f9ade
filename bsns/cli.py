"""`bsns`: ask a question and pay for it, see what became of it, take a deposit back; and audit anybody's request.

Owns how commands read options and report. Exit codes: 0 done, 1 an audit failed, 2 wrong use or input, 3 the
contracts refused, 4 chain or network unavailable, 5 paid but not served (refundable). Never asks a question. Tokens
and progress go to standard error with --json, which prints one JSON object on standard output. Heavy modules are
imported by the command that needs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import structlog
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bsns.chain.deployment import Deployment
    from bsns.chain.signer import KeySigner
    from bsns.requester.client import Client

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_NOT_SERVED: Final = 5
PASSWORD_VARIABLE: Final = "BSNS_KEYSTORE_PASSWORD"
AUDIT_PATIENCE_S: Final = 3.0
DEFAULT_MAXIMUM_TOKENS: Final = 256
MAXIMUM_PROMPT_BYTES: Final = 4 * 1024 * 1024

_HELP: Final = (
    "Ask a question and pay for it, see what became of it, take a deposit back; and audit anybody's request.\n\n"
    "Exit codes: 0 done, 1 an audit failed, 2 wrong use or input, 3 the contracts or a collector refused, 4 chain or "
    "network unavailable, 5 paid but not served (the deposit can be taken back)."
)

app = typer.Typer(name="bsns", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
audit = typer.Typer(
    no_args_is_help=True,
    help="The record of a request, the plan of a model, or all of a range of blocks: checked from the chain alone.",
)
app.add_typer(audit, name="audit")
tab = typer.Typer(
    no_args_is_help=True,
    help="Money put down once for many requests: `bsns request --tab` pays out of it, without a transaction.",
)
app.add_typer(tab, name="tab")
account = typer.Typer(
    no_args_is_help=True,
    help="An account of a gateway, for clients of OpenAI's API: the gateway holds what you deposit.",
)
app.add_typer(account, name="account")

_Rpc = Annotated[str, typer.Option("--rpc", envvar="BSNS_RPC_URL", help="JSON-RPC endpoint of the chain.")]
_DeploymentFile = Annotated[
    Path, typer.Option("--deployment", envvar="BSNS_DEPLOYMENT", help="Deployment file (JSON).")
]
_KnownDeployment = Annotated[
    Path | None,
    typer.Option(
        "--deployment",
        envvar="BSNS_DEPLOYMENT",
        help="Insist on these contracts instead of those that the record names.",
    ),
]
_KeyFile = Annotated[
    Path, typer.Option("--key-file", envvar="BSNS_KEY_FILE", help="Raw hex key or keystore v3, readable by you only.")
]
_PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--keystore-password-file", "--password-file", help=f"Password of a keystore v3; else ${PASSWORD_VARIABLE}."
    ),
]
_StateDir = Annotated[
    Path,
    typer.Option("--state-dir", envvar="BSNS_STATE_DIR", help="Where secrets and prompts of your requests are kept."),
]
_ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model-folder", envvar="BSNS_MODEL_FOLDER", help="A prepared model; default: the one `make model` prepared."
    ),
]
_Publisher = Annotated[
    str | None, typer.Option("--publisher", help="Whose plan to pay for; default: the newest active.")
]
_Coordinator = Annotated[
    str | None,
    typer.Option("--coordinator", envvar="BSNS_COORDINATOR", help="host:port of the coordinator whose plan you pay."),
]
_CoordinatorCertificate = Annotated[
    Path | None,
    typer.Option(
        "--coordinator-certificate",
        envvar="BSNS_COORDINATOR_CERTIFICATE",
        help="Its certificate (PEM); needed off loopback.",
    ),
]
_MaximumTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, help=f"Most tokens of the answer; default: {DEFAULT_MAXIMUM_TOKENS}, one for an image."
    ),
]
_Image = Annotated[
    Path | None,
    typer.Option("--image", help="An image file instead of text, for an image classifier's --model-folder."),
]
_PromptIds = Annotated[
    str | None, typer.Option("--prompt-ids", help="The prompt as token ids, with commas, instead of text.")
]
_Prompt = Annotated[str | None, typer.Argument(help="What to ask; - reads standard input.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
_Gateway = Annotated[str, typer.Option("--gateway", envvar="BSNS_GATEWAY", help="Address of the gateway.")]
_ApiKeyFile = Annotated[
    Path,
    typer.Option("--api-key-file", envvar="BSNS_API_KEY_FILE", help="File with the API key, readable by you only."),
]
_RequestId = Annotated[str, typer.Argument(help="Request id, 0x and 64 hexadecimal digits.", metavar="ID")]
_RecordFile = Annotated[Path, typer.Argument(help="Record file.", metavar="RECORD")]

DEFAULT_STATE_DIR: Final = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "bsns"


class _UsageError(Exception):
    """An option or file that cannot be used; the message says what to give instead."""


# ------------------------------------------------------------------------------------------------------------ requester


@app.command()
def quote(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    prompt: _Prompt = None,
    prompt_ids: _PromptIds = None,
    image: _Image = None,
    max_tokens: _MaximumTokens = None,
    publisher: _Publisher = None,
    model_folder: _ModelFolder = None,
    as_json: _Json = False,
) -> None:
    """What an answer would cost. Needs no key and pays nothing."""

    async def run() -> None:
        async with _reading_client(rpc, deployment, model_folder) as client:
            asked = _asked(client, prompt, prompt_ids, image)
            found = await client.quote(asked, _maximum_tokens(max_tokens, image), publisher=publisher)
        if as_json:
            _print_json(_plain(found))
            return
        _table(
            "Quote",
            {
                "deposit": f"{found.fee_wei:,} wei ({found.fee_per_token:,} a token; unused tokens come back)",
                "tokens": f"{found.prompt_tokens} of prompt, at most {found.maximum_tokens} of answer",
                "plan": f"0x{found.plan_id.hex()} of {found.publisher}, {found.stage_count} stages",
            },
        )

    _run(run())


@app.command()
def request(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    prompt: _Prompt = None,
    prompt_ids: _PromptIds = None,
    image: _Image = None,
    password_file: _PasswordFile = None,
    max_tokens: _MaximumTokens = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: no limit.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    fee: Annotated[int | None, typer.Option("--fee-wei", min=0, help="Most to deposit; default: the quote.")] = None,
    publisher: _Publisher = None,
    avoid: Annotated[
        list[str] | None,
        typer.Option("--avoid", help="Node that must not serve; may be repeated. You choose the route."),
    ] = None,
    within_ms: Annotated[
        float | None,
        typer.Option("--within-ms", help="Longest round trip to a node, measured from here. You choose the route."),
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Write the verification record here.")] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Show token ids in the output and disclose them in the record.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for verdict and payment.")] = True,
    share_prompt: Annotated[
        bool,
        typer.Option(
            "--share-prompt/--no-share-prompt",
            help="Show the prompt to the node of the last stage too, which can then draft what the answer quotes.",
        ),
    ] = True,
    on_tab: Annotated[
        bool, typer.Option("--tab", help="Pay out of your tab with the plan's publisher (`bsns tab fund`).")
    ] = False,
    coordinator: _Coordinator = None,
    coordinator_certificate: _CoordinatorCertificate = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    model_folder: _ModelFolder = None,
    as_json: _Json = False,
) -> None:
    """Pay for an answer and stream it. Your prompt or image goes to the nodes of the route, never to the chain.

    Of an image you get the label of the class that was drawn; the nodes hand out no probabilities.
    """

    async def run() -> None:
        from bsns.protocol.sampling import SamplingError, SamplingParameters
        from bsns.requester.route_choice import RouteWishes

        try:
            sampling = SamplingParameters(temperature, top_k, top_p, seed, _maximum_tokens(max_tokens, image))
        except SamplingError as error:
            raise _UsageError(str(error)) from error
        if record is not None and not record.parent.is_dir():
            raise _UsageError(f"{record.parent} is not a folder: the record could not be written there")
        if on_tab and record is not None:
            raise _UsageError("a request on a tab has no record of its own: leave --record out")
        wishes = RouteWishes(frozenset(avoid or ()), None if within_ms is None else within_ms / 1e3)
        async with _client(
            rpc, deployment, key_file, password_file, state_dir, model_folder, share_prompt=share_prompt
        ) as client:
            asked = _asked(client, prompt, prompt_ids, image)
            async with (
                _tab_of(client, on_tab, publisher, coordinator, coordinator_certificate) as used,
                await _view(client, asked, sampling.maximum_tokens, publisher, as_json) as stream,
            ):
                answer = await client.request(
                    asked,
                    sampling,
                    stop=stop or (),
                    on_token=stream.token,
                    on_progress=stream.progress,
                    fee_wei=fee,
                    publisher=publisher,
                    wishes=wishes,
                    wait_for_settlement=wait,
                    tab=used,
                )
            shown = asked if token_ids and isinstance(asked, list) else None
            await _report_answer(client, answer, shown, record, token_ids, as_json)

    _run(run())


@app.command()
def requests(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Take up this request where it stopped.")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="With --resume: write the record here.")] = None,
    coordinator: _Coordinator = None,
    coordinator_certificate: _CoordinatorCertificate = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    model_folder: _ModelFolder = None,
    as_json: _Json = False,
) -> None:
    """Your requests and where they stand; or go on with one after a crash."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, model_folder) as client:
            if resume is not None:
                with _Stream(as_json) as stream:
                    shown = {"on_token": stream.token, "on_progress": stream.progress}
                    if client.is_on_tab(_request_id(resume)):
                        async with _tab_of(client, True, None, coordinator, coordinator_certificate) as used:
                            answer = await client.resume_on_tab(used, _request_id(resume), **shown)
                    else:
                        answer = await client.resume(_request_id(resume), **shown)
                    if not stream.has_shown_text:
                        stream.token(0, answer.text)
                await _report_answer(client, answer, None, record, False, as_json)
                return
            found = await client.requests()
        if as_json:
            _print_json({"requests": [_plain(item) for item in found]})
            return
        table = Table("request", "status", "deposit (wei)", "tokens", "refundable in")
        for item in found:
            due = "" if item.refundable_in_s is None else f"{item.refundable_in_s} s"
            due = "now" if item.status == "Expired" else due
            tokens = f"{item.prompt_tokens} + {item.answer_tokens}"
            table.add_row(f"0x{item.request_id.hex()}", item.status, f"{item.fee_wei:,}", tokens, due)
        Console(width=None if sys.stdout.isatty() else 160).print(table)

    _run(run())


@app.command()
def refund(
    request_id: _RequestId,
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Take back the deposit of a request that was not served, and whatever else the escrow owes you."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, None) as client:
            found = await client.refund(_request_id(request_id))
        if as_json:
            _print_json(_plain(found))
        else:
            typer.echo(f"{found.withdrawn_wei:,} wei are back at {client.address}")

    _run(run())


# -------------------------------------------------------------------------------------------------------------- account


@account.command("open")
def account_open(
    gateway: _Gateway,
    key_file: _KeyFile,
    api_key_file: Annotated[Path, typer.Option("--api-key-file", help="Where to write the API key (mode 600).")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "bsns",
    per_request_wei: Annotated[int | None, typer.Option(min=0, help="Most that a request with it costs.")] = None,
    per_day_wei: Annotated[int | None, typer.Option(min=0, help="Most that it spends a day, UTC.")] = None,
    password_file: _PasswordFile = None,
    as_json: _Json = False,
) -> None:
    """An API key of a gateway for the account of your address, which is opened if it has none."""

    async def run() -> None:
        from bsns.requester.gateway_account import GatewayAccount

        if api_key_file.exists():
            raise _UsageError(f"{api_key_file} exists already: give another file, it may hold a key that is in use")
        signer = _signer(key_file, password_file)
        limits = {"per_request_wei": per_request_wei, "per_day_wei": per_day_wei}
        async with GatewayAccount(gateway) as opened:
            found = await opened.open(signer, name, limits)
        with os.fdopen(os.open(api_key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(found["secret"] + "\n")
        shown = {"account": found["account"]["id"], "key": found["id"], "api_key_file": str(api_key_file)}
        if as_json:
            _print_json(shown)
        else:
            _table("Account", {**shown, "next": f"OPENAI_BASE_URL={gateway}/v1 OPENAI_API_KEY=$(cat {api_key_file})"})

    _run(run())


@account.command("show")
def account_show(
    gateway: _Gateway,
    api_key_file: _ApiKeyFile,
    lines: Annotated[int, typer.Option(min=0, max=100, help="Lines of the statement.")] = 10,
    as_json: _Json = False,
) -> None:
    """Balance, what the key may spend, and the statement."""

    async def run() -> None:
        from bsns.requester.gateway_account import GatewayAccount

        async with GatewayAccount(gateway, _api_key(api_key_file)) as opened:
            found = await opened.account()
            movements = await opened.statement(lines) if lines else []
        if as_json:
            _print_json({**found, "movements": movements})
            return
        key = found["key"]
        limits = {
            name: f"{int(key[field]):,} wei"
            for name, field in (("most for a request", "per_request_wei"), ("most for a day", "per_day_wei"))
            if key[field] is not None
        }
        _table("Account", {
            "balance": f"{int(found['balance_wei']):,} wei",
            "spent today": f"{int(key['spent_today_wei']):,} wei",
            **limits,
            "address": str(found["address"]),
        })  # fmt: skip
        table = Table("when (UTC)", "what", "amount (wei)", "for")
        for item in movements:
            at = datetime.fromtimestamp(item["at"], UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
            table.add_row(at, item["kind"], f"{int(item['amount_wei']):,}", item["reference"])
        if movements:
            Console(width=None if sys.stdout.isatty() else 160).print(table)

    _run(run())


@account.command("deposit")
def account_deposit(
    amount: Annotated[int, typer.Argument(min=1, help="Wei to send to the gateway.")],
    gateway: _Gateway,
    api_key_file: _ApiKeyFile,
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    as_json: _Json = False,
) -> None:
    """Send money to the gateway from your address, and wait until it counts."""

    async def run() -> None:
        from bsns.chain.client import Web3ChainClient
        from bsns.requester.gateway_account import GatewayAccount

        signer = _signer(key_file, password_file)
        async with (
            GatewayAccount(gateway, _api_key(api_key_file)) as opened,
            await Web3ChainClient.connect(rpc, _deployment(deployment)) as chain,
        ):
            found = await opened.deposit(chain, signer, amount, lambda text: typer.echo(f"· {text}", err=True))
        if as_json:
            _print_json(found)
        else:
            typer.echo(f"the account holds {int(found['balance_wei']):,} wei")

    _run(run())


@account.command("withdraw")
def account_withdraw(
    amount: Annotated[int, typer.Argument(min=1, help="Wei to take out.")],
    gateway: _Gateway,
    api_key_file: _ApiKeyFile,
    as_json: _Json = False,
) -> None:
    """Take money out of the account; it goes to your address."""

    async def run() -> None:
        from bsns.requester.gateway_account import GatewayAccount

        async with GatewayAccount(gateway, _api_key(api_key_file)) as opened:
            found = await opened.withdraw(amount)
        if as_json:
            _print_json(found)
        else:
            typer.echo(f"{amount:,} wei are on their way to {found['recipient']} ({found['id']})")

    _run(run())


def _api_key(path: Path) -> str:
    from bsns.chain.key_file import KeyFileError, read_secret

    try:
        return read_secret(path).decode(errors="replace").strip()
    except KeyFileError as error:
        raise _UsageError(str(error)) from error


# ------------------------------------------------------------------------------------------------------------------ tab


@tab.command("fund")
def tab_fund(
    amount: Annotated[int, typer.Argument(min=1, help="Wei to put on the tab.")],
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Put money on your tab with the publisher of a plan. Funding a tab that is closing keeps it open."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client:
            found = client.tab(await client.publisher(publisher))
            sent = await found.fund(amount)
            _report_tab(await found.standing(), {"transaction": sent}, as_json)

    _run(run())


@tab.command("show")
def tab_show(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    coordinator: _Coordinator = None,
    coordinator_certificate: _CoordinatorCertificate = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """What your tab holds; with --coordinator also what is not on the chain yet."""

    async def run() -> None:
        async with (
            _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client,
            _tab_of(client, True, publisher, coordinator, coordinator_certificate, needed=False) as found,
        ):
            _report_tab(await found.standing(), {}, as_json)

    _run(run())


@tab.command("follow")
def tab_follow(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    coordinator: _Coordinator = None,
    coordinator_certificate: _CoordinatorCertificate = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Longest time to wait.")] = 600.0,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Give the draws of your batches your share of their entropy: show the secrets of your vouchers, or record them."""

    async def run() -> None:
        async with (
            _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client,
            _tab_of(client, True, publisher, coordinator, coordinator_certificate) as found,
        ):
            waiting = await found.follow(seconds)
            _report_tab(await found.standing(), {"batches_waiting": waiting}, as_json)

    _run(run())


@tab.command("challenge")
def tab_challenge(
    request_id: _RequestId,
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Have one of your requests judged by a committee that was not drawn. The bond comes back if a stage is wrong."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client:
            found = client.tab(await client.publisher(publisher))
            sent = await found.challenge(_request_id(request_id))
            _report_tab(await found.standing(), {"transaction": sent}, as_json)

    _run(run())


@tab.command("close")
def tab_close(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Begin to close your tab: what it holds can be taken out after the close period."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client:
            found = client.tab(await client.publisher(publisher))
            sent = await found.close()
            _report_tab(await found.standing(), {"transaction": sent}, as_json)

    _run(run())


@tab.command("withdraw")
def tab_withdraw(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    key_file: _KeyFile,
    password_file: _PasswordFile = None,
    publisher: _Publisher = None,
    state_dir: _StateDir = DEFAULT_STATE_DIR,
    as_json: _Json = False,
) -> None:
    """Take out what your closed tab holds, and what the contract owes you besides."""

    async def run() -> None:
        async with _client(rpc, deployment, key_file, password_file, state_dir, None, of_any_model=True) as client:
            amount, transactions = await client.tab(await client.publisher(publisher)).withdraw()
        if as_json:
            _print_json({"withdrawn_wei": amount, "transactions": dict(transactions)})
        else:
            typer.echo(f"{amount:,} wei are back at {client.address}")

    _run(run())


def _report_tab(standing: Any, more: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        _print_json({**_plain(standing), **more})
        return
    rows = {
        "holds": f"{standing.balance:,} wei, for requests of plans of {standing.collector}",
        "collected": f"{standing.collected:,} wei promised in {standing.tickets} tickets so far",
    }
    if standing.closes_at:
        rows["closes at"] = f"{standing.closes_at} (Unix seconds): then `bsns tab withdraw`"
    if standing.outstanding is not None:
        rows["not on the chain yet"] = f"{standing.outstanding:,} wei; the next ticket is {standing.next_ticket}"
    _table("Tab", rows | {name.replace("_", " "): str(value) for name, value in more.items()})


@contextlib.asynccontextmanager
async def _tab_of(
    client: Client,
    wanted: bool,
    publisher: str | None,
    coordinator: str | None,
    certificate: Path | None,
    *,
    needed: bool = True,
) -> Any:
    """The tab of `client`, connected to its collector if one is given; None if it is not `wanted`."""
    from bsns.requester.collector import CollectorConnection

    if not wanted:
        yield None
        return
    if coordinator is None:
        if needed:
            raise _UsageError("a tab needs its collector: give --coordinator host:port, or set BSNS_COORDINATOR")
        yield client.tab(await client.publisher(publisher))
        return
    connection = CollectorConnection(coordinator, certificate)
    try:
        yield client.tab(await client.publisher(publisher), connection)
    finally:
        await connection.close()


# --------------------------------------------------------------------------------------------------------------- models


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="Name of a model this release prepares, or a prepared folder.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines like this one, for the cuts shown.")] = 4,
    stages: Annotated[int | None, typer.Option(min=1, help="Default: as many as nodes.")] = None,
    objective: Annotated[str, typer.Option(help="throughput or latency.")] = "throughput",
    link_ms: Annotated[float, typer.Option(min=0.0, help="One way between any two machines, milliseconds.")] = 0.5,
    link_mbits: Annotated[float, typer.Option(min=0.001, help="Megabits a second between any two machines.")] = 1000.0,
    as_json: _Json = False,
) -> None:
    """A model as the planner sees it: its units and what they cost on this machine, and its best cuts."""
    from bsns.model_description import ModelUnavailableError, describe, prepared_folder, show_description
    from bsns.planning.problem import Link, Objective

    with _exit_codes():
        try:
            if objective not in list(Objective):
                raise _UsageError(f"objective is {objective!r}, expected one of {', '.join(Objective)}")
            found = describe(
                prepared_folder(name),
                nodes=nodes,
                link=Link(round(link_ms * 1e6), max(1, round(link_mbits * 125_000))),
                objective=Objective(objective),
                stage_count=stages,
                report=lambda line: typer.echo(line, err=True),
            )
        except ModelUnavailableError as error:
            raise _UsageError(str(error)) from error
        if as_json:
            _print_json(_plain(found))
        else:
            typer.echo(show_description(found))


# -------------------------------------------------------------------------------------------------------------- auditor


@audit.command("show")
def audit_show(
    record: _RecordFile,
    as_json: _Json = False,
) -> None:
    """A record for people. Shows what it says, not that it is true: that is `verify`."""

    async def run() -> None:
        from bsns.audit import show
        from bsns.protocol.record import VerificationRecord

        found = VerificationRecord.from_bytes(_read(record))
        if as_json:
            typer.echo(found.to_bytes().decode(), nl=False)
        else:
            typer.echo(show(found))

    _run(run())


@audit.command("export")
def audit_export(
    request_id: _RequestId,
    rpc: _Rpc,
    deployment: _DeploymentFile,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: standard output.")] = None,
) -> None:
    """Build the record of any request from the chain alone (without what only its requester knows)."""

    async def run() -> None:
        from bsns.audit import export
        from bsns.chain.client import Web3ChainClient
        from bsns.chain.patient_client import PatientChainClient

        known = _deployment(deployment)
        async with await Web3ChainClient.connect(rpc, known) as chain:
            patient = PatientChainClient(chain, AUDIT_PATIENCE_S)
            data = (await export(patient, known, _request_id(request_id))).to_bytes()
        if output is None:
            typer.echo(data.decode(), nl=False)
        else:
            _write(output, data)

    _run(run())


@audit.command("verify")
def audit_verify(
    record: _RecordFile,
    rpc: _Rpc,
    deployment: _KnownDeployment = None,
    as_json: _Json = False,
) -> None:
    """Check every field of a record against the chain and recompute the rest. Exit code 0 only if all checks hold."""

    async def run() -> None:
        from bsns.audit import Check, deployment_of, verify_bytes
        from bsns.chain.client import Web3ChainClient
        from bsns.chain.errors import WrongChainError
        from bsns.chain.patient_client import PatientChainClient
        from bsns.protocol.record import RecordError, VerificationRecord

        data = _read(record)
        known = None if deployment is None else _deployment(deployment)
        try:
            where = known or deployment_of(VerificationRecord.from_bytes(data))
            async with await Web3ChainClient.connect(rpc, where) as chain:
                checks = await verify_bytes(data, PatientChainClient(chain, AUDIT_PATIENCE_S), known)
        except RecordError as error:
            checks = [Check("record format", False, str(error))]
        except WrongChainError as error:
            checks = [Check("contracts", False, str(error))]
        holds = all(item.ok for item in checks)
        if as_json:
            _print_json({"holds": holds, "checks": [_plain(item) for item in checks]})
        else:
            for item in checks:
                if not item.ok:
                    typer.echo(f"FAILED  {item.name}: {item.detail}")
            failed = sum(not item.ok for item in checks)
            typer.echo(f"{len(checks)} checks, all hold" if holds else f"{failed} of {len(checks)} checks failed")
            if known is None and holds:
                typer.echo("The contracts are those that the record names; give --deployment to insist on yours.")
        if not holds:
            raise typer.Exit(EXIT_FAILED)

    _run(run())


@audit.command("plan")
def audit_plan(
    plan_id: Annotated[str, typer.Argument(help="Plan id, 0x and 64 hexadecimal digits.", metavar="PLAN_ID")],
    rpc: _Rpc,
    deployment: _DeploymentFile,
    planning_record: Annotated[
        Path | None, typer.Option(help="The planning record, if it is too large to lie on chain.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="The model's manifest, if it does not lie on chain.")] = None,
    as_json: _Json = False,
) -> None:
    """Compute a published plan again from the signed measurements it names. Exit code 0 only if nothing differs."""

    async def run() -> None:
        from bsns.audit.plan import audit_plan, show_plan
        from bsns.chain.client import Web3ChainClient
        from bsns.chain.patient_client import PatientChainClient

        known = _deployment(deployment)
        async with await Web3ChainClient.connect(rpc, known) as chain:
            found = await audit_plan(
                PatientChainClient(chain, AUDIT_PATIENCE_S),
                known,
                _hash(plan_id, "plan id"),
                manifest=None if manifest is None else _read(manifest),
                planning_record=None if planning_record is None else _read(planning_record),
            )
        if as_json:
            _print_json(_plain(found.summary()))
        else:
            typer.echo(show_plan(found))
            difference = next((item for item in found.checks if not item.ok), None)
            if difference is None:
                typer.echo(f"{len(found.checks)} checks, all hold")
            else:
                typer.echo(f"first difference: {difference.name}: {difference.detail}")
        if not found.holds:
            raise typer.Exit(EXIT_FAILED)

    _run(run())


@audit.command("report")
def audit_report(
    rpc: _Rpc,
    deployment: _DeploymentFile,
    first: Annotated[
        int | None, typer.Option("--from", min=0, help="First block; default: the first of the contracts.")
    ] = None,
    last: Annotated[int | None, typer.Option("--to", min=0, help="Last block; default: the newest.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report here too, as JSON.")] = None,
    verify: Annotated[
        Path | None, typer.Option("--verify", help="Derive this report file again instead, and name what differs.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Stakes, assignments, payments, verdicts and slashes of a range of blocks, each with its log, and whether they
    add up. Exit code 0 only if all checks hold.
    """

    async def run() -> None:
        from bsns.audit.block_report_view import report_command
        from bsns.chain.client import Web3ChainClient
        from bsns.chain.patient_client import PatientChainClient

        if verify is not None and (first, last, output) != (None, None, None):
            raise _UsageError("--verify takes the blocks from the file: leave --from, --to and --out out")
        if output is not None and not output.parent.is_dir():
            raise _UsageError(f"{output.parent} is not a folder: the report could not be written there")
        known, given = _deployment(deployment), None if verify is None else _read(verify)
        async with await Web3ChainClient.connect(rpc, known) as chain:
            patient = PatientChainClient(chain, AUDIT_PATIENCE_S)
            holds, data = await report_command(patient, known, first, last, given, as_json=as_json)
        if output is not None and data is not None:
            _write(output, data)
        if not holds:
            raise typer.Exit(EXIT_FAILED)

    _run(run())


# --------------------------------------------------------------------------------------------------------------- inside


@contextlib.asynccontextmanager
async def _shown(view: Any) -> Any:
    with view:
        yield view


async def _view(client: Client, asked: Any, maximum_tokens: int, publisher: str | None, as_json: bool) -> Any:
    """How an answer is shown: with its price and pace on a terminal, else as plain text."""
    if as_json or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return _shown(_Stream(as_json))
    from bsns.answer_view import AnswerView

    quote = await client.quote(asked, maximum_tokens, publisher=publisher)
    return _shown(AnswerView(Console(), quote.fee_per_token, quote.prompt_tokens, maximum_tokens))


class _Stream:
    """Shows tokens and progress as they come: the text alone on standard output, or all of it on standard error
    beside JSON.
    """

    def __init__(self, as_json: bool) -> None:
        self._error = as_json
        self._column = 0
        self.has_shown_text = False

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def token(self, _token: int, text: str) -> None:
        if text:
            self.has_shown_text = True
            typer.echo(text, nl=False, err=self._error)
            self._column = 0 if text.endswith("\n") else 1
            (sys.stderr if self._error else sys.stdout).flush()

    def progress(self, text: str) -> None:
        if self._error or sys.stderr.isatty():
            self._end()
            typer.echo(f"· {text}", err=True)

    def _end(self) -> None:
        if self._column:
            typer.echo(err=self._error)
            self._column = 0


async def _report_answer(
    client: Client, answer: Any, prompt: list[int] | None, record: Path | None, token_ids: bool, as_json: bool
) -> None:
    if record is not None:
        from bsns.audit import export

        disclosure = client.disclosure(answer.request_id, with_tokens=token_ids)
        found = await export(client.chain, client.deployment, answer.request_id, disclosure)
        _write(record, found.to_bytes())
    if as_json:
        document = _plain(answer)
        document["record"] = str(record) if record is not None else None
        if prompt is not None:
            document["prompt_token_ids"] = prompt
        if not token_ids:
            document["token_count"] = len(document.pop("token_ids"))
        _print_json(document)
        return
    if sys.stdout.isatty() and sys.stderr.isatty():
        from bsns.answer_view import summary

        Console(stderr=True).print(summary(answer))
    elif sys.stderr.isatty():
        rate = "" if answer.tokens_per_second is None else f", {answer.tokens_per_second:.1f} tokens/s"
        paid = "not settled yet" if answer.charged is None else f"{answer.charged:,} wei"
        typer.echo(f"· {answer.status}, {paid}, {len(answer.token_ids)} tokens{rate}", err=True)
        typer.echo(f"· request 0x{answer.request_id.hex()}", err=True)
    if sys.stderr.isatty() and answer.charged is not None and answer.charged < answer.fee_wei:
        typer.echo(f"· {answer.fee_wei - answer.charged:,} wei of the deposit are yours to take back:", err=True)
        typer.echo(f"·   bsns refund 0x{answer.request_id.hex()}", err=True)
    if answer.finish_reason == "interrupted":
        typer.echo("bsns: the answer was interrupted: what did not arrive before cannot be had any more", err=True)


@contextlib.asynccontextmanager
async def _client(
    rpc: str,
    deployment: Path,
    key_file: Path,
    password_file: Path | None,
    state_dir: Path,
    model_folder: Path | None,
    *,
    share_prompt: bool = True,
    of_any_model: bool = False,
) -> Any:
    from bsns.requester.client import Client

    known, signer = _deployment(deployment), _signer(key_file, password_file)
    folder = None if of_any_model else _model_folder(model_folder)
    async with await Client.connect(
        rpc, known, signer, state_dir, model_folder=folder, share_prompt=share_prompt
    ) as client:
        yield client


@contextlib.asynccontextmanager
async def _reading_client(rpc: str, deployment: Path, model_folder: Path | None) -> Any:
    """A client that only reads: its key is thrown away, and its state folder with it."""
    import secrets
    import tempfile

    from bsns.chain.signer import KeySigner
    from bsns.requester.client import Client

    with tempfile.TemporaryDirectory(prefix="bsns-") as state:
        known, folder = _deployment(deployment), _model_folder(model_folder)
        signer = KeySigner(secrets.token_bytes(32))
        async with await Client.connect(rpc, known, signer, Path(state), model_folder=folder) as client:
            yield client


def _run(work: Any) -> None:
    """Run a command's coroutine; errors become one line on standard error and an exit code."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with _exit_codes():
        asyncio.run(work)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    from bsns.audit.errors import AuditError
    from bsns.chain.errors import ChainError, ContractError, InsufficientFundsError
    from bsns.protocol.identifiers import ProtocolError
    from bsns.requester import errors

    try:
        yield
    except (_UsageError, errors.InvalidRequestError, errors.JournalError, AuditError, ProtocolError) as error:
        _fail(EXIT_USAGE, error)
    except (
        errors.ChainRefusedError,
        errors.InsufficientFundsError,
        errors.RefundNotDueError,
        errors.TicketRefusedError,
        errors.GatewayRefusedError,
        ContractError,
        InsufficientFundsError,
    ) as error:
        _fail(EXIT_REFUSED, error)
    except errors.NotServedError as error:
        _fail(EXIT_NOT_SERVED, error)
    except (errors.RequesterError, ChainError) as error:
        _fail(EXIT_UNAVAILABLE, error)
    except KeyboardInterrupt:
        _fail(EXIT_UNAVAILABLE, "interrupted; `bsns requests` shows what is open, --resume goes on with it")


def _fail(code: int, error: object) -> None:
    typer.echo(f"bsns: {error}", err=True)
    raise typer.Exit(code)


def _asked(client: Client, text: str | None, prompt_ids: str | None, image: Path | None) -> Any:
    """What the request is about: a list of token ids, or the input row of an image."""
    if image is not None:
        if text is not None or prompt_ids is not None:
            raise _UsageError("give either an image or a prompt, not both")
        return client.image_row(image)
    prompt = _prompt(text, prompt_ids)
    return prompt if isinstance(prompt, list) else list(client.token_ids(prompt))


def _maximum_tokens(given: int | None, image: Path | None) -> int:
    if image is None:
        return given or DEFAULT_MAXIMUM_TOKENS
    if given not in (None, 1):
        raise _UsageError("an image has one answer, its class: leave --max-tokens out")
    return 1


def _prompt(text: str | None, prompt_ids: str | None) -> str | list[int]:
    if (text is None) == (prompt_ids is None):
        raise _UsageError("give a prompt: text, - for standard input, --prompt-ids, or --image")
    if prompt_ids is not None:
        try:
            return [int(part) for part in prompt_ids.replace(",", " ").split()]
        except ValueError:
            raise _UsageError(f"--prompt-ids takes numbers with commas between them, got {prompt_ids!r:.60}") from None
    if text == "-":
        text = sys.stdin.read(MAXIMUM_PROMPT_BYTES)
    if not text or not text.strip():
        raise _UsageError("the prompt is empty")
    return text


def _deployment(path: Path) -> Deployment:
    from bsns.chain.deployment import Deployment

    try:
        return Deployment.load(path)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _model_folder(given: Path | None) -> Path | None:
    """The model folder given, or the newest prepared one of the cache; None if there is none (token ids then still
    work).
    """
    if given is not None:
        return given
    from bsns.runtime.prepare import DEFAULT_MODEL, cache_folder

    manifests = (cache_folder() / "models" / DEFAULT_MODEL).glob("[0-9a-f]*/manifest.json")
    return max((path.parent for path in manifests), key=lambda folder: folder.stat().st_mtime, default=None)


def _signer(path: Path, password_file: Path | None) -> KeySigner:
    from bsns.chain.key_file import KeyFileError, load_key

    advice = f"--keystore-password-file, or {PASSWORD_VARIABLE} in the environment"
    try:
        return load_key(path, os.environ.get(PASSWORD_VARIABLE), password_file, password_advice=advice)
    except KeyFileError as error:
        raise _UsageError(str(error)) from error


def _request_id(text: str) -> bytes:
    return _hash(text, "request id")


def _hash(text: str, what: str) -> bytes:
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise _UsageError(f"{text!r:.80} is not a {what}: 0x and 64 hexadecimal digits")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _UsageError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise _UsageError(f"{path} cannot be written: {error.strerror}") from error


def _plain(value: Any) -> Any:
    """Dataclasses and bytes as JSON values."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False))


def _table(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, text in rows.items():
        table.add_row(name, text)
    Console().print(table)


def main() -> None:
    """Entry point of the `bsns` command."""
    app()


if __name__ == "__main__":
    main()
