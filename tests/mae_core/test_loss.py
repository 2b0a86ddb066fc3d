import torch

from mae_core.loss import masked_mse, normalize, targets
from mae_core.masking import mask_from_noise
from mae_core.patches import gather, patchify


def test_targets_are_the_hidden_patches():
    images, mask = torch.randn(2, 3, 8, 12), mask_from_noise(torch.rand(2, 6), 2)
    hidden = gather(patchify(images, 4), mask.hidden_ids)
    assert torch.equal(targets(images, mask, 4, "pixels"), hidden)
    assert torch.equal(targets(images, mask, 4, "norm_pixels"), normalize(hidden))


def test_normalized_patches_have_mean_0_and_unbiased_variance_1():
    patches = normalize(torch.randn(2, 5, 48) * 7 + 3)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.var(-1, correction=1), torch.ones(2, 5), rtol=1e-5, atol=0)


def test_a_constant_patch_normalizes_to_zero():
    assert not normalize(torch.full((1, 1, 12), 5.0)).any()


def test_the_loss_is_in_the_targets_precision():
    pred, target = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4)
    loss = masked_mse(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (pred.float() - target).pow(2).flatten(1).mean(1))
