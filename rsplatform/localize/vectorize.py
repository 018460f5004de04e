"""Score maps to files that a GIS opens: a score COG, a mask COG and polygons with their true area.

In: strips of scores at pixel size, the scene's grid, what the prompts mean. Out: files on the local disk,
each written under another name and renamed when complete, so a half-written one is never seen. It decides by
`decide.py` only.
Shapes: P prompts, HxW pixels.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import shapely
import shapely.geometry
from affine import Affine
from pyproj import Geod
from rasterio.features import geometry_mask, shapes
from rasterio.io import DatasetReader, DatasetWriter

from rsplatform.geo import Grid, to_lonlat
from rsplatform.localize.decide import BACKGROUND, NO_DATA, label_pixels
from rsplatform.localize.scene import Strip

ROWS_AT_A_TIME = 512
# Straight edges bend on the ellipsoid; for the area they are cut into pieces of at most this many pixels.
EDGE_PIXELS = 32


@dataclass(frozen=True)
class Legend:
    """What the bands of a score map mean and which model made them: written into every file."""

    prompts: tuple[str, ...]
    class_of_prompt: tuple[int, ...]
    model_hash: str

    def tags(self) -> dict[str, str]:
        """As metadata of a raster."""
        return {
            "prompts": json.dumps(self.prompts, ensure_ascii=False),
            "class_of_prompt": json.dumps(self.class_of_prompt),
            "model_hash": self.model_hash,
        }


def write_scores(path: Path, grid: Grid, strips: Iterable[Strip], legend: Legend) -> None:
    """Score COG: float32, one band a prompt, NaN for no data; memory holds one strip.

    A grid with an empty `crs` is written without one. Raises ValueError if the strips do not fill the grid in
    order.
    """
    profile = {"count": len(legend.prompts), "dtype": "float32", "nodata": float("nan")}
    with _raster_to_cog(path, grid, profile, "AVERAGE") as raster:
        next_row = 0
        for strip in strips:
            expected = (len(legend.prompts), strip.maps_CHW.shape[1], grid.width)
            if strip.row != next_row or tuple(strip.maps_CHW.shape) != expected:
                raise ValueError(
                    f"strip at row {strip.row} of {tuple(strip.maps_CHW.shape)} where row {next_row} of {expected} fits"
                )
            next_row += expected[1]
            raster.write(strip.maps_CHW.numpy(), window=((strip.row, next_row), (0, grid.width)))
        if next_row != grid.height:
            raise ValueError(f"strips fill {next_row} of {grid.height} rows")
        raster.update_tags(**legend.tags())
        for band, prompt in enumerate(legend.prompts, start=1):
            raster.set_band_description(band, prompt)


def write_mask(path: Path, score_path: Path, grid: Grid, legend: Legend) -> None:
    """Mask COG: uint8 class ids decided from the score COG, 255 for no data."""
    profile = {"count": 1, "dtype": "uint8", "nodata": NO_DATA}
    with (
        rasterio.open(score_path, driver="GTiff") as scores,
        _raster_to_cog(path, grid, profile, "NEAREST") as raster,
    ):
        for row in range(0, grid.height, ROWS_AT_A_TIME):
            window = ((row, min(row + ROWS_AT_A_TIME, grid.height)), (0, grid.width))
            raster.write(label_pixels(scores.read(window=window), legend.class_of_prompt), 1, window=window)
        raster.update_tags(**legend.tags())


def write_polygons(path: Path, mask_path: Path, score_path: Path, legend: Legend, min_area_m2: float = 0.0) -> int:
    """GeoJSON (EPSG:4326) of the connected regions of every class but background; returns how many.

    Properties: class_id, prompt (the class's best one there), score (mean of the class's best prompt over the
    region), area_m2 (geodesic, on WGS 84), model_hash. Regions below `min_area_m2` are left out. A mask
    without CRS gives pixel coordinates (column, row) and area_px instead of area_m2, and the file says so;
    then `min_area_m2` must be 0, else ValueError.
    """
    with (
        rasterio.open(mask_path, driver="GTiff") as mask,
        rasterio.open(score_path, driver="GTiff") as scores,
    ):
        if mask.crs is None and min_area_m2 > 0:
            raise ValueError(f"{mask_path} has no CRS, so min_area_m2 = {min_area_m2} means nothing; set it to 0")
        features = list(_features(mask, scores, legend, min_area_m2))
        frame = {} if mask.crs else {"coordinates": "pixel (column, row): the scene has no CRS"}
    collection = {"type": "FeatureCollection", **frame, "features": features}
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(collection, ensure_ascii=False), encoding="utf-8")
    return len(features)


def _features(
    mask: DatasetReader, scores: DatasetReader, legend: Legend, min_area_m2: float
) -> Iterator[dict[str, Any]]:
    # In pixel coordinates, because regions are scored on the raster's own grid; the uint8 mask is read whole.
    for outline, value in shapes(mask.read(1), connectivity=4):
        class_id = int(value)
        if class_id in (BACKGROUND, NO_DATA):
            continue
        exterior, *holes = outline["coordinates"]
        region_px = shapely.Polygon(exterior, holes)
        polygon, area = region_px, {"area_px": int(region_px.area)}
        if mask.crs:
            polygon = _in_lonlat(region_px, mask)
            area_m2 = geodesic_area_m2(_in_lonlat(region_px, mask, EDGE_PIXELS))
            area = {"area_m2": round(area_m2, 3)}
            if area_m2 < min_area_m2:
                continue
        prompt, score = _region_score(region_px, class_id, scores, legend)
        named = {"class_id": class_id, "prompt": prompt, "score": round(score, 6)}
        yield {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shapely.geometry.polygon.orient(polygon)),
            "properties": named | area | {"model_hash": legend.model_hash},
        }


def geodesic_area_m2(polygon_lonlat: shapely.Polygon) -> float:
    """True area on the WGS 84 ellipsoid, holes taken off."""
    oriented = shapely.geometry.polygon.orient(polygon_lonlat)
    return abs(Geod(ellps="WGS84").geometry_area_perimeter(oriented)[0])


def _in_lonlat(
    region_px: shapely.Polygon, mask: DatasetReader, longest_edge_px: float | None = None
) -> shapely.Polygon:
    transformer = to_lonlat(mask.crs.to_wkt())

    def ring(ring_px: shapely.LinearRing) -> np.ndarray:
        cut = shapely.segmentize(ring_px, longest_edge_px) if longest_edge_px else ring_px
        x, y = mask.transform @ tuple(shapely.get_coordinates(cut).T)
        return np.stack(transformer.transform(x, y), axis=1)

    return shapely.Polygon(ring(region_px.exterior), [ring(hole) for hole in region_px.interiors])


def _region_score(
    region_px: shapely.Polygon, class_id: int, scores: DatasetReader, legend: Legend
) -> tuple[str, float]:
    left, top, right, bottom = (int(edge) for edge in region_px.bounds)
    window = ((top, bottom), (left, right))
    bands = [band for band, owner in enumerate(legend.class_of_prompt, start=1) if owner == class_id]
    inside_HW = geometry_mask([region_px], (bottom - top, right - left), Affine.translation(left, top), invert=True)
    scores_PN = scores.read(bands, window=window)[:, inside_HW]
    best_prompt = legend.prompts[bands[int(scores_PN.mean(axis=1).argmax())] - 1]
    return best_prompt, float(scores_PN.max(axis=0).mean())


@contextmanager
def _raster_to_cog(
    path: Path, grid: Grid, profile: dict[str, Any], overview_resampling: str
) -> Iterator[DatasetWriter]:
    """A plain GeoTIFF to write rows into; turned into a COG at `path` if the block ends well.

    The COG driver itself would keep the whole raster in memory while it is written.
    """
    with _replacing(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder) / "plain.tif"
        with rasterio.open(
            plain,
            "w",
            driver="GTiff",
            width=grid.width,
            height=grid.height,
            crs=grid.crs or None,
            transform=grid.affine,
            bigtiff="IF_SAFER",
            **profile,
        ) as raster:
            yield raster
        options = {"compress": "DEFLATE", "predictor": "YES", "overview_resampling": overview_resampling}
        rasterio.shutil.copy(plain, temporary, driver="COG", bigtiff="IF_SAFER", **options)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed over it if the block ends well, removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
