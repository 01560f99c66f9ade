"""`bsns-node`: what an operator types.

Owns commands, exit codes and what is printed: one JSON line on standard output when a node is ready, logs on standard
error, tables or `--json` from reading commands. Exit codes: 0 done, 2 a setting or file cannot be used, 3 the
contracts refuse or the account cannot pay, 4 the chain is out of reach or another one. Secrets are never arguments.
Decides nothing else: see node_client.service.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainError, ContractError, InsufficientFundsError, TransactionFailedError
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import MAXIMUM_DRAFTS
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.endpoints import split_endpoint
from bsns.service_logs import configure_logs
from node_client.chain_view import ChainView
from node_client.errors import NodeError, Refusal, SettingsError
from node_client.keystore import NODE_KEY_FILE, OPERATOR_KEY_FILE, Keystore, read_private_key, write_secret
from node_client.settings import NodeSettings
from node_client.signing_guard import SigningGuard, read_history

EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_UNAVAILABLE: Final = 4
WEI: Final = 10**18
_CLOCK_SKEW_SECONDS: Final = 60
_LOW_DISK_BYTES: Final = 1024**3
_LOW_MEMORY_BYTES: Final = 2 * 1024**3
_SWITCH_SECONDS: Final = 0.0002
_WATCH_SECONDS: Final = 2.0

Result = TypeVar("Result")

# Contracts that owe operators what is theirs until they take it out.
_CREDITORS: Final = ("InferenceEscrow", "NodeRegistry", "OutputVerification", "RequestTabs")

app = typer.Typer(
    name="bsns-node",
    help="Stake, serve shards of models, attest the work of others. Exit codes: 0 done, 2 usage, 3 "
    "refused by the contracts, or the account cannot pay, 4 chain unavailable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys_app = typer.Typer(help="The keys of a node and its signing history.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

Rpc = Annotated[str | None, typer.Option("--rpc", help="JSON-RPC endpoint of the chain [BSNS_NODE_RPC_URL]")]
DeploymentFile = Annotated[Path | None, typer.Option("--deployment", help="deployment file [BSNS_NODE_DEPLOYMENT]")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="folder of this node [BSNS_NODE_DATA_DIR]")]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", help="file (mode 600) with the keystore password")
]
OperatorKeyFile = Annotated[
    Path | None, typer.Option("--operator-key-file", help="file (mode 600) with a raw operator key to import")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Listen = Annotated[str | None, typer.Option("--listen", help="host:port; port 0 takes a free one")]
Advertise = Annotated[str | None, typer.Option("--advertise", help="host:port to register, if not what is listened on")]
CoordinatorAddress = Annotated[
    str | None, typer.Option("--coordinator", help="host:port of a coordinator, or of several with commas between them")
]
ModelCache = Annotated[Path | None, typer.Option("--model-cache", help="folder that holds models/")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="threads of a forward pass")]
Device = Annotated[str | None, typer.Option("--device", help="where torch computes: cpu, cuda or cuda:1")]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        "--arithmetic",
        help="of decoders' matrices: float32, int8 (8-bit weights) or bfloat16 (its committees see coarse cheats only)",
    ),
]
SpeculationTokens = Annotated[
    int | None,
    typer.Option(
        "--speculation-tokens",
        min=0,
        max=MAXIMUM_DRAFTS,
        help="most that are drafted at once from what the text repeats, as the last stage; 0: none",
    ),
]
HealthListen = Annotated[
    str | None, typer.Option("--health-listen", help="host:port of /healthz, /readyz and /metrics")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="show the effective settings and end")]


@app.command()
def join(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    stake: Annotated[str | None, typer.Option("--stake", help="stake in whole coins, for example 1.5")] = None,
    listen: Listen = None,
    advertise: Advertise = None,
    coordinator: CoordinatorAddress = None,
    model_cache: ModelCache = None,
    threads: Threads = None,
    device: Device = None,
    arithmetic: Arithmetic = None,
    speculation_tokens: SpeculationTokens = None,
    health_listen: HealthListen = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="prepare this model first, and check the hashes of its weights; repeatable"),
    ] = None,
    password_file: PasswordFile = None,
    operator_key_file: OperatorKeyFile = None,
    config: Config = None,
    print_config: PrintConfig = False,
) -> None:
    """Make keys, fund and register what is missing, then serve. Run it again after a crash: it goes on."""
    settings = _settings(
        config,
        rpc_url=rpc, deployment=deployment, data_dir=data_dir, listen=listen, advertise=advertise,
        coordinator=coordinator, model_cache=model_cache, threads=threads, device=device, arithmetic=arithmetic,
        speculation_tokens=speculation_tokens, health_listen=health_listen, password_file=password_file,
        operator_key_file=operator_key_file, stake_wei=None if stake is None else _wei(stake),
    )  # fmt: skip
    if not print_config:
        for name in model or ():
            _prepare(name, settings)
    _serve(settings, print_config, register=True)


@app.command()
def serve(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    listen: Listen = None,
    advertise: Advertise = None,
    coordinator: CoordinatorAddress = None,
    model_cache: ModelCache = None,
    threads: Threads = None,
    device: Device = None,
    arithmetic: Arithmetic = None,
    speculation_tokens: SpeculationTokens = None,
    health_listen: HealthListen = None,
    password_file: PasswordFile = None,
    config: Config = None,
    print_config: PrintConfig = False,
) -> None:
    """Serve as a node that is registered already. Needs no operator key on this machine."""
    _serve(
        _settings(
            config,
            rpc_url=rpc, deployment=deployment, data_dir=data_dir, listen=listen, advertise=advertise,
            coordinator=coordinator, model_cache=model_cache, threads=threads, device=device, arithmetic=arithmetic,
            speculation_tokens=speculation_tokens, health_listen=health_listen, password_file=password_file,
        ),
        print_config,
        register=False,
    )  # fmt: skip


@app.command()
def status(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    config: Config = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again every two seconds until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> None:
    """What the chain says about this node: status, stake, duties, credits."""
    settings = _settings(config, rpc_url=rpc, deployment=deployment, data_dir=data_dir)

    async def read(client: Web3ChainClient) -> dict[str, Any]:
        addresses = _addresses(settings)
        node = addresses.get("node")
        if node is None:
            raise SettingsError(f"there is no node key in {settings.data_dir}; run `bsns-node join`")
        account = await client.call("NodeRegistry", "accountOf", node)
        head = await client.head()
        credits = {contract: await client.call(contract, "creditOf", account.operator) for contract in _CREDITORS}
        return {
            "node": node,
            "operator": account.operator,
            "status": NodeStatus(await client.call("NodeRegistry", "statusOf", node)).name.lower(),
            "staked_wei": account.staked,
            "thawing_wei": account.thawing,
            "thaw_end": account.thawEnd,
            "jailed_until": account.jailedUntil,
            "open_duties": account.openDuties,
            "credits_wei": sum(credits.values()),
            "gas_balance_wei": await client.balance(node),
            "block": head.number,
        }

    if watch and not as_json:
        _watch(settings, read)
        return
    _show(_run(_with_client(settings, read)), as_json)


@app.command(name="exit")
def exit_command(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    config: Config = None,
) -> None:
    """Stop taking new duties and begin to take the whole stake out."""
    settings = _settings(config, rpc_url=rpc, deployment=deployment, data_dir=data_dir, password_file=password_file)

    async def leave(client: Web3ChainClient) -> int:
        node, submitter = _operator(settings, client)
        status = NodeStatus(await client.call("NodeRegistry", "statusOf", node))
        if status is NodeStatus.ABSENT:
            raise SettingsError(f"node {node} is not registered: there is nothing to leave")
        if status is not NodeStatus.EXITING:
            await submitter.submit("NodeRegistry", "beginExit", node)
        return int((await client.call("NodeRegistry", "accountOf", node)).thawEnd)

    thaw_end = _run(_with_client(settings, leave))
    typer.echo(
        f"The exit has begun. The stake can be withdrawn with `bsns-node withdraw` after {time.ctime(thaw_end)} "
        "once all duties are closed; "
        "keep the node running until then, it can still be blamed for what it did."
    )


@app.command()
def withdraw(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    config: Config = None,
) -> None:
    """Take out credits, and the stake that has thawed."""
    settings = _settings(config, rpc_url=rpc, deployment=deployment, data_dir=data_dir, password_file=password_file)

    async def take(client: Web3ChainClient) -> bool:
        node, submitter = _operator(settings, client)
        found = False
        for contract in _CREDITORS:
            credit = int(await client.call(contract, "creditOf", submitter.address))
            if credit:
                await submitter.submit(contract, "withdrawCredit", submitter.address)
                typer.echo(f"credit of {contract}: {_coins(credit)}")
                found = True
        account = await client.call("NodeRegistry", "accountOf", node)
        if account.thawing and (await client.head()).timestamp < account.thawEnd:
            typer.echo(f"stake of {_coins(account.thawing)} thaws until {time.ctime(account.thawEnd)}; come back then")
        elif account.thawing:
            await submitter.submit("NodeRegistry", "withdraw", node)
            typer.echo(f"stake: {_coins(account.thawing)}")
        return found or bool(account.thawing)

    if not _run(_with_client(settings, take)):
        typer.echo("There is nothing to withdraw.")


@app.command()
def doctor(
    rpc: Rpc = None,
    deployment: DeploymentFile = None,
    data_dir: DataDir = None,
    model_cache: ModelCache = None,
    listen: Listen = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Check what a node needs: chain, clock, keys, models, disk, port. Exit code 4 if something is wrong."""
    settings = _settings(
        config, rpc_url=rpc, deployment=deployment, data_dir=data_dir, model_cache=model_cache, listen=listen
    )
    findings = _run(_diagnose(settings))
    is_fine = all(ok for _, ok, _ in findings)
    if as_json:
        checks = [{"check": name, "ok": ok, "detail": detail} for name, ok, detail in findings]
        typer.echo(json.dumps({"ok": is_fine, "checks": checks}))
    else:
        for name, ok, detail in findings:
            typer.echo(f"{'ok  ' if ok else 'FAIL'} {name}: {detail}")
    if not is_fine:
        raise typer.Exit(EXIT_UNAVAILABLE)


@keys_app.command("show")
def keys_show(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Addresses of the keys; no password is needed."""

    def read() -> dict[str, str]:
        folder = _folder(data_dir) / "keys"
        found = Keystore(folder, "unused").addresses()
        if not found:
            raise SettingsError(f"there are no keys in {folder}; `bsns-node join` makes them")
        return found

    _show(_guarded(read), as_json)


@keys_app.command("import")
def keys_import(
    key_file: Annotated[Path, typer.Argument(help="file (mode 600) with a raw private key in hex")],
    role: Annotated[str, typer.Option("--role", help="node or operator")] = "operator",
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    history: Annotated[
        Path | None, typer.Option("--history", help="signing history that the key brings with it")
    ] = None,
) -> None:
    """Take over a key. A node key that has signed before must come with its signing history."""

    def take() -> dict[str, str]:
        from node_client.service import GUARD_FILE, open_keystore

        files = {"node": NODE_KEY_FILE, "operator": OPERATOR_KEY_FILE}
        if role not in files:
            raise SettingsError("--role is node or operator")
        folder = _folder(data_dir)
        settings = NodeSettings.load(
            data_dir=folder, password_file=password_file, rpc_url="unused", deployment=Path("unused")
        )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if history is not None:
            guard = SigningGuard(folder / GUARD_FILE)
            try:
                guard.import_history(read_history(history))
            finally:
                guard.close()
        signer = open_keystore(settings, create=True).import_key(files[role], read_private_key(key_file))
        return {role: signer.address}

    _show(_guarded(take), False)


@keys_app.command("export-history")
def keys_export_history(
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="file to write (mode 600); default: standard output")
    ] = None,
) -> None:
    """Everything the node key has signed, to be taken along with the key. Stop the node first, and never start it here
    again.
    """

    def export() -> str:
        from node_client.service import GUARD_FILE

        path = _folder(data_dir) / GUARD_FILE
        if not path.exists():
            raise SettingsError(f"there is no signing history at {path}")
        guard = SigningGuard(path)
        try:
            return json.dumps(guard.export_history(), indent=2)
        finally:
            guard.close()

    text = _guarded(export)
    if output is None:
        typer.echo(text)
    else:
        _guarded(lambda: write_secret(output, text.encode()))


def main() -> None:
    """Entry point of `bsns-node`."""
    app()


# -- behind the commands


def _serve(settings: NodeSettings, print_config: bool, *, register: bool) -> None:
    if print_config:
        typer.echo(json.dumps(settings.shown(), indent=2))
        return
    configure_logs(settings.log_level)
    # Torch's thread and the event loop hand the interpreter to one another many times a token: neither waits 5 ms.
    sys.setswitchinterval(_SWITCH_SECONDS)

    import uvloop

    async def serve_until_signal() -> None:
        from node_client.service import NodeService, Ready

        service = NodeService(settings, register=register)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.stop)

        def ready(value: Ready) -> None:
            typer.echo(json.dumps({"event": "ready", **asdict(value)}))
            sys.stdout.flush()

        await service.run(ready)

    _run(serve_until_signal(), uvloop.run)


def _settings(config: Path | None, **given: Any) -> NodeSettings:
    return _guarded(lambda: NodeSettings.load(config, **given))


def _guarded(action: Callable[[], Result]) -> Result:
    """Run `action`; each of our errors becomes one line on standard error and its exit code."""
    try:
        return action()
    except (ContractError, TransactionFailedError) as error:
        raise _failure(f"the contracts refuse: {error}", EXIT_REFUSED) from error
    except InsufficientFundsError as error:
        raise _failure(str(error), EXIT_REFUSED) from error
    except ChainError as error:
        raise _failure(str(error), EXIT_UNAVAILABLE) from error
    except Refusal as refusal:
        raise _failure(refusal.detail, EXIT_UNAVAILABLE) from refusal
    except (NodeError, OSError) as error:
        raise _failure(str(error), EXIT_USAGE) from error


def _failure(message: str, code: int) -> typer.Exit:
    typer.echo(f"bsns-node: {message}", err=True)
    return typer.Exit(code)


def _run(
    work: Coroutine[Any, Any, Result], run: Callable[[Coroutine[Any, Any, Result]], Result] = asyncio.run
) -> Result:
    return _guarded(lambda: run(work))


async def _with_client(
    settings: NodeSettings, action: Callable[[Web3ChainClient], Coroutine[Any, Any, Result]]
) -> Result:
    try:
        deployment = Deployment.load(settings.deployment)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    async with await Web3ChainClient.connect(settings.rpc_url, deployment, settings.rpc_timeout_seconds) as client:
        return await action(client)


def _operator(settings: NodeSettings, client: Web3ChainClient) -> tuple[str, Submitter]:
    """The node's address and a submitter of its operator's key."""
    from node_client.service import open_keystore

    addresses = _addresses(settings)
    if set(addresses) != {"node", "operator"}:
        raise SettingsError(f"{settings.data_dir} lacks the node's or the operator's key; this command needs both")
    return addresses["node"], Submitter(client, open_keystore(settings).operator_signer())


def _addresses(settings: NodeSettings) -> dict[str, str]:
    return Keystore(settings.data_dir / "keys", "unused").addresses()


def _folder(data_dir: Path | None) -> Path:
    given = data_dir or os.environ.get("BSNS_NODE_DATA_DIR")
    if given is None:
        raise SettingsError("say which node with --data-dir or BSNS_NODE_DATA_DIR")
    return Path(given)


async def _diagnose(settings: NodeSettings) -> list[tuple[str, bool, str]]:
    import shutil
    import socket

    findings: list[tuple[str, bool, str]] = []

    async def check_chain(client: Web3ChainClient) -> None:
        head = await client.head()
        skew = abs(time.time() - head.timestamp)
        findings.append(("chain", True, f"chain {client.deployment.chain_id}, block {head.number}"))
        findings.append(("clock", skew < _CLOCK_SKEW_SECONDS, f"{skew:.0f} s from the newest block"))
        node = _addresses(settings).get("node")
        if node is None:
            findings.append(("keys", False, "no node key yet; `bsns-node join` makes one"))
            return
        state = await ChainView(client, client.deployment).node_status(node)
        findings.append(("registration", state is NodeStatus.ACTIVE, f"{node} is {state.name.lower()}"))
        balance = await client.balance(node)
        findings.append(("gas", balance >= settings.gas_balance_minimum_wei, f"{_coins(balance)} on the node key"))

    try:
        await _with_client(settings, check_chain)
    except (ChainError, SettingsError) as error:
        findings.append(("chain", False, str(error)))
    models = sorted(path.parent.parent.name for path in settings.model_cache.glob("models/*/*/manifest.json"))
    findings.append(("models", bool(models), ", ".join(models) or "none; run `python -m bsns.runtime.prepare`"))
    place = settings.data_dir if settings.data_dir.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    findings.append(("disk", free >= _LOW_DISK_BYTES, f"{free // 1024**2} MiB free"))
    memory = _memory_bytes()
    wanted = settings.weight_memory_bytes + settings.cache_memory_bytes
    findings.append((
        "memory", memory >= _LOW_MEMORY_BYTES,
        f"{memory // 1024**2} MiB; weights and caches may take {wanted // 1024**2} MiB (weight_memory_bytes, "
        "cache_memory_bytes)",
    ))  # fmt: skip
    host, port = split_endpoint(settings.listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
            findings.append(("port", True, f"{settings.listen} is free"))
        except OSError as error:
            findings.append(("port", False, f"{settings.listen}: {error.strerror} (fine if the node runs)"))
    return findings


def _memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _show(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(content))
        return
    from rich.console import Console

    Console().print(_table(content))


def _table(content: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in content.items():
        table.add_row(key.removesuffix("_wei").replace("_", " "), _coins(value) if key.endswith("_wei") else str(value))
    return table


def _watch(settings: NodeSettings, read: Callable[[Web3ChainClient], Coroutine[Any, Any, dict[str, Any]]]) -> None:
    """The table of `read`, again and again, with what has changed since the last look marked."""
    from rich.live import Live
    from rich.text import Text

    async def follow(client: Web3ChainClient) -> None:
        before: dict[str, Any] = {}
        with Live(auto_refresh=False) as live:
            while True:
                try:
                    now = await read(client)
                    picture = _table(now)
                    changed = [key.replace("_", " ") for key in now if key != "block" and before.get(key) != now[key]]
                    if before and changed:
                        picture.add_row("changed", Text(", ".join(changed), style="bold"))
                    before = now
                except ChainError as error:
                    picture = Text(f"the chain does not answer, asked again in a moment: {error}", style="yellow")
                live.update(picture, refresh=True)
                await asyncio.sleep(_WATCH_SECONDS)

    try:
        _run(_with_client(settings, follow))
    except KeyboardInterrupt:
        return


def _prepare(name: str, settings: NodeSettings) -> None:
    """A model in the cache with its weights' hashes checked; progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from bsns.runtime.prepare import PreparationError, prepare

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"model {name}", total=None)

        def report(line: str) -> None:
            progress.update(task, description=f"model {name}: {line}")
            if not console.is_terminal:
                typer.echo(f"model {name}: {line}", err=True)

        try:
            # The cache of the settings is the folder that holds models/.
            folder = prepare(name, settings.model_cache, verify=True, report=report)
        except (PreparationError, OSError) as error:
            raise _failure(f"model {name} cannot be prepared: {error}", EXIT_USAGE) from error
    typer.echo(f"model {name}: ready in {folder}, every hash as its manifest says", err=True)


def _wei(coins: str) -> int:
    try:
        amount = Decimal(coins) * WEI
    except InvalidOperation as error:
        raise _failure(f"--stake {coins!r} is not a number", EXIT_USAGE) from error
    if not amount.is_finite() or amount < 0 or amount != int(amount):
        raise _failure(f"--stake {coins!r} is not an amount of whole wei", EXIT_USAGE)
    return int(amount)


def _coins(wei: int) -> str:
    return f"{Decimal(wei) / WEI:f}"


if __name__ == "__main__":
    main()
