"""The grid that position ids describe, exact and rounded by half precision."""

import pytest
import torch

from lintra.diffusion.models.image_ids import exact_ids, grid_of_ids
from tiny_clear import flux_ids

GRIDS = [(1, 1), (1, 9), (9, 1), (6, 4), (5, 300), (300, 5), (513, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("grid", GRIDS)
def test_grid(grid, dtype):
    ids = flux_ids(*grid, dtype)
    assert grid_of_ids(ids) == grid
    assert torch.equal(exact_ids(ids, grid).float(), flux_ids(*grid))


def test_ids_may_start_anywhere():
    ids = flux_ids(4, 5) + torch.tensor([1.0, 7.0, 3.0])
    assert grid_of_ids(ids) == (4, 5)
    assert torch.equal(exact_ids(ids.bfloat16(), (4, 5)), ids)


def test_ids_that_are_no_grid_stay_as_they_are():
    ids = torch.randn(12, 3)
    assert exact_ids(ids, (3, 4)) is ids
    assert torch.equal(exact_ids(ids.bfloat16(), (3, 4)), ids.bfloat16().float())


@pytest.mark.parametrize(
    "ids",
    [
        torch.randn(12, 3),
        flux_ids(3, 4).flip(0),
        flux_ids(3, 4).view(3, 4, 3).transpose(0, 1).flatten(0, 1),  # column by column
        flux_ids(3, 4)[:-1],
        flux_ids(3, 4) * 0.5,
        torch.cat([flux_ids(3, 4), flux_ids(3, 4)]),  # two images, as in FLUX Kontext
        torch.zeros(12, 3),
        torch.zeros(0, 3),
    ],
    ids=["random", "flipped", "columns", "cut", "halved", "twice", "zeros", "empty"],
)
def test_errors(ids):
    with pytest.raises(ValueError, match=f"`img_ids` must number a grid .*, got {len(ids)} ids"):
        grid_of_ids(ids)
