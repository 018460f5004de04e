"""Front door `build_index`: chips, their captions and a model in, a searchable LanceDB table out.

Embedding runs in an actor pool on Ray Data, shard by shard; pictures stay where they are, rows point to them.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import InputArtifact, StageConfig
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, run_pipeline
from rsplatform.dataset.store import open_table
from rsplatform.index.embed import CHIP_COLUMNS, ChipEmbedder, load_embedder
from rsplatform.index.store import EXACT_BELOW_ROWS, TABLE_PATH, finish_index, index_schema
from rsplatform.model.embedder import granted_device
from rsplatform.stage import finished, open_stage

STAGE = "build_index"


class BuildIndexConfig(StageConfig):
    """What is indexed with which model. `captions` only adds text to the results.

    `rows_per_shard` is the unit of resuming; from `exact_below_rows` chips on, vectors get an IVF-PQ index.
    """

    model: InputArtifact
    chips: InputArtifact
    captions: InputArtifact | None = None
    rows_per_shard: int = Field(default=512, ge=1)
    exact_below_rows: int = Field(default=EXACT_BELOW_ROWS, ge=256)


def build_index(config: BuildIndexConfig, cluster: Cluster) -> Artifact:
    """Embed all chips with a model and make them searchable by place, date, scale and kind."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        device = granted_device(cluster.data.gpus_per_actor)
        pipeline, shards = index_pipeline(config, cluster.root, stage.artifact, device)
        stage.counts = run_pipeline(pipeline, shards, cluster)
        model_hash = load_embedder(cluster.root, config.model).model_hash
        meta = finish_index(stage.artifact.uri, model_hash, config.exact_below_rows)
        recall = {} if meta.recall_at_10 is None else {"index_recall_at_10": meta.recall_at_10}
        stage.log({"chips_indexed": float(meta.num_rows), "embedding_width": float(meta.embedding_width)} | recall)
    return stage.artifact


def index_pipeline(
    config: BuildIndexConfig, root: str, artifact: Artifact, device: str = "cpu"
) -> tuple[Pipeline, list[dict[str, Any]]]:
    """The pipeline that fills the table, embedding on `device`, and its shards: ranges of rows of the chips table."""
    width = load_embedder(root, config.model).embedding_width
    pipeline = Pipeline(
        stage=STAGE,
        artifact=artifact,
        table=TABLE_PATH,
        schema=index_schema(width),
        read=_ReadChips(root, config.chips),
        operations=(Loaded(ChipEmbedder, (root, config.model, config.captions, device)),),
    )
    return pipeline, _shards(open_table(root, config.chips).count_rows(), config.rows_per_shard)


def _shards(num_rows: int, rows_per_shard: int) -> list[dict[str, Any]]:
    starts = range(0, num_rows, rows_per_shard)
    return [
        {"shard": f"{start:012d}", "start": start, "rows": min(rows_per_shard, num_rows - start)} for start in starts
    ]


@dataclass(frozen=True)
class _ReadChips:
    """Reads one range of rows of the chips table; numbers them, so that the index can point back."""

    root: str
    chips_ref: str

    def __call__(self, shard: dict[str, Any]) -> pa.Table:
        start, rows = shard["start"], shard["rows"]
        chips = open_table(self.root, self.chips_ref).to_table(columns=CHIP_COLUMNS, offset=start, limit=rows)
        chips = chips.append_column("row", pa.array(range(start, start + rows), pa.int64()))
        for field in DROP_FIELDS:
            chips = chips.append_column(field, pa.nulls(rows, field.type))
        return chips
