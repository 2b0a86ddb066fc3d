"""Sizes of images by epoch: where they start and end, that they only grow, and what is refused."""

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.bench.flops import step_flops
from mae_core.config import MaskConfig, ModelConfig, patch_grid
from pipelines.config import PretrainConfig, ProgressiveConfig, identity, load_preset, with_overrides

NANO = ModelConfig(arch="vit_nano_patch4", image_px=(32, 32))


def test_the_preset_is_nano_whose_images_grow() -> None:
    config, plain = load_preset(PretrainConfig, "nano_progressive"), load_preset(PretrainConfig, "nano")
    assert with_overrides(config, {"progressive.first_px": None}) == plain
    stages = config.progressive.stages(config.epochs, config.model)
    assert stages == ((0, (16, 16)), (6, (20, 20)), (11, (28, 28)), (16, (32, 32)))


@pytest.mark.parametrize(
    ("preset", "first_px", "run", "first"),
    [
        ("nano", 16, 0.57, 0.28),
        ("vit_base", 96, 0.52, 0.19),
        ("vit_base", 112, 0.57, 0.25),
        ("vit_base", 160, 0.73, 0.51),
        ("vit_large", 112, 0.57, 0.25),
        ("vit_huge", 112, 0.57, 0.26),
    ],
)
def test_the_operations_are_those_that_the_documentation_states(
    preset: str, first_px: int, run: float, first: float
) -> None:
    config = load_preset(PretrainConfig, preset)
    stages = ProgressiveConfig(first_px=(first_px, first_px)).stages(config.epochs, config.model)
    stops = [epoch for epoch, _ in stages[1:]] + [config.epochs]
    flops = [step_flops(dataclasses.replace(config.model, image_px=size)) for _, size in stages]
    total = sum((stop - start) * each for (start, _), stop, each in zip(stages, stops, flops))
    assert round(total / (config.epochs * flops[-1]), 2) == run
    assert round(flops[0] / flops[-1], 2) == first


@given(
    first=st.tuples(st.integers(1, 8), st.integers(1, 16)),
    sizes=st.integers(2, 8),
    full_from=st.floats(0.01, 0.99),
    epochs=st.integers(1, 400),
)
def test_sizes_are_whole_patches_that_only_grow_from_the_first_to_the_full_one(
    first: tuple[int, int], sizes: int, full_from: float, epochs: int
) -> None:
    model = ModelConfig(arch="vit_pico_patch4", image_px=(32, 64), mask=MaskConfig(ratio=0.5))
    progressive = ProgressiveConfig(first_px=(4 * first[0], 4 * first[1]), sizes=sizes, full_from=full_from)
    stages = progressive.stages(epochs, model)
    assert stages[0] == (0, progressive.first_px)
    assert len(stages) <= sizes
    assert {size for _, size in stages} <= set(progressive.sizes_px(model))
    for (epoch, size), (later, larger) in pairwise(stages):
        assert epoch < later < epochs
        assert size != larger
        assert all(a <= b for a, b in zip(size, larger))
    for _, size in stages:
        patch_grid(size, 4)
    by_epoch = [max(stage for stage in stages if stage[0] <= epoch)[1] for epoch in range(epochs)]
    assert by_epoch == [progressive.size_at(epoch / epochs, model) for epoch in range(epochs)]
    assert progressive.size_at(full_from, model) == progressive.size_at(1.0, model) == model.image_px


def test_without_a_first_size_and_with_the_full_one_nothing_grows() -> None:
    for first_px in (None, (32, 32)):
        progressive = ProgressiveConfig(first_px=first_px)
        assert progressive.stages(20, NANO) == ((0, (32, 32)),)
        assert progressive.sizes_px(NANO) == ((32, 32),)


def test_cells_of_a_mask_stay_whole() -> None:
    cells = ModelConfig(arch="vit_nano_patch4", image_px=(32, 32), mask=MaskConfig(cell=2))
    grid = ModelConfig(arch="vit_nano_patch4", image_px=(32, 32), mask=MaskConfig(kind="grid"))
    for model in (cells, grid):
        assert ProgressiveConfig(first_px=(16, 16)).sizes_px(model) == ((16, 16), (24, 24), (32, 32))


def test_epochs_count_decoded_images() -> None:
    """With four masks an image, 80 epochs are 20 passes, which have the sizes of 20 epochs."""
    config = load_preset(PretrainConfig, "nano_progressive")
    four = with_overrides(config, {"epochs": 80, "masks_per_image": 4})
    reading = four.reading
    assert reading.progressive.stages(reading.epochs, reading.model) == config.progressive.stages(20, config.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"progressive.first_px": [18, 16]}, "must be multiples of 4px.*at most 32 x 32 px; try 16 for 18"),
        ({"progressive.first_px": [36, 32]}, "at most 32 x 32 px; try 32 for 36"),
        ({"progressive.first_px": [0, 4]}, "below 1"),
        ({"progressive.sizes": 1}, "outside 2 to 8"),
        ({"progressive.sizes": 9}, "outside 2 to 8"),
        ({"progressive.full_from": 1.0}, r"outside \(0, 1\)"),
        ({"epochs": 2}, "none of 2 passes over the images with 32 x 32 px; try .*--progressive.full-from 0.5"),
        ({"progressive.first_px": [4, 4]}, "images of 4 x 4 px in the first epochs: mask ratio 0.75 leaves none"),
        ({"masks_per_image": 4, "complementary_masks": True}, "images of 20 x 20 px in the first epochs: 4 compl"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    config = load_preset(PretrainConfig, "nano_progressive")
    with pytest.raises(ValueError, match=message):
        with_overrides(config, changes)


def test_the_sizes_are_part_of_the_identity_of_runs_that_have_them() -> None:
    assert "progressive" not in identity(PretrainConfig())
    assert identity(load_preset(PretrainConfig, "nano_progressive"))["progressive"]["first_px"] == [16, 16]
