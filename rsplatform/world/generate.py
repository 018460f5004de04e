"""The world's front door: a `WorldConfig` and a folder in, a folder with scenes, masks, landmarks and web pairs out.

    scenes/<train|val>_NNN.tif   masks/<scene>.tif   masks/classes.json   landmarks.geojson
    web/pairs.parquet            web/train_pairs.parquet                  world.json (last; says that all is there)

The same config gives the same bytes, whatever the number of workers. No Ray: it runs before anything else does.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rsplatform.config import Config
from rsplatform.world.palettes import CLASS_NAMES
from rsplatform.world.scenes import (
    ScenePlan,
    draw_scene,
    landmark_records,
    lay_out_place,
    plan_scenes,
    write_scene,
)
from rsplatform.world.web import PairTask, make_pairs, plan_pairs

POOL_PAYS_ABOVE = 8  # pieces of work
FORMAT_VERSION = 1  # rises whenever the same config would give other bytes
Progress = Callable[[int, int, str], None]  # done, all, what was just made
PAIR_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("alt_text", pa.string()),
        ("url", pa.string()),
        ("truth", pa.string()),
        ("alt_truth", pa.string()),
    ]
)
TRAIN_PAIR_SCHEMA = PAIR_SCHEMA.append(pa.field("is_overhead", pa.bool_()))


class WorldConfig(Config):
    """What world to make. The defaults take well under a minute on two cores and some 50 MB."""

    seed: int = Field(default=7, ge=0)
    scene_size_px: int = Field(default=1280, ge=256, le=8192)
    num_train_scenes: int = Field(default=14, ge=1, le=200)
    num_val_scenes: int = Field(default=4, ge=0, le=200)
    num_web_pairs: int = Field(default=1000, ge=0)
    num_train_pairs: int = Field(default=400, ge=0)


class WorldError(Exception):
    """The folder cannot become, or already is, another world; the message says what to do."""


def make_world(config: WorldConfig, folder: Path, *, progress: Progress | None = None, num_workers: int = 2) -> Path:
    """Makes the world in `folder` and returns the folder; a finished one of the same config is left as it is.

    Raises:
        WorldError: `folder` holds a finished world of another config, or files that no world put there.
    """
    if is_finished(config, folder):
        return folder
    for part in ("scenes", "masks", "web"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    scenes = plan_scenes(config.seed, config.scene_size_px, config.num_train_scenes, config.num_val_scenes)
    _refuse_strangers(folder, {f"{plan.name}.tif" for plan in scenes} | {"classes.json"})
    pair_tasks = [
        *plan_pairs(config.seed, "pairs", config.num_web_pairs),
        *plan_pairs(config.seed, "train_pairs", config.num_train_pairs),
    ]
    work = [(folder, task) for task in (*scenes, *pair_tasks)]
    landmarks: list[dict[str, Any]] = []
    pairs: dict[str, list[dict[str, Any]]] = {"pairs": [], "train_pairs": []}
    for number, (task, made) in enumerate(zip((*scenes, *pair_tasks), _run(work, num_workers), strict=True)):
        if isinstance(task, ScenePlan):
            landmarks += made
        else:
            pairs[task.pair_set] += made
        if progress:
            progress(number + 1, len(work), task.name if isinstance(task, ScenePlan) else task.pair_set)
    _write_tables(folder, landmarks, pairs)
    _write_json(folder / "world.json", _description(config, scenes))
    return folder


def is_finished(config: WorldConfig, folder: Path) -> bool:
    """True if `folder` holds the finished world of this config; raises WorldError if it holds another's."""
    path = folder / "world.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
        made_of = {"format_version": found["format_version"], **found["config"]}
    except (ValueError, KeyError, TypeError) as error:
        raise WorldError(f"{path}: not a world's description ({error!r}); delete {folder} to make it anew") from error
    wanted = {"format_version": FORMAT_VERSION, **config.model_dump()}
    different = [
        f"{key}: {made_of.get(key)} there, {wanted.get(key)} asked"
        for key in sorted({*made_of, *wanted})
        if made_of.get(key) != wanted.get(key)
    ]
    if different:
        remedy = f"choose another folder, or delete {folder}"
        raise WorldError(f"{path}: a finished world of another config ({'; '.join(different)}); {remedy}")
    return True


def _refuse_strangers(folder: Path, planned: set[str]) -> None:
    """A folder of scenes is read whole by the next stage: a leftover of another world would slip in."""
    strangers = [path for part in ("scenes", "masks") for path in (folder / part).iterdir() if path.name not in planned]
    if strangers:
        raise WorldError(f"{strangers[0]}: not of this world; choose another folder, or delete {folder}")


def _run(work: list[tuple[Path, ScenePlan | PairTask]], num_workers: int) -> Iterator[list[dict[str, Any]]]:
    """Results in the order of the work. A pool costs a second to start, so little work is done here."""
    if num_workers <= 1 or len(work) <= POOL_PAYS_ABOVE:
        yield from map(_make, work)
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process with threads (torch, Ray) can hang
    with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
        yield from pool.map(_make, work)


def _make(item: tuple[Path, ScenePlan | PairTask]) -> list[dict[str, Any]]:
    """One scene, whose landmarks are returned once a place, or some pairs."""
    folder, task = item
    if isinstance(task, PairTask):
        return make_pairs(task)
    features = lay_out_place(task)
    write_scene(task, *draw_scene(task, features), folder)
    return landmark_records(task, features) if task.visit == 0 else []


def _write_tables(folder: Path, landmarks: list[dict[str, Any]], pairs: dict[str, list[dict[str, Any]]]) -> None:
    _write_json(folder / "landmarks.geojson", {"type": "FeatureCollection", "features": landmarks})
    _write_json(folder / "masks" / "classes.json", {str(number): name for number, name in enumerate(CLASS_NAMES)})
    for name, schema in (("pairs", PAIR_SCHEMA), ("train_pairs", TRAIN_PAIR_SCHEMA)):
        rows = sorted(pairs[name], key=lambda row: row["row"])
        table = pa.Table.from_pylist([{key: row[key] for key in schema.names} for row in rows], schema=schema)
        pq.write_table(table, folder / "web" / f"{name}.parquet", compression="zstd", row_group_size=128)


def _description(config: WorldConfig, scenes: list[ScenePlan]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(),
        "scenes": [
            {
                "name": plan.name,
                "split": plan.split,
                "place": plan.place,
                "acquired": plan.acquired,
                "epsg": plan.epsg,
                "ground_sample_distance_m": plan.ground_sample_distance_m,
                "is_cloudy": plan.cloud_fraction > 0,
            }
            for plan in scenes
        ],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Written beside and moved into place, so that no half of it is ever read."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, ensure_ascii=False))
    os.replace(unfinished, path)
