"""The ledger: every rejected input with its stage, reason and detail, as small Parquet files beside the rows.

inputs = kept + dropped, by reason, is checked here before an artifact may be committed.
"""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsplatform import storage
from rsplatform.artifacts import Artifact

LEDGER_SCHEMA = pa.schema(
    [("id", pa.string()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
FOLDER = "ledger"


@dataclass(frozen=True)
class Drop:
    """One rejected input: which, why in one word, and what exactly was seen."""

    id: str
    reason: str
    detail: str = ""


def write_drops(artifact: Artifact, stage: str, part: str, drops: Iterable[Drop]) -> None:
    """Write the drops of one part; the same part written twice replaces itself (idempotent)."""
    rows = [{"id": drop.id, "stage": stage, "reason": drop.reason, "detail": drop.detail} for drop in drops]
    uri = artifact.path(f"{FOLDER}/{part}.parquet")
    if rows or storage.exists(uri):  # a part done again without drops replaces what it dropped before
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), buffer)
        storage.write_bytes(uri, buffer.getvalue())


def forget_parts(artifact: Artifact, folder: str, kept: Iterable[str]) -> None:
    """Remove the parts below `folder` that are not among `kept`: nobody's drops any more."""
    storage.delete_others(artifact.path(f"{FOLDER}/{folder}"), {f"{part}.parquet" for part in kept})


def read_drops(artifact: Artifact) -> pa.Table:
    """All drops of an artifact (columns id, stage, reason, detail)."""
    tables = [
        pq.read_table(io.BytesIO(storage.read_bytes(artifact.path(f"{FOLDER}/{name}"))))
        for name in storage.list_files(artifact.path(FOLDER))
    ]
    return pa.concat_tables(tables) if tables else LEDGER_SCHEMA.empty_table()


def counts(num_inputs: int, num_kept: int, reasons: Iterable[str]) -> dict[str, Any]:
    """The funnel of a stage; ValueError if inputs ≠ kept + dropped, so that nothing can be lost silently."""
    dropped = dict(sorted(Counter(reasons).items()))
    if num_inputs != num_kept + sum(dropped.values()):
        raise ValueError(f"inputs {num_inputs} ≠ kept {num_kept} + dropped {dropped}: a row was lost or doubled")
    return {"inputs": num_inputs, "kept": num_kept, "dropped": dropped}
