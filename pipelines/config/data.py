"""Options of preparing a dataset and of reading it."""

from dataclasses import dataclass, field
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How an image is stored."""

    kind: Literal["indexed", "restarts", "keep", "shrink"] = "indexed"
    """indexed: add an index to each JPEG, without changing a pixel, so that training decodes only the part under a crop
    (the fastest lossless kind measured); restarts: the same with restart markers, which other decoders understand too;
    keep: store the original bytes; shrink: encode a larger image as a JPEG of short_side_px at `quality`."""
    short_side_px: int = 320
    """Short side of the JPEGs that shrink stores; images that are not larger are stored as indexed."""
    quality: int = 92
    """JPEG quality of the images that shrink stores."""

    def __post_init__(self) -> None:
        if self.short_side_px < 1:
            raise UserError(f"short_side_px {self.short_side_px} is below 1; try 320")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is outside 1 to 100; try 92")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How images are written to shards and a manifest."""

    val_fraction: float = 0.1
    """Share of images held out as split `val`, chosen by a hash of their content, if the source has no val/ folder."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """folder: the first folder below a split is the class; auto: the same if all images lie one folder deep."""
    rows_per_shard: int = 8192
    """Most images per shard, taken from the sorted listing; the shards of a split have even sizes."""
    shard_bytes: int = 2**30
    """Most bytes of images per shard, counted as they are in the source."""
    rows_per_group: int = 256
    """Rows of a Parquet row group, the unit of shuffling and reading."""
    max_pixels: int = 64_000_000
    """Images with more pixels are quarantined by their header, before they are decoded."""
    drop_duplicates: bool = True
    """Keep one of several images with equal content (in test, else val, else train); otherwise only count them."""
    max_bad: float = 0.01
    """Share of images that may be quarantined; with more the job fails."""
    seed: int = 0
    """Seed of the hash that chooses `val`."""
    exclude: tuple[str, ...] = ()
    """Files with names of images to leave out, one a line, as `mae neighbours` and `mae curate` write them; a name
    is the path below SOURCE, as in column `source`."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """How an image is stored."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"max_bad {self.max_bad} is outside [0, 1]; try 0.01, or 1 to allow any number")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes {self.shard_bytes} is below 1; try {2**30}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction {self.val_fraction} is outside [0, 1); try 0.1, or 0 for none")
        if self.rows_per_group < 1 or self.rows_per_shard < self.rows_per_group:
            raise UserError(
                f"rows_per_shard {self.rows_per_shard} must be at least rows_per_group {self.rows_per_group}, "
                "and that at least 1; try 8192 and 256"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared dataset, and how it is read."""

    uri: str = ""
    """Prepared dataset: a folder or s3:// prefix written by `mae prepare`."""
    batch: int = 4096
    """Global batch: samples per optimizer step, over all workers."""
    micro_batch: int = 64
    """Samples per forward pass on one worker; must divide the batch. Gradients are accumulated over micro-batches."""
    window: int = 8192
    """Samples per shuffle window, rounded to full batches. Row groups are shuffled, then samples within each window."""
    labels_per_class: int | None = None
    """Labelled training images per class, chosen by the seed; all if not set."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch < 1 or self.batch % self.micro_batch:
            raise UserError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"try {max(1, round(self.batch / max(1, self.micro_batch))) * max(1, self.micro_batch)}"
            )
        if self.window < 1:
            raise UserError(f"window {self.window} is below 1; try 8192")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise UserError(f"labels_per_class {self.labels_per_class} is below 1; try 100")
