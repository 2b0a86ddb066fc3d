"""WebDataset as others write it: one image a sample, or the user says which; no two samples are ever merged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipelines.sources.packing import fill, pack

Png = Callable[[int], bytes]


def numbered(png: Png, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield an image and its label, number % 3, for each name without suffix."""
    for number, name in enumerate(names):
        yield f"{name}.png", png(number)
        yield f"{name}.cls", str(number % 3).encode()


def labels_of(rows: dict[str, list[dict]], split: str = "train") -> dict[bytes, int | None]:
    return {row["image"]: row["label"] for row in rows[split]}


DOTTED = [f"cam1_{day}_{k}" for day in ("2023.05.01", "2023.05.02") for k in range(6)]


@pytest.mark.parametrize("names", [DOTTED, ["v1.0-a", "v1.0-b"], ["d/x.1", "d/x.2"], ["a.b.c", "a.b.d"]])
def test_names_with_dots_are_refused_or_paired_by_their_full_stem(
    names: list[str], png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = pack(tmp_path / "s/scans.tar", numbered(png, names))
    with pytest.raises(
        ValueError, match=r"images are one sample by the key .*, which ends at the first dot: .*last-dot"
    ):
        prepared(source)
    _, rows = prepared(source, sample_key="last-dot")
    assert labels_of(rows) == {png(number): number % 3 for number in range(len(names))}


def test_one_label_a_key_is_not_shared_by_all_images_of_it(png: Png, prepared: Callable, tmp_path: Path) -> None:
    members = [("a.1.png", png(0)), ("a.1.cls", b"1"), ("a.2.cls", b"2")]
    dotted = pack(tmp_path / "t/a.tar", numbered(png, DOTTED))
    for source, options in ((pack(tmp_path / "s/a.tar", members), {}), (dotted, {"image_member": "any"})):
        with pytest.raises(
            ValueError, match=r"is no label of the key \w+, since a key ends at the first dot: use .*last-"
        ):
            prepared(source, **options)
    twice = pack(tmp_path / "u/a.tar", [("a.png", png(0)), ("a.cls", b"1"), ("a.CLS", b"2")])
    with pytest.raises(
        ValueError, match=r"has several labels for the key a, .*, such as a.CLS; .*--sample-key last-dot"
    ):
        prepared(twice)


def test_names_with_dots_and_nothing_beside_them_are_plain_images(png: Png, prepared: Callable, tmp_path: Path) -> None:
    names = [f"{folder}/2023.05.01_{i}.png" for folder in ("cat", "dog") for i in range(3)]
    manifest, rows = prepared(pack(tmp_path / "s/a.tar", [(name, png(i)) for i, name in enumerate(names)]))
    assert manifest.classes == ["cat", "dog"]
    assert labels_of(rows) == {png(i): i // 3 for i in range(6)}


@pytest.mark.parametrize("suffixes", [("png", "cls"), ("jpg", "cls.txt"), ("png",)])
def test_a_name_that_occurs_twice_is_refused(
    suffixes: tuple[str, ...], png: Png, prepared: Callable, tmp_path: Path
) -> None:
    members = [
        (f"{k:06d}.{suffix}", png(100 * part + k) if suffix in ("png", "jpg") else (b"cat", b"dog")[part])
        for part in range(2) for k in range(3) for suffix in suffixes
    ]  # fmt: skip
    words = rf"joined.tar has 000000.{suffixes[0]} 2 times, as when tar files are appended to each other"
    for labels in ("auto", "none"):
        with pytest.raises(ValueError, match=words):
            prepared(pack(tmp_path / "s/joined.tar", members), labels=labels)
    with pytest.raises(ValueError, match=r"has a.png 2 times"):
        prepared(pack(tmp_path / "t/a.tar", [("./a.png", png(0)), ("a.png", png(1))]))


def test_tar_files_joined_by_cat_are_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    parts = [pack(tmp_path / f"{i}/a.tar", numbered(png, [f"{i}"])) / "a.tar" for i in range(2)]
    source = fill(tmp_path / "s", {"a.tar": parts[0].read_bytes() + parts[1].read_bytes()})
    with pytest.raises(ValueError, match=r"a.tar continues after its end, as when tar files are joined by cat"):
        prepared(source)
    padded = fill(tmp_path / "p", {"a.tar": parts[0].read_bytes() + bytes(3 * 2**20)})
    assert prepared(padded)[0].num_ok == 1


PAIRS = [("img.png", "seg.png"), ("png", "jpg"), ("left.png", "right.png"), ("0.png", "1.png")]


@pytest.mark.parametrize("ends", PAIRS)
@pytest.mark.parametrize("labelled", [True, False])
def test_of_several_images_a_sample_the_named_one_is_taken(
    ends: tuple[str, str], labelled: bool, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    members: list[tuple[str, bytes]] = []
    for k in range(4):
        members += [(f"s{k}.cls", str(k % 2).encode())] if labelled else []
        members += [(f"s{k}.{ends[0]}", png(k)), (f"s{k}.{ends[1]}", png(100 + k))]
    source = pack(tmp_path / "s/train-000000.tar", members)
    is_clear = not labelled and ends[0] == "0.png"
    if not is_clear:
        with pytest.raises(ValueError, match=rf"2 images are one sample by the key s0, .*: s0.{ends[0]}, s0.{ends[1]}"):
            prepared(source)
    manifest, rows = prepared(source, image_member=ends[0])
    assert labels_of(rows) == {png(k): k % 2 if labelled else None for k in range(4)}
    assert manifest.passed_over == {f"images that are not member {ends[0]}": 4}
    assert manifest.num_found == 8
    everything, _ = prepared(source, out="any", image_member="any")
    assert (everything.num_ok, everything.passed_over) == (8, {})
    with pytest.raises(ValueError, match=rf"has no member x.png, but {ends[0]}, {ends[1]}; choose one of these"):
        prepared(source, image_member="x.png")


def triples(png: Png) -> Iterator[tuple[str, bytes]]:
    for k in range(4):
        yield f"{k:09d}.jpg", png(k)
        yield f"{k:09d}.json", b'{"label": %d, "caption": "x", "width": 8}' % (k % 2)
        yield f"{k:09d}.txt", b"a caption"


def test_a_crawl_by_img2dataset_is_taken_with_what_is_beside_its_images_counted(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = pack(tmp_path / "s/00000.tar", triples(png))
    fill(source, {"00000.parquet": b"PAR1 of metadata", "00000_stats.json": b"{}"})
    manifest, _ = prepared(source)
    assert (manifest.num_ok, manifest.classes, manifest.label_candidates) == (4, [], ["json:label"])
    assert manifest.passed_over == {
        "members *.json beside images": 4, "members *.txt beside images": 4, "no image (*.json)": 1,
        "tables beside tar files": 1,
    }  # fmt: skip
    assert manifest.num_found == 4 + 10
    assert "the images are unlabelled" in caplog.text
    assert "--labels json:label (key of 00000.tar/000000000.json and others)" in caplog.text
    manifest, rows = prepared(source, out="labelled", labels="json:label")
    assert labels_of(rows) == {png(k): k % 2 for k in range(4)}
    assert manifest.passed_over["members *.txt beside images"] == 4


@pytest.mark.parametrize("suffix", ["cls", "cls.txt", "label", "class", "CLS"])
def test_a_text_by_a_usual_name_is_the_label(suffix: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    members = [pair for k in range(4) for pair in ((f"{k}.JPEG", png(k)), (f"{k}.{suffix}", f"{k % 2}\n".encode()))]
    _, rows = prepared(pack(tmp_path / "s/a.tar", members))
    assert labels_of(rows) == {png(k): k % 2 for k in range(4)}


def test_a_text_that_is_no_class_is_no_label_unless_it_is_named_so(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    members = [("a/0.png", png(0)), ("a/0.label", b"0 0 1\n1 1 0\n"), ("b/1.png", png(1)), ("b/1.label", b"7")]
    manifest, rows = prepared(pack(tmp_path / "s/a.tar", members))
    assert (manifest.classes, labels_of(rows)) == (["a", "b"], {png(0): 0, png(1): 1})
    assert manifest.passed_over == {"members *.label beside images": 2}
    with pytest.raises(ValueError, match=r"a.tar: a/0.label contains no class; it must be a number or a name"):
        prepared(tmp_path / "s", labels="member:label")


def test_labels_of_the_folders_can_be_asked_for(png: Png, prepared: Callable, tmp_path: Path) -> None:
    members = [(f"{folder}/{name}", png(i) if name == "0.png" else b"7") for i, folder in enumerate("ab")
               for name in ("0.png", "0.cls")]  # fmt: skip
    source = pack(tmp_path / "s/a.tar", members)
    assert prepared(source)[0].classes == [str(i) for i in range(8)]
    manifest, _ = prepared(source, out="folder", labels="folder")
    assert manifest.classes == ["a", "b"]
    assert manifest.label_candidates == ["member:cls"]


def test_missing_labels_are_refused_unless_the_member_is_named(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = pack(tmp_path / "s/a.tar", [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1))])
    with pytest.raises(ValueError, match=r"has a label and .* has none; label all, .*--labels member:cls"):
        prepared(source)
    manifest, rows = prepared(source, labels="member:cls")
    assert labels_of(rows) == {png(0): 0, png(1): None}
    assert manifest.num_unlabelled == {"train": 1}


def test_a_tar_without_labels_does_not_take_its_folders_for_those_of_the_others(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    pack(tmp_path / "s/0.tar", [("a/0.png", png(0)), ("a/0.cls", b"0")])
    pack(tmp_path / "s/1.tar", [("b/1.png", png(1))])
    with pytest.raises(ValueError, match=r"have labels beside their images, and the one of 1.tar/b/1.png has none"):
        prepared(tmp_path / "s")
