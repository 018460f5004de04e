"""Connected regions of a mask that is seen strip by strip: their outlines, and how well the prompts fit inside.

In: strips of labels and scores, in order. Out: regions in pixel coordinates. Memory holds one strip, the regions that
reach its last row, and the outlines of all; they do not depend on where strips end.
Shapes: P prompts, HxW pixels, N pixels of one class.
"""

from dataclasses import dataclass, field

import numpy as np
import shapely
from rasterio.features import rasterize, shapes

from rsplatform.localize.decide import BACKGROUND, NO_DATA
from rsplatform.localize.legend import Legend


@dataclass(frozen=True)
class Region:
    """A 4-connected region of one class, in pixels (column, row): outline, size, best prompt there, mean score.

    `score` is the mean over the region of the class's best prompt, a cosine; `peak_margin` by how much that beats the
    background's best prompt at the pixel where it does most.
    """

    class_id: int
    outline_px: shapely.Polygon
    num_pixels: int
    prompt: str
    score: float
    peak_margin: float


@dataclass
class _Open:
    """What has been seen of a region so far."""

    class_id: int
    pieces: list[shapely.Geometry]
    num_pixels: int
    best_sum: float
    peak_margin: float
    prompt_sums: np.ndarray  # of the class's prompts

    def merged(self, other: "_Open") -> "_Open":
        numbers = (self.num_pixels + other.num_pixels, self.best_sum + other.best_sum)
        numbers = (*numbers, max(self.peak_margin, other.peak_margin))
        return _Open(self.class_id, [*self.pieces, *other.pieces], *numbers, self.prompt_sums + other.prompt_sums)


@dataclass
class RegionFinder:
    """Collects the regions of every class but background: `add` strips from first to last, then `finish`."""

    legend: Legend
    _closed: list[Region] = field(default_factory=list)
    _open: dict[int, _Open] = field(default_factory=dict)
    # of the last row seen: the number of each pixel's region in `_open`, 0 for none
    _last_row_W: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _next: int = 1

    def add(self, row: int, labels_HW: np.ndarray, scores_PHW: np.ndarray) -> None:
        """Take in the rows from `row` on: uint8 labels and the scores that they were decided from."""
        numbers_HW, pieces = self._pieces(row, labels_HW, scores_PHW)
        renamed = self._join(numbers_HW[0], pieces) if len(self._last_row_W) else {}
        for number, piece in pieces.items():
            name = renamed.get(number, number)
            self._open[name] = self._open[name].merged(piece) if name in self._open else piece
        last_row_W = np.array([renamed.get(number, number) for number in numbers_HW[-1].tolist()], dtype=np.int64)
        reached = set(np.unique(last_row_W).tolist())
        for number in [number for number in self._open if number not in reached]:
            self._close(self._open.pop(number))
        self._last_row_W = last_row_W

    def finish(self) -> list[Region]:
        """All regions, in the order of their first rows, then columns."""
        for piece in self._open.values():
            self._close(piece)
        self._open.clear()
        return sorted(self._closed, key=lambda region: (_first_pixel(region.outline_px), region.class_id))

    def _pieces(self, row: int, labels_HW: np.ndarray, scores_PHW: np.ndarray) -> tuple[np.ndarray, dict[int, _Open]]:
        """The strip's own regions by number, and the number of each of its pixels (0: none)."""
        foreground_HW = (labels_HW != BACKGROUND) & (labels_HW != NO_DATA)
        found = list(shapes(labels_HW, mask=foreground_HW, connectivity=4)) if foreground_HW.any() else []
        numbers_HW = np.zeros(labels_HW.shape, dtype=np.int64)
        if not found:
            return numbers_HW, {}
        local = ((outline, number) for number, (outline, _) in enumerate(found, 1))
        local_HW = np.zeros(labels_HW.shape, dtype=np.int32)
        rasterize(local, out=local_HW)
        pieces: dict[int, _Open] = {}
        background = self.legend.bands_of(BACKGROUND)
        for class_id in sorted({int(value) for _, value in found}):
            inside_HW = labels_HW == class_id
            places_N = local_HW[inside_HW]
            scores_PN = scores_PHW[self.legend.bands_of(class_id)][:, inside_HW]
            best_N, background_N = scores_PN.max(axis=0), scores_PHW[background][:, inside_HW].max(axis=0)
            counts = np.bincount(places_N, minlength=len(found) + 1)
            best = np.bincount(places_N, weights=best_N, minlength=len(found) + 1)
            peaks = np.full(len(found) + 1, -np.inf, dtype=best_N.dtype)
            np.maximum.at(peaks, places_N, best_N - background_N)
            sums = np.stack([np.bincount(places_N, weights=one, minlength=len(found) + 1) for one in scores_PN])
            for number in np.flatnonzero(counts).tolist():
                outline = _polygon(found[number - 1][0]["coordinates"], row)
                values = (int(counts[number]), float(best[number]), float(peaks[number]), sums[:, number])
                pieces[self._next + number - 1] = _Open(class_id, [outline], *values)
        numbers_HW[local_HW > 0] = local_HW[local_HW > 0] + (self._next - 1)
        self._next += len(found)
        return numbers_HW, pieces

    def _join(self, first_row_W: np.ndarray, pieces: dict[int, _Open]) -> dict[int, int]:
        """Which of the strip's pieces go on with open regions, those become one where a piece links them."""
        touching = np.unique(np.stack([self._last_row_W, first_row_W], axis=1)[(self._last_row_W > 0)], axis=0)
        parent: dict[int, int] = {}

        def root(number: int) -> int:
            while parent.get(number, number) != number:
                number = parent[number]
            return number

        for above, below in touching.tolist():
            if below in pieces and pieces[below].class_id == self._open[above].class_id:
                older, newer = sorted((root(above), root(below)))
                parent[newer] = older
        renamed = {number: root(number) for number in parent}
        for number in [number for number in renamed if number in self._open]:
            self._open[renamed[number]] = self._open[renamed[number]].merged(self._open.pop(number))
        return renamed

    def _close(self, piece: _Open) -> None:
        outline = piece.pieces[0]
        if len(piece.pieces) > 1:
            # the seams' vertices lie on straight edges: without them strips leave no trace
            outline = shapely.union_all(piece.pieces).simplify(0)
        assert isinstance(outline, shapely.Polygon), f"a connected region is one polygon, got {outline}"
        bands = self.legend.bands_of(piece.class_id)
        prompt = self.legend.prompts[bands[int(piece.prompt_sums.argmax())]]
        numbers = (piece.best_sum / piece.num_pixels, piece.peak_margin)
        self._closed.append(Region(piece.class_id, shapely.normalize(outline), piece.num_pixels, prompt, *numbers))


def _polygon(rings: list, row: int) -> shapely.Geometry:
    exterior, *holes = rings
    polygon = shapely.transform(shapely.Polygon(exterior, holes), lambda points: points + np.array([0.0, row]))
    return polygon if polygon.is_valid else shapely.make_valid(polygon)


def _first_pixel(outline_px: shapely.Polygon) -> tuple[float, float]:
    columns_rows = shapely.get_coordinates(outline_px)
    top = columns_rows[:, 1].min()
    return float(top), float(columns_rows[columns_rows[:, 1] == top, 0].min())
