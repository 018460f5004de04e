"""The index of one model over one table of chips: a LanceDB database `db/` with table `chips`, and `meta.json`.

In: rows of `index_schema` (written by build.py or any Arrow producer). Out: the k nearest chips that meet a filter.
Filters run before the search. It embeds nothing, and refuses vectors of another model than the caller's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, IvfPq, LabelList

from rsplatform.artifacts import ArtifactError
from rsplatform.config import ConfigError
from rsplatform.index.filters import SearchFilter, quoted
from rsplatform.storage import lance_options, read_json, write_json

DATABASE = "db"
TABLE = "chips"
# Below the artifact: LanceDB takes any Lance table in its folder as its own.
TABLE_PATH = f"{DATABASE}/{TABLE}.lance"
META = "meta.json"
# Below this an exact scan takes milliseconds; above it an IVF-PQ index with refinement is trained (our default).
EXACT_BELOW_ROWS = 50_000
# Lists visited and the factor of candidates that are compared again exactly: 0.992 recall@10 at 200 k × 512.
NUM_PROBES = 20
REFINE_FACTOR = 10
RECALL_QUERIES = 50
COLUMNS = [
    *("id", "row", "scene", "split", "caption", "kinds", "datetime", "ground_sample_distance_m"),
    *("west", "south", "east", "north", "row_px", "column_px", "height_px", "width_px"),
]


def index_schema(embedding_width: int) -> pa.Schema:
    """Columns of the table. `vector` is unit length; `row` is the chip's row in chips.lance; datetime may be null."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("vector", pa.list_(pa.float16(), embedding_width)),
            ("row", pa.int64()),
            ("scene", pa.string()),
            ("split", pa.string()),
            ("caption", pa.string()),
            ("kinds", pa.list_(pa.string())),
            ("datetime", pa.timestamp("us", "UTC")),
            ("ground_sample_distance_m", pa.float32()),
            *((name, pa.float64()) for name in ("west", "south", "east", "north")),
            *((name, pa.float32()) for name in ("row_px", "column_px", "height_px", "width_px")),
        ]
    )


@dataclass(frozen=True)
class IndexMeta:
    """What meta.json holds; `recall_at_10` of the search that is used, against the exact one (None: it is exact)."""

    model_hash: str
    embedding_width: int
    num_rows: int
    metric: Literal["cosine"] = "cosine"
    search: Literal["exact", "ivf_pq"] = "exact"
    num_partitions: int | None = None
    num_probes: int | None = None
    refine_factor: int | None = None
    recall_at_10: float | None = None


@dataclass(frozen=True)
class Hit:
    """One chip of the index with its cosine to the query (1 for a chip that was looked up by its id)."""

    id: str
    row: int
    score: float
    scene: str
    split: str
    caption: str
    kinds: tuple[str, ...]
    datetime: datetime | None
    ground_sample_distance_m: float | None
    bounds_lonlat: tuple[float, float, float, float]
    window_px: tuple[float, float, float, float]  # row, column, height, width in the scene


def finish_index(artifact_uri: str, model_hash: str, exact_below_rows: int = EXACT_BELOW_ROWS) -> IndexMeta:
    """Index the written table (scalar columns, and vectors above `exact_below_rows`) and write meta.json.

    Raises:
        ArtifactError: the table is empty.
    """
    table = _open_table(artifact_uri)
    num_rows = table.count_rows()
    if not num_rows:
        raise ArtifactError(
            f"{artifact_uri}: no chip was embedded; its ledger has the reasons: give other `chips`, delete the folder"
        )
    width = table.schema.field("vector").type.list_size
    table.create_index("id", config=BTree())
    meta = IndexMeta(model_hash, width, num_rows)
    if num_rows >= exact_below_rows:
        for column in ("west", "south", "east", "north", "datetime", "ground_sample_distance_m"):
            table.create_index(column, config=BTree())
        table.create_index("kinds", config=LabelList())
        meta = _train_vector_index(table, meta)
    write_json(f"{artifact_uri}/{META}", asdict(meta))
    return meta


def _train_vector_index(table: Any, meta: IndexMeta) -> IndexMeta:
    num_partitions = max(1, round(math.sqrt(meta.num_rows)))
    sub_vectors = next(n for n in range(max(1, meta.embedding_width // 8), 0, -1) if meta.embedding_width % n == 0)
    config = IvfPq(distance_type="cosine", num_partitions=num_partitions, num_sub_vectors=sub_vectors)
    table.create_index("vector", config=config)
    rows = np.linspace(0, meta.num_rows - 1, RECALL_QUERIES).astype(int)
    sample = table.search().select(["vector"]).limit(meta.num_rows).to_arrow()["vector"].take(rows)
    found = 0
    for vector in sample.to_pylist():
        query = np.asarray(vector, dtype=np.float32)
        exact = _nearest(table, query, 10).bypass_vector_index().to_arrow()["id"].to_pylist()
        fast = _approximate(_nearest(table, query, 10)).to_arrow()["id"].to_pylist()
        found += len(set(exact) & set(fast)) / len(exact)
    return replace(
        meta,
        search="ivf_pq",
        num_partitions=num_partitions,
        num_probes=NUM_PROBES,
        refine_factor=REFINE_FACTOR,
        recall_at_10=found / len(rows),
    )


def _nearest(table: Any, vector_E: np.ndarray, k: int) -> Any:
    query = table.search(vector_E, vector_column_name="vector").distance_type("cosine")
    return query.select([*COLUMNS, "_distance"]).limit(k)


def _approximate(query: Any) -> Any:
    return query.nprobes(NUM_PROBES).refine_factor(REFINE_FACTOR)


def _open_table(artifact_uri: str) -> Any:
    uri = f"{artifact_uri}/{DATABASE}"
    return lancedb.connect(uri, storage_options=lance_options(uri)).open_table(TABLE)


class ChipIndex:
    """A finished index, opened for the model with `model_hash`.

    Raises:
        ConfigError: the index holds vectors of another model.
    """

    def __init__(self, artifact_uri: str, model_hash: str) -> None:
        self.meta = IndexMeta(**read_json(f"{artifact_uri}/{META}"))
        if self.meta.model_hash != model_hash:
            raise ConfigError(
                f"{artifact_uri}: the index was built with model {self.meta.model_hash[:12]}…, this is model "
                f"{model_hash[:12]}…; run build_index with this model, or serve the model that made the index"
            )
        self._table = _open_table(artifact_uri)

    def search(self, vector_E: np.ndarray, k: int, search_filter: SearchFilter | None = None) -> list[Hit]:
        """The `k` chips of highest cosine among those that meet the filter, best first; fewer only if fewer exist.

        Raises:
            ValueError: k below 1 or a vector of another width.
        """
        if k < 1 or vector_E.shape != (self.meta.embedding_width,):
            raise ValueError(f"expected k ≥ 1 and a vector of {self.meta.embedding_width}, got {k}, {vector_E.shape}")
        query = _nearest(self._table, np.asarray(vector_E, dtype=np.float32), k)
        query = _approximate(query) if self.meta.search == "ivf_pq" else query
        where = search_filter.sql() if search_filter else None
        if where:
            query = query.where(where, prefilter=True)
        return [_hit(row, 1 - row["_distance"]) for row in query.to_arrow().to_pylist()]

    def get(self, chip_ids: Sequence[str]) -> dict[str, Hit]:
        """The chips with these ids that the index knows, by id."""
        if not chip_ids:
            return {}
        rows = self._rows(chip_ids, COLUMNS)
        return {row["id"]: _hit(row, 1.0) for row in rows}

    def vector(self, chip_id: str) -> np.ndarray:
        """The stored unit vector (E,) of a chip; KeyError if the index does not know it."""
        rows = self._rows([chip_id], ["vector"])
        if not rows:
            raise KeyError(chip_id)
        return np.asarray(rows[0]["vector"], dtype=np.float32)

    def kinds(self) -> dict[str, int]:
        """How many chips show each kind of landmark, most frequent first; one pass over a small column."""
        column = self._table.search().select(["kinds"]).limit(self.meta.num_rows).to_arrow()["kinds"]
        counted = pa.chunked_array([chunk.flatten() for chunk in column.chunks], pa.string()).value_counts()
        pairs = sorted(((item["counts"], item["values"]) for item in counted.to_pylist()), reverse=True)
        return {kind: count for count, kind in pairs}

    def _rows(self, chip_ids: Sequence[str], columns: list[str]) -> list[dict[str, Any]]:
        where = f"id IN ({', '.join(quoted(chip_id) for chip_id in chip_ids)})"
        return self._table.search().where(where).select(columns).limit(len(chip_ids)).to_arrow().to_pylist()


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(
        id=row["id"],
        row=row["row"],
        score=score,
        scene=row["scene"],
        split=row["split"],
        caption=row["caption"],
        kinds=tuple(row["kinds"]),
        datetime=row["datetime"],
        ground_sample_distance_m=row["ground_sample_distance_m"],
        bounds_lonlat=(row["west"], row["south"], row["east"], row["north"]),
        window_px=(row["row_px"], row["column_px"], row["height_px"], row["width_px"]),
    )
