"""Score maps of a whole scene sharpened at the edges of its picture, strip by strip, as if in one piece."""

from collections.abc import Iterable, Iterator

import torch
from pydantic import Field

from rsplatform.config import Config
from rsplatform.localize.guided_filter import guided_filter
from rsplatform.localize.scene import SceneReader, Strip


class GuidedFilter(Config):
    """`radius_px` in pixels of the maps; `epsilon` in squared units of colours from 0 to 1 (both our defaults).

    Edges that the picture shows by more than √epsilon within a window are taken over, weaker ones smoothed.
    """

    radius_px: int = Field(default=8, ge=1, le=256)
    epsilon: float = Field(default=1e-3, gt=0)


def sharpen_strips(strips: Iterable[Strip], scene: SceneReader, settings: GuidedFilter) -> Iterator[Strip]:
    """The same strips, filtered: equal to the filter of the whole map. Holds 4 radii of rows besides a strip."""
    reach = 2 * settings.radius_px
    held: torch.Tensor | None = None  # rows from held_row on: the context above, and what waits for its own below
    held_row = next_row = 0
    for strip in strips:
        held = strip.maps_CHW if held is None else torch.cat([held, strip.maps_CHW], dim=1)
        seen = held_row + held.shape[1]
        end = seen if seen == scene.height_px else seen - reach
        if end > next_row:
            yield Strip(next_row, _filtered(held, held_row, scene, settings)[:, next_row - held_row : end - held_row])
            first_kept = max(held_row, end - reach)
            held, held_row, next_row = held[:, first_kept - held_row :], first_kept, end


def _filtered(maps_CHW: torch.Tensor, row: int, scene: SceneReader, settings: GuidedFilter) -> torch.Tensor:
    colours_HWC = scene.read_window(row, 0, maps_CHW.shape[1], scene.width_px)
    guide_1GHW = torch.from_numpy(colours_HWC.copy()).permute(2, 0, 1)[None].double() / 255
    return guided_filter(maps_CHW[None], guide_1GHW, settings.radius_px, settings.epsilon)[0]
