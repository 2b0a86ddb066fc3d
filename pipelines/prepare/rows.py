"""From the content of a file to the images that are stored of it: the whole, its frames, or its tiles."""

from dataclasses import dataclass

import numpy as np

from mae_core.normalization import ValueRange
from mae_core.values import limits_of
from pipelines.config import PrepareConfig
from pipelines.images.decode import (
    ImageArray,
    ImageHeader,
    ValueArray,
    data_of,
    decode,
    inspect,
    own_window,
    read_values,
)
from pipelines.images.decode.stored import pack
from pipelines.images.encode import as_png, encode
from pipelines.prepare.kinds import PixelKind
from pipelines.prepare.values import Limits, Mask
from pipelines.sources.reading import Content

# Largest difference between a pixel's channels that glass has, which is never quite gray.
_MIN_COLOUR = 20


@dataclass(frozen=True)
class Row:
    """One image as it is stored: a file's only one, or one of its frames."""

    content: bytes
    height_px: int
    width_px: int
    orientation: int
    segment_offsets: list[int] | None
    pixels: ValueArray
    valid: Mask | None = None
    limits: Limits | None = None
    suffix: str = ""
    """Appended to the file's name to tell frames apart."""


def examine(content: Content, config: PrepareConfig, kind: PixelKind, notes: list[str]) -> list[Row]:
    """Decode a file and return its images. Raises ValueError with the reason for quarantine.

    What is done to them that their owner may not expect is added to `notes`.
    """
    if isinstance(content, ValueError):
        raise content
    header = inspect(content, config.max_pixels, config.reading)
    kind.check(header)
    notes += header.notes
    if not kind.is_plain:
        frames = _frames(header, config)
        return [row for frame in frames for row in _rows_of_frame(content, header, frame, config, notes)]
    pixels = decode(content, header.channels, header.orientation, notes=notes)
    if config.tile_px is not None:
        return [_tile_row(pixels[tile], tile) for tile in _kept_tiles(pixels, data_of(content, pixels), config, notes)]
    stored = encode(content, header, pixels, config.encode)
    size = stored.height_px, stored.width_px
    return [Row(stored.content, *size, stored.orientation, stored.segment_offsets, pixels)]


def tiles_of(height_px: int, width_px: int, side_px: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns of square tiles that cover an image, the last ones overlapping those before.

    An image that is smaller in one dimension is as small there.
    """
    sides = []
    for size in (height_px, width_px):
        starts = [*range(0, max(1, size - side_px), side_px), max(0, size - side_px)]
        sides.append([slice(start, min(start + side_px, size)) for start in dict.fromkeys(starts)])
    return [(rows, columns) for rows in sides[0] for columns in sides[1]]


def _kept_tiles(
    values: ValueArray, valid: Mask | None, config: PrepareConfig, notes: list[str]
) -> list[tuple[slice, slice]]:
    """Return the tiles with enough data and tissue. Raises ValueError if there are none."""
    assert config.tile_px is not None, "asked for tiles"
    if config.min_tissue and (values.dtype != np.uint8 or values.shape[2] != 3):
        raise ValueError("no tissue: only colours of 8 bits show it; leave --min-tissue out")
    kept, reasons = [], {"data": 0, "tissue": 0}
    for tile in tiles_of(values.shape[0], values.shape[1], config.tile_px):
        if valid is not None and valid[tile].mean() < config.min_data:
            reasons["data"] += 1
        elif config.min_tissue and _tissue(values[tile]) < config.min_tissue:
            reasons["tissue"] += 1
        else:
            kept.append(tile)
    for what, count in reasons.items():
        notes += [f"tiles left out for too little {what}"] * count
    if not kept:
        share = config.min_data if reasons["data"] else config.min_tissue
        what = "data" if reasons["data"] else "tissue"
        raise ValueError(f"no {what}: no tile has {what} in {share:.0%} of its pixels")
    return kept


def _tissue(pixels: ImageArray) -> float:
    """Return the share of coloured pixels: stains are, glass is gray or white, and so are pen and dust mostly."""
    return float((np.ptp(pixels, axis=2) > _MIN_COLOUR).mean())


def _tile_row(pixels: ImageArray, tile: tuple[slice, slice]) -> Row:
    stored = as_png(pixels)
    return Row(stored.content, stored.height_px, stored.width_px, 1, None, pixels, suffix=_suffix_of(tile))


def _suffix_of(tile: tuple[slice, slice]) -> str:
    return f"@{tile[0].start},{tile[1].start}"


def _frames(header: ImageHeader, config: PrepareConfig) -> range:
    """Return the frames that the config chooses."""
    if config.frames in ("one", "first"):
        return range(1)
    return range(0, header.num_frames, 1 if config.frames == "all" else int(config.frames))


def _rows_of_frame(
    content: bytes, header: ImageHeader, frame: int, config: PrepareConfig, notes: list[str]
) -> list[Row]:
    """Read a frame, or its tiles, and store its values without loss, with its own value range if it has one.

    Tiles have the range of the image that they are cut from. Raises ValueError if none has enough data.
    """
    values, valid = read_values(content, config.reading, frame, config.max_pixels, notes)
    limits = None
    if config.range[:1] == ("voi",):
        limits = own_window(content, header.channels)
    elif config.range_by == "image":
        shares = config.range_numbers
        own = ValueRange(
            dtype=header.dtype,  # pyright: ignore[reportArgumentType] -- one of the four
            kind=config.range[0],  # pyright: ignore[reportArgumentType] -- checked by the config
            by="image",
            percentiles=(shares[0], shares[1]) if shares else None,
        )
        limits = limits_of(values, own, valid)
    suffix = f"#{frame}" if header.num_frames > 1 and config.frames not in ("one", "first") else ""
    if config.tile_px is None:
        height, width = values.shape[:2]
        return [Row(pack(values, limits), height, width, 1, None, values, valid, limits, suffix)]
    found = []
    for tile in _kept_tiles(values, valid, config, notes):
        part, mask = values[tile], None if valid is None else valid[tile]
        name = suffix + _suffix_of(tile)
        height, width = part.shape[:2]
        found.append(Row(pack(part, limits), height, width, 1, None, part, mask, limits, name))
    return found
