"""Image files, nested as they like, one folder a class, with train/, val/ and test/ at the top or without."""

from collections.abc import Iterable, Iterator

from pipelines.sources.entry import Entry, by_folder
from pipelines.sources.reading import Place
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile


class Folder:
    """Every file is an image."""

    has_explicit_labels = False

    def __init__(self, storage: Storage, files: Iterable[ListedFile]) -> None:
        self.place = Place(storage)
        self.classes: list[str] = []
        self._files = files

    def entries(self) -> Iterator[Entry]:
        """Once: the listing is not held."""
        for path, size, version, fault in self._files:
            split, label, is_flat = by_folder(path)
            yield Entry(path, path, -1, -1, -1, size, split, label, is_flat, version, fault)
