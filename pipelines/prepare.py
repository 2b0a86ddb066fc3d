"""A folder of images becomes a prepared dataset: one Ray task a slice of the sorted listing, the manifest last."""

import hashlib
import json
import logging
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.config import PrepareConfig, to_dict
from pipelines.decode import SUFFIXES
from pipelines.manifest import Manifest, Shard, Split, is_prepared, read_manifest, write_manifest
from pipelines.shards import DIGEST_BYTES, PixelSums, Slice, SliceSummary, write_slice
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Of equal images the one in the first of these splits stays, so that nothing that is tested was trained on.
_KEPT_FIRST = {"test": 0, "val": 1, "train": 2}
_MARKER = ".prepare.json"


def prepare(source: str, out: str, config: PrepareConfig) -> Manifest:
    """`out` holds the prepared dataset of the images below `source`; what was prepared alike before is returned as is.

    An image that cannot be read is quarantined with its reason, one that occurs twice is kept once: found = ok +
    quarantined + duplicates. The result depends on the listing, the bytes and the config, not on parallelism or on
    earlier attempts. Raises ValueError where the source has no (readable) image or mixes split folders with others,
    or where `out` holds something else.
    """
    origin, target = open_storage(source), open_storage(out)
    paths, source_digest = _listing(origin)
    identity = {"source_digest": source_digest, "config": to_dict(config)}
    slices, classes = _slices(paths, config)
    if is_prepared(target):
        return _already(target, identity)
    _claim(target, identity)
    summaries = _run(slices, origin, target, config, {})
    duplicates = _duplicates(summaries)
    again = [part for part in slices if part.number in duplicates]
    if again:
        _rewrite(summaries, _run(again, origin, target, config, duplicates), target)
    manifest = _manifest(summaries, classes, identity, len(paths), config)
    if not manifest.num_ok:
        target.delete_tree()
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.quarantine_reasons.items())
        raise ValueError(f"no readable image among the {len(paths)} files of {origin.uri} ({reasons}); check the files")
    if manifest.num_quarantined:
        log.warning("%d of %d images are in quarantine", manifest.num_quarantined, manifest.num_found)
    return write_manifest(target, manifest)


def _listing(origin: Storage) -> tuple[list[str], str]:
    """Image files by name, sorted, and the sha256 of their paths and sizes."""
    if not origin.exists():
        raise FileNotFoundError(f"{origin.uri} does not exist; give a folder of images")
    files = [(path, size) for path, size in origin.list() if path.lower().endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"no image in {origin.uri}; give a folder that has files ending in {' '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    for path, size in files:
        digest.update(f"{path}\0{size}\n".encode("utf-8", "surrogateescape"))
    return [path for path, _ in files], digest.hexdigest()


def _slices(paths: list[str], config: PrepareConfig) -> tuple[list[Slice], list[str]]:
    """The listing in slices of one split folder each, and the names of the classes (none if unlabelled)."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        first = path.split("/", 1)[0]
        by_folder.setdefault(first if first in SPLITS and "/" in path else "", []).append(path)
    if "" in by_folder and len(by_folder) > 1:
        folders = ", ".join(f"{name}/" for name in sorted(by_folder) if name)
        raise ValueError(
            f"the source has {folders} and, beside them, {len(by_folder[''])} images such as {by_folder[''][0]}; "
            "move them into train/, val/ or test/"
        )
    classes = _classes(by_folder, config)
    label_of = {name: label for label, name in enumerate(classes)}
    slices = []
    for folder in sorted(by_folder, key=("", *SPLITS).index):
        holds_out = folder in ("", "train") and "val" not in by_folder and config.val_fraction > 0
        for part, start in enumerate(range(0, len(by_folder[folder]), config.rows_per_shard)):
            chosen = by_folder[folder][start : start + config.rows_per_shard]
            labels = [label_of[_below(path, folder)[0]] if classes else -1 for path in chosen]
            number = len(slices)
            slices.append(
                Slice(number=number, part=part, folder=folder, holds_out=holds_out, paths=chosen, labels=labels)
            )
    return slices, classes


def _classes(by_folder: dict[str, list[str]], config: PrepareConfig) -> list[str]:
    """Sorted names of the first folders below the splits; empty where the images are not labelled."""
    if config.labels == "none":
        return []
    names = set()
    for folder, paths in by_folder.items():
        for path in paths:
            parts = _below(path, folder)
            if config.labels == "auto" and len(parts) != 2:
                return []
            if len(parts) < 2:
                raise ValueError(f"labels is folder, but {path} is in no class folder; move it, or set labels to auto")
            names.add(parts[0])
    return [] if config.labels == "auto" and len(names) < 2 else sorted(names)


def _below(path: str, folder: str) -> list[str]:
    return path.removeprefix(f"{folder}/" if folder else "").split("/")


def _already(target: Storage, identity: dict[str, Any]) -> Manifest:
    manifest = read_manifest(target)
    differing = [key for key, value in identity.items() if getattr(manifest, key) != value]
    if differing:
        what = " and ".join({"source_digest": "source", "config": "config"}[key] for key in differing)
        raise ValueError(f"{target.uri} holds a dataset of another {what}; choose another folder, or empty it")
    return manifest


def _claim(target: Storage, identity: dict[str, Any]) -> None:
    """The folder is ours and holds nothing but our marker. Raises ValueError where somebody else's files are in it."""
    if target.exists(_MARKER):
        try:
            found = json.loads(target.read(_MARKER))
        except ValueError:
            found = None
        if found != identity:
            raise ValueError(
                f"{target.uri} holds the unfinished preparation of another source or config; "
                "choose another folder, or empty it"
            )
        target.delete_tree()
    elif not target.is_empty():
        raise ValueError(f"{target.uri} is not empty and holds no dataset of ours; choose another folder, or empty it")
    target.write(_MARKER, json.dumps(identity, indent=1, sort_keys=True).encode())


def _run(
    slices: Sequence[Slice],
    origin: Storage,
    target: Storage,
    config: PrepareConfig,
    skip: dict[int, frozenset[int]],
) -> dict[int, SliceSummary]:
    """Every slice is written by one Ray task; summaries by slice number."""
    import ray.data
    from ray.exceptions import RayError

    def write(row: dict[str, Any]) -> dict[str, Any]:
        part: Slice = pickle.loads(row["slice"])  # noqa: S301 -- made by this driver a moment ago
        skipped = skip.get(part.number, frozenset())
        return {"summary": pickle.dumps(write_slice(part, origin, target, config, skipped))}

    items = [{"slice": pickle.dumps(part)} for part in slices]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(write)
    dataset.context.enable_progress_bars = False
    try:
        found = [pickle.loads(row["summary"]) for row in dataset.iter_rows()]  # noqa: S301
    except RayError as error:
        raise _user_error(error) from error
    return {summary.number: summary for summary in found}


def _user_error(error: BaseException) -> BaseException:
    """The storage's own error under Ray's wrapping, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) in (OSError, PermissionError, FileNotFoundError, ValueError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error


def _duplicates(summaries: dict[int, SliceSummary]) -> dict[int, frozenset[int]]:
    """By slice, the places of images whose bytes stand already in a split kept first, or earlier in the listing."""
    ordered = [summaries[number] for number in sorted(summaries)]
    digests = np.frombuffer(b"".join(s.digests for s in ordered), dtype=f"V{DIGEST_BYTES}").view(">u8").reshape(-1, 2)
    numbers = np.repeat([s.number for s in ordered], [len(s.positions) for s in ordered])
    places = np.array([place for s in ordered for place in s.positions], dtype=np.int64)
    ranks = np.array([_KEPT_FIRST[split] for s in ordered for split in s.splits], dtype=np.int64)
    # lexsort is stable, so that the listing's order decides among equals.
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    found: dict[int, set[int]] = {}
    for i in order[same].tolist():
        found.setdefault(int(numbers[i]), set()).add(int(places[i]))
    return {number: frozenset(positions) for number, positions in found.items()}


def _rewrite(summaries: dict[int, SliceSummary], again: dict[int, SliceSummary], target: Storage) -> None:
    """The new summaries stand for the old; shards that have no row left are gone."""
    for number, summary in again.items():
        kept = {shard.path for shard in summary.shards}
        for shard in summaries[number].shards:
            if shard.path not in kept:
                target.delete(shard.path)
        summaries[number] = summary


def _manifest(
    summaries: dict[int, SliceSummary],
    classes: list[str],
    identity: dict[str, Any],
    num_found: int,
    config: PrepareConfig,
) -> Manifest:
    ordered = [summaries[number] for number in sorted(summaries)]
    splits = _splits(ordered, config.rows_per_group)
    num_ok = sum(split.num_rows for split in splits.values())
    reasons = sum((Counter(s.reasons) for s in ordered), Counter())
    sizes = {size for s in ordered for size in s.sizes}
    in_colour = any(sums.num_colour for s in ordered for sums in s.sums.values())
    mean, std = _statistics(ordered, "train" if "train" in splits else None, in_colour)
    return Manifest(
        channels=3 if in_colour else 1,
        image_px=sizes.pop() if len(sizes) == 1 else None,
        classes=classes,
        splits=splits,
        num_found=num_found,
        num_ok=num_ok,
        num_quarantined=reasons.total(),
        num_duplicates=num_found - num_ok - reasons.total(),
        quarantine_reasons=dict(sorted(reasons.items())),
        mean=mean,
        std=std,
        **identity,
    )


def _splits(ordered: Sequence[SliceSummary], rows_per_group: int) -> dict[str, Split]:
    splits, first_id = {}, 0
    for name in SPLITS:
        shards = []
        for written in (shard for s in ordered for shard in s.shards if shard.split == name):
            shards.append(
                Shard(
                    path=written.path,
                    num_rows=written.num_rows,
                    num_bytes=written.num_bytes,
                    first_id=first_id,
                    sha256=written.sha256,
                    rows_per_group=rows_per_group,
                )
            )
            first_id += written.num_rows
        if shards:
            rows, size = sum(s.num_rows for s in shards), sum(s.num_bytes for s in shards)
            splits[name] = Split(num_rows=rows, num_bytes=size, shards=shards)
    return splits


def _statistics(ordered: Sequence[SliceSummary], split: str | None, in_colour: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over one split, or over all."""
    total = PixelSums()
    for sums in (sums for s in ordered for name, sums in s.sums.items() if split in (None, name)):
        total.merge(sums)
    mean, std = total.mean_std()
    return (mean * 3, std * 3) if in_colour and len(mean) == 1 else (mean, std)
