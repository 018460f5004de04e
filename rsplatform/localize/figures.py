"""Pictures of masks over scenes for MLflow; makes no numbers."""

import matplotlib
import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rsplatform.localize.scene import SceneReader

LONGEST_SIDE_PX = 1200
LEGEND_NAMES = 40


def mask_overlay(scene: SceneReader, mask: str, class_names: list[str]) -> Figure:
    """The scene beside its mask, thinned to at most LONGEST_SIDE_PX; one colour a class, background clear.

    `mask` is a path as GDAL spells it. Memory holds a strip of each.
    """
    step = max(1, -(-max(scene.height_px, scene.width_px) // LONGEST_SIDE_PX))
    strip_rows = step * -(-512 // step)  # a multiple of the step, so that each strip can be thinned by itself
    images, masks = [], []
    with rasterio.open(mask, driver="GTiff") as dataset:
        for row in range(0, scene.height_px, strip_rows):
            end = min(row + strip_rows, scene.height_px)
            # copied: a view of every nth pixel would keep all of them
            images.append(scene.read_window(row, 0, end - row, scene.width_px)[::step, ::step].copy())
            masks.append(dataset.read(1, window=((row, end), (0, scene.width_px)))[::step, ::step].copy())
    mask_HW = np.concatenate(masks)
    colours = matplotlib.colormaps["tab10"]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(np.concatenate(images))
        axes.axis("off")
    for index, _ in enumerate(class_names, 1):
        layer = np.zeros((*mask_HW.shape, 4))
        layer[mask_HW == index] = colours((index - 1) % colours.N)
        right.imshow(layer, alpha=0.6, interpolation="nearest")
    handles = [Patch(color=colours(index % colours.N), label=name) for index, name in enumerate(class_names)]
    figure.legend(handles=handles[:LEGEND_NAMES], loc="outside lower center", ncols=min(8, len(handles)))
    return figure
