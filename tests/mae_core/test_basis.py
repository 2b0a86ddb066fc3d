"""Principal components of patches are those of numpy's SVD, and a full set of them changes no distance."""

import dataclasses

import numpy as np
import pytest
import torch

from mae_core.basis import PatchBasis, principal_components
from mae_core.config import ModelConfig
from mae_core.errors import UserError
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.patches import gather, patchify
from mae_core.plain import plain_loss, plain_predict

CONFIG = ModelConfig(
    arch="vit_pico_patch4",
    image_px=(16, 24),
    decoder_depth=2,
    decoder_width=32,
    decoder_heads=4,
    target="pca",
    pca_components=7,
)


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    """Return images whose patches vary more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, 16, 24, generator=generator)
    return values + 3 * values.mean((2, 3), keepdim=True) + values.cumsum(3) / 4


def fitted(config: ModelConfig) -> MaskedAutoencoder:
    mae = build_mae(config, 0)
    assert mae.basis is not None
    assert not mae.basis.is_fitted
    mean, components = principal_components([images_of(20)], 4, config.pca_components)
    mae.basis.load_state_dict({"mean": mean, "components": components})
    assert mae.basis.is_fitted
    return mae


def test_components_are_those_of_a_singular_value_decomposition_whatever_the_batches() -> None:
    images = images_of(20)
    mean, components = principal_components([images], 4, 7)
    patches = patchify(images, 4).flatten(0, 1).double().numpy()
    _, _, rows = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, patches.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.abs(components.double().numpy() @ rows[:7].T), np.eye(7), atol=1e-5)
    np.testing.assert_allclose(components @ components.T, np.eye(7), atol=1e-5)
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()
    in_parts = principal_components(images.split(3), 4, 7)
    torch.testing.assert_close(in_parts, (mean, components), rtol=0, atol=1e-5)
    assert torch.equal(principal_components([images], 4, 7)[1], components)


def test_all_components_keep_every_distance_and_every_patch() -> None:
    basis = PatchBasis(48, 48)
    mean, components = principal_components([images_of(20)], 4, 48)
    basis.load_state_dict({"mean": mean, "components": components})
    one, other = patchify(images_of(2, seed=1), 4), patchify(images_of(2, seed=2), 4)
    torch.testing.assert_close((basis(one) - basis(other)).norm(dim=2), (one - other).norm(dim=2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(basis.patches(basis(one)), one, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = basis(one)
    assert torch.equal(under_autocast, basis(one))


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_the_loss_equals_the_plain_computation(attention: str) -> None:
    mae = fitted(dataclasses.replace(CONFIG, decoder_attention=attention, predicted_share=0.5)).double()
    images = images_of(3, seed=3).double()
    mask = training_masks(mae.config, seed=0, epoch=0, sample_ids=torch.arange(3))
    assert mae.predict(images, mask).shape[2] == 7
    torch.testing.assert_close(mae(images, mask), plain_loss(mae, images, mask), rtol=1e-12, atol=0)


def test_a_picture_shows_what_the_predicted_components_say_and_leaks_nothing() -> None:
    mae, images = fitted(CONFIG), images_of(2, seed=4)
    assert mae.basis is not None
    mask = training_masks(CONFIG, seed=0, epoch=0, sample_ids=torch.arange(2))
    _, restored = mae.reconstruct(images, mask)
    expected = gather(plain_predict(mae, images, mask), mask.hidden_ids) @ mae.basis.components + mae.basis.mean
    shown = patchify(restored, 4)
    torch.testing.assert_close(gather(shown, mask.hidden_ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(gather(shown, mask.visible_ids), gather(patchify(images, 4), mask.visible_ids))


def test_other_targets_have_no_basis_and_the_same_initial_encoder() -> None:
    plain = build_mae(dataclasses.replace(CONFIG, target="pixels"), 0).state_dict()
    pca = build_mae(CONFIG, 0).state_dict()
    assert pca.keys() - plain.keys() == {"basis.mean", "basis.components"}
    assert all(torch.equal(plain[name], pca[name]) for name in plain if name.startswith("encoder."))


def test_what_cannot_be_fitted_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="of a patch; try 6"):
        dataclasses.replace(CONFIG, pca_components=49)
    with pytest.raises(UserError, match="6 patches cannot have 7 principal components"):
        principal_components([images_of(1)[:, :, :8, :12]], 4, 7)
    with pytest.raises(UserError, match="at most 4096; try target pixels"):
        principal_components([torch.zeros(1, 3, 64, 64)], 64, 1)
