"""Labels of ImageNet's validation images from the ILSVRC2012 development kit.

The kit has one class number per line, and meta.mat, which maps numbers to synsets (they are not in synset order).
"""

import io

from mae_core.errors import UserError
from pipelines.storage import Storage

_FOLDERS = ("", "ILSVRC2012_devkit_t12/data/")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_MAX_BYTES = 4 * 2**20


def validation_synsets(storage: Storage) -> list[str]:
    """Return the synset of each validation image, in order of their numbers from 1; empty if there is no kit.

    Raises UserError if the kit is incomplete.
    """
    folder = next((name for name in _FOLDERS if storage.exists(name + _TRUTH)), None)
    if folder is None:
        return []
    truth = storage.join(folder + _TRUTH)
    if not storage.exists(folder + _META):
        raise UserError(
            f"{truth} has the class numbers of the development kit; copy the kit's {_META} next to it, or use "
            "LOC_val_solution.csv instead"
        )
    synsets = _synsets(storage.read(folder + _META, _MAX_BYTES), storage.join(folder + _META))
    try:
        return [synsets[int(number)] for number in storage.read(folder + _TRUTH, _MAX_BYTES).split()]
    except (ValueError, KeyError) as error:
        raise UserError(f"{truth} has class {error}, which {_META} does not define; copy both again") from None


def _synsets(content: bytes, uri: str) -> dict[int, str]:
    """Return the synset of each class number.

    MATLAB's format is parsed as numbers and text; nothing in it is executed.
    """
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(content), variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception:  # the parser may raise anything on malformed bytes
        raise UserError(
            f"{uri} is not the development kit's {_META}; copy it again, or use LOC_val_solution.csv"
        ) from None
