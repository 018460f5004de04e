"""Cuts chips and joins landmarks: what each worker of `ingest_scenes` does to a shard, as plain callables.

In: a shard (a scene's description and a run of window numbers). Out: one row per window, kept or with a reason.
Shapes: H W pixels; 4 = red, green, blue, validity.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import shapely

from rsplatform import storage
from rsplatform.curate.chip_windows import ChipWindow, corners_lonlat, lay_out_chips, resample, to_jpeg
from rsplatform.curate.pipeline import DROP_FIELDS, Shard, replace_column
from rsplatform.records import CHIP_SCHEMA, Landmark
from rsplatform.sources.landmarks import LandmarkIndex, VisibleLandmark
from rsplatform.sources.scenes import Layer, Scene, SceneError, open_pixels, read_window, scene_from_json

# Pixels of one read, over all visits of a scene; a single chip may have more. Measured on a scene of 60,000 px at 5 cm
# with chips of 160 m: a process of 600 MB, which was 1.9 GB when it read a whole row of chips at once.
MAX_READ_PX = 12 * 2**20
# Whether a row's scene keeps chips that show no landmark: from the cutter to the joiner, not into the table.
KEEP_COLUMN = "keep_without_landmark"


@dataclass(frozen=True)
class ChipRecipe:
    """How chips are cut; the fields are those of `IngestScenesConfig`."""

    size_px: int
    ground_sample_distance_m: float
    stride_fraction: float
    max_nodata_fraction: float
    min_landmark_px: float
    keep_without_landmark: bool

    @property
    def size_m(self) -> float:
        """Ground extent of a chip."""
        return self.size_px * self.ground_sample_distance_m

    def for_scene(self, scene: Scene) -> "ChipRecipe":
        """The recipe with what the scene's source asks for otherwise."""
        wanted = {
            "ground_sample_distance_m": scene.chip_ground_sample_distance_m,
            "keep_without_landmark": scene.keep_without_landmark,
        }
        return replace(self, **{name: value for name, value in wanted.items() if value is not None})


def windows_of(scene: Scene, recipe: ChipRecipe) -> list[ChipWindow]:
    """All windows of a scene, in the order in which shards number them."""
    recipe = recipe.for_scene(scene)
    return lay_out_chips(scene.grid, recipe.size_m, recipe.size_m * recipe.stride_fraction)


def landmark_table(landmarks: list[Landmark]) -> bytes:
    """Landmarks as the Parquet file that `JoinLandmarks` loads."""
    columns: dict[str, list[Any]] = {
        name: [getattr(landmark, name) for landmark in landmarks] for name in ("id", "kind", "name")
    }
    columns["wkb"] = list(shapely.to_wkb(np.array([landmark.geometry for landmark in landmarks], dtype=object)))
    schema = pa.schema([("id", pa.string()), ("kind", pa.string()), ("name", pa.string()), ("wkb", pa.binary())])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class CutChips:
    """Reads the windows of a shard; a window that cannot be read or shows too little becomes a drop."""

    recipe: ChipRecipe

    def __call__(self, shard: Shard) -> pa.Table:
        scene = scene_from_json(shard["scene"])
        windows = windows_of(scene, self.recipe)[shard["start"] : shard["stop"]]
        rows: list[dict[str, Any]] = []
        with rasterio.Env(**dict[str, Any](storage.gdal_options())):
            pixels = open_pixels(scene)
            for run in read_together(windows, MAX_READ_PX // len(scene.visits)):
                rows += self._cut_run(scene, pixels, run)
        return pa.Table.from_pylist(rows, schema=_read_schema())

    def _cut_run(self, scene: Scene, pixels: list[Layer], windows: list[ChipWindow]) -> list[dict[str, Any]]:
        """A run of chips from one read; if that fails, each chip on its own, so that one bad block costs few."""
        try:
            strip = _Block.read(pixels, windows)
        except SceneError as error:
            if len(windows) == 1:
                return [_row(scene, windows[0]) | {"drop_reason": error.reason, "drop_detail": error.detail}]
            return [row for window in windows for row in self._cut_run(scene, pixels, [window])]
        return [self._cut(scene, strip, window) for window in windows]

    def _cut(self, scene: Scene, strip: "_Block", window: ChipWindow) -> dict[str, Any]:
        image_HWC, nodata_fraction = resample(*strip.part(window), self.recipe.size_px)
        row = _row(scene, window) | {"nodata_fraction": nodata_fraction}
        recipe = self.recipe.for_scene(scene)
        row["ground_sample_distance_m"] = recipe.ground_sample_distance_m
        row[KEEP_COLUMN] = recipe.keep_without_landmark
        row["image"] = to_jpeg(image_HWC)  # of a dropped one too, for the contact sheet
        if nodata_fraction > self.recipe.max_nodata_fraction:
            return row | {"drop_reason": "nodata", "drop_detail": f"{nodata_fraction:.2f} of the chip has no data"}
        return row


def read_together(windows: list[ChipWindow], max_px: int) -> Iterator[list[ChipWindow]]:
    """Runs of neighbours in a row of chips, in order, that at most `max_px` pixels cover together, if more than one."""
    for _, row in itertools.groupby(windows, key=lambda window: window.chip_row):
        run: list[ChipWindow] = []
        for window in row:
            if run and _area_px(run[0], window) > max_px:
                yield run
                run = []
            run.append(window)
        yield run


def _area_px(first: ChipWindow, last: ChipWindow) -> int:
    top, left, bottom, right = _outer_px([first, last])
    return (bottom - top) * (right - left)


def _outer_px(windows: list[ChipWindow]) -> tuple[int, int, int, int]:
    """Whole pixels that cover all windows: top, left, bottom, right."""
    outer = np.array([window.outer_px for window in windows])
    (top, left), (bottom, right) = outer[:, :2].min(axis=0).tolist(), outer[:, 2:].max(axis=0).tolist()
    return top, left, bottom, right


@dataclass(frozen=True)
class _Block:
    """Pixels that cover some windows, and where they begin."""

    values_HW4: np.ndarray
    top: int
    left: int

    @classmethod
    def read(cls, pixels: list[Layer], windows: list[ChipWindow]) -> "_Block":
        top, left, bottom, right = _outer_px(windows)
        return cls(read_window(pixels, top, left, bottom - top, right - left), top, left)

    def part(self, window: ChipWindow) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """The whole pixels of one window, and the window's box (left, top, right, bottom) inside them."""
        top, left, bottom, right = window.outer_px
        block_HW4 = self.values_HW4[top - self.top : bottom - self.top, left - self.left : right - self.left]
        row, column = max(window.row_px - top, 0.0), max(window.column_px - left, 0.0)
        box = (column, row, min(column + window.width_px, right - left), min(row + window.height_px, bottom - top))
        return block_HW4, box


def _row(scene: Scene, window: ChipWindow) -> dict[str, Any]:
    corners = corners_lonlat(scene.grid, window)
    bounds = scene.grid.bounds_lonlat(window.row_px, window.column_px, window.height_px, window.width_px)
    fields = ("row_px", "column_px", "height_px", "width_px")
    return {
        "id": f"{scene.id}_{window.chip_row:04d}_{window.chip_column:04d}",
        "scene": scene.id,
        "split": scene.split,
        **{name: getattr(window, name) for name in fields},
        "bounds_lonlat": list(bounds),
        "datetime": scene.datetime,
        "corners_lonlat": corners.ravel().tolist(),
        "landmarks": [],
    }


class JoinLandmarks:
    """Adds to each chip the landmarks that it shows; loads them once."""

    def __init__(self, uri: str, recipe: ChipRecipe):
        rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
        landmarks = [Landmark(row["id"], row["kind"], row["name"], shapely.from_wkb(row["wkb"])) for row in rows]
        self._index = LandmarkIndex(landmarks)
        self._recipe = recipe

    def __call__(self, table: pa.Table) -> pa.Table:
        corners = np.array(table["corners_lonlat"].to_pylist(), dtype=np.float64).reshape(-1, 4, 2)
        visible = self._index.visible(corners, self._recipe.min_landmark_px / self._recipe.size_px**2)
        landmarks = [[_landmark_row(item) for item in found] for found in visible]
        kept = zip(table["drop_reason"].to_pylist(), visible, table[KEEP_COLUMN].to_pylist(), strict=True)
        reasons = [reason or (None if found or keep else "no_landmark") for reason, found, keep in kept]
        table = replace_column(table, "landmarks", pa.array(landmarks, CHIP_SCHEMA.field("landmarks").type))
        return replace_column(table, "drop_reason", pa.array(reasons, pa.string()))


def _landmark_row(item: VisibleLandmark) -> dict[str, Any]:
    landmark = item.landmark
    return {
        "id": landmark.id,
        "kind": landmark.kind,
        "name": landmark.name,
        "position": item.position,
        "area_fraction": item.area_fraction,
    }


def _read_schema() -> pa.Schema:
    between = [pa.field("corners_lonlat", pa.list_(pa.float64(), 8)), pa.field(KEEP_COLUMN, pa.bool_())]
    return pa.schema([*CHIP_SCHEMA, *DROP_FIELDS, *between])
