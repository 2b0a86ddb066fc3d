"""Classifiers on top of an encoder: fully or partially fine-tuned ViTs, and linear probes on frozen features."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.config import LAYER_NORM_EPS, Arch, ClassifierConfig, Size, patch_grid
from mae_core.encoder import build_encoder, encode
from mae_core.errors import UserError
from mae_core.positions import resized


def build_classifier(
    arch: Arch,
    image_px: Size,
    channels: int,
    num_classes: int,
    config: ClassifierConfig,
    norm_eps: float = LAYER_NORM_EPS,
) -> VisionTransformer:
    """Build a ViT with a small random head; pool "avg" averages the patch tokens only (section 4.3).

    Raises UserError for pool "token" of an encoder with several class tokens, of which timm classifies the first.
    """
    if config.pool == "token" and config.method == "finetune" and arch.class_tokens > 1:
        raise UserError(
            f"classifier.pool token takes one class token, but {arch.name} has {arch.class_tokens}; "
            "try --classifier.pool avg"
        )
    vit = build_encoder(
        arch,
        image_px,
        channels,
        drop_path=config.drop_path,
        dropout=config.dropout,
        num_classes=num_classes,
        pool=config.pool,
        norm_eps=norm_eps,
    )
    _init_head(vit.head, config.head_std)
    if config.train_blocks is not None:
        freeze(vit, config.train_blocks)
    return vit


def freeze(vit: VisionTransformer, train_blocks: int | float) -> None:
    """Freeze all but the last `train_blocks` blocks, the norm after them, and the head (Figure 9).

    A half is the MLP of a block with its norm, without its attention; 0 trains the head only. Raises UserError if the
    encoder has fewer blocks.
    """
    depth, num_whole = len(vit.blocks), int(train_blocks)
    if train_blocks > depth:
        raise UserError(f"train_blocks {train_blocks:g} is above the encoder's {depth} blocks; try {depth}")
    learning = [vit.head, *list(vit.blocks)[depth - num_whole :]]
    if train_blocks > num_whole:
        half = list(vit.blocks)[depth - num_whole - 1]
        learning += [half.norm2, half.mlp]
    if train_blocks:
        learning += [vit.norm, vit.fc_norm]
    vit.requires_grad_(False)
    for module in learning:
        module.requires_grad_(True)


def load_encoder_weights(vit: VisionTransformer, tensors: Mapping[str, Tensor], image_px: Size) -> None:
    """Copy an encoder's weights, under timm's names, into `vit`; leave its head and fc_norm unchanged.

    With pool "avg" the model has no norm before the mean, and the encoder's is ignored. `image_px` is the image size of
    the weights, whose position table is resized to the model's (`positions.resized`).

    Raises UserError if names or shapes differ.
    """
    own = vit.state_dict()
    wanted = {name for name in own if not name.startswith(("head.", "fc_norm."))}
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "fc_norm."))}
    if isinstance(vit.norm, nn.Identity):
        given = {name: tensor for name, tensor in given.items() if not name.startswith("norm.")}
    if mismatched := sorted(wanted ^ given.keys()):
        side = "lack" if mismatched[0] in wanted else "have"
        raise UserError(
            f"the weights {side} {mismatched[0]!r} ({len(mismatched)} names differ); "
            "use an encoder.safetensors of this arch"
        )
    for name in sorted(wanted - {"pos_embed"}):
        if given[name].shape != own[name].shape:
            raise UserError(
                f"{name} is {tuple(given[name].shape)} in the weights and {tuple(own[name].shape)} in the model; "
                "use the arch and the channels that the weights were trained with"
            )
    grid = patch_grid(image_px, vit.patch_embed.proj.kernel_size[0])
    given["pos_embed"] = resized(given["pos_embed"], grid, vit.patch_embed.grid_size, vit.num_prefix_tokens)
    vit.load_state_dict(given, strict=False)


def features(
    vit: VisionTransformer, images: Float[Tensor, "batch channels height width"], pool: Literal["avg", "token"]
) -> Float[Tensor, "batch features"]:
    """Encode complete images into one vector each: the class token, or the mean of the patch tokens."""
    return vit.fc_norm(pooled(encode(vit, images, None), vit.num_prefix_tokens, pool))


def pooled(
    tokens: Float[Tensor, "batch tokens features"], class_tokens: int, pool: Literal["avg", "token"]
) -> Float[Tensor, "batch features"]:
    """Return the class token, which is the mean if there are several, or the mean of the patch tokens."""
    return (tokens[:, :class_tokens] if pool == "token" else tokens[:, class_tokens:]).mean(dim=1)


class ProbeHead(nn.Module):
    """A linear classifier after a BatchNorm without affine parameters (Table 9, after Doersch et al. 2015)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, width: int, num_classes: int, *, head_std: float = 0.01, eps: float = 1e-6, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.head = nn.Linear(width, num_classes)
        _init_head(self.head, head_std)

    def forward(
        self,
        features: Float[Tensor, "batch features"],
        weights: Float[Tensor, "batch"],
        all_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Return logits.

        In training mode, normalize by the statistics of the features on all ranks, weighted by `weights` (0 for
        placeholders), and update the running ones. `all_sum` sums a tensor over ranks. No gradient reaches the
        features: they are frozen.
        """
        if self.training:
            mean, var = self._observe(features, weights, all_sum)
        else:
            mean, var = self.running_mean, self.running_var
        return self.head((features - mean) * torch.rsqrt(var + self.eps))

    @torch.no_grad()
    def _observe(
        self, features: Tensor, weights: Tensor, all_sum: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance, summed in float64 with one all-reduce, and update the running statistics."""
        values, weight = features.double(), weights.double()[:, None]
        sums = torch.cat([(values * weight).sum(0), (values.square() * weight).sum(0), weight.sum(0)])
        if all_sum is not None:
            sums = all_sum(sums)
        count = sums[-1].clamp(min=1)
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        unbiased = var * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean.to(features.dtype), var.to(features.dtype)


def _init_head(head: nn.Module, std: float) -> None:
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
