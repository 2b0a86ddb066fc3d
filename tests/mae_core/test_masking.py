from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.config import MaskConfig, ModelConfig
from mae_core.errors import UserError
from mae_core.masking import Mask, chosen_mask, mask_from_noise, sample_masks, training_masks

GRID = (14, 14)


def masks(config: MaskConfig, grid=GRID, num=16, seed=0, epoch=0, view=0) -> Mask:
    return sample_masks(config, grid, seed=seed, epoch=epoch, sample_ids=torch.arange(num), view=view)


@given(
    kind=st.sampled_from(["random", "block"]),
    ratio=st.floats(0.05, 0.95),
    rows=st.integers(2, 14),
    columns=st.integers(2, 14),
    seed=st.integers(0, 2**63 - 1),
)
def test_mask_counts_are_exact_and_visible_and_hidden_make_up_the_image(kind, ratio, rows, columns, seed):
    mask = masks(MaskConfig(kind=kind, ratio=ratio), (rows, columns), num=3, seed=seed)
    visible = int(rows * columns * (1 - ratio))
    assert mask.visible_ids.shape == (3, visible)
    assert mask.num_patches == rows * columns
    together = torch.cat([mask.visible_ids, mask.hidden_ids], dim=1).sort(1).values
    assert torch.equal(together, torch.arange(rows * columns).expand(3, -1))
    assert (mask.visible_ids.diff(dim=1) > 0).all()
    assert (mask.hidden_ids.diff(dim=1) > 0).all()


def test_the_visible_count_is_truncated_as_in_the_reference():
    assert masks(MaskConfig(ratio=0.8), (10, 10)).visible_ids.shape[1] == 19
    assert masks(MaskConfig(ratio=0.75)).visible_ids.shape[1] == 49


@pytest.mark.parametrize("kind", ["random", "block"])
def test_a_mask_depends_on_its_key_and_not_on_its_batch(kind):
    config = MaskConfig(kind=kind)
    whole = masks(config)
    alone = sample_masks(config, GRID, seed=0, epoch=0, sample_ids=torch.tensor([11]))
    assert torch.equal(alone.hidden_ids[0], whole.hidden_ids[11])
    for other in (masks(config, seed=1), masks(config, epoch=1), masks(config, view=1)):
        assert (other.hidden_ids != whole.hidden_ids).any(dim=1).all()
    assert len(whole.hidden_ids.unique(dim=0)) == 16


def test_random_masks_hide_every_patch_equally_often():
    hidden = masks(MaskConfig(), num=4000).is_hidden().double().mean(0)
    assert (hidden - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_patches_with_the_least_noise_stay_visible_and_ties_go_to_the_earlier():
    mask = mask_from_noise(torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0]]), 2)
    assert mask.visible_ids.tolist() == [[1, 3]]
    assert mask.hidden_ids.tolist() == [[0, 2, 4]]
    assert mask.is_hidden().tolist() == [[True, False, True, False, True]]


@given(
    cell=st.sampled_from([1, 2, 3]),
    ratio=st.floats(0.1, 0.9),
    rows=st.integers(1, 4),
    columns=st.integers(2, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_cell_of_patches_is_hidden_or_shown_as_a_whole(cell, ratio, rows, columns, seed):
    grid = (rows * cell, columns * cell)
    mask = masks(MaskConfig(ratio=ratio, cell=cell), grid, num=3, seed=seed)
    assert mask.visible_ids.shape == (3, int(rows * columns * (1 - ratio)) * cell**2)
    hidden = mask.is_hidden().reshape(3, rows, cell, columns, cell)
    assert torch.equal(hidden.all(dim=4).all(dim=2), hidden.any(dim=4).any(dim=2))
    # Cells are drawn as patches of a coarser grid are.
    coarse = masks(MaskConfig(ratio=ratio), (rows, columns), num=3, seed=seed).is_hidden().reshape(3, rows, columns)
    assert torch.equal(hidden[:, :, 0, :, 0], coarse)


def test_complementary_masks_keep_cells_whole():
    config = ModelConfig(image_px=(256, 256), mask=MaskConfig(cell=2))
    mask = training_masks(
        config, seed=0, epoch=0, sample_ids=torch.arange(3), masks_per_image=4, complementary=True
    ).is_hidden()
    cells = mask.reshape(12, 8, 2, 8, 2)
    assert torch.equal(cells.all(dim=4).all(dim=2), cells.any(dim=4).any(dim=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskConfig(cell=0), "mask cell 0"),
        (lambda: MaskConfig(cell=2, kind="block"), "with kind random"),
        (lambda: ModelConfig(mask=MaskConfig(cell=4)), "does not divide 14 x 14 patches; try --model.mask.cell 2"),
    ],
)
def test_cells_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_block_masks_are_in_larger_pieces_than_random_ones():
    def edges(kind: Literal["random", "block"]) -> float:
        hidden = masks(MaskConfig(kind=kind, ratio=0.5), num=64).is_hidden().reshape(-1, *GRID)
        return (
            (hidden[:, 1:] != hidden[:, :-1]).double().mean() + (hidden[..., 1:] != hidden[..., :-1]).double().mean()
        ).item()

    assert edges("block") < 0.4 * edges("random")


def test_block_masks_reach_every_patch_though_like_beits_they_favour_the_middle():
    hidden = masks(MaskConfig(kind="block", ratio=0.5), num=1000).is_hidden().double().mean(0)
    assert hidden.min() > 0.03
    assert hidden.max() < 0.97


@pytest.mark.parametrize(("ratio", "cell", "grid"), [(0.75, 2, (4, 6)), (0.8889, 3, (9, 9))])
def test_a_grid_mask_shows_one_patch_per_cell(ratio, cell, grid):
    mask = masks(MaskConfig(kind="grid", ratio=ratio), grid)
    shown = ~mask.is_hidden().reshape(-1, grid[0] // cell, cell, grid[1] // cell, cell)
    assert (shown.sum(dim=(2, 4)) == 1).all()


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_predicted_patches_are_hidden_and_chosen_anew_each_epoch(kind):
    config = ModelConfig(mask=MaskConfig(kind=kind), predicted_share=1 / 3)
    ids = torch.arange(8)
    mask = training_masks(config, seed=0, epoch=0, sample_ids=ids)
    every = sample_masks(config.mask, GRID, seed=0, epoch=0, sample_ids=ids)
    assert mask.predicted_ids.shape == (8, config.num_predicted) == (8, 49)
    assert torch.equal(mask.hidden_ids.sort(dim=1).values, every.hidden_ids)
    assert torch.equal(mask.visible_ids, every.visible_ids)
    assert (mask.predicted_ids.diff(dim=1) > 0).all()
    for seed, epoch in ((1, 0), (0, 1)):
        other = training_masks(config, seed=seed, epoch=epoch, sample_ids=ids)
        assert (other.predicted_ids != mask.predicted_ids).any(dim=1).all()


def test_every_hidden_patch_is_predicted_equally_often():
    config = ModelConfig(mask=MaskConfig(kind="grid"), predicted_share=1 / 3)
    mask = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(4000))
    share = torch.zeros(4000, 196).scatter_(1, mask.predicted_ids, 1.0).mean(0)[mask.hidden_ids[0].sort().values]
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / 4000) ** 0.5


def test_masks_of_further_views_follow_the_first_and_differ():
    config, ids = ModelConfig(predicted_share=0.5), torch.arange(4)
    one = training_masks(config, seed=0, epoch=0, sample_ids=ids)
    three = training_masks(config, seed=0, epoch=0, sample_ids=ids, masks_per_image=3)
    assert three.visible_ids.shape == (12, 49)
    assert torch.equal(three.hidden_ids[:4], one.hidden_ids)
    assert torch.equal(three.predicted_ids[:4], one.predicted_ids)
    assert len(three.hidden_ids.sort(dim=1).values.unique(dim=0)) == 12


def test_complementary_masks_see_every_patch_once():
    config, ids = ModelConfig(), torch.arange(5)
    masks = training_masks(config, seed=0, epoch=3, sample_ids=ids, masks_per_image=4, complementary=True)
    visible = masks.visible_ids.unflatten(0, (4, 5))
    assert visible.shape == (4, 5, 49)
    every = visible.permute(1, 0, 2).flatten(1).sort(dim=1).values
    assert torch.equal(every, torch.arange(196).expand(5, -1))
    together = torch.cat([masks.visible_ids, masks.hidden_ids], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(196).expand(20, -1))
    assert (masks.hidden_ids.diff(dim=1) > 0).all()
    one = training_masks(config, seed=0, epoch=3, sample_ids=ids)
    assert torch.equal(masks.visible_ids[:5], one.visible_ids)
    other = training_masks(config, seed=0, epoch=4, sample_ids=ids, masks_per_image=4, complementary=True)
    assert (other.visible_ids != masks.visible_ids).any(dim=1).all()


def test_complementary_masks_are_as_likely_as_independent_ones():
    config, num = ModelConfig(), 2000
    masks = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(num), masks_per_image=4, complementary=True)
    for view in masks.visible_ids.split(num):
        share = torch.zeros(num, 196).scatter_(1, view, 1.0).mean(0)
        assert (share - 0.25).abs().max() < 5 * (3 / 16 / num) ** 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"predicted_share": 0.0}, "predicted_share 0.0 is outside"),
        ({"predicted_share": 1.5}, "try 0.3333, or 1 for all"),
        ({"decoder_attention": "cross", "mask_token_in": "encoder"}, "try mask_token_in decoder"),
    ],
)
def test_inconsistent_model_configs_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**fields)


def test_a_chosen_mask_leaves_just_these_patches_visible():
    mask = chosen_mask([5, 0, 5, 2], 6, 2)
    assert mask.visible_ids.tolist() == [[0, 2, 5]] * 2
    assert mask.hidden_ids.tolist() == [[1, 3, 4]] * 2


@pytest.mark.parametrize(("visible", "message"), [([6], "patch 6 does not exist"), (range(6), "6 patches are visible")])
def test_a_mask_of_no_such_patch_or_of_none_is_refused(visible, message):
    with pytest.raises(UserError, match=message):
        chosen_mask(visible, 6, 1)
