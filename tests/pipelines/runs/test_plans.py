"""What a job reads in which order, and the folder that remembers it."""

import dataclasses
import pickle
from typing import Any

import pytest

from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig
from mae_core.normalization import Normalization
from mae_core.schedule import peak_lr
from pipelines.config import ClassifyConfig, ComputeConfig, DataConfig, PretrainConfig, ProgressiveConfig
from pipelines.dataset.manifest import Manifest, Shard, Split
from pipelines.runs.jobs import ClassifyJob, Extended, PretrainJob, with_workers
from pipelines.runs.plans import index_dataset, phases, read_plan, segments, train_plan
from pipelines.worker.loop import schedule

PIXELS = Normalization(mean=(0.3,), std=(0.4,))
BOTH = frozenset({"train", "val"})


def pretrain_job(**changes: Any) -> PretrainJob:
    config = PretrainConfig(epochs=4, optim=OptimConfig(warmup_epochs=0.0), model=ModelConfig(channels=1))
    return PretrainJob(folder="/runs/a", config=dataclasses.replace(config, **changes), pixels=PIXELS)


def classify_job(method: Any = "finetune", **changes: Any) -> ClassifyJob:
    config = ClassifyConfig(
        epochs=5,
        eval_every_epochs=2,
        backbone="random:vit_pico_patch7",
        classifier=ClassifierConfig(method=method),
        optim=OptimConfig(warmup_epochs=0.0),
    )
    return ClassifyJob(
        folder="/runs/b",
        config=dataclasses.replace(config, **changes),
        arch="vit_pico_patch7",
        image_px=(28, 28),
        channels=1,
        pixels=PIXELS,
        classes=("cat", "dog"),
        backbone="",
        backbone_px=(28, 28),
        norm_eps=1e-6,
    )


def spans(job: Any, first_step: int, splits: frozenset[str] = BOTH) -> list[tuple[str, str, int, int]]:
    return [(p.kind, p.split, p.first_step, p.last_step) for p in phases(job, 10, first_step, splits)]


@pytest.mark.parametrize(("method", "random"), [("probe", False), ("knn", False), ("knn", True)])
def test_features_that_never_vary_are_read_once(method: Any, random: bool) -> None:
    job = classify_job(method, augment=AugmentConfig() if random else AugmentConfig(crop="none", flip=False))
    assert spans(job, 0) == [("read", "train", 0, 0), ("read", "val", 50, 50)]


def test_patch_tokens_are_never_kept() -> None:
    assert not classify_job("attentive", augment=AugmentConfig(crop="none", flip=False)).caches_features


def test_pretraining_is_one_stretch() -> None:
    assert spans(pretrain_job(), 0) == [("train", "train", 0, 40)]
    assert spans(pretrain_job(), 13) == [("train", "train", 13, 40)]
    assert spans(pretrain_job(), 40) == []


def test_pretraining_of_growing_images_is_a_stretch_for_each_size_wherever_it_starts() -> None:
    progressive = ProgressiveConfig(first_px=(112, 112), sizes=2, full_from=0.5)
    job = pretrain_job(progressive=progressive)

    def sizes(job: PretrainJob, first_step: int) -> list[tuple[int, int, int]]:
        return [(p.first_step, p.last_step, p.image_px[0]) for p in phases(job, 10, first_step, BOTH)]

    assert sizes(job, 0) == [(0, 20, 112), (20, 40, 224)]
    assert sizes(job, 19) == [(19, 20, 112), (20, 40, 224)]
    assert sizes(job, 20) == [(20, 40, 224)]
    assert sizes(job, 33) == [(33, 40, 224)]
    assert sizes(job, 40) == []
    # An extension that states it grows again, over its own epochs.
    longer = dataclasses.replace(job, extended=Extended(run="a", epochs=6, end_lr=0.0))
    assert sizes(longer, 60) == [(60, 80, 112), (80, 100, 224)]


def test_quarter_turns_need_square_images_in_every_epoch() -> None:
    turned = {"augment": AugmentConfig(quarter_turns=True)}
    oblong = ProgressiveConfig(first_px=(112, 128))
    index_dataset(pretrain_job(**turned), manifest())
    with pytest.raises(ValueError, match=r"not 112 x 128 px.*--progressive\.first-px 112 112"):
        index_dataset(pretrain_job(epochs=8, progressive=oblong, **turned), manifest())


def test_a_classifier_is_evaluated_now_and_then_and_at_the_end() -> None:
    assert spans(classify_job(), 0) == [
        ("train", "train", 0, 20),
        ("read", "val", 20, 20),
        ("train", "train", 20, 40),
        ("read", "val", 40, 40),
        ("train", "train", 40, 50),
        ("read", "val", 50, 50),
    ]
    assert spans(classify_job(eval_split="test"), 30, frozenset({"train", "test"})) == [
        ("train", "train", 30, 40),
        ("train", "train", 40, 50),
        ("read", "test", 50, 50),
    ]


@pytest.mark.parametrize("first_step", range(51))
def test_what_remains_of_a_classifier_is_the_end_of_the_whole(first_step: int) -> None:
    whole, rest = spans(classify_job(), 0), spans(classify_job(), first_step)
    steps = [step for kind, _, first, last in rest if kind == "train" for step in range(first, last)]
    assert steps == list(range(first_step, 50))
    reads = [span for span in whole if span[0] == "read" and span[2] >= first_step]
    assert [span for span in rest if span[0] == "read"] == reads


def test_a_probe_of_images_that_never_vary_reads_them_once() -> None:
    still = AugmentConfig(crop="none", flip=False)
    job = classify_job("probe", augment=still)
    assert job.caches_features
    assert spans(job, 0) == spans(job, 7) == [("read", "train", 0, 0), ("read", "val", 50, 50)]
    assert not classify_job("probe", augment=AugmentConfig()).caches_features
    assert not classify_job("finetune", augment=still).caches_features


def manifest() -> Manifest:
    def split(rows: int, first: int) -> Split:
        shard = Shard(path=f"{first}.parquet", num_rows=rows, num_bytes=1, first_id=first, sha256="", rows_per_group=4)
        return Split(num_rows=rows, num_bytes=1, shards=[shard])

    return Manifest(
        channels=1,
        image_px=(28, 28),
        classes=["cat", "dog"],
        splits={"train": split(50, 0), "val": split(7, 50)},
        num_found=57,
        num_ok=57,
        num_quarantined=0,
        num_duplicates=0,
        quarantine_reasons={},
        mean=[0.3],
        std=[0.4],
        config={},
        source_digest="",
    )


def test_plans_are_made_of_the_config_alone() -> None:
    job = pretrain_job(
        data=DataConfig(batch=16, micro_batch=4, window=32), compute=ComputeConfig(num_workers=3), seed=5
    )
    dataset = index_dataset(job, manifest())
    plan = train_plan(job, dataset)
    assert (plan.steps_per_epoch, plan.micro_batches_per_step, plan.seed, plan.shuffle) == (4, 6, 5, True)
    assert set(dataset.indexes) == {"train"}, "pretraining reads no other split"


def test_a_split_is_read_in_storage_order_padded_to_the_number_of_workers() -> None:
    job = classify_job(data=DataConfig(batch=16, micro_batch=4, window=32), compute=ComputeConfig(num_workers=3))
    reading = read_plan(job, index_dataset(job, manifest()), "val")
    assert (reading.num_samples, reading.shuffle, reading.batch) == (7, False, 12)
    assert reading.step_ids(0).tolist() == [*range(50, 57), *[-1] * 5]


@pytest.mark.parametrize("job", [pretrain_job(), classify_job(), classify_job("probe")])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ranks_and_controller_make_the_plans_that_the_driver_made_for_any_number_of_workers(
    job: Any, num_workers: int
) -> None:
    data = DataConfig(batch=16, micro_batch=4, window=32)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, data=data))
    dataset = index_dataset(job, manifest())
    same, there = pickle.loads(pickle.dumps((job, dataset)))  # noqa: S301 -- as Ray sends it
    assert same == job
    ours, theirs = (segments(with_workers(job, num_workers), found, 1) for found in (dataset, there))
    assert [segment.transform for segment in ours] == [segment.transform for segment in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.first_step, mine.last_step) == (other.first_step, other.last_step)
        for step in range(mine.first_step, mine.last_step):
            assert mine.plan.step_ids(step).tolist() == other.plan.step_ids(step).tolist()


@pytest.mark.parametrize("name", ["masks_per_image", "crops_per_image"])
def test_several_views_an_image_leave_steps_and_learning_rates_and_read_fewer_images(name: str) -> None:
    data = DataConfig(batch=20, micro_batch=10, window=40)
    one = pretrain_job(data=data, epochs=6, optim=OptimConfig(warmup_epochs=2.0))
    two = pretrain_job(data=data, epochs=6, optim=OptimConfig(warmup_epochs=2.0), **{name: 2})
    plans = [train_plan(job, index_dataset(job, manifest())) for job in (one, two)]
    assert [plan.batch for plan in plans] == [20, 10]
    assert [plan.micro_batches_per_step for plan in plans] == [2, 2]
    spans = [phases(job, plan.steps_per_epoch, 0, BOTH)[0].last_step for job, plan in zip((one, two), plans)]
    assert spans == [18, 15]  # 6 x 50 masked images, in steps of 20: the tail of 10 is short thrice, or not at all
    rates = [
        schedule(job.reading.optim, peak_lr(job.reading.optim.base_lr, plan.batch), plan.steps_per_epoch, epochs)
        for job, plan, epochs in zip((one, two), plans, (6, 3))
    ]
    assert rates[0].peak_lr == rates[1].peak_lr
    assert [rate.warmup_steps for rate in rates] == [6, 5]
    assert two.reading.reading == two.reading
    assert one.reading == one.config
