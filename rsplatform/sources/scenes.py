"""Scenes from GeoTIFF or COG files: a folder, file or s3:// prefix in; descriptions and lazy uint8 pixels out.

A `Scene` is a JSON-able description (grid, dates, stretch); `open_pixels` gives it as a lazy xarray of red, green,
blue and validity (255 = data), so that a window costs only its blocks. Several dates of one place become the median
of the valid ones, each warped onto the grid of the first. Writes nothing and decides nothing about chips.
Shapes: B bands, H W pixels; the lazy array is (4, H, W).
"""

import fnmatch
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import rasterio
import rasterio.errors
import rioxarray
import xarray
from pydantic import Field
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.vrt import WarpedVRT

from rsplatform import storage
from rsplatform.config import Config, ConfigError, InputPath
from rsplatform.geo import Grid

# Only this driver opens a scene: a VRT (XML) that is named .tif would read other files and URLs of its choice.
DRIVER = "GTiff"
_CHUNKS = {"band": -1, "y": 1024, "x": 1024}
# The stretch of a scene is computed on at most this many pixels a side, from an overview where there is one.
STRETCH_SIDE_PX = 512
STRETCH_PERCENTILES = (2, 98)
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_:]?(0[1-9]|1[0-2])[-_:]?(0[1-9]|[12]\d|3[01])(?!\d)")


class SceneError(ValueError):
    """A file that is no usable scene; `reason` is one word for the ledger, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class SceneSource(Config):
    """Where scenes lie: a folder, an s3:// prefix or one file, and what they do not say themselves.

    `chip_ground_sample_distance_m` overrides the recipe's for scenes of another scale; `dates` maps globs over scene
    ids to RFC 3339 dates, for files without one; `bands` are 1-based.
    """

    path: InputPath
    pattern: str = "*.tif"
    bands: tuple[int, int, int] = (1, 2, 3)
    dates: dict[str, str] = Field(default_factory=dict)
    attribution: str = ""
    chip_ground_sample_distance_m: float | None = Field(default=None, ge=0.05, le=1000)


@dataclass(frozen=True)
class Visit:
    """One file of a scene: what turns its bands into uint8 and tells data from nothing."""

    uri: str
    bands: tuple[int, ...]
    nodata: float | None
    alpha_band: int | None
    has_mask: bool  # a mask inside the file, which only a warp reads
    stretch: tuple[tuple[float, float], ...] | None  # (low, high) per band → 0..255; None for uint8


@dataclass(frozen=True)
class Scene:
    """One georeferenced raster of one place: a single visit, or several that are composed on the first's grid.

    `uri` is the first file as the recipe names it (relative to the data root, artifact://, …).
    """

    id: str
    uri: str
    grid: Grid
    datetime: str
    attribution: str
    visits: tuple[Visit, ...]
    split: str = "train"
    chip_ground_sample_distance_m: float | None = None  # None: the recipe's

    def to_json(self) -> dict[str, Any]:
        """The description as JSON gives it back."""
        return asdict(self) | {"ground_sample_distance_m": self.grid.ground_sample_distance_m()}


def scene_from_json(document: dict[str, Any]) -> Scene:
    """The inverse of `Scene.to_json`."""
    grid = document["grid"]
    values = {
        key: document[key] for key in ("id", "uri", "datetime", "attribution", "split", "chip_ground_sample_distance_m")
    }
    visits = tuple(
        Visit(**visit | {"bands": tuple(visit["bands"]), "stretch": _pairs(visit["stretch"])})
        for visit in document["visits"]
    )
    return Scene(
        grid=Grid(grid["crs"], tuple(grid["transform"]), grid["width"], grid["height"]), visits=visits, **values
    )


def _pairs(stretch: list[list[float]] | None) -> tuple[tuple[float, float], ...] | None:
    return None if stretch is None else tuple((low, high) for low, high in stretch)


def find_scene_files(source: SceneSource, resolve: Callable[[str], str]) -> list[tuple[str, str]]:
    """(URI as the recipe names it, place to open) of every file of a source, sorted.

    Raises:
        ConfigError: the path does not exist, or holds no file that matches the pattern.
    """
    place = resolve(source.path)
    if not storage.exists(place):
        raise ConfigError(f"scenes: {place} does not exist; fix `path` or metadata.rsplatform.data_root")
    files = storage.list_files(place) if PurePosixPath(place).suffix not in {".tif", ".tiff"} else {}
    if not files:
        return [(source.path, place)]
    names = [name for name in files if fnmatch.fnmatch(name, source.pattern)]
    if not names:
        raise ConfigError(f"scenes: no file in {place} matches {source.pattern!r}; fix `pattern`")
    return [(f"{source.path.rstrip('/')}/{name}", f"{place.rstrip('/')}/{name}") for name in names]


def describe_scene(uri: str, place: str, source: SceneSource) -> Scene:
    """Read the header and an overview of one file.

    Raises:
        SceneError: reason unreadable (missing, damaged, not a GeoTIFF) | no_crs | not_georeferenced | too_few_bands |
            unsupported_type | no_data.
    """
    scene_id = PurePosixPath(place).stem
    try:
        options: dict[str, Any] = dict(storage.gdal_options())
        with rasterio.Env(**options), rasterio.open(storage.gdal_path(place), driver=DRIVER) as dataset:
            _check(dataset, source.bands)
            transform = tuple(dataset.transform)[:6]
            grid = Grid(dataset.crs.to_wkt(), transform, dataset.width, dataset.height)
            datetime = _datetime(dataset, scene_id, source.dates)
            visit = _visit(dataset, place, source.bands)
    except rasterio.errors.RasterioError as error:
        raise SceneError("unreadable", f"{place}: {error}") from error
    scale = source.chip_ground_sample_distance_m
    return Scene(scene_id, uri, grid, datetime, source.attribution, (visit,), chip_ground_sample_distance_m=scale)


def _check(dataset: Any, bands: tuple[int, ...]) -> None:
    if dataset.crs is None:
        raise SceneError("no_crs", f"{dataset.name}: no coordinate reference system; set one with gdal_edit.py -a_srs")
    if dataset.transform.is_identity:
        raise SceneError("not_georeferenced", f"{dataset.name}: no geotransform")
    if dataset.count < max(bands):
        raise SceneError("too_few_bands", f"{dataset.name}: {dataset.count} bands, the recipe wants {bands}")
    if np.dtype(dataset.dtypes[0]).kind not in "uif":
        raise SceneError("unsupported_type", f"{dataset.name}: pixels are {dataset.dtypes[0]}")


def _datetime(dataset: Any, scene_id: str, dates: dict[str, str]) -> str:
    """From the recipe, else the file's tag, else a date in its name, else empty."""
    for pattern, date in dates.items():
        if fnmatch.fnmatch(scene_id, pattern):
            return date if "T" in date else f"{date}T00:00:00Z"
    for text in (dataset.tags().get("TIFFTAG_DATETIME", ""), scene_id):
        found = _DATE.search(text)
        if found:
            time = re.search(r"\d\d:\d\d:\d\d$", text)
            return f"{'-'.join(found.groups())}T{time.group() if time else '00:00:00'}Z"
    return ""


def _visit(dataset: Any, place: str, bands: tuple[int, ...]) -> Visit:
    alpha_bands = [index for index, colour in enumerate(dataset.colorinterp, 1) if colour == ColorInterp.alpha]
    flags = dataset.mask_flag_enums[bands[0] - 1]
    has_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    visit = Visit(place, bands, dataset.nodata, alpha_bands[0] if alpha_bands else None, has_mask, None)
    scale = max(1.0, max(dataset.width, dataset.height) / STRETCH_SIDE_PX)
    shape = (dataset.count, max(1, round(dataset.height / scale)), max(1, round(dataset.width / scale)))
    sample_BHW = dataset.read(out_shape=shape)
    valid_HW = _valid(sample_BHW, visit)
    if not valid_HW.any():
        raise SceneError("no_data", f"{place}: every pixel is nodata")
    if sample_BHW.dtype == np.uint8:
        return visit
    values = [sample_BHW[band - 1][valid_HW].astype(np.float64) for band in bands]
    stretch = tuple((float(low), float(high)) for low, high in (np.percentile(v, STRETCH_PERCENTILES) for v in values))
    return replace(visit, stretch=stretch)


def _valid(raw_BHW: np.ndarray, visit: Visit) -> np.ndarray:
    """bool (H, W): where the file has data. Nodata counts where all colours have it."""
    colours_BHW = raw_BHW[[band - 1 for band in visit.bands]]
    valid_HW = np.asarray(np.isfinite(colours_BHW).all(axis=0))
    if visit.alpha_band is not None:
        valid_HW = valid_HW & (raw_BHW[visit.alpha_band - 1] > 0)
    elif visit.nodata is not None and np.isfinite(visit.nodata):
        valid_HW = valid_HW & (colours_BHW != np.array(visit.nodata).astype(raw_BHW.dtype)).any(axis=0)
    return valid_HW


def to_colours(raw_BHW: np.ndarray, visit: Visit) -> np.ndarray:
    """All bands of a file → uint8 (4, H, W): red, green, blue by the scene's stretch, and validity (0 or 255)."""
    colours_BHW = raw_BHW[[band - 1 for band in visit.bands]]
    valid_HW = _valid(raw_BHW, visit)
    if visit.stretch is not None:
        limits = np.array(visit.stretch, np.float32)
        low, range_ = limits[:, :1, None], np.maximum(limits[:, 1:, None] - limits[:, :1, None], 1e-12)
        scaled = np.nan_to_num((colours_BHW.astype(np.float32) - low) / range_)
        colours_BHW = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)
    return np.concatenate([np.where(valid_HW, colours_BHW, 0).astype(np.uint8), valid_HW[None] * np.uint8(255)])


@dataclass(frozen=True)
class Layer:
    """One visit, opened: all its bands, lazily, on the scene's grid."""

    raw: xarray.DataArray
    visit: Visit

    def colours(self, rows: slice, columns: slice) -> xarray.DataArray:
        """Lazy uint8 (4, H, W) of a window. Cut first, so that dask reads no more than that."""
        raw = self.raw.data[:, rows, columns]
        values = raw.map_blocks(to_colours, self.visit, dtype=np.uint8, chunks=((4,), *raw.chunks[1:]))
        return xarray.DataArray(values, dims=("band", "y", "x"))


def open_pixels(scene: Scene) -> list[Layer]:
    """The lazy rasters of a scene, one per visit, all on its grid. Nothing is read before a window is asked for.

    Raises:
        SceneError: reason unreadable, if a file cannot be opened any more.
    """
    try:
        return [_open_visit(visit, scene.grid, is_first=index == 0) for index, visit in enumerate(scene.visits)]
    except rasterio.errors.RasterioError as error:
        raise SceneError("unreadable", f"{scene.id}: {error}") from error


def _open_visit(visit: Visit, grid: Grid, *, is_first: bool) -> Layer:
    path = storage.gdal_path(visit.uri)
    if is_first and not visit.has_mask:
        raw = rioxarray.open_rasterio(path, chunks=_CHUNKS, lock=False, driver=DRIVER)
    else:
        # A file with neither nodata nor alpha gets nodata 0 here: outside its footprint the warp leaves black.
        nodata = 0 if visit.nodata is None and visit.alpha_band is None else visit.nodata
        visit = replace(visit, nodata=nodata)
        options = {"transform": grid.affine, "width": grid.width, "height": grid.height, "nodata": nodata}
        with (
            rasterio.open(path, driver=DRIVER) as dataset,
            WarpedVRT(dataset, crs=grid.crs, resampling=Resampling.bilinear, **options) as warped,
        ):
            raw = rioxarray.open_rasterio(warped, chunks=_CHUNKS, lock=False, driver=DRIVER)
    if not isinstance(raw, xarray.DataArray):
        raise SceneError("unreadable", f"{visit.uri}: holds several rasters")
    return Layer(raw, visit)


def _median(layers: list[xarray.DataArray]) -> xarray.DataArray:
    """Median over dates of the valid pixels (our default); a pixel is valid if any date has it."""
    stack = xarray.concat(layers, dim="date").chunk({"date": -1})
    colours = stack[:, :3].where(stack[:, 3] > 0).median("date", skipna=True).fillna(0).round().astype(np.uint8)
    return xarray.concat([colours, stack[:, 3:].max("date")], dim="band")


def read_window(layers: list[Layer], row: int, column: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 4) of a window inside the scene, on the calling thread (Ray gives the parallelism).

    Raises:
        SceneError: reason unreadable: a block that is cut off or damaged.
    """
    rows, columns = slice(row, row + height), slice(column, column + width)
    colours = [layer.colours(rows, columns) for layer in layers]
    window = colours[0] if len(colours) == 1 else _median(colours)
    try:
        values_BHW = window.compute(scheduler="synchronous").values
    except (rasterio.errors.RasterioError, OSError) as error:
        raise SceneError("unreadable", f"window row {row} column {column} {height}x{width}: {error}") from error
    return np.ascontiguousarray(np.moveaxis(values_BHW, 0, 2))


def compose(name: str, scenes: list[Scene]) -> Scene:
    """One scene of several dates of a place, on the grid of the first; dated as the latest.

    Raises:
        ValueError: no scenes.
    """
    if not scenes:
        raise ValueError(f"composite {name}: no scenes")
    first = scenes[0]
    visits = tuple(visit for scene in scenes for visit in scene.visits)
    latest = max(scene.datetime for scene in scenes)
    return replace(first, id=name, datetime=latest, visits=visits)
