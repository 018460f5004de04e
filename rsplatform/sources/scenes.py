"""Scenes from GeoTIFF or COG files: a folder, file or s3:// prefix in; descriptions and lazy uint8 pixels out.

A `Scene` is a JSON-able description (grid, dates, stretch); `open_pixels` gives it as a lazy xarray of red, green,
blue and validity (255 = data), so that a window costs only its blocks. Several dates of one place become the median
of the valid ones, each warped onto the grid of the first. Writes nothing and decides nothing about chips.
Shapes: B bands, H W pixels; the lazy array is (4, H, W).
"""

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import rasterio
import rasterio.errors
import rioxarray
import xarray
from pydantic import Field, field_validator
from rasterio.enums import MaskFlags, Resampling
from rasterio.vrt import WarpedVRT

from rsplatform import storage
from rsplatform.config import Config, ConfigError, InputPath
from rsplatform.geo import CrsError, Grid
from rsplatform.records import parse_time
from rsplatform.sources.visit import SceneError, ValueRange, Visit, describe_visit, to_colours, visit_from_json

# Only this driver opens a scene: a VRT (XML) that is named .tif would read other files and URLs of its choice.
DRIVER = "GTiff"
ENDINGS = (".tif", ".tiff")  # in any case
_CHUNKS = {"band": -1, "y": 1024, "x": 1024}
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_:]?(0[1-9]|1[0-2])[-_:]?(0[1-9]|[12]\d|3[01])(?!\d)")


class SceneSource(Config):
    """Where scenes lie: a folder, an s3:// prefix or one file, and what they do not say themselves.

    `chip_ground_sample_distance_m` overrides the recipe's for scenes of another scale, `keep_without_landmark` for
    scenes that no landmarks cover; `dates` maps globs over scene ids to RFC 3339 dates, for files without one; `bands`
    are 1-based. `pattern` is a glob over the names below a folder; neither case nor the spelling of the ending (.tif,
    .tiff) makes a difference. `value_range` is what becomes black and white, in values of the file: [low, high] for all
    bands or a pair for each. Without it 8-bit files are taken as they are, and others from the 2nd to the 98th
    percentile of each file (our default): parts of such a scene are as bright as the whole only with it.
    """

    path: InputPath
    pattern: str = "*.tif"
    bands: tuple[int, int, int] = (1, 2, 3)
    dates: dict[str, str] = Field(default_factory=dict)
    attribution: str = ""
    chip_ground_sample_distance_m: float | None = Field(default=None, ge=0.05, le=1000)
    keep_without_landmark: bool | None = None
    value_range: ValueRange | None = None

    @field_validator("dates")
    @classmethod
    def _dates_are_dates(cls, dates: dict[str, str]) -> dict[str, str]:
        for pattern, date in dates.items():
            try:
                parse_time(date)
            except ValueError:
                raise ValueError(
                    f"{pattern!r}: {date!r} is no date; write one such as 2010-07-01 or 2010-07-01T10:30:00Z"
                ) from None
        return dates

    def select_files(self, names: Sequence[str]) -> list[str]:
        """Of the files below the folder, those that match the pattern.

        Raises:
            ConfigError: none does.
        """
        pattern = _spelt_alike(self.pattern)
        found = [name for name in names if fnmatch.fnmatchcase(_spelt_alike(name), pattern)]
        if not found:
            raise ConfigError(f"no file matches {self.pattern!r}; fix `pattern`")
        return found


def _spelt_alike(name: str) -> str:
    """A name or glob in small letters, with the short one of the two endings of a GeoTIFF."""
    name = name.lower()
    return name[:-1] if name.endswith(".tiff") else name


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
    # None: the recipe's
    chip_ground_sample_distance_m: float | None = None
    keep_without_landmark: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The description as JSON gives it back."""
        return asdict(self) | {"ground_sample_distance_m": self.grid.ground_sample_distance_m()}


def scene_from_json(document: dict[str, Any]) -> Scene:
    """The inverse of `Scene.to_json`."""
    grid, visits = Grid(**document["grid"] | {"transform": tuple(document["grid"]["transform"])}), document["visits"]
    values = {field.name: document[field.name] for field in fields(Scene) if field.name in document}
    return Scene(**values | {"grid": grid, "visits": tuple(visit_from_json(visit) for visit in visits)})


def find_scene_files(source: SceneSource, resolve: Callable[[str], str]) -> list[tuple[str, str]]:
    """(URI as the recipe names it, place to open) of every file of a source, sorted.

    Raises:
        ConfigError: the path does not exist, or holds no file that matches the pattern.
    """
    place = resolve(source.path)
    if not storage.exists(place):
        raise ConfigError(f"scenes: {place} does not exist; fix `path` or metadata.rsplatform.data_root")
    files = storage.list_files(place) if PurePosixPath(place).suffix.lower() not in ENDINGS else {}
    if not files:
        return [(source.path, place)]
    try:
        names = source.select_files(list(files))
    except ConfigError as error:
        raise ConfigError(f"scenes: {place}: {error}") from None
    return [(f"{source.path.rstrip('/')}/{name}", f"{place.rstrip('/')}/{name}") for name in names]


def describe_scene(uri: str, place: str, source: SceneSource, *, may_lack_crs: bool = False) -> Scene:
    """Read the header of one file, and of one whose stretch is to be measured a sample of its pixels.

    With `may_lack_crs` a file without CRS or geotransform is a scene whose grid has an empty `crs` and whose
    coordinates are pixels (column, row).

    Raises:
        SceneError: reason unreadable (missing, damaged, not a GeoTIFF) | no_crs | unusable_crs | not_georeferenced |
            too_few_bands | unsupported_type | no_data.
    """
    scene_id = PurePosixPath(place).stem
    try:
        options: dict[str, Any] = dict(storage.gdal_options())
        with rasterio.Env(**options), rasterio.open(storage.gdal_path(place), driver=DRIVER) as dataset:
            grid = (_unplaced(dataset) if may_lack_crs else None) or _placed(dataset)
            _check_pixels(dataset, source.bands)
            datetime = _datetime(dataset, scene_id, source.dates)
            visit = describe_visit(dataset, place, source.bands, source.value_range)
    except rasterio.errors.RasterioError as error:
        raise SceneError("unreadable", f"{place}: {error}") from error
    except (CrsError, rasterio.errors.CRSError) as error:
        raise SceneError("unusable_crs", f"{place}: {error}; set the right one with gdal_edit.py -a_srs") from error
    overrides: dict[str, Any] = {
        name: getattr(source, name) for name in ("chip_ground_sample_distance_m", "keep_without_landmark")
    }
    return Scene(scene_id, uri, grid, datetime, source.attribution, (visit,), **overrides)


def _placed(dataset: Any) -> Grid:
    if dataset.crs is None:
        raise SceneError("no_crs", f"{dataset.name}: no coordinate reference system; set one with gdal_edit.py -a_srs")
    if dataset.transform.is_identity:
        raise SceneError("not_georeferenced", f"{dataset.name}: no geotransform")
    grid = Grid(dataset.crs.to_wkt(), tuple(dataset.transform)[:6], dataset.width, dataset.height)
    grid.check_on_earth()
    return grid


def _unplaced(dataset: Any) -> Grid | None:
    """The grid of a file that lies nowhere: its pixels; None if it has a CRS and a geotransform.

    Raises:
        SceneError: reason no_crs, for one with a mask inside, which only a warp on the ground reads.
    """
    if dataset.crs is not None and not dataset.transform.is_identity:
        return None
    if MaskFlags.per_dataset in dataset.mask_flag_enums[0] and MaskFlags.alpha not in dataset.mask_flag_enums[0]:
        raise SceneError("no_crs", f"{dataset.name}: has a mask, which is read only with a CRS; set one (gdal_edit.py)")
    return Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), dataset.width, dataset.height)


def _check_pixels(dataset: Any, bands: tuple[int, ...]) -> None:
    if dataset.count < max(bands):
        raise SceneError("too_few_bands", f"{dataset.name}: {dataset.count} bands, the recipe wants {bands}")
    if np.dtype(dataset.dtypes[0]).kind not in "uif":
        raise SceneError("unsupported_type", f"{dataset.name}: pixels are {dataset.dtypes[0]}")


def _datetime(dataset: Any, scene_id: str, dates: dict[str, str]) -> str:
    """RFC 3339 in UTC: from the recipe, else the file's tag, else a date in its name; empty if these give no time."""
    for pattern, date in dates.items():
        if fnmatch.fnmatch(scene_id, pattern):
            return _rfc3339(date)
    for text in (dataset.tags().get("TIFFTAG_DATETIME", ""), scene_id):
        found = _DATE.search(text)
        if found:
            time = re.search(r"\d\d:\d\d:\d\d$", text)
            try:
                return _rfc3339(f"{'-'.join(found.groups())}T{time.group() if time else '00:00:00'}")
            except ValueError:
                continue  # 31 February, 25 o'clock: it says nothing
    return ""


def _rfc3339(text: str) -> str:
    return f"{parse_time(text):%Y-%m-%dT%H:%M:%SZ}"


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
    """One scene of several dates of a place, on the grid of the first and cut as its source says; dated as the latest.

    It credits everybody whose scenes it is made of.

    Raises:
        ValueError: no scenes.
    """
    if not scenes:
        raise ValueError(f"composite {name}: no scenes")
    first = scenes[0]
    visits = tuple(visit for scene in scenes for visit in scene.visits)
    latest = max(scene.datetime for scene in scenes)
    credits = "; ".join(dict.fromkeys(scene.attribution for scene in scenes if scene.attribution))
    return replace(first, id=name, datetime=latest, attribution=credits, visits=visits)
