"""A real S3 server, a Ray of four logical CPUs, the shipped sample, and a zoo of images good and bad."""

import contextlib
import io
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.bench.object_store import Ports, environment, free_ports, server_command
from pipelines.manifest import Manifest, Shard, Split, write_manifest
from pipelines.prepare.shards import SCHEMA
from pipelines.storage import open_storage

BIN = Path(sys.executable).parent
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecretkey", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[Ports]:
    """AWS_* in this process' environment name a server that may yet have to be started, before Ray's workers are."""
    ports = free_ports()
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}", "AWS_EC2_METADATA_DISABLED": "true"}
    with environment(CREDENTIALS | endpoint):
        yield ports


class S3Server:
    """A SeaweedFS server of its own folder, which can be killed and started again."""

    def __init__(self, folder: Path, ports: Ports) -> None:
        self._folder, self._ports = folder, ports
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self.uri = "s3://mae-test"

    def start(self) -> None:
        """It answers."""
        command = server_command(self._folder, "mae-test", self._ports)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **CREDENTIALS}, stdout=log, stderr=log)
        self._wait_for_bucket()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """It has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def _wait_for_bucket(self) -> None:
        import boto3

        credentials = {
            "aws_access_key_id": CREDENTIALS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        }
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **credentials)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.head_bucket(Bucket="mae-test")
                return
            except Exception as error:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log").read_text()[-2000:]
                    pytest.fail(f"the S3 server did not start ({error}): {log}")
                time.sleep(0.2)


@pytest.fixture(scope="session")
def s3(s3_environment: Ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://bucket of a SeaweedFS server that runs in this session."""
    server = S3Server(tmp_path_factory.mktemp("weed"), s3_environment)
    try:
        server.start()
        yield server.uri
    finally:
        server.stop()


@pytest.fixture(scope="module")
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server beside the session's, to be killed. Its endpoint is in nobody's environment."""
    server = S3Server(tmp_path_factory.mktemp("own-weed"), free_ports())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def ray4(s3_environment: Ports) -> Iterator[None]:
    """Ray with four logical CPUs, whose workers know the S3 server's address."""
    import ray

    # A socket's path may be 107 bytes long: pytest's own folders would make it longer.
    with tempfile.TemporaryDirectory(prefix="mae-ray-", dir="/tmp") as scratch:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 2**20,
            _temp_dir=scratch,
        )
        yield
        ray.shutdown()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` does the work of its tasks in this process."""
    from pipelines import prepare

    def run(todo: Any, *arguments: Any) -> Iterator[Any]:
        return (prepare.write_one(row["number"], row["skip"], *arguments) for row in todo)

    monkeypatch.setattr("pipelines.cluster.ray_session", lambda compute: contextlib.nullcontext())
    monkeypatch.setattr(prepare, "_run", run)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample's images, unpacked. Read only."""
    from pipelines.sample import unpack

    return unpack(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images of the sample, three classes, in train/ and test/. Read only."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in {"train": 80, "test": 20}.items():
        for name in ("bag", "dress", "sneaker"):
            (folder / split / name).mkdir(parents=True)
            for path in sorted((sample / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name / path.name)
    return folder


def _tile(label: int, number: int) -> bytes:
    """A noisy tile, dark or bright as its label says."""
    pixels = np.random.default_rng(number).integers(0, 60, (8, 8, 3))
    pixels += 150 * label
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tiles(tmp_path: Path) -> tuple[str, Manifest]:
    """A prepared dataset of 40 and 20 labelled tiles of 8 x 8 px, made without Ray, and its manifest."""
    splits, first_id = {}, 0
    numbers = {"num_bytes": 1, "sha256": "", "rows_per_group": 8}
    for name, rows in {"train": 40, "val": 20}.items():
        labels = [i % 2 for i in range(rows)]
        columns = {
            "image": [_tile(label, first_id + i) for i, label in enumerate(labels)],
            "label": labels,
            "height_px": [8] * rows,
            "width_px": [8] * rows,
            "orientation": [1] * rows,
            "segment_offsets": [None] * rows,
            "source": [str(i) for i in range(rows)],
        }
        path = tmp_path / "data" / name / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns, SCHEMA), path, row_group_size=8)
        shard = Shard(path=f"{name}/part-00000.parquet", num_rows=rows, first_id=first_id, **numbers)
        splits[name] = Split(num_rows=rows, num_bytes=1, shards=[shard])
        first_id += rows
    storage = open_storage(str(tmp_path / "data"))
    manifest = Manifest(
        channels=3, image_px=(8, 8), classes=["dark", "bright"], splits=splits, num_found=60, num_ok=60,
        num_quarantined=0, num_duplicates=0, quarantine_reasons={}, mean=[0.4] * 3, std=[0.3] * 3, config={},
        source_digest="",
    )  # fmt: skip
    return storage.uri, write_manifest(storage, manifest)


@dataclass(frozen=True)
class Animal:
    """A file of the zoo: its bytes, and why it must be refused (empty for an image that must be read)."""

    name: str
    content: bytes
    reason: str = ""


@pytest.fixture(scope="session")
def zoo() -> list[Animal]:
    """Images of every kind that sources have, whole and broken; no two alike."""
    return [*_whole(), *_broken()]


def _photograph(height_px: int = 48, width_px: int = 64) -> Image.Image:
    """Smooth colours with some noise, so that a decoder's faults show and a JPEG has entropy to damage."""
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    noise = np.random.default_rng(0).integers(0, 40, (height_px, width_px))
    planes = [rows * 200 / height_px + noise, columns * 200 / width_px + noise, 200 - rows * 150 / height_px]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _whole() -> Iterator[Animal]:
    colour = _photograph()
    gray = colour.convert("L")
    yield Animal("baseline.jpg", _encoded(colour, "JPEG"))
    yield Animal("progressive.jpg", _encoded(colour, "JPEG", progressive=True))
    yield Animal("full-chroma.jpg", _encoded(colour, "JPEG", subsampling=0))
    yield Animal("gray.jpg", _encoded(gray, "JPEG"))
    yield Animal("cmyk.jpg", _encoded(colour.convert("CMYK"), "JPEG"))
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Animal(f"rotated-{orientation}.jpg", _encoded(colour, "JPEG", exif=exif))
    yield Animal("two-pictures.jpg", _encoded(colour, "MPO", save_all=True, append_images=[gray.convert("RGB")]))
    yield Animal("colour.PNG", _encoded(colour, "PNG"))
    yield Animal("gray.png", _encoded(gray, "PNG"))
    yield Animal("palette.png", _encoded(colour.quantize(16), "PNG"))
    yield Animal("palette-transparent.png", _encoded(colour.quantize(16), "PNG", transparency=3))
    transparent = colour.copy()
    transparent.putalpha(gray)
    yield Animal("alpha.png", _encoded(transparent, "PNG"))
    yield Animal("gray-alpha.png", _encoded(transparent.convert("LA"), "PNG"))
    yield Animal("sixteen-bit.png", _encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "PNG"))
    yield Animal("one-bit.png", _encoded(gray.convert("1"), "PNG"))
    yield Animal("lossy.webp", _encoded(colour, "WEBP"))
    yield Animal("lossless.webp", _encoded(transparent, "WEBP", lossless=True))
    yield Animal("bitmap.bmp", _encoded(colour, "BMP"))
    yield Animal("tagged.tiff", _encoded(colour, "TIFF"))
    yield Animal("still.gif", _encoded(gray, "GIF"))
    yield Animal("a-png-named.jpg", _encoded(colour.resize((30, 20)), "PNG"))
    yield Animal("one-pixel.png", _encoded(colour.resize((1, 1)), "PNG"))
    yield Animal("naïve name, ümläuts.png", _encoded(colour.resize((31, 20)), "PNG"))


def _broken() -> Iterator[Animal]:
    colour = _photograph(96, 128)
    jpeg, png = _encoded(colour, "JPEG", quality=95), _encoded(colour, "PNG")
    yield Animal("empty.jpg", b"", "empty file")
    yield Animal("text.png", b"this is no image", "not a known image format")
    yield Animal("page.jpg", b"<html>404</html>", "not a known image format")
    yield Animal("truncated.jpg", jpeg[: len(jpeg) // 2], "damaged JPEG")
    yield Animal("header-only.jpg", jpeg[:30], "damaged header|not a known image format")
    yield Animal("flipped.jpg", _flipped(jpeg, 20), "damaged JPEG")
    yield Animal("truncated.png", png[: len(png) // 2], "damaged image")
    yield Animal("flipped.png", _flipped(png, 20), "damaged image")
    yield Animal("truncated.webp", _encoded(colour, "WEBP")[:200], "damaged")
    frames = [colour.rotate(angle) for angle in (0, 90)]
    yield Animal("moving.gif", _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("moving.webp", _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("moving.png", _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("float.tiff", _encoded(colour.convert("F"), "TIFF"), "unsupported pixels")
    yield Animal("bomb.png", _claiming(png, 30_000, 30_000), "too many pixels")
    yield Animal("bomb.jpg", _jpeg_claiming(jpeg, 30_000, 30_000), "too many pixels")


def _flipped(content: bytes, num_bits: int) -> bytes:
    """Bits flipped in the second half, where pixels are."""
    found, rng = bytearray(content), random.Random(1)
    for _ in range(num_bits):
        found[rng.randrange(len(found) // 2, len(found) - 20)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _claiming(png: bytes, height_px: int, width_px: int) -> bytes:
    """A PNG whose header claims another size, with a right checksum."""
    header = b"IHDR" + struct.pack(">II", width_px, height_px) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _jpeg_claiming(jpeg: bytes, height_px: int, width_px: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height_px, width_px) + jpeg[place + 4 :]
