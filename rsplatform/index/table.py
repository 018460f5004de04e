"""The files of an index: the LanceDB table `db/chips`, its vectors once more as `vectors.f16`, and `meta.json`.

In: the rows that build.py's pipeline left in `work/rows.lance`. Out: the same rows as a table of few large fragments,
and its vectors one after the other in its order, which searches map into memory: a thousand vectors scattered over
1 M rows are there in under a millisecond, from a Lance table in 50 to 100. Searches nothing.
Shapes: N rows, E embedding.
"""

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lance
import lancedb
import numpy as np
import psutil
import pyarrow as pa
import torch

from rsplatform import storage
from rsplatform.artifacts import ArtifactError
from rsplatform.storage import lance_options

DATABASE = "db"
TABLE = "chips"
# Below the artifact: LanceDB takes any Lance table in its folder as its own.
TABLE_PATH = f"{DATABASE}/{TABLE}.lance"
VECTORS_FILE = "vectors.f16"
ROWS_PATH = "work/rows.lance"
META = "meta.json"
BATCH_ROWS = 8192
# Vectors that fit into this part of the free memory are read when they are opened, not by the first searches.
TOUCHED_FRACTION = 0.5


@dataclass(frozen=True)
class IndexMeta:
    """What meta.json holds, and the manifest's `index_…` metrics.

    `recall_at_10` is that of the search that is used against the exact one, over `recall_queries` queries other than
    those that chose its parameters; None where the search is exact. Of `num_partitions` lists a search visits
    `num_probes`, and compares their rows exactly.
    """

    model_hash: str
    embedding_width: int
    num_rows: int
    exact_below_rows: int
    metric: Literal["cosine"] = "cosine"
    search: Literal["exact", "ivf"] = "exact"
    num_partitions: int | None = None
    num_probes: int | None = None
    target_recall: float | None = None
    recall_at_10: float | None = None
    recall_queries: int | None = None


def index_schema(embedding_width: int) -> pa.Schema:
    """Columns of the table. `vector` is unit length.

    `table` and `row` say where the picture lies: an artifact and a row of its image table, or a folder as the recipe
    spells it and a `file` below it (row −1). Bounds and window are NaN, geometry is null and GSD is NaN where unknown;
    datetime may be null. `geometry` is a WKB polygon of the chip's corners in longitude and latitude.
    """
    return pa.schema(
        [
            ("id", pa.string()),
            ("vector", pa.list_(pa.float16(), embedding_width)),
            ("model_hash", pa.string()),
            ("table", pa.string()),
            ("row", pa.int64()),
            ("file", pa.string()),
            ("scene", pa.string()),
            ("split", pa.string()),
            ("caption", pa.string()),
            ("kinds", pa.list_(pa.string())),
            ("datetime", pa.timestamp("us", "UTC")),
            ("ground_sample_distance_m", pa.float32()),
            ("geometry", pa.binary()),
            *((name, pa.float64()) for name in ("west", "south", "east", "north")),
            *((name, pa.float32()) for name in ("row_px", "column_px", "height_px", "width_px")),
        ]
    )


def write_table(artifact_uri: str) -> tuple[int, int]:
    """Make the table and its vectors of the pipeline's rows, again from the start; their number N and width E.

    Raises:
        ArtifactError: there are no rows.
    """
    system, path = storage.filesystem(f"{artifact_uri}/{DATABASE}")
    system.delete_dir_contents(path, missing_dir_ok=True)  # of a run that was killed here
    rows = _lance(f"{artifact_uri}/{ROWS_PATH}")
    num_rows, width = rows.count_rows(), rows.schema.field("vector").type.list_size
    if not num_rows:
        raise ArtifactError(
            f"{artifact_uri}: no picture was embedded; its ledger has the reasons: give others, delete the folder"
        )
    system, path = storage.filesystem(f"{artifact_uri}/{VECTORS_FILE}")
    with system.open_output_stream(path) as stream:

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in rows.to_batches(batch_size=BATCH_ROWS):
                stream.write(np.ascontiguousarray(batch["vector"].flatten().to_numpy(zero_copy_only=False)))
                yield batch

        reader = pa.RecordBatchReader.from_batches(rows.schema, batches())
        uri = f"{artifact_uri}/{TABLE_PATH}"
        lance.write_dataset(reader, uri, mode="create", storage_options=lance_options(uri))
    return num_rows, width


def forget_rows(artifact_uri: str) -> None:
    """Remove the pipeline's rows, which the table holds; their part files first, so that a rerun never trusts them."""
    for part in ("work/parts", ROWS_PATH):
        system, path = storage.filesystem(f"{artifact_uri}/{part}")
        system.delete_dir_contents(path, missing_dir_ok=True)


def open_lancedb(artifact_uri: str) -> Any:
    """The table as LanceDB opens it."""
    uri = f"{artifact_uri}/{DATABASE}"
    return lancedb.connect(uri, storage_options=lance_options(uri)).open_table(TABLE)


def open_rows(artifact_uri: str) -> lance.LanceDataset:
    """The table as a Lance dataset, whose rows are taken by their number."""
    return _lance(f"{artifact_uri}/{TABLE_PATH}")


class MappedVectors:
    """The vectors (N, E) float16, mapped into memory: processes of one machine share them, and no one reads all.

    From an object store they are copied into a temporary file first, which goes with this object.
    """

    def __init__(self, artifact_uri: str, num_rows: int, width: int) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        path = Path(f"{artifact_uri}/{VECTORS_FILE}".removeprefix("file://"))
        if storage.is_s3(artifact_uri):
            self._folder = tempfile.TemporaryDirectory(prefix="rsplatform-index-")
            path = Path(self._folder.name) / VECTORS_FILE
            _download(f"{artifact_uri}/{VECTORS_FILE}", path)
        expected = num_rows * width * 2
        if path.stat().st_size != expected:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, {num_rows} × {width} vectors take {expected}")
        # copy on write: Torch wants memory that it may write to, and nobody writes
        mapped = np.memmap(path, np.float16, "c", shape=(num_rows, width))
        if expected < psutil.virtual_memory().available * TOUCHED_FRACTION:
            # each page that is first met in a search costs 5 µs, four milliseconds for 700 rows
            mapped.reshape(-1)[:: mmap.PAGESIZE // 2].max()
        self.vectors_NE = torch.from_numpy(mapped)


def _lance(uri: str) -> lance.LanceDataset:
    return lance.dataset(uri, storage_options=lance_options(uri))


def _download(uri: str, path: Path) -> None:
    system, remote = storage.filesystem(uri)
    with system.open_input_stream(remote) as stream, path.open("wb") as file:
        while block := stream.read(2**24):
            file.write(block)
