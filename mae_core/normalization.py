"""How the stored values of images become a model's input. Imports no torch, so that `mae --help` is quick."""

from dataclasses import dataclass, field
from typing import Literal

from mae_core.config import ADDED


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of several pages or of unclear bands is read."""

    frames: str = "one"
    """one: refuse a file of several pages, frames or slices; first, all, or the N of every N-th."""
    fourth_band: Literal["ask", "alpha", "band"] = "ask"
    """The last band of a TIFF that is declared as alpha without being a mask, as GDAL declares near infrared: refuse
    it, composite over white, or keep it as a band."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Direction in which a medical volume is cut into slices."""


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """How the values of images become numbers from 0 to 1, where they are not 8 bits in one or three channels."""

    dtype: Literal["uint8", "uint16", "int16", "float32"]
    """Type of the values as they are stored."""
    kind: Literal["full", "min-max", "percentiles", "window", "voi"]
    """What 0 and 1 are: the limits of the type, of the values, percentiles, a stated window, or a DICOM's own."""
    by: Literal["set", "image"] = "set"
    """set: low and high are those of all training images; image: each image has its own."""
    low: tuple[float, ...] = ()
    """Value of each channel that becomes 0, as does all below it; empty if each image has its own."""
    high: tuple[float, ...] = ()
    """Value of each channel that becomes 1, as does all above it."""
    percentiles: tuple[float, float] | None = None
    """Percentiles of each image that become 0 and 1."""
    reading: Reading = field(default_factory=Reading)
    """How files were read."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Mean and standard deviation of each channel: uint8 pixels x become (x / 255 - mean) / std."""

    mean: tuple[float, ...]
    """Mean of each channel on the scale 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel on the scale 0 to 1."""
    values: ValueRange | None = field(default=None, metadata=ADDED)
    """How values become the scale 0 to 1; None for uint8 pixels of one or three channels, divided by 255."""
