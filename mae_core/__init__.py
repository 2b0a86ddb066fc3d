"""Masked autoencoders in torch and timm, with no knowledge of clusters, storage or tracking.

    from mae_core import MaskConfig, MaskedAutoencoder, ModelConfig, load_encoder, random_masks

`examples/quickstart.py` shows a training step and an embedding. Names are imported when they are first used, so that
a process that only needs `mae_core.config` does not load torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_core.augment import input_to_pixels, pixels_to_input
    from mae_core.config import AugmentConfig, ClassifierConfig, MaskConfig, ModelConfig, OptimConfig, parse_arch
    from mae_core.encoder import build_encoder, encode
    from mae_core.errors import UserError
    from mae_core.masking import Mask, mask_from_noise, random_masks, sample_masks
    from mae_core.model import MaskedAutoencoder, build_mae
    from mae_core.normalization import Normalization, ValueRange
    from mae_core.pretrained import Classifier, Encoder, load_classifier, load_encoder, load_mae
    from mae_core.step import pretrain_loss
    from mae_core.values import limits_of, to_unit

    __version__: str

_MODULES = {
    "augment": ("input_to_pixels", "pixels_to_input"),
    "config": ("AugmentConfig", "ClassifierConfig", "MaskConfig", "ModelConfig", "OptimConfig", "parse_arch"),
    "encoder": ("build_encoder", "encode"),
    "errors": ("UserError",),
    "masking": ("Mask", "mask_from_noise", "random_masks", "sample_masks"),
    "model": ("MaskedAutoencoder", "build_mae"),
    "normalization": ("Normalization", "ValueRange"),
    "pretrained": ("Classifier", "Encoder", "load_classifier", "load_encoder", "load_mae"),
    "step": ("pretrain_loss",),
    "values": ("limits_of", "to_unit"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order in which a reader meets them
    "__version__",
    "MaskedAutoencoder",
    "build_mae",
    "ModelConfig",
    "MaskConfig",
    "OptimConfig",
    "AugmentConfig",
    "ClassifierConfig",
    "Normalization",
    "ValueRange",
    "limits_of",
    "to_unit",
    "pixels_to_input",
    "input_to_pixels",
    "parse_arch",
    "Mask",
    "random_masks",
    "sample_masks",
    "mask_from_noise",
    "pretrain_loss",
    "build_encoder",
    "encode",
    "Encoder",
    "load_encoder",
    "load_mae",
    "Classifier",
    "load_classifier",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("mae-ray")
        except metadata.PackageNotFoundError:  # a copy of the folder, as in a packaged model
            return "unknown"
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
