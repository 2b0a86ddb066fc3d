import pytest
import torch
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mae_core.positions import resized, sincos_2d


def test_positions_are_in_the_references_order_with_the_column_first():
    # Transformers builds row-first tables and swaps the halves for the published weights; so do we here.
    rows_first = build_2d_sinusoidal_position_embedding(height=5, width=5, embed_dim=24, cls_token=True)
    expected = torch.cat([rows_first[:, 12:], rows_first[:, :12]], dim=1)
    torch.testing.assert_close(sincos_2d(24, (5, 5), class_tokens=1), expected, rtol=0, atol=1e-6)


def test_on_oblong_grids_each_half_of_a_position_follows_its_own_side():
    table = sincos_2d(8, (2, 5), class_tokens=0).reshape(2, 5, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, :1, 4:].expand(-1, 5, -1), table[..., 4:])
    square = sincos_2d(8, (5, 5), class_tokens=0).reshape(5, 5, 8)
    assert torch.equal(square[:2], table)


def test_the_class_tokens_position_is_zero():
    assert not sincos_2d(8, (2, 3), class_tokens=1)[0].any()
    assert sincos_2d(8, (2, 3), class_tokens=0).shape == (6, 8)


def test_a_width_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ValueError, match=r"width of 30 .*try 32"):
        sincos_2d(30, (2, 2), class_tokens=0)


def test_a_sine_cosine_table_becomes_that_of_the_new_grid_also_if_stored_in_float16():
    table = sincos_2d(24, (4, 6), class_tokens=1)[None]
    expected = sincos_2d(24, (3, 8), class_tokens=1)[None]
    assert torch.equal(resized(table, (4, 6), (3, 8)), expected)
    assert torch.equal(resized(table.half().float(), (4, 6), (3, 8)), expected)


def test_a_learned_table_is_interpolated_over_rows_and_columns_and_keeps_its_class_token():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([rows.flatten(), columns.flatten()], dim=1).repeat(1, 2)
    table = torch.cat([torch.tensor([[9.0, 7.0, 9.0, 7.0]]), table])[None]
    found = resized(table, (4, 6), (8, 6))
    assert torch.equal(found[0, 0], table[0, 0])
    grid = found[0, 1:].reshape(8, 6, 4)
    torch.testing.assert_close(grid[:, :, 1], columns[:1].expand(8, 6))  # columns are as before
    assert (grid[1:, :, 0] > grid[:-1, :, 0]).all()
    torch.testing.assert_close(grid[:, :1, 0].expand(8, 6), grid[:, :, 0])  # and rows vary with the row alone


def test_the_references_table_in_the_other_order_counts_as_learned():
    table = sincos_2d(24, (4, 4), class_tokens=1)[None]
    swapped = torch.cat([table[..., 12:], table[..., :12]], dim=2)
    found = resized(swapped, (4, 4), (4, 8))
    assert (found[0] - sincos_2d(24, (4, 8), class_tokens=1)).abs().max() > 0.5


def test_the_same_grid_keeps_a_table_bit_for_bit():
    table = torch.randn(1, 13, 8)
    assert resized(table, (3, 4), (3, 4)) is table
    assert not torch.equal(resized(table, (3, 4), (4, 3)), table)


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"13 rows, but a class token and 4 x 4 patches need 17"):
        resized(torch.zeros(1, 13, 8), (4, 4), (8, 8))
