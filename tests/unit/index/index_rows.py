"""Rows of an index made by hand, and the slow obvious search over them."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from tiny_service import MODEL, finish, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import validate
from rsplatform.curate.pipeline import run_plain
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.check import check_base, check_ids
from rsplatform.index.embed import load_embedder
from rsplatform.index.filters import SearchFilter
from rsplatform.index.finish import finish_index
from rsplatform.index.store import ChipIndex
from rsplatform.index.table import ROWS_PATH, IndexMeta, index_schema

WIDTH = 16
HASH = "a" * 64
START = datetime(2020, 1, 1, tzinfo=UTC)
KINDS = ["stadium", "o'hara", "x') OR true OR array_has(kinds, 'y", 'quo"te', "back\\slash"]


def make_rows(num_rows: int, seed: int = 3) -> pa.Table:
    """Chips at random places; every third without a date, every second without a landmark, some without a place."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_rows, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    west, south = rng.uniform(-179, 178, num_rows), rng.uniform(-80, 79, num_rows)
    west[5::50] = south[5::50] = np.nan
    number = np.arange(num_rows)
    columns = {
        "id": [f"chip-{n}" for n in number],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), WIDTH),
        "model_hash": [HASH] * num_rows,
        "table": ["chips/hand/v1"] * num_rows,
        "row": number,
        "file": [""] * num_rows,
        "scene": [f"scene-{n % 4}" for n in number],
        "split": ["val"] * num_rows,
        "caption": [f"caption {n}" for n in number],
        "kinds": [[KINDS[n % len(KINDS)]] if n % 2 else [] for n in number],
        "datetime": [START + timedelta(days=int(n)) if n % 3 else None for n in number],
        "ground_sample_distance_m": (0.5 + number % 10).astype(np.float32),
        "geometry": pa.nulls(num_rows, pa.binary()),
        **{"west": west, "south": south, "east": west + 0.5, "north": south + 0.5},
        **{name: np.zeros(num_rows, np.float32) for name in ("row_px", "column_px")},
        **{name: np.full(num_rows, 64, np.float32) for name in ("height_px", "width_px")},
    }
    return pa.table(columns, schema=index_schema(WIDTH))


def make_index(rows: pa.Table, folder: Path, exact_below_rows: int = 50_000) -> IndexMeta:
    """Write the rows as the pipeline would and finish the index."""
    lance.write_dataset(rows, f"{folder}/{ROWS_PATH}")
    return finish_index(str(folder), HASH, exact_below_rows)


def open_index(rows: pa.Table, folder: Path, exact_below_rows: int = 50_000) -> ChipIndex:
    """The finished index, opened."""
    make_index(rows, folder, exact_below_rows)
    return ChipIndex(str(folder), HASH)


def query(seed: int = 0) -> np.ndarray:
    """A random unit vector."""
    vector = np.random.default_rng(100 + seed).normal(size=WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def passes(row: dict, wanted: SearchFilter) -> bool:
    """Whether a row meets a filter, condition by condition as the filter's docstring says."""
    if wanted.bounds_lonlat:
        west, south, east, north = wanted.bounds_lonlat
        crossing = west > east
        if wanted.relation == "within":
            latitude = row["south"] >= south and row["north"] <= north
            sides = (row["west"] >= west, row["east"] <= east)
        else:
            latitude = row["south"] <= north and row["north"] >= south
            sides = (row["east"] >= west, row["west"] <= east)
        if not latitude or not (any(sides) if crossing else all(sides)):
            return False
    start, end = wanted.interval
    if (start or end) and row["datetime"] is None:
        return False
    if (start and row["datetime"] < start) or (end and row["datetime"] > end):
        return False
    if wanted.ground_sample_distance_m:
        low, high = wanted.ground_sample_distance_m
        if not low <= row["ground_sample_distance_m"] <= high:
            return False
    return row["id"] != wanted.excluded_id and (not wanted.kinds or bool(set(wanted.kinds) & set(row["kinds"])))


class Compared:
    """Every row compared with a query, one by one: what a search must give."""

    def __init__(self, rows: pa.Table) -> None:
        matrix_NE = np.array(rows["vector"].to_pylist(), dtype=np.float64)
        self._unit_NE = matrix_NE / np.linalg.norm(matrix_NE, axis=1, keepdims=True)
        self._rows = rows.drop(["vector"]).to_pylist()

    def ids(self, vector_E: np.ndarray, k: int, wanted: SearchFilter | None = None) -> list[str]:
        """Ids of the k best by cosine in float64 among those that pass."""
        order = np.argsort(-(self._unit_NE @ vector_E), kind="stable")
        allowed = (self._rows[i]["id"] for i in order if wanted is None or passes(self._rows[i], wanted))
        return list(itertools.islice(allowed, k))


def build_plain(root: str, output: str, **sources: Any) -> tuple[ChipIndex, dict[str, Any]]:
    """The index of some sources, built without Ray, and its counts."""
    config = validate(BuildIndexConfig, {"output": output, "model": MODEL, "rows_per_shard": 20} | sources, "test")
    artifact, model_hash = Artifact(root, output), load_embedder(root, MODEL).model_hash
    check_base(config.base, config.remove_scenes, root, model_hash)
    pipeline, shards = index_pipeline(config, tiny_cluster(root), artifact)
    check_ids(shards, root)
    counts = run_plain(pipeline, shards)
    finish_index(artifact.uri, model_hash)
    finish(root, output, counts)
    return ChipIndex(artifact.uri, model_hash), counts
