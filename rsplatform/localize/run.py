"""Front door `localize`: scenes and texts in, georeferenced score and mask COGs, polygons, boxes and counts out.

Three steps on Ray Data, each resumed where it was: thresholds from chips if the recipe asks for them (calibrate.py),
strips of scores with the model in actors (score_scenes.py), the files of each scene (products.py).
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import rasterio
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.curate.pipeline import Loaded, Pipeline, Shard, run_pipeline
from rsplatform.geo import CrsError
from rsplatform.localize.calibrate import (
    MARGIN_SCHEMA,
    ImageScorer,
    ReadImages,
    Words,
    calibration_shards,
    thresholds,
)
from rsplatform.localize.figures import mask_overlay
from rsplatform.localize.ground_grid import target_grid
from rsplatform.localize.ground_pixels import resampled
from rsplatform.localize.legend import Legend
from rsplatform.localize.picture import tiling
from rsplatform.localize.products import (
    SCENE_SCHEMA,
    MakeProducts,
    ProductRecipe,
    product_names,
    read_scene,
    scene_shard,
)
from rsplatform.localize.recipe import LocalizeConfig, Sought
from rsplatform.localize.scales import Looks
from rsplatform.localize.score_scenes import (
    STRIP_SCHEMA,
    ScoreRecipe,
    StripScorer,
    load_model,
    read_strip,
    strip_shards,
)
from rsplatform.localize.vectorize import Limits
from rsplatform.model.embedder import Embedder, granted_device
from rsplatform.runtime import ray_runtime
from rsplatform.sources.scenes import Scene, SceneError, describe_scene, find_scene_files
from rsplatform.stage import Stage, finished, open_stage

__all__ = ["LocalizeConfig", "Sought", "localize", "localize_with"]

STAGE = "localize"
STRIPS_TABLE, IMAGES_TABLE, SCENES_TABLE = "work/strips.lance", "work/calibration.lance", "scenes.lance"
COUNTS_FILE, THRESHOLDS_FILE = "counts.csv", "thresholds.json"
MAX_PICTURES = 24  # of masks, in MLflow

Run = Callable[[Pipeline, Sequence[Shard]], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What the steps of one call share; `run` runs a pipeline's shards and gives their funnel."""

    config: LocalizeConfig
    cluster: Cluster
    stage: Stage
    run: Run
    embedder: Embedder

    @property
    def artifact(self) -> Artifact:
        return self.stage.artifact

    @property
    def device(self) -> str:
        """Where the actors' models are."""
        return granted_device(self.cluster.data.gpus_per_actor)

    @property
    def scores(self) -> ScoreRecipe:
        """What decides the scores."""
        config = self.config
        looks = Looks(config.window, tuple(config.scales), config.phases)
        return ScoreRecipe(tuple(config.prompts), config.ground_sample_distance_m, looks, config.maps_crs)

    def rows(self, table: str, columns: list[str]) -> Any:
        """Columns of one of the artifact's tables."""
        uri = self.artifact.path(table)
        return lance.dataset(uri, storage_options=storage.lance_options(uri)).to_table(columns=columns)


@dataclass(frozen=True)
class SceneFile:
    """One file of the source: its scene, or why it is none."""

    uri: str
    name: str
    scene: Scene | None
    error: SceneError | None = None
    strips: range = range(0)


def localize(config: LocalizeConfig, cluster: Cluster) -> Artifact:
    """Find texts in whole scenes: georeferenced scores, masks, polygons and counts."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage, ray_runtime(cluster):
        localize_with(config, cluster, stage, lambda pipeline, shards: run_pipeline(pipeline, shards, cluster))
    return stage.artifact


def localize_with(config: LocalizeConfig, cluster: Cluster, stage: Stage, run: Run) -> None:
    """All the work of an open stage; `run` is `run_pipeline` on a cluster, or `run_plain` without Ray.

    Raises:
        ConfigError: no files, none usable, files whose products would have the same names, chips that tell too little.
    """
    job = Job(config, cluster, stage, run, load_model(cluster.root, config.model))
    legend = _legend(job)
    files = _scored(job, _described(job))
    if all(file.error for file in files):
        raise ConfigError(f"scenes: no usable one among {len(files)}: {files[0].error}; mend them or name others")
    shards = [
        scene_shard(number, file.uri, file.name, file.scene, file.strips, file.error)
        for number, file in enumerate(files)
    ]
    recipe = ProductRecipe(
        legend,
        config.ground_sample_distance_m,
        job.embedder.patch_size,
        Limits(config.min_area_m2, config.max_hole_m2, config.ground_sample_distance_m),
        config.guided_filter,
        config.maps_crs,
    )
    make = MakeProducts(job.artifact, job.artifact.path(STRIPS_TABLE), recipe)
    pipeline = Pipeline(STAGE, job.artifact, SCENES_TABLE, SCENE_SCHEMA, read_scene, (make,))
    stage.counts = run(pipeline, shards)
    _report(job)
    _log_pictures(job, files)


def _described(job: Job) -> list[SceneFile]:
    """Every file's scene, from its header; without CRS too."""
    source = job.config.scenes
    found = find_scene_files(source, job.cluster.resolve)
    names = product_names([uri for uri, _ in found], source.path)
    files = []
    for uri, place in track(found, description="describe scenes", transient=True):
        try:
            scene = describe_scene(uri, place, source, may_lack_crs=True)
            _check_scales(scene, job.config)
            target_grid(scene.grid, job.config.ground_sample_distance_m, job.config.maps_crs)
            files.append(SceneFile(uri, names[uri], scene))
        except SceneError as error:
            files.append(SceneFile(uri, names[uri], None, error))
        except CrsError as error:
            files.append(SceneFile(uri, names[uri], None, SceneError("unusable_crs", f"{uri}: {error}")))
    return files


def _check_scales(scene: Scene, config: LocalizeConfig) -> None:
    """Raises SceneError no_crs for a scene without scale that the recipe would look at in several."""
    other = sorted({scale.relative_resolution for scale in config.scales} - {1.0})
    if other and not scene.grid.crs:
        raise SceneError(
            "no_crs",
            f"{scene.uri}: has no CRS, so no scale, but `scales` asks for relative_resolution {other[0]:g}; set a CRS "
            "with gdal_edit.py -a_srs, or localize it with `scales` of relative_resolution 1 alone",
        )


def _scored(job: Job, files: list[SceneFile]) -> list[SceneFile]:
    """The files with their strips scored; one that cannot be read, or has no data, gets its error."""
    tiles, patch = tiling(job.embedder, job.config.window), job.embedder.patch_size
    shards: list[Shard] = []
    placed = []
    for number, file in enumerate(files):
        first = len(shards)
        if file.scene:
            shards += strip_shards(number, file.scene, job.scores, tiles, patch)
        placed.append(range(first, len(shards)))
    if not shards:
        return files
    scorer = Loaded(StripScorer, (job.cluster.root, job.config.model, job.scores, job.device))
    job.run(Pipeline(f"{STAGE}_strips", job.artifact, STRIPS_TABLE, STRIP_SCHEMA, read_strip, (scorer,)), shards)
    rows = job.rows(STRIPS_TABLE, ["has_data", "error_reason", "error_detail"]).to_pylist()
    return [_with_strips(file, strips, rows) for file, strips in zip(files, placed, strict=True)]


def _with_strips(file: SceneFile, strips: range, rows: list[dict[str, Any]]) -> SceneFile:
    error = file.error
    if file.scene:
        own = [rows[index] for index in strips]
        failed = next((row for row in own if row["error_reason"] is not None), None)
        if failed:
            error = SceneError(failed["error_reason"], failed["error_detail"])
        elif not any(row["has_data"] for row in own):
            error = SceneError("no_data", f"{file.uri}: every pixel is nodata")
    return SceneFile(file.uri, file.name, file.scene, error, strips)


def _legend(job: Job) -> Legend:
    config = job.config
    names = tuple(item.name for item in config.classes)
    legend = (tuple(config.prompts), tuple(config.class_of_prompt), names, config.model, job.embedder.model_hash)
    return Legend(*legend, _thresholds(job))


def _thresholds(job: Job) -> tuple[float, ...] | None:
    """By how much each class must beat the background; fitted on chips and written down, if the recipe asks."""
    calibration, classes = job.config.calibration, job.config.classes
    if calibration is None:
        return None
    words = Words(tuple(tuple(item.words or [item.name]) for item in classes))
    arguments = (job.cluster.root, job.config.model, job.scores, job.config.class_of_prompt, job.device)
    scorer, read = Loaded(ImageScorer, arguments), ReadImages(job.cluster.root, calibration, words)
    pipeline = Pipeline(f"{STAGE}_images", job.artifact, IMAGES_TABLE, MARGIN_SCHEMA, read, (scorer,))
    job.run(pipeline, calibration_shards(job.cluster.root, calibration))
    found = thresholds(job.rows(IMAGES_TABLE, ["named", "margins"]), [item.name for item in classes], calibration)
    storage.write_json(job.artifact.path(THRESHOLDS_FILE), found)
    job.stage.log({f"calibration_f1/{_plain(item['name'])}": item["f1"] for item in found})
    return tuple(item["threshold"] for item in found)


def _report(job: Job) -> None:
    """counts.csv (scene, class, regions, area, its unit) and the totals of each class in the manifest."""
    lines, totals = io.StringIO(), {item.name: 0 for item in job.config.classes}
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["scene", "class", "regions", "area", "area_unit"])
    for row in job.rows(SCENES_TABLE, ["name", "area_unit", "classes"]).to_pylist():
        for item in row["classes"]:
            writer.writerow([row["name"], item["name"], item["regions"], item["area"], row["area_unit"]])
            totals[item["name"]] += item["regions"]
    storage.write_bytes(job.artifact.path(COUNTS_FILE), lines.getvalue().encode())
    job.stage.counts |= {"regions": {_plain(name): number for name, number in totals.items()}}
    job.stage.log({"regions": sum(totals.values())})


def _plain(name: str) -> str:
    """A class's name as MLflow takes it in the name of a metric."""
    return re.sub(r"[^\w.\- ]", "_", name)


def _log_pictures(job: Job, files: list[SceneFile]) -> None:
    kept = set(job.rows(SCENES_TABLE, ["name"])["name"].to_pylist())
    names = [item.name for item in job.config.classes]
    with rasterio.Env(**dict[str, Any](storage.gdal_options())):
        for file in [file for file in files if file.name in kept][:MAX_PICTURES]:
            assert file.scene is not None, "a scene that was kept"
            reader, _ = resampled(file.scene, job.config.ground_sample_distance_m, job.config.maps_crs)
            mask = storage.gdal_path(job.artifact.path(f"{file.name}_mask.tif"))
            job.stage.run.log_picture(mask_overlay(reader, mask, names), f"{file.name}.png")
