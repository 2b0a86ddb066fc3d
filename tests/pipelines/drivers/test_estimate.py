"""What an estimate counts and measures, and how a run compares it with what it took."""

import dataclasses
import json
from pathlib import Path

import pytest

from mae_core.config import OptimConfig
from mae_core.errors import UserError
from pipelines.cli import parse
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig, ProgressiveConfig
from pipelines.drivers import pretrain as driver
from pipelines.drivers.estimate import calculated, estimate
from pipelines.drivers.pretrain import published_pretrain_job
from pipelines.runs.estimates import Estimate, compare, num_kept, store
from pipelines.runs.jobs import PretrainJob
from pipelines.worker import calibrating
from pipelines.worker.calibrating import Calibration, calibrate
from tests.finished import finished_run
from tests.pipelines.drivers.small import MODEL

OPTIM = OptimConfig(warmup_epochs=0.0)
COLOUR = dataclasses.replace(MODEL, channels=3)
MEASURED = Calibration(micro_batch_s=0.5, update_s=0.1, checkpoint_bytes=1000, export_bytes=100)


def planned(tiles, folder: Path, **changes):
    config = PretrainConfig(
        name="a",
        output=str(folder),
        epochs=4,
        model=COLOUR,
        optim=OPTIM,
        data=DataConfig(uri=tiles[0], batch=8, micro_batch=2),
    )
    config = dataclasses.replace(config, **changes)
    return published_pretrain_job(config, "a", tiles[1])


def test_steps_hours_bytes_and_cost_follow_from_the_plan(tiles, tmp_path: Path) -> None:
    found = calculated(planned(tiles, tmp_path), MEASURED, price=3.0)
    assert found.steps == 4 * 40 // 8
    assert found.step_s == pytest.approx(4 * 0.5 + 0.1)
    assert found.hours == found.device_hours == pytest.approx(20 * 2.1 / 3600)
    assert found.cost == pytest.approx(3.0 * found.hours)
    assert found.storage_bytes == 2 * 1000 + 100
    assert "20 steps of 2.1 s: 0.0117 h, 0.0117 CPU hours, 2.1e-06 GB" in found.text


def test_two_workers_take_half_the_time_of_a_step_and_threads_count_as_cores(tiles, tmp_path: Path) -> None:
    job = planned(tiles, tmp_path, compute=ComputeConfig(num_workers=2, threads=3))
    from pipelines.machine import Machine
    from pipelines.runs.automatic import settle

    settled = dataclasses.replace(job, job=settle(job.job, Machine(num_cores=8)))
    found = calculated(settled, MEASURED, price=None)
    assert found.step_s == pytest.approx(2 * 0.5 + 0.1)
    assert found.num_devices == 6
    assert found.device_hours == pytest.approx(6 * found.hours)
    assert found.cost is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 2), ({"keep": 9}, 4), ({"keep_every_epochs": 2}, 4), ({"every_epochs": 4.0}, 1), ({"keep_best": 1}, 3)],
)
def test_the_number_of_checkpoints_follows_the_options(options: dict, kept: int) -> None:
    assert num_kept(PretrainConfig(epochs=4, model=COLOUR, optim=OPTIM, checkpoint=CheckpointConfig(**options))) == kept


def test_a_calibration_runs_the_presets_model_and_counts_its_checkpoint(tiles, tmp_path: Path) -> None:
    job = planned(tiles, tmp_path)
    assert isinstance(job.job, PretrainJob)
    found = calibrate(job.job, job.dataset, seconds=0.2)
    assert found.micro_batch_s > 0
    assert found.update_s > 0
    assert found.export_bytes > 0.4 * found.checkpoint_bytes / 3
    from mae_core.model import build_mae

    weights = sum(p.numel() * 4 for p in build_mae(COLOUR, seed=0).parameters() if p.requires_grad)
    assert 3 * weights <= found.checkpoint_bytes < 3.3 * weights, "weights and two moments, float32"


def test_a_calibration_weighs_the_sizes_of_growing_images_by_their_epochs(
    tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progressive = ProgressiveConfig(first_px=(14, 14), sizes=2, full_from=0.75)
    job = planned(tiles, tmp_path, progressive=progressive).job
    assert isinstance(job, PretrainJob)
    sizes = []

    def measured(job, state, rank, size, plan, seconds, loss_of) -> tuple[float, float]:
        sizes.append((size, seconds))
        return float(size[0]), 1.0

    monkeypatch.setattr(calibrating, "_measured", measured)
    found = calibrate(job, planned(tiles, tmp_path).dataset, seconds=3.0)
    assert sizes == [((14, 14), 1.5), ((28, 28), 1.5)]
    assert found.micro_batch_s == pytest.approx(0.75 * 14 + 0.25 * 28)
    assert found.update_s == pytest.approx(1)


def test_an_estimate_is_stored_and_the_run_compares_it_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PretrainConfig(name="a", output=str(tmp_path), model=COLOUR, data=DataConfig(uri="x"))
    run = finished_run(config)
    assert compare(config, "a", run) == {}
    before = Estimate(
        name="a", steps=10, step_s=360.0, hours=1.0, num_devices=2, device="gpu", device_hours=2.0,
        storage_bytes=10**9, price=2.5,
    )  # fmt: skip
    store(str(tmp_path), before)
    path = next(found for found, _ in run.storage.list("checkpoints") if found.endswith("manifest.json"))
    manifest = json.loads(run.storage.read(path))
    manifest["meta"]["clock"] = {"seconds": {"steps": 3600.0, "data": 1800.0}, "time_s": 1.0}
    run.storage.write(path, json.dumps(manifest).encode())
    with caplog.at_level("INFO"):
        found = compare(config, "a", run)["estimate"]
    assert found["before"]["hours"] == 1.0
    assert found["took"]["hours"] == 1.5
    assert found["took"]["cost"] == pytest.approx(7.5)
    assert found["took"]["step_s"] == 360.0
    said = caplog.messages[-1]
    assert "a: estimated 1 h, 2 GPU hours, 1 GB, costs 5.00; took 1.5 h, 3 GPU hours, " in said
    assert said.endswith("costs 7.50, of which steps 1 h")


def test_wrong_prices_and_absent_gpus_are_refused(tiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="estimate-price -1 is negative"):
        estimate(planned(tiles, tmp_path), price=-1.0)
    job = planned(tiles, tmp_path, compute=ComputeConfig(num_workers=1, gpu=True))
    with pytest.raises(UserError, match="run --estimate on a node with a GPU"):
        estimate(job, price=None)
    with pytest.raises(UserError, match="estimate-price 'x' is no number"):
        parse(["pretrain", "--estimate-price", "x"])


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_the_command_prints_the_estimate_and_starts_no_run(
    tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.drivers.estimate.CALIBRATION_S", 0.2)
    words = f"pretrain --data.uri {tiles[0]} --output {tmp_path / 'runs'} --name a --epochs 4"
    words += " --data.batch 8 --data.micro-batch 2"
    words += " --model.arch vit_pico_patch4 --model.image-px 8 8 --model.decoder-depth 1 --model.decoder-width 32"
    words += " --model.decoder-heads 2 --optim.warmup-epochs 0 --estimate-price 2 --estimate --compute.num-workers 1"
    call = parse(words.split())
    assert (call.estimates, call.price) == (True, 2.0)
    monkeypatch.chdir(tmp_path)
    from tests.new_mlflow import new_mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    found = driver.estimate_pretraining(call.config, price=call.price)
    assert found["steps"] == 20
    assert found["cost"] == pytest.approx(2.0 * found["device_hours"])
    (stored,) = (tmp_path / "runs").rglob("*.json")
    assert stored == tmp_path / "runs" / ".estimates" / "a.json"
