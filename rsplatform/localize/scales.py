"""One score map from several looks at a scene: at other resolutions, through other windows, of other patches, averaged.

In: views of one scene, each as score_strips takes it, and where their patches lie. Out: strips of the first view's
patches, in order, so memory holds a row of tiles of each view. It resamples no pixels and loads no model.
Shapes: C texts, HxW patches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from pydantic import Field

from rsplatform.config import Config
from rsplatform.geo import Grid
from rsplatform.localize.scene import PatchEncoder, SceneReader, Strip, Tiling, score_strips
from rsplatform.localize.window import SmoothWindow

Pair = tuple[float, float]  # (y, x)


class MapScale(Config):
    """One more look beside the recipe's own, of equal weight: at 0.5 a pixel is twice as large, 2 half as large.

    The bounds keep a look to what training at one scale can still read, and every cell of the finer maps in the
    average (our default).
    """

    relative_resolution: float = Field(default=1.0, ge=0.25, le=2.0)
    window: SmoothWindow = 3


def windows_by_resolution(window: int, scales: Sequence[MapScale]) -> dict[float, tuple[int, ...]]:
    """Relative resolution → its windows, the widest first; the recipe's own resolution (1) and window come first.

    Windows of one resolution share its patches, so only resolutions cost a pass of the encoder.
    """
    found: dict[float, list[int]] = {1.0: [window]}
    for scale in scales:
        found.setdefault(scale.relative_resolution, []).append(scale.window)
    return {resolution: tuple(sorted(windows, reverse=True)) for resolution, windows in found.items()}


@dataclass(frozen=True)
class Looks:
    """Maps that are averaged: of `window` at the own resolution, of `scales`, of patches at `phases`² places."""

    window: int = 3
    scales: tuple[MapScale, ...] = ()
    phases: int = 1


@dataclass(frozen=True)
class View:
    """A scene at one resolution. Maps of the tiling's window and the `narrower` ones count alike.

    Patch (i, j) begins at `origin + cell * (i, j)` of a frame (y, x) that all views share, whatever its unit.
    """

    scene: SceneReader
    encoder: PatchEncoder
    tiling: Tiling
    narrower: tuple[int, ...]
    origin: Pair
    cell: Pair

    @property
    def num_windows(self) -> int:
        """How many maps this view brings to the average."""
        return 1 + len(self.narrower)

    def patches(self, axis: int) -> int:
        """Patches along axis 0 (y) or 1 (x)."""
        patch, length_px = self.encoder.patch_size_px, (self.scene.height_px, self.scene.width_px)[axis]
        return -(-(self.scene.first_px[axis] % patch + length_px) // patch)


def moved(view: View, phases: int) -> list[View]:
    """The view, and the same with patches that begin elsewhere: at `phases` x `phases` places of a patch.

    What a model makes of a picture depends on where patches cut it, the more the smaller it is; the mean depends less.
    """
    patch, (first_y, first_x) = view.encoder.patch_size_px, view.scene.first_px
    views = []
    for down, across in product([patch * phase // phases for phase in range(phases)], repeat=2):
        scene = replace(view.scene, first_px=(first_y + down, first_x + across))
        begins = [
            origin + (first % patch - now % patch) * cell / patch
            for origin, cell, first, now in zip(
                view.origin, view.cell, view.scene.first_px, scene.first_px, strict=True
            )
        ]
        views.append(replace(view, scene=scene, origin=(begins[0], begins[1])))
    return views


def placed(scene: SceneReader, grid: Grid, frame: Grid, patch_size_px: int) -> tuple[Pair, Pair]:
    """Origin and cell of a scene's patches in the pixels of another grid of the same CRS: what a View needs.

    `grid` is the scene's own. Raises ValueError if the grids are turned against each other.
    """
    pixels = ~frame.affine @ grid.affine  # of the scene → of the frame
    if max(abs(pixels.b), abs(pixels.d)) > 1e-6 * min(abs(pixels.a), abs(pixels.e)):
        raise ValueError(f"grids {grid.transform} and {frame.transform} are turned against each other")
    first_y, first_x = (-(first % patch_size_px) for first in scene.first_px)
    left, top = pixels @ (first_x, first_y)
    return (top, left), (pixels.e * patch_size_px, pixels.a * patch_size_px)


def score_scales(
    views: Sequence[View], texts_CE: torch.Tensor, patch_rows: tuple[int, int] | None = None
) -> Iterator[Strip]:
    """Mean of the maps of all views and windows, on the patches of the first view; `patch_rows` (first, end) of them.

    The other views' maps are interpolated linearly between their patches' centres, and repeated beyond the outermost.
    A patch has no data (NaN) where the first view has none; another view counts for less, down to nothing, towards
    its own missing patches. One view is `score_strips` with the mean over its windows.

    Raises ValueError without a view.
    """
    if not views:
        raise ValueError("score_scales needs at least one view")
    base, *others = views
    first, end = patch_rows or (0, base.patches(0))
    brought = [_Brought(view, base, texts_CE, first, end) for view in others]
    for strip in _window_means(base, texts_CE, (first, end)):
        missing_1HW = strip.maps_CHW[:1].isnan()
        sums_CHW = base.num_windows * strip.maps_CHW.nan_to_num(0.0)
        shares_1HW = torch.full_like(sums_CHW[:1], base.num_windows)
        for other in brought:
            maps_CHW, present_1HW = other.rows(strip.row, strip.row + strip.maps_CHW.shape[1])
            sums_CHW, shares_1HW = sums_CHW + maps_CHW, shares_1HW + present_1HW
        yield Strip(strip.row, (sums_CHW / shares_1HW).masked_fill(missing_1HW, torch.nan))


def _window_means(view: View, texts_CE: torch.Tensor, patch_rows: tuple[int, int]) -> Iterator[Strip]:
    for strip in score_strips(view.scene, view.encoder, texts_CE, view.tiling, view.narrower, patch_rows):
        yield Strip(strip.row, strip.maps_CHW.unflatten(0, (view.num_windows, -1)).mean(dim=0))


class _Brought:
    """A view's maps on the patches of another; holds only the rows that are still needed."""

    def __init__(self, view: View, base: View, texts_CE: torch.Tensor, first: int, end: int) -> None:
        self.view, self.base = view, base
        rows = self._positions(0, first, end)
        self.first, self.end = int(rows[0]), min(int(rows[-1]) + 2, view.patches(0))
        self.strips = _window_means(view, texts_CE, (self.first, self.end))
        self.columns = self._positions(1, 0, base.patches(1))
        self.held: list[torch.Tensor] = []

    def rows(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted maps (C, H, W) and weights (1, H, W) of the base's rows first … end - 1, asked for in order."""
        rows = self._positions(0, first, end)
        num_needed = min(int(rows[-1]) + 2, self.end) - self.first
        num_held = sum(strip_CHW.shape[1] for strip_CHW in self.held)
        while num_held < num_needed:
            self.held.append(next(self.strips).maps_CHW)
            num_held += self.held[-1].shape[1]
        maps_CHW = torch.cat(self.held, dim=1)[:, int(rows[0]) - self.first :]
        self.first, self.held = int(rows[0]), [maps_CHW]
        present_1HW = maps_CHW[:1].isfinite().to(maps_CHW.dtype) * self.view.num_windows
        weighted_CHW = torch.cat([maps_CHW.nan_to_num(0.0) * present_1HW, present_1HW])
        weighted_CHW = _between(_between(weighted_CHW, 1, rows - self.first), 2, self.columns)
        return weighted_CHW[:-1], weighted_CHW[-1:]

    def _positions(self, axis: int, first: int, end: int) -> torch.Tensor:
        """Where the centres of the base's patches lie among the centres of the view's, float64."""
        centres = self.base.origin[axis] + self.base.cell[axis] * (torch.arange(first, end).double() + 0.5)
        positions = (centres - self.view.origin[axis]) / self.view.cell[axis] - 0.5
        return positions.clamp(0, self.view.patches(axis) - 1)


def _between(planes: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    """Linear interpolation along an axis."""
    lower = positions.floor().long()
    upper = (lower + 1).clamp(max=planes.shape[axis] - 1)
    share = (positions - lower).to(planes.dtype).view([-1 if at == axis else 1 for at in range(planes.ndim)])
    return torch.lerp(planes.index_select(axis, lower), planes.index_select(axis, upper), share)
