"""Which copy stays depends on splits and places alone, not on how many digests are compared at a time."""

import hashlib
import random

import pytest

from pipelines.prepare.duplicates import duplicates
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
    assert {(number, place) for number, places in found.items() for place in places} == expected
