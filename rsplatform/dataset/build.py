"""Front door `build_dataset`: captioned chips and web pairs in, one versioned table of samples out.

A dataset is row ids, captions, splits and weights over the tables that hold the pictures; no bytes are copied.
"""

import logging
from collections import Counter
from typing import Annotated, Any, Literal

import lance
import pyarrow as pa
from pydantic import Field, model_validator

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, InputArtifact, StageConfig
from rsplatform.dataset.holdout import Holdout
from rsplatform.dataset.store import SAMPLES_TABLE, open_table
from rsplatform.ledger import Drop, counts, write_drops
from rsplatform.records import SAMPLE_SCHEMA
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.storage import exists, lance_options, write_json

STAGE = "build_dataset"
HOLDOUT = "holdout_"
CAPTION_TABLE = "captions.lance"

logger = logging.getLogger("rsplatform.dataset")


class ChipSource(Config):
    """Chips with the captions that a captioner wrote for them; a chip keeps the split of its scene."""

    type: Literal["chips"] = "chips"
    chips: InputArtifact
    captions: InputArtifact
    weight: float = Field(default=1.0, gt=0)


class WebSource(Config):
    """Web pairs that passed the overhead filter, with the captions they came with."""

    type: Literal["web"] = "web"
    web_pairs: InputArtifact
    weight: float = Field(default=1.0, gt=0)


class BuildDatasetConfig(StageConfig):
    """Sources of a training set. `weight` is per sample: 2.0 draws a sample twice as often (our default: 1).

    `holdout`: classes to leave out. A sample of any split goes to the ledger if a landmark in it is of such a kind or
    a caption names one (holdout.py); measure unseen classes on another dataset, made without it.
    """

    sources: list[Annotated[ChipSource | WebSource, Field(discriminator="type")]] = Field(min_length=1)
    holdout: list[str] = []

    @model_validator(mode="after")
    def _classes_are_words(self) -> "BuildDatasetConfig":
        Holdout(self.holdout)
        return self


def build_dataset(config: BuildDatasetConfig, cluster: Cluster) -> Artifact:
    """Join pictures and captions into one versioned training set of row ids."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        tables, drops, num_inputs = [], [], 0
        holdout = Holdout(config.holdout)
        for source in config.sources:
            table, dropped = _samples(cluster.root, source, holdout)
            tables.append(table)
            drops += dropped
            num_inputs += table.num_rows + len(dropped)
        samples = _without_repeats(pa.concat_tables(tables), drops)
        if not samples.num_rows:
            raise ValueError(f"{config.output}: no samples; every input was dropped, see the ledger")
        uri = stage.artifact.path(SAMPLES_TABLE)
        mode = "overwrite" if exists(uri) else "create"  # a killed run may have left one
        lance.write_dataset(samples, uri, mode=mode, storage_options=lance_options(uri))
        write_drops(stage.artifact, STAGE, "build", drops)
        stage.counts = counts(num_inputs, samples.num_rows, [drop.reason for drop in drops])
        _describe(stage, samples)
        _describe_holdout(stage, config.holdout, drops)
    return stage.artifact


def _samples(root: str, source: ChipSource | WebSource, holdout: Holdout) -> tuple[pa.Table, list[Drop]]:
    if isinstance(source, WebSource):
        ref = source.web_pairs
        rows = open_table(root, ref).to_table(columns=["id", "captions", "split"]).to_pylist()
    else:
        ref = source.chips
        columns = ["id", "split", "ground_sample_distance_m", "landmarks"]
        rows = open_table(root, ref).to_table(columns=columns).to_pylist()
        captions = open_table(root, source.captions, CAPTION_TABLE).to_table(columns=["id", "captions"]).to_pylist()
        by_id = {row["id"]: row["captions"] for row in captions}
        rows = [row | {"captions": by_id.get(row["id"], [])} for row in rows]
    kept, drops = [], []
    for index, row in enumerate(rows):
        kinds = [landmark["kind"] for landmark in row.get("landmarks") or []]
        held_out = holdout.reason(kinds, row["captions"])
        if not row["captions"]:
            drops.append(Drop(row["id"], "no_caption", f"row {index} of {ref}"))
        elif held_out:
            drops.append(Drop(row["id"], HOLDOUT + held_out[0], held_out[1]))
        else:
            kept.append(_sample(row, ref, index, source.weight))
    return pa.Table.from_pylist(kept, schema=SAMPLE_SCHEMA), drops


def _sample(row: dict[str, Any], ref: str, index: int, weight: float) -> dict[str, Any]:
    return {
        "id": row["id"],
        "table": ref,
        "row": index,
        "captions": row["captions"],
        "split": row["split"],
        "weight": weight,
        "ground_sample_distance_m": row.get("ground_sample_distance_m", float("nan")),
    }


def _without_repeats(samples: pa.Table, drops: list[Drop]) -> pa.Table:
    """The first sample of each id; a repeat goes to the ledger, so that no sample is drawn under two rows."""
    seen: set[str] = set()
    keep = []
    for index, sample_id in enumerate(samples["id"].to_pylist()):
        if sample_id in seen:
            drops.append(Drop(sample_id, "repeated_id", samples["table"][index].as_py()))
        else:
            seen.add(sample_id)
            keep.append(index)
    return samples.take(keep)


def _describe(stage: Stage, samples: pa.Table) -> None:
    """stats.json and metrics: samples per split and table, captions per sample, words per caption."""
    captions = [caption for group in samples["captions"].to_pylist() for caption in group]
    by_split = samples.group_by(["split", "table"]).aggregate([("id", "count")]).to_pylist()
    stats = {
        "samples": {f"{row['split']}/{row['table']}": row["id_count"] for row in by_split},
        "captions_per_sample": len(captions) / samples.num_rows,
        "words_per_caption": sum(len(caption.split()) for caption in captions) / len(captions),
        "distinct_caption_fraction": len(set(captions)) / len(captions),
    }
    write_json(stage.artifact.path("stats.json"), stats)
    stage.run.log_document(stats, "stats.json")
    numbers = {key: value for key, value in stats.items() if isinstance(value, float)}
    stage.log(numbers | _split_totals(samples))


def _describe_holdout(stage: Stage, classes: list[str], drops: list[Drop]) -> None:
    """How many samples each held-out class took; one that took none is most likely misspelt."""
    taken = Counter(drop.reason for drop in drops)
    for name in classes:
        stage.log({f"holdout/{name}": taken[HOLDOUT + name]})
        if not taken[HOLDOUT + name]:
            logger.warning("holdout: no sample names %r; check its spelling and the classes before it", name)


def _split_totals(samples: pa.Table) -> dict[str, float]:
    totals = samples.group_by("split").aggregate([("id", "count")]).to_pylist()
    return {f"samples_{row['split']}": float(row["id_count"]) for row in totals}
