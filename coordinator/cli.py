"""`bsns-coordinator`: deploy contracts, migrate the database, serve, and look at what is going on.

Owns how commands read options and report. Exit codes: 0 done, 2 wrong use or settings, 3 the contracts or the database
refused, or the account cannot pay, 4 chain or database unavailable. Never asks a question. Everything for programs is
one JSON document on standard output; logs go to standard error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Terms, deploy
from bsns.planning import Objective
from bsns.planning.published import plan_of_record
from bsns.protocol.identifiers import PlanId, model_id
from bsns.protocol.planning_record import PlanningRecord
from coordinator import service
from coordinator.command_line import LogFormat, configure_logs, reported, say
from coordinator.demo import DEFAULT_MODEL, DemoSettings, run_demo, run_devnet
from coordinator.dispatch import PlanPolicy
from coordinator.dispatch.plan_publication import plannable, planning_record
from coordinator.gateway.cli import gateway_app
from coordinator.settings import CoordinatorSettings, SettingsError, load_deployment, load_key
from coordinator.storage import (
    Storage,
    TopologySnapshot,
    migrate,
)

_HELP: Final = (
    "Deploy contracts, migrate the database, serve, and look at what is going on.\n\n"
    "Settings of serve also come from variables BSNS_COORDINATOR_… or a TOML file. Exit codes: 0 done, 2 wrong use "
    "or settings, 3 the contracts or the database refused, or the account cannot pay, 4 chain or database unavailable."
)
app = typer.Typer(
    name="bsns-coordinator", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP
)


class Network(StrEnum):
    """Which terms to deploy with."""

    PUBLIC = "public"
    DEVNET = "devnet"


_Rpc = Annotated[str | None, typer.Option("--rpc", help="JSON-RPC endpoint of the chain.")]
_DeploymentFile = Annotated[Path | None, typer.Option("--deployment", help="Deployment file (JSON).")]
_Database = Annotated[str | None, typer.Option("--database-url", help="sqlite:///file or postgresql://…")]
_KeyFile = Annotated[Path | None, typer.Option("--key-file", help="Raw hex key (mode 600) or a keystore v3.")]
_PasswordFile = Annotated[Path | None, typer.Option("--keystore-password-file", help="Password of a keystore v3.")]
_Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
_Model = Annotated[
    str, typer.Option(envvar="BSNS_DEMO_MODEL", help="Model to serve, by the name `bsns.runtime.prepare` knows.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


app.add_typer(gateway_app, name="gateway")


@app.command()
def serve(
    rpc: _Rpc = None,
    deployment: _DeploymentFile = None,
    database_url: _Database = None,
    listen: Annotated[str | None, typer.Option(help="host:port for nodes; port 0 takes a free one.")] = None,
    key_file: _KeyFile = None,
    keystore_password_file: _PasswordFile = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest of a model to plan for; repeatable.")] = None,
    fee_per_token: Annotated[int | None, typer.Option(help="Wei per token of prompt or answer.")] = None,
    minimum_nodes: Annotated[int | None, typer.Option(help="Nodes to wait for before the first plan.")] = None,
    objective: Annotated[Objective | None, typer.Option(help="What a plan is to be good at.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Least nodes a stage.")] = None,
    stage_count: Annotated[int | None, typer.Option(help="Stages; default: as many as is best.")] = None,
    confirmation_depth: Annotated[int | None, typer.Option(help="Blocks below the head left alone.")] = None,
    certificate_file: Annotated[Path | None, typer.Option(help="PEM certificate; required off loopback.")] = None,
    certificate_key_file: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    config: _Config = None,
    print_config: Annotated[bool, typer.Option(help="Show the effective settings, secrets masked, and exit.")] = False,
    log_format: Annotated[LogFormat | None, typer.Option(help="Default: console on a terminal, else JSON.")] = None,
) -> None:
    """Watch the chain, plan, route and close what is open, until SIGTERM."""
    configure_logs(log_format)
    with reported():
        settings = CoordinatorSettings.load(
            config,
            rpc_url=rpc,
            deployment=deployment,
            database_url=database_url,
            listen=listen,
            key_file=key_file,
            keystore_password_file=keystore_password_file,
            manifest=tuple(manifest) if manifest else None,
            fee_per_token=fee_per_token,
            minimum_nodes=minimum_nodes,
            objective=objective,
            replicas=replicas,
            stage_count=stage_count,
            confirmation_depth=confirmation_depth,
            certificate_file=certificate_file,
            certificate_key_file=certificate_key_file,
        )
        if print_config:
            say(settings.shown())
            return
        asyncio.run(service.serve(settings, say))


@app.command("deploy")
def deploy_command(
    rpc: Annotated[str, typer.Option("--rpc", help="JSON-RPC endpoint of the chain.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="Key of the deployer.")],
    deployment: Annotated[Path, typer.Option("--deployment", help="Deployment file to write.")],
    keystore_password_file: _PasswordFile = None,
    treasury: Annotated[str | None, typer.Option(help="Receives the protocol fee; default: the deployer.")] = None,
    network: Annotated[Network, typer.Option(help="Terms to start from.")] = Network.PUBLIC,
    terms_file: Annotated[
        Path | None, typer.Option(help="JSON with changes to them: {registry: {…}, escrow: {…}, verification: {…}}.")
    ] = None,
) -> None:
    """Create the five contracts and write the deployment file."""
    with reported():
        if deployment.exists():
            raise SettingsError(f"{deployment} exists already: give another file, the old one names live contracts")
        signer = load_key(key_file, password_file=keystore_password_file)
        terms = _terms(network, terms_file)
        console = Console(stderr=True)
        made = asyncio.run(
            deploy(
                rpc,
                signer,
                terms,
                treasury=treasury,
                progress=lambda name, at: console.print(f"{name} at {at}", soft_wrap=True),
            )
        )
        made.save(deployment)
        say(dataclasses.asdict(made))


@app.command("migrate")
def migrate_command(
    database_url: Annotated[str, typer.Option("--database-url", help="sqlite:///file or postgresql://…")],
    to: Annotated[str, typer.Option("--to", help='Revision, "head" or "base" (drops everything).')] = "head",
) -> None:
    """Bring the database's tables to a revision, up or down."""
    with reported():
        migrate(database_url, to)
        say({"event": "migrated", "revision": to})


@app.command()
def status(
    database_url: Annotated[str, typer.Option("--database-url", help="sqlite:///file or postgresql://…")],
    rpc: _Rpc = None,
    deployment: _DeploymentFile = None,
    as_json: _Json = False,
) -> None:
    """Head lag, nodes, plans, requests, intents. With --rpc and --deployment also the chain's head."""
    with reported():
        content = asyncio.run(_status(database_url, rpc, deployment))
        if as_json:
            say(content)
            return
        console = _console()
        console.print(f"block {content['cursor'] and content['cursor']['number']}, lag {content['head_lag_blocks']}")
        table = Table("node", "status", "stake (wei)", "open duties", "endpoint")
        for node in content["nodes"]:
            values = (node["node"], node["status"], node["staked_wei"], node["open_duties"], node["endpoint"])
            table.add_row(*(str(value) for value in values))
        console.print(table)
        for plan in content["plans"]:
            console.print(f"plan {plan['plan_id']} epoch {plan['epoch']}: {len(plan['stages'])} assignments")
        console.print(f"requests {content['requests']}, intents {content['intents']}")


@app.command()
def plan(
    database_url: Annotated[str, typer.Option("--database-url", help="sqlite:///file or postgresql://…")],
    manifest: Annotated[Path, typer.Option(help="Manifest of the model.")],
    measurements_hash: Annotated[
        str | None,
        typer.Option(help="Recompute from the planning record of a plan, with the terms in it; default: plan anew."),
    ] = None,
    objective: Annotated[Objective, typer.Option(help="What the plan is to be good at.")] = Objective.THROUGHPUT,
    stage_count: Annotated[int | None, typer.Option(help="Stages; default: as many as is best.")] = None,
    replicas: Annotated[int, typer.Option(help="Least nodes a stage.")] = 1,
    as_json: _Json = False,
) -> None:
    """Compute the plan that stored measurements give, without publishing it: anyone who has them gets the same."""
    with reported():
        model = service.load_manifests((manifest,))[0]
        with _storage(database_url) as storage:
            if measurements_hash is None:
                identity = model_id(model.manifest_hash, model.weight_root, len(model.units))
                policy = PlanPolicy(fee_per_token=0, objective=objective, stage_count=stage_count, replicas=replicas)
                usable, refused = plannable(storage.measurements(identity).values(), model, policy)
                for reason in refused.values():
                    typer.echo(f"left out: {reason}", err=True)
                record = planning_record(identity, usable, policy)
            else:
                record = _stored_record(storage, measurements_hash)
            previous = None
            if record.rebalancing is not None and (before := storage.plan(PlanId(record.rebalancing.previous_plan))):
                previous = before.shard_plan
        partition = plan_of_record(record, model, previous)
        computed = partition.to_shard_plan()
        content = {
            "root": "0x" + computed.root.hex(),
            "measurements_hash": "0x" + record.hash.hex(),
            "solver": partition.solver,
            "objective": partition.objective,
            "value_nanoseconds": partition.value_ns,
            "lower_bound_nanoseconds": partition.lower_bound_ns,
            "bound": partition.bound,
            "assignments": [
                {**dataclasses.asdict(item), "execution_class": "0x" + item.execution_class.hex()}
                for item in computed.assignments
            ],
        }
        if as_json:
            say(content)
            return
        console = _console()
        console.print(f"root {content['root']}")
        console.print(
            f"{partition.objective} {partition.value_ns} ns by {partition.solver}, "
            f"no plan is below {partition.lower_bound_ns} ns ({partition.bound})",
            soft_wrap=True,
        )
        table = Table("stage", "replica", "units", "node", "work weight")
        for item in computed.assignments:
            units = f"{item.first_unit}..{item.end_unit - 1}"
            table.add_row(str(item.stage), str(item.replica), units, item.node, str(item.work_weight))
        console.print(table)


@app.command()
def topology(
    database_url: Annotated[str, typer.Option("--database-url", help="sqlite:///file or postgresql://…")],
    manifest: Annotated[Path, typer.Option(help="Manifest of the model.")],
    limit: Annotated[int, typer.Option(min=1, help="Snapshots, the newest first.")] = 20,
    as_json: _Json = False,
) -> None:
    """What the network of a model's nodes looked like: classes, clusters, and the longest bars of its diagrams."""
    with reported():
        model = service.load_manifests((manifest,))[0]
        identity = model_id(model.manifest_hash, model.weight_root, len(model.units))
        with _storage(database_url) as storage:
            taken = storage.topologies(identity, limit)
        if as_json:
            say({"topologies": [_topology(item) for item in taken]})
            return
        table = Table("taken", "class", "nodes", "clusters", "mean hop", "longest bars of H0", "of H1")
        for item in taken:
            at = datetime.fromtimestamp(item.taken_at, UTC).isoformat(sep=" ", timespec="seconds")
            shape = item.snapshot
            bars = [", ".join(f"{death - birth:.4f}" for birth, death in shape.longest(number, 3)) for number in (0, 1)]
            table.add_row(
                at, str(item.class_number), str(shape.node_count), str(shape.cluster_count),
                f"{shape.mean_hop:.4f}", *bars,
            )  # fmt: skip
        console = _console()
        console.print(table)
        console.print("seconds, UTC" if taken else "no snapshot yet: a coordinator takes one of two nodes or more")


@app.command()
def record(
    measurements_hash: Annotated[str, typer.Argument(help="measurementsHash of a plan.", metavar="HASH")],
    database_url: Annotated[str, typer.Option("--database-url", help="sqlite:///file or postgresql://…")],
) -> None:
    """Write a plan's planning record to standard output: what auditors need if it is too large to be announced."""
    with reported(), _storage(database_url) as storage:
        sys.stdout.buffer.write(_stored_record(storage, measurements_hash).to_bytes())
        sys.stdout.buffer.flush()


@app.command("demo")
def demo_command(
    model: _Model = DEFAULT_MODEL,
    prompt: Annotated[
        str, typer.Option(envvar="BSNS_DEMO_PROMPT", help="What to ask a language model.")
    ] = "What is the capital of France, and what is it known for?",
    image: Annotated[
        str, typer.Option(envvar="BSNS_DEMO_IMAGE", help="What to show an image classifier; default: a photograph.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(envvar="BSNS_DEMO_MAX_TOKENS", min=1, help="Length of the answer.")] = 32,
    nodes: Annotated[int, typer.Option(envvar="BSNS_DEMO_NODES", min=2, max=16, help="Node clients to start.")] = 4,
    seed: Annotated[int, typer.Option(envvar="BSNS_DEMO_SEED", min=0, help="Seed of the sampling.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder of summary.json and record.json.")] = Path("build/demo"),
    keep: Annotated[
        bool, typer.Option(envvar="BSNS_DEMO_KEEP", help="Keep the network until Ctrl-C, for audits afterwards.")
    ] = False,
) -> None:
    """One paid, sharded, verified inference on a local network, from an empty chain to an audited record."""
    # An empty variable is one that was not set.
    shown = Path(image) if image else None
    settings = DemoSettings(model, prompt, shown, max_tokens, nodes, seed, output, keep)
    with reported():
        asyncio.run(run_demo(settings, Console(stderr=True)))


@app.command("devnet")
def devnet_command(
    model: _Model = DEFAULT_MODEL,
    nodes: Annotated[int, typer.Option(min=2, max=16, help="Node clients to start.")] = 4,
    folder: Annotated[Path, typer.Option(help="Keys, databases and logs of the network.")] = Path("build/devnet"),
) -> None:
    """A local network that runs until Ctrl-C: chain, contracts, coordinator, nodes."""
    with reported():
        asyncio.run(run_devnet(folder, nodes, model, Console(stderr=True)))


def main() -> None:
    """Entry point of `bsns-coordinator`."""
    app()


async def _status(database_url: str, rpc: str | None, deployment: Path | None) -> dict[str, Any]:
    if rpc is None:
        return await service.status(database_url, None)
    if deployment is None:
        raise SettingsError("--rpc needs --deployment, which names the chain")
    async with await Web3ChainClient.connect(rpc, load_deployment(deployment)) as chain:
        return await service.status(database_url, chain)


@contextmanager
def _storage(database_url: str) -> Iterator[Storage]:
    storage = Storage.of_existing(database_url)
    try:
        storage.require_current_schema()
        yield storage
    finally:
        storage.close()


def _stored_record(storage: Storage, measurements_hash: str) -> PlanningRecord:
    record = storage.planning_record(_hash(measurements_hash))
    if record is None:
        raise SettingsError(f"this database has no planning record {measurements_hash}")
    return record


def _topology(item: TopologySnapshot) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(item.snapshot.to_json())
    return {"taken_at": item.taken_at, "class": item.class_number, **content}


def _hash(text: str) -> bytes:
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise SettingsError(f"{text!r:.80} is not a hash: 0x and 64 hexadecimal digits")
    return value


def _console() -> Console:
    """Wide enough for addresses and hashes when standard output is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _terms(network: Network, changes: Path | None) -> Terms:
    terms = Terms.for_devnet() if network == Network.DEVNET else Terms()
    if changes is None:
        return terms
    try:
        content = json.loads(changes.read_text())
        return Terms(
            registry=dataclasses.replace(terms.registry, **content.pop("registry", {})),
            escrow=dataclasses.replace(terms.escrow, **content.pop("escrow", {})),
            verification=dataclasses.replace(terms.verification, **content.pop("verification", {})),
            **{"plan_activation_delay": terms.plan_activation_delay, **content},
        )
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"{changes} does not hold terms: {error}") from error


if __name__ == "__main__":
    main()
