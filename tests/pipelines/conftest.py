"""A real S3 server, a Ray of four logical CPUs, the shipped sample, and a zoo of images good and bad."""

import contextlib
import io
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.bench.object_store import environment
from pipelines.bench.ports import StorePorts, free_store_ports
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest, Shard, Split, write_manifest
from pipelines.prepare import prepare as prepare_source
from pipelines.prepare.shards import SCHEMA
from pipelines.storage import open_storage
from tests.pipelines.s3_server import CREDENTIALS, S3Server
from tests.pipelines.zoo import Animal, broken, whole


@pytest.fixture(autouse=True)
def no_run_left_open() -> Iterator[None]:
    """Fail a test that leaves an MLflow run open: its thread would go on to log, into other tests' output too."""
    known = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "mlflow-machine" and thread not in known]
    assert not left, "an MLflow run was not finished"


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[StorePorts]:
    """AWS_* in this process' environment name a server that may yet have to be started, before Ray's workers are."""
    ports = free_store_ports()
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}", "AWS_EC2_METADATA_DISABLED": "true"}
    with environment(CREDENTIALS | endpoint):
        yield ports


@pytest.fixture(scope="session")
def s3(s3_environment: StorePorts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://bucket of a SeaweedFS server that runs in this session."""
    server = S3Server(tmp_path_factory.mktemp("weed"), s3_environment)
    try:
        server.start()
        yield server.uri
    finally:
        server.stop()


@pytest.fixture(scope="module")
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start a server of the test's own, which it may kill. Its endpoint is in no environment."""
    server = S3Server(tmp_path_factory.mktemp("own-weed"), free_store_ports())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def ray4(s3_environment: StorePorts) -> Iterator[None]:
    """Start one Ray with four logical CPUs for all tests that use it; its workers know the S3 server's address."""
    import ray

    # Ray runs workers at niceness 15, so that tests in other processes would hold these up.
    niceness = environment({"RAY_worker_niceness": "0"})
    # A socket's path may be 107 bytes long: pytest's own folders would make it longer.
    with niceness, tempfile.TemporaryDirectory(prefix="mae-ray-", dir="/tmp") as scratch:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 2**20,
            _temp_dir=scratch,
        )
        yield
        ray.shutdown()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` does the work of its tasks in this process."""
    monkeypatch.setattr("pipelines.cluster.ray_session", lambda compute: contextlib.nullcontext())
    monkeypatch.setattr("pipelines.prepare.passes._run_tasks", map)


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """Return a function that draws a gray image of 8 x 8 px, a different one for every number."""

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encoded


@pytest.fixture
def prepared(tmp_path: Path, without_ray: None) -> Callable[..., tuple[Manifest, dict[str, list[dict]]]]:
    """Return a function that prepares a source and returns its manifest and the rows of each split."""

    def prepare(source: str | Path, out: str = "out", **options: Any) -> tuple[Manifest, dict[str, list[dict]]]:
        config = PrepareConfig(**{"val_fraction": 0, "rows_per_shard": 6, "rows_per_group": 2, **options})
        manifest = prepare_source(str(source), str(tmp_path / out), config)
        storage, rows = open_storage(tmp_path / out), {}
        for name, split in manifest.splits.items():
            tables = [pq.read_table(storage.open_input(shard.path)) for shard in split.shards]
            rows[name] = [row for table in tables for row in table.to_pylist()]
        assert not (tmp_path / out / ".prepare").exists()
        return manifest, rows

    return prepare


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the images of the bundled sample. Tests must not write to the folder."""
    from pipelines.sample import unpack

    return unpack(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images of the sample, three classes, in train/ and test/. Read only."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in {"train": 80, "test": 20}.items():
        for name in ("bag", "dress", "sneaker"):
            (folder / split / name).mkdir(parents=True)
            for path in sorted((sample / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name / path.name)
    return folder


@pytest.fixture(scope="session")
def few_prepared(ray4: None, few: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of a prepared dataset of `few`: shards of 64 rows in row groups of 16. Read only."""
    from pipelines.config import PrepareConfig
    from pipelines.prepare import prepare

    uri = str(tmp_path_factory.mktemp("few-prepared"))
    prepare(str(few), uri, PrepareConfig(rows_per_shard=64, rows_per_group=16))
    return uri


def _tile(label: int, number: int) -> bytes:
    """Draw a noisy tile, dark or bright by its label."""
    pixels = np.random.default_rng(number).integers(0, 60, (8, 8, 3))
    pixels += 150 * label
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tiles(tmp_path: Path) -> tuple[str, Manifest]:
    """Prepare a dataset of 40 and 20 labelled tiles of 8 x 8 px without Ray; return its URI and manifest."""
    splits, first_id = {}, 0
    numbers = {"num_bytes": 1, "sha256": "", "rows_per_group": 8}
    for name, rows in {"train": 40, "val": 20}.items():
        labels = [i % 2 for i in range(rows)]
        columns = {
            "image": [_tile(label, first_id + i) for i, label in enumerate(labels)],
            "label": labels,
            "height_px": [8] * rows,
            "width_px": [8] * rows,
            "orientation": [1] * rows,
            "segment_offsets": [None] * rows,
            "source": [str(i) for i in range(rows)],
        }
        path = tmp_path / "data" / name / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns, SCHEMA), path, row_group_size=8)
        shard = Shard(path=f"{name}/part-00000.parquet", num_rows=rows, first_id=first_id, **numbers)
        splits[name] = Split(num_rows=rows, num_bytes=1, shards=[shard])
        first_id += rows
    storage = open_storage(str(tmp_path / "data"))
    manifest = Manifest(
        channels=3, image_px=(8, 8), classes=["dark", "bright"], splits=splits, num_found=60, num_ok=60,
        num_quarantined=0, num_duplicates=0, quarantine_reasons={}, mean=[0.4] * 3, std=[0.3] * 3, config={},
        source_digest="",
    )  # fmt: skip
    return storage.uri, write_manifest(storage, manifest)


@pytest.fixture(scope="session")
def zoo() -> list[Animal]:
    """Images of every kind that sources have, whole and broken; no two alike."""
    return [*whole(), *broken()]
