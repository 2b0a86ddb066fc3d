"""Options of preparing a dataset and of reading it."""

import re
from dataclasses import dataclass, field
from typing import Literal

from mae_core.config import ADDED
from mae_core.errors import UserError
from mae_core.normalization import Reading

_LABELS = re.compile(r"auto|folder|none|(?:column|json|member|file):.+", re.DOTALL)


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
class SourceConfig:
    """What a source's images, labels and splits are."""

    labels: str = "auto"
    """folder: the first folder below a split is the class; none; column:NAME of a table or list; json:KEY of the .json
    beside an image; member:SUFFIX, such as member:cls.txt beside an image; file:labels.csv with names and labels, or
    file:labels.csv:COLUMN; auto: what the kind of source stores by convention, else the folders if all images lie one
    folder deep."""
    multi_label: bool = field(default=False, metadata=ADDED)
    """An image may have several classes, or none: a list in a column or a JSON array, or names in a text, separated by
    | or ;. Otherwise lists are refused."""
    image_column: str = field(default="", metadata=ADDED)
    """Column of a table with the images, or of a list with their URIs; if empty, found by type and name."""
    image_member: str = field(default="", metadata=ADDED)
    """Which image of a sample of several to take, such as img.jpg of s1.img.jpg and s1.seg.png; in a folder, the end of
    the names to take; any: every image is a sample of its own, masks included. If empty, several are refused."""
    split_column: str = field(default="", metadata=ADDED)
    """Column of a table or list with the split; if empty, a column `split`."""
    sample_key: Literal["first-dot", "last-dot"] = field(default="first-dot", metadata=ADDED)
    """Members of a tar with the same name up to this dot are one sample; first-dot is WebDataset's rule, last-dot for
    names that contain dots."""

    def __post_init__(self) -> None:
        if not _LABELS.fullmatch(self.labels):
            raise UserError(
                f"labels {self.labels!r} is none of auto, folder, none, column:NAME, json:KEY, member:SUFFIX and "
                "file:labels.csv; try --labels folder"
            )
        if self.multi_label and self.labels in ("folder", "none"):
            raise UserError(f"multi_label needs labels that are stored, not {self.labels}; try --labels column:NAME")

    @property
    def label_kind(self) -> str:
        """What `labels` names: auto, folder, none, column, json, member or file."""
        return self.labels.partition(":")[0]

    @property
    def label_name(self) -> str:
        """Name of the column, key, member or file with the labels; empty for the other kinds."""
        name = self.labels.partition(":")[2]
        return name.rpartition(":")[0] if self.label_column else name

    @property
    def label_column(self) -> str:
        """Column of the file with the labels, in file:labels.csv:COLUMN; empty if it names none."""
        file, _, column = self.labels.partition(":")[2].rpartition(":")
        return column if self.label_kind == "file" and "." in file and "/" not in column else ""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceConfig):
    """How images are written to shards and a manifest."""

    val_fraction: float = 0.1
    """Share of images held out as split `val` if the source has no val/ folder, as `hold_out` says."""
    hold_out: Literal["content", "stratified"] = field(default="content", metadata=ADDED)
    """content: each image by a hash of its content; stratified: the same share of every class, at least one image of a
    class with two, by a hash of names. With `group_by` it is always stratified."""
    group_by: str = field(default="", metadata=ADDED)
    """Keep all images of a patient, slide or scene in one split: a regular expression whose first group, found in the
    name of each image, is the group; or column:NAME."""
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
    max_skipped: float = 0.05
    """Share of what is found that may be passed over, such as files that are no image; with more the job fails. Text
    and masks beside an image do not count, nor do documents such as README."""
    seed: int = 0
    """Seed of the hash that chooses `val`."""
    exclude: tuple[str, ...] = ()
    """Files with names of images to leave out, one a line, as `mae neighbours` and `mae curate` write them; a name
    is the path below SOURCE, as in column `source`."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """How an image is stored."""
    range: tuple[str, ...] = field(default=(), metadata=ADDED)
    """How values become 0 to 1: `full` (of their type), `min-max`, `percentiles A B`, `window CENTER WIDTH`, or `voi`
    (each DICOM's own window); values outside become 0 and 1. Needed if values of 16 bits, or fractions, use a part of
    their type's range."""
    range_by: Literal["set", "image"] = field(default="set", metadata=ADDED)
    """set: min-max and percentiles are those of each channel of all training images; image: each image has its own."""
    frames: str = field(default="one", metadata=ADDED)
    """Pages, frames or slices of a file: one (several are refused), first, all, or N for every N-th, each an image."""
    fourth_band: Literal["ask", "alpha", "band"] = field(default="ask", metadata=ADDED)
    """The last band of a TIFF that is declared as alpha and is no mask, as near infrared is by GDAL: ask (refuse it),
    alpha (composite over white), or band (keep it)."""

    axis: Literal["axial", "coronal", "sagittal"] = field(default="axial", metadata=ADDED)
    """Direction in which a medical volume is cut into slices, which are its frames."""

    tile_px: int | None = field(default=None, metadata=ADDED)
    """Side of the square tiles into which images are cut, such as scenes and slides; the last ones of a row or column
    overlap those before. Without a value images stay whole."""
    min_data: float = field(default=0.5, metadata=ADDED)
    """Smallest share of pixels with data of a tile that is kept."""
    min_tissue: float = field(default=0.0, metadata=ADDED)
    """Smallest share of coloured pixels of a tile that is kept, such as 0.1 for stained slides; 0 keeps all."""

    @property
    def reading(self) -> Reading:
        """How files of several frames and unclear bands are read."""
        return Reading(frames=self.frames, fourth_band=self.fourth_band, axis=self.axis)

    @property
    def range_is_by_image(self) -> bool:
        """Whether each image has its own value range."""
        return self.range_by == "image" or self.range[:1] == ("voi",)

    @property
    def range_numbers(self) -> tuple[float, ...]:
        """The numbers after the word of `range`."""
        return tuple(map(float, self.range[1:]))

    def _check_range(self) -> None:
        usage = "try --range full, min-max, percentiles 1 99, or window 2048 4096"
        numbers_of = {"full": 0, "min-max": 0, "percentiles": 2, "window": 2, "voi": 0}
        try:
            numbers = self.range_numbers
        except ValueError:
            raise UserError(f"range {' '.join(self.range)!r} has words where numbers belong; {usage}") from None
        kind = self.range[0] if self.range else "full"
        if kind not in numbers_of or len(numbers) != numbers_of[kind]:
            raise UserError(f"range {' '.join(self.range)!r} is none; {usage}")
        if kind == "percentiles" and not 0 <= numbers[0] < numbers[1] <= 100:
            raise UserError(f"percentiles {numbers[0]:g} {numbers[1]:g} are not 0 <= A < B <= 100; try 1 99")
        if kind == "window" and not numbers[1] > 0:
            raise UserError(f"window width {numbers[1]:g} is not above 0; try window 2048 4096")
        if self.range_by == "image" and kind not in ("min-max", "percentiles", "voi"):
            raise UserError(f"range_by is image, but range {kind} is the same for all; try --range percentiles 1 99")
        if self.tile_px is not None and self.tile_px < 1:
            raise UserError(f"tile_px {self.tile_px} is below 1; try 512, or leave it out")
        if not 0 <= self.min_data <= 1:
            raise UserError(f"min_data {self.min_data} is outside [0, 1]; try 0.5")
        if not 0 <= self.min_tissue <= 1:
            raise UserError(f"min_tissue {self.min_tissue} is outside [0, 1]; try 0.1")
        if self.min_tissue and self.tile_px is None:
            raise UserError("min_tissue chooses tiles; add --tile-px 512, for example")
        if self.frames not in ("one", "first", "all") and not (self.frames.isdecimal() and int(self.frames) > 0):
            raise UserError(f"frames {self.frames!r} is none of one, first, all, or a number; try --frames first")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range()
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"max_bad {self.max_bad} is outside [0, 1]; try 0.01, or 1 to allow any number")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"max_skipped {self.max_skipped} is outside [0, 1]; try 0.05, or 1 to allow any number")
        self._check_groups()
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes {self.shard_bytes} is below 1; try {2**30}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction {self.val_fraction} is outside [0, 1); try 0.1, or 0 for none")
        if self.rows_per_group < 1 or self.rows_per_shard < self.rows_per_group:
            raise UserError(
                f"rows_per_shard {self.rows_per_shard} must be at least rows_per_group {self.rows_per_group}, "
                "and that at least 1; try 8192 and 256"
            )

    def _check_groups(self) -> None:
        if not self.group_by or self.group_column:
            return
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise UserError(
                f"group_by {self.group_by!r} is no regular expression ({error}); try --group-by '(patient[0-9]+)'"
            ) from None

    @property
    def group_column(self) -> str:
        """Column that holds the group; empty if `group_by` is a regular expression or empty."""
        return self.group_by.removeprefix("column:") if self.group_by.startswith("column:") else ""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared dataset, and how it is read."""

    uri: str = ""
    """Prepared dataset: a folder or s3:// prefix written by `mae prepare`. With cache, a source of `mae prepare`."""
    cache: str = field(default="", metadata=ADDED)
    """Folder or s3:// prefix in which uri is prepared while the first epoch trains, for `mae pretrain` alone."""
    batch: int = 4096
    """Global batch: samples per optimizer step, over all workers."""
    micro_batch: int = 64
    """Samples per forward pass on one worker; must divide the batch. Gradients are accumulated over micro-batches."""
    window: int = 8192
    """Samples per shuffle window, rounded to full batches. Row groups are shuffled, then samples within each window."""
    labels_per_class: int | None = None
    """Labelled training images per class, chosen by the seed; all if not set."""
    lanes: int = field(default=1, metadata=ADDED)
    """Equal parts of the batch that draw on different row groups of the window; must divide the batch. With
    batch / (micro_batch x workers per node), no node of a cluster reads another's images."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch < 1 or self.batch % self.micro_batch:
            raise UserError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"try {max(1, round(self.batch / max(1, self.micro_batch))) * max(1, self.micro_batch)}"
            )
        if self.lanes < 1 or self.batch % self.lanes:
            raise UserError(f"batch {self.batch} is not a multiple of lanes {self.lanes}; try 1")
        if self.cache and not self.uri:
            raise UserError(f"cache {self.cache} needs a source to prepare in it; try --data.uri SOURCE")
        if self.window < 1:
            raise UserError(f"window {self.window} is below 1; try 8192")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise UserError(f"labels_per_class {self.labels_per_class} is below 1; try 100")

    def refuse_cache(self, command: str) -> None:
        """Raise UserError if there is a cache, which `command` cannot fill."""
        if self.cache:
            raise UserError(
                f"data.cache {self.cache} is for `mae pretrain`, and {command} needs the whole dataset; run "
                f"`mae prepare {self.uri} {self.cache}` and give --data.uri {self.cache}"
            )
