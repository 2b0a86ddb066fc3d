"""Number of floating-point operations of a training step, counted from its matrix products.

A multiply-add counts as two. Linear layers and the two products of attention are counted, forward and backward (twice
the forward, except for the patch embedding, whose input needs no gradient). Norms, activations, softmax and optimizer
are not counted. Recomputation inside a kernel is counted once.
"""

import dataclasses
import math

from mae_core.config import ModelConfig, Size, parse_arch, patch_grid

_MLP_RATIO = 4


def step_flops(config: ModelConfig) -> int:
    """Count the operations per masked image in the fast path, which computes only what the loss needs."""
    assert config.mask_token_in == "decoder", "mask tokens in the encoder are not counted"
    encoded, predicted = config.class_tokens + config.num_visible, config.num_predicted
    all_tokens = config.class_tokens + config.num_patches
    if config.decoder_attention == "cross":
        blocks = config.decoder_depth * _block(predicted, encoded, config.decoder_width)
    else:
        blocks = (config.decoder_depth - 1) * _block(all_tokens, all_tokens, config.decoder_width)
        blocks += _block(predicted, all_tokens, config.decoder_width)
    return _embedding(config, config.num_visible) + 3 * (_encoder(config) + blocks + _head(config, predicted))


def plain_flops(config: ModelConfig) -> int:
    """Count the operations per masked image in mae_core/plain.py with the paper's decoder."""
    paper = dataclasses.replace(config, decoder_attention="self", predicted_share=1.0)
    all_tokens = paper.class_tokens + paper.num_patches
    blocks = paper.decoder_depth * _block(all_tokens, all_tokens, paper.decoder_width)
    return _embedding(paper, paper.num_patches) + 3 * (_encoder(paper) + blocks + _head(paper, all_tokens))


def embedding_flops(arch: str, image_px: Size, channels: int) -> int:
    """Count the forward operations per image of an encoder with nothing masked."""
    shape = parse_arch(arch)
    num_patches = math.prod(patch_grid(image_px, shape.patch_px))
    tokens = shape.class_tokens + num_patches
    patches = _linear(num_patches, shape.patch_px**2 * channels, shape.width)
    return patches + shape.depth * _block(tokens, tokens, shape.width)


def _encoder(config: ModelConfig) -> int:
    """Count forward operations of the encoder's blocks and of the projection to the decoder's width."""
    arch, encoded = parse_arch(config.arch), config.class_tokens + config.num_visible
    return arch.depth * _block(encoded, encoded, arch.width) + config.encoder_layers * _linear(
        encoded, arch.width, config.decoder_width
    )


def _embedding(config: ModelConfig, num_patches: int) -> int:
    return 2 * _linear(num_patches, config.patch_dim, parse_arch(config.arch).width)


def _head(config: ModelConfig, tokens: int) -> int:
    return _linear(tokens, config.decoder_width, config.target_dim)


def _block(tokens: int, context: int, width: int) -> int:
    """Count forward operations of a block whose `tokens` attend to `context` tokens."""
    attention = _linear(tokens, width, 2 * width) + _linear(context, width, 2 * width) + 4 * tokens * context * width
    return attention + 2 * _linear(tokens, width, _MLP_RATIO * width)


def _linear(tokens: int, width_in: int, width_out: int) -> int:
    return 2 * tokens * width_in * width_out
