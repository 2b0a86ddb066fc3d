import copy

import pytest
import torch
from torch import nn

from mae_core.config import OptimConfig
from mae_core.optim import build_optimizer
from mae_core.state import load_optimizer_tensors, model_tensors, optimizer_tensors, pack, parts, unpack
from tests.digest import tensors_digest


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        images = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lars", "muon"])
def test_training_resumed_from_bytes_equals_uninterrupted_training(name):
    model = network()
    optimizer = build_optimizer(model, OptimConfig(name=name), 0.1)
    train(model, optimizer, range(3))
    saved = pack(model_tensors(model)), pack(optimizer_tensors(optimizer, model))
    train(model, optimizer, range(3, 6))

    resumed = network()
    resumed.load_state_dict(unpack(saved[0]))
    fresh = build_optimizer(resumed, OptimConfig(name=name), 0.1)
    load_optimizer_tensors(fresh, resumed, unpack(saved[1]))
    train(resumed, fresh, range(3, 6))
    assert tensors_digest(model_tensors(resumed)) == tensors_digest(model_tensors(model))
    assert tensors_digest(optimizer_tensors(fresh, resumed)) == tensors_digest(optimizer_tensors(optimizer, model))


def test_optimizer_state_goes_by_name_and_not_by_order():
    model = network()
    optimizer = build_optimizer(model, OptimConfig(), 0.1)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    reordered = torch.optim.AdamW(list(reversed(list(other.parameters()))), lr=0.1, fused=True)
    load_optimizer_tensors(reordered, other, optimizer_tensors(optimizer, model))
    theirs, ours = other[2].weight, model[2].weight
    assert isinstance(theirs, nn.Parameter)
    assert isinstance(ours, nn.Parameter)
    assert torch.equal(reordered.state[theirs]["exp_avg"], optimizer.state[ours]["exp_avg"])


def test_an_optimizer_that_has_not_stepped_has_no_state():
    model = network()
    optimizer = build_optimizer(model, OptimConfig(), 0.1)
    assert optimizer_tensors(optimizer, model) == {}
    load_optimizer_tensors(optimizer, model, {})


@pytest.mark.parametrize("key", ["exp_avg/3.weight", "exp_avg/0.weight"])
def test_another_models_optimizer_state_is_refused(key):
    model = network()
    optimizer = build_optimizer(model, OptimConfig(), 0.1)
    with pytest.raises(ValueError, match=r"belongs to another model; resume with the config"):
        load_optimizer_tensors(optimizer, model, {key: torch.zeros(2, 2)})


TENSORS = {
    "a": torch.randn(3, 4).T,
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.randn(2).bfloat16(),
    "d": torch.zeros(0, 5),
}


def test_unpack_undoes_pack_for_every_dtype():
    content = pack(TENSORS)
    found = unpack(content)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert pack(dict(reversed(found.items()))) == content


@pytest.mark.parametrize(
    "content",
    [b"", b"not safetensors", pack(TENSORS)[:-1], b"\xff" * 64, b"\x80\x04K\x01."],
    ids=["empty", "text", "cut short", "vast header", "pickle"],
)
def test_unpack_refuses_anything_but_a_complete_safetensors_file(content):
    with pytest.raises(ValueError, match=r"not a complete safetensors file"):
        unpack(content)


def test_the_digest_knows_names_types_shapes_and_values():
    tensor = torch.arange(6.0)
    variants = [{"a": tensor}, {"b": tensor}, {"a": tensor.double()}, {"a": tensor.reshape(2, 3)}, {"a": tensor + 1}]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)
    assert tensors_digest(TENSORS) == tensors_digest(dict(reversed(TENSORS.items())))


def test_parts_are_the_packed_file_and_copy_no_tensor():
    tensors = {
        "b": torch.arange(3.0),
        "a": torch.ones(2, 2, dtype=torch.bfloat16),
        "c": torch.tensor(5),
        "d": torch.tensor(1.0, dtype=torch.float64),
        "é": torch.zeros(0),
        "flag": torch.tensor([True]),
    }
    found = parts(tensors)
    assert b"".join(found) == pack(tensors)
    tensors["b"][0] = 7.0
    assert b"".join(found) == pack(tensors)
    assert b"".join(parts({})) == pack({})
