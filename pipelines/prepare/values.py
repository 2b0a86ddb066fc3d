"""Statistics of images that are not plain 8-bit pixels: counts of every value, and the value range made of them.

Whole numbers are counted one by one, so that sums and percentiles are exact. float32 is counted in 2**18 levels, the
upper bits of its ordered bit pattern, each within 0.2 % of its values; minimum, maximum and sums are exact.
"""

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.values import FULL, to_unit
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import PixelValues
from pipelines.images.decode import ValueArray

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
_FLOAT_SHIFT = np.uint32(14)
_NUM_LEVELS = {"uint8": 2**8, "uint16": 2**16, "int16": 2**16, "float32": 2**18}
_FRACTION = 0.5
_TINY = float(np.finfo(np.float32).tiny)
Mask = NDArray[np.bool_]
Limits = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(kw_only=True)
class ChannelSums:
    """What is known of one channel of all images counted so far."""

    counts: NDArray[np.int64]
    """How often each level occurs."""
    minimum: float = np.inf
    maximum: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    """Sums over the values, or over those of the unit scale if each image has its own range."""

    def merge(self, other: "ChannelSums") -> None:
        self.counts += other.counts
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    def percentile(self, share: float, levels: NDArray[np.float64]) -> float:
        """Return the smallest value that at least `share` percent of the values do not exceed."""
        ends = self.counts.cumsum()
        rank = max(1, int(np.ceil(share / 100 * ends[-1])))
        return float(np.clip(levels[np.searchsorted(ends, rank)], self.minimum, self.maximum))


@dataclass(kw_only=True)
class ValueSums:
    """Sums over images of one dtype, by their number of channels."""

    dtype: str
    by_channels: dict[int, list[ChannelSums]] = field(default_factory=dict)

    def add(self, values: ValueArray, valid: Mask | None, limits: Limits | None) -> None:
        """Count an image [height width channels]; `limits` is its own value range, if it has one."""
        channels = values.shape[2]
        sums = self.by_channels.setdefault(channels, [_empty(self.dtype) for _ in range(channels)])
        unit = None if limits is None else to_unit(values, *limits)
        for channel in range(channels):
            mask = slice(None) if valid is None else valid[:, :, channel]
            found = values[:, :, channel][mask].ravel()
            if found.size:
                summed = found if unit is None else unit[:, :, channel][mask].ravel()
                sums[channel].merge(_of_channel(found, summed, self.dtype))

    def merge(self, other: "ValueSums") -> None:
        for channels, theirs in other.by_channels.items():
            mine = self.by_channels.setdefault(channels, [_empty(self.dtype) for _ in range(channels)])
            for own, more in zip(mine, theirs, strict=True):
                own.merge(more)

    def channels(self) -> list[ChannelSums]:
        """Return the sums of each channel, gray images counting for each channel of colour ones."""
        most = max(self.by_channels)
        found = [_empty(self.dtype) for _ in range(most)]
        for sums in self.by_channels.values():
            for channel in range(most):
                found[channel].merge(sums[channel if len(sums) > 1 else 0])
        return found

    def to_json(self) -> dict[str, Any]:
        channels = {str(number): [_packed(one) for one in sums] for number, sums in self.by_channels.items()}
        return {"dtype": self.dtype, "by_channels": channels}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ValueSums":
        dtype = values["dtype"]
        found = {int(n): [_unpacked(one, dtype) for one in sums] for n, sums in values["by_channels"].items()}
        return cls(dtype=dtype, by_channels=found)


def refuse_empty(counted: ValueSums, source: str, images: str) -> None:
    """Raise UserError if a channel of the images that statistics are made of has no data, and so no statistics."""
    if empty := [number for number, sums in enumerate(counted.channels()) if not sums.counts.any()]:
        raise UserError(
            f"channels {', '.join(map(str, empty))} (from 0) of {source} have no data in any {images}; write the "
            "files without them"
        )


def refuse_fraction(total: ValueSums, source: str, config: PrepareConfig) -> None:
    """Raise UserError if no range is chosen and the values use a fraction of their type's, or exceed it."""
    if config.range or total.dtype == "uint8":
        return
    levels, together = levels_of(total.dtype), _empty(total.dtype)
    for sums in total.channels():
        together.merge(sums)
    low, high = (together.percentile(share, levels) for share in (0.1, 99.9))
    # A level of fractions has the value in its middle, and the one of 0 is not quite 0.
    low, high = (0.0 if abs(value) < _TINY else value for value in (low, high))
    full = FULL[total.dtype]
    is_outside = together.minimum < full[0] or together.maximum > full[1]
    share = (high - low) / (full[1] - full[0])
    if is_outside or share < _FRACTION:
        said = "beyond" if is_outside else f"{max(share, 0.001):.1%} of"
        raise UserError(
            f"the values of {source}, read as {total.dtype}, run from {together.minimum:g} to {together.maximum:g} "
            f"(0.1 to 99.9 % of them from {low:g} to {high:g}), {said} {full[0]:g} to {full[1]:g}; say which become "
            f"0 and 1: --range percentiles 0.1 99.9, --range window {(low + high) / 2:g} {max(high - low, 1):g}, "
            "--range min-max, or --range full if this is meant"
        )


def described(total: ValueSums, config: PrepareConfig) -> tuple[PixelValues, list[float], list[float]]:
    """Return the values' description, and mean and standard deviation of each channel from 0 to 1."""
    channels, levels = total.channels(), levels_of(total.dtype)
    kind, numbers = (config.range[0] if config.range else "full"), config.range_numbers
    by_image = config.range_is_by_image
    limits = None if by_image else _limits(channels, levels, total.dtype, kind, numbers)
    values_range = ValueRange(
        dtype=total.dtype,  # pyright: ignore[reportArgumentType] -- one of the four
        kind=kind,  # pyright: ignore[reportArgumentType] -- checked by the config
        by="image" if by_image else "set",
        low=() if limits is None else tuple(limits[0].tolist()),
        high=() if limits is None else tuple(limits[1].tolist()),
        percentiles=(numbers[0], numbers[1]) if by_image and kind == "percentiles" else None,
        reading=config.reading,
    )
    found = [_mean_std(sums, levels, None if limits is None else (limits[0][i], limits[1][i]), total.dtype)
             for i, sums in enumerate(channels)]  # fmt: skip
    description = PixelValues(
        range=values_range,
        minimum=[sums.minimum for sums in channels],
        maximum=[sums.maximum for sums in channels],
        percentiles={f"{share:g}": [sums.percentile(share, levels) for sums in channels] for share in PERCENTILES},
    )
    return description, [float(mean) for mean, _ in found], [float(std) for _, std in found]


def levels_of(dtype: str) -> NDArray[np.float64]:
    """Return the value that each level stands for."""
    numbers = np.arange(_NUM_LEVELS[dtype])
    if dtype != "float32":
        return (numbers - (32768 if dtype == "int16" else 0)).astype(np.float64)
    # The middle of the level's bit patterns; negative numbers have all their bits inverted to be in order.
    patterns = (numbers.astype(np.uint32) << _FLOAT_SHIFT) + np.uint32(1 << 13)
    bits = np.where(patterns >> np.uint32(31), patterns ^ np.uint32(1 << 31), ~patterns)
    with np.errstate(invalid="ignore"):
        return bits.view(np.float32).astype(np.float64)


def _level_numbers(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "int16":
        return values.astype(np.int32) + 32768
    if dtype == "float32":
        bits = np.ascontiguousarray(values + np.float32(0)).view(np.uint32)
        ordered = np.where(bits >> np.uint32(31), ~bits, bits ^ np.uint32(1 << 31))
        return (ordered >> _FLOAT_SHIFT).astype(np.int64)
    return values


def _of_channel(values: NDArray[Any], summed: NDArray[Any], dtype: str) -> ChannelSums:
    numbers = summed.astype(np.float64)
    return ChannelSums(
        counts=np.bincount(_level_numbers(values, dtype), minlength=_NUM_LEVELS[dtype]),
        minimum=float(values.min()),
        maximum=float(values.max()),
        total=float(numbers.sum()),
        squares=float((numbers**2).sum()),
    )


def _empty(dtype: str) -> ChannelSums:
    return ChannelSums(counts=np.zeros(_NUM_LEVELS[dtype], np.int64))


def _limits(
    channels: list[ChannelSums], levels: NDArray[np.float64], dtype: str, kind: str, numbers: tuple[float, ...]
) -> Limits:
    if kind == "min-max":
        pairs = [(sums.minimum, sums.maximum) for sums in channels]
    elif kind == "percentiles":
        pairs = [(sums.percentile(numbers[0], levels), sums.percentile(numbers[1], levels)) for sums in channels]
    elif kind == "window":
        pairs = [(numbers[0] - numbers[1] / 2, numbers[0] + numbers[1] / 2)] * len(channels)
    else:
        pairs = [FULL[dtype]] * len(channels)
    low, high = np.array(pairs, np.float64).T
    return low, high


def _mean_std(
    sums: ChannelSums, levels: NDArray[np.float64], limits: tuple[float, float] | None, dtype: str
) -> tuple[float, float]:
    """Return mean and standard deviation from 0 to 1, of the channel's own range or by `limits`."""
    count = max(1, int(sums.counts.sum()))
    if limits is None:
        mean, squares = sums.total / count, sums.squares / count
        return mean, max(0.0, squares - mean**2) ** 0.5
    low, high = limits
    span = high - low if high > low else np.inf
    if dtype == "float32" and low <= sums.minimum and sums.maximum <= high:
        # Nothing is clipped, so the exact sums serve.
        mean, squares = sums.total / count, sums.squares / count
        return (mean - low) / span, max(0.0, squares - mean**2) ** 0.5 / span
    occurring = sums.counts.nonzero()[0]
    unit = ((levels[occurring] - low) / span).clip(0, 1)
    shares = sums.counts[occurring] / count
    mean = float(unit @ shares)
    return mean, float((unit - mean) ** 2 @ shares) ** 0.5


def _packed(sums: ChannelSums) -> dict[str, Any]:
    occurring = sums.counts.nonzero()[0]
    table = np.stack([occurring, sums.counts[occurring]]).astype("<i8").tobytes()
    return {
        "counts": base64.b64encode(zlib.compress(table, 1)).decode(),
        "numbers": [sums.minimum, sums.maximum, sums.total, sums.squares],
    }


def _unpacked(values: dict[str, Any], dtype: str) -> ChannelSums:
    table = np.frombuffer(zlib.decompress(base64.b64decode(values["counts"])), "<i8").reshape(2, -1)
    found = _empty(dtype)
    found.counts[table[0]] = table[1]
    found.minimum, found.maximum, found.total, found.squares = values["numbers"]
    return found
