"""Image files in folders of any depth: one folder per class, optionally within train/, val/ and test/."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.images.decode import SUFFIXES
from pipelines.sources.candidates import Candidates, refuse_labels
from pipelines.sources.entry import SPLIT_WORDS, Entry, by_folder
from pipelines.sources.label_file import LabelFile
from pipelines.sources.labels import class_in_json, class_of_member
from pipelines.sources.masks import MaskFolders, Twins, picture_stems, stem_of
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.reading import Place
from pipelines.sources.splits import LIKE_A_SPLIT, refuse_inner_split
from pipelines.storage import Storage, stays_inside
from pipelines.storage.listing import ListedFile

_ANY_SUFFIX = (*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
_THREADS = 16
_CHUNK = 256
_MAX_LOOKUPS = 64
_MAX_SIDECAR_BYTES = 2**20


class Folder:
    """A source in which every file is an image."""

    kind = "folder of images"

    def __init__(
        self,
        storage: Storage,
        files: Iterable[ListedFile],
        config: SourceConfig,
        passed: PassedOver,
        candidates: Candidates,
    ) -> None:
        refuse_labels(config, "a folder of images", ("auto", "folder", "none", "json", "member", "file"))
        self.place = Place(storage)
        self.classes: list[str] = []
        self.has_explicit_labels = config.label_kind in ("json", "member", "file")
        self.allows_missing = True
        self.passed_over, self.candidates = passed, candidates
        self._storage, self._files, self._config = storage, files, config
        self._label_file = LabelFile(storage, config) if config.label_kind == "file" else None
        self._mask_folders, self._twins = MaskFolders(self._exists), Twins(storage)
        self._lookups: dict[str, list[bool]] = {}

    def entries(self) -> Iterator[Entry]:
        """Yield every image. Can be called once, because the listing is not kept."""
        entries = self._by_folder()
        if self._label_file:
            yield from self._by_file(self._label_file, entries)
        elif self.has_explicit_labels:
            yield from self._by_sidecar(entries)
        else:
            yield from entries
        if self._config.image_member != "any":
            self._mask_folders.refuse_pairs(self._storage.uri)
            self._twins.refuse()

    def _by_folder(self) -> Iterator[Entry]:
        num_taken, checked = 0, None
        for path, size, version, fault in self._files:
            if not self._is_wanted(path):
                continue
            num_taken += 1
            if not self._config.image_member:
                self._twins.note(path)
            self._mask_folders.note(path)
            # Neighbours in a listing lie in the same folder, which is checked once.
            if (folder := path.rpartition("/")[0]) != checked:
                checked = folder
                self._refuse_unclear_split(path)
            split, label, is_flat = by_folder(path)
            yield Entry(path, path, -1, -1, -1, size, split, label, is_flat, version, fault)
        if not num_taken and self._config.image_member:
            raise UserError(f"no image of {self._storage.uri} ends in {self._config.image_member}; try another end")

    def _is_wanted(self, path: str) -> bool:
        """Return whether the image is to be taken; count it if not."""
        member = self._config.image_member
        if member not in ("", "any") and not path.lower().endswith(member.lower()):
            self.passed_over.add(f"images that do not end in {member}", path, beside=True)
            return False
        stems = picture_stems(path) if not member and stays_inside(path) else []
        if stems and self._has_image(path, stems):
            self.passed_over.add("masks beside images (--image-member any takes them)", path, beside=True)
            return False
        return True

    def _has_image(self, path: str, stems: Sequence[str]) -> bool:
        """Return whether the image of a mask is there, by the first of these names in any format, or another in its.

        In a store, where that costs requests, names with the same end are taken to be alike once many were.
        """
        end = path[len(stem_of(path)) :]
        known = self._lookups.setdefault(path[len(stems[0]) :].lower() if path.startswith(stems[0]) else end, [])
        if not self._storage.is_local and len(known) >= _MAX_LOOKUPS and len(set(known)) == 1:
            return known[0]
        found = self._exists(stems[0]) or any(self._storage.exists(stem + end) for stem in stems[1:])
        if len(known) < _MAX_LOOKUPS:
            known.append(found)
        return found

    def _exists(self, stem: str) -> bool:
        return stays_inside(stem) and any(self._storage.exists(stem + suffix) for suffix in _ANY_SUFFIX)

    def _refuse_unclear_split(self, path: str) -> None:
        top, slash, _ = path.partition("/")
        refuse_inner_split(path, self._storage.uri)
        if slash and self._config.labels != "folder" and (found := LIKE_A_SPLIT.fullmatch(top)):
            raise UserError(
                f"{self._storage.uri} has a folder {top}/, which is no split and looks like one; name it "
                f"{SPLIT_WORDS[found[1].lower()]}/, move it away, or use --labels folder if it is a class"
            )

    def _by_file(self, labels: LabelFile, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            label, split = labels.find(entry.path)
            if split and entry.split and split != entry.split:
                raise UserError(f"{entry.path} is in split {entry.split}, and the label file says {split}; keep one")
            yield _labelled(entry, label, split or entry.split)
        labels.report(self.passed_over)

    def _by_sidecar(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        num_labelled, entries = 0, iter(entries)
        with ThreadPoolExecutor(_THREADS) as pool:
            while chunk := list(islice(entries, _CHUNK)):
                for entry, label in zip(chunk, pool.map(self._sidecar, chunk)):
                    num_labelled += bool(label)
                    yield _labelled(entry, label, entry.split)
        if not num_labelled:
            raise self.candidates.none_by(self._config.labels, self._storage.uri)

    def _sidecar(self, entry: Entry) -> str:
        """Return the label in the file beside an image; empty if there is none."""
        name = self._config.label_name
        end = "json" if self._config.label_kind == "json" else name.lstrip(".")
        for path in (f"{stem_of(entry.path)}.{end}", f"{entry.path}.{end}"):
            with suppress(FileNotFoundError):
                content = self._storage.read(path, _MAX_SIDECAR_BYTES)
                break
        else:
            return ""
        where, multi_label = self._storage.join(path), self._config.multi_label
        if self._config.label_kind == "json":
            return class_in_json(content, name, where, multi_label=multi_label)
        return class_of_member(content, where, multi_label=multi_label)


def _labelled(entry: Entry, label: str, split: str) -> Entry:
    return dataclasses.replace(entry, label=label, split=split, is_flat=bool(label))
