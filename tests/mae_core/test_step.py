import copy
import dataclasses

import torch
from torch import nn

from mae_core.config import ModelConfig
from mae_core.masking import sample_masks, training_masks
from mae_core.model import build_mae
from mae_core.step import classify_loss, ema_update, pretrain_loss

CONFIG = ModelConfig(arch="vit_pico_patch4", image_px=(16, 16), decoder_depth=1, decoder_width=32, decoder_heads=4)


def test_placeholders_change_neither_loss_nor_gradients():
    mae, images = build_mae(CONFIG, 0), torch.randn(3, 3, 16, 16)
    images[2] = 0
    found = []
    for ids in (torch.tensor([5, 6, -1]), torch.tensor([5, 6])):
        mask = sample_masks(CONFIG.mask, CONFIG.grid, seed=0, epoch=0, sample_ids=ids)
        mae.zero_grad()
        loss = pretrain_loss(mae, images[: len(ids)], mask, (ids >= 0).float())
        loss.backward()
        found.append((loss.detach(), mae.encoder.patch_embed.proj.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_losses_of_micro_batches_add_up_to_the_batchs():
    mae, images = build_mae(CONFIG, 0), torch.randn(4, 3, 16, 16)

    def loss(part: slice) -> torch.Tensor:
        mask = sample_masks(CONFIG.mask, CONFIG.grid, seed=0, epoch=0, sample_ids=torch.arange(4)[part])
        return pretrain_loss(mae, images[part], mask, torch.ones(len(images[part])))

    torch.testing.assert_close(loss(slice(0, 2)) + loss(slice(2, 4)), loss(slice(0, 4)))


def test_several_masks_of_an_image_are_the_mean_of_as_many_steps_with_one():
    config = dataclasses.replace(CONFIG, predicted_share=0.4)
    mae, images, ids = build_mae(config, 0).double(), torch.randn(3, 3, 16, 16).double(), torch.tensor([5, 6, -1])
    weights = (ids >= 0).double()
    together = training_masks(config, seed=0, epoch=2, sample_ids=ids, masks_per_image=3)
    pretrain_loss(mae, images, together, weights).backward()
    found = {name: p.grad.clone() for name, p in mae.named_parameters() if p.grad is not None}
    mae.zero_grad()
    for rows in torch.arange(9).chunk(3):
        mask = dataclasses.replace(
            together, visible_ids=together.visible_ids[rows], hidden_ids=together.hidden_ids[rows]
        )
        (pretrain_loss(mae, images, mask, weights) / 3).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, mae.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


def test_several_crops_of_an_image_each_have_masks_of_their_own():
    mae, crops, weights = build_mae(CONFIG, 0), torch.randn(2, 3, 3, 16, 16), torch.tensor([1.0, 1.0, 0.0])
    ids = torch.tensor([5, 6, -1])
    masks = training_masks(CONFIG, seed=0, epoch=2, sample_ids=ids, masks_per_image=4)
    found = pretrain_loss(mae, crops.flatten(0, 1), masks, weights)
    expected = []
    for view, rows in enumerate(torch.arange(12).chunk(4)):
        mask = dataclasses.replace(masks, visible_ids=masks.visible_ids[rows], hidden_ids=masks.hidden_ids[rows])
        expected.append(pretrain_loss(mae, crops[view % 2], mask, weights))
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_classify_loss_is_torchs_cross_entropy_summed_by_weight():
    logits, targets = torch.randn(4, 5), torch.rand(4, 5).softmax(1)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")[[0, 2, 3]].sum()
    torch.testing.assert_close(classify_loss(logits, targets, weights), expected)


def test_ema_update_moves_the_average_towards_the_model():
    model = nn.BatchNorm1d(3)
    ema = copy.deepcopy(model).requires_grad_(False)
    nn.init.constant_(model.weight, 2.0)
    assert model.running_mean is not None
    assert ema.running_mean is not None
    model.running_mean.fill_(7.0)
    ema_update(ema, model, 0.9)
    torch.testing.assert_close(ema.weight, torch.full((3,), 1.1))
    assert torch.equal(ema.running_mean, model.running_mean)
