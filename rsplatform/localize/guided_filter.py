"""Sharpen score maps at the edges of a picture: the guided filter of He, Sun and Tang (PAMI 2013, section 3).

In: maps at pixel size and the picture they belong to. Out: maps of the same shape, whose edges are the picture's.
Torch only; it resamples nothing and chooses no threshold.
Shapes: B batch, C maps, G guide channels (1 grey, 3 colour), HxW pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def guided_filter(maps_BCHW: torch.Tensor, guide_BGHW: torch.Tensor, radius: int, epsilon: float) -> torch.Tensor:
    """Maps that follow the guide's edges: around every pixel a map is fitted as a linear function of the guide.

    The windows have 2·radius + 1 pixels a side; a pixel gets the mean of what the windows around it say, so the result
    depends on pixels up to 2·radius away. `epsilon` is in squared units of the guide: where the guide varies by less
    than √epsilon inside a window, the map is smoothed; where by more, the guide's edge is kept. Pixels beyond the
    border do not exist, and neither do those where a map (or the guide) is NaN or infinite: they take no part in
    any mean, and come out as NaN in that map only. Sums are in float64; maps come out in their own type.

    Raises ValueError for a radius below 1, an epsilon that is not above 0, or shapes that do not fit together.
    """
    _check(maps_BCHW, guide_BGHW, radius, epsilon)
    guide_BGHW = guide_BGHW.double()
    known_BHW = guide_BGHW.isfinite().all(dim=1)
    filtered, fit = [], None
    for map_BHW in maps_BCHW.unbind(1):  # one at a time: memory does not grow with the number of maps
        valid_BHW = map_BHW.isfinite() & known_BHW
        if fit is None or not torch.equal(valid_BHW, fit.valid_BHW):
            fit = _fit_of(guide_BGHW, valid_BHW, radius, epsilon)
        filtered.append(_filtered(map_BHW.double(), fit).to(maps_BCHW.dtype))
    return torch.stack(filtered, dim=1)


def _check(maps_BCHW: torch.Tensor, guide_BGHW: torch.Tensor, radius: int, epsilon: float) -> None:
    if maps_BCHW.ndim != 4 or 0 in maps_BCHW.shape:
        raise ValueError(f"maps_BCHW must be (B, C, H, W) without empty axes, got {tuple(maps_BCHW.shape)}")
    fits = guide_BGHW.ndim == 4 and maps_BCHW[:, 0].shape == guide_BGHW[:, 0].shape
    if not fits or guide_BGHW.shape[1] not in (1, 3):
        raise ValueError(
            f"guide_BGHW must be grey (B, 1, H, W) or colour (B, 3, H, W) at the size of maps "
            f"{tuple(maps_BCHW.shape)}, got {tuple(guide_BGHW.shape)}"
        )
    if radius < 1:
        raise ValueError(f"radius must be at least 1 pixel, got {radius}")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be a number above 0, in squared units of the guide, got {epsilon}")


@dataclass(frozen=True)
class _Fit:
    """What all maps with the same missing pixels share: the guide's means, and its covariances taken apart.

    Covariance + epsilon = L D Lᵀ at every pixel: `lower[row][column]` below the diagonal, `diagonal[row]`, planes each.
    """

    valid_BHW: torch.Tensor
    counts_BHW: torch.Tensor
    radius: int
    guide_GBHW: torch.Tensor
    means_GBHW: torch.Tensor
    lower: list[list[torch.Tensor]]
    diagonal: list[torch.Tensor]

    def mean(self, planes: torch.Tensor) -> torch.Tensor:
        """Mean over the valid pixels of each window; `planes` is 0 where invalid."""
        return _box_sums(planes, self.radius) / self.counts_BHW


def _fit_of(guide_BGHW: torch.Tensor, valid_BHW: torch.Tensor, radius: int, epsilon: float) -> _Fit:
    guide_GBHW = guide_BGHW.movedim(1, 0).where(valid_BHW, 0.0)
    # The guide's own mean taken off first: a covariance as a difference of large means would lose digits.
    offset_GB11 = guide_GBHW.sum((2, 3), keepdim=True) / valid_BHW.sum((1, 2), keepdim=True).clamp(min=1)
    guide_GBHW = (guide_GBHW - offset_GB11) * valid_BHW
    counts_BHW = _box_sums(valid_BHW.double(), radius).clamp(min=1)
    means_GBHW = _box_sums(guide_GBHW, radius) / counts_BHW
    channels = range(len(guide_GBHW))
    lower: list[list[torch.Tensor]] = []
    diagonal: list[torch.Tensor] = []
    for row in channels:
        lower.append([])
        for column in range(row + 1):
            products_BHW = _box_sums(guide_GBHW[row] * guide_GBHW[column], radius) / counts_BHW
            rest_BHW = products_BHW - means_GBHW[row] * means_GBHW[column]
            for before in range(column):
                factor_BHW = lower[row][before] if column == row else lower[column][before]
                rest_BHW = rest_BHW - lower[row][before] * factor_BHW * diagonal[before]
            if column == row:
                diagonal.append(rest_BHW + epsilon)
            else:
                lower[row].append(rest_BHW / diagonal[column])
    return _Fit(valid_BHW, counts_BHW, radius, guide_GBHW, means_GBHW, lower, diagonal)


def _filtered(map_BHW: torch.Tensor, fit: _Fit) -> torch.Tensor:
    """One map: fitted in every window around a valid pixel, and the fits averaged (equations 5, 6 and 8)."""
    map_BHW = map_BHW.where(fit.valid_BHW, 0.0)
    mean_BHW = fit.mean(map_BHW)
    slopes = [
        fit.mean(plane * map_BHW) - mean * mean_BHW for plane, mean in zip(fit.guide_GBHW, fit.means_GBHW, strict=True)
    ]
    channels = range(len(slopes))
    for row in channels:
        for column in range(row):
            slopes[row] = slopes[row] - fit.lower[row][column] * slopes[column]
    slopes = [slope / pivot for slope, pivot in zip(slopes, fit.diagonal, strict=True)]
    for row in reversed(channels):
        for below in range(row + 1, len(slopes)):
            slopes[row] = slopes[row] - fit.lower[below][row] * slopes[below]
    slopes_GBHW = torch.stack(slopes)
    offsets_BHW = mean_BHW - (slopes_GBHW * fit.means_GBHW).sum(0)
    mean_slopes_GBHW = fit.mean(slopes_GBHW * fit.valid_BHW)
    result_BHW = (mean_slopes_GBHW * fit.guide_GBHW).sum(0) + fit.mean(offsets_BHW * fit.valid_BHW)
    return result_BHW.masked_fill(~fit.valid_BHW, torch.nan)


def _box_sums(planes: torch.Tensor, radius: int) -> torch.Tensor:
    """Sums over (2·radius + 1)² cells around each cell of the last two axes; beyond the borders there is nothing."""
    for axis, padding in ((-2, (0, 0, 1, 1)), (-1, (1, 1))):
        reach = min(radius, planes.shape[axis] - 1)
        padded = F.pad(planes, [reach * side for side in padding])
        planes = _window_sums(padded, axis, 2 * reach + 1)
    return planes


def _window_sums(planes: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Sums of `window` cells in a row, put together from sums of 1, 2, 4, … cells.

    Differences of running totals would be fewer additions, but torch's are ten times slower along columns on a CPU.
    """
    num_sums = planes.shape[axis] - window + 1
    total, start, size = None, 0, 1
    while True:
        if window & size:
            part = planes.narrow(axis, start, num_sums)
            total = part if total is None else total + part
            start += size
        if 2 * size > window:
            assert total is not None
            return total
        half = planes.shape[axis] - size
        planes = planes.narrow(axis, 0, half) + planes.narrow(axis, size, half)
        size *= 2
