"""Dashboards and alert rules use metrics that the code exports, rules fire when they should, and each has a remedy."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from pipelines.monitoring.metrics import dataset_families, exporter_families, registry_families, run_families
from pipelines.registry import RegistryCounts
from tests.waiting import COMMAND_DEADLINE_S

RAY = {
    "ray_node_cpu_utilization",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_object_store_available_memory",
    "ray_object_store_used_memory",
}
"""Metrics of Ray's own exporter that we use; test_two_nodes finds them there."""
SERIES = Path(__file__).with_name("alert_series.yaml")


def exported() -> dict[str, tuple[str, ...]]:
    """Return the labels of every metric that `mae exporter` exports, by the name of its samples."""
    empty = RegistryCounts(num_versions={}, aliases={}, moves=[], gates={})
    families = [*run_families({}), *dataset_families([]), *registry_families(empty), *exporter_families({})]
    return {f.name + ("_total" if f.type == "counter" else ""): tuple(f._labelnames) for f in families}


def selectors(query: str) -> list[Any]:
    """Return the vector selectors of a query. Raises ValueError if it is no PromQL."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    assert found
    return found


def wrong(query: str) -> list[str]:
    """Return what a query uses that nobody exports."""
    known, faults = exported(), []
    for selector in selectors(query):
        if selector.name in RAY:
            continue
        if selector.name not in known:
            faults.append(selector.name)
            continue
        faults += [
            f"{selector.name}.{m.name}" for m in selector.matchers.matchers if m.name not in known[selector.name]
        ]
    return faults


@pytest.fixture(scope="module")
def rules(repository: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load((repository / "infra/monitoring/alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboards(repository: Path) -> list[dict[str, Any]]:
    found = sorted((repository / "infra/monitoring/grafana/dashboards").glob("*.json"))
    return [json.loads(path.read_text()) for path in found]


def test_every_panel_queries_metrics_and_labels_that_are_exported(dashboards: list[dict[str, Any]]) -> None:
    queries = [
        (f"{board['title']}: {panel['title']}", target["expr"].replace("$run", "x"))
        for board in dashboards
        for panel in board["panels"]
        for target in panel["targets"]
    ]
    assert len(queries) > 30
    assert {title: faults for title, query in queries if (faults := wrong(query))} == {}


def test_every_exported_metric_is_shown_or_alerted_on(
    dashboards: list[dict[str, Any]], rules: list[dict[str, Any]]
) -> None:
    queries = [t["expr"].replace("$run", "x") for board in dashboards for p in board["panels"] for t in p["targets"]]
    used = {selector.name for query in [*queries, *(rule["expr"] for rule in rules)] for selector in selectors(query)}
    assert exported().keys() - used == set()


def test_panels_have_ids_descriptions_and_do_not_overlap(dashboards: list[dict[str, Any]]) -> None:
    assert len({board["uid"] for board in dashboards}) == len(dashboards) == 2
    for board in dashboards:
        cells: set[tuple[int, int]] = set()
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            assert panel["description"]
            assert panel["datasource"]["uid"] == "prometheus"
            at = panel["gridPos"]
            own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & own, panel["title"]
            cells |= own


def test_every_rule_queries_metrics_and_labels_that_are_exported(rules: list[dict[str, Any]]) -> None:
    assert {rule["alert"]: faults for rule in rules if (faults := wrong(rule["expr"]))} == {}


def test_an_unknown_metric_or_label_would_be_found() -> None:
    assert wrong('mae_run_stepz > 0 and on (run) mae_run_state{status="running"} == 1') == [
        "mae_run_stepz",
        "mae_run_state.status",
    ]


def test_every_alert_has_its_entry_in_the_runbook(rules: list[dict[str, Any]], repository: Path) -> None:
    headings = re.findall(r"^## (\w+)$", (repository / "docs/runbook.md").read_text(), re.MULTILINE)
    assert [rule["alert"] for rule in rules] == headings
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]


@pytest.mark.slow
def test_alerts_fire_on_their_series_and_are_silent_on_a_healthy_run(
    rules: list[dict[str, Any]], repository: Path, tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is absent; infra/system_packages.sh installs it where apt-get can")
    tests = yaml.safe_load(SERIES.read_text())
    healthy, sick = tests["tests"][0], tests["tests"][1:]
    assert {case["alertname"] for case in healthy["alert_rule_test"]} == {rule["alert"] for rule in rules}
    assert not any(case.get("exp_alerts") for case in healthy["alert_rule_test"])
    fired = {case["alertname"] for test in sick for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules}
    (tmp_path / "series.yaml").write_text(
        yaml.safe_dump({**tests, "rule_files": [str(repository / "infra/monitoring/alerts.yml")]})
    )
    command = [promtool, "test", "rules", str(tmp_path / "series.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_prometheus_scrapes_what_the_compose_file_starts(infra, repository: Path) -> None:
    config = yaml.safe_load((repository / "infra/monitoring/prometheus.yml").read_text())
    (compose,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (target,) = jobs["mae"]["static_configs"][0]["targets"]
    assert target == "exporter:9400"
    assert "9400" in compose["services"]["exporter"]["healthcheck"]["test"][-1]
    (found,) = jobs["ray"]["dns_sd_configs"]
    for name in found["names"]:
        words = " ".join(compose["services"][name]["command"]).replace("=", " ")
        assert f"--metrics-export-port {found['port']}" in words
    mounted = {volume.split(":")[1] for volume in compose["services"]["prometheus"]["volumes"]}
    assert {"/etc/prometheus/prometheus.yml", f"/etc/prometheus/{config['rule_files'][0]}"} <= mounted


def test_grafana_finds_prometheus_and_the_dashboards(infra, repository: Path, dashboards) -> None:
    (compose,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"] if volume.startswith(".."))
    assert set(mounts.values()) == {"/etc/grafana/provisioning", "/etc/mae/dashboards"}
    folder = repository / "infra/monitoring/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((folder / "dashboards/mae.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["../monitoring/grafana/dashboards"]


def test_grafana_has_no_default_password_and_no_anonymous_access(infra, repository: Path) -> None:
    (compose,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    environment = compose["services"]["grafana"]["environment"]
    secret = Path(environment["GF_SECURITY_ADMIN_PASSWORD__FILE"])
    assert secret.parent == Path("/run/secrets")
    assert compose["services"]["grafana"]["secrets"] == [secret.name]
    file = Path(compose["secrets"][secret.name]["file"])
    assert f"{file.parent}/" in (repository / "infra/compose/.gitignore").read_text().splitlines()
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment
