"""The smallest model, as our config and as the fields that transformers needs for the same sizes."""

from typing import Any

from mae_core.config import ModelConfig

CONFIG = ModelConfig(arch="vit_pico_patch4", image_px=(28, 28), decoder_width=32, decoder_depth=2, decoder_heads=4)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 28,
    "patch_size": 4,
}
DECODER_SIZES: dict[str, Any] = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}
