"""Landmarks from GeoJSON, GeoPackage or Shapefile: a file in; kinds, names and polygons in lon/lat out, drops beside.

A damaged record costs itself, not its file. Lines and points become polygons by their width in metres. `LandmarkIndex`
finds what is visible in a chip, with its share of the chip and its position. Reads no imagery.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import geopandas
import numpy as np
import pyogrio
import pyogrio.errors
import shapely
from pydantic import Field
from pyproj.exceptions import ProjError

from rsplatform import storage
from rsplatform.config import Config, ConfigError, InputPath
from rsplatform.ledger import Drop
from rsplatform.records import Landmark

SUFFIXES = (".geojson", ".json", ".gpkg", ".shp")
METRES_PER_DEGREE = 111_320.0
# Tag columns in the order in which they name a landmark (OpenStreetMap's keys; our default order).
KIND_COLUMNS = ("kind", "aeroway", "leisure", "building", "natural", "waterway", "landuse", "highway", "amenity")
# "column=value" → kind; "column=*" catches the rest of the column; other values speak for themselves (our default).
KINDS = {
    "building=*": "building",
    "highway=*": "road",
    "natural=bay": "water",
    "landuse=farmland": "field",
    "landuse=meadow": "field",
    "natural=wood": "forest",
}
_DAMAGED = (pyogrio.errors.FeatureError, pyogrio.errors.GeometryError, shapely.errors.GEOSException)


class LandmarkSource(Config):
    """One file of landmarks. `kind` fixes the kind of all of them; else the first filled one of `kind_columns` does.

    `kinds` adds to the module's mapping. Lines and points get `width_m`, or the number in `width_column`. Whoever must
    be credited for the map goes into `attribution`.
    """

    path: InputPath
    layer: str | None = None
    kind: str | None = None
    kind_columns: tuple[str, ...] = KIND_COLUMNS
    kinds: dict[str, str] = Field(default_factory=dict)
    name_column: str = "name"
    width_m: float = Field(default=8.0, gt=0)
    width_column: str = "width_m"
    attribution: str = ""


@dataclass(frozen=True)
class VisibleLandmark:
    """What a chip shows of a landmark: its share of the chip's area and where the visible part's centre lies."""

    landmark: Landmark
    area_fraction: float
    position: str


def read_landmarks(source: LandmarkSource, resolve: Callable[[str], str]) -> tuple[list[Landmark], list[Drop]]:
    """All usable landmarks of a file, and a drop for each other record (damaged | no_kind | no_geometry).

    Raises:
        ConfigError: the file is missing, of another format, has no such layer, no usable CRS, or holds none of the
            kind columns.
    """
    place = resolve(source.path)
    if PurePosixPath(place).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"landmarks: {place}: give one of {', '.join(SUFFIXES)}")
    if not storage.exists(place):
        raise ConfigError(f"landmarks: {place} does not exist; fix `path` or metadata.rsplatform.data_root")
    if storage.is_s3(place):  # pyogrio carries a GDAL of its own, which knows nothing of rasterio's settings
        pyogrio.set_gdal_config_options(storage.gdal_options())
    try:
        _check_layer(place, source)
        frames, drops = _read_frames(place, source)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise ConfigError(f"landmarks: {place} cannot be read: {error}") from error
    landmarks: list[Landmark] = []
    for frame in frames:
        _check_columns(frame, source, place)
        found, dropped = _landmarks(frame, source, PurePosixPath(place).stem)
        landmarks += found
        drops += dropped
    return landmarks, drops


def _check_layer(place: str, source: LandmarkSource) -> None:
    if source.layer is None:
        return
    names = [str(name) for name, _ in pyogrio.list_layers(storage.gdal_path(place))]
    if source.layer not in names:
        nearest = difflib.get_close_matches(source.layer, names, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(
            f"landmarks: {place}: no layer {source.layer!r}; {hint}It has {', '.join(names[:12])}; fix `layer`"
        )


def _read_frames(place: str, source: LandmarkSource) -> tuple[list[Any], list[Drop]]:
    options: dict[str, Any] = {"layer": source.layer} if source.layer else {}
    path = storage.gdal_path(place)
    num_records = int(pyogrio.read_info(path, force_feature_count=True, **options)["features"])
    drops: list[Drop] = []
    frames: list[Any] = []
    pending = [(0, num_records)]  # halved around damaged records, so that one costs log2(n) reads
    while pending:
        start, stop = pending.pop()
        try:
            frame = pyogrio.read_dataframe(path, skip_features=start, max_features=stop - start, **options)
            problem = "" if len(frame) == stop - start else f"{len(frame)} of {stop - start} records could be read"
        except _DAMAGED as error:
            frame, problem = None, str(error)
        if not problem and frame is not None:
            frame["_record"] = range(start, stop)
            # read on their own, damaged records come without their geometry
            frame["_is_damaged"] = frame.geometry.isna() if stop - start < num_records else False
            frames.append(_to_lonlat(frame, place))
        elif stop - start == 1:
            drops.append(Drop(f"{PurePosixPath(place).stem}/{start}", "damaged", problem))
        else:
            middle = (start + stop) // 2
            pending += [(middle, stop), (start, middle)]
    return frames, drops


def _to_lonlat(frame: Any, place: str) -> Any:
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise ConfigError(f"landmarks: {place}: has no geometry column")
    if frame.crs is None:
        raise ConfigError(f"landmarks: {place}: has no coordinate reference system; add a .prj or rewrite it with one")
    try:
        return frame.to_crs("OGC:CRS84")
    except ProjError as error:
        raise ConfigError(
            f"landmarks: {place}: {frame.crs.name!r} has no way to longitude and latitude ({error}); give it a real CRS"
        ) from error


def _check_columns(frame: Any, source: LandmarkSource, place: str) -> None:
    if source.kind or set(source.kind_columns) & set(frame.columns):
        return
    wanted = source.kind_columns[0]
    nearest = difflib.get_close_matches(wanted, [str(column) for column in frame.columns], n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(map(str, frame.columns[:12]))}"
    raise ConfigError(f"landmarks: {place}: no column {', '.join(source.kind_columns)}; {hint} Or set `kind`")


def _landmarks(frame: Any, source: LandmarkSource, stem: str) -> tuple[list[Landmark], list[Drop]]:
    rows = frame.drop(columns=frame.geometry.name).to_dict("records")
    geometries = _polygons(np.asarray(frame.geometry.values), np.array([_width_m(row, source) for row in rows]))
    landmarks, drops = [], []
    for row, geometry in zip(rows, geometries, strict=True):
        landmark_id = f"{stem}/{_text(row, 'id') or _text(row, 'osm_id') or row['_record']}"
        kind = source.kind or _kind(row, source)
        if row["_is_damaged"]:
            drops.append(Drop(landmark_id, "damaged", f"record {row['_record']}: its geometry cannot be read"))
        elif geometry is None or geometry.is_empty:
            drops.append(Drop(landmark_id, "no_geometry", "empty, or nothing is left of it after repair"))
        elif not kind:
            drops.append(
                Drop(landmark_id, "no_kind", f"record {row['_record']}: {', '.join(source.kind_columns)} empty")
            )
        else:
            landmarks.append(Landmark(landmark_id, kind, _text(row, source.name_column), geometry))
    return landmarks, drops


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return "" if value is None or value != value else str(value).strip()


def _kind(row: dict[str, Any], source: LandmarkSource) -> str:
    kinds = KINDS | source.kinds
    for column in source.kind_columns:
        value = _text(row, column).lower()
        if value and value != "no":  # OSM's building=no says that there is none
            return kinds.get(f"{column}={value}") or kinds.get(f"{column}=*") or value.replace("_", " ")
    return ""


def _width_m(row: dict[str, Any], source: LandmarkSource) -> float:
    try:
        width_m = float(row.get(source.width_column) or 0)
    except (TypeError, ValueError):
        return source.width_m
    return width_m if np.isfinite(width_m) and width_m > 0 else source.width_m


def _polygons(geometries: np.ndarray, widths_m: np.ndarray) -> np.ndarray:
    """Valid lon/lat polygons: invalid ones repaired, lines and points widened; empty where nothing is left."""
    repaired = shapely.make_valid(shapely.force_2d(geometries))
    is_thin = shapely.get_dimensions(geometries) < 2
    latitudes = shapely.bounds(repaired)[:, [1, 3]].mean(axis=1)
    shrink = np.cos(np.radians(np.nan_to_num(latitudes)))
    in_metres = _scaled(repaired[is_thin], shrink[is_thin], METRES_PER_DEGREE)
    wide = shapely.buffer(in_metres, widths_m[is_thin] / 2, cap_style="flat", quad_segs=2)
    round_ = shapely.buffer(in_metres, widths_m[is_thin] / 2, quad_segs=2)  # a flat point would vanish
    wide = np.where(shapely.get_dimensions(in_metres) == 0, round_, wide)
    repaired[is_thin] = _scaled(wide, shrink[is_thin], 1 / METRES_PER_DEGREE)
    # make_valid may leave lines and points beside the polygons of a broken one
    polygons = np.asarray(shapely.buffer(repaired, 0), dtype=object)
    polygons[np.asarray(shapely.area(polygons)) <= 0] = None
    return polygons


def _scaled(geometries: np.ndarray, shrink: np.ndarray, factor: float) -> np.ndarray:
    coordinates, index = shapely.get_coordinates(geometries, return_index=True)
    x_factor = shrink[index] if factor > 1 else 1 / shrink[index]
    scaled = coordinates * factor * np.stack([x_factor, np.ones_like(x_factor)], axis=1)
    return shapely.set_coordinates(geometries.copy(), scaled)


class LandmarkIndex:
    """Landmarks in a tree: `visible(corners)` gives what each chip shows, largest first."""

    def __init__(self, landmarks: Sequence[Landmark]):
        self._landmarks = list(landmarks)
        self._geometries = np.array([landmark.geometry for landmark in landmarks], dtype=object)
        self._tree = shapely.STRtree(self._geometries)

    def visible(self, corners_lonlat: np.ndarray, min_area_fraction: float) -> list[list[VisibleLandmark]]:
        """For each chip, given as (N, 4, 2) lon/lat corners top left, top right, bottom right, bottom left.

        A landmark counts if its part inside the chip covers at least `min_area_fraction` of the chip.
        """
        visible: list[list[VisibleLandmark]] = [[] for _ in corners_lonlat]
        chips = np.asarray(shapely.polygons(corners_lonlat), dtype=object)
        chip_index, landmark_index = self._tree.query(chips, predicate="intersects")
        parts = np.asarray(shapely.intersection(self._geometries[landmark_index], chips[chip_index]), dtype=object)
        fractions = np.asarray(shapely.area(parts)) / np.asarray(shapely.area(chips))[chip_index]
        large = fractions >= min_area_fraction
        centres = shapely.get_coordinates(shapely.centroid(parts[large]))
        rows = zip(chip_index[large], landmark_index[large], fractions[large], centres, strict=True)
        for chip, landmark, fraction, centre in rows:
            where = position(*chip_fractions(corners_lonlat[chip], centre))
            visible[chip].append(VisibleLandmark(self._landmarks[landmark], float(fraction), where))
        return [sorted(found, key=lambda item: (-item.area_fraction, item.landmark.id)) for found in visible]


def chip_fractions(corners: np.ndarray, point: np.ndarray) -> tuple[float, float]:
    """(row, column) of a lon/lat point as fractions of the chip with these corners."""
    across, down = corners[1] - corners[0], corners[3] - corners[0]
    column, row = np.linalg.solve(np.stack([across, down], axis=1), point - corners[0])
    return float(row), float(column)


def position(row_fraction: float, column_fraction: float) -> str:
    """ "centre" for the middle third, else the compass direction of the ninth (north is up in a chip)."""
    vertical = "north" if row_fraction < 1 / 3 else "south" if row_fraction > 2 / 3 else ""
    horizontal = "west" if column_fraction < 1 / 3 else "east" if column_fraction > 2 / 3 else ""
    return vertical + horizontal or "centre"
