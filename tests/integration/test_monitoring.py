"""Metrics, dashboard and alerts against a real Prometheus that scrapes a real network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from bsns.runtime.prepare import prepare
from bsns.tracing import trace_ids
from tests.integration.gateway_network import GatewayNetwork, running_gateway
from tests.unit.test_tracing import Collector

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WAIT_S = 60.0
# Counted only when something goes wrong, or moves: nothing to see on a network where nothing has.
TESTS = "alerts_test.yml"
RARE = {"bsns_transactions_total"}

pytestmark = [pytest.mark.timeout(420), pytest.mark.model, pytest.mark.chain]


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"there is no {name} here: `apt-get install prometheus`")
    return found


def expressions() -> dict[str, str]:
    """Every query of the dashboard, by panel and number."""
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return {
        f"{panel['title']} {target['refId']} ({panel['id']})": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    }


@contextmanager
def running_prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[httpx2.Client]:
    """Prometheus with the project's rules, every second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


def answer(client: httpx2.Client, path: str, **parameters: str) -> Any:
    found = client.get(f"/api/v1/{path}", params=parameters)
    assert found.status_code == 200, found.text
    return found.json()["data"]


def until(condition: Any, what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            found = condition()
        except httpx2.HTTPError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} within {WAIT_S} s"
        time.sleep(0.25)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[GatewayNetwork]:
    with pytest.MonkeyPatch.context() as patch:
        for service in ("NODE", "COORDINATOR", "GATEWAY"):
            patch.setenv(f"BSNS_{service}_OTLP_ENDPOINT", collector.url)
        with running_gateway(tmp_path_factory.mktemp("monitored"), prepare()) as found:
            yield found


def test_one_request_is_one_trace_across_all_hops(network: GatewayNetwork, collector: Collector) -> None:
    with network.client(network.account()) as client:
        answer = client.chat.completions.create(
            model=network.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
        )
    request = bytes.fromhex(answer.model_extra["bsns"]["requests"][0]["request_id"][2:])  # type: ignore[index]
    trace, root = trace_ids(request)
    wanted = {
        ("bsns-gateway", "request"), ("bsns-coordinator", "take ticket"), ("bsns-node", "stage 0"),
        ("bsns-node", "stage 0 prompt"), ("bsns-node", "stage 1"), ("bsns-node", "stage 1 prompt"),
    }  # fmt: skip

    def mine() -> list[Any]:
        return [item for item in collector.spans if int.from_bytes(item[1].trace_id) == trace]

    until(lambda: wanted <= {(service, span.name) for service, span in mine()}, "all spans came")
    for service, span in mine():
        if service == "bsns-gateway":
            assert int.from_bytes(span.span_id) == root
        else:
            assert int.from_bytes(span.parent_span_id) == root
    nodes = {
        item.value.string_value for _, span in mine() if span.name.startswith("stage") for item in span.attributes
        if item.key == "bsns.node"
    }  # fmt: skip
    assert nodes == {child.ready["node"] for child in network.devnet.nodes}


def test_rules_are_valid_and_fire_when_they_should() -> None:
    for command in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(
            [program("promtool"), *command], cwd=DEPLOY, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 15
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_dashboard_and_alerts_read_what_the_services_say(network: GatewayNetwork, tmp_path: Path) -> None:
    devnet, key = network.devnet, network.account()
    nodes = [child.ready["health"] for child in devnet.nodes]
    targets = {
        "bsns-node": nodes,
        "bsns-coordinator": [devnet.coordinator.ready["health"]],
        "bsns-gateway": [devnet.gateway.ready["health"]],
    }
    with running_prometheus(tmp_path, targets) as prometheus, network.client(key) as client:

        def are_up() -> bool:
            found = answer(prometheus, "query", query="up")["result"]
            return [item["value"][1] for item in found] == ["1"] * (len(nodes) + 2)

        until(are_up, "all targets are up")
        for _ in range(3):
            # Rates need two scrapes with a change between them.
            client.chat.completions.create(
                model=network.model, messages=[{"role": "user", "content": "Count."}], max_tokens=4
            )
            time.sleep(1.2)
        for name, query in expressions().items():
            result = answer(prometheus, "query", query=query)["result"]
            assert result or any(metric in query for metric in RARE), f"{name}: {query} gives nothing"
            assert all(item["value"][1] != "NaN" for item in result) or "quantile" in query, name
        names = set(answer(prometheus, "label/__name__/values"))
        for rule in answer(prometheus, "rules")["groups"]:
            for alert in rule["rules"]:
                assert alert["health"] in ("ok", "unknown"), alert
        until(lambda: all(
            alert["health"] == "ok" for group in answer(prometheus, "rules")["groups"] for alert in group["rules"]
        ), "all rules were evaluated")  # fmt: skip
        firing = [alert["labels"]["alertname"] for alert in answer(prometheus, "alerts")["alerts"]]
        assert firing == []
        # One prefix, and units where there is one.
        ours = {name for name in names if not name.startswith(("up", "scrape_", "ALERTS"))}
        assert all(name.startswith("bsns_") for name in ours)
        assert {
            "bsns_stake_wei",
            "bsns_steps_total",
            "bsns_hop_bytes_total",
            "bsns_stage_duration_seconds_bucket",
        } <= ours
        steps = answer(prometheus, "query", query="sum by (stage) (bsns_steps_total)")["result"]
        assert {item["metric"]["stage"] for item in steps} == {"0", "1"}
        stake = answer(prometheus, "query", query='sum(bsns_stake_wei{job="bsns-coordinator"})')["result"]
        assert float(stake[0]["value"][1]) == 1.5e18 * len(nodes)
        # A node that dies is noticed.
        network.run(devnet.nodes[-1].stop())
        devnet.take_dead()

        def alerted() -> list[str]:
            return [item["labels"]["alertname"] for item in answer(prometheus, "alerts")["alerts"]]

        until(lambda: "BsnsNodeDown" in alerted(), "the dead node is noticed")


def test_readiness_and_liveness_of_all_services(network: GatewayNetwork) -> None:
    devnet = network.devnet
    for child in (devnet.coordinator, devnet.gateway, devnet.nodes[0]):
        with httpx2.Client(base_url=f"http://{child.ready['health']}") as http:
            assert http.get("/healthz").json() == {"status": "alive"}
            assert http.get("/readyz").json() == {"status": "ready", "reason": None}
            assert http.get("/nothing").status_code == 404
            assert http.post("/metrics", content=b"x" * 10_000).status_code in (405, 413)
