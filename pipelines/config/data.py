"""What is prepared, and how it is read."""

from dataclasses import dataclass, field
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is stored of an image."""

    kind: Literal["indexed", "restarts", "keep", "shrink"] = "indexed"
    """indexed: a JPEG gets an index of its parts, without a change of any pixel, so that training decodes only the part
    under a crop (measured the fastest of the lossless kinds); restarts: the same by restart markers, which other
    decoders know too; keep: the original bytes; shrink: a larger image becomes a JPEG of short_side_px at `quality`."""
    short_side_px: int = 320
    """Short side of what shrink stores; images that are no larger are stored as indexed."""
    quality: int = 92
    """JPEG quality of what shrink stores."""

    def __post_init__(self) -> None:
        if self.short_side_px < 1:
            raise UserError(f"short_side_px {self.short_side_px} is below 1; try 320")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is outside 1 to 100; try 92")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How images become shards and a manifest."""

    val_fraction: float = 0.1
    """Share of images held out as split `val`, by a hash of their content, where the source has no val/ folder."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """folder: the first folder below a split is the class; auto: so where every image lies just one folder deep."""
    rows_per_shard: int = 8192
    """Images of the sorted listing that go to one shard at most; a split's shards are of even size."""
    shard_bytes: int = 2**30
    """Bytes of images, as the source has them, that go to one shard at most."""
    rows_per_group: int = 256
    """Rows of a Parquet row group, the unit of shuffling and reading."""
    max_pixels: int = 64_000_000
    """Images of more pixels are quarantined, by their header, before they are decoded."""
    drop_duplicates: bool = True
    """Keep images of equal content once (in test, else val, else train); otherwise they are counted and stay."""
    max_bad: float = 0.01
    """Share of images that may be in quarantine; more end the job."""
    seed: int = 0
    """Seed of the hash that holds out `val`."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """What is stored of an image."""

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
    """Which prepared dataset is read, and how."""

    uri: str = ""
    """Prepared dataset: the folder or s3:// prefix that `mae prepare` wrote."""
    batch: int = 4096
    """Global batch: samples of one optimizer step over all workers."""
    micro_batch: int = 64
    """Samples of one forward pass on one worker; must divide the batch. Gradients accumulate over the rest."""
    window: int = 8192
    """Rows are shuffled within windows of this many, rounded to whole batches, of shuffled row groups."""
    labels_per_class: int | None = None
    """Train on so many labelled images of each class, chosen by the seed; without a value on all."""

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
