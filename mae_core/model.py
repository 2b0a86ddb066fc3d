"""The masked autoencoder (He et al. 2021, section 3)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.basis import PatchBasis
from mae_core.config import ModelConfig, Size, parse_arch, patch_grid
from mae_core.decoder import Decoder
from mae_core.encoder import build_encoder, encode, encode_blocks
from mae_core.loss import NORM_EPS, masked_mse, targets
from mae_core.masking import Mask
from mae_core.patches import gather, patchify, unpatchify
from mae_core.positions import resized
from mae_core.randomness import Purpose, seed_of


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches and a decoder that predicts hidden ones.

    Weights are initialized from torch's global generator; `build_mae` takes a seed instead. Images are normalized
    pixels (`pixels_to_input`) of `config.image_px`; masks come from `sample_masks` or `random_masks`. Losses and
    predictions take other sizes too, once `add_sizes` has named them, with masks of their grid.
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
        # By image size, and no part of the state: they follow from the tables of config.image_px.
        self._tables: dict[Size, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def add_sizes(self, sizes: Iterable[Size]) -> None:
        """Make the position tables of images of these sizes (height, width), on the device of the model.

        Sine-cosine tables are those that a model of the size has; others are interpolated (`positions.resized`). Call
        it when the model has its weights and is on its device. Raises UserError if the patch does not divide a side.
        """
        config = self.config
        for size in sizes:
            grid = patch_grid(size, config.patch_px)
            encoder, decoder = (
                resized(table.detach(), config.grid, grid, config.class_tokens) for table in self._own_tables()
            )
            self._tables[size] = encoder, decoder

    def _own_tables(self) -> tuple[Tensor, Tensor]:
        table = self.encoder.pos_embed
        assert table is not None
        return table, self.decoder.pos_embed

    def _tables_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position tables of encoder and decoder for the size of the images."""
        height_px, width_px = images.shape[-2:]
        if (height_px, width_px) == self.config.image_px:
            return self._own_tables()
        assert (height_px, width_px) in self._tables, f"images {images.shape} for {self.config.image_px}; see add_sizes"
        return self._tables[height_px, width_px]

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
        encoder_table, decoder_table = self._tables_of(images)
        return self.decoder(self._encode(images, mask, encoder_table), mask, decoder_table)

    def _encode(self, images: Tensor, mask: Mask, table: Tensor | None = None) -> Tensor:
        """Return the tokens that the decoder reads: of the last block, or of several [batch layers tokens features]."""
        if self.config.encoder_layers > 1:
            return encode_blocks(self.encoder, images, mask, self.config.mixed_blocks, table)
        return encode(self.encoder, images, mask, self.mask_token, table)

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
