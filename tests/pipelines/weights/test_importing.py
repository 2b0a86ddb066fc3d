"""`mae import` of real files into a real sqlite MLflow, up to the classifier that is trained from them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from mae_core import load_classifier, load_encoder, load_mae
from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig
from mae_core.errors import UserError
from mae_core.formats import fair
from mae_core.model import build_mae
from mae_core.state import model_tensors
from pipelines.config import (
    ClassifyConfig,
    DataConfig,
    ExportConfig,
    ImportConfig,
    ReconstructConfig,
    from_dict,
)
from pipelines.registry import PROVENANCE, Provenance, open_tracking
from pipelines.storage import open_storage
from pipelines.weights.exporting import export_model
from pipelines.weights.importing import import_weights
from tests.mae_core.formats import pico
from tests.new_mlflow import new_mlflow

# SQLAlchemy 2.1 deprecates what MLflow 3.17 uses, on first use.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

CONFIG = ModelConfig(arch="vit_pico_patch7", image_px=(28, 28), decoder_width=32, decoder_depth=1, decoder_heads=2)
SIZES: dict[str, Any] = pico.SIZES | {"patch_size": 7}
LICENCE = {"licence": "CC-BY-NC-4.0", "origin": "https://example.org/mae"}


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its schema costs seconds."""
    return new_mlflow(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    return tmp_path


def imported(source: str, name: str, **options: Any) -> dict[str, Any]:
    return import_weights(source, from_dict(ImportConfig, {"name": name, **LICENCE, **options}))


def fetched(uri: str, folder: Path) -> Path:
    tracking = open_tracking("mae")
    tracking.fetch(tracking.resolve(uri), folder)
    return folder


def reference_file(path: Path, *, seed: int = 0, decoder: bool = True) -> dict[str, torch.Tensor]:
    """Write a checkpoint as the reference's script saves it, with random weights."""
    tensors = fair.from_ours(model_tensors(build_mae(CONFIG, seed=seed)))
    if not decoder:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("decoder_", "mask_token"))}
    torch.save({"model": tensors, "args": argparse.Namespace(norm_pix_loss=False), "epoch": 799}, path)
    return tensors


def test_a_checkpoint_with_decoder_becomes_a_version_that_reconstructs(place: Path) -> None:
    tensors = reference_file(place / "mae.pth")
    outcome = imported("mae.pth", "mae-full", decoder_heads=2)
    assert outcome["model"] == "models:/mae-full/1"
    assert outcome["what"] == "an MAE, encoder and decoder, of the reference"
    assert outcome["summary"] == "vit_pico_patch7 at 28 x 28 px, 3 channels, decoder 1 x 32"
    folder = fetched(outcome["model"], place / "version")
    mae, normalization = load_mae(folder)
    assert mae.config.target == "pixels"
    assert normalization.mean == (0.485, 0.456, 0.406)
    assert all(torch.equal(t, tensors[n]) for n, t in fair.from_ours(mae.state_dict()).items())
    assert torch.equal(load_encoder(folder).vit.state_dict()["norm.weight"], tensors["norm.weight"])


def test_the_same_import_twice_is_one_version_and_another_is_another(place: Path) -> None:
    reference_file(place / "mae.pth")
    first = imported("mae.pth", "mae-twice", decoder_heads=2)
    assert imported("mae.pth", "mae-twice", decoder_heads=2) == first
    (place / "mae.pth").rename(place / "renamed.pth")
    assert imported("renamed.pth", "mae-twice", decoder_heads=2)["model"] == first["model"]
    assert imported("renamed.pth", "mae-twice", decoder_heads=2, licence="MIT")["model"] == "models:/mae-twice/2"
    reference_file(place / "renamed.pth", seed=1)
    assert imported("renamed.pth", "mae-twice", decoder_heads=2)["model"] == "models:/mae-twice/3"
    assert open_tracking("mae").resolve("models:/mae-twice@candidate").version == 3


def test_an_encoder_alone_is_a_backbone_that_says_that_it_has_no_decoder(place: Path) -> None:
    from pipelines.pictures import reconstruct

    reference_file(place / "encoder.pth", decoder=False)
    outcome = imported("encoder.pth", "mae-encoder", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    assert outcome["summary"].endswith("no decoder")
    folder = fetched(outcome["model"], place / "version")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "encoder.safetensors"]
    assert load_encoder(folder).normalization.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"mae\.safetensors"):
        load_mae(folder)
    with pytest.raises(UserError, match=r"has no mae\.safetensors; a picture needs a backbone with its decoder"):
        reconstruct.run(ReconstructConfig(model=outcome["model"], uri="images"))


def test_a_folder_of_transformers_brings_its_epsilon_target_and_normalization(place: Path) -> None:
    decoder: dict[str, Any] = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    config = ViTMAEConfig(**SIZES, **decoder, decoder_intermediate_size=128, norm_pix_loss=True)
    ViTMAEForPreTraining(config).save_pretrained(place / "vitmae")
    (place / "vitmae" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    outcome = imported("vitmae", "mae-transformers")
    mae, normalization = load_mae(fetched(outcome["model"], place / "version"))
    assert (mae.config.norm_eps, mae.config.target, mae.config.decoder_heads) == (1e-12, "norm_pixels", 2)
    assert normalization.std == (0.4, 0.5, 0.6)


def test_a_classifier_of_transformers_has_its_class_names(place: Path) -> None:
    model = ViTForImageClassification(ViTConfig(**SIZES, id2label={0: "cat", 1: "dog", 2: "cow"})).eval()
    model.save_pretrained(place / "vit")
    outcome = imported("vit", "mae-vit-classifier")
    classifier = load_classifier(fetched(outcome["model"], place / "version"))
    assert (outcome["kind"], classifier.classes) == ("classifier", ("cat", "dog", "cow"))
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(classifier.vit(images), model(images).logits, rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_checkpoint_takes_class_names_from_a_file(place: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, global_pool="avg", **sizes)
    torch.save({"model": model.state_dict()}, place / "finetuned.pth")
    (place / "names.txt").write_text("cat\ndog\ncow\n")
    outcome = imported("finetuned.pth", "mae-finetuned", classes="names.txt")
    assert outcome["summary"].endswith("3 classes on the mean")
    assert load_classifier(fetched(outcome["model"], place / "version")).classes == ("cat", "dog", "cow")


def test_an_export_of_this_project_needs_no_licence_and_is_taken_as_it_is(place: Path) -> None:
    reference_file(place / "mae.pth")
    version = imported("mae.pth", "mae-a", decoder_heads=2)["model"]
    folder = fetched(version, place / "version")
    outcome = imported(str(folder), "mae-b", licence="", origin="")
    assert outcome["what"] == "a backbone that this project exported"
    tracking = open_tracking("mae")
    assert tracking.resolve(outcome["model"]).sha256 == tracking.resolve(version).sha256
    (folder / "mae.safetensors").write_bytes((folder / "mae.safetensors").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"mae\.safetensors is not a complete safetensors file"):
        imported(str(folder), "mae-b")


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["timm", "transformers", "fair"])
def test_licence_and_origin_come_back_with_what_was_exported(place: Path, naming: str) -> None:
    reference_file(place / "mae.pth")
    version = imported("mae.pth", "mae-out", decoder_heads=2)["model"]
    export_model(version, "out", from_dict(ExportConfig, {"format": naming}))
    source = "out/model.pth" if naming == "fair" else "out"
    stated = {"licence": "", "origin": "", "decoder_heads": 2, "image_px": (28, 28)}
    outcome = imported(source, "mae-back", **stated)
    tags = open_tracking("mae").resolve(outcome["model"]).tags
    assert (tags["mae.licence"], tags["mae.origin"]) == tuple(LICENCE.values())
    assert tags["mae.exported_from"] == version
    ours = fetched(version, place / "before") / "encoder.safetensors"
    back = fetched(outcome["model"], place / "after") / "encoder.safetensors"
    assert back.read_bytes() == ours.read_bytes()
    with pytest.raises(UserError, match=r"states licence 'CC-BY-NC-4\.0', not 'MIT'; leave --licence out"):
        imported(source, "mae-back", **{**stated, "licence": "MIT"})

    # Weights that somebody trained further are no longer those that provenance.json is about.
    reference_file(place / "other.pth", seed=1)
    other = imported("other.pth", "mae-other", decoder_heads=2)["model"]
    export_model(other, "other", from_dict(ExportConfig, {"format": naming}))
    weights = "model.pth" if naming == "fair" else "model.safetensors"
    (place / "other" / weights).replace(place / "out" / weights)
    with pytest.raises(UserError, match="give --licence and --origin"):
        imported(source, "mae-back", **stated)


def test_an_export_folder_of_a_run_keeps_its_licence(place: Path) -> None:
    reference_file(place / "mae.pth")
    folder = fetched(imported("mae.pth", "mae-run", decoder_heads=2)["model"], place / "export")
    provenance = Provenance(model="run tuned", licence="CC-BY-NC-4.0", origin="https://example.org/mae")
    (folder / PROVENANCE).write_bytes(provenance.to_json())
    outcome = imported(str(folder), "mae-run-back", licence="", origin="")
    tags = open_tracking("mae").resolve(outcome["model"]).tags
    assert tags["mae.licence"] == "CC-BY-NC-4.0"
    (folder / PROVENANCE).write_text('{"licence": 1}')
    with pytest.raises(UserError, match=r"provenance\.json is damaged, so the licence"):
        imported(str(folder), "mae-run-back", licence="", origin="")


def test_timms_weights_come_through_its_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's one call is replaced: tests have no network."""
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=1000)
    save_file(model.state_dict(), place / "model.safetensors")
    calls: list[tuple[str, str]] = []

    def hub(repository: str, name: str) -> str:
        calls.append((repository, name))
        return str(place / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    outcome = imported("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mae-timm")
    assert calls == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")]
    assert outcome["summary"] == "vit_tiny_patch16 at 224 x 224 px, 3 channels, 1000 classes on the class token"
    assert load_classifier(fetched(outcome["model"], place / "version")).normalization.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:nope", r"timm has no pretrained 'nope'; list"),
        ("timm:vit_base_patch16_224.nope", r"timm has no 'vit_base_patch16_224.nope' \(Invalid pretrained tag"),
        ("timm:resnet18.a1_in1k", r"timm's resnet18.a1_in1k is a ResNet, not a plain ViT"),
        ("timm:vit_base_patch16_224.mae", r"cannot fetch timm/vit_base_patch16_224.mae .*give a file"),
        ("nothing.pth", r"there is nothing at nothing\.pth"),
        ("folder", r"is a folder without config\.json"),
        ("pickled", r"holds only pytorch_model\.bin, a pickle.*save_pretrained"),
        ("other", r"neither transformers' model_type.*nor a kind"),
        ("no-weights", r"timm's config\.json but no model\.safetensors"),
        ("elsewhere", r"timm has no 'hf-hub:a/b', which .* names"),
        ("resnet", r"timm's resnet18 is a ResNet, not a plain ViT"),
        ("odd", r"timm cannot build the model of .*give the file of weights alone"),
        ("broken", r"config\.json is not JSON"),
        ("beit", r"'beit' model of transformers"),
        ("resnet.safetensors", r"resnet\.safetensors is a ResNet"),
    ],
)
def test_what_cannot_be_imported_is_said_with_a_remedy(
    place: Path, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    for folder, files in {
        "folder": {"a.txt": "a"},
        "pickled": {"config.json": '{"model_type": "vit_mae"}', "pytorch_model.bin": "x"},
        "other": {"config.json": "{}"},
        "broken": {"config.json": "{"},
        "beit": {"config.json": '{"model_type": "beit"}'},
        "no-weights": {"config.json": '{"architecture": "vit_tiny_patch16_224"}'},
        "elsewhere": {"config.json": '{"architecture": "hf-hub:a/b"}', "model.safetensors": "x"},
        "resnet": {"config.json": '{"architecture": "resnet18"}', "model.safetensors": "x"},
        "odd": {
            "config.json": '{"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 7}}',
            "model.safetensors": "x",
        },
    }.items():
        (place / folder).mkdir()
        for name, text in files.items():
            (place / folder / name).write_text(text)
    save_file({"layer1.0.conv1.weight": torch.zeros(1)}, place / "resnet.safetensors")
    with pytest.raises(UserError, match=message):
        imported(source, "mae-wrong")
    assert not [m for m in open_tracking("mae").client.search_registered_models() if m.name == "mae-wrong"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"licence": ""}, r"give --licence and --origin \(the official MAE's are --licence CC-BY-NC-4\.0 --origin"),
        ({"origin": ""}, r"give --licence and --origin"),
        ({"name": ""}, r"try --name mae-vit_base_patch16-official"),
        ({"decoder_heads": None}, r"--decoder-heads"),
        ({"mean": (0.5,), "std": (0.2, 0.2)}, r"differ in length"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2)}, r"of 2 channels are known, but the model takes 3"),
    ],
)
def test_wrong_options_are_refused(place: Path, options: dict[str, Any], message: str) -> None:
    reference_file(place / "mae.pth")
    with pytest.raises(UserError, match=message):
        imported("mae.pth", **{"name": "mae-options", "decoder_heads": 2, **options})


@pytest.mark.s3
def test_weights_come_from_s3(place: Path, s3: str) -> None:
    reference_file(place / "mae.pth")
    storage = open_storage(f"{s3}/weights")
    storage.write("mae.pth", (place / "mae.pth").read_bytes())
    version = imported(f"{storage.uri}/mae.pth", "mae-s3", decoder_heads=2)["model"]
    for path in fetched(version, place / "version").iterdir():
        storage.write(f"export/{path.name}", path.read_bytes())
    own = imported(f"{storage.uri}/export", "mae-s3-own")["model"]
    tracking = open_tracking("mae")
    assert tracking.resolve(own).sha256 == tracking.resolve(version).sha256


@pytest.mark.ray
@pytest.mark.slow
def test_licence_and_origin_reach_the_classifier_that_is_fine_tuned_from_an_import(
    place: Path, few_prepared: str
) -> None:
    """The imported table is learned and its epsilon 1e-12; both reach the classifier, at another image size."""
    from pipelines.drivers.classify import finetune

    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **SIZES,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=128,
        )
    )
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(place / "vitmae")
    backbone = imported("vitmae", "mae-tuned")["model"]
    outcome = finetune(
        ClassifyConfig(
            output=str(place / "runs"),
            backbone=backbone,
            image_px=(28, 42),
            epochs=1,
            data=DataConfig(uri=few_prepared, batch=64, micro_batch=32),
            classifier=ClassifierConfig(pool="avg"),
            optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.0),
            augment=AugmentConfig(crop="none", flip=False),
        )
    )
    version = open_tracking("mae").resolve(outcome["model"])
    assert (version.tags["mae.licence"], version.tags["mae.origin"]) == tuple(LICENCE.values())
    vit = load_classifier(fetched(outcome["model"], place / "version")).vit
    first, table = vit.blocks[0], vit.pos_embed
    assert isinstance(first, Block)
    assert isinstance(first.norm1, torch.nn.LayerNorm)
    assert table is not None
    assert first.norm1.eps == 1e-12
    assert table.shape == (1, 1 + 4 * 6, 64)
    assert torch.equal(table[0, 0], model.vit.embeddings.position_embeddings[0, 0])


def test_a_complete_command_line_is_read(place: Path) -> None:
    from pipelines.cli import parse

    call = parse(["import", "a.pth", "--name", "mae-a", "--licence", "MIT", "--origin", "u", "--image-px", "28", "42"])
    assert call.arguments == ("a.pth",)
    assert call.config == ImportConfig(name="mae-a", licence="MIT", origin="u", image_px=(28, 42))
