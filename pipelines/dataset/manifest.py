"""The manifest of a prepared dataset, `manifest.json`: written last, so that without it there is no dataset."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mae_core.errors import UserError
from mae_core.normalization import Normalization, ValueRange
from pipelines.storage import Storage

MANIFEST = "manifest.json"
SCHEMA = 1
VALUES_SCHEMA = 2
"""Schema of datasets with `values`, which earlier versions cannot read."""
_LATER = ("values", "label_sets")
_NOTES = ("notes", "passed_over", "label_candidates", "num_unlabelled")
"""Fields that say how the dataset came about, which neither images nor labels depend on: the digest leaves them out."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file: a contiguous slice of the sorted listing, its sample ids first_id + row."""

    path: str
    num_rows: int
    num_bytes: int
    first_id: int
    sha256: str
    rows_per_group: int

    @property
    def num_groups(self) -> int:
        """Row groups; only the last may be short."""
        return -(-self.num_rows // self.rows_per_group)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split, by ascending first_id."""

    num_rows: int
    num_bytes: int
    shards: list[Shard]


@dataclass(frozen=True, kw_only=True)
class PixelValues:
    """Values of images that are not 8 bits in one or three channels; statistics are those of `Manifest.mean`."""

    range: ValueRange
    minimum: list[float]
    """Smallest value of each channel, as stored."""
    maximum: list[float]
    percentiles: dict[str, list[float]]
    """Values of each channel by percentile, such as "99"; those of float32 are within 0.2 %."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared dataset. `digest`, over all but its notes, is its identity in checkpoints, plans and MLflow."""

    channels: int
    """1 where every image is gray, 3 for colour, and else the number that all images have."""
    image_px: tuple[int, int] | None
    """Height and width that all images share, upright; None where they differ."""
    classes: list[str]
    """Names by label, shared by all splits; empty for unlabelled images."""
    splits: dict[str, Split]
    num_found: int
    """Everything under the source as a person counts it: num_ok + num_quarantined + num_duplicates + passed over."""
    num_ok: int
    num_quarantined: int
    num_duplicates: int
    quarantine_reasons: dict[str, int]
    mean: list[float]
    """Mean of each channel of the training split (of all images without one), on the scale 0 to 1."""
    std: list[float]
    config: dict[str, Any]
    source_digest: str
    """sha256 over the paths and sizes of all images found."""
    values: PixelValues | None = None
    """Values of the images; None for 8 bits in one or three channels."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to how many images that their owner may not expect; not part of the identity, since the stored
    images are."""
    schema: int = SCHEMA
    digest: str = field(default="")
    label_sets: list[list[int]] = field(default_factory=list)
    """With several classes an image, the classes that each stored label means; empty if it is the class itself."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """What the source holds beside its images, by reason; not part of the identity, since no image depends on it."""
    label_candidates: list[str] = field(default_factory=list)
    """Values of `--labels` that the source suggests and that were not used; not part of the identity."""
    num_unlabelled: dict[str, int] = field(default_factory=dict)
    """Images without a label in the splits of a labelled dataset that have any; not part of the identity, since the
    labels are."""

    @property
    def is_labelled(self) -> bool:
        return bool(self.classes)

    @property
    def has_single_labels(self) -> bool:
        """Whether the dataset has labels, each of which is one class."""
        return self.is_labelled and not self.label_sets

    @property
    def summary(self) -> dict[str, Any]:
        """Values that commands print with --json: found = ok + quarantined + duplicates + passed over."""
        return {
            "digest": self.digest,
            "num_found": self.num_found,
            "num_ok": self.num_ok,
            "num_quarantined": self.num_quarantined,
            "num_duplicates": self.num_duplicates,
            "num_passed_over": sum(self.passed_over.values()),
            "num_excluded": self.config.get("exclude", {}).get("num_excluded", 0),
            "reasons": dict(self.quarantine_reasons),
            "passed_over": dict(self.passed_over),
            "label_candidates": list(self.label_candidates),
            "num_unlabelled": dict(self.num_unlabelled),
            "splits": {name: split.num_rows for name, split in self.splits.items()},
            "channels": self.channels,
            **({"dtype": self.values.range.dtype} if self.values else {}),
            **({"notes": dict(self.notes)} if self.notes else {}),
            "classes": list(self.classes),
        }

    def label_name(self, label: int | None) -> str | None:
        """Return the name of a stored label, or the names of its classes; None for an image without one."""
        if label is None:
            return None
        return "; ".join(self.classes[i] for i in self.label_sets[label]) if self.label_sets else self.classes[label]

    @property
    def how_to_label(self) -> str:
        """Say how to prepare the dataset with labels, if it has none."""
        again = "prepare its source into another folder"
        if self.label_candidates:
            shown = " or ".join(f"--labels {option}" for option in self.label_candidates[:3])
            return f"its source may hold labels that were not used: {again} with {shown}"
        if self.config.get("labels") == "none":
            return f"it was prepared with --labels none: {again} without it"
        return (
            f"{again} with --labels folder for one folder a class, column:NAME for a table, member:SUFFIX or json:KEY "
            "for files beside the images, or file:labels.csv; `mae inspect SOURCE` shows what it holds"
        )

    def noting(self, passed_over: dict[str, int], label_candidates: list[str]) -> "Manifest":
        """Return the manifest with what was passed over, which counts as found."""
        return dataclasses.replace(
            self,
            num_found=self.num_found + sum(passed_over.values()) - sum(self.passed_over.values()),
            passed_over=passed_over,
            label_candidates=label_candidates,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them; later ones only if they say something, so that digests stay."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key not in (*_LATER, *_NOTES)}

    def computed_digest(self) -> str:
        """Compute the sha256 over canonical JSON of every field, without `digest` and what the identity leaves out."""
        values = self.to_dict()
        for name in ("digest", *_NOTES):
            values.pop(name, None)
        values["num_found"] -= sum(self.passed_over.values())
        return hashlib.sha256(_canonical(values)).hexdigest()

    def sealed(self) -> "Manifest":
        """Return the manifest with its digest."""
        return dataclasses.replace(self, digest=self.computed_digest())

    def split(self, name: str) -> Split:
        """Return a split. Raises UserError with the names of all splits if there is none of this name."""
        if name not in self.splits:
            raise UserError(
                f"the dataset has no split {name!r}, only {', '.join(sorted(self.splits))}; choose one of these"
            )
        return self.splits[name]


def check_value_range(uri: str, manifest: Manifest, pixels: Normalization, model: str) -> None:
    """Raise UserError if a model that expects `pixels` cannot read the dataset's values.

    The model's own value range is applied to them: only their type must be equal and, if each image has its own range,
    the way in which it was computed.
    """
    mine, theirs = manifest.values.range if manifest.values else None, pixels.values
    if mine is None and theirs is None:
        return
    said = f"dataset {uri} has {_shown(mine)} but {model} was trained on {_shown(theirs)}"
    if mine is None or theirs is None or mine.dtype != theirs.dtype:
        raise UserError(f"{said}; use a model of such images, or prepare the dataset anew from files of that kind")
    ways = [(found.by, found.kind, found.percentiles) for found in (mine, theirs)]
    if "image" in (mine.by, theirs.by) and ways[0] != ways[1]:
        raise UserError(f"{said}; prepare the dataset anew with that --range and --range-by")


def _shown(values: ValueRange | None) -> str:
    if values is None:
        return "8-bit pixels"
    numbers = "" if values.percentiles is None else f" {values.percentiles[0]:g} {values.percentiles[1]:g}"
    return f"{values.dtype} values with range {values.kind}{numbers} by {values.by}"


def is_prepared(storage: Storage) -> bool:
    """Return whether the storage holds a prepared dataset."""
    return storage.exists(MANIFEST)


def write_manifest(storage: Storage, manifest: Manifest) -> Manifest:
    """Commit the dataset; return the manifest as written, with its digest."""
    sealed = manifest.sealed()
    storage.write(MANIFEST, json.dumps(sealed.to_dict(), indent=1, sort_keys=True).encode() + b"\n")
    return sealed


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest. Raises UserError if there is no dataset, it is damaged, or of another version."""
    try:
        content = storage.read(MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"{storage.uri} is not a prepared dataset (it has no {MANIFEST}); "
            f"run `mae prepare SOURCE {storage.uri}` first"
        ) from None
    try:
        values = json.loads(content)
        schema = values["schema"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{storage.join(MANIFEST)} is damaged; run `mae prepare` into an empty folder") from None
    if schema not in (SCHEMA, VALUES_SCHEMA):
        raise UserError(
            f"{storage.join(MANIFEST)} has schema {schema}, this version reads {SCHEMA} and {VALUES_SCHEMA}; "
            "run `mae prepare` again"
        )
    try:
        manifest = TypeAdapter(Manifest).validate_python(values)
    except ValidationError:
        raise UserError(f"{storage.join(MANIFEST)} is damaged; run `mae prepare` into an empty folder") from None
    if manifest.digest != manifest.computed_digest():
        raise UserError(
            f"{storage.join(MANIFEST)} was changed after it was written (its digest differs); run `mae prepare` again"
        )
    return manifest


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
