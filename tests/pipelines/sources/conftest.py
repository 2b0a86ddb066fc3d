"""Small images by number, and `prepare` in this process, without Ray."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import prepare as module
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest
from pipelines.storage import open_storage


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
        manifest = module.prepare(str(source), str(tmp_path / out), config)
        storage, rows = open_storage(tmp_path / out), {}
        for name, split in manifest.splits.items():
            tables = [pq.read_table(storage.open_input(shard.path)) for shard in split.shards]
            rows[name] = [row for table in tables for row in table.to_pylist()]
        assert not (tmp_path / out / ".prepare").exists()
        return manifest, rows

    return prepare
