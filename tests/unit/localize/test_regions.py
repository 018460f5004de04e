"""Regions found strip by strip are those of the whole mask, with the scores of their own pixels."""

import numpy as np
import pytest
import shapely
from rasterio.features import shapes

from rsplatform.localize.legend import Legend
from rsplatform.localize.regions import Region, RegionFinder

LEGEND = Legend(
    ("land", "a stadium", "a sports ground", "water"), (0, 1, 1, 2), ("stadium", "water"), "model/a/v1", "h"
)


def find(labels_HW: np.ndarray, scores_PHW: np.ndarray, rows: int) -> list[Region]:
    finder = RegionFinder(LEGEND)
    for row in range(0, len(labels_HW), rows):
        finder.add(row, labels_HW[row : row + rows], scores_PHW[:, row : row + rows])
    return finder.finish()


@pytest.mark.parametrize("seed", range(12))
def test_strips_leave_no_trace(seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, 60, 2)
    labels_HW = (generator.random((height, width)) < generator.uniform(0.2, 0.8)).astype(np.uint8)
    labels_HW[generator.random(labels_HW.shape) < 0.2] = 2
    labels_HW[generator.random(labels_HW.shape) < 0.02] = 255
    scores_PHW = generator.random((4, height, width)).astype(np.float32)
    whole = find(labels_HW, scores_PHW, height)
    expected = [(value, shapely.geometry.shape(outline)) for outline, value in shapes(labels_HW, connectivity=4)]
    expected = [(value, outline) for value, outline in expected if value in (1, 2)]
    assert len(whole) == len(expected)
    assert sorted(region.num_pixels for region in whole) == sorted(outline.area for _, outline in expected)
    for rows in (1, 2, 7):
        strips = find(labels_HW, scores_PHW, rows)
        assert [region.outline_px for region in strips] == [region.outline_px for region in whole]
        for one, other in zip(strips, whole, strict=True):
            assert (one.class_id, one.num_pixels, one.prompt) == (other.class_id, other.num_pixels, other.prompt)
            assert one.score == pytest.approx(other.score, rel=1e-6)
            assert one.outline_px.is_valid and one.outline_px.area == one.num_pixels


def test_a_score_is_the_mean_of_the_best_prompt_of_the_class() -> None:
    """Other classes' scores, however high, take no part; the prompt named is the one with the best mean."""
    labels_HW = np.zeros((6, 5), dtype=np.uint8)
    labels_HW[1:5, 1:4] = 1
    scores_PHW = np.zeros((4, 6, 5), dtype=np.float32)
    scores_PHW[1, 1:5, 1:4], scores_PHW[2, 1:5, 1:4], scores_PHW[3] = 0.2, 0.1, 0.9
    scores_PHW[2, 4, 1:4] = 0.8  # the best there, in one of four rows
    (region,) = find(labels_HW, scores_PHW, 2)
    assert region.score == pytest.approx((3 * 0.2 + 0.8) / 4)
    assert region.prompt == "a sports ground"


def test_u_shapes_close_and_rings_keep_their_hole() -> None:
    """Two arms that meet only in a later strip are one region; its hole is not another."""
    labels_HW = np.zeros((9, 9), dtype=np.uint8)
    labels_HW[1:8, 1:8] = 2
    labels_HW[0:6, 3:6] = 0
    (region,) = find(labels_HW, np.zeros((4, 9, 9), np.float32), 1)
    assert region.num_pixels == 49 - 15 and not region.outline_px.interiors
    labels_HW[1, 3:6] = 2
    (ring,) = find(labels_HW, np.zeros((4, 9, 9), np.float32), 2)
    assert len(ring.outline_px.interiors) == 1 and ring.outline_px.area == 49 - 12
