"""Image files in folders of any depth: one folder per class, optionally within train/, val/ and test/."""

from collections.abc import Iterable, Iterator

from pipelines.sources.entry import Entry, by_folder
from pipelines.sources.reading import Place
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile


class Folder:
    """A source in which every file is an image."""

    has_explicit_labels = False

    def __init__(self, storage: Storage, files: Iterable[ListedFile]) -> None:
        self.place = Place(storage)
        self.classes: list[str] = []
        self._files = files

    def entries(self) -> Iterator[Entry]:
        """Yield every image. Can be called once, because the listing is not kept."""
        for path, size, version, fault in self._files:
            split, label, is_flat = by_folder(path)
            yield Entry(path, path, -1, -1, -1, size, split, label, is_flat, version, fault)
