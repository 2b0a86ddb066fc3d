"""What auto stands for is a function of config and machine; a run keeps what decides its result."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines.config import (
    ClassifyConfig,
    ComputeConfig,
    FixedCompute,
    PretrainConfig,
    config_hash,
    from_dict,
    identity,
    load_preset,
    to_dict,
    with_overrides,
)
from pipelines.machine import Machine
from pipelines.runs.automatic import (
    choose,
    describe_compute,
    micro_batches,
    settle,
    settled_config,
    store_config,
    store_micro_batch,
    with_stored_micro_batch,
)
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob

LAPTOP = Machine(num_cores=2)
H200 = Machine(num_cores=16, num_gpus=1, gpu="NVIDIA H200", gpu_bytes=139 * 2**30, has_bfloat16=True)
OLD = Machine(num_cores=8, num_gpus=2, gpu="Tesla T4", gpu_bytes=15 * 2**30)
NODE = dataclasses.replace(H200, num_cores=192, num_gpus=8)
CLUSTER = Machine(num_cores=224, num_gpus=16, gpu="H100", has_bfloat16=True, is_cluster=True)


def chosen(machine: Machine, **compute: Any) -> FixedCompute:
    config = PretrainConfig(compute=ComputeConfig(**compute))
    return choose(config, machine)


def test_without_gpus_everything_is_as_it_was_before_there_was_an_auto() -> None:
    for machine in (LAPTOP, dataclasses.replace(LAPTOP, num_cores=64)):
        assert chosen(machine) == FixedCompute()
    before = FixedCompute()
    assert (before.num_workers, before.gpu, before.precision, before.compile) == (1, False, "float32", False)
    assert (before.data_tasks, before.micro_batch) == (2, None)


def test_one_gpu_gets_a_worker_and_the_other_cores_decode() -> None:
    found = chosen(H200)
    assert (found.num_workers, found.gpu, found.precision, found.compile) == (1, True, "bfloat16", True)
    assert found.data_tasks == 14
    assert found.micro_batch == 512
    line = "1 worker on NVIDIA H200, bfloat16, compiled, micro-batch 512, 14 data tasks on 16 cores"
    assert describe_compute(PretrainConfig(), found, H200) == line
    assert describe_compute(PretrainConfig(), FixedCompute(), LAPTOP) == (
        "1 worker on CPU, float32, micro-batch 64, 2 data tasks on 2 cores"
    )


def test_every_gpu_gets_a_worker() -> None:
    assert (chosen(NODE).num_workers, chosen(NODE).data_tasks, chosen(NODE).micro_batch) == (8, 128, 512)
    old = chosen(OLD)
    assert (old.num_workers, old.precision, old.data_tasks) == (2, "float32", 5)
    assert old.micro_batch is not None
    assert old.micro_batch < 512
    cluster = chosen(CLUSTER)
    assert (cluster.num_workers, cluster.micro_batch) == (16, None)
    assert "data tasks on the free CPUs of a cluster of 224 cores" in describe_compute(
        PretrainConfig(), cluster, CLUSTER
    )
    assert (NODE.share(3).num_gpus, NODE.share(3).num_cores, H200.share(4).num_gpus) == (2, 64, 1)


def test_what_is_stated_stays() -> None:
    stated = {"num_workers": 1, "gpu": True, "precision": "float32", "compile": False, "data_tasks": 3}
    found = chosen(H200, **stated, micro_batch=32)
    assert {name: getattr(found, name) for name in stated} == stated
    assert found.micro_batch == 32
    assert chosen(H200, gpu=False) == FixedCompute()
    assert chosen(LAPTOP, gpu=True).gpu is True
    # Two workers cannot share a GPU.
    assert chosen(H200, num_workers=2) == FixedCompute(num_workers=2)
    assert chosen(H200, num_workers=2, min_workers=1).gpu is True


def test_a_micro_batch_is_whole_images_the_same_for_each_worker_and_divides_the_batch() -> None:
    fast = load_preset(PretrainConfig, "fast")
    for config in (PretrainConfig(), fast, load_preset(PretrainConfig, "vit_huge")):
        for workers in (1, 3, 8, 64):
            for size in micro_batches(config, workers):
                assert config.data.batch % size == size % config.views_per_image == 0
                assert workers == 3 or config.data.batch // size % workers == 0
    small = with_overrides(PretrainConfig(), {"data.batch": 64})
    assert max(micro_batches(small, 8)) == 8
    assert choose(ClassifyConfig(), H200).micro_batch is None


def test_a_config_with_another_micro_batch_reads_and_computes_with_it() -> None:
    job = job_in(Path("runs/a"))
    assert job.reading == job.config.reading
    larger = dataclasses.replace(job, chosen=choose(job.config, H200))
    assert larger.reading.data.micro_batch == 512
    assert dataclasses.replace(larger.reading, data=job.reading.data) == job.reading


def job_in(folder: Path, **overrides: Any) -> PretrainJob:
    config = with_overrides(PretrainConfig(), {name.replace("__", "."): value for name, value in overrides.items()})
    return PretrainJob(folder=str(folder), config=config, pixels=Normalization(mean=(0.5,) * 3, std=(0.5,) * 3))


def started_on(machine: Machine, folder: Path, **overrides: Any) -> PretrainJob:
    """Settle a run and store what it is, as a driver does."""
    job = settle(job_in(folder, **overrides), machine)
    assert isinstance(job, PretrainJob)
    RunFolder(job.folder).claim({"config": identity(job.config)})
    store_config(job)
    return job


def test_the_identity_of_a_run_does_not_depend_on_the_machine(tmp_path: Path) -> None:
    for config in (PretrainConfig(), ClassifyConfig(), load_preset(PretrainConfig, "vit_base")):
        assert "auto" not in json.dumps(identity(config))
    here, there = started_on(H200, tmp_path / "a"), started_on(LAPTOP, tmp_path / "b")
    assert here.chosen != there.chosen
    claimed = [RunFolder(job.folder).read_identity() or {} for job in (here, there)]
    assert claimed[0]["config"] == claimed[1]["config"]
    explicit = with_overrides(PretrainConfig(), {"compute.precision": "float32"})
    assert config_hash(explicit, "d") == config_hash(PretrainConfig(), "d")


def test_a_run_keeps_its_precision_on_any_machine(tmp_path: Path) -> None:
    assert started_on(H200, tmp_path / "a").compute.precision == "bfloat16"
    moved = settle(job_in(tmp_path / "a"), LAPTOP)
    assert (moved.compute.precision, moved.compute.gpu, moved.compute.num_workers) == ("bfloat16", False, 1)
    assert started_on(LAPTOP, tmp_path / "b").compute.precision == "float32"
    moved = settle(job_in(tmp_path / "b"), NODE)
    assert (moved.compute.precision, moved.compute.gpu, moved.compute.num_workers) == ("float32", True, 8)


def test_a_run_of_an_earlier_version_keeps_its_precision(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "a"))
    run.claim({"config": identity(PretrainConfig())})
    values = to_dict(PretrainConfig()) | {"compute": {"num_workers": 1, "gpu": True, "precision": "float32"}}
    run.storage.write("config.json", json.dumps(values).encode())
    resumed = settle(job_in(tmp_path / "a"), H200)
    assert resumed.compute.precision == "float32"
    store_config(resumed)
    assert settle(job_in(tmp_path / "a"), H200).compute.precision == "float32"


def test_another_precision_than_auto_chose_is_refused(tmp_path: Path) -> None:
    started_on(H200, tmp_path / "a")
    said = r"computes in bfloat16, which auto chose when it started, not in float32; leave out --compute.precision"
    with pytest.raises(UserError, match=said):
        settle(job_in(tmp_path / "a", compute__precision="float32"), H200)
    # This is another run, which the claim refuses.
    settle(job_in(tmp_path / "a", compute__precision="bfloat16"), H200)


def test_a_smaller_micro_batch_that_was_found_to_fit_is_kept(tmp_path: Path) -> None:
    job = started_on(H200, tmp_path / "a")
    assert job.compute.micro_batch == 512
    store_micro_batch(RunFolder(job.folder), 256)
    assert with_stored_micro_batch(job).compute.micro_batch == 256
    assert settle(job_in(tmp_path / "a"), H200).compute.micro_batch == 256
    assert settle(job_in(tmp_path / "a"), LAPTOP).compute.micro_batch is None
    cpu = started_on(LAPTOP, tmp_path / "b")
    assert with_stored_micro_batch(cpu) == cpu


def test_a_run_stores_what_was_stated_and_what_it_runs_on(tmp_path: Path) -> None:
    for machine in (LAPTOP, H200):
        job = started_on(machine, tmp_path / str(machine.num_gpus), compute__data_tasks=5)
        read = {name: json.loads((Path(job.folder) / f"{name}.json").read_text()) for name in ("config", "chosen")}
        assert from_dict(PretrainConfig, read["config"]) == job.config
        assert from_dict(FixedCompute, read["chosen"]) == job.compute
        assert settled_config(job).compute.fixed() == job.compute


def test_an_evaluation_on_a_gpu_gets_one_that_no_worker_holds() -> None:
    evaluated = with_overrides(PretrainConfig(), {"evaluate.every_epochs": 10, "evaluate.gpu": True})
    assert choose(evaluated, NODE).num_workers == 7
    assert choose(evaluated, H200).num_workers == 1
    assert choose(evaluated, LAPTOP) == FixedCompute()
    assert choose(with_overrides(evaluated, {"compute.num_workers": 8}), NODE).num_workers == 8
    assert choose(with_overrides(evaluated, {"evaluate.every_epochs": 0}), NODE).num_workers == 8


def test_a_worker_count_to_be_chosen_has_no_minimum() -> None:
    with pytest.raises(UserError, match=r"min_workers 2 needs a num_workers; try --compute.num-workers 8"):
        ComputeConfig(min_workers=2)
