"""Pictures of masks over scenes for MLflow; makes no numbers."""

from pathlib import Path

import matplotlib
import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rsplatform.localize.scene import SceneReader

LONGEST_SIDE_PX = 1200


def mask_overlay(scene: SceneReader, mask_path: Path, class_names: list[str]) -> Figure:
    """The scene beside its mask, thinned to at most LONGEST_SIDE_PX; one colour a class, background clear."""
    step = max(1, -(-max(scene.height_px, scene.width_px) // LONGEST_SIDE_PX))
    strip_rows = step * -(-512 // step)  # a multiple of the step, so that each strip can be thinned by itself
    strips = [
        scene.read_window(row, 0, min(strip_rows, scene.height_px - row), scene.width_px)[::step, ::step]
        for row in range(0, scene.height_px, strip_rows)
    ]
    image_HWC = np.concatenate(strips)
    with rasterio.open(mask_path, driver="GTiff") as dataset:
        mask_HW = dataset.read(1)[::step, ::step]
    colours = matplotlib.colormaps["tab10"]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(image_HWC)
        axes.axis("off")
    for index, _ in enumerate(class_names, 1):
        layer = np.zeros((*mask_HW.shape, 4))
        layer[mask_HW == index] = colours(index - 1)
        right.imshow(layer, alpha=0.6, interpolation="nearest")
    handles = [Patch(color=colours(index), label=name) for index, name in enumerate(class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))
    return figure
