"""Tar files of images in WebDataset's layout, `x.jpg` with `x.cls`, or one folder per class.

Headers are read once, when listing. After that an image is a byte range of its file. A sample is all members with the
same key: the path up to the first dot of the name, as WebDataset has it, or up to the last one if asked for.
"""

import io
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.images.decode import SUFFIXES
from pipelines.sources.candidates import Candidates, refuse_labels
from pipelines.sources.content import HEAD_BYTES, is_image, is_never_read
from pipelines.sources.entry import Entry, by_folder
from pipelines.sources.label_file import LabelFile
from pipelines.sources.labels import LABEL_MEMBERS, class_in_json, class_of_member
from pipelines.sources.masks import MaskFolders, stem_of
from pipelines.sources.passed_over import PassedOver, kind_of_name
from pipelines.sources.reading import Place
from pipelines.sources.samples import Samples, key_of, suffix_of
from pipelines.sources.splits import refuse_inner_split, splits_by_name
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile

_INDEX_THREADS = 4
# In tars of small images, one request of this size covers many headers.
_READ_AHEAD_BYTES = 2**20
_MAX_LABEL_BYTES = 2**20
# x.json beside x.jpg, or x.jpg.json.
_JSON_MEMBERS = ("json", *(f"{end}.json" for end in ("jpg", "jpeg", "png", "webp", "tif", "tiff")))
_MAX_EXTENSION_BYTES = 2**20
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


class Tars:
    """Images in tar files. A file whose name ends in a split but for its number (train-000.tar) belongs to it."""

    kind = "tar files"

    def __init__(
        self, storage: Storage, files: Sequence[ListedFile], config: SourceConfig, passed: PassedOver | None = None
    ) -> None:
        refuse_labels(config, self.kind, ("auto", "folder", "none", "json", "member", "file"))
        self.place = Place(storage)
        self.classes: list[str] = []
        self.has_explicit_labels = config.label_kind in ("json", "member", "file")
        self.allows_missing = self.has_explicit_labels
        self.passed_over, self.candidates = passed or PassedOver(), Candidates()
        self._storage, self._files, self._config = storage, files, config
        self._splits = splits_by_name((found.path for found in files), storage.uri)
        self._label_file = LabelFile(storage, config) if config.label_kind == "file" else None
        self._mask_folders = MaskFolders(lambda stem: False)

    def entries(self) -> Iterator[Entry]:
        is_any_labelled, by_folder_alone = False, ""
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            for start in range(0, len(self._files), _INDEX_THREADS):
                for index in pool.map(self._index, self._files[start : start + _INDEX_THREADS]):
                    self.has_explicit_labels |= bool(index.labels)
                    self.passed_over.merge(index.passed_over)
                    self.candidates.merge(index.candidates)
                    if self._config.image_member != "any":
                        index.refuse_mask_folders(self._storage.join(index.found.path))
                    for image in index.images:
                        entry = self._entry(index, image)
                        is_any_labelled |= bool(entry.label)
                        by_folder_alone = by_folder_alone or ("" if index.labels or not entry.label else entry.name)
                        yield entry
        if self._label_file:
            self._label_file.report(self.passed_over)
        elif self.has_explicit_labels and by_folder_alone and not self.allows_missing:
            raise UserError(
                f"some tar files of {self._storage.uri} have labels beside their images, and the one of "
                f"{by_folder_alone} has none; label all, or use --labels folder or none"
            )
        elif self.allows_missing and not is_any_labelled:
            raise self.candidates.none_by(self._config.labels, self._storage.uri)
        if self._config.image_member != "any":
            self._mask_folders.refuse_pairs(self._storage.uri)

    def _index(self, found: ListedFile) -> "_Index":
        """Read the headers and labels of one tar file."""
        uri, config = self._storage.join(found.path), self._config
        samples, candidates = Samples(uri, config), Candidates()
        images: list[_Image] = []
        labels: dict[str, list[tuple[str, str | None]]] = {}
        with self._storage.open_input(found.path) as file, io.BufferedReader(file, _READ_AHEAD_BYTES) as buffered:
            for member, tar in _members(buffered, uri):
                name = member.name.removeprefix("./")
                suffix = suffix_of(name, config)
                if name.lower().endswith(SUFFIXES) or (member.isreg() and _has_image(tar, member)):
                    images.append(_image(member))
                    continue
                samples.note_other(name)
                if self._is_label(suffix):
                    label = self._label(tar, member, suffix, uri)
                    labels.setdefault(suffix, []).append((name, label))
                elif (
                    suffix == "json" and candidates.wants(suffix) and member.isreg() and member.size <= _MAX_LABEL_BYTES
                ):
                    candidates.look(f"{found.path}/{name}", suffix, _content(tar, member))
        chosen, passed = samples.choose([image.name.removeprefix("./") for image in images])
        taken = [image for image, is_taken in zip(images, chosen) if is_taken]
        linked = {image.name: image for image in images if not image.link} if any(i.link for i in images) else {}
        followed = [image if not image.link else image.at(linked.get(image.link)) for image in taken]
        # A text by another name than .cls is the label only if every one of them is a class.
        usable = [
            suffix for suffix in self._label_suffixes if suffix in labels and None not in dict(labels[suffix]).values()
        ]
        used = usable[0] if usable else ""
        if not used:
            self._refuse_dotted_labels(samples.others, uri)
        keys = {key_of(image.name.removeprefix("./"), config) for image in taken if samples.others}
        for name in samples.others:
            suffix, is_beside = suffix_of(name, config), key_of(name, config) in keys
            if suffix == used and is_beside:
                continue
            reason = f"members *.{suffix} beside images" if is_beside else kind_of_name(name)
            passed.add(reason, f"{found.path}/{name}", beside=is_beside)
            if is_beside:
                candidates.note_member(suffix, f"{found.path}/{name}")
        return _Index(found, followed, self._by_key(labels.get(used, []), uri), passed, candidates)

    @property
    def _label_suffixes(self) -> Sequence[str]:
        kind, name = self._config.label_kind, self._config.label_name
        return {"auto": LABEL_MEMBERS, "member": (name.lower().lstrip("."),), "json": _JSON_MEMBERS}.get(kind, ())

    def _is_label(self, suffix: str) -> bool:
        return suffix in self._label_suffixes

    def _label(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, uri: str) -> str | None:
        """Return the label in a member; None for what is no class, if its name alone suggested one."""
        content = _content(tar, member) if member.isreg() and 0 < member.size <= _MAX_LABEL_BYTES else b""
        if self._config.label_kind == "json":
            return class_in_json(
                content, self._config.label_name, f"{uri}: {member.name}", multi_label=self._config.multi_label
            )
        try:
            return class_of_member(content, f"{uri}: {member.name}", multi_label=self._config.multi_label)
        except UserError:
            if self._config.label_kind == "member" or suffix.startswith("cls"):
                raise
            return None

    def _refuse_dotted_labels(self, others: Sequence[str], uri: str) -> None:
        """Raise UserError if no member is a label, but some would be if the key ended at the last dot."""
        ends = tuple(f".{suffix}" for suffix in LABEL_MEMBERS)
        name = next((name for name in others if suffix_of(name, self._config).endswith(ends)), "")
        if name and self._config.label_kind == "auto":
            raise UserError(
                f"{uri} has {name}, which is no label of the key {key_of(name, self._config)}, since a key ends at the "
                "first dot: use --sample-key last-dot if names have dots, --labels "
                f"member:{suffix_of(name, self._config)} if it is a member, or --labels none"
            )

    def _by_key(self, named: list[tuple[str, str | None]], uri: str) -> dict[str, str]:
        """Return the labels of the members by key. Raises UserError if two have the same key."""
        labels: dict[str, str] = {}
        for name, label in named:
            key = key_of(name, self._config)
            if key in labels:
                raise UserError(
                    f"{uri} has several labels for the key {key}, which ends at the "
                    f"{self._config.sample_key.replace('-', ' ')}, such as {name}; if names have dots use --sample-key "
                    "last-dot, else keep one, or use --labels none"
                )
            labels[key] = label or ""
        return labels

    def _entry(self, index: "_Index", image: "_Image") -> Entry:
        found, name = index.found, image.name.removeprefix("./")
        split, label, is_flat = by_folder(name)
        by_file = self._splits.get(found.path, "")
        if split and by_file and split != by_file:
            raise UserError(
                f"{found.path} of {self._storage.uri} is of split {by_file} by its name, and its {name} of {split}; "
                "rename one of them"
            )
        refuse_inner_split(name, self._storage.join(found.path))
        self._mask_folders.note(name)
        if self._label_file:
            label, listed = self._label_file.find(name)
            if listed and (by_file or split) not in ("", listed):
                raise UserError(
                    f"{name} of {found.path} is in split {by_file or split}, and the label file says {listed}"
                )
            split = split or listed
        elif index.labels or self.allows_missing:
            label = index.labels.get(key_of(name, self._config), "")
        return Entry(
            name=f"{found.path}/{name}",
            path=found.path,
            offset=image.offset,
            num_bytes=image.num_bytes,
            split=by_file or split,
            label=label,
            is_flat=bool(label) if self.has_explicit_labels else is_flat,
            version=found.version,
            fault=image.fault,
        )


class _Index(NamedTuple):
    """What is known of a tar file once its headers have been read."""

    found: ListedFile
    images: "list[_Image]"
    labels: dict[str, str]
    """Labels by key."""
    passed_over: PassedOver
    candidates: Candidates

    def refuse_mask_folders(self, uri: str) -> None:
        """Raise UserError if the file has a folder of masks beside their images, or within these."""
        names = [image.name.removeprefix("./") for image in self.images]
        stems: set[str] = set()

        def exists(stem: str) -> bool:
            if not stems:
                stems.update(map(stem_of, names))
            return stem in stems

        folders = MaskFolders(exists)
        for name in names:
            folders.note(name)
        folders.refuse_pairs(uri)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _has_image(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    if not member.size or is_never_read(member.name):
        return False
    file = tar.extractfile(member)
    return file is not None and is_image(file.read(HEAD_BYTES))


class _Image(NamedTuple):
    """The part of a member that is kept: tarfile's own objects are many times larger."""

    name: str
    offset: int
    num_bytes: int
    link: str = ""
    """Name of the member that it links to; empty for a file."""
    fault: str = ""

    def at(self, other: "_Image | None") -> "_Image":
        """Return this image with the byte range of the linked one, or with a fault if that does not exist."""
        if other is None:
            return self._replace(fault="broken link")
        return self._replace(offset=other.offset, num_bytes=other.num_bytes, fault=other.fault)


def _image(member: tarfile.TarInfo) -> _Image:
    link = member.linkname if member.islnk() else ""
    if member.issym():
        link = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    is_file = member.isreg() and not member.issparse()
    fault = "" if is_file or link else "no regular file"
    return _Image(member.name, member.offset_data, member.size if is_file else 0, link, fault)


class _Header(tarfile.TarInfo):
    """A header with a limit on its extensions, which tarfile reads into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError("an extended header is too large")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue] -- tarfile's own hook


def _members(file: io.BufferedReader, uri: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield all visible members of an archive except folders. Raises UserError if it is truncated or damaged."""
    damaged = f"{uri} is truncated or damaged; copy it again"
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps every member in memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                hidden = any(part.startswith(".") and part.strip(".") for part in member.name.split("/"))
                if not member.isdir() and not hidden:
                    yield member, tar
            end = tar.offset
    except tarfile.TarError:
        raise UserError(damaged) from None
    # tarfile stops silently at a damaged header, and at the end of the first of several archives in one file. A
    # complete archive ends in zeros.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block or block.strip(b"\0"):
        raise UserError(damaged)
    while rest := file.read(_READ_AHEAD_BYTES):
        if rest.strip(b"\0"):
            raise UserError(
                f"{uri} continues after its end, as when tar files are joined by cat: only the first would be read; "
                "give the files one by one, or unpack it with tar -xif"
            )
