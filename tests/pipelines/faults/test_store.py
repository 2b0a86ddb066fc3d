"""A store that is overloaded, cuts bodies short or goes away changes nothing, or ends in one sentence."""

import contextlib
import dataclasses
import hashlib
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest
from pipelines.prepare import prepare
from pipelines.storage import open_storage
from pipelines.storage.retries import retry_limit
from tests.waiting import COMMAND_DEADLINE_S, EVENT_DEADLINE_S, join, let_pass

pytestmark = [pytest.mark.s3, pytest.mark.slow]
CONFIG = PrepareConfig(rows_per_shard=20, rows_per_group=8)
NUM_IMAGES = 90


def files_of(uri: str) -> dict[str, str]:
    storage = open_storage(uri)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list()}


def uploaded(folder: Path, uri: str) -> str:
    storage = open_storage(uri)
    paths = [path for path, _ in open_storage(folder).list()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: storage.write(path, (folder / path).read_bytes()), paths))
    return uri


def num_rows_read(uri: str, manifest: Manifest) -> int:
    """Rows of all shards, read group by group as training does, each byte of them."""
    storage, count = open_storage(uri), 0
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        with storage.open_input(shard.path) as source, pq.ParquetFile(source) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group).to_pylist()
                assert all(row["image"].startswith(b"\x89PNG") for row in rows)
                count += len(rows)
    return count


@pytest.fixture(scope="module")
def fewer(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 images of `few`, since each costs requests that the proxy delays or repeats."""
    folder = tmp_path_factory.mktemp("fewer")
    for split, count in {"train": 24, "test": 6}.items():
        for source in (few / split).iterdir():
            (folder / split / source.name).mkdir(parents=True)
            for path in sorted(source.iterdir())[:count]:
                shutil.copy(path, folder / split / source.name)
    return folder


@pytest.fixture
def local(fewer: Path, tmp_path: Path, without_ray: None) -> tuple[Manifest, dict[str, str]]:
    """Return the result of an undisturbed preparation into a folder."""
    return prepare(str(fewer), str(tmp_path / "local"), CONFIG), files_of(str(tmp_path / "local"))


def test_spoiled_answers_change_no_byte_and_are_asked_for_again_a_few_times(
    fewer: Path, tmp_path: Path, local: Any, proxy: Any, own_s3: Any
) -> None:
    root = f"{own_s3.uri}/{tmp_path.name}"
    source = uploaded(fewer, f"{root}/source")
    proxy.reset(0.0, "503")
    assert prepare(source, f"{root}/calm", CONFIG) == local[0]
    calm = proxy.num_requests
    for share, kinds in ((0.2, ("short", "reset")), (0.3, ("503",))):
        proxy.reset(share, *kinds)
        out = f"{root}/{kinds[0]}"
        manifest = prepare(source, out, CONFIG)
        assert proxy.num_spoiled > 10
        assert proxy.num_requests < 3 * calm
        assert num_rows_read(out, manifest) == NUM_IMAGES
        proxy.reset(0.0, "503")
        assert files_of(out) == local[1]


def test_a_listing_that_never_came_is_no_empty_folder(tmp_path: Path, proxy: Any, own_s3: Any) -> None:
    proxy.reset(0.0, "503")
    storage = open_storage(f"{own_s3.uri}/{tmp_path.name}")
    for name in "abc":
        storage.write(f"folder/{name}", b"x")
    proxy.reset(0.5, "reset", "short")
    assert [len(list(storage.walk("folder"))) for _ in range(15)] == 15 * [3]
    assert not storage.is_empty()
    assert proxy.num_spoiled > 3


@pytest.mark.parametrize("kinds", [("503",), ("short", "reset")])
def test_large_parts_come_whole_however_answers_are_spoiled(
    tmp_path: Path, proxy: Any, own_s3: Any, kinds: tuple[str, ...]
) -> None:
    content = random.Random(0).randbytes(9 * 2**20)
    storage = open_storage(f"{own_s3.uri}/{tmp_path.name}")
    proxy.reset(0.0, "503")
    storage.write("x", content)
    parts = storage.ranges("x")
    proxy.reset(0.5, *kinds)
    for offset in range(8):
        assert parts.read(offset, 9 * 2**20 - offset) == content[offset:]
    assert proxy.num_spoiled > 3


def test_a_server_that_is_killed_and_started_again_changes_no_byte(
    fewer: Path, tmp_path: Path, local: Any, proxy: Any, own_s3: Any
) -> None:
    root = f"{own_s3.uri}/{tmp_path.name}"
    source = uploaded(fewer, f"{root}/source")
    proxy.reset(0.0, "503")

    def restart() -> None:
        own_s3.kill()
        let_pass(3)
        own_s3.start()

    restarts: list[threading.Thread] = []

    def at(number: int) -> None:
        if number == 60:
            restarts.append(threading.Thread(target=restart))
            restarts[0].start()

    proxy.before_request = at
    assert prepare(source, f"{root}/out", CONFIG) == local[0]
    join(restarts[0], COMMAND_DEADLINE_S)
    assert files_of(f"{root}/out") == local[1]


def test_a_store_that_stays_away_ends_in_one_sentence(own_s3: Any, proxy: Any) -> None:
    proxy.reset(1.0, "503")
    storage = open_storage(f"{own_s3.uri}/away")
    acts = (
        lambda: storage.read("x"),
        lambda: storage.write("x", b"y"),
        lambda: storage.write_new("x", b"y"),
        lambda: storage.list(),
        lambda: storage.exists("x"),
        lambda: storage.open_input("x"),
    )
    for act in acts:
        said = r"^cannot \w+ s3://mae-test/away.*: the store gave no complete response for .*; start it or correct AWS_"
        with retry_limit(0.3), pytest.raises(OSError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_only_one_of_two_preparations_of_different_things_gets_a_place(
    fewer: Path, tmp_path: Path, proxy: Any, own_s3: Any, without_ray: None
) -> None:
    out = f"{own_s3.uri}/{tmp_path.name}/out"
    outcomes: list[Any] = []
    barrier = threading.Barrier(2)

    def attempt(seed: int) -> None:
        barrier.wait(EVENT_DEADLINE_S)
        with contextlib.suppress(ValueError):
            outcomes.append(prepare(str(fewer), out, dataclasses.replace(CONFIG, seed=seed)))

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread)
    (winner,) = outcomes
    assert num_rows_read(out, winner) == NUM_IMAGES
