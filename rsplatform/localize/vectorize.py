"""Regions of a mask to objects on the ground, and to the vector files that a GIS opens.

In: regions in pixels, the scene's grid, what the prompts mean. Out: GeoJSON, GeoPackage and FlatGeobuf on the local
disk, in longitude and latitude (EPSG:4326), each renamed when complete. It decides nothing but which regions are too
small and which holes are filled.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas
import pyogrio
import shapely
import shapely.geometry
from pyproj import Geod

from rsplatform.geo import Grid, to_lonlat
from rsplatform.localize.legend import Legend
from rsplatform.localize.rasters import replacing
from rsplatform.localize.regions import Region

# Straight edges bend on the ellipsoid; for the area they are cut into pieces of at most this many pixels.
EDGE_PIXELS = 32
PIXELS_SAID = "pixel (column, row): the scene has no CRS"
# A GeoPackage holds the time of its writing; with a fixed one the same regions give the same bytes.
WRITTEN = "1970-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Limits:
    """Regions below `min_area_m2` are left out, holes up to `max_hole_m2` filled unless they hold another region.

    `pixel_size_m` is what a pixel is taken for where no CRS tells, for these limits only.
    """

    min_area_m2: float = 0.0
    max_hole_m2: float = 0.0
    pixel_size_m: float = 1.0


@dataclass(frozen=True)
class Found:
    """A region on the ground: its polygon, box (the region's extent along the scene's rows and columns) and a point.

    Coordinates are (lon, lat), or pixels (column, row) in a scene without CRS; then `area` is in pixels, else in m²,
    geodesic on WGS 84. The point lies inside the region. `box_px` is (left, top, right, bottom).
    """

    region: Region
    polygon: shapely.Polygon
    box: shapely.Polygon
    point: shapely.Point
    box_px: tuple[int, int, int, int]
    area: float


def find_objects(regions: Sequence[Region], grid: Grid, limits: Limits) -> list[Found]:
    """The regions that are large enough, small holes filled, on the ground; in the order given."""
    pixel_m2 = math.prod(grid.pixel_size_m()) if grid.crs else limits.pixel_size_m**2
    # a pixel's area differs within a scene, by less than this factor: the small ones need no geodesic
    large = [region for region in regions if region.num_pixels * pixel_m2 * 4 >= limits.min_area_m2]
    areas_m2 = [_area_m2(region.outline_px, grid, limits) for region in large]
    kept = [region for region, area_m2 in zip(large, areas_m2, strict=True) if area_m2 >= limits.min_area_m2]
    tree = shapely.STRtree([region.outline_px for region in kept])
    return [_found(replace(region, outline_px=_filled(region, kept, tree, grid, limits)), grid) for region in kept]


def _filled(
    region: Region, others: Sequence[Region], tree: shapely.STRtree, grid: Grid, limits: Limits
) -> shapely.Polygon:
    """The outline without its small holes; a hole that holds a kept region of another class stays one."""
    outline = region.outline_px
    if limits.max_hole_m2 == 0 or not outline.interiors:
        return outline
    rest = []
    for ring in outline.interiors:
        hole = shapely.Polygon(ring)
        taken = any(others[index].class_id != region.class_id for index in tree.query(hole, predicate="covers"))
        if taken or _area_m2(hole, grid, limits) > limits.max_hole_m2:
            rest.append(ring)
    return shapely.Polygon(outline.exterior, rest)


def _area_m2(outline_px: shapely.Polygon, grid: Grid, limits: Limits) -> float:
    if not grid.crs:
        return outline_px.area * limits.pixel_size_m**2
    return geodesic_area_m2(_in_lonlat(outline_px, grid, EDGE_PIXELS))


def geodesic_area_m2(polygon_lonlat: shapely.Polygon) -> float:
    """True area on the WGS 84 ellipsoid, holes taken off."""
    oriented = shapely.geometry.polygon.orient(polygon_lonlat)
    return abs(Geod(ellps="WGS84").geometry_area_perimeter(oriented)[0])


def _found(region: Region, grid: Grid) -> Found:
    outline = region.outline_px
    left, top, right, bottom = (int(edge) for edge in outline.bounds)
    box, point = shapely.box(left, top, right, bottom), outline.point_on_surface()
    polygon, area = outline, outline.area
    if grid.crs:
        area = geodesic_area_m2(_in_lonlat(outline, grid, EDGE_PIXELS))
        polygon, box = _in_lonlat(outline, grid), _in_lonlat(box, grid)
        point = shapely.Point(grid.lonlat(point.y, point.x))
    oriented = shapely.geometry.polygon.orient(polygon)
    return Found(region, oriented, shapely.geometry.polygon.orient(box), point, (left, top, right, bottom), area)


def _in_lonlat(polygon_px: shapely.Polygon, grid: Grid, longest_edge_px: float | None = None) -> shapely.Polygon:
    transformer = to_lonlat(grid.crs)

    def ring(ring_px: shapely.LinearRing) -> np.ndarray:
        cut = shapely.segmentize(ring_px, longest_edge_px) if longest_edge_px else ring_px
        x, y = grid.affine @ tuple(shapely.get_coordinates(cut).T)
        return np.stack(transformer.transform(x, y), axis=1)

    return shapely.Polygon(ring(polygon_px.exterior), [ring(hole) for hole in polygon_px.interiors])


def properties(found: Found, legend: Legend, grid: Grid) -> dict[str, Any]:
    """What every file says of a region; area_px in place of area_m2 where the scene has no CRS."""
    region = found.region
    area = {"area_m2": round(found.area, 3)} if grid.crs else {"area_px": int(found.area)}
    return {
        "class_id": region.class_id,
        "class": legend.class_names[region.class_id - 1],
        "prompt": region.prompt,
        "score": round(region.score, 6),
        **area,
        "model": legend.model,
        "model_hash": legend.model_hash,
    }


def write_polygons(path: Path, objects: Sequence[Found], legend: Legend, grid: Grid) -> None:
    """GeoJSON of the outlines; in pixels, as the file says, if the scene has no CRS."""
    pairs = [(found.polygon, properties(found, legend, grid)) for found in objects]
    _write_geojson(path, pairs, grid)


def write_boxes(path: Path, objects: Sequence[Found], legend: Legend, grid: Grid) -> None:
    """GeoJSON of the boxes, each with its region's point and its place in pixels of the mask among the properties."""
    pairs = []
    for found in objects:
        left, top, right, bottom = found.box_px
        place = {"row_px": top, "column_px": left, "height_px": bottom - top, "width_px": right - left}
        axes = ("point_lon", "point_lat") if grid.crs else ("point_column_px", "point_row_px")
        point = dict(zip(axes, (found.point.x, found.point.y), strict=True))
        pairs.append((found.box, properties(found, legend, grid) | point | place))
    _write_geojson(path, pairs, grid)


def _write_geojson(path: Path, pairs: list[tuple[shapely.Polygon, dict[str, Any]]], grid: Grid) -> None:
    features = [
        {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": values}
        | {"bbox": list(shape.bounds)}
        for shape, values in pairs
    ]
    said = {} if grid.crs else {"coordinates": PIXELS_SAID}
    collection = {"type": "FeatureCollection", **said, "features": features}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(collection, ensure_ascii=False), encoding="utf-8")


def write_vector_file(path: Path, objects: Sequence[Found], legend: Legend, grid: Grid) -> None:
    """GeoPackage (.gpkg: layers regions, boxes and points) or FlatGeobuf (.fgb: regions), by the ending of `path`.

    The columns are those of the GeoJSON. Without a CRS coordinates are pixels, and the layers' description says so.

    Raises:
        ValueError: another ending.
    """
    layers = {
        "regions": ("Polygon", [found.polygon for found in objects]),
        "boxes": ("Polygon", [found.box for found in objects]),
        "points": ("Point", [found.point for found in objects]),
    }
    drivers = {".gpkg": ("GPKG", list(layers)), ".fgb": ("FlatGeobuf", ["regions"])}
    if path.suffix not in drivers:
        raise ValueError(f"{path}: vector files end in {' or '.join(drivers)}")
    driver, names = drivers[path.suffix]
    table = _table(objects, legend, grid)
    said: dict[str, Any] = {} if grid.crs else {"DESCRIPTION": PIXELS_SAID}
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": WRITTEN})
    try:
        with replacing(path) as temporary:
            for name in names:
                geometry_type, shapes = layers[name]
                crs = "EPSG:4326" if grid.crs else None
                frame = geopandas.GeoDataFrame(table, geometry=geopandas.GeoSeries(shapes, crs=crs), crs=crs)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "'crs' was not provided")  # the file says why
                    pyogrio.write_dataframe(
                        frame, temporary, layer=name, driver=driver, geometry_type=geometry_type, layer_options=said
                    )
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


def _table(objects: Sequence[Found], legend: Legend, grid: Grid) -> pandas.DataFrame:
    kinds = {"class_id": "int64", "class": "str", "prompt": "str", "score": "float64"}
    kinds |= {"area_m2": "float64"} if grid.crs else {"area_px": "int64"}
    kinds |= {"model": "str", "model_hash": "str"}
    rows = [properties(found, legend, grid) for found in objects]
    return pandas.DataFrame(rows, columns=list(kinds)).astype(kinds)
