"""Images of hospitals, satellites and microscopes are found, labelled and counted as photographs are."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_core.errors import UserError
from pipelines.sources import open_source
from tests.pipelines.images.field_files import npy, scene, tiff
from tests.pipelines.images.test_medical import FILM, VOLUME, dicom, nifti
from tests.pipelines.sources.packing import fill, pack
from tests.pipelines.sources.test_listing import assert_law

WINDOW = {"range": ("window", "1500", "3000")}


def volume(number: int, suffix: str = ".nii.gz") -> bytes:
    return nifti(VOLUME + np.int16(number), np.eye(4), suffix)


def test_fields_are_recognised_by_content(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, VOLUME.shape).astype(np.int16)
    files = {
        "IM000001": dicom(FILM),
        "packed": volume(0),
        "noise": nifti(noise, np.eye(4), ".nii.gz", descrip=b"a description of eighty characters at most"),
        "volume": volume(1, ".nii"),
        "array": npy(scene(2)),
        "scene": tiff(scene(5)),
    }
    others = {"DICOMDIR": dicom(FILM), "list.csv.gz": gzip.compress(b"image,label\n" * 100), "odd.gz": b"\x1f\x8b"}
    for source in (
        open_source(str(fill(tmp_path / "folder", files | others))),
        open_source(str(pack(tmp_path / "tar" / "a.tar", (files | others).items()))),
    ):
        assert {entry.name.removeprefix("a.tar/") for entry in source.entries()} == set(files)
        assert source.passed_over.counts == {"documents": 1, "no image (*.gz)": 2}


def test_slices_of_labelled_volumes_are_counted_as_files_and_labelled_as_rows(
    prepared: Callable, tmp_path: Path
) -> None:
    files = {f"sub-{i}_ct.nii.gz": volume(i) for i in range(4)}
    files |= {f"sub-{i}_ct.json": json.dumps({"finding": ("none", "nodule")[i % 2]}).encode() for i in range(3)}
    files |= {"sub-0_ct_seg.nii.gz": volume(50), "again.nii.gz": volume(0), "broken.nii.gz": volume(9)[:400]}
    source = fill(tmp_path / "s", files)
    options = {"labels": "json:finding", "frames": "4", "max_bad": 0.5, **WINDOW}
    manifest, rows = prepared(source, **options)
    assert_law(manifest)
    assert (manifest.num_found, manifest.num_ok, manifest.num_quarantined, manifest.num_duplicates) == (10, 4, 1, 1)
    mask = "masks beside images (--image-member any takes them)"
    assert manifest.passed_over == {"no image (*.json)": 3, mask: 1}
    found = {row["source"]: manifest.label_name(row["label"]) for row in rows["train"]}
    # One of the equal volumes stays, which is the first by name and has no label.
    names = ["again", "sub-1_ct", "sub-2_ct", "sub-3_ct"]
    labels = [None, "nodule", "none", None]
    assert found == {f"{n}.nii.gz#{k}": label for n, label in zip(names, labels) for k in (0, 4, 8)}
    assert manifest.num_unlabelled == {"train": 6}
    grouped, rows = prepared(source, out="grouped", group_by="^([a-z]+-?[0-9]*)", val_fraction=0.5, **options)
    assert_law(grouped)
    of_split = [{row["source"].partition("#")[0] for row in rows[split]} for split in ("train", "val")]
    assert not of_split[0] & of_split[1], "all slices of a file are in one split"


def test_a_table_names_volumes_without_their_suffix(prepared: Callable, tmp_path: Path) -> None:
    files = {f"sub-{i}.nii.gz": volume(i) for i in range(2)}
    table = b"participant,group\nsub-0,patient\nsub-1,control\n"
    source = fill(tmp_path / "s", files | {"participants.csv": table})
    options = {"labels": "file:participants.csv", "image_column": "participant", "frames": "first", **WINDOW}
    manifest, rows = prepared(source, **options)
    assert {row["source"]: manifest.label_name(row["label"]) for row in rows["train"]} == {
        "sub-0.nii.gz": "patient",
        "sub-1.nii.gz": "control",
    }


@pytest.mark.parametrize("sample_key", ["first-dot", "last-dot"])
def test_volumes_in_tar_files_have_keys_without_both_suffixes(
    prepared: Callable, tmp_path: Path, sample_key: str
) -> None:
    stems = ["a", "b"] if sample_key == "first-dot" else ["scan.1", "scan.2"]
    members = [(f"{stem}.{end}", content) for i, stem in enumerate(stems)
               for end, content in (("nii.gz", volume(i)), ("cls", str(i).encode()))]  # fmt: skip
    source = pack(tmp_path / "t" / "a.tar", members)
    manifest, rows = prepared(source, sample_key=sample_key, frames="first", **WINDOW)
    assert [(row["source"], row["label"]) for row in rows["train"]] == [
        (f"a.tar/{stem}.nii.gz", i) for i, stem in enumerate(stems)
    ]
    assert manifest.passed_over == {}


def test_arrays_beside_photographs_are_not_guessed_to_be_images(
    png: Callable[[int], bytes], prepared: Callable, tmp_path: Path
) -> None:
    from tests.pipelines.sources.test_listing import encoded

    files = {f"{i}.jpg": encoded(png, i, "JPEG") for i in range(3)} | {f"{i}.npy": npy(scene(1, i)) for i in range(3)}
    source = fill(tmp_path / "s", files)
    with pytest.raises(UserError, match=r"pairs such as 0\.jpg and 0\.npy.*--image-member \.jpg or \.npy"):
        prepared(source)
    manifest, _ = prepared(source, image_member=".jpg")
    assert (manifest.num_ok, manifest.passed_over) == (3, {"images that do not end in .jpg": 3})
