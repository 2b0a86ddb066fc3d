"""`mae pretrain --data.cache` trains while it prepares, and from the second epoch on as if it had prepared before."""

import dataclasses
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_core.errors import UserError
from mae_core.state import unpack
from pipelines.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    PrepareConfig,
    PretrainConfig,
    to_dict,
)
from pipelines.dataset.manifest import read_manifest
from pipelines.drivers.extend import extension_of
from pipelines.drivers.pretrain import pretrain
from pipelines.prepare import prepare
from pipelines.runs.folder import RunFolder
from pipelines.storage import open_storage
from tests.digest import tensors_digest
from tests.pipelines.drivers.small import pretraining, working_in
from tests.waiting import JOB_DEADLINE_S, wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Data 2.60 sets deprecated fields of its own context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]
MAE = str(Path(sys.executable).with_name("mae"))
OPTIONS = PrepareConfig(rows_per_shard=32, rows_per_group=8)


def bytes_of(folder: Path) -> dict[str, str]:
    storage = open_storage(folder)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list()}


@dataclass(frozen=True)
class Place:
    """A folder with a source of 300 images and the dataset that `mae prepare` makes of it."""

    folder: Path
    source: Path
    prepared: Path

    def config(self, name: str, cache: str, **changes: Any) -> PretrainConfig:
        data = DataConfig(uri=str(self.source), cache=str(self.folder / cache), batch=32, micro_batch=16, window=64)
        return pretraining(self.folder, "", name, data=data, prepare=OPTIONS, **changes)

    def run(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def weights(self, name: str) -> str:
        return tensors_digest(unpack(self.run(name).storage.read("export/mae.safetensors")))


@pytest.fixture(scope="module")
def place(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("preparing")
    with working_in(folder):
        shutil.copytree(few, folder / "source")
        copy = next((folder / "source" / "train" / "bag").iterdir())
        shutil.copy(copy, folder / "source" / "train" / "dress" / "copy.png")
        prepare(str(folder / "source"), str(folder / "prepared"), OPTIONS)
        place = Place(folder, folder / "source", folder / "prepared")
        pretrain(place.config("calm", "cache"), "calm")
        yield place


def test_the_cache_is_what_prepare_writes_and_the_run_is_published(place: Place) -> None:
    assert bytes_of(place.folder / "cache") == bytes_of(place.prepared)
    run = place.run("calm")
    outcome, claimed = run.read_outcome(), run.read_identity()
    assert outcome is not None
    assert claimed is not None
    assert outcome["steps"] == 2 * -(-len_of_train(place) // 32)
    assert outcome["model"].startswith("models:/")
    assert claimed["dataset"].startswith("listed-")
    assert run.read_pixels() != run.read_listing()["pixels"]  # pyright: ignore[reportOptionalSubscript]
    assert pretrain(place.config("calm", "cache"), "calm") == outcome


def len_of_train(place: Place) -> int:
    return read_manifest(open_storage(place.prepared)).splits["train"].num_rows


@pytest.mark.long
def test_a_complete_cache_is_a_prepared_dataset_to_any_other_run(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    config = place.config("complete", "cache")
    with caplog.at_level(logging.INFO):
        pretrain(config, "complete")
    assert "training on that" in caplog.text
    data = dataclasses.replace(config.data, uri=str(place.prepared), cache="")
    pretrain(dataclasses.replace(config, name="before", data=data), "before")
    assert place.weights("complete") == place.weights("before") != place.weights("calm")
    assert (place.run("complete").read_identity() or {})["dataset"] == (place.run("before").read_identity() or {})[
        "dataset"
    ]


@pytest.mark.long
def test_two_workers_end_the_first_epoch_at_the_same_step(place: Place) -> None:
    outcome = pretrain(place.config("two", "cache-two", compute=ComputeConfig(num_workers=2)), "two")
    assert outcome["steps"] == (place.run("calm").read_outcome() or {})["steps"]
    assert bytes_of(place.folder / "cache-two") == bytes_of(place.prepared)
    assert outcome["loss"] == pytest.approx((place.run("calm").read_outcome() or {})["loss"], rel=1e-4)


@pytest.mark.long
def test_told_to_stop_it_saves_what_it_has_and_the_same_command_goes_on_bit_for_bit(place: Place) -> None:
    config = place.config("told", "cache-told", checkpoint=CheckpointConfig(every_epochs=0.1, keep=99))
    preset = place.folder / "told.yaml"
    preset.write_text(yaml.safe_dump({"kind": "pretrain"} | to_dict(config)))
    said = place.folder / "told.log"
    command = [MAE, "pretrain", "--preset", str(preset), "--json"]
    with said.open("wb") as log:
        process = subprocess.Popen(command, cwd=place.folder, stdout=log, stderr=log, start_new_session=True)
    wait_until(
        lambda: bool(place.run("told").checkpoints.steps()),
        lambda: f"the first checkpoint: {said.read_text()}",
        JOB_DEADLINE_S,
        alive=lambda: process.poll() is None,
    )
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(JOB_DEADLINE_S) == 128 + signal.SIGTERM, said.read_text()
    assert "told stopped at step" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert place.run("told").read_result() is None, "the signal came too late to mean anything"
    pretrain(config, "told")
    assert place.weights("told") == place.weights("calm")
    assert bytes_of(place.folder / "cache-told") == bytes_of(place.prepared)


def test_what_ends_a_preparation_ends_the_run_with_its_sentence(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(place.source, source)
    for path in sorted((source / "train" / "sneaker").iterdir())[:70]:
        path.write_bytes(path.read_bytes()[:60])
    config = place.config("bad", "cache-bad")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=str(source)))
    with pytest.raises(UserError, match=r"70 of 301 images are bad, more than max_bad 0.01 allows"):
        pretrain(config, "bad")
    assert place.run("bad").read_result() is None
    allowed = dataclasses.replace(config, prepare=dataclasses.replace(OPTIONS, max_bad=0.5))
    steps = pretrain(allowed, "bad")["steps"]
    num_rows = read_manifest(open_storage(place.folder / "cache-bad")).splits["train"].num_rows
    assert steps == 2 * -(-num_rows // 32)


@pytest.mark.long
def test_a_finished_run_is_extended_as_any_other(place: Place) -> None:
    config = extension_of("calm", {"epochs": 1}, str(place.folder / "runs"))
    outcome = pretrain(config, "calm")
    assert outcome["steps"] == 3 * -(-len_of_train(place) // 32)


def test_a_cache_of_another_source_is_refused_by_name(place: Place, few: Path) -> None:
    config = place.config("other", "cache")
    data = dataclasses.replace(config.data, uri=str(few))
    with pytest.raises(UserError, match=r"cache holds a dataset of another source; choose another folder"):
        pretrain(dataclasses.replace(config, data=data), "other")


@pytest.mark.long
def test_a_prepared_dataset_needs_no_cache(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    config = place.config("before", "unused")
    data = dataclasses.replace(config.data, uri=str(place.prepared))
    with caplog.at_level(logging.INFO):
        pretrain(dataclasses.replace(config, data=data), "before")
    assert "is a prepared dataset, so data.cache" in caplog.text
    assert not (place.folder / "unused").exists()


def test_without_a_cache_both_ways_out_are_named(place: Place) -> None:
    data = DataConfig(uri=str(place.source))
    with pytest.raises(UserError, match=r"run `mae prepare .* FOLDER` and train on FOLDER, or add --data.cache FOLDER"):
        pretrain(PretrainConfig(data=data), "none")
