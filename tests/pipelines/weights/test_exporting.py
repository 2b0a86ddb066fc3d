"""`mae export`: what is written loads elsewhere by the printed line, holds the same bits and computes the same."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoImageProcessor

from mae_core.augment import pixels_to_input
from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, ModelConfig, parse_arch
from mae_core.errors import UserError
from mae_core.formats import fair, transformers
from mae_core.formats.configs import timm_arguments, timm_name
from mae_core.formats.reading import read_checkpoint
from mae_core.masking import mask_from_noise
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.plain import plain_predict
from mae_core.pretrained import load_classifier, load_mae
from mae_core.state import model_tensors, pack
from pipelines.config import ExportConfig, ImportConfig
from pipelines.images.decode import evaluation_view
from pipelines.storage import open_storage
from pipelines.weights.exporting import export_model
from pipelines.weights.importing import import_weights
from pipelines.worker.export import backbone_files, classifier_files
from tests.new_mlflow import new_mlflow
from tests.pipelines.weights.checks import (
    assert_equal_to_rounding,
    assert_identical,
    check_encoder,
    exported,
    images_of,
    run_line,
    session_run,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NORMALIZATION = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
PICO = ModelConfig(arch="vit_pico_patch7", image_px=(28, 28), decoder_width=32, decoder_depth=2, decoder_heads=4)
WIDE = dataclasses.replace(PICO, image_px=(28, 42), channels=1, norm_eps=1e-12)
"""Neither square, nor of three channels, nor with timm's epsilon."""
CLASSES = ("cat", "dog", "cow")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    return tmp_path


def randomize(module: nn.Module) -> None:
    """Give every tensor values of its own, of a size that keeps all layers at work."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.normal_(std=0.05, generator=random)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)


def normalization_of(channels: int) -> Normalization:
    return Normalization(mean=NORMALIZATION.mean[:channels], std=NORMALIZATION.std[:channels])


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def backbone(folder: Path, config: ModelConfig = PICO) -> Path:
    mae = build_mae(config, seed=0)
    randomize(mae)
    return write(folder, backbone_files(config, normalization_of(config.channels), pack(model_tensors(mae))))


def classifier(folder: Path, pool: Any = "token", config: ModelConfig = PICO) -> Path:
    classify = ClassifierConfig(pool=pool)
    arch = parse_arch(config.arch)
    vit = build_classifier(arch, config.image_px, config.channels, len(CLASSES), classify, config.norm_eps)
    randomize(vit)
    files = classifier_files(
        model_tensors(vit),
        classify,
        arch=config.arch,
        image_px=config.image_px,
        channels=config.channels,
        classes=CLASSES,
        norm_eps=config.norm_eps,
        pixels=normalization_of(config.channels),
    )
    return write(folder, files)


@torch.inference_mode()
def check_classifier(folder: Path, naming: str) -> None:
    """Check that the classifier loaded by the printed line computes the same logits as ours."""
    names, ours = run_line(exported(folder, naming, "classifier")["load"]), load_classifier(folder)
    run: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "timm": lambda: names["model"],
        "transformers": lambda: lambda x: names["model"](x).logits,
        "onnx": lambda: session_run(names["session"]),
        "torch": lambda: names["model"],
    }
    images = torch.randn(3, ours.channels, *ours.image_px)
    expected = ours.vit(images)
    assert expected.std() > 1e-3, "classes differ, so that a wrong order would show"
    assert_equal_to_rounding(run[naming]()(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PICO, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("naming", ["timm", "transformers", "onnx", "torch"])
def test_an_encoder_computes_the_same_elsewhere(place: Path, naming: str, config: ModelConfig) -> None:
    check_encoder(backbone(place / "backbone", config), naming)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("naming", ["timm", "transformers", "onnx", "torch"])
def test_a_classifier_computes_the_same_elsewhere(place: Path, naming: str, pool: str) -> None:
    folder = classifier(place / "classifier", pool, WIDE if naming == "timm" else PICO)
    if (naming, pool) == ("transformers", "avg"):
        with pytest.raises(UserError, match=r"mean of the patch tokens \(fc_norm\).*export to timm"):
            exported(folder, naming)
        assert not Path("out").exists()
        return
    check_classifier(folder, naming)


@pytest.mark.slow
@torch.inference_mode()
def test_transformers_predicts_the_patches_that_we_predict(place: Path) -> None:
    folder = backbone(place / "backbone")
    model, (mae, _) = run_line(exported(folder, "transformers")["load"])["model"], load_mae(folder)
    images, noise = images_of(PICO), torch.rand(3, PICO.num_patches)
    expected = plain_predict(mae, images, mask_from_noise(noise, PICO.num_visible))
    found = model(images, noise=noise)
    assert_equal_to_rounding(found.logits, expected)
    assert_equal_to_rounding(found.loss, mae(images, mask_from_noise(noise, PICO.num_visible)).mean())


def test_a_mae_comes_back_bit_for_bit(place: Path) -> None:
    folder = backbone(place / "backbone")
    ours = model_tensors(load_mae(folder)[0])
    exported(folder, "transformers", out="a")
    assert_identical(transformers.to_ours(read_checkpoint(Path("a/model.safetensors")).tensors), ours)
    tensors = run_line(exported(folder, "fair", out="b")["load"])["tensors"]
    assert_identical(fair.to_ours(tensors), ours)
    assert {"mask_token", "decoder_blocks.1.attn.qkv.weight"} < tensors.keys()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_comes_back_bit_for_bit(place: Path, pool: str) -> None:
    folder = classifier(place / "classifier", pool)
    ours = model_tensors(load_classifier(folder).vit)
    assert_identical(fair.to_ours(run_line(exported(folder, "fair", out="a")["load"])["tensors"]), ours)
    assert_identical(model_tensors(run_line(exported(folder, "timm", out="b")["load"])["model"]), ours)


def test_the_references_encoder_is_timms(place: Path) -> None:
    """The reference's models_vit is a subclass of timm's VisionTransformer."""
    folder = backbone(place / "backbone")
    outcome = exported(folder, "fair", "encoder")
    vit = timm.models.VisionTransformer(
        img_size=28, patch_size=7, embed_dim=64, depth=4, num_heads=4, num_classes=0, global_pool="token"
    )
    vit.load_state_dict(run_line(outcome["load"])["tensors"])
    assert "models_vit.VisionTransformer(img_size=28, patch_size=7" in Path("out/README.md").read_text()


def test_timm_reads_the_folder_as_one_of_its_hub(place: Path) -> None:
    folder = classifier(place / "classifier", "avg")
    exported(folder, "timm")
    model: Any = timm.create_model(f"local-dir:{place / 'out'}", pretrained=True)
    assert_identical(model_tensors(model), model_tensors(load_classifier(folder).vit))
    assert model.pretrained_cfg["mean"] == list(NORMALIZATION.mean)


def test_timm_and_transformers_preprocess_as_evaluation_does(place: Path) -> None:
    """Both resize before they crop, and round in between: a pixel differs by little."""
    folder = backbone(place / "backbone", dataclasses.replace(PICO, image_px=(56, 56)))
    gradient = np.linspace(0, 255, 150 * 100 * 3).reshape(100, 150, 3)
    photo = (gradient + np.random.default_rng(0).integers(0, 40, gradient.shape)).clip(0, 255).astype(np.uint8)
    view = torch.from_numpy(evaluation_view(photo, (56, 56)))[None]
    expected = pixels_to_input(view, NORMALIZATION)
    model = run_line(exported(folder, "timm", out="a")["load"])["model"]
    transform: Any = create_transform(**resolve_model_data_config(model))
    exported(folder, "transformers", out="b")
    processor = AutoImageProcessor.from_pretrained("b")
    of_timm = transform(Image.fromarray(photo))[None]
    of_transformers = processor(images=Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    for found in (of_timm, of_transformers):
        assert found.shape == expected.shape
        assert (found - expected).abs().mean() < 0.03


def test_class_names_travel(place: Path) -> None:
    folder = classifier(place / "classifier")
    assert run_line(exported(folder, "transformers", out="a")["load"])["model"].config.id2label == dict(
        enumerate(CLASSES)
    )
    exported(folder, "timm", out="b")
    assert json.loads(Path("b/config.json").read_text())["label_names"] == list(CLASSES)


@pytest.mark.parametrize(
    ("changes", "naming", "message"),
    [
        ({"decoder_attention": "cross"}, "transformers", r"decoder_attention cross.*self-attention; export --part"),
        ({"mask_token_in": "encoder"}, "fair", r"mask_token_in encoder, but the reference.*export --part encoder"),
        ({"image_px": (28, 42)}, "transformers", r"square images, but this model 28 x 42 px; export its encoder"),
    ],
)
def test_a_decoder_that_the_format_cannot_hold_is_refused_and_its_encoder_is_not(
    place: Path, changes: dict[str, Any], naming: str, message: str
) -> None:
    folder = backbone(place / "backbone", dataclasses.replace(PICO, **changes))
    with pytest.raises(UserError, match=message):
        exported(folder, naming)
    assert not Path("out").exists()
    assert exported(folder, naming, "encoder")["notes"][0] == "The decoder is left out."


@pytest.mark.parametrize(
    ("source", "part", "message"),
    [
        ("backbone", "classifier", r"is a backbone, which has no classes; train a classifier"),
        ("classifier", "encoder", r"is a classifier.*export it whole"),
        ("nothing", "whole", r"nothing has no config\.json; give models:/NAME@ALIAS"),
        ("foreign", "whole", r"foreign is no export of this project.*`mae import`"),
    ],
)
def test_a_source_without_that_part_is_refused(place: Path, source: str, part: str, message: str) -> None:
    backbone(place / "backbone")
    classifier(place / "classifier")
    write(place / "foreign", {"config.json": b'{"model_type": "vit"}'})
    with pytest.raises(UserError, match=message):
        exported(source, "timm", part)


def test_a_folder_that_is_not_empty_is_refused(place: Path) -> None:
    folder = backbone(place / "backbone")
    write(place / "out", {".hidden": b""})
    with pytest.raises(UserError, match=r"out is not empty; choose a new or empty folder"):
        exported(folder, "timm")


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["onnx", "torch"])
@torch.inference_mode()
def test_a_program_of_dynamic_size_interpolates_positions_as_timm_does(place: Path, naming: str) -> None:
    """Sizes are smaller, larger, square, and with as many patches as the model's own but in another grid."""
    folder = classifier(place / "classifier", "avg")
    config = ExportConfig(format="onnx" if naming == "onnx" else "torch", dynamic_size=True)
    outcome = export_model(str(folder), "out", config)
    names, ours = run_line(outcome["load"]), load_classifier(folder)
    run = session_run(names["session"]) if naming == "onnx" else names["model"]
    arguments = timm_arguments(PICO, num_classes=len(CLASSES), pool="avg")
    theirs = timm.create_model(timm_name(PICO), **arguments, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.vit.state_dict())
    for batch, height_px, width_px in ((1, 28, 28), (2, 14, 56), (5, 14, 14), (1, 49, 49), (2, 21, 70)):
        images = torch.randn(batch, 3, height_px, width_px)
        assert_equal_to_rounding(run(images), theirs(images))
    assert any("multiples of 7 px, at least 14 px" in note for note in outcome["notes"])


def test_a_dynamic_size_is_refused_for_formats_that_are_no_programs() -> None:
    with pytest.raises(UserError, match=r"for the formats onnx and torch, not timm; leave it out"):
        ExportConfig(format="timm", dynamic_size=True)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_what_onnx_needs_is_named_with_the_command_that_installs_it(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.weights.programs.find_spec", lambda module: None if module == name else object())
    with pytest.raises(UserError, match=rf"ONNX needs {name}, which is not installed; run pip install onnx"):
        exported(backbone(place / "backbone"), "onnx")


@pytest.mark.slow
def test_onnx_states_its_opset_and_a_dynamic_batch(place: Path) -> None:
    import onnx

    outcome = exported(backbone(place / "backbone"), "onnx")
    model = onnx.load("out/model.onnx")
    onnx.checker.check_model(model, full_check=True)
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    assert (dimensions[0].dim_param, dimensions[1].dim_value) == ("batch", 3)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    assert outcome["files"] == ["model.onnx", "provenance.json", "README.md"]
    assert any("Opset 20" in note for note in outcome["notes"])


def test_the_card_of_a_version_says_where_it_comes_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import main
    from pipelines.registry import open_tracking, register_classifier

    torch.save({"model": fair.from_ours(model_tensors(build_mae(PICO, seed=0)))}, "mae.pth")
    version = import_weights(
        "mae.pth",
        ImportConfig(name="mae-official", licence="CC-BY-NC-4.0", origin="https://example.org", decoder_heads=4),
    )["model"]
    tracking = open_tracking("mae")
    run = tracking.run("tuned", "finetune", {"epochs": 3, "optim": {"base_lr": 0.1}, "output": "secret/place"})
    run.log_points([("val/top1", 0.75, 1, 1), ("images_per_s", 9.0, 1, 1)])
    run.set_tags({"mae.dataset_digest": "d1635t"})
    files: dict[str, bytes | Path] = {p.name: p for p in classifier(place / "classifier").iterdir()}
    files["reconstructions.png"] = b"a picture"
    ref = register_classifier(run, files, tracking.resolve(version))
    run.finish()
    with pytest.raises(SystemExit) as stop:
        main(["export", f"models:/{ref.name}@candidate", "out", "--format", "timm", "--json"])
    assert stop.value.code == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["model"] == ref.uri
    assert "model" in run_line(outcome["load"])
    card = Path("out/README.md").read_text()
    for said in (
        "CC-BY-NC-4.0",
        "https://example.org",
        "d1635t",
        "| val/top1 | 0.75 |",
        "| optim.base_lr | 0.1 |",
        "28 x 28 px, 3 channels",
        "0.4, 0.5, 0.6",
        "cat, dog, cow",
        f"model version {version}",
        "![masked, reconstruction, original](reconstructions.png)",
        outcome["load"].replace(str(place / "out"), "out"),
    ):
        assert said in card, said
    assert "secret" not in card
    assert str(place) not in card
    assert "model" in run_line(card.split("```python\n")[1].split("\n```")[0])
    assert "images_per_s" not in card
    assert Path("out/reconstructions.png").read_bytes() == b"a picture"


@pytest.mark.s3
def test_an_export_goes_from_s3_to_s3(place: Path, s3: str) -> None:
    storage = open_storage(f"{s3}/export")
    for path in backbone(place / "backbone").iterdir():
        storage.write(f"in/{path.name}", path.read_bytes())
    outcome = exported(storage.join("in"), "fair", out=storage.join("out"))
    written = sorted(name for name, _ in open_storage(storage.join("out")).list())
    assert written == ["README.md", "model.pth", "provenance.json"]
    assert "torch.load('out/model.pth'" in outcome["load"]


def test_a_complete_command_line_is_read() -> None:
    from pipelines.cli import parse

    call = parse(["export", "models:/a@candidate", "out", "--format", "onnx", "--part", "encoder"])
    assert call.arguments == ("models:/a@candidate", "out")
    assert call.config == ExportConfig(format="onnx", part="encoder")


def test_the_line_survives_a_quote_in_the_path(place: Path) -> None:
    assert "tensors" in run_line(exported(backbone(place / "backbone"), "fair", out='it\'s "mine"')["load"])
