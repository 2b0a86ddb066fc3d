import numpy as np
import pytest
import torch

from mae_core.augment import (
    drop_bands,
    erase,
    input_to_pixels,
    mixup,
    pixels_to_input,
    soft_targets,
)
from mae_core.config import AugmentConfig
from mae_core.normalization import Normalization, ValueRange
from mae_core.values import FULL, NO_DATA, limits_of, to_unit

CONFIG = AugmentConfig()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_to_input_normalizes_each_channel(channels):
    images = torch.randint(0, 256, (2, 5, 6, channels), dtype=torch.uint8)
    pixels = Normalization(mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    mean, std = torch.tensor(pixels.mean), torch.tensor(pixels.std)
    expected = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    found = pixels_to_input(images, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_input_to_pixels_undoes_pixels_to_input_for_every_value():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    normalization = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert torch.equal(input_to_pixels(pixels_to_input(images, normalization), normalization), images)


def erased(ids: torch.Tensor, prob: float = 0.25, **key: int) -> torch.Tensor:
    images = torch.full((len(ids), 3, 32, 24), 9.0)
    return erase(images, prob, sample_ids=ids, **{"seed": 0, "epoch": 0, **key})


def test_erasing_fills_a_box_with_normal_noise_in_its_share_of_images():
    found = erased(torch.arange(2000))
    struck = (found != 9).flatten(1).any(1)
    assert abs(struck.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    noise = found[found != 9]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    inside = (found[struck] != 9).all(1)
    share = inside.double().mean((1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.4
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(inside.sum((1, 2)), rows * columns)


def test_erasing_depends_on_its_key_and_not_on_its_batch():
    whole = erased(torch.arange(64))
    assert torch.equal(erased(torch.arange(32, 48)), whole[32:48])
    assert not torch.equal(erased(torch.arange(64), epoch=1), whole)
    assert not torch.equal(erased(torch.arange(64), seed=1), whole)


def test_soft_targets_are_distributions():
    targets = soft_targets(torch.tensor([2, 0, -1]), 4, 0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    torch.testing.assert_close(targets[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))


def mixed(config: AugmentConfig, labels: torch.Tensor, step: int = 0, micro: int = 0):
    """Images that are their label everywhere, so that what they became tells what was mixed."""
    images = labels.float()[:, None, None, None].expand(-1, 1, 16, 12).contiguous()
    return mixup(images, labels, 8, config, seed=0, step=step, micro=micro)


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.8, cutmix=1.0)]
)
def test_mixed_targets_equal_the_share_of_each_image(config):
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    for step in range(20):
        images, targets = mixed(config, labels, step)
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(8.0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_mixing_is_keyed_by_step_and_micro_batch():
    config, labels = AugmentConfig(mixup=0.8), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    first = mixed(config, labels)[1]
    torch.manual_seed(1)
    assert torch.equal(mixed(config, labels)[1], first)
    assert not torch.equal(mixed(config, labels, step=1)[1], first)
    assert not torch.equal(mixed(config, labels, micro=1)[1], first)


@pytest.mark.parametrize("config", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0)])
def test_a_sample_is_never_mixed_with_a_placeholder(config):
    images, targets = mixed(config, torch.tensor([5, 1, 2, -1]), step=3)
    assert (images[0] == 5).all()
    assert targets[0].tolist() == soft_targets(torch.tensor([5]), 8, 0.0)[0].tolist()


def test_both_mixup_and_cutmix_are_used():
    config, labels = AugmentConfig(mixup=0.8, cutmix=1.0), torch.tensor([0, 7])
    cuts = sum(len(mixed(config, labels, step)[0][0].unique()) == 2 for step in range(200))
    assert 60 < cuts < 140


def test_without_mixup_and_cutmix_images_are_unchanged():
    images = torch.randn(2, 1, 4, 4)
    found, targets = mixup(images, torch.tensor([0, 1]), 2, AugmentConfig(), seed=0, step=0, micro=0)
    assert found is images
    assert targets.tolist() == [[1, 0], [0, 1]]


def test_dropped_bands_are_keyed_and_never_all():
    images, ids = torch.randn(8, 13, 4, 4), torch.arange(4)
    key = {"seed": 0, "epoch": 0}
    found = drop_bands(images, 0.3, **key, sample_ids=ids)
    dropped = (found == 0).all(dim=(2, 3))
    assert 0.15 < dropped.float().mean() < 0.45
    torch.testing.assert_close(found[~dropped], images[~dropped], rtol=0, atol=0)
    # Rows run over the samples, then over their crops.
    alone = drop_bands(images[[2, 6]], 0.3, **key, sample_ids=ids[[2]])
    torch.testing.assert_close(alone, found[[2, 6]], rtol=0, atol=0)
    assert (dropped[2] != dropped[6]).any(), "each crop drops bands of its own"
    nearly_all = drop_bands(images, 0.999, **key, sample_ids=ids)
    assert ((nearly_all != 0).any(dim=(2, 3)).sum(1) >= 1).all()
    assert drop_bands(images, 0.0, **key, sample_ids=ids) is images


@pytest.mark.parametrize("dtype", sorted(FULL))
def test_the_full_range_of_a_type_is_0_to_1(dtype):
    low, high = FULL[dtype]
    values = np.array([low, (low + high) / 2, high], np.float64).astype(dtype).reshape(1, 3, 1)
    unit = to_unit(values, np.array([low]), np.array([high]))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit.ravel(), [0, 0.5, 1], atol=0.003)
    assert unit[0, 2, 0] == 1
    missing = np.full((1, 1, 1), NO_DATA[dtype], dtype)
    assert to_unit(missing, np.array([low]), np.array([high])).item() == 0


def test_values_outside_the_range_are_clipped_and_one_value_is_nothing():
    values = np.array([[[-5.0], [5.0], [15.0]]], np.float32)
    assert to_unit(values, np.array([0.0]), np.array([10.0])).ravel().tolist() == [0, 0.5, 1]
    flat = np.full((2, 2, 1), 7, np.uint16)
    own = ValueRange(dtype="uint16", kind="min-max", by="image")
    assert not to_unit(flat, *limits_of(flat, own)).any()


def test_images_from_0_to_1_are_normalized_and_left_alone():
    normalization = Normalization(mean=(0.4, 0.5), std=(0.2, 0.25))
    images = torch.rand(2, 3, 3, 2)
    before = images.clone()
    inputs = pixels_to_input(images, normalization)
    assert torch.equal(images, before)
    expected = (before - torch.tensor([0.4, 0.5])) / torch.tensor([0.2, 0.25])
    torch.testing.assert_close(inputs, expected.permute(0, 3, 1, 2))
    assert (input_to_pixels(inputs, normalization).float() / 255 - images).abs().max() <= 0.5 / 255 + 1e-6
