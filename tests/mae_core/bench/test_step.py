"""A measurement compares equals, says so, and gives what is promised."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from mae_core.bench import timing, variants
from mae_core.bench.__main__ import main
from mae_core.bench.config import StepConfig
from mae_core.bench.step import measure, table

TINY = StepConfig(
    model=("vit_pico_patch4",), image_px=16, batch=4, decoder_depth=1, decoder_width=32, decoder_heads=4, rounds=6
)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(timing, "_CPU_SIDES", (64,))


@pytest.mark.slow
def test_measure_yields_consistent_values_per_model_and_a_table():
    found = list(measure(dataclasses.replace(TINY, model=("vit_pico_patch4", "vit_pico_patch8"))))
    assert [f["model"] for f in found] == ["vit_pico_patch4", "vit_pico_patch8"]
    for values in found:
        assert json.loads(json.dumps(values)).keys() == values.keys()
        assert values["peak_memory_bytes"] is None
        assert values["contenders"].keys() == {"ours", "plain", "transformers"}
        for name in ("plain", "transformers"):
            rates = [values["contenders"][c]["images_per_s"] for c in ("ours", name)]
            assert values[f"ratio_vs_{name}"] == pytest.approx(rates[0] / rates[1])
            assert values[f"ratio_vs_{name}_interval"][0] <= values[f"ratio_vs_{name}_interval"][1]
        assert values["flops_ratio"] > 1
        assert values["mfu"] == pytest.approx(values["flop_per_s"] / values["matmul_flop_per_s"])
        assert values["flop_per_s"] == pytest.approx(values["images_per_s"] * values["flops_per_image"])
        losses = [values["contenders"][c]["first_loss"] for c in ("ours", "plain")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert "vit_pico_patch" in table(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"precision": "bfloat16", "plain_precision": "float32"},
        {"decoder_attention": "cross", "predicted_share": 0.3, "masks_per_image": 2},
        {"attention": "math", "optimizer": "foreach", "clock": "cpu", "steps_per_round": 2},
    ],
)
def test_every_step_setting_runs(fields):
    (found,) = measure(dataclasses.replace(TINY, against=("plain",), **fields))
    assert found["ratio_vs_transformers"] is None
    assert found["ratio_vs_plain"] > 0
    assert found["setting"].items() >= fields.items()


@pytest.mark.slow
def test_the_profile_ranks_operations_by_share_of_the_step():
    (found,) = measure(dataclasses.replace(TINY, against=(), profile=4))
    shares = [entry["share"] for entry in found["profile"]]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert f"{shares[0]:.1%}  {found['profile'][0]['operation']}" in table(found)


def test_a_loss_that_differs_from_the_plain_one_is_refused(monkeypatch):
    real = variants.plain_loss
    monkeypatch.setattr(variants, "plain_loss", lambda *given: 1.001 * real(*given))
    with pytest.raises(RuntimeError, match="differs from the plain"):
        list(measure(TINY))


def test_without_transformers_its_ratio_is_none(monkeypatch):
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    (found,) = measure(TINY)
    assert found["ratio_vs_transformers"] is found["ratio_vs_transformers_interval"] is None


def test_a_folder_of_images_becomes_the_input_batch(tmp_path):
    for shade in (0, 255):
        Image.new("RGB", (20, 30), (shade,) * 3).save(tmp_path / f"{shade}.png")
    images = variants.input_images(dataclasses.replace(TINY, images=str(tmp_path)), torch.device("cpu"))
    assert images.shape == (4, 3, 16, 16)
    assert (images[0] < images[1]).all()
    assert torch.equal(images[:2], images[2:])
    with pytest.raises(ValueError, match=r"has no \.jpg"):
        variants.input_images(dataclasses.replace(TINY, images=str(tmp_path / "none")), torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rounds": 5}, "try 6 or more"),
        ({"steps_per_round": 0}, "try 1"),
        ({"batch": 10, "masks_per_image": 4}, "try 8"),
        ({"model": ()}, "try --model vit_small_patch8"),
        ({"image_px": 60}, "image side 60px is not a multiple of patch 8px; try 64px"),
        ({"clock": "cpu", "device": "cuda"}, "try --clock wall"),
    ],
)
def test_step_settings_that_cannot_be_measured_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        StepConfig(**fields)


SIZES = "--model vit_pico_patch4 --image-px 16 --batch 4 --decoder-depth 1 --decoder-width 32 --decoder-heads 4"
# What timm itself needs (torchvision, huggingface_hub with yaml) is there on a GPU host too.
BARE = """
import sys
for absent in ("ray", "mlflow", "pydantic", "tyro", "pyarrow", "boto3", "pipelines", "transformers"):
    sys.modules[absent] = None
from mae_core.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_bench_module_runs_without_the_pipeline_extra():
    words = [*SIZES.split(), "--json", "--rounds", "6", "--against", "plain"]
    done = subprocess.run([sys.executable, "-c", BARE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio_vs_plain"] > 0


@pytest.mark.slow
def test_the_bench_module_prints_a_line_of_json_or_a_table(capsys):
    assert main([*SIZES.split(), "--rounds", "6", "--against", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["against"] == ["plain"]
    assert main([*SIZES.split(), "--rounds", "6", "--against"]) == 0
    assert "vit_pico_patch4 at 16 px, batch 4" in capsys.readouterr().out


def test_the_bench_module_explains_its_flags_and_refuses_in_a_sentence(capsys):
    assert main([*SIZES.split(), "--rounds", "2"]) == 2
    assert capsys.readouterr().err == "mae_core.bench: rounds 2 give no 95 % interval; try 6 or more\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Share of patches that are hidden. [0.75]" in shown
    assert "Precision" not in shown
