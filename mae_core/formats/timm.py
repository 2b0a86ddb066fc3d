"""Names of timm's VisionTransformer, which are ours for an encoder and for a classifier."""

from collections.abc import Mapping

from torch import Tensor

from mae_core.formats.ours import encoder_part, refuse_mask_token_in_encoder


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's tensors, whose names are ours."""
    return dict(tensors)


def from_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under timm's names; of a complete MAE, its encoder, since timm has no decoder.

    Raises UserError if mask tokens enter the encoder.
    """
    refuse_mask_token_in_encoder(tensors, "timm")
    return encoder_part(tensors)
