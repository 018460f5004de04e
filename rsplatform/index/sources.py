"""What an index is made of: chips, folders of pictures, rows of an earlier index. Recipe sections, and their readers.

In: a shard, a range of one source. Out: a table of all its rows with the columns of `index_schema`, `image` (null
where the vector stands already) and DROP_FIELDS. Decodes and embeds nothing.
"""

import fnmatch
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import shapely
from pydantic import Field

from rsplatform import storage
from rsplatform.artifacts import open_artifact
from rsplatform.config import CaptionsArtifact, ChipsArtifact, Config, InputPath
from rsplatform.curate.chip_windows import ChipWindow, corners_lonlat
from rsplatform.curate.pipeline import DROP_FIELDS
from rsplatform.dataset.store import open_table
from rsplatform.geo import Grid
from rsplatform.index.table import TABLE_PATH, index_schema
from rsplatform.records import parse_time
from rsplatform.sources.scenes import scene_from_json

CATALOGUE = "scenes.json"
# The id that a chip has in its own table, for its captions; it leaves with the pipeline.
OWN_ID = "own_id"
SIDES = ("west", "south", "east", "north")
WINDOW = ("row_px", "column_px", "height_px", "width_px")
# Rows of an earlier index are copied, not embedded: a shard of them holds many.
BASE_ROWS_PER_SHARD = 16_384


class ChipSource(Config):
    """Chips of one size. `captions` only adds text to the results. `id_suffix` tells chips apart that are called alike,
    as those of another size are that were cut from the same scenes."""

    chips: ChipsArtifact
    captions: CaptionsArtifact | None = None
    id_suffix: str = Field(default="", pattern=r"^[\w.~-]*$")


class FolderSource(Config):
    """A folder of JPEG, PNG or WEBP pictures, read in place with all folders below it; `scene` is what they are called
    together. They have no place on the map; `ground_sample_distance_m` is told to models that know of scale."""

    path: InputPath
    scene: str = Field(pattern=r"^[\w.~-]+$")
    ground_sample_distance_m: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class ReadRows:
    """Reads the rows of a shard; `width` is the model's embedding width."""

    root: str
    width: int

    def __call__(self, shard: dict[str, Any]) -> pa.Table:
        if "chips" in shard:
            table = read_chips(self.root, shard)
        elif "folder" in shard:
            table = read_folder(shard)
        else:
            table = read_base(self.root, shard)
        return _conformed(table, self.width)


def read_chips(root: str, shard: dict[str, Any]) -> pa.Table:
    """The rows `start`, `start` + 1, … of a chips table, with the corners that the catalogue's grids give."""
    ref, start, number = shard["chips"], shard["start"], shard["rows"]
    chips = open_table(root, ref).to_table(offset=start, limit=number)
    bounds = np.array(chips["bounds_lonlat"].to_pylist(), dtype=np.float64).reshape(-1, 4)
    windows = np.stack([chips[name].to_numpy().astype(np.float64) for name in WINDOW], axis=1)
    times = [parse_time(text) if text else None for text in chips["datetime"].to_pylist()]
    kinds = [sorted({item["kind"] for item in items or []}) for items in chips["landmarks"].to_pylist()]
    grids = catalogue_grids(open_artifact(root, ref).path(CATALOGUE))
    corners = [
        corners_lonlat(grids[scene], ChipWindow(0, 0, *window)) if scene in grids else None
        for scene, window in zip(chips["scene"].to_pylist(), windows.tolist(), strict=True)
    ]
    return pa.table(
        {
            "id": [f"{chip_id}{shard['id_suffix']}" for chip_id in chips["id"].to_pylist()],
            OWN_ID: chips["id"],
            "image": chips["image"],
            "table": [ref] * number,
            "row": pa.array(range(start, start + number), pa.int64()),
            "file": [""] * number,
            "scene": chips["scene"],
            "split": chips["split"],
            "kinds": pa.array(kinds, pa.list_(pa.string())),
            "datetime": pa.array(times, pa.timestamp("us", "UTC")),
            "ground_sample_distance_m": chips["ground_sample_distance_m"],
            "geometry": pa.array(_polygons(bounds, corners), pa.binary()),
            **{name: bounds[:, side] for side, name in enumerate(SIDES)},
            **{name: chips[name] for name in WINDOW},
        }
    )


def read_folder(shard: dict[str, Any]) -> pa.Table:
    """The pictures of a folder that a shard names, as they lie; their ids hold no slash, so that URLs can."""
    files, scene = shard["files"], shard["scene"]
    images = [storage.read_bytes(f"{shard['place']}/{name}") for name in files]
    distance_m = math.nan if shard["ground_sample_distance_m"] is None else shard["ground_sample_distance_m"]
    return pa.table(
        {
            "id": [folder_id(scene, name) for name in files],
            "image": pa.array(images, pa.binary()),
            "table": [shard["folder"]] * len(files),
            "row": pa.array([-1] * len(files), pa.int64()),
            "file": files,
            "scene": [scene] * len(files),
            "split": [""] * len(files),
            "kinds": pa.array([[]] * len(files), pa.list_(pa.string())),
            "ground_sample_distance_m": np.full(len(files), distance_m, np.float32),
            **{name: np.full(len(files), np.nan) for name in (*SIDES, *WINDOW)},
        }
    )


def folder_id(scene: str, name: str) -> str:
    """The id of a picture of a folder."""
    return f"{scene}:{name.replace('/', ':')}"


def read_base(root: str, shard: dict[str, Any]) -> pa.Table:
    """Rows of an earlier index with their vectors; those of removed scenes with that as the reason to drop them."""
    rows = base_rows(root, shard["base"]).to_table(offset=shard["start"], limit=shard["rows"])
    removed = [is_removed(scene, shard["removed"]) for scene in rows["scene"].to_pylist()]
    reasons = pa.array(["scene_removed" if gone else None for gone in removed], pa.string())
    return rows.append_column(DROP_FIELDS[0], reasons)


def base_rows(root: str, ref: str) -> lance.LanceDataset:
    """The table of a finished index."""
    uri = open_artifact(root, ref).path(TABLE_PATH)
    return lance.dataset(uri, storage_options=storage.lance_options(uri))


def is_removed(scene: str, patterns: Sequence[str]) -> bool:
    """Whether a scene's name matches one of the globs."""
    return any(fnmatch.fnmatchcase(scene, pattern) for pattern in patterns)


@functools.lru_cache(maxsize=8)
def catalogue_grids(uri: str) -> dict[str, Grid]:
    """The grid of each scene of a catalogue; none where chips came without one."""
    if not storage.exists(uri):
        return {}
    return {entry["id"]: scene_from_json(entry).grid for entry in storage.read_json(uri)}


def _polygons(bounds_N4: np.ndarray, corners: list[np.ndarray | None]) -> list[bytes]:
    boxes = shapely.box(*bounds_N4.T)
    outlines = [
        box if outline is None else shapely.Polygon(outline) for box, outline in zip(boxes, corners, strict=True)
    ]
    return list(shapely.to_wkb(np.array(outlines, dtype=object)))


def _conformed(table: pa.Table, width: int) -> pa.Table:
    """All columns of the index, `image`, OWN_ID and DROP_FIELDS, in one order, null where a source has none."""
    fields = [*index_schema(width), pa.field("image", pa.binary()), pa.field(OWN_ID, pa.string()), *DROP_FIELDS]
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in fields
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))
