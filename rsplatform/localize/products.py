"""The files of a scene, from the scores of its patches: what each worker of `localize` does without the model.

In: stored strips of scores, the scene. Out: score and mask COGs, polygons (GeoJSON, GeoPackage, FlatGeobuf), boxes with
points, and counts by class, in one pass over the scene whose memory does not grow with its height.
Shapes: P prompts, HxW pixels.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import rasterio

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError
from rsplatform.curate.pipeline import DROP_FIELDS, Shard
from rsplatform.geo import Grid
from rsplatform.localize.decide import label_pixels
from rsplatform.localize.ground_pixels import resampled
from rsplatform.localize.legend import Legend
from rsplatform.localize.rasters import mask_cog, score_cog
from rsplatform.localize.regions import RegionFinder
from rsplatform.localize.scene import SceneReader, Strip, upsample_strips
from rsplatform.localize.score_scenes import stored_strips
from rsplatform.localize.sharpen import GuidedFilter, sharpen_strips
from rsplatform.localize.vectorize import (
    PIXELS_SAID,
    Found,
    Limits,
    find_objects,
    write_boxes,
    write_polygons,
    write_vector_file,
)
from rsplatform.sources.scenes import Scene, SceneError, scene_from_json

SCENE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # URI of the file, as the recipe names it
        ("name", pa.string()),  # its files are NAME_scores.tif, NAME_mask.tif, NAME.geojson, …
        ("coordinates", pa.string()),  # of its vector files
        ("area_unit", pa.string()),  # m2, or px without a CRS
        ("classes", pa.list_(pa.struct([("name", pa.string()), ("regions", pa.int64()), ("area", pa.float64())]))),
    ]
)
ENDINGS = ("_scores.tif", "_mask.tif", ".geojson", ".gpkg", ".fgb", "_objects.geojson")


def product_names(files: Sequence[str], folder: str) -> dict[str, str]:
    """A name for the products of each file: its path below `folder` without the ending.

    Two files whose products would meet (a.tif and a.tiff) keep their endings.

    Raises:
        ConfigError: products meet even then.
    """
    paths = {file: PurePosixPath(file.removeprefix(folder).lstrip("/") or PurePosixPath(file).name) for file in files}
    names = {file: path.with_suffix("").as_posix() for file, path in paths.items()}
    names |= {file: paths[file].as_posix() for file in _meeting(names)}
    meeting = _meeting(names)
    if meeting:
        raise ConfigError(f"scenes: products of {' and '.join(meeting[:2])} would have the same names; rename one")
    return names


def _meeting(names: Mapping[str, str]) -> list[str]:
    """The files that share a product's name with another one."""
    owners: dict[str, set[str]] = {}
    for file, name in names.items():
        for ending in ENDINGS:
            owners.setdefault(name + ending, set()).add(file)
    return sorted(set().union(*(sharing for sharing in owners.values() if len(sharing) > 1)))


@dataclass(frozen=True)
class ProductRecipe:
    """How scores become products; `ground_sample_distance_m` and `maps_crs` are those of the maps."""

    legend: Legend
    ground_sample_distance_m: float
    patch_size_px: int
    limits: Limits
    guided_filter: GuidedFilter | None
    maps_crs: str | None = None


def scene_shard(number: int, uri: str, name: str, scene: Scene | None, strips: range, drop: SceneError | None) -> Shard:
    """One scene's shard: where its strips are, or why it has none."""
    return {
        "shard": f"scene_{number:06d}",
        "uri": uri,
        "name": name,
        "scene": None if scene is None else asdict(scene),
        "strips": [strips.start, strips.stop],
        "drop": None if drop is None else [drop.reason, drop.detail],
    }


def read_scene(shard: Shard) -> pa.Table:
    """The description of a scene as a row, dropped if it has no scores."""
    reason, detail = shard["drop"] or (None, None)
    row = {"id": shard["uri"], "name": shard["name"], "drop_reason": reason, "drop_detail": detail}
    schema = pa.schema([*SCENE_SCHEMA, *DROP_FIELDS, pa.field("shard", pa.string())])
    return pa.Table.from_pylist([row | {"shard": json.dumps(shard)}], schema=schema)


@dataclass(frozen=True)
class MakeProducts:
    """Table operation: writes the files of each scene into the artifact, and counts what was found."""

    artifact: Artifact
    strips_uri: str
    recipe: ProductRecipe

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with what was found; a scene that cannot be read any more becomes a drop."""
        rows = table.to_pylist()
        for row in rows:
            if row["drop_reason"] is None:
                try:
                    row.update(self._make(json.loads(row["shard"])))
                except SceneError as error:
                    row.update({"drop_reason": error.reason, "drop_detail": error.detail})
        return pa.Table.from_pylist(rows, schema=table.schema)

    def _make(self, shard: Shard) -> dict[str, Any]:
        scene, recipe = scene_from_json(shard["scene"]), self.recipe
        with rasterio.Env(**dict[str, Any](storage.gdal_options())), tempfile.TemporaryDirectory() as temporary:
            reader, grid = resampled(scene, recipe.ground_sample_distance_m, recipe.maps_crs)
            stored = stored_strips(self.strips_uri, range(*shard["strips"]), recipe.patch_size_px**2)
            stem = Path(temporary) / PurePosixPath(shard["name"]).name
            objects = write_products(stem, stored, reader, grid, recipe)
            for ending in ENDINGS:
                storage.write_file(self.artifact.path(f"{shard['name']}{ending}"), Path(f"{stem}{ending}"))
        return {
            "coordinates": "EPSG:4326" if grid.crs else PIXELS_SAID,
            "area_unit": "m2" if grid.crs else "px",
            "classes": _count(objects, recipe.legend),
        }


def write_products(
    stem: Path, patch_strips: Iterable[Strip], reader: SceneReader, grid: Grid, recipe: ProductRecipe
) -> list[Found]:
    """Write all files of a scene as `stem` and their endings; returns what was found."""
    legend, finder = recipe.legend, RegionFinder(recipe.legend)
    strips = upsample_strips(patch_strips, reader, recipe.patch_size_px)
    if recipe.guided_filter is not None:
        strips = sharpen_strips(strips, reader, recipe.guided_filter)
    scores, mask, polygons, *vector_files, boxes = (Path(f"{stem}{ending}") for ending in ENDINGS)
    with score_cog(scores, grid, legend) as write_scores, mask_cog(mask, grid, legend) as (write_mask, erase):
        for strip in strips:
            scores_PHW = strip.maps_CHW.contiguous().numpy()
            labels_HW = label_pixels(scores_PHW, legend.class_of_prompt)
            write_scores(strip.row, scores_PHW)
            write_mask(strip.row, labels_HW[None])
            finder.add(strip.row, labels_HW, scores_PHW)
        found = finder.finish()
        standing = [region for region in found if legend.stands(region.class_id, region.peak_margin)]
        erase([region.outline_px for region in found if not legend.stands(region.class_id, region.peak_margin)])
    objects = find_objects(standing, grid, recipe.limits)
    write_polygons(polygons, objects, legend, grid)
    write_boxes(boxes, objects, legend, grid)
    for path in vector_files:
        write_vector_file(path, objects, legend, grid)
    return objects


def _count(objects: list[Found], legend: Legend) -> list[dict[str, Any]]:
    areas: list[list[float]] = [[] for _ in legend.class_names]
    for found in objects:
        areas[found.region.class_id - 1].append(found.area)
    return [
        {"name": name, "regions": len(found), "area": round(sum(found), 3)}
        for name, found in zip(legend.class_names, areas, strict=True)
    ]
