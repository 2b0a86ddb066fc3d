"""ImageNet-1K as distributed by Kaggle: synset folders for training, a flat validation folder with its ground truth.

LOC_synset_mapping.txt names the classes (`n01440764 tench, Tinca tinca`). The class of a validation image is in
LOC_val_solution.csv (`ILSVRC2012_val_00048981,n03995372 85 1 499 272`), or else in the development kit. Test images
have no class.
"""

import csv
import io
from collections.abc import Iterator

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.images.decode import SUFFIXES
from pipelines.sources.candidates import Candidates, refuse_labels
from pipelines.sources.devkit import validation_synsets
from pipelines.sources.entry import SPLITS, Entry
from pipelines.sources.passed_over import PassedOver, kind_of_name
from pipelines.sources.reading import Place
from pipelines.storage import Storage

SYNSETS = "LOC_synset_mapping.txt"
_SOLUTION = "LOC_val_solution.csv"
_IMAGES = "ILSVRC/Data/CLS-LOC"
# What the names and labels are read from, the development kit included.
_USED = (SYNSETS, _SOLUTION, "ILSVRC2012_", "meta.mat")


class ImageNet:
    """The competition's folder, unpacked."""

    kind = "ImageNet-1K as Kaggle distributes it"
    has_explicit_labels = True
    allows_missing = False

    def __init__(self, storage: Storage, config: SourceConfig) -> None:
        refuse_labels(config, self.kind, ("auto", "folder", "none"))
        self.place = Place(storage)
        self.passed_over, self.candidates = PassedOver(), Candidates()
        self._storage = storage
        self._names = self._read_names()
        self.classes = list(self._names.values())

    def entries(self) -> Iterator[Entry]:
        root = _IMAGES if self._storage.exists(_IMAGES) else ""
        solution: dict[str, str] | None = None
        for path, size, version, _ in self._storage.files():
            if root and not path.startswith(f"{root}/"):
                if not path.startswith(_USED):
                    self.passed_over.add(f"files outside {root}/", path, beside=True)
                continue
            if not path.lower().endswith(SUFFIXES):
                self.passed_over.add(kind_of_name(path), path)
                continue
            parts = path.removeprefix(f"{root}/").split("/")
            split = parts[0] if parts[0] in SPLITS and len(parts) > 1 else ""
            if not split:
                raise UserError(f"{self._storage.join(path)} is not in train/, val/ or test/; move or remove it")
            synset = parts[1] if len(parts) > 2 else ""
            if split == "val" and not synset:
                solution = self._read_solution() if solution is None else solution
                synset = solution.get(parts[1].split(".")[0], "")
            if split != "test" and synset not in self._names:
                file = "the ground truth" if split == "val" and len(parts) == 2 else SYNSETS
                raise UserError(f"{file} has no class for {path} (synset {synset or 'unknown'}); copy it again")
            label = self._names.get(synset, "")
            yield Entry(
                name=path, path=path, num_bytes=size, split=split, label=label, is_flat=bool(label), version=version
            )

    def _read_names(self) -> dict[str, str]:
        """Return the name of each class by synset, in the file's order, which is the order of the standard labels."""
        names = {}
        for number, line in enumerate(self._text(SYNSETS).splitlines(), 1):
            synset, _, words = line.strip().partition(" ")
            if not synset:
                continue
            if not words or synset in names:
                raise UserError(
                    f"line {number} of {self._storage.join(SYNSETS)} is not `synset names`, or repeats a synset; "
                    "copy it again"
                )
            names[synset] = f"{synset} {words.strip()}"
        if not names:
            raise UserError(f"{self._storage.join(SYNSETS)} is empty; copy it again")
        return names

    def _read_solution(self) -> dict[str, str]:
        """Return the synset of each validation image by the image's name."""
        if not self._storage.exists(_SOLUTION):
            synsets = validation_synsets(self._storage)
            if not synsets:
                raise UserError(
                    f"the images of val/ are not in synset folders, and {self._storage.join(_SOLUTION)} is missing; "
                    "copy it there"
                )
            return {f"ILSVRC2012_val_{number:08d}": synset for number, synset in enumerate(synsets, 1)}
        rows = csv.DictReader(io.StringIO(self._text(_SOLUTION)))
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise UserError(f"{self._storage.join(_SOLUTION)} has no columns ImageId,PredictionString; copy it again")
        return {row["ImageId"]: (row["PredictionString"] or "").split(" ")[0] for row in rows}

    def _text(self, path: str) -> str:
        try:
            return self._storage.read(path).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self._storage.join(path)} is not UTF-8 text; copy it again") from None
