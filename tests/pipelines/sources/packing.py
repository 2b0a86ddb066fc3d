"""Write small sources as other programs do: folders, tar files whose names may repeat, Parquet as on the Hub."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write the files below a folder; return it."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file whose members are in this order; return the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


def table(path: Path, columns: dict[str, Any], class_names: dict[str, list[str]] | None = None) -> Path:
    """Write a Parquet file, with class names as Hugging Face's datasets stores them; return the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = pa.table(columns)
    if class_names:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in class_names.items()}
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(found, path)
    return path.parent


def structs(images: Iterable[bytes]) -> pa.Array:
    """Return a column of images as the Hub has them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], kind)
