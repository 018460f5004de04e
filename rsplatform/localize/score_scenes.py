"""Scores of the patches of scenes, strip by strip: what each worker of `localize` does with the model.

In: shards, each some rows of patches of one scene. Out: one row of a table for each, with its scores. A strip that
cannot be read keeps its row, with the reason. No Ray: run.py runs it in actors.
Shapes: C texts, HxW patches.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import rasterio
import torch

from rsplatform import storage
from rsplatform.artifacts import open_artifact
from rsplatform.curate.pipeline import DROP_FIELDS, Shard, replace_column
from rsplatform.geo import Grid
from rsplatform.localize.ground_grid import target_grid
from rsplatform.localize.ground_pixels import resampled
from rsplatform.localize.picture import encoder, tiling
from rsplatform.localize.scales import Looks, View, moved, placed, score_scales, windows_by_resolution
from rsplatform.localize.scene import Strip, Tiling, patches_along
from rsplatform.model.embedder import Embedder
from rsplatform.sources.scenes import Scene, SceneError, scene_from_json

STRIP_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("scene", pa.int64()),  # its number among the files
        ("row", pa.int64()),  # of patches
        ("shape", pa.list_(pa.int64(), 3)),  # C, H, W
        ("scores", pa.large_binary()),  # float32, NaN where the scene has no data
        ("has_data", pa.bool_()),
        ("error_reason", pa.string()),
        ("error_detail", pa.string()),
    ]
)
# Patches of one strip, and scores of all texts in it: a task of seconds, rows of the table of at most 64 MB, and few
# tiles that two strips both need (our defaults).
STRIP_PATCHES, STRIP_SCORES = 2**17, 2**24


def load_model(root: str, model_ref: str, device: str = "cpu") -> Embedder:
    """The model of a finished artifact, in evaluation mode."""
    with storage.local_folder(open_artifact(root, model_ref).path("model")) as folder:
        embedder = Embedder.load(folder, device)
    embedder.model.eval()
    return embedder


@dataclass(frozen=True)
class ScoreRecipe:
    """What decides the scores: the texts, the grid of the maps and what is averaged on it."""

    prompts: tuple[str, ...]
    ground_sample_distance_m: float
    looks: Looks
    maps_crs: str | None = None


def strip_shards(number: int, scene: Scene, recipe: ScoreRecipe, tiles: Tiling, patch_size_px: int) -> list[Shard]:
    """The strips of one scene, from north to south; their size depends on the recipe and the scene alone."""
    target = target_grid(scene.grid, recipe.ground_sample_distance_m, recipe.maps_crs)
    rows = patches_along(target.first_px[0], target.grid.height, patch_size_px)
    columns = patches_along(target.first_px[1], target.grid.width, patch_size_px)
    most = min(STRIP_PATCHES, STRIP_SCORES // len(recipe.prompts)) // columns
    length = max(most, tiles.tile_patches - tiles.overlap_patches)
    return [
        {
            "shard": f"strip_{number:06d}_{first:07d}",
            "number": number,
            "scene": asdict(scene),
            "first": first,
            "end": min(first + length, rows),
        }
        for first in range(0, rows, length)
    ]


def read_strip(shard: Shard) -> pa.Table:
    """The description of a strip as a row; its pixels are read where they are scored."""
    row = {"id": f"{shard['scene']['uri']}#{shard['first']}", "scene": shard["number"], "row": shard["first"]}
    schema = pa.schema([*STRIP_SCHEMA, *DROP_FIELDS, pa.field("shard", pa.string())])
    return pa.Table.from_pylist([row | {"shard": json.dumps(shard)}], schema=schema)


class StripScorer:
    """Table operation: loads the model once, then scores one strip after the other."""

    def __init__(self, root: str, model_ref: str, recipe: ScoreRecipe, device: str = "cpu"):
        self._embedder = load_model(root, model_ref, device)
        self._texts_CE = torch.from_numpy(self._embedder.embed_texts(recipe.prompts))
        self._recipe = recipe

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their scores, or the reason why there are none."""
        rows: dict[str, list[Any]] = {name: [] for name in ("shape", "scores", "has_data", "error_reason")}
        rows["error_detail"] = []
        for text in table["shard"].to_pylist():
            try:
                scores_CHW, problem = self._score(json.loads(text)), (None, None)
            except SceneError as error:
                scores_CHW, problem = np.zeros((0, 0, 0), np.float32), (error.reason, error.detail)
            rows["shape"].append(list(scores_CHW.shape))
            rows["scores"].append(scores_CHW.tobytes())
            rows["has_data"].append(bool(np.isfinite(scores_CHW).any()))
            rows["error_reason"].append(problem[0])
            rows["error_detail"].append(problem[1])
        for name, values in rows.items():
            table = replace_column(table, name, pa.array(values, STRIP_SCHEMA.field(name).type))
        return table

    def _score(self, shard: Shard) -> np.ndarray:
        scene, recipe = scene_from_json(shard["scene"]), self._recipe
        with rasterio.Env(**dict[str, Any](storage.gdal_options())):
            strips = score_scales(views(self._embedder, scene, recipe), self._texts_CE, (shard["first"], shard["end"]))
            return torch.cat([strip.maps_CHW for strip in strips], dim=1).numpy()


def views(embedder: Embedder, scene: Scene, recipe: ScoreRecipe) -> list[View]:
    """The looks at a scene that its scores are the mean of; the first is on the grid of the maps."""
    found: list[View] = []
    frame: Grid | None = None
    for resolution, windows in windows_by_resolution(recipe.looks.window, recipe.looks.scales).items():
        distance_m = recipe.ground_sample_distance_m / resolution
        reader, grid = resampled(scene, distance_m, recipe.maps_crs)
        frame = frame or grid
        patches, tiles = encoder(embedder, distance_m), tiling(embedder, windows[0])
        view = View(reader, patches, tiles, windows[1:], *placed(reader, grid, frame, patches.patch_size_px))
        found += moved(view, recipe.looks.phases)
    return found


def stored_strips(uri: str, rows: range, pixels_per_patch: int) -> Iterator[Strip]:
    """The strips in rows of the table at `uri`, cut so that at pixel size one holds few scores more than STRIP_SCORES.

    `pixels_per_patch` is the area of a patch; one row of patches is the least that a strip has.
    """
    table = lance.dataset(uri, storage_options=storage.lance_options(uri))
    for index in rows:
        (row,) = table.take([index], columns=["row", "shape", "scores"]).to_pylist()
        maps_CHW = torch.frombuffer(bytearray(row["scores"]), dtype=torch.float32).view(*row["shape"])
        length = max(1, STRIP_SCORES // 2 // (maps_CHW.shape[0] * maps_CHW.shape[2] * pixels_per_patch))
        for first in range(0, maps_CHW.shape[1], length):
            yield Strip(row["row"] + first, maps_CHW[:, first : first + length])
