"""The manifest of a prepared dataset, `manifest.json`: written last, so that without it there is no dataset."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mae_core.errors import UserError
from pipelines.storage import Storage

MANIFEST = "manifest.json"
SCHEMA = 1


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
class Manifest:
    """A prepared dataset. `digest`, over all other fields, is its identity in checkpoints, plans and MLflow."""

    channels: int
    """1 where every image is gray, otherwise 3."""
    image_px: tuple[int, int] | None
    """Height and width that all images share, upright; None where they differ."""
    classes: list[str]
    """Names by label, shared by all splits; empty for unlabelled images."""
    splits: dict[str, Split]
    num_found: int
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
    schema: int = SCHEMA
    digest: str = field(default="")

    @property
    def is_labelled(self) -> bool:
        return bool(self.classes)

    @property
    def summary(self) -> dict[str, Any]:
        """Values that commands print with --json: found = ok + quarantined + duplicates."""
        return {
            "digest": self.digest,
            "num_found": self.num_found,
            "num_ok": self.num_ok,
            "num_quarantined": self.num_quarantined,
            "num_duplicates": self.num_duplicates,
            "num_excluded": self.config.get("exclude", {}).get("num_excluded", 0),
            "reasons": dict(self.quarantine_reasons),
            "splits": {name: split.num_rows for name, split in self.splits.items()},
            "channels": self.channels,
            "classes": list(self.classes),
        }

    def computed_digest(self) -> str:
        """Compute the sha256 over canonical JSON of every field except `digest`."""
        values = dataclasses.asdict(self)
        del values["digest"]
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


def is_prepared(storage: Storage) -> bool:
    """Return whether the storage holds a prepared dataset."""
    return storage.exists(MANIFEST)


def write_manifest(storage: Storage, manifest: Manifest) -> Manifest:
    """Commit the dataset; return the manifest as written, with its digest."""
    sealed = manifest.sealed()
    storage.write(MANIFEST, json.dumps(dataclasses.asdict(sealed), indent=1, sort_keys=True).encode() + b"\n")
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
    if schema != SCHEMA:
        raise UserError(
            f"{storage.join(MANIFEST)} has schema {schema}, this version reads {SCHEMA}; run `mae prepare` again"
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
