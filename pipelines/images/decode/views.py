"""The image at the size of the network's input, as evaluation sees it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# For evaluation, images are resized to cover 256/224 of the input size and centre-cropped.
_EVALUATION_COVER = 256 / 224


def evaluation_view(pixels: NDArray[Any], out_hw: tuple[int, int]) -> NDArray[Any]:
    """Return the image as evaluation sees it: uint8, or float32 from 0 to 1.

    An image of the input's size is unchanged. One that is larger in both dimensions is resized to cover 256/224 of the
    input and centre-cropped. Any other is resized to cover the input and centre-cropped.
    """
    height, width = pixels.shape[:2]
    if (height, width) == out_hw:
        return pixels
    cover = _EVALUATION_COVER if height > out_hw[0] and width > out_hw[1] else 1.0
    box_scale = min(height / (out_hw[0] * cover), width / (out_hw[1] * cover))
    box_height, box_width = max(1, round(out_hw[0] * box_scale)), max(1, round(out_hw[1] * box_scale))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return resized(pixels[top : top + box_height, left : left + box_width], out_hw)


def resized(pixels: NDArray[Any], out_hw: tuple[int, int]) -> NDArray[Any]:
    """Resize with antialiased bicubic interpolation.

    Uses torch, because machines that serve a model have no compiler for `crops`.
    """
    import torch
    from torch.nn.functional import interpolate

    # Torch's uint8 kernel is fast only on true channels-last memory, which reshape gives and indexing with None does
    # not. The copy is needed because Pillow's arrays are read-only.
    tensor = torch.from_numpy(pixels.copy().reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    found = interpolate(tensor, size=out_hw, mode="bicubic", antialias=True, align_corners=False)
    view = found.permute(0, 2, 3, 1)[0].numpy()
    # The kernel of bicubic interpolation has negative parts.
    return view if view.dtype == np.uint8 else view.clip(0, 1)
