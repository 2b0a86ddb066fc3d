"""Laws of the three namings: to and back is the identity, and the libraries themselves take what is written."""

from typing import Any

import pytest
import timm as timm_library
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.encoder import build_encoder
from mae_core.errors import UserError
from mae_core.formats import fair, timm, transformers
from mae_core.model import build_mae
from tests.mae_core.formats.pico import CONFIG, DECODER_SIZES, SIZES

ARCH = parse_arch("vit_pico_patch4")
FIVE_CLASSES: dict[str, Any] = {"num_labels": 5}


def randomized(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor random, so that no two are alike and none is the zero or one that it began as."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=random) for name, tensor in module.state_dict().items()}


def models() -> dict[str, dict[str, Tensor]]:
    return {
        "encoder": randomized(build_encoder(ARCH, (28, 28), 3)),
        "mae": randomized(build_mae(CONFIG, seed=0)),
        "token": randomized(build_classifier(ARCH, (28, 28), 3, 5, ClassifierConfig(pool="token"))),
        "avg": randomized(build_classifier(ARCH, (28, 28), 3, 5, ClassifierConfig(pool="avg"))),
    }


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("naming", "kind"),
    [
        *((fair, kind) for kind in ("encoder", "mae", "token", "avg")),
        *((timm, kind) for kind in ("encoder", "token", "avg")),
        *((transformers, kind) for kind in ("encoder", "mae", "token")),
    ],
)
def test_to_and_back_is_the_identity(naming, kind):
    tensors = models()[kind]
    assert_identical(naming.to_ours(naming.from_ours(tensors)), tensors)


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [
        (lambda: ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **DECODER_SIZES)), "mae"),
        (lambda: ViTForImageClassification(ViTConfig(**SIZES, **FIVE_CLASSES)), "token"),
        (lambda: ViTMAEModel(ViTMAEConfig(**SIZES)), "encoder"),
        (lambda: ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), "encoder"),
    ],
)
def test_transformers_loads_what_is_written_and_what_it_saves_is_read(theirs, kind, tmp_path):
    model, tensors = theirs(), models()[kind]
    model.save_pretrained(tmp_path)
    saved = transformers.to_ours(load_file(tmp_path / "model.safetensors"))
    assert saved.keys() == tensors.keys()
    assert_identical(transformers.to_ours(model.state_dict()), saved)
    save_file(transformers.from_ours(tensors), tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True, **_options(model))
    assert not any(report.values()), report
    assert_identical(transformers.to_ours(loaded.state_dict()), tensors)


def _options(model: torch.nn.Module) -> dict[str, bool]:
    return {"add_pooling_layer": False} if isinstance(model, ViTModel) else {}


@pytest.mark.parametrize(
    ("kind", "pool", "num_classes"), [("encoder", "token", 0), ("token", "token", 5), ("avg", "avg", 5)]
)
def test_timm_loads_what_is_written(kind, pool, num_classes):
    model = timm_library.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=num_classes,
        global_pool=pool,
    )
    written = timm.from_ours(models()[kind])
    model.load_state_dict(written)
    assert_identical(model.state_dict(), written)


def test_timm_gets_the_encoder_of_a_complete_mae():
    mae = models()["mae"]
    written = timm.from_ours(mae)
    assert_identical(
        {f"encoder.{name}": tensor for name, tensor in written.items()},
        {k: v for k, v in mae.items() if k.startswith("encoder.")},
    )


def test_the_reference_has_mask_token_and_decoder_beside_the_encoder():
    names = fair.from_ours(models()["mae"]).keys()
    assert {
        "cls_token",
        "mask_token",
        "decoder_pos_embed",
        "decoder_blocks.1.attn.qkv.weight",
        "decoder_pred.bias",
    } < names
    assert not any("." in name and name.startswith(("encoder.", "decoder.")) for name in names)


def test_a_linear_probes_batch_norm_is_merged_into_its_head():
    norm, linear = torch.nn.BatchNorm1d(64, affine=False, eps=1e-6), torch.nn.Linear(64, 5)
    head = torch.nn.Sequential(norm, linear).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    encoder = models()["encoder"]
    ours = fair.to_ours(encoder | {f"head.{name}": tensor for name, tensor in head.state_dict().items()})
    assert ours.keys() == models()["token"].keys()
    features = torch.randn(7, 64)
    found = torch.nn.functional.linear(features, ours["head.weight"], ours["head.bias"])
    torch.testing.assert_close(found, head(features), rtol=1e-5, atol=1e-5)


def test_transformers_has_no_classifier_on_the_mean_of_tokens():
    with pytest.raises(UserError, match=r"mean of the patch tokens \(fc_norm\).*export to timm"):
        transformers.from_ours(models()["avg"])


@pytest.mark.parametrize("naming", [fair, timm, transformers])
def test_mask_tokens_in_the_encoder_have_no_other_names(naming):
    mae = models()["mae"]
    mae["mask_token"] = torch.zeros(1, 1, 64)
    with pytest.raises(UserError, match=r"mask tokens enter this model's encoder"):
        naming.from_ours(mae)


def test_an_unknown_name_of_transformers_is_named():
    with pytest.raises(UserError, match=r"'encoder.layer.0.lambda_1' belongs to no ViT"):
        transformers.to_ours({"encoder.layer.0.lambda_1": torch.zeros(1)})
