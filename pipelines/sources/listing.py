"""List a folder: images by suffix or content, tar files and files of rows; everything else is counted by reason."""

from collections.abc import Iterator
from itertools import chain

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.images.decode import SUFFIXES
from pipelines.sources import lance_tables, lmdb_tables, mds_tables
from pipelines.sources.candidates import Candidates
from pipelines.sources.content import images_among
from pipelines.sources.entry import SPLIT_WORDS
from pipelines.sources.masks import folders_of_pictures, stem_of
from pipelines.sources.passed_over import PassedOver, is_document, kind_of_name
from pipelines.sources.rows import PARQUET, kind_of_rows
from pipelines.storage import ListedFile, Storage, stays_inside
from pipelines.storage.listing import FOLDER_LINK

COMPRESSED = (".tfrecord.gz", ".tfrecords.gz", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
# To reach one image, every task would have to unpack everything before it.
UNPACK = "which cannot be read in place; unpack it, or convert it to .tar (gunzip does so with a .tar.gz)"
_KINDS = {"images": SUFFIXES, "tar files": (".tar",)}
_CHUNK = 256
_HEAD_BYTES = 4096
# Files of one suffix that are looked up beside images, one by one; the rest are like these.
_MAX_LOOKUPS = 64


class Listing:
    """The files of a folder, listed once."""

    def __init__(self, storage: Storage, config: SourceConfig) -> None:
        self.passed_over, self.candidates = PassedOver(), Candidates()
        self._storage, self._config = storage, config
        self._archive = ""
        self._lookups: dict[str, list[bool]] = {}

    def split(self) -> tuple[str, Iterator[ListedFile]]:
        """Return the kind of the folder, images, tar files or files of rows, and its files of this kind.

        Raises UserError if it has none, or files of two kinds, here or while the files are read.
        """
        archives: list[tuple[ListedFile, str]] = []
        files = self._known()
        for found, kind in files:
            if kind == "images":
                rest = chain([(found, kind)], files)
                first = archives[0] if archives else (found, kind)
                return first[1], self._only(*first, chain(archives, rest))
            archives.append((found, kind))
        if not archives:
            self._refuse_empty()
        archives = self._without_copies(self._without_tables_of_tars(archives))
        found, kind = archives[0]
        return kind, self._only(found, kind, iter(archives))

    def _refuse_empty(self) -> None:
        uri = self._storage.uri
        if self._archive:
            raise UserError(f"{self._storage.join(self._archive)} is a compressed archive, {UNPACK}")
        there = f" (it has {self.passed_over.shown()})" if self.passed_over.groups else ""
        raise UserError(
            f"no image in {uri}{there}; give a folder that has files ending in {' '.join(SUFFIXES)}, .tar or .parquet"
        )

    def _without_tables_of_tars(self, archives: list[tuple[ListedFile, str]]) -> list[tuple[ListedFile, str]]:
        """Pass over a Parquet file beside a tar file of the same name: img2dataset's metadata."""
        tars = {stem_of(found.path) for found, kind in archives if kind == "tar files"}
        kept = []
        for found, kind in archives:
            if kind == PARQUET and stem_of(found.path) in tars:
                self.passed_over.add("tables beside tar files", found.path, beside=True)
            else:
                kept.append((found, kind))
        return kept

    def _without_copies(self, archives: list[tuple[ListedFile, str]]) -> list[tuple[ListedFile, str]]:
        """Pass over a compressed shard of MDS beside the same one unpacked."""
        there, kept = {found.path for found, _ in archives}, []
        for found, kind in archives:
            if mds_tables.COMPRESSED.fullmatch(found.path.lower()) and found.path.rpartition(".")[0] in there:
                self.passed_over.add("compressed copies of shards", found.path, beside=True)
            else:
                kept.append((found, kind))
        return kept

    def _only(self, first: ListedFile, kind: str, files: Iterator[tuple[ListedFile, str]]) -> Iterator[ListedFile]:
        uri = self._storage.uri
        for found, other in files:
            if other != kind:
                raise UserError(
                    f"{uri} has {kind} such as {first.path} and {other} such as {found.path}; prepare one kind at a "
                    "time"
                )
            if found.fault and kind != "images":
                where = self._storage.join(found.path)
                raise UserError(f"{where} cannot be read ({found.fault}); replace it by the file itself")
            yield found

    def _known(self) -> Iterator[tuple[ListedFile, str]]:
        """Yield files of known kinds with their kind; count the others."""
        unknown: list[ListedFile] = []
        datasets: set[str] = set()
        for found in self._storage.files():
            lower = found.path.lower()
            if inner := lance_tables.FOLDER.fullmatch(found.path):
                if inner[1] not in datasets:
                    version = lance_tables.version_of(self._storage, inner[1])
                    yield ListedFile(inner[1], 0, version), "Lance datasets"
                datasets.add(inner[1])
                continue
            if found.fault == FOLDER_LINK:
                self.passed_over.add("links to folders", found.path)
            elif lower.endswith(COMPRESSED):
                self._archive = found.path
                self.passed_over.add("compressed archives", found.path)
            elif kind := _kind_of(lower):
                yield found, kind
            elif lmdb_tables.LOCK.fullmatch(lower):
                self.passed_over.add("locks of LMDB", found.path, beside=True)
            else:
                unknown.append(found)
            if len(unknown) == _CHUNK:
                yield from self._images_by_content(unknown)
                unknown = []
        yield from self._images_by_content(unknown)

    def _images_by_content(self, files: list[ListedFile]) -> Iterator[tuple[ListedFile, str]]:
        for found, is_image in zip(files, images_among(self._storage, files)):
            if is_image:
                yield found, "images"
            elif not self._is_part(found):
                self._pass_over(found)

    def _is_part(self, found: ListedFile) -> bool:
        """Return whether the file is read although it holds no images: a table of labels, or an index of MDS."""
        top, _, below = found.path.partition("/")
        if self._config.label_kind == "file" and self._config.label_name in (
            found.path, below if top.lower() in SPLIT_WORDS else None
        ):  # fmt: skip
            return True
        is_index = found.path.rpartition("/")[2] == mds_tables.INDEX and not found.fault
        return is_index and b'"mds"' in self._storage.read_range(found.path, 0, _HEAD_BYTES)

    def _pass_over(self, found: ListedFile) -> None:
        path, suffix = found.path, found.path.rpartition("/")[2].partition(".")[2]
        if found.fault:
            self.passed_over.add(found.fault, path)
            return
        last = suffix.rpartition(".")[2].lower()
        is_beside = is_document(path) or self._is_beside(path, last)
        if is_beside:
            self.candidates.note_member(suffix, path)
        if self.candidates.wants(last) and (last != "json" or is_beside):
            head = self._storage.read_range(path, 0, _HEAD_BYTES * (16 if last == "json" else 1))
            is_beside |= self.candidates.look(path, last, head)
        self.passed_over.add(kind_of_name(path), path, beside=is_beside)

    def _is_beside(self, path: str, suffix: str) -> bool:
        """Return whether an image, or a tar file, has the same name but for the suffix.

        It may lie in a folder images/ beside the file's labels/.
        """
        known = self._lookups.setdefault(suffix, [])
        if not stays_inside(path):
            return False
        if len(known) >= _MAX_LOOKUPS:
            return all(known)
        folder, _, name = path.rpartition("/")
        stems = {name.partition(".")[0], name.rpartition(".")[0], name.partition(".")[0].removesuffix("_stats")} - {""}
        ends = (*SUFFIXES, *(s.upper() for s in SUFFIXES), ".tar")
        folders = [f"{folder}/" if folder else "", *folders_of_pictures(folder)]
        names = (f"{place}{stem}{end}" for place in folders for stem in stems for end in ends)
        known.append(any(map(self._storage.exists, names)))
        return known[-1]


def _kind_of(lower: str) -> str:
    """Return the kind of a file by its name in lower case; empty if it is none that is known."""
    return next((kind for kind, suffixes in _KINDS.items() if lower.endswith(suffixes)), "") or kind_of_rows(lower)
