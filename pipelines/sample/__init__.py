"""A sample of real images that ships with the package: Fashion-MNIST, 6,000 train and 2,000 test in ten classes, PNG.

Its licence (MIT, Zalando SE) is in this folder. infra/make_sample.py built it.
"""

import zipfile
from pathlib import Path

_ARCHIVE = Path(__file__).parent / "fashion-mnist-sample.zip"


def unpack(folder: Path) -> Path:
    """Write the sample's images to train/<class>/NNNNN.png and test/<class>/NNNNN.png in `folder`; return the folder.

    Complete files are kept and others rewritten. Each file appears complete or not at all.
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
