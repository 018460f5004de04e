"""Landmarks: damaged and broken records cost only themselves, kinds come from tags, and chips find what they show."""

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely

from rsplatform.config import ConfigError
from rsplatform.records import Landmark
from rsplatform.sources.landmarks import LandmarkIndex, LandmarkSource, read_landmarks


def write_geojson(path: Path, *features: tuple[dict[str, object], object]) -> LandmarkSource:
    rows = [{"type": "Feature", "properties": tags, "geometry": geometry} for tags, geometry in features]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    return LandmarkSource(path=str(path))


SQUARE = shapely.geometry.mapping(shapely.box(10, 50, 10.001, 50.001))
BOW_TIE = {"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]}
LOCAL_GRID = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
LINE = {"type": "LineString", "coordinates": [[10, 60], [10, 60.01]]}


def test_kinds_come_from_tags_and_bad_records_are_dropped(tmp_path: Path) -> None:
    source = write_geojson(
        tmp_path / "a.geojson",
        ({"building": "house"}, SQUARE),
        ({"leisure": "stadium", "name": "Arena"}, BOW_TIE),
        ({"highway": "residential"}, LINE),
        ({"building": "yes"}, None),
        ({}, SQUARE),
    )
    landmarks, drops = read_landmarks(source, str)
    assert [landmark.kind for landmark in landmarks] == ["building", "stadium", "road"]
    assert [drop.reason for drop in drops] == ["no_geometry", "no_kind"]
    geometries = np.array([landmark.geometry for landmark in landmarks])
    assert shapely.is_valid(geometries).all() and shapely.area(geometries)[1] == pytest.approx(0.5)
    west, _, east, _ = shapely.bounds(geometries)[2]
    width_m = (east - west) * 111_320 * np.cos(np.radians(60))
    assert width_m == pytest.approx(8, rel=0.01)


def test_corrupt_shapefile_records_cost_only_themselves(data_root: Path) -> None:
    path = data_root / "qgis_swellendam/shapefile/water.shp"
    landmarks, drops = read_landmarks(LandmarkSource(path=str(path)), str)
    assert {drop.reason for drop in drops} == {"damaged"}
    assert any("record 30:" in drop.detail for drop in drops)
    assert len(landmarks) >= 30, "the records before the damage, and those after it that still can be read"
    assert len(landmarks) + len(drops) == 38


def test_files_and_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = write_geojson(tmp_path / "a.geojson", ({"bulding": "yes"}, SQUARE))
    with pytest.raises(ConfigError, match="did you mean 'bulding'"):
        read_landmarks(source.model_copy(update={"kind_columns": ("building",)}), str)
    with pytest.raises(ConfigError, match=r"absent\.gpkg does not exist"):
        read_landmarks(LandmarkSource(path=str(tmp_path / "absent.gpkg")), str)
    with pytest.raises(ConfigError, match="give one of"):
        read_landmarks(LandmarkSource(path=str(tmp_path / "a.vrt")), str)


def test_a_misspelt_layer_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = tmp_path / "map.gpkg"
    frame = geopandas.GeoDataFrame({"building": ["yes"]}, geometry=[shapely.box(10, 50, 11, 51)], crs="EPSG:4326")
    for layer in ("buildings", "roads"):
        frame.to_file(path, layer=layer)
    with pytest.raises(
        ConfigError, match=r"map\.gpkg: no layer 'bulidings'; did you mean 'buildings'\? .*roads; fix `l"
    ):
        read_landmarks(LandmarkSource(path=str(path), layer="bulidings"), str)
    assert len(read_landmarks(LandmarkSource(path=str(path), layer="buildings"), str)[0]) == 1


def test_landmarks_on_a_local_grid_are_refused(tmp_path: Path) -> None:
    frame = geopandas.GeoDataFrame({"kind": ["a"]}, geometry=[shapely.box(0, 0, 1, 1)], crs=LOCAL_GRID)
    frame.to_file(tmp_path / "site.gpkg")
    with pytest.raises(ConfigError, match=r"site\.gpkg: 'site grid' has no way to longitude and latitude"):
        read_landmarks(LandmarkSource(path=str(tmp_path / "site.gpkg")), str)


def test_visible_parts_have_their_share_and_position() -> None:
    corners = np.array([[[0, 1], [1, 1], [1, 0], [0, 0]]], dtype=float)
    index = LandmarkIndex(
        [
            Landmark("a", "field", "", shapely.box(-1, 0.75, 2, 2)),
            Landmark("b", "pond", "", shapely.box(0.8, 0.0, 0.9, 0.1)),
            Landmark("c", "far", "", shapely.box(5, 5, 6, 6)),
        ]
    )
    (visible,) = index.visible(corners, 0.005)
    assert [(item.landmark.id, item.position) for item in visible] == [("a", "north"), ("b", "southeast")]
    assert [item.area_fraction for item in visible] == pytest.approx([0.25, 0.01])
    assert len(index.visible(corners, 0.05)[0]) == 1
