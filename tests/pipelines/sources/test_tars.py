"""What a tar file has beside plain files is read, quarantined or refused; none of it is passed over."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Png = Callable[[int], bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, link, size
    return found


def test_links_within_are_followed_and_what_is_no_file_is_quarantined(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s/a.tar", "w") as tar:
        for number in range(3):
            tar.addfile(member(f"d/{number}.png", size=len(png(number))), io.BytesIO(png(number)))
        tar.addfile(member("d/hard.png", tarfile.LNKTYPE, "d/1.png"))
        tar.addfile(member("e/soft.png", tarfile.SYMTYPE, "../d/2.png"))
        tar.addfile(member("e/gone.png", tarfile.SYMTYPE, "absent.png"))
        tar.addfile(member("e/out.png", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(member("e/loop.png", tarfile.SYMTYPE, "loop.png"))
        tar.addfile(member("e/pipe.png", tarfile.FIFOTYPE))
        tar.addfile(member("e/device.png", tarfile.CHRTYPE))
        tar.addfile(member("e/folder.png", tarfile.DIRTYPE))
    manifest, rows = prepared(tmp_path / "s", max_bad=1)
    assert sorted(row["image"] for row in rows["train"]) == sorted(map(png, range(3)))
    assert manifest.quarantine_reasons == {"broken link": 3, "no regular file": 2}
    assert (manifest.num_found, manifest.num_ok, manifest.num_duplicates) == (10, 3, 2)


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_header_that_would_fill_memory_is_refused(layout: int, png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s/a.tar", "w", format=layout) as tar:
        tar.addfile(member("d/1.png", size=len(png(1))), io.BytesIO(png(1)))
        tar.addfile(member("x" * 2_000_000 + ".png", size=len(png(2))), io.BytesIO(png(2)))
    with pytest.raises(ValueError, match=r"a.tar is truncated or damaged"):
        prepared(tmp_path / "s")
