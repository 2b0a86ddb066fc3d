"""Cut a sorted listing into slices of even size, each within one split folder. One task prepares one slice."""

import dataclasses
import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mae_core.errors import UserError
from pipelines.config import PrepareConfig, SourceConfig
from pipelines.sources import Entry, Source
from pipelines.sources.entry import fields_of
from pipelines.sources.labels import members, numbers_or_names
from pipelines.sources.passed_over import printable
from pipelines.sources.reading import MAX_IMAGE_BYTES

log = logging.getLogger(__name__)

_MAX_NUMBERED_CLASSES = 1_000_000
# What programs write where a label is missing; each could be a name too, as "None" of a finding.
_LIKE_MISSING = frozenset(("n/a", "na", "#n/a", "nan", "<na>", "null", "?", "unlabeled", "unlabelled"))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A contiguous part of the listing within one split folder ("" if the source has none)."""

    number: int
    """Index among all slices; names the quarantine file."""
    part: int
    """Index among the slices of its folder; names the shards."""
    folder: str
    holds_out: bool
    """Whether a fraction of its images becomes split val."""
    entries: list[Entry]
    labels: list[int]
    """One label per entry; -1 if unlabelled."""

    @property
    def outputs(self) -> list[str]:
        """Every file that preparing the slice may write."""
        splits = {self.folder or "train"} | ({"val"} if self.holds_out else set())
        return [self.shard(split) for split in sorted(splits)] + [self.quarantine]

    def shard(self, split: str) -> str:
        return f"{split}/part-{self.part:05d}.parquet"

    @property
    def quarantine(self) -> str:
        return f"quarantine/part-{self.number:05d}.parquet"

    def to_json(self) -> bytes:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["entries"] = [fields_of(entry) for entry in self.entries]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Slice":
        values = json.loads(content)
        values["entries"] = [Entry(*fields) for fields in values["entries"]]
        return cls(**values)


@dataclass(kw_only=True)
class _Folder:
    num_entries: int = 0
    num_bytes: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """Number of entries by label; those without one are left out."""
    labelled: str = ""
    """Name of one entry with a label; empty if there is none."""
    unlabelled: str = ""
    """Name of one entry without a label; empty if there is none."""
    deep: str = ""
    """Name of one entry whose folder is not necessarily its class; empty if there is none."""


@dataclass(kw_only=True)
class Tally:
    """Counts and labels of a listing."""

    folders: dict[str, _Folder] = field(default_factory=dict)

    @property
    def labels(self) -> set[str]:
        """Every label that occurs."""
        return {label for folder in self.folders.values() for label in folder.labels}

    @property
    def num_entries(self) -> int:
        return sum(folder.num_entries for folder in self.folders.values())

    def counting(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries unchanged, counting each as it passes."""
        for entry in entries:
            folder = self.folders.setdefault(entry.split, _Folder())
            folder.num_entries += 1
            folder.num_bytes += _num_read(entry)
            if entry.label:
                folder.labelled = folder.labelled or entry.name
                folder.labels[entry.label] += 1
            else:
                folder.unlabelled = folder.unlabelled or entry.name
            if not entry.is_flat:
                folder.deep = folder.deep or entry.name
            yield entry


def check_splits(tally: Tally, uri: str) -> None:
    """Raise UserError if some images are in split folders and others are not."""
    if "" in tally.folders and len(tally.folders) > 1:
        folders = ", ".join(f"{name}/" for name in sorted(tally.folders) if name)
        outside = tally.folders[""]
        raise UserError(
            f"{uri} has {folders} and also {outside.num_entries} images outside them, such as "
            f"{outside.labelled or outside.unlabelled}; move them into train/, val/ or test/"
        )


def class_names(tally: Tally, source: Source, config: SourceConfig) -> list[str]:
    """Return the class names, indexed by label; empty if the images are unlabelled.

    Names are in the order of the source if it has one, numbers keep their value, and all others are sorted.
    """
    if config.labels == "folder" and tally.num_entries and not source.has_explicit_labels:
        _refuse_unlabelled(tally)
    if config.labels == "none" or not tally.labels:
        return []
    if config.multi_label and not source.has_explicit_labels:
        raise UserError(
            f"multi_label needs labels that are stored, and the {source.kind} has folders; name them by --labels, such "
            "as column:NAME, json:KEY or file:labels.csv"
        )
    if source.has_explicit_labels:
        for folder in tally.folders.values():
            if folder.labelled and folder.unlabelled and not source.allows_missing:
                raise UserError(
                    f"{folder.labelled} has a label and {folder.unlabelled} has none; label all, set labels to none, "
                    "or name the labels (--labels member:cls, for example), which leaves such images unlabelled"
                )
        single = {name for label in tally.labels for name in members(label)}
        return source.classes or numbers_or_names(single, _MAX_NUMBERED_CLASSES)
    if config.labels == "folder":
        return sorted(tally.labels)
    return sorted(tally.labels) if _is_sure(tally) and len(tally.labels) > 1 else []


def numbers_of_labels(tally: Tally, classes: list[str], config: SourceConfig) -> tuple[dict[str, int], list[list[int]]]:
    """Return the number of each label, and with `multi_label` the classes that each number means."""
    number_of = {name: number for number, name in enumerate(classes)}
    if not config.multi_label or not classes:
        return number_of, []
    sets = {label: sorted(number_of[name] for name in members(label) if name in number_of) for label in tally.labels}
    ordered = sorted(map(list, set(map(tuple, sets.values()))))
    position = {tuple(found): number for number, found in enumerate(ordered)}
    return {label: position[tuple(found)] for label, found in sets.items()}, ordered


def log_labels(tally: Tally, source: Source, classes: list[str], config: SourceConfig) -> None:
    """Log which labels are used, or why none are and how to name them."""
    others = source.candidates.advice
    _warn_of_names(classes)
    if classes:
        _warn_of_untrained(tally)
        origin = config.labels if config.label_name else "stored" if source.has_explicit_labels else "folders"
        named = numbers_of_labels(tally, classes, config)[0]
        num = sum(
            count for folder in tally.folders.values() for label, count in folder.labels.items() if label in named
        )
        log.info(
            "labels (%s): %d classes, %d of %d images labelled%s",
            origin, len(classes), num, tally.num_entries, f"; other {others}" if others else "",
        )  # fmt: skip
    elif config.labels != "none":
        log.warning("the images are unlabelled: %s%s", _why_unlabelled(tally, source), f"; {others}" if others else "")


def _warn_of_names(classes: list[str]) -> None:
    """Log classes that are probably none of their own: twins of others, words for a missing label, and several in one.

    Twins differ in letter case, in how Unicode composes their letters, or in zeros before a number.
    """
    seen: dict[str, str] = {}
    missing, several, known = [], [], set(classes)
    for name in classes:
        plain = unicodedata.normalize("NFKC", name).casefold()
        twin = seen.setdefault(plain.lstrip("0") or "0" if plain.isdecimal() else plain, name)
        if twin != name:
            log.warning("classes %r and %r are two; rename one if they are the same", printable(twin), printable(name))
        if plain in _LIKE_MISSING or name == "None":
            missing.append(printable(name))
        parts = [part.strip() for part in re.split(r"[|;]", name)]
        if len(parts) > 1 and not known.isdisjoint(parts):
            several.append(printable(name))
    if missing:
        log.warning("class %r is one like others; if it means a missing label, leave that empty", missing[0])
    if several:
        log.warning(
            "%d classes such as %r look like several in one; --multi-label takes them apart", len(several), several[0]
        )


def _warn_of_untrained(tally: Tally) -> None:
    """Log classes that have images in val or test and none to train on."""
    trained = [folder for name, folder in tally.folders.items() if name in ("", "train")]
    if not any(folder.labels for folder in trained):
        return
    known = {name for folder in trained for label in folder.labels for name in members(label)}
    for split, folder in tally.folders.items():
        unknown = sorted({name for label in folder.labels for name in members(label)} - known)
        if unknown:
            log.warning(
                "%d classes of split %s, such as %r, have no image to train on", len(unknown), split,
                printable(unknown[0]),
            )  # fmt: skip


def _why_unlabelled(tally: Tally, source: Source) -> str:
    if source.has_explicit_labels:
        return "every label is missing"
    if not tally.labels or not source.kind.startswith(("folder", "tar")):
        return "there are no class folders" if source.kind.startswith(("folder", "tar")) else "no label is stored"
    if not _is_sure(tally):
        deep = next(folder.deep for folder in tally.folders.values() if folder.deep)
        return f"not all are one folder deep, such as {printable(deep)}; --labels folder takes the first below a split"
    return f"all are in one folder, {printable(next(iter(tally.labels)))}; --labels folder takes it as a class"


def _is_sure(tally: Tally) -> bool:
    """Return whether every image lies in exactly one folder, which then is its class."""
    return not any(folder.deep for folder in tally.folders.values())


def _refuse_unlabelled(tally: Tally) -> None:
    """Raise UserError if a split has images within and outside class folders, or none within that is trained on."""
    for name, folder in tally.folders.items():
        if folder.unlabelled and (folder.labelled or name in ("", "train")):
            raise UserError(
                f"labels is folder, but {folder.unlabelled} is in no class folder; move it, or set labels to auto"
            )


def consistent(entries: Iterable[Entry], uri: str) -> Iterator[Entry]:
    """Yield sorted entries. Raises UserError for an image that is listed twice in a split, with different labels."""
    last = None
    for entry in entries:
        if last and (entry.name, entry.split) == (last.name, last.split) and entry.label != last.label:
            raise UserError(
                f"{uri} has {printable(entry.name)} twice, as {last.label!r} and as {entry.label!r}; keep one of them"
            )
        last = entry
        yield entry


def listing_digest(entries: Iterable[Entry]) -> str:
    """Return the sha256 over names, places, sizes, splits and labels of all images, in order.

    Versions and faults are excluded: a copy of the source is the same source and gives the same dataset. Bundles are
    included where there are any.
    """
    digest = hashlib.sha256()
    for entry in entries:
        *identity, _version, _fault, bundle = fields_of(entry)
        line = "\0".join(map(str, [*identity, bundle] if bundle else identity))
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cut(entries: Iterable[Entry], tally: Tally, number_of: Mapping[str, int], config: PrepareConfig) -> Iterator[Slice]:
    """Cut the entries into slices of even size: per folder, the fewest slices that respect both limits.

    `number_of` maps labels to what is stored.
    """
    by_content = config.hold_out == "content" and not config.group_by
    holds_out_by_content = by_content and "val" not in tally.folders and config.val_fraction > 0
    number = part = num_bytes = 0
    waiting: list[Entry] = []

    def complete() -> Slice:
        folder = waiting[0].split
        return Slice(
            number=number,
            part=part,
            folder=folder,
            holds_out=folder in ("", "train") and holds_out_by_content,
            entries=waiting,
            labels=[number_of.get(entry.label, -1) for entry in waiting],
        )

    for entry in entries:
        is_new_folder = bool(waiting) and entry.split != waiting[0].split
        if waiting and (
            is_new_folder
            or len(waiting) >= _rows(tally.folders[waiting[0].split], config)
            or num_bytes + _num_read(entry) > config.shard_bytes
        ):
            yield complete()
            number, part, num_bytes, waiting = number + 1, 0 if is_new_folder else part + 1, 0, []
        waiting.append(entry)
        num_bytes += _num_read(entry)
    if waiting:
        yield complete()


def _num_read(entry: Entry) -> int:
    """Return how many bytes reading the entry takes.

    Files that are too large are never read and count as 0. Otherwise one such file would dominate the slice sizes.
    """
    return entry.num_bytes if entry.num_bytes <= MAX_IMAGE_BYTES else 0


def _rows(folder: _Folder, config: PrepareConfig) -> int:
    num_slices = max(-(-folder.num_entries // config.rows_per_shard), -(-folder.num_bytes // config.shard_bytes), 1)
    return -(-folder.num_entries // num_slices)
