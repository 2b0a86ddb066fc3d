"""Which copy stays depends on splits and places alone, not on how many digests are compared at a time."""

import gzip
import hashlib
import io
import random

import pytest

from pipelines.prepare.duplicates import duplicates, relabelled
from pipelines.prepare.shards import content_digest
from pipelines.prepare.summaries import DIGEST_BYTES, SliceSummary


@pytest.mark.parametrize("images_per_pass", [1, 7, 1000])
def test_all_but_the_first_of_the_best_split_are_duplicates(images_per_pass: int) -> None:
    draw = random.Random(0)
    summaries, placed = [], []
    for number in range(5):
        summary = SliceSummary(number=number, num_entries=20)
        for place in range(20):
            content, split = draw.randrange(30), draw.choice(["train", "val", "test", None])
            summary.note(split, hashlib.sha256(bytes([content])).digest()[:DIGEST_BYTES] if split else bytes(16))
            if split:
                placed.append((content, ["test", "val", "train"].index(split), number, place))
        summaries.append(summary)
    first = {}
    for content, _rank, number, place in sorted(placed):
        first.setdefault(content, (number, place))
    expected = {(number, place) for _, _, number, place in placed} - set(first.values())
    found = duplicates(lambda: summaries, 100, images_per_pass)
    kept = {(number, place): twin for number, places in found.items() for place, twin in places.items()}
    assert set(kept) == expected
    of_place = {(number, place): content for content, _, number, place in placed}
    assert kept == {place: first[of_place[place]] for place in expected}
    labels = [[random.Random(number).randrange(-1, 3) for _ in range(20)] for number in range(5)]
    other = relabelled(found, labels.__getitem__)
    assert other == [
        ((n, i), first[of_place[n, i]]) for n, i in sorted(expected) for k, j in [first[of_place[n, i]]]
        if labels[n][i] not in (-1, labels[k][j])
    ]  # fmt: skip
    assert 0 < len(other) < len(expected)


def test_gzip_of_equal_content_is_equal_whatever_its_header() -> None:
    def digest(content: bytes) -> bytes:
        return content_digest(content, hashlib.sha256(content).digest())

    packed = gzip.compress(b"a volume", mtime=1)
    named = io.BytesIO()
    with gzip.GzipFile("x.nii", "wb", fileobj=named, mtime=2) as file:
        file.write(b"a volume")
    # A header with every optional field: extra, name, comment and checksum.
    header = packed[:3] + bytes([30]) + packed[4:10] + b"\2\0ab" + b"name\0comment\0" + b"\1\2"
    assert digest(packed) == digest(named.getvalue()) == digest(header + packed[10:])
    assert digest(packed) != digest(gzip.compress(b"another", mtime=1))
    for content in (b"\x1f\x8b\x08\x08no end of the name", b"\xff\xd8\xff"):
        assert digest(content) == hashlib.sha256(content).digest()[:16]
