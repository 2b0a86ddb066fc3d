"""What the ILSVRC2012 development kit says of the validation images: a class number a line, and meta.mat, which says
what synset a number is (they do not follow the order of synsets)."""

import io

from mae_core.errors import UserError
from pipelines.storage import Storage

_FOLDERS = ("", "ILSVRC2012_devkit_t12/data/")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_MAX_BYTES = 4 * 2**20


def validation_synsets(storage: Storage) -> list[str]:
    """The synset of each validation image, by their numbers from 1 on; empty where the kit is not there.

    Raises UserError where it is not whole.
    """
    folder = next((name for name in _FOLDERS if storage.exists(name + _TRUTH)), None)
    if folder is None:
        return []
    truth = storage.join(folder + _TRUTH)
    if not storage.exists(folder + _META):
        raise UserError(
            f"{truth} numbers the classes as the development kit does; copy its {_META} beside it, or take "
            "LOC_val_solution.csv instead"
        )
    synsets = _synsets(storage.read(folder + _META, _MAX_BYTES), storage.join(folder + _META))
    try:
        return [synsets[int(number)] for number in storage.read(folder + _TRUTH, _MAX_BYTES).split()]
    except (ValueError, KeyError) as error:
        raise UserError(f"{truth} names class {error}, which {_META} has not; copy both again") from None


def _synsets(content: bytes, uri: str) -> dict[int, str]:
    """Synset by number. MATLAB's format holds numbers and texts; nothing of it is run."""
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(content), variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception:  # whatever a parser of bytes may raise
        raise UserError(
            f"{uri} is not the development kit's {_META}; copy it again, or take LOC_val_solution.csv"
        ) from None
