"""Front door `build_dataset`: captioned chips and web pairs in, one versioned table of samples out.

A dataset is row ids, captions, splits and weights over the tables that hold the pictures; no bytes are copied, and none
are decoded: `filter_web` and `ingest_scenes` already have.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import lance
import pyarrow as pa
from pydantic import Field, model_validator

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import CaptionsArtifact, ChipsArtifact, Config, ConfigError, InputArtifact, StageConfig, of_kind
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


class CaptionSource(Config):
    """Captions by sample id, as a captioner writes them. `weight`: how often a sample draws one of these, relative to
    its other kinds of caption; within a kind each caption is drawn alike (our default: 1)."""

    captions: CaptionsArtifact
    weight: float = Field(default=1.0, gt=0)


class Source(Config):
    """What all sources have. `name`: what mixtures call it. `weight` is per sample: 2.0 draws a sample twice as often
    as one of the other sources, where no mixture says otherwise (our defaults: the kind of the pictures, and 1).
    `holdout`: classes left out of this source beside those left out of all."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z][\w-]*$")  # no dots: sweeps call it by a dotted key
    weight: float = Field(default=1.0, gt=0)
    holdout: list[str] = []


class ChipSource(Source):
    """Chips with the captions that captioners wrote for them; a chip keeps the split of its scene."""

    type: Literal["chips"] = "chips"
    chips: ChipsArtifact
    captions: CaptionsArtifact | list[CaptionSource]

    @property
    def pictures(self) -> str:
        """The artifact that holds the pictures."""
        return self.chips

    @property
    def caption_sources(self) -> list[CaptionSource]:
        """All captions beside the pictures."""
        return self.captions if isinstance(self.captions, list) else [CaptionSource(captions=self.captions)]


class WebSource(Source):
    """Web pairs that passed the overhead filter, with the captions they came with, and maybe others written since.

    `own_caption_weight`: that of the captions they came with; 0 leaves them out.
    """

    type: Literal["web"] = "web"
    web_pairs: Annotated[InputArtifact, of_kind("web_pairs")]
    captions: list[CaptionSource] = []
    own_caption_weight: float = Field(default=1.0, ge=0)

    @property
    def pictures(self) -> str:
        """The artifact that holds the pictures."""
        return self.web_pairs

    @property
    def caption_sources(self) -> list[CaptionSource]:
        """All captions beside the pictures."""
        return self.captions


AnySource = Annotated[ChipSource | WebSource, Field(discriminator="type")]


class BuildDatasetConfig(StageConfig):
    """Sources of a training set, which a phase's mixture calls by their names.

    `holdout`: classes to leave out. A sample of any split goes to the ledger if a landmark in it is of such a kind or
    a caption names one (holdout.py); measure unseen classes on another dataset, made without it.
    """

    sources: list[AnySource] = Field(min_length=1)
    holdout: list[str] = []

    @model_validator(mode="after")
    def _classes_are_words(self) -> "BuildDatasetConfig":
        for classes in (self.holdout, *(source.holdout for source in self.sources)):
            Holdout(classes)
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "BuildDatasetConfig":
        repeated = [name for name, count in Counter(map(source_name, self.sources)).items() if count > 1]
        if repeated:
            raise ValueError(f"several sources are called {', '.join(repeated)}: give each a `name` of its own")
        return self


def source_name(source: ChipSource | WebSource) -> str:
    """What mixtures call a source: its name, else the kind of its pictures."""
    return source.name or source.pictures.split("/")[0]


def build_dataset(config: BuildDatasetConfig, cluster: Cluster) -> Artifact:
    """Join pictures and captions into one versioned training set of row ids.

    Raises:
        ConfigError: no sample is left, or a source names an artifact without its table.
    """
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        tables, drops, num_inputs = [], [], 0
        for source in config.sources:
            table, dropped = _samples(cluster.root, source, Holdout([*config.holdout, *source.holdout]))
            tables.append(table)
            drops += dropped
            num_inputs += table.num_rows + len(dropped)
        samples = _without_repeats(pa.concat_tables(tables), drops)
        if not samples.num_rows:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in Counter(d.reason for d in drops).items())
            raise ConfigError(
                f"sources: no sample is left of {num_inputs:,} pictures ({reasons}); "
                "give captions that were written for these pictures, or hold out fewer classes"
            )
        uri = stage.artifact.path(SAMPLES_TABLE)
        mode = "overwrite" if exists(uri) else "create"  # a killed run may have left one
        lance.write_dataset(samples, uri, mode=mode, storage_options=lance_options(uri))
        write_drops(stage.artifact, STAGE, "build", drops)
        stage.counts = counts(num_inputs, samples.num_rows, [drop.reason for drop in drops])
        _describe(stage, samples)
        of_sources = (name for source in config.sources for name in source.holdout)
        _describe_holdout(stage, list(dict.fromkeys([*config.holdout, *of_sources])), drops)
    return stage.artifact


def _samples(root: str, source: ChipSource | WebSource, holdout: Holdout) -> tuple[pa.Table, list[Drop]]:
    is_web = isinstance(source, WebSource)
    columns = ["id", "captions", "split"] if is_web else ["id", "split", "ground_sample_distance_m", "landmarks"]
    rows = open_table(root, source.pictures).to_table(columns=columns).to_pylist()
    written = [(other.weight, _captions_by_id(root, other.captions)) for other in source.caption_sources]
    own_weight = source.own_caption_weight if is_web else 0.0
    kept, drops = [], []
    for index, row in enumerate(rows):
        kinds = [(own_weight, row.get("captions") or []), *((w, by_id.get(row["id"], [])) for w, by_id in written)]
        weighted = _weighted(kinds)
        landmarks = [landmark["kind"] for landmark in row.get("landmarks") or []]
        held_out = holdout.reason(landmarks, [caption for _, captions in kinds for caption in captions])  # drawn or not
        if not weighted:
            drops.append(Drop(row["id"], "no_caption", f"row {index} of {source.pictures}"))
        elif held_out:
            drops.append(Drop(row["id"], HOLDOUT + held_out[0], held_out[1]))
        else:
            kept.append(_sample(row, source, index, weighted))
    return pa.Table.from_pylist(kept, schema=SAMPLE_SCHEMA), drops


def _captions_by_id(root: str, ref: str) -> dict[str, list[str]]:
    rows = open_table(root, ref, CAPTION_TABLE).to_table(columns=["id", "captions"]).to_pylist()
    return {row["id"]: row["captions"] for row in rows}


def _weighted(kinds: Iterable[tuple[float, list[str]]]) -> list[tuple[str, float]]:
    """(caption, weight) of a sample's kinds of caption: each kind's weight is divided among its captions."""
    return [(caption, weight / len(captions)) for weight, captions in kinds if weight > 0 for caption in captions]


def _sample(
    row: dict[str, Any], source: ChipSource | WebSource, index: int, weighted: list[tuple[str, float]]
) -> dict[str, Any]:
    return {
        "id": row["id"],
        "table": source.pictures,
        "row": index,
        "source": source_name(source),
        "captions": [caption for caption, _ in weighted],
        "caption_weights": [weight for _, weight in weighted],
        "split": row["split"],
        "weight": source.weight,
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
    return samples.take(pa.array(keep, pa.int64()))


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
