"""The guided filter equals a least-squares fit window by window, keeps the guide's edges and leaves no data alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.localize.guided_filter import guided_filter


def slow_filter(maps_BCHW, guide_BGHW, radius, epsilon):
    """Every window's ridge regression by lstsq, its prediction given to all of its pixels, the predictions averaged."""
    result = torch.full(maps_BCHW.shape, torch.nan, dtype=torch.float64)
    height, width = maps_BCHW.shape[2:]
    for b, c in torch.cartesian_prod(*(torch.arange(size) for size in maps_BCHW.shape[:2])):
        guide_GHW, map_HW = guide_BGHW[b].double(), maps_BCHW[b, c].double()
        valid_HW = map_HW.isfinite() & guide_GHW.isfinite().all(0)
        sums_HW, counts_HW = torch.zeros(height, width).double(), torch.zeros(height, width)
        for row, column in valid_HW.nonzero():
            inside_HW = torch.zeros_like(valid_HW)
            inside_HW[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = True
            inside_HW &= valid_HW
            known_NG = guide_GHW[:, inside_HW].T
            rows_NG1 = torch.cat([known_NG, torch.ones(len(known_NG), 1)], dim=1)
            ridge_GG1 = torch.eye(known_NG.shape[1], rows_NG1.shape[1]).double() * (epsilon * len(known_NG)) ** 0.5
            wanted = torch.cat([map_HW[inside_HW], torch.zeros(len(ridge_GG1)).double()])
            weights = torch.linalg.lstsq(torch.cat([rows_NG1, ridge_GG1]), wanted[:, None]).solution
            sums_HW[inside_HW] += (rows_NG1 @ weights)[:, 0]
            counts_HW[inside_HW] += 1
        result[b, c] = (sums_HW / counts_HW).masked_fill(~valid_HW, torch.nan)
    return result


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.sampled_from([1, 3]),
    radius=st.sampled_from([1, 2, 50]),
    epsilon=st.sampled_from([1e-4, 1e-2, 1.0]),
    missing=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_equals_least_squares_in_every_window(size, channels, radius, epsilon, missing, seed):
    generator = torch.Generator().manual_seed(seed)
    guide = torch.rand(2, channels, *size, generator=generator)
    maps = torch.randn(2, 2, *size, generator=generator)
    maps[torch.rand(maps.shape, generator=generator) < missing] = torch.nan
    found = guided_filter(maps, guide, radius, epsilon)
    assert found.dtype == maps.dtype
    torch.testing.assert_close(
        found.double(), slow_filter(maps, guide, radius, epsilon), atol=1e-5, rtol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_blurred_step_moves_to_the_edge_of_the_guide(channels):
    guide = torch.zeros(1, channels, 32, 32)
    guide[..., 13:] = 1.0  # the picture's edge; the coarse map has its own, blurred, around column 16
    maps = torch.linspace(-1, 1, 32).mul(3).sigmoid().expand(1, 1, 32, 32)
    found = guided_filter(maps, guide, radius=6, epsilon=1e-4)
    steps = found[0, 0, 16].diff()
    assert steps.argmax() == 12
    assert steps.max() > 5 * maps[0, 0, 16].diff().max()


def test_a_flat_guide_gives_the_mean_of_means_and_a_map_that_is_the_guide_stays():
    maps = torch.randn(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    flat = guided_filter(maps, torch.full((1, 1, 9, 9), 0.5), radius=20, epsilon=1e-3)
    torch.testing.assert_close(flat, maps.mean().expand_as(flat))
    torch.testing.assert_close(guided_filter(maps, maps, radius=2, epsilon=1e-9), maps, atol=1e-5, rtol=0)


def test_missing_pixels_stay_missing_and_do_not_spread():
    generator = torch.Generator().manual_seed(0)
    guide, maps = torch.rand(1, 3, 20, 20, generator=generator), torch.randn(1, 2, 20, 20, generator=generator)
    holed = maps.clone()
    holed[0, 0, :, 10:] = torch.nan
    found = guided_filter(holed, guide, 3, 1e-2)
    assert torch.equal(found.isnan(), holed.isnan())
    torch.testing.assert_close(found[:, 1:], guided_filter(maps[:, 1:], guide, 3, 1e-2))
    left = guided_filter(maps[:, :1, :, :10], guide[..., :10], 3, 1e-2)  # as if the missing half did not exist
    torch.testing.assert_close(found[:, :1, :, :10], left)
    nothing = guided_filter(torch.full((1, 1, 4, 4), torch.nan), guide[..., :4, :4], 1, 1e-2)
    assert nothing.isnan().all()


def test_a_strip_with_a_margin_of_two_radii_equals_the_whole():
    generator = torch.Generator().manual_seed(0)
    guide, maps = torch.rand(1, 3, 40, 12, generator=generator), torch.randn(1, 1, 40, 12, generator=generator)
    whole = guided_filter(maps, guide, 2, 1e-2)
    strip = guided_filter(maps[:, :, 10:30], guide[:, :, 10:30], 2, 1e-2)
    torch.testing.assert_close(strip[:, :, 4:-4], whole[:, :, 14:26])


def test_large_offsets_and_float32_lose_no_digits():
    generator = torch.Generator().manual_seed(0)
    guide, maps = torch.rand(1, 3, 64, 64, generator=generator), torch.randn(1, 1, 64, 64, generator=generator)
    shifted = guided_filter(maps, guide.double() + 1000, 4, 1e-3)
    torch.testing.assert_close(shifted, guided_filter(maps, guide, 4, 1e-3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"radius": 0}, "radius"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"guide_BGHW": torch.zeros(1, 2, 4, 4)}, "grey"),
        ({"guide_BGHW": torch.zeros(1, 3, 4, 5)}, "at the size of maps"),
        ({"maps_BCHW": torch.zeros(1, 0, 4, 4)}, "empty"),
        ({"maps_BCHW": torch.zeros(4, 4)}, "maps_BCHW"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        "maps_BCHW": torch.zeros(1, 1, 4, 4),
        "guide_BGHW": torch.zeros(1, 3, 4, 4),
        "radius": 1,
        "epsilon": 1e-2,
    }
    with pytest.raises(ValueError, match=words):
        guided_filter(**(arguments | change))
