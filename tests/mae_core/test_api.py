"""What `import mae_core` offers to other code."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_core
from mae_core.augment import pixels_to_input
from mae_core.encoder import export_tensors
from mae_core.state import model_tensors, pack

README = Path(__file__).parents[2] / "README.md"
CONFIG = mae_core.ModelConfig(
    arch="vit_pico_patch4", image_px=(16, 24), channels=1, decoder_depth=1, decoder_width=32, decoder_heads=4
)
NORMALIZATION = mae_core.Normalization(mean=(0.3,), std=(0.4,))


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    mae = mae_core.build_mae(CONFIG, seed=3)
    values = {"kind": "backbone", "model": asdict(CONFIG), "pixels": asdict(NORMALIZATION)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "encoder.safetensors").write_bytes(pack(export_tensors(mae.encoder)))
    (tmp_path / "mae.safetensors").write_bytes(pack(model_tensors(mae)))
    return tmp_path


def images(num: int) -> torch.Tensor:
    return torch.randint(0, 256, (num, 16, 24, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_every_public_name_is_there() -> None:
    for name in mae_core.__all__:
        assert getattr(mae_core, name) is not None
    assert set(mae_core.__all__) <= set(dir(mae_core))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="MaskedAutoEncoder"):
        _ = mae_core.MaskedAutoEncoder


def test_importing_the_package_its_configs_and_its_keys_does_not_load_torch() -> None:
    modules = "mae_core, mae_core.config, mae_core.errors, mae_core.randomness"
    code = f"import sys, {modules}; mae_core.MaskConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_paper_s_masks_leave_49_and_39_of_196_patches_visible() -> None:
    assert mae_core.random_masks((14, 14), 3).visible_ids.shape == (3, 49)
    assert mae_core.random_masks((14, 14), 3, ratio=0.8).visible_ids.shape == (3, 39)


def test_random_masks_depend_on_the_seed_alone() -> None:
    first, same, other = (mae_core.random_masks((14, 14), 2, seed=seed).visible_ids for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_loaded_encoder_embeds_as_the_model_that_was_exported(backbone: Path) -> None:
    encoder, mae = mae_core.load_encoder(backbone), mae_core.build_mae(CONFIG, seed=3).eval()
    with torch.inference_mode():
        tokens = mae_core.encode(mae.encoder, pixels_to_input(images(2), NORMALIZATION), None)
        assert torch.equal(encoder.tokens(images(2)), tokens)
        assert torch.equal(encoder(images(2)), tokens[:, 1:].mean(1))
        assert torch.equal(encoder(images(2), pool="token"), tokens[:, 0])
    assert (encoder.image_px, encoder.channels) == ((16, 24), 1)


def test_a_loaded_mae_reconstructs_as_the_model_that_was_exported(backbone: Path) -> None:
    mae, normalization = mae_core.load_mae(backbone)
    mask, inputs = mae_core.random_masks(CONFIG.grid, 2), pixels_to_input(images(2), normalization)
    _, restored = mae.reconstruct(inputs, mask)
    assert torch.equal(restored, mae_core.build_mae(CONFIG, seed=3).eval().reconstruct(inputs, mask)[1])


def test_a_loaded_classifier_gives_the_probabilities_of_its_classes(tmp_path: Path) -> None:
    config = mae_core.ClassifierConfig()
    torch.manual_seed(0)
    from mae_core.classifier import build_classifier

    vit = build_classifier(mae_core.parse_arch("vit_pico_patch4"), (16, 24), 1, 3, config).eval()
    values = {
        "kind": "classifier",
        "arch": "vit_pico_patch4",
        "image_px": [16, 24],
        "channels": 1,
        "classes": ["a", "b", "c"],
        "classifier": asdict(config),
        "pixels": asdict(NORMALIZATION),
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "classifier.safetensors").write_bytes(pack(model_tensors(vit)))
    classifier = mae_core.load_classifier(tmp_path)
    with torch.inference_mode():
        found = classifier(images(4))
        assert torch.equal(found, vit(pixels_to_input(images(4), NORMALIZATION)).softmax(1))
    assert classifier.classes == ("a", "b", "c")
    assert classifier.channels == 1


def test_a_folder_of_another_kind_is_refused_with_what_it_holds(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind 'backbone', not a classifier"):
        mae_core.load_classifier(backbone)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        mae_core.load_encoder(tmp_path / "nowhere")
    (backbone / "encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no encoder\.safetensors"):
        mae_core.load_encoder(backbone)


def test_options_that_a_config_lacks_have_their_defaults(backbone: Path) -> None:
    values = json.loads((backbone / "config.json").read_text())
    del values["model"]["mask"], values["model"]["target"]
    (backbone / "config.json").write_text(json.dumps(values))
    assert mae_core.load_encoder(backbone).config == CONFIG


def test_an_option_of_a_newer_version_is_refused_by_its_name(backbone: Path) -> None:
    values = json.loads((backbone / "config.json").read_text())
    values["model"]["newer"] = 1
    (backbone / "config.json").write_text(json.dumps(values))
    with pytest.raises(mae_core.UserError, match=r"does not know .*'newer'.*; use the version that wrote it"):
        mae_core.load_mae(backbone)


@pytest.mark.parametrize("name", ["config.json", "encoder.safetensors"])
def test_a_truncated_file_is_refused_by_its_name(backbone: Path, name: str) -> None:
    (backbone / name).write_bytes((backbone / name).read_bytes()[:-1])
    with pytest.raises(mae_core.UserError, match=rf"{re.escape(name)} is not .*; copy or download it again"):
        mae_core.load_encoder(backbone)


def test_images_of_another_size_are_refused_with_both_sizes(backbone: Path) -> None:
    encoder = mae_core.load_encoder(backbone)
    message = r"images are 24 x 16 x 1 \(height, width, channels\), but the model takes 16 x 24 x 1; resize"
    for use in (encoder, encoder.tokens):
        with pytest.raises(mae_core.UserError, match=message):
            use(images(2).transpose(1, 2))


@pytest.mark.slow
def test_the_readme_s_example_runs(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "export").symlink_to(backbone)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["embeddings"].shape == (2, 64)
