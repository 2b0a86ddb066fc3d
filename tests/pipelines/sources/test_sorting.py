"""Order does not depend on how much fits into memory."""

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import sorting
from pipelines.sources.entry import SPLITS, Entry
from pipelines.sources.sorting import SortedEntries


@pytest.mark.parametrize("run_entries", [3, 7, 1000])
def test_entries_are_sorted_by_split_and_name_however_few_fit(
    run_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "_MAX_RUNS", 4)
    made = [Entry(f"{i}\n\udcff", f"{i}.tar", offset=i, split=("", *SPLITS)[i % 4]) for i in range(100)]
    shuffled = random.Random(0).sample(made, len(made))
    entries = SortedEntries(iter(shuffled), run_entries)
    expected = sorted(made, key=lambda entry: (("", *SPLITS).index(entry.split), entry.name))
    assert list(entries) == expected
    assert list(entries) == expected
    folder = Path(entries._folder.name)
    entries.close()
    assert not folder.exists()


@pytest.mark.parametrize("run_entries", [7, 1000])
def test_images_that_are_files_are_mixed_alike_whatever_the_listing(run_entries: int) -> None:
    made = [Entry(f"{i // 100}/{i}\udcff.png", f"{i // 100}/{i}\udcff.png", label=str(i // 100)) for i in range(1000)]
    with closing(SortedEntries(made, run_entries)) as first, closing(SortedEntries(made[::-1])) as second:
        found = list(first)
        assert found == list(second)
    assert sorted(found, key=lambda entry: made.index(entry)) == made
    ranks = np.array([made.index(entry) for entry in found])
    assert abs(np.corrcoef(np.arange(1000), ranks)[0, 1]) < 0.1
    # Of ten classes, one tenth each: a run of 100 that is drawn at random holds all of them.
    assert all(len({entry.label for entry in found[start : start + 100]}) == 10 for start in range(0, 1000, 100))


def test_images_within_files_keep_their_place() -> None:
    for where in (Entry("", "", offset=0), Entry("", "", group=0)):
        made = [replace(where, name=f"{i:03d}.png", path="a") for i in range(300)]
        with closing(SortedEntries(made[::-1])) as entries:
            assert list(entries) == made
