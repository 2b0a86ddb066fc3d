import copy
import subprocess
import sys

import pytest
import torch

from mae_core.config import MaskConfig, ModelConfig
from mae_core.masking import Mask, sample_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.patches import gather, patchify
from mae_core.plain import plain_predict
from tests.digest import tensors_digest

CONFIG = ModelConfig(arch="vit_pico_patch4", image_px=(16, 24), decoder_depth=2, decoder_width=32, decoder_heads=4)


def case(config: ModelConfig = CONFIG, num: int = 3) -> tuple[MaskedAutoencoder, torch.Tensor, Mask]:
    images = torch.randn(num, config.channels, *config.image_px, generator=torch.Generator().manual_seed(0))
    mask = sample_masks(config.mask, config.grid, seed=0, epoch=0, sample_ids=torch.arange(num))
    return build_mae(config, 0), images, mask


def paint(images: torch.Tensor, ids: torch.Tensor, value: float) -> torch.Tensor:
    """Return the images with the patches at `ids` set to a value."""
    flags = torch.zeros(len(images), CONFIG.num_patches).scatter_(1, ids, 1.0).reshape(-1, 1, *CONFIG.grid)
    return torch.where(flags.repeat_interleave(4, 2).repeat_interleave(4, 3) > 0, value, images)


def test_predictions_do_not_depend_on_hidden_pixels():
    mae, images, mask = case()
    assert torch.equal(mae.predict(paint(images, mask.hidden_ids, 9.0), mask), mae.predict(images, mask))


def test_loss_does_not_depend_on_how_visible_patches_are_predicted():
    mae, images, mask = case()
    constant = copy.deepcopy(mae)
    torch.nn.init.zeros_(constant.decoder.pred.weight)
    changed = paint(images, mask.visible_ids, 9.0)
    torch.testing.assert_close(constant(changed, mask), constant(images, mask))


def test_a_samples_loss_does_not_depend_on_its_batch():
    mae, images, mask = case()
    alone = mae(images[1:2], Mask(mask.visible_ids[1:2], mask.hidden_ids[1:2]))
    torch.testing.assert_close(alone, mae(images, mask)[1:2])


def test_the_seed_decides_the_initial_weights_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (tensors_digest(build_mae(CONFIG, seed).state_dict()) for seed in (0, 0, 1))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("place", ["decoder", "encoder"])
def test_there_is_one_mask_token(place):
    config = ModelConfig(
        arch="vit_pico_patch4", image_px=(16, 16), decoder_width=32, decoder_heads=4, mask_token_in=place
    )
    names = [name for name in build_mae(config, 0).state_dict() if "mask_token" in name]
    assert names == ["decoder.mask_token" if place == "decoder" else "mask_token"]


@pytest.mark.parametrize(("attention", "share"), [("self", 1.0), ("self", 0.3), ("cross", 0.3)])
@pytest.mark.parametrize("target", ["pixels", "norm_pixels"])
def test_reconstructions_keep_visible_patches_show_all_hidden_ones_and_leak_none(target, attention, share):
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(16, 24),
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=4,
        target=target,
        decoder_attention=attention,
        predicted_share=share,
    )
    mae, images, mask = case(config)
    masked, restored = mae.reconstruct(images, mask)
    assert masked.shape == restored.shape == images.shape
    for picture in (masked, restored):
        assert torch.equal(
            gather(patchify(picture, 4), mask.visible_ids), gather(patchify(images, 4), mask.visible_ids)
        )
    assert not gather(patchify(masked, 4), mask.hidden_ids).any()
    assert gather(patchify(restored, 4), mask.hidden_ids).abs().amax(dim=2).all()
    elsewhere = mae.reconstruct(paint(images, mask.hidden_ids, 5.0), mask)[1]
    assert torch.equal(elsewhere, restored)


@pytest.mark.parametrize(("attention", "place"), [("self", "decoder"), ("self", "encoder"), ("cross", "decoder")])
def test_without_pasting_a_picture_is_what_the_plain_computation_predicts_everywhere(attention, place):
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(16, 24),
        decoder_depth=2,
        decoder_width=32,
        decoder_heads=4,
        target="pixels",
        decoder_attention=attention,
        mask_token_in=place,
    )
    mae, images, mask = case(config)
    restored = mae.reconstruct(images, mask, paste=False)[1]
    torch.testing.assert_close(patchify(restored, 4), plain_predict(mae, images, mask), rtol=1e-4, atol=1e-5)


def test_a_crisp_picture_borrows_mean_and_deviation_and_a_plain_one_does_not():
    mae, images, mask = case()
    bright = paint(images, mask.hidden_ids, 5.0)
    crisp = gather(patchify(mae.reconstruct(bright, mask, crisp=True)[1], 4), mask.hidden_ids)
    torch.testing.assert_close(crisp, torch.full_like(crisp, 5.0), rtol=0, atol=0.02)
    plain = gather(patchify(mae.reconstruct(bright, mask)[1], 4), mask.hidden_ids)
    assert (plain - 5.0).abs().mean() > 1
    # Visible patches are known, so that their own statistics are honest.
    both = [mae.reconstruct(images, mask, paste=False, crisp=crisp)[1] for crisp in (False, True)]
    visible = [gather(patchify(picture, 4), mask.visible_ids) for picture in both]
    torch.testing.assert_close(visible[0], visible[1], rtol=0, atol=0)


def test_reconstructions_of_normalized_pixels_have_the_scale_of_the_visible_ones():
    mae, _, mask = case()
    flat = torch.full((3, 3, 16, 24), 2.5)
    torch.testing.assert_close(mae.reconstruct(flat, mask)[1], flat, rtol=0, atol=0.02)


COMPILED = """
import torch
from mae_core.config import ModelConfig
from mae_core.masking import sample_masks
from mae_core.model import build_mae

config = ModelConfig(arch="vit_pico_patch4", image_px=(16, 24), decoder_depth=2, decoder_width=32, decoder_heads=4)
mae, images, ids = build_mae(config, 0), torch.randn(2, 3, 16, 24), torch.arange(2)
mae.add_sizes([(8, 12)])
compiled = torch.compile(mae, backend="eager", fullgraph=True, dynamic=False)
for epoch in range(2):
    for shown, grid in ((images, config.grid), (images[:, :, ::2, ::2], (2, 3))):
        mask = sample_masks(config.mask, grid, seed=0, epoch=epoch, sample_ids=ids)
        with torch._dynamo.config.patch(error_on_recompile=epoch > 0):
            assert torch.equal(compiled(shown, mask), mae(shown, mask))
"""


@pytest.mark.slow
def test_the_model_compiles_once_for_each_size_without_a_graph_break():
    # In a process of its own, since dynamo cannot trace the shape checks that are on here.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_few_steps_lower_the_loss():
    mae, images, mask = case(
        ModelConfig(
            arch="vit_pico_patch4",
            image_px=(16, 16),
            decoder_depth=1,
            decoder_width=32,
            decoder_heads=4,
            mask=MaskConfig(ratio=0.5),
        )
    )
    optimizer = torch.optim.AdamW(mae.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = mae(images, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
