"""A sample of real images that the package carries: Fashion-MNIST, 6,000 train and 2,000 test in ten classes, as PNG.

Its licence (MIT, Zalando SE) lies beside it; infra/make_sample.py made it.
"""

import zipfile
from pathlib import Path

_ARCHIVE = Path(__file__).parent / "fashion-mnist-sample.zip"


def unpack(folder: Path) -> Path:
    """The sample's images are in `folder`, as train/<class>/NNNNN.png and test/<class>/NNNNN.png; returns the folder.

    Files that are already whole are left alone, others written again; a file appears with all its bytes or not at all.
    """
    with zipfile.ZipFile(_ARCHIVE) as archive:
        for member in archive.infolist():
            path = folder / member.filename
            if not path.is_file() or path.stat().st_size != member.file_size:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(archive.read(member))
                temporary.replace(path)
    return folder
