"""The index of one model over chips and pictures, opened for searching.

In: a query vector and a filter. Out: the k nearest chips that meet the filter. The filter is applied first, in memory;
what it leaves is compared exactly. A large index narrows that to the lists of rows near the query, and by less the more
a filter leaves out, so that few rows are compared whole.
It embeds nothing, and refuses vectors of another model than the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from rsplatform.config import ConfigError
from rsplatform.index.filters import SearchFilter
from rsplatform.index.held_rows import HELD_COLUMNS, HeldRows
from rsplatform.index.nearest import nearest
from rsplatform.index.table import META, IndexMeta, MappedVectors, open_rows
from rsplatform.index.vector_index import VectorIndex
from rsplatform.storage import read_json

COLUMNS = [
    *("id", "table", "row", "file", "scene", "split", "caption", "kinds", "datetime", "ground_sample_distance_m"),
    *("west", "south", "east", "north", "row_px", "column_px", "height_px", "width_px"),
]


@dataclass(frozen=True)
class Hit:
    """One chip of the index with its cosine to the query (1 for a chip that was looked up by its id).

    `table`, `row` and `file` say where its picture lies (pictures.py reads it). NaN: place or scale unknown.
    """

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
    table: str = ""
    file: str = ""


class ChipIndex:
    """A finished index, opened for the model with `model_hash`. Threads may share it.

    Raises:
        ConfigError: the index holds vectors of another model, or was built by an earlier version.
    """

    def __init__(self, artifact_uri: str, model_hash: str) -> None:
        document = read_json(f"{artifact_uri}/{META}")
        if set(document) - set(IndexMeta.__dataclass_fields__) or "exact_below_rows" not in document:
            raise ConfigError(f"{artifact_uri} was built by an earlier version; build it again under another version")
        self.meta = IndexMeta(**document)
        if self.meta.model_hash != model_hash:
            raise ConfigError(
                f"{artifact_uri}: the index was built with model {self.meta.model_hash[:12]}…, this is model "
                f"{model_hash[:12]}…; run build_index with this model, or serve the model that made the index"
            )
        self._rows = open_rows(artifact_uri)
        self._held = HeldRows(self._rows.to_table(columns=HELD_COLUMNS))
        self._mapped = MappedVectors(artifact_uri, self.meta.num_rows, self.meta.embedding_width)
        self._vector_index = VectorIndex(artifact_uri, self.meta) if self.meta.search == "ivf" else None

    def search(self, vector_E: np.ndarray, k: int, search_filter: SearchFilter | None = None) -> list[Hit]:
        """The `k` chips of highest cosine among those that meet the filter, best first; fewer only if fewer exist.

        Raises:
            ValueError: k below 1 or a vector of another width.
        """
        if k < 1 or vector_E.shape != (self.meta.embedding_width,):
            raise ValueError(f"expected k ≥ 1 and a vector of {self.meta.embedding_width}, got {k}, {vector_E.shape}")
        wanted = search_filter or SearchFilter()
        rows = self._held.select(wanted)
        more = k + 1 if wanted.excluded_id else k
        numbers, cosines = self._nearest(np.asarray(vector_E, dtype=np.float32), more, rows)
        found = self._hits(numbers, cosines.tolist())
        return [hit for hit in found if hit.id != wanted.excluded_id][:k]

    def get(self, chip_ids: Sequence[str]) -> dict[str, Hit]:
        """The chips with these ids that the index knows, by id."""
        return {row["id"]: _hit(row, 1.0) for row in self._named(chip_ids, COLUMNS)}

    def vector(self, chip_id: str) -> np.ndarray:
        """The stored unit vector (E,) of a chip; KeyError if the index does not know it."""
        rows = self._named([chip_id], ["vector"])
        if not rows:
            raise KeyError(chip_id)
        return np.asarray(rows[0]["vector"], dtype=np.float32)

    def chips_refs(self) -> set[str]:
        """The chips artifacts that rows came from; folders of pictures are none."""
        return set(self._rows.to_table(columns=["table"], filter="row >= 0")["table"].unique().to_pylist())

    def datetimes(self) -> tuple[datetime, datetime] | None:
        """The first and the last time of the chips; None if no chip has one."""
        known = self._rows.to_table(columns=["datetime"])["datetime"].drop_null()
        order = known.cast(pa.int64()).to_numpy()
        return (known[int(order.argmin())].as_py(), known[int(order.argmax())].as_py()) if len(order) else None

    def ground_sample_distances_m(self) -> tuple[float, float] | None:
        """The finest and the coarsest scale of the chips; None if none is known."""
        column = "ground_sample_distance_m"
        known = self._rows.to_table(columns=[column])[column].to_numpy()
        known = known[np.isfinite(known)]
        return (float(known.min()), float(known.max())) if len(known) else None

    def kinds(self) -> dict[str, int]:
        """How many chips show each kind of landmark, most frequent first."""
        return self._held.kind_counts()

    def _nearest(self, query_E: np.ndarray, k: int, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self._vector_index is not None:
            rows = self._vector_index.near(query_E, k, rows)
        return nearest(self._mapped.vectors_NE, query_E, k, rows)

    def _hits(self, numbers: np.ndarray, cosines: list[float]) -> list[Hit]:
        if not len(numbers):
            return []
        rows = self._rows.take(numbers.tolist(), columns=COLUMNS).to_pylist()
        return [_hit(row, cosine) for row, cosine in zip(rows, cosines, strict=True)]

    def _named(self, chip_ids: Sequence[str], columns: list[str]) -> list[dict[str, Any]]:
        if not chip_ids:
            return []
        where = f"id IN ({', '.join(_quoted(chip_id) for chip_id in chip_ids)})"
        return self._rows.to_table(columns=columns, filter=where).to_pylist()


def _quoted(text: str) -> str:
    """A string as a SQL literal: quotes doubled, nothing else is special inside."""
    return "'" + text.replace("'", "''") + "'"


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
        table=row["table"],
        file=row["file"],
    )
