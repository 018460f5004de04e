"""Peaks, regions and heatmaps of score maps."""

import io

import bright_embedder
import numpy as np
import pytest
from PIL import Image

from rsplatform.serve.localization import Localization, find_peak, heatmap_png, regions_geojson, threshold


def blob(row: int, column: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 6).astype(np.float32)


def test_the_box_holds_the_region_of_the_peak_and_no_other() -> None:
    scores = blob(3, 4) + 0.9 * blob(9, 13)
    peak = find_peak(scores)
    assert (peak.row_fraction, peak.column_fraction) == (3.5 / 12, 4.5 / 16)
    top, left, bottom, right = peak.box_fraction
    assert top < peak.row_fraction < bottom < 9 / 12 and left < peak.column_fraction < right < 13 / 16


def test_a_flat_map_has_a_peak_and_a_clear_heatmap() -> None:
    flat = np.full((4, 4), 0.3, dtype=np.float32)
    assert find_peak(flat).box_fraction == (0, 0, 1, 1)
    assert np.asarray(Image.open(io.BytesIO(heatmap_png(flat))))[..., 3].max() == 0


def test_the_heatmap_is_opaque_at_the_peak_and_clear_below_the_median() -> None:
    alpha = np.asarray(Image.open(io.BytesIO(heatmap_png(blob(3, 4), 96))))[..., 3]
    assert alpha.shape == (72, 96)  # the form of the map, so that it lies over the picture as it is
    assert np.unravel_index(alpha.argmax(), alpha.shape)[0] // 6 == 3
    assert np.median(alpha) == 0


def test_regions_cover_the_cells_above_the_threshold() -> None:
    scores = blob(3, 4) + 0.9 * blob(9, 13)
    regions = regions_geojson(scores[None], ["a"], lambda row, column: (column * 16, row * 12))
    assert len(regions["features"]) == 2
    cells = 0.0
    for feature in regions["features"]:
        x, y = np.array(feature["geometry"]["coordinates"][0]).T
        cells += abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2
    assert round(cells) == int((scores >= threshold(scores)).sum())


@pytest.mark.parametrize(("height", "width"), [(64, 161), (65, 145), (149, 64), (200, 83)])
def test_the_peak_of_an_upload_that_is_no_square_lies_where_the_picture_is_bright(height: int, width: int) -> None:
    """Twelve bright pixels near the far corner, where a grid larger than the picture would be off by most."""
    row, column = height - 10.0, width - 10.0
    rows, columns = np.mgrid[:height, :width] + 0.5
    spot_HW = np.where((rows - row) ** 2 + (columns - column) ** 2 <= 36, 255, 0).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(spot_HW).save(file, "PNG")
    embedder = bright_embedder.bright_embedder()
    bright_E = bright_embedder.bright_and_dark_texts()[1:].numpy()
    (maps_CHW,) = Localization(embedder, window=1).maps([file.getvalue()], bright_E)
    peak = find_peak(maps_CHW[0])
    cells_high, cells_wide = maps_CHW.shape[1:]
    assert abs(peak.row_fraction - row / height) <= 0.5 / cells_high + 1e-6
    assert abs(peak.column_fraction - column / width) <= 0.5 / cells_wide + 1e-6
