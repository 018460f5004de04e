"""Pictures of results for MLflow: recall against chance, bars by class, label maps beside masks; makes no numbers."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rsplatform.evaluate.benchmarks import MaskClass

# Colour-blind safe, the background last in lightness.
CLASS_COLOURS = [
    "#d9d9d9", "#e6ab02", "#1f78b4", "#525252", "#e31a1c", "#6a3d9a", "#ff7f00", "#17becf", "#1b7837", "#a65628",
]  # fmt: skip


LONGEST_SIDE_PX = 640  # of one panel; more takes seconds to draw and is not seen


def recall_plot(recalls: Mapping[str, float], chance: Mapping[str, float], title: str) -> Figure:
    """Recall at 1, 5, 10 both ways as bars, chance as a line across each."""
    keys = [key for key in recalls if key != "mean_recall"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(keys, [recalls[key] for key in keys], color="#1f78b4", label="model")
    axes.scatter(keys, [chance[key] for key in keys], marker="_", s=900, color="#e31a1c", label="chance")
    axes.set_ylabel("recall, %")
    axes.set_title(f"{title}: mean recall {recalls['mean_recall']:.1f} %")
    axes.legend()
    return figure


def bars(values: Mapping[str, float], title: str) -> Figure:
    """Horizontal bars in the order given."""
    figure = Figure(figsize=(6, 0.28 * len(values) + 0.8), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(values)[::-1], list(values.values())[::-1], color="#1f78b4")
    axes.set_xlim(0, 100)
    axes.set_title(title)
    return figure


def label_overlays(
    image_HWC: np.ndarray, mask_HW: np.ndarray, labels: dict[str, np.ndarray], classes: list[MaskClass]
) -> Figure:
    """The picture, its mask and each method's labels side by side, thinned, with one legend."""
    step = max(1, -(-max(mask_HW.shape) // LONGEST_SIDE_PX))
    panels = {name: panel[::step, ::step] for name, panel in ({"picture": image_HWC, "mask": mask_HW} | labels).items()}
    figure = Figure(figsize=(3.2 * len(panels), 3.8), layout="constrained")
    colours = ListedColormap([CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(len(classes))])
    for axes, (name, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        shown = panel if panel.ndim == 3 else np.ma.masked_equal(panel, 255)
        axes.imshow(shown, cmap=colours, vmin=-0.5, vmax=len(classes) - 0.5, interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    handles = [Patch(color=colours(i), label=item.name) for i, item in enumerate(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(9, len(classes)), fontsize=8)
    return figure


def heat_overlay(image_HWC: np.ndarray, map_HW: np.ndarray, title: str) -> Figure:
    """One map over its picture, in the map's own range."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    extent = (0, image_HWC.shape[1], image_HWC.shape[0], 0)
    axes.imshow(image_HWC, extent=extent)
    axes.imshow(map_HW, cmap=matplotlib.colormaps["inferno"], alpha=0.5, extent=extent, interpolation="bilinear")
    axes.set_title(title)
    axes.axis("off")
    return figure
