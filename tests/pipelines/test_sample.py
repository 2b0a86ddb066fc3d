"""The sample that the package carries."""

from collections import Counter
from pathlib import Path

from pipelines import sample as package
from pipelines.sample import unpack


def test_it_is_balanced_small_and_has_its_licence_beside_it(sample: Path) -> None:
    counts = Counter((path.parts[-3], path.parts[-2]) for path in sample.rglob("*.png"))
    assert len(counts) == 20
    assert {counts[split, name] for split, name in counts if split == "train"} == {600}
    assert {counts[split, name] for split, name in counts if split == "test"} == {200}
    carried = [path for path in Path(package.__file__).parent.iterdir() if path.suffix in (".zip", ".txt")]
    assert sum(path.stat().st_size for path in carried) <= 5_000_000
    assert "Copyright (c) 2017 Zalando SE" in next(p for p in carried if "LICENSE" in p.name).read_text()


def test_unpacking_again_repairs_what_is_cut_short_and_leaves_the_rest(tmp_path: Path) -> None:
    assert unpack(tmp_path) == tmp_path
    damaged, other = sorted(tmp_path.rglob("*.png"))[:2]
    whole, stamp = damaged.read_bytes(), other.stat().st_mtime_ns
    damaged.write_bytes(whole[:10])
    unpack(tmp_path)
    assert damaged.read_bytes() == whole
    assert other.stat().st_mtime_ns == stamp
