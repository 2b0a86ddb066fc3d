"""Recipes at equal time: the budget is kept, the schedule ends with it, and what is done is not done again."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.bench import recipes
from pipelines.bench.config import RecipesConfig
from pipelines.cli import parse
from pipelines.config import PretrainConfig, from_dict
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.runs.jobs import PretrainJob
from pipelines.worker.loop import TrainState

PRETRAIN = {
    "kind": "pretrain",
    "epochs": 4,
    "data": {"batch": 16, "micro_batch": 8, "window": 32},
    "model": {
        "arch": "vit_pico_patch4",
        "image_px": [8, 8],
        "mask": {"ratio": 0.5},
        "decoder_depth": 1,
        "decoder_width": 16,
        "decoder_heads": 2,
    },
    "optim": {"base_lr": 1e-2, "warmup_epochs": 1},
}
PROBE = {
    "kind": "classify",
    "epochs": 60,
    "data": {"batch": 16, "micro_batch": 8},
    "classifier": {"method": "probe", "head_std": 0.01},
    "optim": {"name": "lars", "base_lr": 80.0, "warmup_epochs": 0},
    "augment": {"crop": "none", "flip": False},
}


@pytest.fixture
def study(tiles: tuple[str, Manifest], tmp_path: Path) -> Callable[..., RecipesConfig]:
    files = {
        "plain": PRETRAIN,
        "fast": {
            **PRETRAIN,
            "masks_per_image": 2,
            "model": {**PRETRAIN["model"], "decoder_attention": "cross", "predicted_share": 0.5},
        },
        "probe": PROBE,
    }
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def make(**fields) -> RecipesConfig:
        defaults = {
            "recipes": (str(tmp_path / "plain.yaml"), str(tmp_path / "fast.yaml")),
            "probe": str(tmp_path / "probe.yaml"),
            "labels_per_class": 16,
            "budget_s": 0.2,
            "shares": (0.0, 1.0),
            "seeds": 1,
            "out": str(tmp_path / "out.jsonl"),
        }
        return RecipesConfig(uri=tiles[0], **{**defaults, **fields})

    return make


@pytest.mark.slow
def test_every_recipe_is_probed_at_every_share_and_seed_and_never_twice(study, monkeypatch) -> None:
    first = recipes.run(study())
    assert [(r["share"], r["seed"]) for r in first["objects"]] == [(0.0, 0), (0.0, 0), (1.0, 0), (1.0, 0)]
    assert all(r["steps"] > 0 for r in first["objects"] if r["share"])
    assert all(r["top1"] >= 90 for r in first["objects"])  # any encoder tells dark from bright
    calls = []
    real = recipes.one_run
    monkeypatch.setattr(recipes, "one_run", lambda *given: calls.append(given[2:]) or real(*given))
    again = recipes.run(study(seeds=2))
    assert {seed for _, _, seed in calls} == {1}
    assert again["objects"][:4] == first["objects"]
    assert len(again["objects"]) == len(Path(study().out).read_text().splitlines()) == 8
    assert again["text"].count("\n") == 4
    assert json.loads(json.dumps(again["objects"])) == again["objects"]


def test_the_budget_ends_the_run_and_the_schedule(tiles, monkeypatch) -> None:
    uri, manifest = tiles
    values = {k: v for k, v in PRETRAIN.items() if k != "kind"}
    config = from_dict(PretrainConfig, {**values, "data": {**PRETRAIN["data"], "uri": uri}})
    job = PretrainJob(folder="", config=config, pixels=pixels_of(manifest, 3))
    rates: list[float] = []
    real = recipes.TrainState.update

    def update(state: TrainState) -> None:
        rates.append(state.schedule.lr(state.step))
        real(state)

    monkeypatch.setattr(recipes.TrainState, "update", update)
    ticks = itertools.count()
    _, figures = recipes.pretrain_for(job, manifest, 60.0, lambda: float(next(ticks)))
    # The clock is read thrice a step, so 60 ticks are twenty steps, more than the preset's epochs have (12).
    assert figures["steps"] == len(rates) == 20
    assert figures["masked_images"] == 20 * 16
    assert rates.index(max(rates)) == 5  # warm-up is a quarter, as in the preset
    assert rates[-1] < 0.05 * max(rates)


@pytest.mark.slow
def test_images_grow_with_the_spent_share_of_the_budget(tiles, monkeypatch) -> None:
    uri, manifest = tiles
    values = {k: v for k, v in PRETRAIN.items() if k != "kind"}
    data, model = {**PRETRAIN["data"], "uri": uri}, {**PRETRAIN["model"], "arch": "vit_pico_patch2"}
    progressive = {"first_px": [4, 4], "sizes": 3, "full_from": 0.7}
    config = from_dict(PretrainConfig, {**values, "data": data, "model": model, "progressive": progressive})
    job = PretrainJob(folder="", config=config, pixels=pixels_of(manifest, 3))
    sides: list[int] = []
    real = recipes.pixels_to_input
    monkeypatch.setattr(recipes, "pixels_to_input", lambda x, pixels: sides.append(x.shape[1]) or real(x, pixels))
    ticks = itertools.count()
    recipes.pretrain_for(job, manifest, 300.0, lambda: float(next(ticks)))
    assert sides == sorted(sides)
    assert set(sides) == {4, 6, 8}
    # Windows of two or one of a hundred steps, of which 35, 35 and 30 are due.
    assert all(abs(sides.count(side) / len(sides) - share) < 0.04 for side, share in ((4, 0.35), (6, 0.35), (8, 0.3)))


def test_a_probe_of_varying_images_is_refused(study, tmp_path: Path) -> None:
    (tmp_path / "varying.yaml").write_text(yaml.safe_dump({**PROBE, "augment": {"flip": True}}))
    with pytest.raises(ValueError, match="not a linear probe without random augmentation"):
        recipes.run(study(probe=str(tmp_path / "varying.yaml"), shares=(0.0,)))


def test_the_command_takes_it() -> None:
    config = parse(["bench", "recipes", "--uri", "x", "--shares", "0", "1", "--recipes", "nano"]).config
    assert (config.shares, config.recipes, config.seeds) == ((0.0, 1.0), ("nano",), 3)
    with pytest.raises(ValueError, match=r"shares within \[0, 1\]"):
        parse(["bench", "recipes", "--shares", "2"])
