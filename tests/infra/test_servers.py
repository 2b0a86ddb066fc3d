"""The servers of the compose file, started with its own command lines: the S3 store and MLflow."""

import re
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from pipelines.bench.ports import free_port, free_store_ports
from tests.waiting import wait_until

KEY, SECRET = "key-of-a-test", "secret-of-a-test"


@pytest.fixture(scope="module")
def compose(infra, repository) -> Any:
    (document,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    return document["services"]


@pytest.fixture(scope="module")
def store(compose, servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the S3 store with compose's command, except for ports and unneeded services; yield its address."""
    root = tmp_path_factory.mktemp("store")
    kept = [word for word in compose["s3"]["command"] if not re.match(r"-(dir|ip|ip\.bind)=", word)]
    assert len(kept) == len(compose["s3"]["command"]) - 3
    ports = free_store_ports("admin")
    command = [servers.program("weed"), *kept, f"-dir={root}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    assert keys.keys() == compose["s3"]["environment"].keys()
    url = f"http://127.0.0.1:{ports['s3']}"
    with servers.process(command, keys, root.with_suffix(".log")) as server:
        path = re.search(r"http://127.0.0.1:8333(/\w+)", compose["s3"]["healthcheck"]["test"][-1])
        assert path is not None
        server.until(lambda: servers.status(f"{url}{path[1]}") == 200)
        yield url


def client(url: str, secret: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=secret
    )


@pytest.mark.s3
def test_the_store_has_the_buckets_that_others_use(store: str, compose) -> None:
    used = {"mae", compose["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://")}

    def found() -> set[str]:
        return {bucket["Name"] for bucket in client(store, SECRET).list_buckets()["Buckets"]}

    # They are created just after the store reports that it is healthy.
    wait_until(lambda: used <= found(), f"the buckets {used}", errors=(ClientError,))
    assert found() == used


@pytest.mark.s3
def test_the_store_refuses_a_wrong_secret(store: str) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(store, "another").list_buckets()


@pytest.fixture(scope="module")
def mlflow(compose, servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's address; command and allowed hosts are compose's, sqlite and a folder stand for Postgres and S3."""
    root = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    words = {"mlflow": servers.program("mlflow"), "0.0.0.0": "127.0.0.1", "5000": str(port), "2": "1"}
    environment = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{root}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(root / "artifacts"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": compose["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"],
    }
    assert environment.keys() <= compose["mlflow"]["environment"].keys()
    command = [words.get(word, word) for word in compose["mlflow"]["command"]]
    with servers.process(command, environment, root.with_suffix(".log")) as server:
        server.until(lambda: servers.status(f"http://127.0.0.1:{port}/health") == 200)
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.parametrize(("host", "status"), [("mlflow:5000", 200), ("elsewhere.example:5000", 403)])
def test_mlflow_answers_to_the_names_it_was_given(mlflow: str, host: str, status: int, servers) -> None:
    assert servers.status(f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0", Host=host) == status
