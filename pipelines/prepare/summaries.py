"""Summary of a prepared slice, stored as JSON: counts, exact pixel sums, and a digest of every image."""

import base64
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.values import Limits, Mask, ValueSums
from pipelines.sources import SPLITS

DIGEST_BYTES = 16
NO_SPLIT = 255
_LEVELS = np.arange(256)


@dataclass(kw_only=True)
class PixelSums:
    """Exact integer sums over the pixels of gray and colour images, so the order of summation does not matter."""

    num_gray: int = 0
    gray: tuple[int, int] = (0, 0)
    num_colour: int = 0
    colour: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)] * 3)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PixelSums":
        """Restore from the result of dataclasses.asdict after a JSON round trip."""
        gray, colour = tuple(values["gray"]), [tuple(sums) for sums in values["colour"]]
        return cls(num_gray=values["num_gray"], gray=gray, num_colour=values["num_colour"], colour=colour)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        sums = [_sums(pixels[:, :, c]) for c in range(pixels.shape[2])]
        self.merge(
            PixelSums(num_gray=pixels.size, gray=sums[0])
            if len(sums) == 1
            else PixelSums(num_colour=pixels.size // 3, colour=sums)
        )

    def merge(self, other: "PixelSums") -> None:
        self.num_gray += other.num_gray
        self.gray = _add(self.gray, other.gray)
        self.num_colour += other.num_colour
        self.colour = [_add(a, b) for a, b in zip(self.colour, other.colour)]

    def subtract(self, other: "PixelSums") -> None:
        """Take away pixels that were added before."""
        self.num_gray -= other.num_gray
        self.gray = _subtract(self.gray, other.gray)
        self.num_colour -= other.num_colour
        self.colour = [_subtract(a, b) for a, b in zip(self.colour, other.colour)]

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel on the scale 0 to 1.

        There is one channel if no image is in colour. Otherwise there are three, and gray pixels count for each of
        them.
        """
        count = max(1, self.num_gray + self.num_colour)
        totals = [_add(self.gray, colour) for colour in self.colour] if self.num_colour else [self.gray]
        means = [total / count for total, _ in totals]
        variances = [squares / count - mean**2 for (_, squares), mean in zip(totals, means)]
        return [mean / 255 for mean in means], [max(0.0, v) ** 0.5 / 255 for v in variances]


@dataclass(kw_only=True)
class WrittenShard:
    split: str
    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    num_unlabelled: int = 0


@dataclass(kw_only=True)
class SliceSummary:
    """Result of preparing one slice."""

    number: int
    num_entries: int
    shards: list[WrittenShard] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    sums: dict[str, PixelSums] = field(default_factory=dict)
    """Pixel sums by split, of plain 8-bit images."""
    values: dict[str, ValueSums] = field(default_factory=dict)
    """Sums by split, of other images."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to how many images that their owner may not expect."""
    num_further: int = 0
    """Images of the shards beyond the first of each file: its further frames."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Distinct (height, width) pairs, at most two."""
    splits: bytearray = field(default_factory=bytearray)
    """One byte per entry: the split's index in SPLITS, or NO_SPLIT for an unreadable image."""
    digests: bytearray = field(default_factory=bytearray)
    """DIGEST_BYTES per entry: prefix of the sha256 of the source image."""

    @property
    def num_bad(self) -> int:
        return sum(self.reasons.values())

    def note(self, split: str | None, digest: bytes = bytes(DIGEST_BYTES)) -> None:
        """Record the next entry: its split and digest, or None for an unreadable image."""
        self.splits.append(NO_SPLIT if split is None else SPLITS.index(split))
        self.digests += digest

    def count(self, split: str, pixels: NDArray[np.uint8]) -> None:
        """Count an image that was written to a shard."""
        self.sums.setdefault(split, PixelSums()).add(pixels)
        self._see(pixels.shape[:2])

    def count_values(
        self, split: str, values: NDArray[Any], valid: Mask | None = None, limits: Limits | None = None
    ) -> None:
        """Count an image of other values; `valid` marks those that are data, `limits` is its own value range."""
        self.values.setdefault(split, ValueSums(dtype=values.dtype.name)).add(values, valid, limits)
        self._see(values.shape[:2])

    def add_notes(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + 1

    def extend(self, piece: "SliceSummary") -> None:
        """Add the entries, pixels, sizes and notes of the next piece of the slice; shards and reasons are not added."""
        self.splits += piece.splits
        self.digests += piece.digests
        for split, sums in piece.sums.items():
            self.sums.setdefault(split, PixelSums()).merge(sums)
        for note, count in piece.notes.items():
            self.notes[note] = self.notes.get(note, 0) + count
        for size in piece.sizes:
            self._see(size)

    def _see(self, size: tuple[int, int]) -> None:
        if size not in self.sizes and len(self.sizes) < 2:
            self.sizes.append(size)

    def to_json(self) -> bytes:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "values"}
        values |= {"sums": {split: dataclasses.asdict(sums) for split, sums in self.sums.items()}}
        values |= {"shards": [dataclasses.asdict(shard) for shard in self.shards]}
        values |= {"values": {split: sums.to_json() for split, sums in self.values.items()}}
        for name in ("splits", "digests"):
            values[name] = base64.b64encode(values[name]).decode()
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "SliceSummary":
        values = json.loads(content)
        for name in ("splits", "digests"):
            values[name] = bytearray(base64.b64decode(values[name]))
        values["sizes"] = [tuple(size) for size in values["sizes"]]
        values["shards"] = [WrittenShard(**shard) for shard in values["shards"]]
        values["sums"] = {split: PixelSums.from_dict(sums) for split, sums in values["sums"].items()}
        values["values"] = {split: ValueSums.from_json(sums) for split, sums in values["values"].items()}
        return cls(**values)


def _sums(values: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the exact sum and sum of squares."""
    counts = np.bincount(values.ravel(), minlength=256)
    return int(counts @ _LEVELS), int(counts @ _LEVELS**2)


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _subtract(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] - b[0], a[1] - b[1]
