import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mae_core.config import AugmentConfig
from mae_core.views import crop_boxes, flips, rand_augment, turns

CONFIG = AugmentConfig()
RECIPE = "rand-m9-mstd0.5-inc1"


def boxes(config: AugmentConfig, height: int, width: int, num: int, **key: int) -> np.ndarray:
    ids = np.arange(num)
    key = {"seed": 0, "epoch": 0, **key}
    return crop_boxes(config, sample_ids=ids, heights_px=np.full(num, height), widths_px=np.full(num, width), **key)


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_crop_boxes_lie_within_the_image(height, width, seed):
    top, left, box_height, box_width = boxes(CONFIG, height, width, 8, seed=seed).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(box_height, box_width) >= 1).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    num = 3000
    ours = boxes(CONFIG, height, width, num)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(CONFIG.scale), list(CONFIG.aspect)) for _ in range(num)]
    )
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / num)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * spread).all()
    quantiles = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(ours, quantiles, axis=0) - np.quantile(theirs, quantiles, axis=0)).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10)])
def test_if_no_attempt_fits_the_crop_box_is_torchvisions_central_one(height, width):
    config = AugmentConfig(scale=(1.0, 1.0))
    theirs = RandomResizedCrop.get_params(torch.zeros(1, height, width), [1.0, 1.0], list(config.aspect))
    assert (boxes(config, height, width, 4) == np.array(theirs)).all()


def test_a_box_and_a_flip_depend_on_their_key_and_not_on_their_batch():
    whole = boxes(CONFIG, 50, 70, 16)
    alone = crop_boxes(
        CONFIG, seed=0, epoch=0, sample_ids=np.array([9]), heights_px=np.array([50]), widths_px=np.array([70])
    )
    assert (alone[0] == whole[9]).all()
    mirrored = flips(CONFIG, seed=0, epoch=0, sample_ids=np.arange(4000))
    assert flips(CONFIG, seed=0, epoch=0, sample_ids=np.array([3999]))[0] == mirrored[-1]
    assert abs(mirrored.mean() - 0.5) < 0.04
    for key in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert (boxes(CONFIG, 50, 70, 16, **key) != whole).any()
        assert (flips(CONFIG, sample_ids=np.arange(4000), **{"seed": 0, "epoch": 0, **key}) != mirrored).any()


def test_without_crop_and_flip_the_box_is_the_entire_image():
    config = AugmentConfig(crop="none", flip=False)
    assert (boxes(config, 50, 70, 2) == [0, 0, 50, 70]).all()
    assert not flips(config, seed=0, epoch=0, sample_ids=np.arange(100)).any()


def global_states() -> tuple[object, ...]:
    """States of the global generators of `random` and NumPy."""
    words = np.random.get_state(legacy=False)
    return random.getstate(), str(words), words["state"]["key"].tolist()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rand_augment_depends_on_its_key_and_leaves_global_generators_alone(mode):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    states = global_states()
    seen = {rand_augment(image, RECIPE, key).tobytes() for key in range(8)}
    assert global_states() == states
    assert len(seen) > 3
    random.random()
    assert rand_augment(image, RECIPE, 7).tobytes() in seen
    assert rand_augment(image, RECIPE, 7).mode == mode


def test_turns_are_keyed_and_uniform():
    config = AugmentConfig(flip_vertical=True, quarter_turns=True)
    key = {"seed": 0, "epoch": 0, "sample_ids": np.arange(4000)}
    upside_down, quarters = turns(config, **key)
    assert abs(upside_down.mean() - 0.5) < 0.03
    assert np.abs(np.bincount(quarters, minlength=4) / 4000 - 0.25).max() < 0.03
    assert abs(np.corrcoef(upside_down, quarters)[0, 1]) < 0.05
    some = turns(config, seed=0, epoch=0, sample_ids=np.array([7, 3]))
    assert (some[0] == upside_down[[7, 3]]).all()
    assert (some[1] == quarters[[7, 3]]).all()
    assert (turns(config, **{**key, "epoch": 1})[1] != quarters).any()
    assert (turns(config, **key, view=1)[1] != quarters).any()
    none = turns(AugmentConfig(), **key)
    assert not none[0].any()
    assert not none[1].any()
