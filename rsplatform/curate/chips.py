"""Front door `ingest_scenes`: scenes and landmarks in, chips with what they show out (`chips.lance`, `scenes.json`).

Every window of the chip grid is an input row: it becomes a chip or a ledger row with a reason, and so does a file that
is no usable scene. Captions are the next stage's.
"""

import fnmatch
from dataclasses import replace
from typing import Any

import lance
from pydantic import Field, model_validator
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, StageConfig
from rsplatform.curate.contact_sheet import dropped_pictures, log_contact_sheets, spread
from rsplatform.curate.cut_chips import ChipRecipe, CutChips, JoinLandmarks, landmark_table, windows_of
from rsplatform.curate.pipeline import Loaded, Pipeline, Shard, run_pipeline
from rsplatform.ledger import Drop, counts, write_drops
from rsplatform.records import CHIP_SCHEMA, Landmark
from rsplatform.sources.landmarks import LandmarkSource, read_landmarks
from rsplatform.sources.scenes import Scene, SceneError, SceneSource, compose, describe_scene, find_scene_files
from rsplatform.stage import Stage, finished, open_stage

STAGE = "ingest_scenes"
CHIPS_TABLE = "chips.lance"
CATALOGUE = "scenes.json"
LANDMARKS_FILE = "work/landmarks.parquet"
# Chips of one shard: large enough to amortise a task, small enough that a retry costs seconds.
SHARD_CHIPS = 512


class CompositeConfig(Config):
    """Several dates of one place, by globs over scene ids: their median replaces them, on the first one's grid."""

    name: str = Field(pattern=r"^[\w.-]+$")
    members: list[str] = Field(min_length=1)


class IngestScenesConfig(StageConfig):
    """Which scenes and landmarks, and how chips are cut.

    `holdout_scenes` are globs over scene ids whose chips become split val. `min_landmark_px` is the visible area, in
    pixels of the chip, from which a landmark counts. A chip that shows none is dropped unless the recipe or its source
    says `keep_without_landmark`; it gets no caption then, but is searched and self-trained on. (The sizes are our
    defaults; the paper gives 224 px, sub-metre.)
    """

    scenes: list[SceneSource] = Field(min_length=1)
    landmarks: list[LandmarkSource] = Field(default_factory=list)
    composites: list[CompositeConfig] = Field(default_factory=list)
    holdout_scenes: list[str] = Field(default_factory=list)
    chip_size_px: int = Field(default=224, ge=16, le=1024)
    ground_sample_distance_m: float = Field(default=0.6, ge=0.05, le=1000)
    stride_fraction: float = Field(default=0.5, gt=0, le=1)
    max_nodata_fraction: float = Field(default=0.2, ge=0, lt=1)
    min_landmark_px: float = Field(default=12.0, gt=0)
    keep_without_landmark: bool = False

    @model_validator(mode="after")
    def _landmarks_are_given(self) -> "IngestScenesConfig":
        kept = [source.keep_without_landmark for source in self.scenes]
        if not self.landmarks and not any(self.keep_without_landmark if keep is None else keep for keep in kept):
            raise ValueError("no landmarks, so every chip would be dropped; give some or set keep_without_landmark")
        return self

    @property
    def recipe(self) -> ChipRecipe:
        """What the workers need to know."""
        return ChipRecipe(
            size_px=self.chip_size_px,
            ground_sample_distance_m=self.ground_sample_distance_m,
            stride_fraction=self.stride_fraction,
            max_nodata_fraction=self.max_nodata_fraction,
            min_landmark_px=self.min_landmark_px,
            keep_without_landmark=self.keep_without_landmark,
        )


def ingest_scenes(config: IngestScenesConfig, cluster: Cluster) -> Artifact:
    """Cut georeferenced scenes into chips and join each with the landmarks that it shows."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        scenes, scene_drops, num_scene_files = _scenes(config, cluster)
        num_landmarks, landmark_drops = _store_landmarks(config, cluster, stage.artifact)
        write_drops(stage.artifact, STAGE, "scenes", scene_drops)
        write_drops(stage.artifact, "landmarks", "landmarks", landmark_drops)
        storage.write_json(stage.artifact.path(CATALOGUE), _catalogue(config, scenes))
        shards, windows = _shards(config, scenes)
        chip_counts = run_pipeline(make_pipeline(config, stage.artifact), shards, cluster)
        num_visits = sum(len(scene.visits) for scene in scenes)
        stage.counts = chip_counts | {
            "scenes": counts(num_scene_files, num_visits, [d.reason for d in scene_drops]),
            "landmarks": counts(num_landmarks + len(landmark_drops), num_landmarks, [d.reason for d in landmark_drops]),
        }
        stage.log({"chips": chip_counts["kept"], "scenes": len(scenes), "windows": windows})
        _log_pictures(stage)
    return stage.artifact


def _scenes(config: IngestScenesConfig, cluster: Cluster) -> tuple[list[Scene], list[Drop], int]:
    """Every usable scene with its split, composites in place of their members, a drop for each unusable file, files."""
    scenes: dict[str, Scene] = {}
    drops = []
    files = [(source, *file) for source in config.scenes for file in find_scene_files(source, cluster.resolve)]
    for source, uri, place in track(files, description="describe scenes", transient=True):
        try:
            scene = describe_scene(uri, place, source)
            if not windows_of(scene, config.recipe):
                size_m = config.recipe.for_scene(scene).size_m
                raise SceneError("too_small", f"{place}: no chip of {size_m:g} m fits")
        except SceneError as error:
            drops.append(Drop(uri, error.reason, error.detail))
            continue
        if scene.id in scenes:
            raise ConfigError(f"scenes: two files are called {scene.id}: {scenes[scene.id].uri} and {uri}; rename one")
        scenes[scene.id] = scene
    if not scenes:
        raise ConfigError(f"scenes: none of {len(drops)} files is usable: {drops[0].reason}: {drops[0].detail}")
    for composite in config.composites:
        members = [scenes.pop(name) for name in _matching(list(scenes), composite.members, "composites.members")]
        if composite.name in scenes:
            other = scenes[composite.name].uri
            raise ConfigError(f"composites: {composite.name} is also the id of {other}; give it another `name`")
        scenes[composite.name] = compose(composite.name, members)
    held_out = set(_matching(list(scenes), config.holdout_scenes, "holdout_scenes"))
    placed = [replace(scene, split="val" if name in held_out else "train") for name, scene in scenes.items()]
    return placed, drops, len(files)


def _matching(names: list[str], patterns: list[str], field: str) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{field}: {pattern!r} matches no usable scene; there are {', '.join(names[:12])}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _store_landmarks(config: IngestScenesConfig, cluster: Cluster, artifact: Artifact) -> tuple[int, list[Drop]]:
    """All landmarks as one file that the actors load; gives their number and the dropped records."""
    landmarks: list[Landmark] = []
    drops: list[Drop] = []
    for source in config.landmarks:
        found, dropped = read_landmarks(source, cluster.resolve)
        landmarks += found
        drops += dropped
    storage.write_bytes(artifact.path(LANDMARKS_FILE), landmark_table(landmarks))
    return len(landmarks), drops


def _catalogue(config: IngestScenesConfig, scenes: list[Scene]) -> list[dict[str, Any]]:
    """The scenes as JSON; each also names whom the chips' landmarks are to be credited to."""
    credits = list(dict.fromkeys(source.attribution for source in config.landmarks if source.attribution))
    return [scene.to_json() | {"landmark_attributions": credits} for scene in scenes]


def _shards(config: IngestScenesConfig, scenes: list[Scene]) -> tuple[list[Shard], int]:
    """Runs of at most SHARD_CHIPS windows of one scene, and the number of windows."""
    shards, total = [], 0
    for scene in scenes:
        num_windows = len(windows_of(scene, config.recipe))
        total += num_windows
        for start in range(0, num_windows, SHARD_CHIPS):
            stop = min(start + SHARD_CHIPS, num_windows)
            shards.append({"shard": f"{scene.id}-{start:07d}", "scene": scene.to_json(), "start": start, "stop": stop})
    return shards, total


def make_pipeline(config: IngestScenesConfig, artifact: Artifact) -> Pipeline:
    """The pipeline of this stage: cut the windows of a shard, then join them with the landmarks."""
    join = Loaded(JoinLandmarks, (artifact.path(LANDMARKS_FILE), config.recipe))
    return Pipeline(STAGE, artifact, CHIPS_TABLE, CHIP_SCHEMA, CutChips(config.recipe), (join,))


def _log_pictures(stage: Stage) -> None:
    """Contact sheets: some kept chips with their largest landmarks, some dropped windows with their reason."""
    chips = lance.dataset(stage.artifact.path(CHIPS_TABLE), storage_options=storage.lance_options(stage.artifact.uri))
    rows = chips.take(spread(chips.count_rows()), columns=["image", "landmarks"]).to_pylist()
    kinds = [", ".join(dict.fromkeys(item["kind"] for item in row["landmarks"])) for row in rows]
    kept = [(row["image"], label or "no landmark") for row, label in zip(rows, kinds, strict=True)]
    log_contact_sheets(stage.run, kept, dropped_pictures(stage.artifact))
