"""Principal components of patches: the target `pca` (Table 1d), fitted on training images and kept with the weights."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.patches import patchify

MAX_DIM = 4096
"""Most values of a patch for which the covariance is computed."""


class PatchBasis(nn.Module):
    """The mean patch, and orthonormal components by falling variance. NaN until they are fitted or loaded."""

    mean: Tensor
    components: Tensor

    def __init__(self, num_components: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((dim,), torch.nan))
        self.register_buffer("components", torch.full((num_components, dim), torch.nan))

    @property
    def is_fitted(self) -> bool:
        """Whether the components have values."""
        return not bool(self.components.isnan().any())

    def forward(self, patches: Float[Tensor, "batch num dim"]) -> Float[Tensor, "batch num components"]:
        """Return the coefficients of the patches, in their precision whatever autocast says."""
        with torch.autocast(patches.device.type, enabled=False):
            return (patches - self.mean) @ self.components.T

    def patches(self, coefficients: Float[Tensor, "batch num components"]) -> Float[Tensor, "batch num dim"]:
        """Return the patches with these coefficients, which lack what the other components hold."""
        return coefficients @ self.components + self.mean


@torch.no_grad()
def principal_components(
    batches: Iterable[Float[Tensor, "_ channels height width"]], patch_px: int, num_components: int
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "components dim"]]:
    """Return mean and leading components of all patches of the images, which are normalized pixels.

    Sums and eigenvectors are float64, and the largest value of each component is positive, so that equal images give
    equal components. Raises UserError for patches of more than `MAX_DIM` values, or fewer patches than components.
    """
    total = square = None
    count = 0
    for images in batches:
        patches = patchify(images, patch_px).flatten(0, 1).double().cpu()
        if patches.shape[1] > MAX_DIM:
            raise UserError(
                f"patches have {patches.shape[1]} values, but target pca takes at most {MAX_DIM}; try target pixels"
            )
        if total is None or square is None:
            total, square = patches.new_zeros(patches.shape[1]), patches.new_zeros(2 * patches.shape[1:])
        total += patches.sum(0)
        square += patches.T @ patches
        count += len(patches)
    if total is None or square is None or count < num_components:
        raise UserError(f"{count} patches cannot have {num_components} principal components; try more images")
    mean = total / count
    _, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    leading = vectors.flip(1)[:, :num_components].T
    largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return mean.float(), (leading * largest.sign()).float().contiguous()
