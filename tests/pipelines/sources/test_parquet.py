"""A damaged Parquet file is named before or while it is read, or its images are accounted for; nothing else happens."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Png = Callable[[int], bytes]


def packed(png: Png, compression: str = "zstd") -> bytes:
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(40)]
    table = pa.table({"image": images, "label": [str(number % 2) for number in range(40)]})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=10, compression=compression)
    return file.getvalue()


def damaged(content: bytes, chance: random.Random) -> bytes:
    found, at = bytearray(content), chance.randrange(len(content))
    kind = chance.choice(["cut", "zeros", "flips", "moved"])
    if kind == "cut":
        return content[:at]
    if kind == "zeros":
        found[at : at + 200] = bytes(len(found[at : at + 200]))
    elif kind == "flips":
        for _ in range(chance.choice([1, 5, 50])):
            found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    else:
        found[at : at + 100], found[-300:-200] = found[-300:-200], found[at : at + 100]
    return bytes(found)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_however_it_is_damaged_it_is_named_or_counts_reconcile(
    compression: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    whole, seed = packed(png, compression), random.SystemRandom().randrange(2**32)
    chance, num_named = random.Random(seed), 0
    (tmp_path / "s").mkdir()
    for round_ in range(40):
        (tmp_path / "s/a.parquet").write_bytes(damaged(whole, chance))
        said = ""
        try:
            manifest, _ = prepared(tmp_path / "s", out=f"out{round_}", max_bad=1)
            assert manifest.num_found == manifest.num_ok + manifest.num_quarantined + manifest.num_duplicates
        except ValueError as error:
            said = str(error)
        if said:
            assert str(tmp_path / "s") in said, f"seed {seed}, round {round_}: {said}"
            assert not (tmp_path / f"out{round_}/manifest.json").exists()
            num_named += 1
    assert num_named > 10, f"seed {seed}"


def test_a_file_that_was_copied_again_is_gone_on_with(png: Png, prepared: Callable, tmp_path: Path) -> None:
    whole = packed(png, "none")
    at = whole.index(png(25)) - 30
    (tmp_path / "s").mkdir()
    path = tmp_path / "s/a.parquet"
    path.write_bytes(whole[:at] + bytes(30) + whole[at + 30 :])
    with pytest.raises(ValueError, match=r"/a.parquet is not an intact Parquet file \(.*\); copy it again"):
        prepared(tmp_path / "s")
    assert not (tmp_path / "out/manifest.json").exists()
    path.write_bytes(whole)
    os.utime(path, ns=(0, 10**18))
    manifest, rows = prepared(tmp_path / "s")
    assert [row["image"] for row in rows["train"]] == [png(number) for number in range(40)]
    assert (manifest.num_found, manifest.num_ok) == (40, 40)


def test_rows_that_are_only_claimed_are_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    """Two million rows of nothing, in a few hundred bytes."""
    (tmp_path / "s").mkdir()
    column = pa.array([None], pa.binary()).take(pa.array([0] * 2_000_000))
    pq.write_table(pa.table({"image": column}), tmp_path / "s/a.parquet", row_group_size=2_000_000)
    assert (tmp_path / "s/a.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a.parquet is damaged \(row group 0\)"):
        prepared(tmp_path / "s")


def test_an_image_larger_than_any_is_quarantined(
    png: Png, prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sources.table_files.MAX_IMAGE_BYTES", 1000)
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"image": [png(0), b"x" * 1001, None]}), tmp_path / "s/a.parquet")
    manifest, _ = prepared(tmp_path / "s", max_bad=1)
    assert manifest.quarantine_reasons == {"empty row": 1, "too many bytes": 1}
