"""Makes the scenes of a world: a plan of places in, GeoTIFFs, masks and landmarks out.

Each scene is drawn from (world seed, place, date) alone, so any worker may draw any scene. Masks show the land
itself, under cloud too; where a scene has no data its mask says background.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import Affine
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry

from rsplatform.world import palettes
from rsplatform.world.canvas import Grid
from rsplatform.world.land import Feature
from rsplatform.world.layout import lay_out
from rsplatform.world.noise import Floats, fractal_noise
from rsplatform.world.render import Bytes, draw_look, render, to_bytes

NODATA = 0
ZONES = ((32614, 3_900_000.0, 2.0), (32735, 7_200_000.0, 2.5))  # EPSG, northing of its places, metres a pixel
PLACE_SPACING_M = 20_000.0
LAND_MARGIN_M = 120.0
OSM_TAGS = {
    "farmland": {"landuse": "farmland"},
    "forest": {"landuse": "forest"},
    "sea": {"natural": "bay"},
    "river": {"natural": "water", "water": "river"},
    "lake": {"natural": "water", "water": "lake"},
    "road": {"highway": "unclassified"},
    "house": {"building": "house"},
    "warehouse": {"building": "warehouse"},
    "runway": {"aeroway": "runway"},
    "stadium": {"leisure": "stadium"},
    "harbour": {"landuse": "harbour"},
}


@dataclass(frozen=True)
class ScenePlan:
    """What one scene is to be. `visit` counts the dates of a place; the land belongs to (world_seed, place)."""

    name: str
    split: str
    world_seed: int
    place: int
    visit: int
    size_px: int
    epsg: int
    origin_en: tuple[float, float]  # UTM metres of the place's centre
    ground_sample_distance_m: float
    acquired: str  # ISO date
    cloud_fraction: float
    has_nodata: bool

    @property
    def grid(self) -> Grid:
        """The scene's grid in local metres; a later visit is shifted by a part of a pixel and more."""
        gsd = self.ground_sample_distance_m
        half_m = self.size_px * gsd / 2
        return Grid(-half_m + 17.3 * self.visit, half_m - 11.9 * self.visit, gsd, self.size_px, self.size_px)

    @property
    def half_m(self) -> float:
        """Half the side of the land that holds the scene."""
        return self.size_px * self.ground_sample_distance_m / 2 + LAND_MARGIN_M


def plan_scenes(seed: int, size_px: int, num_train: int, num_val: int) -> list[ScenePlan]:
    """All scenes of a world. The first two train scenes see one place on two dates, the second time with cloud."""
    plans: list[ScenePlan] = []
    names = [("train", number) for number in range(num_train)] + [("val", number) for number in range(num_val)]
    for index, (split, number) in enumerate(names):
        rng = np.random.default_rng((seed, 1, index))
        visit = 1 if (split, number) == ("train", 1) else 0
        place = max(0, index - 1) if num_train > 1 else index
        epsg, northing, gsd = ZONES[place % 2]
        month, day = int(rng.integers(4, 10)), int(rng.integers(1, 28))
        cloudy = visit == 1 or (split == "train" and number % 5 == 4)
        plans.append(
            ScenePlan(
                name=f"{split}_{number:03d}",
                split=split,
                world_seed=seed,
                place=place,
                visit=visit,
                size_px=size_px,
                epsg=epsg,
                origin_en=(
                    400_000.0 + PLACE_SPACING_M * (place % 10),
                    northing + PLACE_SPACING_M * (place // 10),
                ),
                ground_sample_distance_m=gsd,
                acquired=f"{2021 + visit}-{month:02d}-{day:02d}",
                cloud_fraction=float(rng.uniform(0.1, 0.2)) if cloudy else 0.0,
                has_nodata=split == "train" and number % 4 == 3,
            )
        )
    return plans


def lay_out_place(plan: ScenePlan) -> list[Feature]:
    """The land that a scene sees; the same for every visit."""
    return lay_out((plan.world_seed, 2, plan.place), plan.half_m)


def draw_scene(plan: ScenePlan, features: list[Feature]) -> tuple[Bytes, Bytes]:
    """RGB (H, W, 3) with NODATA where there is none, and class ids (H, W)."""
    rng = np.random.default_rng((plan.world_seed, 3, plan.place, plan.visit))
    look = draw_look(rng)
    rgb_HWC, classes_HW = render(features, plan.grid, look, plan.world_seed * 1000 + plan.place)
    if plan.cloud_fraction:
        rgb_HWC = add_clouds(rgb_HWC, plan.grid, plan.cloud_fraction, int(rng.integers(1, 1 << 30)))
    pixels_HWC = to_bytes(rgb_HWC)
    if plan.has_nodata:
        missing_HW = missing_corners(plan.size_px, rng)
        pixels_HWC[missing_HW] = NODATA
        classes_HW = np.where(missing_HW, np.uint8(palettes.BACKGROUND), classes_HW)
    return pixels_HWC, classes_HW


def add_clouds(rgb_HWC: Floats, grid: Grid, cloud_fraction: float, seed: int) -> Floats:
    """White clouds with soft rims over about `cloud_fraction` of the picture, and their shadows to one side."""
    shift_m = 110.0
    thickness_HW = _cloud_thickness(grid.x_W, grid.y_H, seed)
    level = float(np.quantile(thickness_HW, 1 - cloud_fraction))
    shadow_HW = _opacity(_cloud_thickness(grid.x_W - shift_m, grid.y_H + shift_m / 2, seed), level)
    shaded = rgb_HWC * (1 - 0.5 * shadow_HW)[..., None]
    return shaded + (238 - shaded) * (0.97 * _opacity(thickness_HW, level))[..., None]


def _cloud_thickness(x_W: Floats, y_H: Floats, seed: int) -> Floats:
    return fractal_noise(x_W, y_H, {700: 1.0, 280: 0.5, 110: 0.25, 45: 0.12}, seed)


def _opacity(thickness_HW: Floats, level: float) -> Floats:
    return np.clip((thickness_HW - level) / 0.25, 0, 1).astype(np.float32)


def missing_corners(size_px: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(H, W): the triangles at two opposite corners that a turned swath leaves empty."""
    depth = size_px * rng.uniform(0.1, 0.22)
    slope = rng.uniform(0.5, 1.5)
    row, column = np.mgrid[:size_px, :size_px]
    first = column + row * slope < depth
    return first | first[::-1, ::-1]


def write_scene(plan: ScenePlan, pixels_HWC: Bytes, classes_HW: Bytes, folder: Path) -> None:
    """`scenes/<name>.tif` and `masks/<name>.tif` on one grid."""
    gsd, grid = plan.ground_sample_distance_m, plan.grid
    east, north = plan.origin_en
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "width": plan.size_px,
        "height": plan.size_px,
        "dtype": "uint8",
        "crs": f"EPSG:{plan.epsg}",
        "transform": Affine(gsd, 0, east + grid.left_m, 0, -gsd, north + grid.top_m),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "zstd",
    }
    tags = {"TIFFTAG_DATETIME": plan.acquired.replace("-", ":") + " 10:30:00"}
    rgb = {
        **profile,
        "count": 3,
        "nodata": NODATA,
        "photometric": "RGB",
        "predictor": 2,
        "interleave": "pixel",
    }
    with rasterio.open(folder / "scenes" / f"{plan.name}.tif", "w", **rgb) as target:
        target.write(np.moveaxis(pixels_HWC, 2, 0))
        target.update_tags(**tags)
        target.build_overviews([2, 4], Resampling.average)
    with rasterio.open(folder / "masks" / f"{plan.name}.tif", "w", **profile, count=1) as target:
        target.write(classes_HW, 1)


def landmark_records(plan: ScenePlan, features: list[Feature]) -> list[dict[str, Any]]:
    """GeoJSON features (EPSG:4326) of a place: everything on its land but open ground."""
    to_lonlat = pyproj.Transformer.from_crs(plan.epsg, 4326, always_xy=True)
    east, north = plan.origin_en
    mapped = [feature for feature in features if feature.class_id != palettes.BACKGROUND]
    geometries = np.array([feature.geometry for feature in mapped])
    points_P2 = shapely.get_coordinates(geometries) + np.array([east, north])
    lon, lat = to_lonlat.transform(points_P2[:, 0], points_P2[:, 1])
    shapely.set_coordinates(geometries, np.round(np.stack([lon, lat], axis=1), 7))
    return [
        _record(f"p{plan.place:02d}-{number:05d}", feature, geometry)
        for number, (feature, geometry) in enumerate(zip(mapped, geometries, strict=True))
    ]


def _record(landmark_id: str, feature: Feature, geometry: BaseGeometry) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "id": landmark_id,
        "kind": palettes.CLASS_NAMES[feature.class_id],
        "name": feature.name or None,
        **OSM_TAGS[feature.kind],
    }
    if feature.width_m:
        properties["width_m"] = round(feature.width_m, 1)
    return {"type": "Feature", "properties": properties, "geometry": mapping(geometry)}
