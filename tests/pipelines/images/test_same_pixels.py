"""One file gives the same input in training, evaluation, embedding and the served model, whatever its format."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

import mae_core
from mae_core.normalization import ValueRange
from pipelines.config import PrepareConfig
from pipelines.images import decode as decode_package
from pipelines.images.decode import input_view, inspect
from pipelines.prepare.kinds import PLAIN, PixelKind
from pipelines.prepare.rows import examine
from tests.pipelines.images.field_files import cloud_optimised, deep_png, npy, scene, tiff
from tests.pipelines.images.test_medical import dicom
from tests.pipelines.images.test_values import geotiff, jpeg2000

SERVED = """
import json, sys
from pathlib import Path
import numpy as np
from mae_core.pretrained import value_range_of
from mae_decode import input_view
assert not [name for name in sys.modules if name.startswith("pipelines")]
for path in sorted(Path("files").iterdir()):
    channels, values = json.loads(Path(f"{path.name}.json").read_text())
    np.save(f"{path.name}.npy", input_view(path.read_bytes(), channels, (24, 24), value_range_of(values)))
"""
VALUES = scene(3, side_px=60)
GRAY = scene(1, side_px=60)
BYTES = (VALUES >> 8).astype(np.uint8)
RANGE = {"dtype": "uint16", "kind": "percentiles", "by": "image", "low": [], "high": [], "percentiles": [1.0, 99.0]}


def coded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(BYTES).save(file, kind, **options)
    return file.getvalue()


def eight_bits() -> dict[str, bytes]:
    jpeg = coded("JPEG")
    table = jpeg.index(b"\xff\xdb")
    return {
        "jpeg": jpeg,
        "jpeg-with-gap": jpeg[:table] + b"\0gap" + jpeg[table:],
        "png": coded("PNG"),
        "webp": coded("WEBP"),
        "avif": coded("AVIF"),
        "tiff": coded("TIFF"),
        "cog": cloud_optimised(BYTES, photometric="rgb"),
        "white-is-zero": tiff(BYTES[:, :, 0], photometric="miniswhite"),
        "dicom": dicom(BYTES, "RGB"),
        "jxl": bytes(imagecodecs.jpegxl_encode(BYTES, lossless=True)),
        "deep-png": deep_png(VALUES),
    }


def sixteen_bits() -> dict[str, bytes]:
    return {
        "tiff": tiff(VALUES),
        "geotiff": geotiff(VALUES, compress="lzw", predictor=2),
        "cog": cloud_optimised(VALUES, photometric="rgb"),
        "png": deep_png(VALUES),
        "gray-png": deep_png(GRAY),
        "npy": npy(VALUES),
        "jpeg2000": jpeg2000(VALUES, 16),
        "jxl": bytes(imagecodecs.jpegxl_encode(VALUES, lossless=True)),
        "dicom": dicom(GRAY[:, :, 0]),
        "monochrome1": dicom(GRAY[:, :, 0], "MONOCHROME1"),
    }


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out the code as the registry packages it with a model."""
    folder = tmp_path_factory.mktemp("packaged")
    shutil.copytree(Path(str(decode_package.__file__)).parent, folder / "mae_decode")
    shutil.copytree(Path(str(mae_core.__file__)).parent, folder / "mae_core")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
def test_every_format_gives_one_input_everywhere(packaged: Path, tmp_path: Path, bits: int) -> None:
    files, values = (eight_bits(), None) if bits == 8 else (sixteen_bits(), RANGE)
    own = (
        None if values is None else ValueRange(dtype="uint16", kind="percentiles", by="image", percentiles=(1.0, 99.0))
    )
    config = PrepareConfig() if bits == 8 else PrepareConfig(range=("percentiles", "1", "99"), range_by="image")
    kind = PLAIN if bits == 8 else PixelKind(dtype="uint16", channels=3, is_plain=False)
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
        (tmp_path / f"{name}.json").write_text(json.dumps([3, values]))
    environment = {"PYTHONPATH": str(packaged), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", SERVED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, content in files.items():
        embedded = input_view(content, 3, (24, 24), own, inspect(content).orientation if own is None else None)
        (row,) = examine(content, config, kind, [])
        stored = input_view(row.content, 3, (24, 24), own, row.orientation)
        np.testing.assert_array_equal(stored, embedded, name)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), embedded, name)
        assert embedded.dtype == (np.uint8 if own is None else np.float32)
        assert embedded.std() > 0, name
