"""Order does not depend on how much fits into memory."""

import random
from pathlib import Path

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
