"""`bsns-coordinator gateway`: serve the gateway, and keep accounts by hand.

Owns how these commands read options. Accounts of people who sign for an address need none of them (`bsns account`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from coordinator.command_line import LogFormat, configure_logs, reported, say
from coordinator.storage import AccountBook, KeyLimits, Storage

LISTED_ACCOUNTS = 10_000

gateway_app = typer.Typer(
    no_args_is_help=True,
    help="OpenAI's API and the explorer, over HTTP; and the accounts of its users.",
)
_Database = Annotated[str, typer.Option("--database-url", help="The coordinator's database.")]
_Account = Annotated[str, typer.Argument(help="Id of an account.", metavar="ACCOUNT")]


@gateway_app.command("serve")
def serve_command(
    rpc: Annotated[str | None, typer.Option("--rpc", help="JSON-RPC endpoint of the chain.")] = None,
    deployment: Annotated[Path | None, typer.Option(help="Deployment file (JSON).")] = None,
    database_url: Annotated[str | None, typer.Option(help="The coordinator's database.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port of HTTP; port 0 takes a free one.")] = None,
    health_listen: Annotated[str | None, typer.Option(help="host:port of health and metrics.")] = None,
    public_url: Annotated[str | None, typer.Option(help="As users reach it, for links.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Key that pays the network, and takes deposits.")] = None,
    keystore_password_file: Annotated[Path | None, typer.Option(help="Password of a keystore v3.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Secrets and prompts of users' requests.")] = None,
    model_folder: Annotated[list[Path] | None, typer.Option(help="Prepared model to offer; repeatable.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of the coordinator.")] = None,
    coordinator_certificate: Annotated[Path | None, typer.Option(help="Its certificate (PEM); off loopback.")] = None,
    publisher: Annotated[str | None, typer.Option(help="Whose plans to pay for.")] = None,
    certificate_file: Annotated[Path | None, typer.Option(help="PEM certificate; required off loopback.")] = None,
    certificate_key_file: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")] = None,
    print_config: Annotated[bool, typer.Option(help="Show the effective settings, secrets masked, and exit.")] = False,
    log_format: Annotated[LogFormat | None, typer.Option(help="Default: console on a terminal, else JSON.")] = None,
) -> None:
    """Answer HTTP until SIGTERM. Settings also come from variables BSNS_GATEWAY_… or a TOML file."""
    from coordinator.gateway import service
    from coordinator.gateway.settings import GatewaySettings

    configure_logs(log_format)
    with reported():
        settings = GatewaySettings.load(
            config,
            rpc_url=rpc,
            deployment=deployment,
            database_url=database_url,
            listen=listen,
            health_listen=health_listen,
            public_url=public_url,
            key_file=key_file,
            keystore_password_file=keystore_password_file,
            state_dir=state_dir,
            model_folder=tuple(model_folder) if model_folder else None,
            coordinator=coordinator,
            coordinator_certificate=coordinator_certificate,
            publisher=publisher,
            certificate_file=certificate_file,
            certificate_key_file=certificate_key_file,
        )
        if print_config:
            say(settings.shown())
            return
        asyncio.run(service.serve(settings, say))


@gateway_app.command("open-account")
def open_account(
    name: Annotated[str, typer.Argument(help="Whose it is, for you.")],
    database_url: _Database,
    deposit_wei: Annotated[int, typer.Option(min=0, help="Credited at once: you have the money already.")] = 0,
    per_request_wei: Annotated[int | None, typer.Option(min=0, help="Most that a request with the key costs.")] = None,
    per_day_wei: Annotated[int | None, typer.Option(min=0, help="Most that the key spends a day, UTC.")] = None,
) -> None:
    """An account that you keep by hand, and its key, which is shown once."""
    with reported(), _book(database_url) as book:
        now = int(time.time())
        account = book.open_account(name, None, now)
        if deposit_wei:
            book.deposit(account.account_id, deposit_wei, _reference(), now)
        secret, key = book.create_key(account.account_id, name, KeyLimits(per_request_wei, per_day_wei), now)
        say({"account": account.account_id, "key": key.key_id, "secret": secret, "balance_wei": str(deposit_wei)})


@gateway_app.command("credit")
def credit(
    account: _Account,
    amount_wei: Annotated[int, typer.Argument(min=1, help="Wei that you received outside of the chain.")],
    database_url: _Database,
) -> None:
    """Credit an account with money that you have received."""
    with reported(), _book(database_url) as book:
        after = book.deposit(account, amount_wei, _reference(), int(time.time()))
        say({"account": after.account_id, "balance_wei": str(after.balance)})


@gateway_app.command("accounts")
def accounts(database_url: _Database) -> None:
    """All accounts with their balances, as one JSON document."""
    with reported(), _book(database_url) as book:
        found = [
            {
                "account": item.account_id, "name": item.name, "address": item.address,
                "balance_wei": str(item.balance), "created": item.created_at,
            }
            for item in book.accounts(LISTED_ACCOUNTS)
        ]  # fmt: skip
        say({"accounts": found, "owed_wei": str(book.owed())})


def _reference() -> str:
    return f"manual-{secrets.token_hex(12)}"


@contextmanager
def _book(database_url: str) -> Iterator[AccountBook]:
    storage = Storage.of_existing(database_url)
    try:
        storage.require_current_schema()
        yield AccountBook(storage)
    finally:
        storage.close()
