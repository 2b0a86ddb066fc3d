"""The validation images of ImageNet-1K have the classes that the development kit's numbers mean."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipelines.sources import open_source

Png = Callable[[int], bytes]
# meta.mat numbers synsets in an order of its own, and has inner nodes of the tree behind the 1000 leaves.
SYNSETS = {1: "n03", 2: "n01", 3: "n02", 4: "n99"}


def meta(compressed: bool = True) -> bytes:
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "children", "wordnet_height")]
    rows = [(float(number), synset, "some words", np.zeros((1, 0)), 0.0) for number, synset in SYNSETS.items()]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)}, do_compression=compressed)
    return file.getvalue()


def imagenet(root: Path, png: Png, folder: str, content: dict[str, bytes]) -> Path:
    files = {
        "LOC_synset_mapping.txt": b"n01 tench\nn02 crane, bird\nn03 crane, machine\n",
        **{f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG": png(i) for i in (1, 2, 3)},
        **{f"{folder}{name}": found for name, found in content.items()},
    }
    for name, found in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(found)
    return root


@pytest.mark.parametrize("folder", ["", "ILSVRC2012_devkit_t12/data/"])
@pytest.mark.parametrize("compressed", [True, False])
def test_numbers_are_those_of_meta_mat(
    folder: str, compressed: bool, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    truth = {"ILSVRC2012_validation_ground_truth.txt": b"2\n1\n3\n", "meta.mat": meta(compressed)}
    manifest, rows = prepared(imagenet(tmp_path / "s", png, folder, truth))
    found = {row["image"]: manifest.classes[row["label"]] for row in rows["val"]}
    assert found == {png(1): "n01 tench", png(2): "n03 crane, machine", png(3): "n02 crane, bird"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n"},
            r"class numbers .*; copy the kit's meta.mat",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n", "meta.mat": meta()[:200]},
            r"meta.mat is not the development kit's meta.mat; copy it again",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n", "meta.mat": b"\x80\x04cos\nsystem\n"},
            r"meta.mat is not the development kit's meta.mat; copy it again",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n5\n", "meta.mat": meta()},
            "has class 5, which meta.mat does not define",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n2\n", "meta.mat": meta()},
            "the ground truth has no class for .*val_00000003.JPEG",
        ),
    ],
)
def test_a_kit_that_is_not_whole_is_named(content: dict[str, bytes], words: str, png: Png, tmp_path: Path) -> None:
    source = open_source(str(imagenet(tmp_path, png, "", content)))
    with pytest.raises(ValueError, match=words):
        list(source.entries())


@pytest.mark.parametrize("name", ["images.tar.gz", "images.tgz", "images.zip"])
def test_compressed_archives_are_refused_and_beside_images_said_to_be_left_out(
    name: str, png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_bytes(b"\x1f\x8b")
    for source in (tmp_path / "s", tmp_path / "s" / name):
        with pytest.raises(ValueError, match=rf"{name} is a compressed archive, .*gunzip"):
            prepared(source)
    (tmp_path / "s/a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"1 of 2 in .* would be passed over, .* 1 compressed archives, such as"):
        prepared(tmp_path / "s")
    manifest, _ = prepared(tmp_path / "s", max_skipped=1)
    assert (manifest.num_found, manifest.passed_over) == (2, {"compressed archives": 1})
    assert f"passed over 1: 1 compressed archives, such as {name}" in caplog.text
