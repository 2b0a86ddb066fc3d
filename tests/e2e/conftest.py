"""A small prepared dataset, and a place for each module's runs."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.driving import Place, prepare_here


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 images of the sample, prepared in this process. Read only."""
    from pipelines.config import PrepareConfig
    from pipelines.sample import unpack

    folder = tmp_path_factory.mktemp("e2e")
    (folder / "images").mkdir()
    for i, path in enumerate(sorted(unpack(folder / "sample").rglob("*.png"))[:270]):
        shutil.copy(path, folder / "images" / f"{i}.png")
    options = PrepareConfig(val_fraction=0.0, rows_per_shard=48, rows_per_group=16)
    assert prepare_here(folder / "images", folder / "data", options).num_ok == 270
    return folder / "data"


@pytest.fixture(scope="module")
def place(dataset: Path) -> Iterator[Place]:
    """Yield a place for runs with an embedded Ray, at a path short enough for its sockets."""
    with tempfile.TemporaryDirectory(prefix="mae-e2e-") as scratch:
        yield Place.of(Path(scratch), dataset)
