"""The table is aligned and marks the best; the best preset is one that pretraining takes."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig, PretrainConfig, load_preset, to_dict, with_overrides
from tune.results import best_of, measured_points
from tune.summary import preset_of, report, table

ENTRIES: list[dict[str, Any]] = [
    {
        "key": f"key{i}",
        "point": {"model.mask.ratio": ratio, "model.decoder_depth": depth},
        "visible": visible,
        "patches": 49,
        "probe": probe,
        "finetune": finetune,
        "loss": 0.5,
        "duration_s": 90.0,
        "error": "",
    }
    for i, (ratio, depth, visible, probe, finetune) in enumerate(
        [(0.5, 1, 24, 60.0, 80.0), (0.75, 1, 12, 70.25, 80.0), (0.75, 12, 12, 65.0, 7.5)]
    )
]
FAILED = ENTRIES[0] | {
    "point": {"model.mask.ratio": 0.9, "model.decoder_depth": 1},
    "key": "failed",
    "probe": None,
    "finetune": None,
    "loss": None,
    "error": "loss is nan",
}


def test_the_best_is_chosen_by_the_measure_and_the_other_breaks_ties() -> None:
    assert best_of(ENTRIES, "finetune")["key"] == "key1"
    assert best_of(ENTRIES[::2], "probe")["key"] == "key2"
    assert best_of([FAILED, ENTRIES[2]], "probe")["key"] == "key2"
    with pytest.raises(ValueError, match="no trial has finished"):
        best_of([FAILED], "probe")


def test_the_table_is_aligned_with_one_row_a_trial_and_one_mark() -> None:
    lines = table([*ENTRIES, FAILED], "key1").splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["ratio", "decoder_depth", "visible", "probe", "fine-tuned", "loss", "minutes"]
    assert lines[2].split() == ["*", "0.75", "1", "12/49", "70.25", "80.00", "0.5000", "1.5"]
    assert [line.startswith("*") for line in lines] == [False, False, True, False, False]
    assert len({line.index("/49") for line in lines[1:]}) == 1
    assert len({len(line) for line in lines[:4]}) == 1
    assert "failed" in lines[4]


def test_with_seeds_a_row_is_a_point_and_the_baseline_has_its_own() -> None:
    scratch = ENTRIES[0] | {"point": {}, "kind": "scratch", "visible": None, "patches": None, "loss": None}
    entries = [*ENTRIES, *(entry | {"seed": 1, "probe": entry["probe"] + 1} for entry in ENTRIES), scratch]
    lines = table(entries, "key1").splitlines()
    assert lines[0].split()[2:4] == ["visible", "seeds"]
    assert "12/49" in lines[2]
    assert "70.75 ± 6.35" in lines[2]
    assert lines[4].split()[:2] == ["scratch", "1"]
    assert len(lines) == 5


def test_fields_that_end_alike_keep_what_tells_them_apart() -> None:
    entry = ENTRIES[0] | {"point": {"seed": 1, "optim.name": "adamw", "model.mask.kind": "grid"}}
    assert table([entry], "").splitlines()[0].split()[:3] == ["seed", "name", "kind"]
    entry = ENTRIES[0] | {"point": {"augment.scale": [0.2, 1.0], "scale": 1}}
    assert table([entry], "").splitlines()[0].split()[0] == "augment.scale"


def test_the_report_names_failures_and_the_next_command() -> None:
    result = {
        "trials": [*ENTRIES, FAILED],
        "best_key": "key1",
        "select_by": "finetune",
        "probe_test": 69.0,
        "finetune_test": 79.0,
        "model": "models:/mae-x/3",
        "figure": "",
        "best_preset": "/a b/best.yaml",
    }
    text = report(result)
    assert "failed: model.mask.ratio=0.9, model.decoder_depth=1: loss is nan" in text
    assert "probe 69.00, fine-tuned 79.00" in text
    assert text.endswith("next: mae pretrain --preset '/a b/best.yaml'")
    assert "test accuracy" not in report(result | {"probe_test": None, "finetune_test": None})


def test_the_best_preset_loads_as_the_winning_config(tmp_path: Path) -> None:
    base = PretrainConfig(epochs=50, data=DataConfig(uri="s3://bucket/data set"))
    config = with_overrides(base, ENTRIES[1]["point"] | {"optim.base_lr": 1e-5})
    path = tmp_path / "best.yaml"
    path.write_bytes(preset_of(config, "my-sweep", measured_points(ENTRIES)[1], {"probe": 69.0, "finetune": 79.0}))
    assert load_preset(PretrainConfig, str(path)) == config
    assert to_dict(load_preset(PretrainConfig, str(path)))["model"]["mask"]["ratio"] == 0.75
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "mae pretrain --preset best.yaml" in header[1]
    assert "val: probe 70.25, fine-tuned 80.00; on test: probe 69.00" in header[3]
