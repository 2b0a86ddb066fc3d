"""Regenerate the bundled sample, pipelines/sample/fashion-mnist-sample.zip, and its licence, reproducibly.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR
    python infra/make_sample.py DIR/usr/share/datasets/fashion-mnist

It holds the first 600 training and 200 test images of each of the ten classes, in the order of the data set.
"""

import gzip
import io
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parent.parent / "pipelines" / "sample"
NUM_PER_CLASS = {"train": 600, "test": 200}
FILES = {"train": "train", "test": "t10k"}
# Names of labels 0 to 9 after the data set's README, written as folder names.
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
LICENSE = """\
The images in fashion-mnist-sample.zip are from Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main(folder: Path) -> None:
    """Write archive and licence from the data set's files in `folder`."""
    with zipfile.ZipFile(OUT / "fashion-mnist-sample.zip", "w", zipfile.ZIP_STORED) as archive:
        for split, per_class in NUM_PER_CLASS.items():
            images, labels = read_idx(folder, split)
            for label, name in enumerate(CLASSES):
                for number in np.flatnonzero(labels == label)[:per_class]:
                    # A fixed time stamp, so that the archive depends on the images alone.
                    member = zipfile.ZipInfo(f"{split}/{name}/{number:05d}.png", (2017, 8, 25, 0, 0, 0))
                    member.external_attr = 0o644 << 16
                    archive.writestr(member, png(images[number]))
    (OUT / "LICENSE.fashion-mnist.txt").write_text(LICENSE)


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a split: uint8 images [n, 28, 28] and uint8 labels [n]."""
    images = gzip.decompress((folder / f"{FILES[split]}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{FILES[split]}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, dtype=np.uint8, offset=8),
    )


def png(image: np.ndarray) -> bytes:
    """Encode an image as PNG with whichever strategy of zlib gives the smallest file."""
    found = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_RLE):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True, compress_type=strategy)
        found.append(file.getvalue())
    return min(found, key=len)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
