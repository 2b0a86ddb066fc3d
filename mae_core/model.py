"""The masked autoencoder (He et al. 2021, section 3)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.basis import PatchBasis
from mae_core.config import ModelConfig, Size, parse_arch
from mae_core.decoder import Decoder
from mae_core.encoder import build_encoder, encode, encode_blocks
from mae_core.loss import NORM_EPS, masked_mse, targets
from mae_core.masking import Mask
from mae_core.patches import gather, patchify, unpatchify
from mae_core.randomness import Purpose, seed_of


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches and a decoder that predicts hidden ones.

    Weights are initialized from torch's global generator; `build_mae` takes a seed instead. Images are normalized
    pixels (`pixels_to_input`) of `config.image_px`; masks come from `sample_masks` or `random_masks`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        arch = parse_arch(config.arch)
        self.encoder = build_encoder(arch, config.image_px, config.channels, norm_eps=config.norm_eps)
        self.decoder = Decoder(config)
        self.basis = PatchBasis(config.target_dim, config.patch_dim) if config.target == "pca" else None
        self.mask_token = None
        if config.mask_token_in == "encoder":
            self.mask_token = nn.Parameter(torch.empty(1, 1, arch.width).normal_(std=0.02))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Mask,
        seen: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """Compute each sample's loss, the mean squared error over its predicted patches.

        `seen` are the images as the encoder sees them, if they differ from those to predict, as with dropped channels.
        """
        target = targets(images, mask, self.config.patch_px, self.config.target, self.basis)
        return masked_mse(self.predict(images if seen is None else seen, mask), target)

    def predict(
        self, images: Float[Tensor, "batch channels height width"], mask: Mask
    ) -> Float[Tensor, "batch predicted dim"]:
        """Predict the patches of `mask.predicted_ids`, in that order and in units of the target.

        dim is patch_px * patch_px * channels, ordered row, column, channel, or the number of principal components.
        """
        return self.decoder(self._encode(images, mask), mask)

    def _encode(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the tokens that the decoder reads: of the last block, or of several [batch layers tokens features]."""
        if self.config.encoder_layers > 1:
            return encode_blocks(self.encoder, images, mask, self.config.mixed_blocks)
        return encode(self.encoder, images, mask, self.mask_token)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Mask,
        *,
        paste: bool = True,
        crisp: bool = False,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]:
        """Return images with hidden patches zeroed, and images with hidden patches predicted.

        Visible patches are unchanged, or with `paste=False` predicted too, as in the paper's figures: no loss covers
        them, so they are of worse quality. A prediction of normalized pixels lacks the patch's own mean and deviation;
        those of hidden patches are estimated from nearby visible patches, so that nothing hidden leaks into the
        picture. `crisp` borrows the hidden patches' true ones instead, as is common: then the model predicted only part
        of the picture. It changes nothing with other targets. With pca, hidden patches lack what is not predicted.
        """
        assert mask.predicted_from == 0, "a picture needs predictions of all hidden patches"
        config = self.config
        patches = patchify(images, config.patch_px)
        ids = mask.hidden_ids if paste else torch.cat([mask.visible_ids, mask.hidden_ids], dim=1)
        latent = self._encode(images, mask)
        predicted = (self.decoder(latent, mask) if paste else self.decoder.predict_all(latent, mask)).to(images.dtype)
        if self.basis is not None:
            predicted = self.basis.patches(predicted)
        if config.target == "norm_pixels":
            mean, deviation = _statistics(gather(patches, ids))
            if not crisp:
                num_hidden = mask.hidden_ids.shape[1]
                nearby = _nearby_statistics(gather(patches, mask.visible_ids), mask, config.grid)
                mean, deviation = (
                    torch.cat([own[:, :-num_hidden], estimated], dim=1)
                    for own, estimated in zip((mean, deviation), nearby, strict=True)
                )
            predicted = predicted * deviation + mean
        layout = (config.grid, config.patch_px, config.channels)
        dim = patches.shape[2]
        masked = unpatchify(patches.scatter(1, mask.hidden_ids[..., None].expand(-1, -1, dim), 0.0), *layout)
        return masked, unpatchify(patches.scatter(1, ids[..., None].expand(-1, -1, dim), predicted), *layout)


def build_mae(config: ModelConfig, seed: int) -> MaskedAutoencoder:
    """Build a model whose initial weights depend on the seed only; torch's global generators are unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, Purpose.INIT))
        return MaskedAutoencoder(config)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [batch, num, 1] of each patch, as the target normalizes by them."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + NORM_EPS).sqrt()


def _nearby_statistics(visible: Tensor, mask: Mask, grid: Size) -> tuple[Tensor, Tensor]:
    """Estimate mean and deviation [batch, hidden, 1] of hidden patches from visible ones, weighted by distance**-4.

    The weight falls fast enough for near patches to outweigh far ones, whose number grows with distance.
    """
    statistics = torch.cat(_statistics(visible), -1)
    rows = torch.arange(grid[0], device=visible.device).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], device=visible.device).repeat(grid[0])
    positions = torch.stack([rows, columns], dim=1).to(visible.dtype)
    weights = torch.cdist(F.embedding(mask.hidden_ids, positions), F.embedding(mask.visible_ids, positions)) ** -4
    mean, deviation = (weights @ statistics / weights.sum(-1, keepdim=True)).split(1, dim=-1)
    return mean, deviation
