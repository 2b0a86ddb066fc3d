"""Implementations of the same training step; each runs one step and returns its loss."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_core.augment import pixels_to_input
from mae_core.bench.config import Precision, StepConfig
from mae_core.config import ModelConfig, OptimConfig, parse_arch
from mae_core.errors import UserError
from mae_core.masking import training_masks
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.optim import param_groups
from mae_core.plain import plain_loss
from mae_core.step import pretrain_loss

_LR = 1e-4
_PIXELS = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class Variant:
    """One implementation of the step. Masks are drawn in each step, as in training."""

    name: str
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    """Mean loss of the batch as a function of the step's number."""
    device: torch.device
    precision: Precision
    scaler: torch.amp.GradScaler
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    num_steps: int = 0

    def step(self) -> Tensor:
        """Run forward, backward and optimizer; return the loss before the update."""
        with self.around():
            dtype = getattr(torch, self.precision)
            with torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "float32"):
                loss = self.loss(self.num_steps)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return loss.detach()


def ours(config: StepConfig, model: ModelConfig, images: Tensor) -> Variant:
    """Build the fast path as used in training, with the compilation and attention kernel of the config."""
    mae = build_mae(model, config.seed).to(images.device)
    if config.compile != "eager":
        mae.compile(mode=None if config.compile == "default" else config.compile, dynamic=False, fullgraph=True)
    ids = torch.arange(len(images) // config.masks_per_image, device=images.device)
    weights = torch.ones(len(ids), device=images.device)

    def loss(step: int) -> Tensor:
        mask = training_masks(
            model, seed=config.seed, epoch=step, sample_ids=ids, masks_per_image=config.masks_per_image
        )
        return pretrain_loss(mae, images[: len(ids)], mask, weights) / len(ids)

    def around() -> AbstractContextManager[Any]:
        return nullcontext() if config.attention == "auto" else sdpa_kernel(_BACKENDS[config.attention])

    return _variant("ours", mae, loss, config, config.precision, images.device, around)


def plain(config: StepConfig, model: ModelConfig, images: Tensor) -> Variant:
    """Build the reference implementation (mae_core/plain.py), eager, with the same initial weights."""
    paper = dataclasses.replace(model, decoder_attention="self", predicted_share=1.0)
    mae = build_mae(paper, config.seed).to(images.device)
    ids = torch.arange(len(images), device=images.device)
    precision = config.precision if config.plain_precision == "same" else config.plain_precision

    def loss(step: int) -> Tensor:
        mask = training_masks(paper, seed=config.seed, epoch=step, sample_ids=ids)
        return plain_loss(mae, images, mask).mean()

    return _variant("plain", mae, loss, config, precision, images.device)


def transformers(config: StepConfig, model: ModelConfig, images: Tensor) -> Variant:
    """Build ViTMAE of transformers with the same sizes, its own weights and the same masks."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    paper, arch = dataclasses.replace(model, decoder_attention="self", predicted_share=1.0), parse_arch(model.arch)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=arch.width,
            num_hidden_layers=arch.depth,
            num_attention_heads=arch.heads,
            intermediate_size=4 * arch.width,
            image_size=config.image_px,
            patch_size=arch.patch_px,
            layer_norm_eps=1e-6,
            decoder_hidden_size=model.decoder_width,
            decoder_num_hidden_layers=model.decoder_depth,
            decoder_num_attention_heads=model.decoder_heads,
            decoder_intermediate_size=4 * model.decoder_width,
            mask_ratio=model.mask.ratio,
            norm_pix_loss=True,
        )
    )
    theirs = cast(nn.Module, theirs).to(images.device).train()
    ids = torch.arange(len(images), device=images.device)

    def loss(step: int) -> Tensor:
        mask = training_masks(paper, seed=config.seed, epoch=step, sample_ids=ids)
        return theirs(pixel_values=images, noise=mask.is_hidden().float()).loss

    return _variant("transformers", theirs, loss, config, config.precision, images.device)


def variants(config: StepConfig) -> list[Callable[[StepConfig, ModelConfig, Tensor], Variant]]:
    """List the implementations to time: ours, and the requested others that are installed."""
    found = [ours]
    if "plain" in config.against:
        found.append(plain)
    if "transformers" in config.against and find_spec("transformers") is not None:
        found.append(transformers)
    return found


def input_images(config: StepConfig, device: torch.device) -> Float[Tensor, "batch channels height width"]:
    """Return normalized images: random ones, or the folder's, repeated if there are fewer than the batch."""
    side_px = config.image_px
    if not config.images:
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randn(config.batch, 3, side_px, side_px, generator=generator).to(device)
    paths = sorted(p for p in Path(config.images).rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"folder {config.images!r} has no {', '.join(_SUFFIXES)}; name another, or none for random")
    pixels = [np.asarray(_read(path, side_px)) for path in islice(cycle(paths), config.batch)]
    return pixels_to_input(torch.from_numpy(np.stack(pixels)), _PIXELS).to(device)


def _read(path: Path, side_px: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)


def _variant(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    config: StepConfig,
    precision: Precision,
    device: torch.device,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Variant:
    recipe = OptimConfig()
    groups = param_groups(model, recipe.weight_decay, 1.0)
    kind = {"fused": config.optimizer == "fused", "foreach": config.optimizer == "foreach"}
    return Variant(
        name=name,
        optimizer=torch.optim.AdamW(groups, lr=_LR, betas=recipe.betas, **kind),
        loss=loss,
        device=device,
        precision=precision,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "float16"),
        around=around,
    )
