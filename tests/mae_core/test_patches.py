import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.patches import gather, gather_patches, patchify, unpatchify


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    px=st.integers(1, 4),
    channels=st.integers(1, 4),
)
def test_unpatchify_undoes_patchify(batch, rows, columns, px, channels):
    images = torch.randn(batch, channels, rows * px, columns * px)
    patches = patchify(images, px)
    assert patches.shape == (batch, rows * columns, px * px * channels)
    assert torch.equal(unpatchify(patches, (rows, columns), px, channels), images)


def test_a_patch_is_read_row_by_row_with_its_channels_last():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    patch = patchify(images, 2)[0, 4]  # second row, second column
    expected = [images[0, c, 2 + i, 2 + j] for i in range(2) for j in range(2) for c in range(2)]
    assert patch.tolist() == [value.item() for value in expected]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gather_patches_equals_gather_of_patchify(memory_format):
    images = torch.randn(3, 3, 12, 20).to(memory_format=memory_format)
    ids = torch.rand(3, 15).argsort(1)[:, :6]
    assert torch.equal(gather_patches(images, ids, 4), gather(patchify(images, 4), ids))


def test_an_indivisible_image_side_is_refused_with_the_nearest_that_works():
    with pytest.raises(ValueError, match="image side 230px is not a multiple of patch 16px; try 224px"):
        patchify(torch.zeros(1, 3, 230, 224), 16)
