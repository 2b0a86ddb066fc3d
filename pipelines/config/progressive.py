"""Progressive resolution: smaller images in the first epochs, as a pure function of the epoch."""

from dataclasses import dataclass

from mae_core.config import ModelConfig, Size
from mae_core.errors import UserError

MAX_SIZES = 8
"""Most sizes of a run: torch compiles a model once for each, and stops compiling it after eight."""


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig:
    """Sizes of the images of pretraining, which grow over the epochs, so that early steps cost less."""

    first_px: Size | None = None
    """Height and width of the images in the first epochs, each a multiple of the patch size and at most
    model.image_px. Without a value, the images of all epochs have that size."""
    sizes: int = 4
    """Number of sizes, 2 to 8: evenly spaced from first_px to model.image_px, both included, and rounded to whole
    patches, or to whole cells of the mask."""
    full_from: float = 0.8
    """Share of the epochs after which images have their full size, above 0 and below 1. The smaller sizes share the
    epochs before it equally."""

    def __post_init__(self) -> None:
        if self.first_px is not None and min(self.first_px) < 1:
            raise UserError(f"progressive.first_px {shown(self.first_px)} is below 1; try 112 112")
        if not 2 <= self.sizes <= MAX_SIZES:
            raise UserError(f"progressive.sizes {self.sizes} is outside 2 to {MAX_SIZES}; try 4")
        if not 0 < self.full_from < 1:
            raise UserError(f"progressive.full_from {self.full_from:g} is outside (0, 1); try 0.8")

    def check(self, epochs: int, model: ModelConfig) -> None:
        """Raise UserError if first_px is no size of smaller images for the model, or no epoch has full size."""
        if self.first_px is None:
            return
        unit_px = _unit_px(model)
        for small, full in zip(self.first_px, model.image_px, strict=True):
            if small % unit_px or small > full:
                nearest_px = min(full, max(unit_px, round(small / unit_px) * unit_px))
                raise UserError(
                    f"progressive.first_px {shown(self.first_px)} must be multiples of {unit_px}px, the side of a "
                    f"patch or of a cell of the mask, and at most {shown(model.image_px)}; try {nearest_px} for {small}"
                )
        before_last = (epochs - 1) / epochs
        if self.size_at(before_last, model) != model.image_px:
            smaller = f", or --progressive.full-from {0.9 * before_last:.1g}" if epochs > 1 else ""
            raise UserError(
                f"progressive.full_from {self.full_from:g} leaves none of {epochs} passes over the images with "
                f"{shown(model.image_px)}; try more epochs{smaller}"
            )

    def size_at(self, done: float, model: ModelConfig) -> Size:
        """Return height and width of the images when a share `done` of the run, from 0 to 1, is over."""
        if self.first_px is None:
            return model.image_px
        last = self.sizes - 1
        # A share that rounding puts just below the start of a size belongs to it.
        return self._size(min(last, int(done * last / self.full_from + 1e-9)), model)

    def sizes_px(self, model: ModelConfig) -> tuple[Size, ...]:
        """Return the sizes below and including the full one, ascending."""
        if self.first_px is None:
            return (model.image_px,)
        return tuple(dict.fromkeys(self._size(number, model) for number in range(self.sizes)))

    def stages(self, epochs: int, model: ModelConfig) -> tuple[tuple[int, Size], ...]:
        """Return the first epoch of every size that occurs, and the size, in a run of so many epochs."""
        found: list[tuple[int, Size]] = []
        for epoch in range(epochs):
            size = self.size_at(epoch / epochs, model)
            if not found or found[-1][1] != size:
                found.append((epoch, size))
        return tuple(found)

    def _size(self, number: int, model: ModelConfig) -> Size:
        """Return the size of this number, from 0; a side half-way between two multiples becomes the larger one."""
        assert self.first_px is not None
        last, unit_px = self.sizes - 1, _unit_px(model)
        height_px, width_px = (
            (2 * (small * last + (full - small) * number) + last * unit_px) // (2 * last * unit_px) * unit_px
            for small, full in zip(self.first_px, model.image_px, strict=True)
        )
        return height_px, width_px


def shown(size: Size) -> str:
    """Format a size."""
    return f"{size[0]} x {size[1]} px"


def _unit_px(model: ModelConfig) -> int:
    """Return what must divide both sides of an image: a patch, a cell of the mask, or a cell of a grid mask."""
    return model.patch_px * (model.mask.grid_cell() if model.mask.kind == "grid" else model.mask.cell)
