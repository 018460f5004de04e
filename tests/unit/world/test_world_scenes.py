"""Scenes: true sizes, real nodata and cloud, and colours that do not give the classes away."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rsplatform.world import palettes
from rsplatform.world.canvas import Grid
from rsplatform.world.layout import lay_out
from rsplatform.world.scenes import NODATA, add_clouds, draw_scene, lay_out_place, plan_scenes

LARGEST_COLOUR_MIOU = 0.12


def test_things_have_true_sizes_in_metres() -> None:
    features = [feature for seed in range(3) for feature in lay_out((seed,), 1300.0)]
    sizes = {
        kind: np.array([feature.size_m for feature in features if feature.class_id == kind])
        for kind in (palettes.RUNWAY, palettes.STADIUM, palettes.HARBOUR, palettes.BUILDING)
    }
    limits = {
        palettes.RUNWAY: (1200, 2200, 30, 60),
        palettes.STADIUM: (180, 260, 130, 260),
        palettes.HARBOUR: (200, 500, 200, 500),
        palettes.BUILDING: (8, 60, 8, 60),
    }
    for kind, (shortest, longest, narrowest, widest) in limits.items():
        assert len(sizes[kind]) >= 3
        assert ((sizes[kind][:, 0] >= shortest) & (sizes[kind][:, 0] <= longest)).all()
        assert ((sizes[kind][:, 1] >= narrowest) & (sizes[kind][:, 1] <= widest)).all()


def test_a_scene_of_usual_size_holds_every_class() -> None:
    for seed in range(3):
        classes = {feature.class_id for feature in lay_out((seed, 9), 1300.0)}
        assert classes == set(range(len(palettes.CLASS_NAMES)))


def test_every_palette_is_shared_by_three_classes_and_every_class_has_five() -> None:
    for palette in palettes.PALETTE_RGB:
        assert sum(palette in choices for choices in palettes.CLASS_PALETTES.values()) >= 3, palette
    for class_id, choices in palettes.CLASS_PALETTES.items():
        assert len(set(choices)) >= 5, palettes.CLASS_NAMES[class_id]


def test_places_do_not_touch() -> None:
    plans = [plan for plan in plan_scenes(0, 1280, 14, 4) if plan.visit == 0]
    for number, plan in enumerate(plans):
        for other in plans[:number]:
            if plan.epsg == other.epsg:
                apart = np.abs(np.subtract(plan.origin_en, other.origin_en)).max()
                assert apart > plan.half_m + other.half_m


def test_no_seed_leaves_out_cloud_or_nodata_and_held_out_scenes_have_neither() -> None:
    plans = plan_scenes(0, 1280, 14, 4)
    train = [plan for plan in plans if plan.split == "train"]
    assert sum(plan.has_nodata for plan in train) >= 2 and sum(plan.cloud_fraction > 0 for plan in train) >= 2
    assert not any(plan.has_nodata or plan.cloud_fraction for plan in plans if plan.split == "val")


def test_nodata_is_real_and_nothing_else_has_its_value() -> None:
    plan = next(plan for plan in plan_scenes(3, 256, 8, 0) if plan.has_nodata)
    pixels_HWC, classes_HW = draw_scene(plan, lay_out_place(plan))
    missing_HW = (pixels_HWC == NODATA).all(axis=2)
    assert 0.005 < missing_HW.mean() < 0.15
    assert (pixels_HWC[~missing_HW] > NODATA).all()
    assert (classes_HW[missing_HW] == palettes.BACKGROUND).all()


def test_the_second_visit_sees_the_same_land_under_cloud() -> None:
    clear, cloudy = plan_scenes(3, 256, 2, 0)
    assert clear.cloud_fraction == 0 < cloudy.cloud_fraction
    assert lay_out_place(cloudy) == lay_out_place(clear)


def test_clouds_cover_the_fraction_asked_and_cast_shadows() -> None:
    ground = np.full((400, 400, 3), 100, np.float32)
    covered = add_clouds(ground, Grid(0, 0, 5.0, 400, 400), 0.2, seed=3)
    assert 0.15 < (covered > 101).all(axis=2).mean() <= 0.201
    assert (covered < 90).all(axis=2).mean() > 0.02


@pytest.fixture(scope="module")
def colours_and_classes() -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """RGB (P, 3) and class ids (P,) of every fourth pixel of train and held-out scenes."""
    found: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {"train": [], "val": []}
    for plan in plan_scenes(7, 640, 5, 2):
        pixels_HWC, classes_HW = draw_scene(plan, lay_out_place(plan))
        found[plan.split].append((pixels_HWC[::2, ::2].reshape(-1, 3), classes_HW[::2, ::2].ravel()))
    return {
        split: (
            np.concatenate([pixels for pixels, _ in parts]).astype(np.float32),
            np.concatenate([classes for _, classes in parts]).astype(np.int64),
        )
        for split, parts in found.items()
    }


def _centroids(colours_P3: NDArray[Any], count: int) -> NDArray[Any]:
    """Plain k-means from evenly spread starting points in the order of lightness."""
    order = np.argsort(colours_P3.sum(axis=1))
    centres = colours_P3[order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]]
    for _ in range(20):
        nearest = ((colours_P3[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        centres = np.stack([colours_P3[nearest == number].mean(axis=0) for number in range(count)])
    return centres


@pytest.mark.parametrize("centroids_per_class", [1, 4])
def test_the_nearest_colour_says_next_to_nothing(colours_and_classes, centroids_per_class: int) -> None:
    colours_P3, classes_P = colours_and_classes["train"]
    rng = np.random.default_rng(0)
    centres = [
        _centroids(rng.permutation(colours_P3[classes_P == class_id])[:3000], centroids_per_class)
        for class_id in range(len(palettes.CLASS_NAMES))
    ]
    colours_P3, classes_P = colours_and_classes["val"]
    distances = [((colours_P3[:, None] - centre) ** 2).sum(axis=2).min(axis=1) for centre in centres]
    guesses_P = np.argmin(distances, axis=0)
    overlaps = [
        ((guesses_P == class_id) & (classes_P == class_id)).sum()
        / ((guesses_P == class_id) | (classes_P == class_id)).sum()
        for class_id in range(1, len(palettes.CLASS_NAMES))
    ]
    assert np.mean(overlaps) <= LARGEST_COLOUR_MIOU
