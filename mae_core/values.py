"""Bring the values of images of any kind to the scale 0 to 1, as a `ValueRange` says. Needs numpy alone."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped

from mae_core.normalization import ValueRange

FULL = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "int16": (-32768.0, 32767.0), "float32": (0.0, 1.0)}
"""Values that become 0 and 1 with the range "full"."""
NO_DATA: dict[str, Any] = {"uint8": 0, "uint16": 0, "int16": -32768, "float32": np.float32(-3e38)}
"""Value stored for a pixel without data: it becomes 0 with any range."""


def limits_of(
    values: Shaped[np.ndarray, "height width channels"],
    values_range: ValueRange,
    valid: Bool[np.ndarray, "height width channels"] | None = None,
) -> tuple[Float[np.ndarray, "channels"], Float[np.ndarray, "channels"]]:
    """Return the values of each channel that become 0 and 1; `valid` marks those that are data, if not all are."""
    channels = values.shape[2]
    if values_range.by == "set":
        return np.array(values_range.low, np.float64), np.array(values_range.high, np.float64)
    shares = (0.0, 100.0) if values_range.percentiles is None else values_range.percentiles
    low, high = np.zeros(channels), np.zeros(channels)
    for channel in range(channels):
        found = values[:, :, channel] if valid is None else values[:, :, channel][valid[:, :, channel]]
        if found.size:
            low[channel], high[channel] = np.percentile(found, shares, method="inverted_cdf")
    return low, high


def to_unit(
    values: Shaped[np.ndarray, "*shape channels"],
    low: Float[np.ndarray, "channels"],
    high: Float[np.ndarray, "channels"],
) -> Float32[np.ndarray, "*shape channels"]:
    """Return (values - low) / (high - low), clipped to 0 and 1, computed in float32; a range of one value gives 0."""
    span = (high - low).astype(np.float32)
    scaled = values.astype(np.float32)
    scaled -= low.astype(np.float32)
    with np.errstate(over="ignore"):
        scaled /= np.where(span > 0, span, np.float32(np.inf))
    return np.clip(scaled, 0, 1, out=scaled)
