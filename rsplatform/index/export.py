"""Front door `export_index`: an index in, files that other programs read out.

`embeddings.parquet` is GeoParquet with a row a chip, its vector and the STAC `emb:` fields in the file's metadata;
`items.parquet` is stac-geoparquet with an Item a scene; `collection.json` is their STAC Collection. A scene without a
date has no Item, which needs one, but a ledger row. One pass over the table, a batch in memory at a time.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import IndexArtifact, StageConfig
from rsplatform.index.sources import SIDES
from rsplatform.index.stac import (
    BBOX,
    COLLECTION_FILE,
    EMBEDDINGS_FILE,
    ITEM_SCHEMA,
    ITEMS_FILE,
    TIME,
    SceneFacts,
    collection,
    geo_metadata,
    item,
)
from rsplatform.index.table import BATCH_ROWS, META, open_rows
from rsplatform.ledger import Drop, counts, write_drops
from rsplatform.stage import Stage, finished, open_stage

STAGE = "export_index"


class ExportIndexConfig(StageConfig):
    """`licence` is an SPDX identifier, or `proprietary` (STAC's word where none is chosen)."""

    index: IndexArtifact
    licence: str = Field(default="proprietary", min_length=1)


def export_index(config: ExportIndexConfig, cluster: Cluster) -> Artifact:
    """Write an index as GeoParquet, stac-geoparquet and a STAC Collection, for other programs."""
    done = finished(config, cluster)
    if done:
        return done
    source = open_artifact(cluster.root, config.index)
    with open_stage(config, cluster) as stage:
        scenes, tables = _write_embeddings(source, stage.artifact)
        document = _collection(config, source, scenes, tables)
        storage.write_json(stage.artifact.path(COLLECTION_FILE), document)
        _write_items(stage, source, document, scenes)
        stage.log({"chips": sum(facts.num_chips for facts in scenes.values()), "scenes": len(scenes)})
    return stage.artifact


def _write_embeddings(source: Artifact, target: Artifact) -> tuple[dict[str, SceneFacts], list[str]]:
    """The GeoParquet file; and the facts of each scene, and what the pictures lie in."""
    width = storage.read_json(source.path(META))["embedding_width"]
    fields = {"emb:type": "chip", "emb:dimensions": width, "data_type": "float32"}
    schema = _embeddings_schema(width).with_metadata(
        {"geo": json.dumps(geo_metadata(["Polygon"])), "emb": json.dumps(fields)}
    )
    scenes: dict[str, SceneFacts] = {}
    tables: set[str] = set()
    system, path = storage.filesystem(target.path(EMBEDDINGS_FILE))
    with system.open_output_stream(path) as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for batch in open_rows(source.uri).to_batches(batch_size=BATCH_ROWS):
            writer.write_batch(_embeddings(batch, schema))
            tables |= set(batch["table"].to_pylist())
            for scene, chips in _by_scene(batch):
                scenes[scene] = scenes.get(scene, SceneFacts()).with_chips(chips)
    return scenes, sorted(tables)


def _embeddings_schema(width: int) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.string()),
            ("geometry", pa.binary()),
            ("bbox", BBOX),
            ("datetime", TIME),
            ("scene", pa.string()),
            ("gsd", pa.float32()),
            ("caption", pa.string()),
            ("kinds", pa.list_(pa.string())),
            ("table", pa.string()),
            ("row", pa.int64()),
            ("file", pa.string()),
            ("model_hash", pa.string()),
            ("embedding", pa.list_(pa.float32(), width)),
        ]
    )


def _embeddings(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    width = schema.field("embedding").type.list_size
    sides = [batch[name].to_numpy(zero_copy_only=False) for name in SIDES]
    unknown = pa.array(np.isnan(sides[0]))
    vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    made = {
        "bbox": pa.StructArray.from_arrays([pa.array(side) for side in sides], fields=list(BBOX), mask=unknown),
        "gsd": batch["ground_sample_distance_m"],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors), width),
    }
    columns = [made.get(name, batch[name] if name in batch.schema.names else None) for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _by_scene(batch: pa.RecordBatch) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    rows = batch.select(["scene", "geometry", "datetime", "ground_sample_distance_m"]).to_pylist()
    for scene in dict.fromkeys(row["scene"] for row in rows):
        yield scene, [row for row in rows if row["scene"] == scene]


def _collection(
    config: ExportIndexConfig, source: Artifact, scenes: dict[str, SceneFacts], tables: list[str]
) -> dict[str, Any]:
    made_with = source.manifest()["config"].get("model", "")
    width = storage.read_json(source.path(META))["embedding_width"]
    links = [f"../../../{table}" if table.startswith("chips/") else table for table in tables]
    name = "-".join(config.index.split("/")[1:])
    return collection(name, scenes.values(), width, config.licence, f"../../../{made_with}", links)


def _write_items(stage: Stage, source: Artifact, document: dict[str, Any], scenes: dict[str, SceneFacts]) -> None:
    processed = source.manifest()["finished"]
    rows = [item(scene, facts, document["id"], processed) for scene, facts in scenes.items() if facts.first]
    undated = [
        Drop(scene, "no_datetime", "a STAC Item needs a date") for scene, facts in scenes.items() if not facts.first
    ]
    about = {"version": "1.1.0", "collections": {document["id"]: document}}
    schema = ITEM_SCHEMA.with_metadata(
        {"geo": json.dumps(geo_metadata(["Polygon"])), "stac-geoparquet": json.dumps(about)}
    )
    system, path = storage.filesystem(stage.artifact.path(ITEMS_FILE))
    with system.open_output_stream(path) as sink:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    write_drops(stage.artifact, STAGE, "scenes", undated)
    stage.counts = {"scenes": counts(len(scenes), len(rows), [drop.reason for drop in undated])}
