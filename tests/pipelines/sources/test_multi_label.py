"""Where it is asked for, an image has several classes, or none: stored as numbers of sets, by whatever source."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import InspectConfig
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.prepare.inspect import inspect_uri
from pipelines.storage import open_storage
from tests.pipelines.sources.packing import fill, pack, structs, table

Png = Callable[[int], bytes]
SETS: list[list[str] | None] = [["cat", "dog"], ["dog"], [], None, ["cat", "dog"], ["emu"]]


def sets_of(manifest: Manifest, rows: dict[str, list[dict]]) -> dict[bytes, list[str] | None]:
    found = {row["image"]: row["label"] for row in rows["train"]}
    return {
        image: None if label is None else [manifest.classes[i] for i in manifest.label_sets[label]]
        for image, label in found.items()
    }


def as_table(folder: Path, images: list[bytes]) -> tuple[Path, str]:
    return table(folder / "a.parquet", {"image": structs(images), "label": SETS}), "auto"


def as_hub(folder: Path, images: list[bytes]) -> tuple[Path, str]:
    names = ["dog", "emu", "cat"]
    numbers = [None if found is None else [names.index(name) for name in found] for found in SETS]
    (folder / "x").mkdir(parents=True)
    feature = {"label": {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}}
    found = pa.table({"image": structs(images), "label": pa.array(numbers, pa.list_(pa.int64()))})
    pq.write_table(
        found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})}),
        folder / "x/train.parquet",
    )
    return folder, "column:label"


def as_json(folder: Path, images: list[bytes]) -> tuple[Path, str]:
    members = [pair for i, image in enumerate(images)
               for pair in ((f"{i}.png", image), (f"{i}.json", json.dumps({"tags": SETS[i]}).encode()))]  # fmt: skip
    return pack(folder / "a.tar", members), "json:tags"


def as_list(folder: Path, images: list[bytes]) -> tuple[Path, str]:
    lines = "\n".join(f"{i}.png,{'|'.join(found or []) if found is not None else ''}" for i, found in enumerate(SETS))
    fill(folder, {f"{i}.png": image for i, image in enumerate(images)} | {"l.csv": f"uri,findings\n{lines}".encode()})
    return folder / "l.csv", "column:findings"


@pytest.mark.parametrize("kind", [as_table, as_hub, as_json, as_list], ids=lambda kind: kind.__name__)
def test_lists_are_sets_of_classes_where_asked_for(
    kind: Callable, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = [png(i) for i in range(len(SETS))]
    source, labels = kind(tmp_path / "s", images)
    if kind is not as_list:
        with pytest.raises(ValueError, match=r"but an image has one class unless --multi-label is given"):
            prepared(source, labels=labels)
    manifest, rows = prepared(source, labels=labels, multi_label=True)
    # A text cannot say that an image has none of the classes.
    expected = {image: None if found is None or (kind is as_list and not found) else sorted(found)
                for image, found in zip(images, SETS)}  # fmt: skip
    assert {image: found and sorted(found) for image, found in sets_of(manifest, rows).items()} == expected
    assert manifest.classes == (["dog", "emu", "cat"] if kind is as_hub else ["cat", "dog", "emu"])
    assert read_manifest(open_storage(tmp_path / "out")) == manifest
    both = next(row["label"] for row in rows["train"] if row["image"] == images[0])
    assert manifest.label_name(both) in ("cat; dog", "dog; cat")
    found = inspect_uri(
        str(source), InspectConfig(labels=labels, multi_label=True, out=str(tmp_path / "sheets/sheet.png"))
    )
    assert found["classes"] == {name: sum(name in (some or []) for some in SETS) for name in manifest.classes}
    assert found["num_unlabelled"] == manifest.num_unlabelled["train"]


def test_several_classes_are_not_folders(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = fill(tmp_path / "s", {f"{c}/{i}.png": png(i + 10 * ord(c)) for c in "ab" for i in range(2)})
    with pytest.raises(
        ValueError, match="multi_label needs labels that are stored, and the folder of images has folders"
    ):
        prepared(source, multi_label=True)
    with pytest.raises(ValueError, match="multi_label needs labels that are stored, not folder"):
        prepared(source, multi_label=True, labels="folder")
