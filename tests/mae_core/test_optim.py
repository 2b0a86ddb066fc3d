import pytest
import torch
from torch import nn

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, ModelConfig, OptimConfig, parse_arch
from mae_core.encoder import build_encoder
from mae_core.model import build_mae
from mae_core.optim import LARS, build_optimizer, param_groups

ARCH = parse_arch("vit_pico_patch4")


def settings_by_name(model: nn.Module, weight_decay: float, layer_decay: float) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(model, weight_decay, layer_decay)
        for parameter in group["params"]
    }


def test_layer_decay_lowers_rates_from_the_head_to_the_patch_embedding():
    model = build_classifier(ARCH, (16, 16), 3, 10, ClassifierConfig())
    found = settings_by_name(model, 0.05, 0.5)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["fc_norm.weight"] == (1.0, 0.0)
    for block in range(ARCH.depth):
        assert found[f"blocks.{block}.mlp.fc1.weight"] == (0.5 ** (ARCH.depth - block), 0.05)
        assert found[f"blocks.{block}.mlp.fc1.bias"] == (0.5 ** (ARCH.depth - block), 0.0)
    assert found["patch_embed.proj.weight"] == (0.5 ** (ARCH.depth + 1), 0.05)
    assert found["cls_token"] == (0.5 ** (ARCH.depth + 1), 0.0)


def test_only_matrices_decay_and_only_trainable_parameters_are_grouped():
    mae = build_mae(ModelConfig(arch="vit_pico_patch4", image_px=(16, 16), decoder_width=32, decoder_heads=4), 0)
    found = settings_by_name(mae, 0.05, 1.0)
    assert found.keys() == {name for name, parameter in mae.named_parameters() if parameter.requires_grad}
    assert "encoder.pos_embed" not in found
    for name, (scale, decay) in found.items():
        assert scale == 1.0
        assert (decay > 0) == (name.endswith("weight") and "norm" not in name), name


def test_frozen_blocks_do_not_change_the_rates_above_them():
    whole = settings_by_name(build_classifier(ARCH, (16, 16), 3, 10, ClassifierConfig()), 0.05, 0.5)
    partial = build_classifier(ARCH, (16, 16), 3, 10, ClassifierConfig(train_blocks=1))
    found = settings_by_name(partial, 0.05, 0.5)
    assert found.items() < whole.items()
    assert {name.split(".")[1] for name in found if name.startswith("blocks")} == {str(ARCH.depth - 1)}


@pytest.mark.parametrize("prefix", ["backbone", "encoder"])
def test_layer_decay_refuses_a_backbone_of_another_naming(prefix):
    model = nn.ModuleDict({prefix: build_encoder(ARCH, (16, 16), 3)})
    with pytest.raises(ValueError, match=rf"layer_decay 0.75 needs .* not '{prefix}\.cls_token'; .*layer_decay 1"):
        param_groups(model, 0.05, 0.75)
    assert param_groups(model, 0.05, 1.0)


def lars_step(parameter: torch.Tensor, gradient: torch.Tensor, **options: float) -> torch.Tensor:
    parameter = nn.Parameter(parameter.clone())
    parameter.grad = gradient
    LARS([{"params": [parameter]}], **options).step()
    return parameter.detach()


def test_the_length_of_a_lars_step_depends_on_the_weights_norm_and_not_on_the_gradients():
    weight, gradient = torch.randn(4, 3), torch.randn(4, 3)
    steps = [weight - lars_step(weight, scale * gradient, lr=0.5) for scale in (1.0, 1000.0)]
    for step in steps:
        torch.testing.assert_close(step.norm(), 0.5 * 0.001 * weight.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-7)


def test_lars_decays_before_it_rescales():
    weight, gradient = torch.randn(4, 3), torch.randn(4, 3)
    decayed = gradient + 0.1 * weight
    expected = weight - 0.5 * 0.001 * weight.norm() / decayed.norm() * decayed
    torch.testing.assert_close(lars_step(weight, gradient, lr=0.5, weight_decay=0.1), expected)


def test_lars_leaves_vectors_and_zeros_to_sgd():
    bias, gradient = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(lars_step(bias, gradient, lr=0.5, weight_decay=0.1), bias - 0.5 * gradient)
    zero, gradient = torch.zeros(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(lars_step(zero, gradient, lr=0.5), -0.5 * gradient)
    assert torch.equal(lars_step(zero + 1, zero, lr=0.5), zero + 1)


def test_lars_gathers_momentum():
    bias = nn.Parameter(torch.zeros(3))
    optimizer = LARS([{"params": [bias]}], lr=1.0, momentum=0.9)
    for _ in range(2):
        bias.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), -2.9))


def test_the_config_names_the_optimizer():
    model = nn.Linear(3, 2)
    assert isinstance(build_optimizer(model, OptimConfig(name="lars"), 0.1), LARS)
    adamw = build_optimizer(model, OptimConfig(betas=(0.9, 0.95)), 0.1)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.95)}


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest():
    config = ModelConfig(arch="vit_pico_patch4", image_px=(16, 16), decoder_depth=1, decoder_width=32, decoder_heads=4)
    model = build_mae(config, 0)
    optimizer = build_optimizer(model, OptimConfig(name="muon"), 0.1)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_muon = {names[p] for group in optimizer.param_groups if not group["use_fallback"] for p in group["params"]}
    assert by_muon == {
        name for name in names.values() if "blocks." in name and name.endswith("weight") and ".norm" not in name
    }
    assert {"encoder.patch_embed.proj.weight", "decoder.pred.weight", "decoder.embed.weight"}.isdisjoint(by_muon)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 6)])


def test_a_muon_step_is_orthogonal_whatever_the_size_of_the_gradient():
    steps = []
    for size in (1.0, 1000.0):
        model, generator = OneBlock(), torch.Generator().manual_seed(0)
        layer = model.blocks[0]
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        optimizer = build_optimizer(model, OptimConfig(name="muon", weight_decay=0.0), 0.1)
        layer.weight.grad = size * torch.randn(6, 8, generator=generator)
        layer.bias.grad = torch.ones(6)
        optimizer.step()
        steps.append(layer.weight.detach())
    singular = torch.linalg.svdvals(steps[0])
    assert singular.max() / singular.min() < 1.6, "Newton-Schulz makes singular values nearly equal"
    torch.testing.assert_close(steps[0], steps[1], rtol=0.05, atol=1e-3)
    # Scaled to AdamW's: root mean square 0.2 of the rate.
    assert 0.01 < steps[0].square().mean().sqrt() < 0.03


def test_muon_skips_an_update_that_is_not_finite():
    model = OneBlock()
    optimizer = build_optimizer(model, OptimConfig(name="muon"), 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    assert not optimizer.state


def test_the_fused_adamw_equals_the_plain_one():
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(models[0], OptimConfig(), 0.1)
    plain = torch.optim.AdamW(
        [{"params": [models[1].weight], "weight_decay": 0.05}, {"params": [models[1].bias], "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.9, 0.95),
        fused=False,
        foreach=False,
    )
    for step in range(5):
        for model, optimizer in zip(models, (ours, plain)):
            optimizer.zero_grad()
            model(torch.full((4, 3), float(step))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    torch.testing.assert_close(models[0].bias, models[1].bias)
