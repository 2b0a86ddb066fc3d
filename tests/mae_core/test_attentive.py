import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mae_core.attentive import AttentiveHead
from mae_core.config import OptimConfig
from mae_core.optim import param_groups


def test_it_is_torchs_attention_with_one_query():
    torch.manual_seed(0)
    head, tokens = AttentiveHead(8, 3, num_heads=2), torch.randn(4, 5, 8)
    # torch's module projects the query too; with the identity that is the same.
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight.data = torch.cat([torch.eye(8), head.key_value.weight])
    attention.in_proj_bias.data = torch.cat([torch.zeros(8), head.key_value.bias])
    attention.out_proj.load_state_dict(head.projection.state_dict())
    pooled, _ = attention(head.query.expand(4, 1, 8), tokens, tokens)
    torch.testing.assert_close(head(tokens), head.head(head.norm(pooled[:, 0])))


def test_the_order_of_patches_and_other_images_change_nothing():
    torch.manual_seed(0)
    head, tokens = AttentiveHead(8, 3, num_heads=2, head_std=1.0), torch.randn(4, 5, 8)
    torch.testing.assert_close(head(tokens[:, torch.tensor([3, 1, 4, 0, 2])]), head(tokens))
    torch.testing.assert_close(head(tokens[:1], torch.zeros(1), lambda tensor: tensor * 2), head(tokens)[:1])


def test_it_finds_a_patch_that_the_mean_hides():
    """One of 64 patches tells the class; its channel's mean is the same in both."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    tokens = 0.1 * torch.randn(128, 64, 8, generator=generator)
    places = torch.randint(0, 64, (128,), generator=generator)
    tokens[torch.arange(128), places, 0] = 3.0
    tokens[torch.arange(128), places, 1] = 6.0 * labels - 3.0
    tokens[:, :, 1] -= tokens[:, :, 1].mean(1, keepdim=True)
    torch.manual_seed(0)
    head = AttentiveHead(8, 2, num_heads=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(head(tokens), labels).backward()
        optimizer.step()
    assert (head(tokens).argmax(1) == labels).all()


def test_the_query_is_not_decayed():
    head = AttentiveHead(8, 3, num_heads=2)
    decayed = {
        id(p) for g in param_groups(head, OptimConfig().weight_decay, 1.0) if g["weight_decay"] for p in g["params"]
    }
    assert decayed == {id(layer.weight) for layer in (head.key_value, head.projection, head.head)}


def test_heads_must_divide_the_width():
    with pytest.raises(RuntimeError):
        AttentiveHead(8, 3, num_heads=3)(torch.zeros(1, 2, 8))
