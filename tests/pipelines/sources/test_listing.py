"""Everything under a source is an image or counted by reason: found = ok + quarantined + duplicates + passed over."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipelines import cli
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.storage import open_storage
from tests.pipelines.sources.packing import fill, pack, table

Png = Callable[[int], bytes]


def encoded(png: Png, number: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(number))).convert("RGB").save(file, kind)
    return file.getvalue()


def assert_law(manifest: Manifest) -> None:
    passed = sum(manifest.passed_over.values())
    counted = manifest.num_ok + manifest.num_quarantined + manifest.num_duplicates + passed
    assert manifest.num_found == counted


def test_images_are_recognised_by_content(png: Png, prepared: Callable, tmp_path: Path) -> None:
    kinds = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]
    names = ["a/0.jfif", "a/1.jpe", "b/00112233445566778899aabbccddeeff", "b/3.img", "a/4.txt", "b/5.dat"]
    contents = {name: encoded(png, i, kinds[i % len(kinds)]) for i, name in enumerate(names)}
    manifest, rows = prepared(fill(tmp_path / "s", contents))
    assert {row["source"] for row in rows["train"]} == set(names)
    assert (manifest.classes, manifest.passed_over) == (["a", "b"], {})
    manifest, _ = prepared(pack(tmp_path / "t/a.tar", contents.items()), out="tar")
    assert (manifest.num_ok, manifest.classes, manifest.passed_over) == (6, ["a", "b"], {})


def test_an_image_of_a_kind_that_is_not_read_is_quarantined_not_passed_over(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    photoshop = b"8BPS\0\1" + bytes(100)
    manifest, _ = prepared(fill(tmp_path / "s", {"a.png": png(0), "b.psd": photoshop}), max_bad=1)
    assert (manifest.num_found, manifest.num_quarantined, manifest.passed_over) == (2, 1, {})


def test_a_raw_file_of_a_camera_is_not_taken_for_the_preview_in_it(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    contents = {"a.png": png(0), "b.CR2": encoded(png, 1, "TIFF"), "c.dng": encoded(png, 2, "TIFF")}
    manifest, _ = prepared(fill(tmp_path / "s", contents), max_skipped=1)
    assert manifest.passed_over == {"no image (*.cr2)": 1, "no image (*.dng)": 1}


def test_whatever_is_no_image_is_counted_by_reason(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {f"{i}.png": png(i) for i in range(4)} | {"again.png": png(0), "bad.jpg": b"no image"}
    others = {
        "README.md": b"x", "0.txt": b"a caption", "1.txt": b"another", "stray.txt": b"x", "film.mp4": b"\0" * 40,
        "LICENSE": b"x", "empty": b"", "old.zip": b"PK",
    }  # fmt: skip
    source = fill(tmp_path / "s", contents | others | {".hidden": b"x"})
    (source / "link").symlink_to("/usr")
    manifest, _ = prepared(source, max_bad=1, max_skipped=1)
    assert manifest.passed_over == {
        "compressed archives": 1, "documents": 2, "links to folders": 1, "no image (*.mp4)": 1, "no image (*.txt)": 3,
        "no image (no suffix)": 1,
    }  # fmt: skip
    assert (manifest.num_found, manifest.num_ok, manifest.num_quarantined, manifest.num_duplicates) == (15, 4, 1, 1)
    assert_law(manifest)
    said = [line for line in caplog.text.splitlines() if "passed over 9" in line]
    assert len(said) == 1
    assert "3 no image (*.txt), such as " in said[0]


def test_too_much_that_is_passed_over_ends_the_command_before_anything_is_written(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = fill(tmp_path / "s", {f"{i}.png": png(i) for i in range(9)} | {"x.mp4": b"film", "LICENSE.txt": b"free"})
    words = (
        r"1 of 10 in .* would be passed over, more than max_skipped 0.05 allows: 1 no image \(\*.mp4\), such as x.mp4"
    )
    with pytest.raises(ValueError, match=words):
        prepared(source)
    assert not (tmp_path / "out").exists()
    assert prepared(source, max_skipped=0.1)[0].passed_over == {"documents": 1, "no image (*.mp4)": 1}
    with pytest.raises(ValueError, match=r"max_skipped 2 is outside \[0, 1\]; try 0.05"):
        prepared(source, max_skipped=2)


def test_captions_beside_every_image_do_not_end_the_command(png: Png, prepared: Callable, tmp_path: Path) -> None:
    contents = {f"{i}.png": png(i) for i in range(200)} | {f"{i}.txt": b"caption" for i in range(200)}
    manifest, _ = prepared(fill(tmp_path / "s", contents))
    assert manifest.passed_over == {"no image (*.txt)": 200}
    assert_law(manifest)


def test_what_was_passed_over_changes_no_digest(png: Png, prepared: Callable, tmp_path: Path) -> None:
    images = {f"{c}/{i}.png": png(i + 10 * ord(c)) for c in "ab" for i in range(3)}
    plain, _ = prepared(fill(tmp_path / "s", images), out="plain")
    assert not {"passed_over", "label_candidates", "num_unlabelled"} & set(
        json.loads((tmp_path / "plain/manifest.json").read_text())
    )
    noted, _ = prepared(fill(tmp_path / "t", images | {"README.md": b"x"}), out="noted")
    assert (noted.digest, noted.num_found, plain.num_found) == (plain.digest, 7, 6)
    assert read_manifest(open_storage(tmp_path / "noted")) == noted


def test_a_dataset_of_a_plain_folder_has_the_identity_that_it_always_had(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    """The fields are those of commit b6eaa41, where the digest was over all of them."""
    images = {
        f"{split}/{c}/{i}.png": png(i + 10 * ord(c)) for split in ("train", "test") for c in "ab" for i in range(5)
    }
    manifest, _ = prepared(fill(tmp_path / "s", images), drop_duplicates=False)
    values = json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(values) == {
        "channels", "classes", "config", "digest", "image_px", "mean", "num_duplicates", "num_found", "num_ok",
        "num_quarantined", "quarantine_reasons", "schema", "source_digest", "splits", "std",
    }  # fmt: skip
    assert set(values["config"]) == {
        "drop_duplicates", "encode", "labels", "max_pixels", "rows_per_group", "rows_per_shard", "seed", "shard_bytes",
        "val_fraction",
    }  # fmt: skip
    digest = values.pop("digest")
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert digest == manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()
    order = sorted(images, key=lambda name: (name < "train", hashlib.blake2b(name.encode(), digest_size=6).digest()))
    lines = [
        "\0".join(map(str, (name, name, -1, -1, -1, len(images[name]), *name.split("/")[:2], True))) for name in order
    ]
    assert values["source_digest"] == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_members_and_files_beside_tars_are_counted(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = pack(tmp_path / "s/a.tar", [("0.png", png(0)), ("0.txt", b"caption"), ("index.bin", b"\1\2"), ("n", b"")])
    fill(source, {"README.md": b"x", "checksums.sha256": b"x"})
    manifest, _ = prepared(source, max_skipped=1)
    assert manifest.passed_over == {
        "documents": 1, "members *.txt beside images": 1, "no image (*.bin)": 1, "no image (*.sha256)": 1,
        "no image (no suffix)": 1,
    }  # fmt: skip
    assert_law(manifest)
    with pytest.raises(ValueError, match=r"3 of 4 in .* would be passed over"):
        prepared(source, out="again")


def test_rows_of_a_table_are_all_found(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = table(tmp_path / "s/a.parquet", {"image": [png(0), None, png(0), b"x"], "my_label": [0, 1, 1, 1]})
    fill(source, {"README.md": b"x"})
    manifest, _ = prepared(source, max_bad=1)
    assert (manifest.num_ok, manifest.num_quarantined, manifest.num_duplicates) == (1, 2, 1)
    assert manifest.passed_over == {"columns that may be labels (--labels)": 1, "documents": 1}
    assert_law(manifest)


def test_counts_are_printed_as_json(
    png: Png, tmp_path: Path, without_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fill(tmp_path / "s", {"a/0.png": png(0), "b/1.png": png(1), "a/0.txt": b"caption"})
    assert cli.run(["prepare", str(source), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_found"] == found["num_ok"] + found["num_passed_over"] == 3
    assert found["passed_over"] == {"no image (*.txt)": 1}


def test_a_folder_without_an_image_says_what_it_has(prepared: Callable, tmp_path: Path) -> None:
    source = fill(tmp_path / "s", {"a.mp4": b"x", "b.mp4": b"y"})
    with pytest.raises(
        ValueError, match=r"no image in .* \(it has 2 no image \(\*.mp4\), such as .*\.mp4\); give a folder"
    ):
        prepared(source)


@pytest.mark.parametrize(
    "name", ["x_mask.png", "x-mask.png", "x_seg.png", "x.mask.gif", "x_gt.tif", "x_mask1.jpg", "x_label.png"]
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_mask_beside_its_image_is_not_taken(
    name: str, kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    contents = {"c/x.png": png(0), f"c/{name}": png(1), "d/oxygen_mask.png": png(2)}
    source = fill(tmp_path / "s", contents) if kind == "folder" else pack(tmp_path / "s/a.tar", contents.items())
    manifest, rows = prepared(source)
    assert [row["image"] for row in rows["train"]] in ([png(0), png(2)], [png(2), png(0)])
    assert manifest.passed_over == {"masks beside images (--image-member any takes them)": 1}
    assert_law(manifest)
    assert prepared(source, out="any", image_member="any")[0].num_ok == 3


PAIRED = [
    (["p_flair.nii.gz", "p_t1.nii.gz"], "p_seg.nii.gz"),
    (["imaging.nii.gz"], "segmentation.nii.gz"),
    (["image.png"], "mask.png"),
    (["b (1).png"], "b (1)_mask_1.png"),
    (["1.jpg"], "mask_1.png"),
    (["image_1.png"], "label_1.png"),
]


@pytest.mark.parametrize(("images", "mask"), PAIRED)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_mask_is_known_by_the_usual_names_of_pictures(
    images: list[str], mask: str, kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    names = [*(f"c/{name}" for name in images), "d/with_mask_1.png", "d/without_mask_1.png", "d/label_free.png"]
    contents = {name: png(i) for i, name in enumerate(names)} | {f"c/{mask}": png(99)}
    source = fill(tmp_path / "s", contents) if kind == "folder" else pack(tmp_path / "s/a.tar", contents.items())
    manifest, rows = prepared(source)
    assert {row["source"].removeprefix("a.tar/") for row in rows["train"]} == set(names)
    assert manifest.passed_over == {"masks beside images (--image-member any takes them)": 1}


FOLDERS = [("original/", "masks/"), ("", "masks/"), ("img/", "img_mask/"), ("scans/", "Ground Truth/"), ("a/", "a_gt/")]


@pytest.mark.parametrize(("images", "masks"), FOLDERS)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_of_masks_are_known_by_the_names_of_their_files(
    images: str, masks: str, kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    def packed(names: list[str], out: str) -> Path:
        contents = {name: png(i) for i, name in enumerate(names)}
        return fill(tmp_path / out, contents) if kind == "folder" else pack(tmp_path / out / "a.tar", contents.items())

    pairs = packed([f"{folder}{i}.{end}" for folder, end in ((images, "jpg"), (masks, "png")) for i in range(3)], "s")
    with pytest.raises(ValueError, match=f"has {images or './'} and beside it {masks}, whose files look like masks of"):
        prepared(pairs)
    assert prepared(pairs, image_member="any")[0].num_ok == 6
    apart = packed([f"{images}{i}.jpg" for i in range(3)] + [f"{masks}{i}.png" for i in range(3, 6)], "t")
    if images != "img/":
        assert prepared(apart, out="apart")[0].num_ok == 6


def test_files_in_a_folder_beside_that_of_their_images_do_not_end_the_command(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    files = {f"train/images/{i}.png": png(i) for i in range(3)} | {f"train/labels/{i}.txt": b"0 .5" for i in range(3)}
    manifest, _ = prepared(fill(tmp_path / "s", files), max_skipped=0)
    assert (manifest.num_ok, manifest.passed_over) == (3, {"no image (*.txt)": 3})


def test_only_images_whose_names_have_the_end_are_taken(png: Png, prepared: Callable, tmp_path: Path) -> None:
    contents = {f"{i}_{band}.png": png(10 * i + n) for i in range(3) for n, band in enumerate(("rgb", "depth"))}
    manifest, rows = prepared(fill(tmp_path / "s", contents), image_member="_rgb.png")
    assert {row["source"] for row in rows["train"]} == {f"{i}_rgb.png" for i in range(3)}
    assert manifest.passed_over == {"images that do not end in _rgb.png": 3}
    with pytest.raises(ValueError, match=r"no image of .* ends in _ir.png; try another end"):
        prepared(tmp_path / "s", image_member="_ir.png")


@pytest.mark.parametrize("top", ["", "train/", "a/b/"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_of_images_and_masks_are_no_classes(
    top: str, kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    contents = {f"{top}images/{i}.png": png(i) for i in range(3)} | {
        f"{top}masks/{i}.png": png(10 + i) for i in range(3)
    }
    source = fill(tmp_path / "s", contents) if kind == "folder" else pack(tmp_path / "s/a.tar", contents.items())
    for labels in ("auto", "none", "folder"):
        with pytest.raises(
            ValueError, match=rf"has {top}images/ and beside it {top}masks/, whose files look like masks"
        ):
            prepared(source, labels=labels)
    assert prepared(source, image_member="any")[0].num_ok == 6


def test_pairs_of_one_name_are_refused_unless_one_is_chosen(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {f"{i}{end}": png(10 * i + n) for i in range(3) for n, end in enumerate((".jpg", ".png"))}
    source = fill(tmp_path / "s", contents)
    words = (
        r"has pairs such as \d.jpg and \d.png, of which one may be the mask .*--image-member .jpg or .png, or all by"
    )
    with pytest.raises(ValueError, match=words):
        prepared(source)
    _, rows = prepared(source, image_member=".jpg")
    assert {row["source"] for row in rows["train"]} == {"0.jpg", "1.jpg", "2.jpg"}
    assert prepared(source, out="any", image_member="any")[0].num_ok == 6
    photographs = fill(tmp_path / "p", {"0.jpg": png(0), "0.png": png(1), "1.png": png(2), "2.png": png(3)})
    assert prepared(photographs, out="few")[0].num_ok == 4
    assert "has pairs such as 0.jpg and 0.png" in caplog.text
    assert "(1 of 3 images without loss are one of a pair)" in caplog.text


def test_a_file_that_may_not_be_read_is_passed_over(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = fill(tmp_path / "s", {"a.png": png(0)})
    os.mkfifo(source / "pipe")
    (source / "gone").symlink_to("absent")
    manifest, _ = prepared(source, max_skipped=1)
    assert manifest.passed_over == {"broken link": 1, "no regular file": 1}
    assert_law(manifest)
