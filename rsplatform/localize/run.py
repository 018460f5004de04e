"""Front door `localize`: scenes and texts in, georeferenced score and mask COGs and polygons out.

Pixels come through sources/scenes.py, resampled to the model's scale on a grid anchored at the scene's first
pixel, so a scene gives the same map whatever the tiling. A scene whose files stand is not done again on resume.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from pydantic import Field
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, InputArtifact, StageConfig
from rsplatform.geo import Grid
from rsplatform.ledger import Drop, counts, write_drops
from rsplatform.localize.figures import mask_overlay
from rsplatform.localize.picture import encoder, tiling
from rsplatform.localize.scene import SceneReader, Strip, score_strips, upsample_strips
from rsplatform.localize.vectorize import Legend, write_mask, write_polygons, write_scores
from rsplatform.localize.window import SmoothWindow
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.sources.scenes import (
    Layer,
    Scene,
    SceneError,
    SceneSource,
    describe_scene,
    find_scene_files,
    open_pixels,
    read_window,
)
from rsplatform.stage import Stage, finished, open_stage

STAGE = "localize"


class Sought(Config):
    """One thing to find: its name and the prompts that ask for it."""

    name: str
    prompts: list[str] = Field(min_length=1)


class LocalizeConfig(StageConfig):
    """Scenes, a model, what to find and the background prompts it competes with.

    `window` is smooth attention's in patches; regions below `min_area_m2` leave the polygons (our defaults).
    """

    model: InputArtifact
    scenes: SceneSource
    classes: list[Sought] = Field(min_length=1)
    background_prompts: list[str] = Field(min_length=1)
    ground_sample_distance_m: float = Field(gt=0)
    window: SmoothWindow = 3
    min_area_m2: float = Field(default=400.0, ge=0)


@dataclass(frozen=True)
class Job:
    """What every scene of one call shares."""

    embedder: Embedder
    texts_CE: torch.Tensor
    legend: Legend
    config: LocalizeConfig


def localize(config: LocalizeConfig, cluster: Cluster) -> Artifact:
    """Find texts in whole scenes: georeferenced scores, masks and polygons."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        with storage.local_folder(open_artifact(cluster.root, config.model).path("model")) as folder:
            embedder = Embedder.load(folder, driver_device())
        job = _job(embedder, config)
        files = find_scene_files(config.scenes, cluster.resolve)
        drops, num_regions = [], 0
        with rasterio.Env(**storage.gdal_options()):
            for uri, place in track(files, description="localize"):
                try:
                    scene = describe_scene(uri, place, config.scenes)
                    num_regions += _localize_scene(scene, job, stage)
                except SceneError as error:
                    drops.append(Drop(uri, error.reason, error.detail))
        if len(drops) == len(files):
            raise ValueError(f"no usable scene among {len(files)}: {drops[0].reason}: {drops[0].detail}")
        write_drops(stage.artifact, STAGE, "scenes", drops)
        stage.counts = counts(len(files), len(files) - len(drops), [drop.reason for drop in drops])
        stage.log({"regions": num_regions})
    return stage.artifact


def _job(embedder: Embedder, config: LocalizeConfig) -> Job:
    sought = [(index, prompt) for index, item in enumerate(config.classes, 1) for prompt in item.prompts]
    prompts = [*config.background_prompts, *(prompt for _, prompt in sought)]
    classes = [0] * len(config.background_prompts) + [index for index, _ in sought]
    legend = Legend(tuple(prompts), tuple(classes), embedder.model_hash)
    return Job(embedder, torch.from_numpy(embedder.embed_texts(prompts)), legend, config)


def _localize_scene(scene: Scene, job: Job, stage: Stage) -> int:
    """Write the files of one scene into the artifact; the polygons come last and say that it is done."""
    polygons_uri = stage.artifact.path(f"{scene.id}.geojson")
    if storage.exists(polygons_uri):
        return len(storage.read_json(polygons_uri)["features"])
    reader, grid = resampled(scene, job.config.ground_sample_distance_m)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scores, mask, polygons = (folder / f"{scene.id}{end}" for end in ("_scores.tif", "_mask.tif", ".geojson"))
        write_scores(scores, grid, _pixel_strips(reader, job), job.legend)
        write_mask(mask, scores, grid, job.legend)
        min_area_m2 = job.config.min_area_m2
        num_regions = write_polygons(polygons, mask, scores, job.legend, min_area_m2)
        stage.run.log_picture(mask_overlay(reader, mask, [item.name for item in job.config.classes]), f"{scene.id}.png")
        for file in (scores, mask, polygons):
            storage.write_bytes(stage.artifact.path(file.name), file.read_bytes())
    return num_regions


def _pixel_strips(reader: SceneReader, job: Job) -> Iterator[Strip]:
    patches = encoder(job.embedder, job.config.ground_sample_distance_m)
    strips = score_strips(reader, patches, job.texts_CE, tiling(job.embedder, job.config.window))
    return upsample_strips(strips, reader, job.embedder.patch_size)


def resampled(scene: Scene, ground_sample_distance_m: float) -> tuple[SceneReader, Grid]:
    """The scene as the model sees it, lazily: uint8 windows and validity at the model's scale, and their grid."""
    layers = open_pixels(scene)
    source_size = (scene.grid.height, scene.grid.width)
    height_m, width_m = scene.grid.pixel_size_m()
    height = max(1, round(scene.grid.height * height_m / ground_sample_distance_m))
    width = max(1, round(scene.grid.width * width_m / ground_sample_distance_m))
    scale_y, scale_x = scene.grid.height / height, scene.grid.width / width
    affine = scene.grid.affine @ scene.grid.affine.scale(scale_x, scale_y)
    transform = (affine.a, affine.b, affine.c, affine.d, affine.e, affine.f)

    def read(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        source = Source(layers, source_size, (scale_y, scale_x))
        return _resample(source, (row, column, rows, columns))

    def read_colours(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., :3]

    def read_valid(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., 3] > 127

    return SceneReader(height, width, read_colours, read_valid), Grid(scene.grid.crs, transform, width, height)


@dataclass(frozen=True)
class Source:
    """A scene's lazy rasters, its size in its own pixels, and how many of them make one of the target (y, x)."""

    layers: list[Layer]
    size_px: tuple[int, int]
    scale: tuple[float, float]


def _resample(source: Source, window: tuple[int, int, int, int]) -> np.ndarray:
    """Window (row, column, height, width) of the scaled picture; reads a margin, so windows meet without seams."""
    row, column, rows, columns = window
    top, bottom, first_row, end_row = _span(row, rows, source.scale[0], source.size_px[0])
    left, right, first_column, end_column = _span(column, columns, source.scale[1], source.size_px[1])
    pixels = read_window(source.layers, first_row, first_column, end_row - first_row, end_column - first_column)
    box = (left - first_column, top - first_row, right - first_column, bottom - first_row)
    bands = [
        Image.fromarray(np.ascontiguousarray(pixels[..., band])).resize((columns, rows), Image.Resampling.BILINEAR, box)
        for band in range(pixels.shape[2])
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def _span(start: int, length: int, scale: float, limit: int) -> tuple[float, float, int, int]:
    """Source interval of a target interval, and the pixels to read for it with the resampling kernel's margin."""
    begin, end = start * scale, min((start + length) * scale, float(limit))
    margin = int(np.ceil(max(1.0, scale))) + 1
    return begin, end, max(0, int(begin) - margin), min(limit, int(np.ceil(end)) + margin)
