"""Front door `caption`: chips in, a small table of captions keyed by chip id out; no picture is copied.

The template captioner writes from the landmarks alone (template_captions.py). A captioner that looks at the pixels
is the next member of the union.
"""

from dataclasses import dataclass
from typing import Any, Literal

import lance
import pyarrow as pa
from pydantic import Field

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ChipsArtifact, Config, StageConfig
from rsplatform.curate.pipeline import DROP_FIELDS, Pipeline, Shard, run_pipeline
from rsplatform.curate.template_captions import claims, write_captions
from rsplatform.records import CAPTION_SCHEMA
from rsplatform.stage import finished, open_stage

STAGE = "caption"
CHIPS_TABLE, CAPTIONS_TABLE = "chips.lance", "captions.lance"


class TemplateCaptioner(Config):
    """Sentences from kinds, counts, sizes and positions of the landmarks."""

    type: Literal["template"] = "template"
    num_captions: int = Field(default=6, ge=1, le=20)


class CaptionConfig(StageConfig):
    """Which chips are described, and by what."""

    chips: ChipsArtifact
    captioner: TemplateCaptioner = TemplateCaptioner()
    rows_per_shard: int = Field(default=2048, ge=1)


def caption(config: CaptionConfig, cluster: Cluster) -> Artifact:
    """Describe every chip in sentences that its landmarks support."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        stage.counts = run_pipeline(*caption_pipeline(config, cluster.root, stage.artifact), cluster)
        examples = _table(stage.artifact.path(CAPTIONS_TABLE)).to_table(limit=20).to_pylist()
        stage.run.log_document({row["id"]: row["captions"] for row in examples}, "examples.json")
    return stage.artifact


def caption_pipeline(config: CaptionConfig, root: str, artifact: Artifact) -> tuple[Pipeline, list[Shard]]:
    """The pipeline and its shards: ranges of rows of the chips table."""
    uri = open_artifact(root, config.chips).path(CHIPS_TABLE)
    num_rows, step = _table(uri).count_rows(), config.rows_per_shard
    shards: list[Shard] = [
        {"shard": f"rows_{start:09d}", "start": start, "rows": min(step, num_rows - start)}
        for start in range(0, num_rows, step)
    ]
    read = ReadAndDescribe(uri, config.captioner)
    return Pipeline(STAGE, artifact, CAPTIONS_TABLE, CAPTION_SCHEMA, read), shards


@dataclass(frozen=True)
class ReadAndDescribe:
    """Reads the landmarks of a range of chips and describes them; a chip that shows none is dropped."""

    chips_uri: str
    captioner: TemplateCaptioner

    def __call__(self, shard: Shard) -> pa.Table:
        table = _table(self.chips_uri)
        rows = table.to_table(columns=["id", "landmarks"], limit=shard["rows"], offset=shard["start"]).to_pylist()
        schema = pa.schema([*CAPTION_SCHEMA, *DROP_FIELDS])
        return pa.Table.from_pylist([self._row(row) for row in rows], schema=schema)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if not row["landmarks"]:
            return {"id": row["id"], "drop_reason": "no_landmark", "drop_detail": "nothing to describe"}
        captions = write_captions(row["id"], row["landmarks"], self.captioner.num_captions)
        described = {"id": row["id"], "captions": captions, "claims": claims(row["landmarks"])}
        return described | {"captioner": self.captioner.type}


def _table(uri: str) -> lance.LanceDataset:
    return lance.dataset(uri, storage_options=storage.lance_options(uri))
