"""`make demo`: one paid, sharded, verified inference on a devnet, from an empty chain to an audited record.

Owns the sequence and the summary. Every step is the command that a person would type (`bsns request`, `bsns audit
verify`) against real processes; a step that fails ends the demo with a non-zero status after everything was stopped.
Does not touch weights: the model folder is prepared by a process of its own. The language model answers a prompt, an
image classifier says what is on a photograph; nothing else differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.record import VerificationRecord
from coordinator.devnet import MARKER_FILE, Devnet, DevnetError
from coordinator.settings import SettingsError
from coordinator.storage import AccountBook, KeyLimits, Storage

REQUEST_TIMEOUT_S = 600.0
AUDIT_TIMEOUT_S = 60.0
WATCH_INTERVAL_S = 1.0
# By name: what is prepared under it is the business of bsns.runtime, which nothing here may load.
DEFAULT_MODEL = "smollm2-135m-instruct"
EXAMPLE_PROMPT = "Why is the sky blue?"
DEVNET_ACCOUNT_WEI = 10**18
EXAMPLE_IMAGE = Path("mpl-data/sample_data/grace_hopper.jpg")  # in the folder of matplotlib


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the caller chooses. A language model takes `prompt` and `maximum_tokens`, an image classifier `image`."""

    model: str
    prompt: str
    image: Path | None
    maximum_tokens: int
    nodes: int
    seed: int
    output: Path
    keep: bool = False


async def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """The whole demo; returns the summary. DevnetError says which step failed; every process is stopped either way,
    also when SIGTERM ends the demo.
    """
    demo = asyncio.current_task()
    assert demo is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo.cancel)
    model_folder = await prepared_model(settings.model)
    return await Demo(settings, console, model_folder).execute()


async def run_devnet(folder: Path, nodes: int, model: str, console: Console) -> None:
    """A network for `model` that runs until SIGINT or SIGTERM, with what to type to use it. A process of it that ends
    is reported; only without its chain does the network end too.
    """
    clear_network_folder(folder)
    model_folder = await prepared_model(model)
    is_classifier = load_manifest(model_folder).task == "image-classification"
    question = ("--image", str(example_image())) if is_classifier else ("--max-tokens", "32", EXAMPLE_PROMPT)
    stop = stop_signal()
    devnet = Devnet(
        folder,
        model_folder / "manifest.json",
        node_count=nodes,
        stage_count=stages_of(nodes),
        replicas=nodes // stages_of(nodes),
        progress=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    async with devnet:
        await devnet.await_plan()
        await devnet.start_gateway()
        for line in _what_to_try(devnet, model_folder, question):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        while not stop.is_set():
            for died in devnet.take_dead():
                console.print(
                    f"{died.name} ended with status {died.process.returncode}; the network goes on without it, see "
                    f"{died.log}",
                    highlight=False,
                    soft_wrap=True,
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), WATCH_INTERVAL_S)


def _what_to_try(devnet: Devnet, model_folder: Path, question: Sequence[str]) -> list[str]:
    """What a person can open and type on a network that is up."""
    bsns, coordinator = (_as_typed(name) for name in ("bsns", "bsns-coordinator"))
    gateway, manifest = devnet.gateway.ready, load_manifest(model_folder)
    known = f"--rpc {devnet.rpc_url} --deployment {devnet.deployment_file} --key-file {devnet.requester_key_file}"
    secret = open_account(devnet.database_url, "devnet", DEVNET_ACCOUNT_WEI)
    body = json.dumps(
        {"model": manifest.name, "messages": [{"role": "user", "content": EXAMPLE_PROMPT}], "stream": True}
    )
    curl = f"curl -N {gateway['url']}/v1/chat/completions -H 'Authorization: Bearer {secret}' "
    lines = [
        "",
        "the network is up:",
        f"  pages to look at   {gateway['url']}/",
        f"  OpenAI's API       {gateway['url']}/v1   key {secret}",
        f"  metrics            http://{gateway['health']}/metrics   http://{devnet.coordinator.ready['health']}/metrics",
        f"  chain (JSON-RPC)   {devnet.rpc_url}",
        "three commands to try:",
        f"  {bsns} request {known} --model-folder {model_folder} --record build/record.json {shlex.join(question)}",
        f"  {bsns} audit verify build/record.json --rpc {devnet.rpc_url}",
        curl + f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
        if manifest.task != "image-classification"
        else f"  {coordinator} status --database-url {devnet.database_url}",
        "or put money down once and pay without a transaction each:",
        f"  {bsns} tab fund 1000000000000000 {known}",
        f"  {bsns} request --tab --coordinator {devnet.coordinator.ready['endpoint']} {known} "
        f"--model-folder {model_folder} {shlex.join(question)}",
        "Ctrl-C stops everything.",
    ]
    return [line if not line.startswith("curl") else f"  {line}" for line in lines]


def open_account(database_url: str, name: str, wei: int) -> str:
    """An account of the gateway with `wei` on it; its key."""
    storage = Storage.of_existing(database_url)
    try:
        book, now = AccountBook(storage), int(time.time())
        account = book.open_account(name, None, now)
        book.deposit(account.account_id, wei, f"devnet-{account.account_id}", now)
        return book.create_key(account.account_id, name, KeyLimits(), now)[0]
    finally:
        storage.close()


def _as_typed(command: str) -> str:
    """A command of this installation as a person types it here, where it need not be in PATH."""
    found = Path(sys.executable).parent / command
    if shutil.which(command) is not None or not found.exists():
        return command
    try:
        return str(found.relative_to(Path.cwd()))
    except ValueError:
        return str(found)


def stages_of(nodes: int) -> int:
    """How many stages: with two replicas each where there are nodes enough, so that any one of them may die."""
    return nodes // 2 if nodes >= 4 else nodes


def stop_signal() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def clear_network_folder(folder: Path) -> None:
    """Remove what an earlier network left in `folder`; SettingsError if it holds anything else."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER_FILE).exists()):
        raise SettingsError(
            f"{folder} is not the folder of an earlier network, so it is not emptied: give another, or delete it"
        )
    shutil.rmtree(folder)


def example_image() -> Path:
    """The photograph that the demo asks an image classifier about: Rear Admiral Grace Hopper in uniform (U.S. Navy,
    public domain). EfficientNet-Lite0 takes it for an academic gown; "military uniform" is its third guess. It comes
    with matplotlib, which is located and not imported.
    """
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / EXAMPLE_IMAGE if found is not None and found.origin is not None else None
    if path is None or not path.is_file():
        raise DevnetError(
            "the example photograph of matplotlib is not installed: name an image of yours (IMAGE=photo.jpg)"
        )
    return path


def load_manifest(model_folder: Path) -> ModelManifest:
    """The manifest of a prepared model; DevnetError if it cannot be read."""
    path = model_folder / "manifest.json"
    try:
        return ModelManifest.from_bytes(path.read_bytes())
    except (OSError, ManifestError) as error:
        raise DevnetError(f"{path} cannot be used: {error}") from error


async def prepared_model(model: str) -> Path:
    """Folder of a model by its name; prepared by a process of its own, as nothing here may load torch."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bsns.runtime.prepare", "--model", model),
        stdout=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise DevnetError("the model could not be prepared; the reason is above")
    return Path(output.decode().strip().splitlines()[-1])


class Demo:
    """One run. `execute` returns the summary, or raises DevnetError saying which step failed."""

    def __init__(self, settings: DemoSettings, console: Console, model_folder: Path) -> None:
        self._settings = settings
        self._console = console
        self._model_folder = model_folder
        is_classifier = load_manifest(model_folder).task == "image-classification"
        self._image = (settings.image or example_image()) if is_classifier else None
        if settings.image is not None and self._image is None:
            raise DevnetError(f"model {settings.model} takes no image: name an image classifier, or give no image")
        self._began = time.monotonic()
        folder = settings.output / "network"
        clear_network_folder(folder)
        self._devnet = Devnet(
            folder,
            model_folder / "manifest.json",
            node_count=settings.nodes,
            # On one machine whole copies of a small model would serve faster; this is to show a sharded one.
            stage_count=stages_of(settings.nodes),
            replicas=settings.nodes // stages_of(settings.nodes),
            progress=self._say,
        )

    async def execute(self) -> dict[str, Any]:
        """Run the whole demo; writes summary.json and record.json under the output folder."""
        settings = self._settings
        settings.output.mkdir(parents=True, exist_ok=True)
        record_file = settings.output / "record.json"
        for stale in (record_file, settings.output / "summary.json"):
            stale.unlink(missing_ok=True)
        async with self._devnet as devnet:
            for item in await devnet.await_plan():
                self._say(f"plan: stage {item[0]} = units {item[2]}..{item[3] - 1} on {item[4]}")
            self._say(f"requester asks: {settings.prompt if self._image is None else f'what is on {self._image}?'}")
            answer = json.loads(await self._run("request", self._request_command(record_file), REQUEST_TIMEOUT_S))
            if not record_file.exists():
                raise DevnetError(f"the request ended without a record: {json.dumps(answer)}")
            record = VerificationRecord.from_bytes(record_file.read_bytes())
            await self._run(
                "audit",
                [*self._bsns(), "audit", "verify", str(record_file), "--rpc", devnet.rpc_url],
                AUDIT_TIMEOUT_S,
            )
            self._say("auditor: the record holds against the chain alone")
            summary = {**self._question(), **summarise(answer, record, record_file)}
            (settings.output / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            self._show(summary)
            if settings.keep:
                self._say(f"the chain is kept until Ctrl-C: bsns audit verify {record_file} --rpc {devnet.rpc_url}")
                await stop_signal().wait()
        return summary

    def _request_command(self, record_file: Path) -> list[str]:
        devnet, settings = self._devnet, self._settings
        return [
            *(*self._bsns(), "request"),
            *("--rpc", devnet.rpc_url),
            *("--deployment", str(devnet.deployment_file)),
            *("--key-file", str(devnet.requester_key_file)),
            *("--model-folder", str(self._model_folder)),
            *("--state-dir", str(devnet.folder / "requester")),
            *("--seed", str(settings.seed)),
            *("--record", str(record_file)),
            "--token-ids",
            "--json",
            *(
                ("--image", str(self._image))
                if self._image is not None
                else ("--max-tokens", str(settings.maximum_tokens), "--", settings.prompt)
            ),
        ]

    def _question(self) -> dict[str, str]:
        return {"prompt": self._settings.prompt} if self._image is None else {"image": str(self._image)}

    @staticmethod
    def _bsns() -> tuple[str, ...]:
        return (sys.executable, "-m", "bsns.cli")

    async def _run(self, name: str, command: Sequence[str], timeout_s: float) -> str:
        """Run one command to its end; its standard error (progress, streamed tokens) goes straight to the terminal."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            raise DevnetError(f"{name} was not done within {timeout_s:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            logs = ", ".join(str(child.log) for child in self._devnet.processes)
            raise DevnetError(f"{name} failed with status {process.returncode}:\n{output.decode()}\nlogs: {logs}")
        return output.decode()

    def _say(self, line: str) -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._began:6.1f} s[/dim]  {escape(line)}", highlight=False, soft_wrap=True
        )

    def _show(self, summary: dict[str, Any]) -> None:
        table = Table(title="One paid, sharded, verified inference", show_header=False, title_justify="left")
        table.add_row("answer" if self._image is None else "class", escape(summary["text"]))
        table.add_row("request", summary["request_id"])
        for node in summary["nodes"]:
            paid = summary["paid_wei"].get(node["operator"], 0)
            units = f"units {node['first_unit']:>2}..{node['last_unit']:<2}"
            table.add_row(f"node {node['address'][:10]}…", f"{units}  operator credited {paid:,} wei")
        seats = len(summary["committee"])
        agreeing = sum(seat["verdict"] == "accepted" for seat in summary["committee"])
        table.add_row("committee", f"{agreeing} of {seats} re-executions agree")
        table.add_row("verdict", summary["verdict"])
        table.add_row("money", f"deposit {summary['fee_wei']:,} wei, refunded {summary['refunded_wei']:,} wei")
        gas = [item["gas_used"] for item in summary["transactions"]]
        table.add_row("gas", f"{sum(gas):,} in {len(gas)} transactions")
        first = "first token" if self._image is None else "class"
        speed, rate = f"{first} after {summary['time_to_first_token_s']:.2f} s", summary["tokens_per_second"]
        # One token has no rate.
        table.add_row("speed", speed if rate is None else f"{speed}, then {rate:.1f} tokens/s")
        table.add_row("record", f"{summary['record']} ({Path(summary['record']).stat().st_size:,} bytes)")
        self._console.print(table)


def summarise(answer: dict[str, Any], record: VerificationRecord, record_file: Path) -> dict[str, Any]:
    """The demo's summary.json out of the requester's answer and the verified record."""
    stages = record.route.stages if record.route else ()
    assignments = record.plan.assignments
    domain = record.domain
    requester = record.request.requester
    paid: dict[str, int] = {}
    if record.payment:
        for credit in record.payment.credits:
            if credit.account != requester:
                paid[credit.account] = paid.get(credit.account, 0) + credit.amount
    tolerance = record.term("OutputVerification.tolerance")
    committee = []
    for round_ in record.rounds:
        distances = {
            (tally.stage, item.node): item.distance for tally in round_.tallies for item in tally.member_distances
        }
        for member in round_.members:
            distance = distances.get((member.stage, member.node))
            committee.append(
                {
                    "address": member.node,
                    "stage": member.stage,
                    "verdict": "absent" if distance is None else "accepted" if distance <= tolerance else "deviating",
                }
            )
    conclusion = record.conclusion
    return {
        **({"prompt_token_ids": answer["prompt_token_ids"]} if "prompt_token_ids" in answer else {}),
        "text": answer["text"],
        "token_ids": answer["token_ids"],
        "model_id": "0x" + record.model.model_id.hex(),
        "request_id": "0x" + record.request.request_id.hex(),
        "chain_id": domain.chain_id,
        "contracts": {
            "NodeRegistry": domain.node_registry,
            "ShardAssignments": domain.shard_assignments,
            "InferenceEscrow": domain.inference_escrow,
            "OutputVerification": domain.output_verification,
            "RequestTabs": domain.request_tabs,
        },
        "nodes": [
            {
                "address": stage.node,
                "operator": stage.operator,
                "first_unit": assignments[stage.assignment].first_unit,
                "last_unit": assignments[stage.assignment].end_unit - 1,
            }
            for stage in stages
        ],
        "fee_wei": record.request.deposit,
        "paid_wei": paid,
        "refunded_wei": record.payment.refunded if record.payment else 0,
        "verdict": "pending" if conclusion is None else "accepted" if conclusion.accepted else "rejected",
        "committee": committee,
        "transactions": [
            {"name": item.events[0], "hash": "0x" + item.hash.hex(), "gas_used": item.gas_used}
            for item in record.transactions
        ],
        "time_to_first_token_s": answer["time_to_first_token_s"],
        "tokens_per_second": answer["tokens_per_second"],
        "record": str(record_file),
    }
