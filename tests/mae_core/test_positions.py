import pytest
import torch
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mae_core.positions import sincos_2d


def test_positions_are_in_the_references_order_with_the_column_first():
    # Transformers builds row-first tables and swaps the halves for the published weights; so do we here.
    rows_first = build_2d_sinusoidal_position_embedding(height=5, width=5, embed_dim=24, cls_token=True)
    expected = torch.cat([rows_first[:, 12:], rows_first[:, :12]], dim=1)
    torch.testing.assert_close(sincos_2d(24, (5, 5), class_token=True), expected, rtol=0, atol=1e-6)


def test_on_oblong_grids_each_half_of_a_position_follows_its_own_side():
    table = sincos_2d(8, (2, 5), class_token=False).reshape(2, 5, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, :1, 4:].expand(-1, 5, -1), table[..., 4:])
    square = sincos_2d(8, (5, 5), class_token=False).reshape(5, 5, 8)
    assert torch.equal(square[:2], table)


def test_the_class_tokens_position_is_zero():
    assert not sincos_2d(8, (2, 3), class_token=True)[0].any()
    assert sincos_2d(8, (2, 3), class_token=False).shape == (6, 8)


def test_a_width_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ValueError, match=r"width of 30 .*try 32"):
        sincos_2d(30, (2, 2), class_token=False)
