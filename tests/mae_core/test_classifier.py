import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core.classifier import ProbeHead, build_classifier, features, load_encoder_weights
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.encoder import build_encoder, export_tensors
from mae_core.positions import resized

ARCH = parse_arch("vit_pico_patch4")


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_classifier_with_an_encoders_weights_computes_its_features(pool):
    encoder = build_encoder(ARCH, (16, 24), 3)
    model = build_classifier(ARCH, (16, 24), 3, 7, ClassifierConfig(pool=pool)).eval()
    load_encoder_weights(model, export_tensors(encoder), (16, 24))
    images = torch.randn(2, 3, 16, 24)
    pooled = features(model, images, pool)
    torch.testing.assert_close(model(images), model.head(pooled), rtol=1e-4, atol=1e-6)
    tokens = encoder.blocks(encoder._pos_embed(encoder.patch_embed(images)))
    pooled_tokens = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
    expected = nn.functional.layer_norm(pooled_tokens, (ARCH.width,), eps=1e-6)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


def test_average_pooling_leaves_the_class_token_out():
    model = build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(pool="avg"))
    tokens = torch.randn(2, 17, ARCH.width)
    torch.testing.assert_close(model.pool(tokens), tokens[:, 1:].mean(1))


def test_the_classifiers_head_starts_small():
    model = build_classifier(ARCH, (16, 16), 3, 1000, ClassifierConfig(head_std=2e-5))
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not model.head.bias.any()


def test_drop_path_rises_to_its_rate_in_the_last_block():
    model = build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(drop_path=0.3))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("train_blocks", [0, 1, 4])
def test_freeze_leaves_only_the_last_blocks_and_the_head_trainable(train_blocks):
    model = build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(train_blocks=train_blocks))
    learning = {name.rsplit(".", 1)[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = {int(name.split(".")[1]) for name in learning if name.startswith("blocks")}
    assert blocks == set(range(4 - train_blocks, 4))
    assert {name for name in learning if not name.startswith("blocks")} == {"head"} | (
        {"fc_norm"} if train_blocks else set()
    )


@pytest.mark.parametrize(("train_blocks", "half"), [(0.5, 3), (1.5, 2)])
def test_half_a_block_is_its_mlp_with_its_norm(train_blocks, half):
    model = build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(train_blocks=train_blocks))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {
        f"blocks.{half}.{name}" for name, _ in model.blocks[half].named_parameters() if name[:3] in ("nor", "mlp")
    }
    expected -= {f"blocks.{half}.norm1.weight", f"blocks.{half}.norm1.bias"}
    expected |= {name for name, _ in model.named_parameters() if name.startswith("blocks.3") and train_blocks > 1}
    assert {name for name in learning if name.startswith("blocks")} == expected
    assert {name.split(".")[0] for name in learning} == {"blocks", "fc_norm", "head"}


@pytest.mark.parametrize("train_blocks", [-1, 0.3])
def test_other_shares_of_a_block_are_refused(train_blocks):
    with pytest.raises(ValueError, match=r"is not a multiple of 0.5 from 0 up; try 4, 0.5 for the MLP"):
        ClassifierConfig(train_blocks=train_blocks)


def test_dropout_is_where_the_vit_paper_has_it_and_nowhere_without_it():
    rates = {name: layer.p for name, layer in build(dropout=0.1).named_modules() if isinstance(layer, nn.Dropout)}
    assert {name for name, p in rates.items() if p} == {
        "pos_drop",
        *(f"blocks.{i}.{name}" for i in range(4) for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")),
    }
    assert not any(layer.p for layer in build(dropout=0.0).modules() if isinstance(layer, nn.Dropout))


def build(dropout):
    return build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(dropout=dropout))


def test_freeze_refuses_more_blocks_than_the_encoder_has():
    with pytest.raises(ValueError, match=r"train_blocks 5 is above the encoder's 4 blocks; try 4"):
        build_classifier(ARCH, (16, 16), 3, 7, ClassifierConfig(train_blocks=5))


def table_of(model: VisionTransformer) -> torch.Tensor:
    """Position table of the model."""
    assert model.pos_embed is not None
    return model.pos_embed


def test_fixed_positions_of_another_image_size_become_those_of_the_models_size():
    model = build_encoder(ARCH, (32, 16), 3)
    positions = table_of(model).clone()
    load_encoder_weights(model, export_tensors(build_encoder(ARCH, (16, 16), 3)), (16, 16))
    assert torch.equal(table_of(model), positions)


def test_learned_positions_of_another_image_size_are_interpolated():
    encoder, model = build_encoder(ARCH, (16, 24), 3), build_encoder(ARCH, (32, 24), 3)
    nn.init.normal_(table_of(encoder))
    load_encoder_weights(model, export_tensors(encoder), (16, 24))
    assert torch.equal(table_of(model), resized(table_of(encoder), (4, 6), (8, 6)))


def test_a_position_table_of_another_size_than_stated_is_refused():
    tensors = export_tensors(build_encoder(ARCH, (16, 24), 3))
    with pytest.raises(ValueError, match=r"table has 25 rows, but a class token and 4 x 4 patches need 17"):
        load_encoder_weights(build_encoder(ARCH, (16, 16), 3), tensors, (16, 16))


@pytest.mark.parametrize(
    ("arch", "channels", "message"),
    [
        ("vit_pico_patch4", 1, r"patch_embed.proj.weight is \(64, 1, 4, 4\) in the weights and \(64, 3, 4, 4\)"),
        ("vit_nano_patch4", 3, r"the weights have 'blocks\.4\."),
        ("vit_pico_patch2", 3, r"patch_embed.proj.weight is \(64, 3, 2, 2\)"),
    ],
)
def test_another_encoders_weights_are_refused(arch, channels, message):
    tensors = export_tensors(build_encoder(parse_arch(arch), (16, 16), channels))
    with pytest.raises(ValueError, match=message):
        load_encoder_weights(build_encoder(ARCH, (16, 16), 3), tensors, (16, 16))


def test_incomplete_encoder_weights_are_refused():
    tensors = export_tensors(build_encoder(ARCH, (16, 16), 3))
    del tensors["blocks.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"the weights lack 'blocks.0.norm1.weight' \(1 names differ\)"):
        load_encoder_weights(build_encoder(ARCH, (16, 16), 3), tensors, (16, 16))


def test_without_placeholders_the_probe_is_torchs_batch_norm_and_a_linear_layer():
    head = ProbeHead(6, 3)
    norm = nn.BatchNorm1d(6, affine=False, eps=1e-6)
    *batches, last = torch.randn(5, 10, 6) * 3 + 1
    for batch in batches:
        torch.testing.assert_close(head(batch, torch.ones(10)), head.head(norm(batch)))
    torch.testing.assert_close(head.running_mean, norm.running_mean)
    torch.testing.assert_close(head.running_var, norm.running_var)
    head.eval()
    norm.eval()
    torch.testing.assert_close(head(last, torch.ones(10)), head.head(norm(last)))


def test_placeholders_do_not_enter_the_probes_statistics():
    head = ProbeHead(6, 3)
    alone = copy.deepcopy(head)
    batch = torch.randn(10, 6)
    weights = torch.tensor([1.0] * 7 + [0.0] * 3)
    batch[7:] = 1e3
    torch.testing.assert_close(head(batch, weights)[:7], alone(batch[:7], torch.ones(7)))
    assert torch.equal(head.running_mean, alone.running_mean)
    assert torch.equal(head.running_var, alone.running_var)


def test_the_probes_statistics_are_those_of_all_ranks():
    whole, ranks = ProbeHead(6, 3), [ProbeHead(6, 3) for _ in range(2)]
    for head in ranks:
        head.load_state_dict(whole.state_dict())
    batch, weights = torch.randn(10, 6), torch.ones(10)
    sums: list[torch.Tensor] = []
    for part in (slice(0, 3), slice(3, 10)):  # what each rank would send
        ranks[0](batch[part], weights[part], lambda tensor: sums.append(tensor) or tensor)
    ranks[1](batch[:3], weights[:3], lambda tensor: sums[0] + sums[1])
    logits = whole(batch, weights)
    torch.testing.assert_close(ranks[1](batch[:3], weights[:3], lambda tensor: sums[0] + sums[1]), logits[:3])
    whole(batch, weights)
    torch.testing.assert_close(ranks[1].running_mean, whole.running_mean)
    torch.testing.assert_close(ranks[1].running_var, whole.running_var)


def test_a_micro_batch_of_placeholders_alone_is_finite():
    logits = ProbeHead(6, 3)(torch.zeros(2, 6), torch.zeros(2))
    assert logits.isfinite().all()
