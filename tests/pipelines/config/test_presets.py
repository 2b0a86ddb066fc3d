"""Presets are data: each loads, says how it is run, what it costs and gives, and has the paper's numbers."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.cli import parse
from pipelines.config import KINDS, PRESETS, ClassifyConfig, PretrainConfig, SweepConfig, load_preset

PATHS = sorted(PRESETS.glob("*.yaml"))
CONFIG_OF = {kind: cls for cls, kind in KINDS.items()}
ids = [path.stem for path in PATHS]


def header(path: Path) -> str:
    """Return the comment above the first key."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_it_loads_by_name_and_by_file(path: Path) -> None:
    cls = CONFIG_OF[yaml.safe_load(path.read_text())["kind"]]
    assert load_preset(cls, path.stem) == load_preset(cls, str(path))


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_its_header_states_command_cost_and_expectation(path: Path) -> None:
    said = dict(re.findall(r"^# (Run|Cost|Expect): +(\S.+)$", header(path), re.MULTILINE))
    assert said.keys() == {"Run", "Cost", "Expect"}
    program, *argv = shlex.split(said["Run"])
    assert program == "mae"
    call = parse(argv)
    assert (call.config.gate if call.command == "promote" else call.preset) == path.stem


def test_the_papers_recipes_are_there() -> None:
    recipes = {f"vit_{size}{suffix}" for size in ("base", "large", "huge") for suffix in SUFFIXES}
    assert recipes <= set(ids)


SUFFIXES = ("", "_finetune", "_probe", "_scratch")
ARCH = {"base": "vit_base_patch16", "large": "vit_large_patch16", "huge": "vit_huge_patch14"}


@pytest.mark.parametrize("size", ARCH)
def test_pretraining_is_table_8(size: str) -> None:
    config = load_preset(PretrainConfig, f"vit_{size}")
    assert (config.model.arch, config.model.image_px, config.model.channels) == (ARCH[size], (224, 224), 3)
    assert (config.model.mask.kind, config.model.mask.ratio, config.model.target) == ("random", 0.75, "norm_pixels")
    assert (config.model.decoder_depth, config.model.decoder_width, config.model.decoder_heads) == (8, 512, 16)
    assert config.model.mask_token_in == "decoder"
    assert (config.epochs, config.data.batch) == (1600, 4096)
    assert (config.optim.name, config.optim.base_lr, config.optim.min_lr) == ("adamw", 1.5e-4, 0.0)
    assert (config.optim.warmup_epochs, config.optim.weight_decay, config.optim.betas) == (40, 0.05, (0.9, 0.95))
    assert (config.optim.layer_decay, config.optim.clip_norm) == (1.0, None)
    assert (config.augment.crop, config.augment.scale, config.augment.flip) == ("random_resized", (0.2, 1.0), True)


@pytest.mark.parametrize(
    ("size", "epochs", "base_lr", "layer_decay", "drop_path"),
    [("base", 100, 5e-4, 0.65, 0.1), ("large", 50, 1e-3, 0.75, 0.2), ("huge", 50, 1e-3, 0.75, 0.3)],
)
def test_fine_tuning_is_table_9(size: str, epochs: int, base_lr: float, layer_decay: float, drop_path: float) -> None:
    config = load_preset(ClassifyConfig, f"vit_{size}_finetune")
    assert config.backbone == f"models:/mae-{ARCH[size]}@candidate"
    assert (config.epochs, config.data.batch) == (epochs, 1024)
    assert (config.optim.name, config.optim.base_lr, config.optim.layer_decay) == ("adamw", base_lr, layer_decay)
    assert (config.optim.warmup_epochs, config.optim.min_lr, config.optim.weight_decay) == (5, 1e-6, 0.05)
    assert config.optim.betas == (0.9, 0.999)
    assert (config.classifier.method, config.classifier.pool) == ("finetune", "avg")
    assert (config.classifier.drop_path, config.classifier.head_std) == (drop_path, 2e-5)
    assert (config.classifier.train_blocks, config.classifier.ema_decay) == (None, None)
    augment = config.augment
    assert (augment.rand_augment, augment.label_smoothing) == ("rand-m9-mstd0.5-inc1", 0.1)
    assert (augment.mixup, augment.cutmix, augment.erase) == (0.8, 1.0, 0.25)


@pytest.mark.parametrize(("size", "epochs"), [("base", 90), ("large", 50), ("huge", 50)])
def test_linear_probing_is_table_10(size: str, epochs: int) -> None:
    config = load_preset(ClassifyConfig, f"vit_{size}_probe")
    assert config.backbone == f"models:/mae-{ARCH[size]}@candidate"
    assert (config.epochs, config.data.batch) == (epochs, 16384)
    assert (config.optim.name, config.optim.base_lr, config.optim.momentum) == ("lars", 0.1, 0.9)
    assert (config.optim.warmup_epochs, config.optim.weight_decay) == (10, 0.0)
    assert (config.classifier.method, config.classifier.pool, config.classifier.head_std) == ("probe", "token", 0.01)
    augment = config.augment
    assert (augment.crop, augment.flip) == ("random_resized", True)
    assert (augment.rand_augment, augment.mixup, augment.cutmix, augment.erase) == ("", 0, 0, 0)


@pytest.mark.parametrize(("size", "epochs", "drop_path"), [("base", 300, 0.1), ("large", 200, 0.2), ("huge", 200, 0.2)])
def test_from_scratch_is_table_11(size: str, epochs: int, drop_path: float) -> None:
    config = load_preset(ClassifyConfig, f"vit_{size}_scratch")
    assert config.backbone == f"random:{ARCH[size]}"
    assert (config.epochs, config.data.batch, config.optim.base_lr) == (epochs, 4096, 1e-4)
    assert (config.optim.warmup_epochs, config.optim.weight_decay, config.optim.betas) == (20, 0.3, (0.9, 0.95))
    assert (config.classifier.drop_path, config.classifier.ema_decay) == (drop_path, 0.9999)
    augment = config.augment
    assert (augment.rand_augment, augment.label_smoothing) == ("rand-m9-mstd0.5", 0.1)
    assert (augment.mixup, augment.cutmix) == (0.8, 1.0)


def test_the_sweep_is_figure_5() -> None:
    config = load_preset(SweepConfig, "vit_large_sweep")
    assert config.space == {
        "model.mask.ratio": [0.4, 0.5, 0.6, 0.75, 0.8],
        "model.decoder_depth": [1, 2, 4, 8, 12],
    }
    assert (config.pretrain.model.arch, config.pretrain.epochs) == ("vit_large_patch16", 800)


@pytest.mark.parametrize(("fast", "plain"), [("fast", "vit_base"), ("nano_fast", "nano")])
def test_a_fast_preset_is_the_plain_one_but_for_the_three_options(fast: str, plain: str) -> None:
    config, paper = load_preset(PretrainConfig, fast), load_preset(PretrainConfig, plain)
    assert (config.masks_per_image, config.model.decoder_attention) == (4, "cross")
    assert config.model.num_predicted == config.model.num_patches // 4
    model = dataclasses.replace(config.model, decoder_attention="self", predicted_share=1.0)
    assert dataclasses.replace(config, masks_per_image=1, model=model) == paper


@pytest.mark.parametrize(("pixio", "plain"), [("pixio_base", "vit_base"), ("pixio_nano", "nano")])
def test_a_pixio_preset_is_the_plain_one_but_for_cells_class_tokens_decoder_and_size(pixio: str, plain: str) -> None:
    config, paper = load_preset(PretrainConfig, pixio), load_preset(PretrainConfig, plain)
    assert config.model.arch.startswith(f"{paper.model.arch}_cls")
    assert config.model.mask.cell > 1
    assert config.model.decoder_depth > paper.model.decoder_depth
    mask = dataclasses.replace(config.model.mask, cell=1)
    model = dataclasses.replace(
        config.model,
        arch=paper.model.arch,
        image_px=paper.model.image_px,
        mask=mask,
        decoder_depth=paper.model.decoder_depth,
    )
    assert dataclasses.replace(config, model=model) == paper
