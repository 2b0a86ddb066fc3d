"""Pretrain a tiny masked autoencoder for a few steps, reconstruct hidden patches, and embed images with its encoder.

    python examples/quickstart.py

Needs the library alone (`pip install .`), no data and no GPU; takes seconds. The images are synthetic: each has one
bright spot.
"""

import torch
from torch import Tensor

from mae_core import (
    MaskedAutoencoder,
    ModelConfig,
    Normalization,
    build_mae,
    encode,
    pixels_to_input,
    random_masks,
)

NUM_STEPS = 100
BATCH = 64
LEARNING_RATE = 1e-3


def spots(num: int, side_px: int, seed: int) -> Tensor:
    """Draw uint8 images [num, side_px, side_px, 1] with one bright spot each, at a random place and of random width."""
    generator = torch.Generator().manual_seed(seed)
    top, left, width = torch.rand(3, num, 1, 1, generator=generator)
    places = (torch.arange(side_px) + 0.5) / side_px
    distance = ((places[:, None] - top).square() + (places - left).square()).sqrt()
    return (255 * torch.exp(-((distance / (0.1 + 0.2 * width)) ** 2))).to(torch.uint8)[..., None]


def pretrain(config: ModelConfig, inputs: Tensor) -> tuple[MaskedAutoencoder, list[float]]:
    """Train a new model on normalized images [n, channels, height, width]; return it with the loss of each step."""
    mae = build_mae(config, seed=0)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for step in range(NUM_STEPS):
        batch = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(step))[:BATCH]]
        loss = mae(batch, random_masks(config.grid, len(batch), ratio=config.mask.ratio, seed=step)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return mae.eval(), losses


def main() -> None:
    """Print the loss before and after, the error of a reconstruction, and the shape of the embeddings."""
    config = ModelConfig(
        arch="vit_pico_patch4",  # 64 wide, 4 blocks; "vit_base_patch16" is the paper's ViT-B/16
        image_px=(32, 32),
        channels=1,
        decoder_depth=1,
        decoder_width=64,
        decoder_heads=4,
    )
    images = spots(512, 32, seed=0)
    inputs = pixels_to_input(images, Normalization(mean=(0.5,), std=(0.35,)))
    mae, losses = pretrain(config, inputs)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} after {NUM_STEPS} steps")

    mask = random_masks(config.grid, 8, seed=1)
    print(f"{mask.visible_ids.shape[1]} of {config.num_patches} patches visible")
    masked, restored = mae.reconstruct(inputs[:8], mask)
    print(f"mean absolute error {(masked - inputs[:8]).abs().mean():.3f} with hidden patches gray,", end=" ")
    print(f"{(restored - inputs[:8]).abs().mean():.3f} with hidden patches predicted")

    with torch.inference_mode():
        tokens = encode(mae.encoder, inputs, None)  # [n, 1 + patches, width]; the class token comes first
    embeddings = tokens[:, 1:].mean(dim=1)
    print(f"embeddings {tuple(embeddings.shape)}")


if __name__ == "__main__":
    main()
