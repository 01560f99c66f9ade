"""The surfaces that strangers reach, and what must never happen there.

Each `fuzz_…` tries so many inputs and returns how many there were, how many killed something or raised what nobody
expects (crashes), and how many were answered as if the server were to blame (server errors). What was found is kept
with its input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import httpx2
import typer.main
from hypothesis import HealthCheck, Phase, given, seed, settings
from typer.testing import CliRunner

from bsns.v1 import coordination_pb2, execution_pb2, tabs_pb2
from tests.fuzz import inputs

CALL_S: Final = 5.0
KEPT_FINDINGS: Final = 50
# What a server answers whose handler raised.
_SERVER_ERRORS: Final = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
# Commands that do not end by themselves, or start other things whatever they are told.
_ENDLESS: Final = {("devnet",), ("demo",)}
_MILLION: Final = 10**6


@dataclass
class Tally:
    """What came of so many inputs."""

    tried: int = 0
    crashes: int = 0
    server_errors: int = 0
    findings: list[str] = field(default_factory=list)

    def crash(self, what: str) -> None:
        self.crashes += 1
        self._keep(f"crash: {what}")

    def server_error(self, what: str) -> None:
        self.server_errors += 1
        self._keep(f"server error: {what}")

    def _keep(self, what: str) -> None:
        if len(self.findings) < KEPT_FINDINGS:
            self.findings.append(what[:2_000])

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.crashes += other.crashes
        self.server_errors += other.server_errors
        self.findings += other.findings[: KEPT_FINDINGS - len(self.findings)]


def _each(strategy: Any, count: int, seed_: int, body: Callable[[Any], None]) -> None:
    """`body` of `count` examples; what hypothesis itself thinks of the strategy does not matter."""

    @seed(seed_)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(value: Any) -> None:
        body(value)

    with warnings.catch_warnings():
        # Other threads draw random numbers, too; hypothesis takes that for the strategy's doing.
        warnings.filterwarnings("ignore", "Do not use the `random` module inside strategies")
        run()


# ------------------------------------------------------------------------------------------------------------- decoders


def fuzz_decoder(decoder: inputs.Decoder, count: int, seed_: int) -> Tally:
    """Bytes for whatever reads bytes of strangers: a value, or the error it says it raises."""
    name, read, valid, allowed = decoder
    tally = Tally()
    for item in valid:
        read(item)  # what is good must be taken, or everything else is refused for the wrong reason

    def body(data: bytes) -> None:
        tally.tried += 1
        try:
            read(data)
        except allowed:
            pass
        except Exception as error:
            tally.crash(f"{name}: {type(error).__name__}: {error}: {data!r}")

    _each(inputs.mutated(valid), count, seed_, body)
    return tally


# ----------------------------------------------------------------------------------------------------------------- gRPC

SERVICES: Final = {
    "node": (execution_pb2.DESCRIPTOR.services_by_name["ShardExecution"],),
    "coordinator": (
        coordination_pb2.DESCRIPTOR.services_by_name["NodeCoordination"],
        tabs_pb2.DESCRIPTOR.services_by_name["RequestCollection"],
    ),
}


def fuzz_rpc(kind: str, endpoint: str, count: int, seed_: int) -> Tally:
    """Every RPC of a service: well-formed messages with any content, and bytes that are none. `count` for each."""
    tally = Tally()
    with grpc.insecure_channel(endpoint) as channel:
        for service in SERVICES[kind]:
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                call = _caller(channel, path, method)

                def body(data: bytes, call: Any = call, path: str = path) -> None:
                    tally.tried += 1
                    try:
                        call(data)
                    except grpc.RpcError as error:
                        code = error.code()  # type: ignore[attr-defined]
                        if code in _SERVER_ERRORS:
                            tally.server_error(f"{path}: {code.name} {error.details()}: {data.hex()}")  # type: ignore[attr-defined]

                shaped = inputs.messages(method.input_type).map(lambda item: item.SerializeToString())
                _each(shaped, count, seed_, body)
                _each(inputs.mutated([b"\x0a\x20" + bytes(32)]), count // 4, seed_, body)
    return tally


def _caller(channel: grpc.Channel, path: str, method: Any) -> Callable[[bytes], None]:
    options = {"request_serializer": None, "response_deserializer": None}
    if method.client_streaming:
        stream = channel.stream_stream(path, **options)

        def send(data: bytes) -> None:
            # A second message, so that what the first one did to the conversation is seen.
            for answered, _ in enumerate(stream(iter((data, data)), timeout=CALL_S)):
                if answered > 3:
                    break

        return send
    if method.server_streaming:
        listing = channel.unary_stream(path, **options)
        return lambda data: [None for _ in listing(data, timeout=CALL_S)] and None
    single = channel.unary_unary(path, **options)

    def once(data: bytes) -> None:
        single(data, timeout=CALL_S)

    return once


# ----------------------------------------------------------------------------------------------------------------- HTTP


def fuzz_http(url: str, key: str, model: str, count: int, seed_: int) -> Tally:
    """Every operation of the OpenAPI schema by schemathesis, `count` each; and requests that are nearly right."""
    import requests
    import schemathesis
    from schemathesis.core.errors import SchemathesisError

    tally = Tally()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/live":
                continue  # which never ends
            label = f"{operation.method.upper()} {operation.path}"

            def body(case: Any, label: str = label) -> None:
                tally.tried += 1
                try:
                    with_key = {"Authorization": f"Bearer {key}"} if tally.tried % 4 else {}
                    answer = case.call(session=session, headers=with_key, timeout=CALL_S * 4)
                except (requests.RequestException, ValueError, UnicodeError) as error:
                    # What no HTTP client can send was not sent.
                    if isinstance(error, requests.Timeout | requests.ConnectionError):
                        tally.crash(f"{label}: {error}: {case!r}")
                    return
                if answer.status_code >= 500:
                    tally.server_error(f"{label}: {answer.status_code} {answer.text[:300]}: {case!r}")

            with contextlib.suppress(SchemathesisError):
                _each(operation.as_strategy(), count, seed_, body)
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:

        def nearly(request: Any) -> None:
            tally.tried += 1
            try:
                data = json.dumps(request)
            except (ValueError, RecursionError):
                return
            path = "/v1/completions" if "prompt" in request and "messages" not in request else "/v1/chat/completions"
            answer = client.post(path, content=data.encode(), headers={"Content-Type": "application/json"})
            if answer.status_code >= 500:
                tally.server_error(f"{path}: {answer.status_code} {answer.text[:300]}: {data}")

        _each(inputs.chat_bodies(model), count * 4, seed_, nearly)

        def raw(data: bytes) -> None:
            tally.tried += 1
            answer = client.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
            if answer.status_code >= 500:
                tally.server_error(f"raw: {answer.status_code} {answer.text[:300]}: {data!r}")

        good = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
        _each(inputs.mutated([good.encode()]), count * 4, seed_, raw)
    return tally


# ------------------------------------------------------------------------------------------------------------- commands


def fuzz_commands(count: int, seed_: int) -> Tally:
    """Every command with any arguments: it ends, with an exit code of its own and no traceback."""
    from bsns.cli import app as requester
    from coordinator.cli import app as coordinator
    from node_client.cli import app as node

    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, _alone_in(Path(folder)):
        for name, application in (("bsns", requester), ("bsns-node", node), ("bsns-coordinator", coordinator)):
            group: Any = typer.main.get_command(application)
            for path, command in inputs.commands(group):
                if path in _ENDLESS:
                    continue
                runner = CliRunner()

                def body(arguments: list[str], name: str = name, to: Any = application, runner: Any = runner) -> None:
                    tally.tried += 1
                    done = runner.invoke(to, arguments, catch_exceptions=True, input="")
                    error = done.exception
                    if error is not None and not isinstance(error, SystemExit):
                        tally.crash(f"{name} {arguments!r}: {type(error).__name__}: {error}")
                    elif done.exit_code not in range(6):
                        tally.crash(f"{name} {arguments!r}: exit code {done.exit_code}")

                _each(inputs.arguments(command, path), count, seed_, body)
    return tally


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No setting of this environment, and nothing written outside of `folder`."""
    before, environment, errors = Path.cwd(), dict(os.environ), sys.stderr
    for name in list(os.environ):
        if name.startswith("BSNS_"):
            del os.environ[name]
    os.environ["HOME"] = os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = str(folder)
    os.chdir(folder)
    sys.stderr = io.StringIO()
    try:
        yield
    finally:
        sys.stderr = errors
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
