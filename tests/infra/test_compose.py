"""The compose file is valid, publishes on loopback only, holds no secret, and what it runs is what it says."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url


@pytest.fixture(scope="module")
def compose(infra, repository: Path) -> Any:
    (document,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    return document


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "infra/compose/compose.yaml").read_text()


def test_compose_file_is_valid(infra, compose) -> None:
    assert infra.compose_faults(compose) == []


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ((), "service"),
        (("services", "ray-head"), "port"),
        (("services", "postgres", "healthcheck"), "intervall"),
        (("services", "mlflow", "depends_on", "s3"), "when"),
        (("services", "ray-worker", "deploy"), "replica"),
        (("volumes", "s3"), "drivers"),
    ],
)
def test_an_unknown_field_is_refused(infra, compose, path: tuple[str, ...], field: str) -> None:
    broken = copy.deepcopy(compose)
    inner = broken
    for key in path:
        inner = inner[key]
    inner[field] = "x"
    assert any(field in fault for fault in infra.compose_faults(broken))


def test_a_wrong_condition_is_refused(infra, compose) -> None:
    broken = copy.deepcopy(compose)
    broken["services"]["mlflow"]["depends_on"]["s3"]["condition"] = "service_helthy"
    assert infra.compose_faults(broken)


def test_the_driver_of_mlflows_database_is_the_one_that_the_image_installs(compose, repository: Path) -> None:
    given = compose["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    driver = make_url(re.sub(r"\$\{[^}]*\}", "x", given)).get_dialect().import_dbapi().__name__
    assert f'postgres = ["{driver}-binary' in (repository / "pyproject.toml").read_text()
    assert "pyproject.toml pipeline postgres >" in (repository / "infra/docker/Dockerfile").read_text()


def test_ports_are_published_on_loopback_only(compose) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_server_has_a_healthcheck_and_dependents_wait_for_it(compose) -> None:
    services = compose["services"]
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"mae"}
    for service in services.values():
        for name, dependency in service.get("depends_on", {}).items():
            assert name in services
            assert dependency["condition"] == "service_healthy"


def test_images_are_pinned(compose) -> None:
    for service in compose["services"].values():
        _, _, tag = service["image"].rpartition(":")
        assert tag.rstrip("}") not in ("", "latest")


def test_every_ray_process_says_how_it_authenticates(compose) -> None:
    for name in ("ray-head", "ray-worker", "mae"):
        environment = compose["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_mlflow_accepts_the_host_that_runs_call_it_by(compose) -> None:
    allowed = compose["services"]["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    called = compose["services"]["ray-head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert called in allowed


def test_secrets_come_from_the_environment_file(compose, text: str, repository: Path) -> None:
    for service in compose["services"].values():
        for key, value in service.get("environment", {}).items():
            if key.endswith("__FILE"):
                assert value.startswith("/run/secrets/"), key
            elif re.search("SECRET|PASSWORD|TOKEN|ACCESS_KEY", key):
                assert value.startswith("${"), key
    example = (repository / "infra/compose/.env.example").read_text()
    declared = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) | {"COMPOSE_PROJECT_NAME"} == set(declared)
    assert [key for key in declared if re.search("SECRET|PASSWORD|TOKEN", key) and declared[key]] == []
    assert ".env" in (repository / "infra/compose/.gitignore").read_text().splitlines()


def test_builds_name_a_stage_of_the_dockerfile(compose, repository: Path) -> None:
    build = compose["services"]["ray-head"]["build"]
    context = repository / "infra/compose" / build["context"]
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (context / build["dockerfile"]).read_text(), re.MULTILINE)
    default = re.fullmatch(r"\$\{MAE_TARGET:-(\w+)\}", build["target"])
    assert default is not None
    assert default[1] in stages
