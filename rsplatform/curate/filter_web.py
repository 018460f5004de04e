"""Front door `filter_web`: web pairs in, the overhead ones with usable captions out (`web_pairs.lance`), drops beside.

Shards decide what a row alone can decide: readable, not an evaluation or training picture, text rules, overhead score.
What needs all rows, duplicates and repeated texts, is deleted from the committed table, whose bytes are written once.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import InputArtifact, StageConfig, of_kind
from rsplatform.curate.contact_sheet import (
    LabelledPicture,
    dropped_pictures,
    keep_dropped_pictures,
    log_contact_sheets,
    spread,
)
from rsplatform.curate.overhead_model import IMAGE_SIZE_PX, OverheadScorer, prepare
from rsplatform.curate.picture_hash import NearIndex, content_hash, difference_hash
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, Shard, replace_column, run_pipeline
from rsplatform.curate.text_rules import TextRejected, clean_text
from rsplatform.ledger import Drop, counts, read_drops, write_drops
from rsplatform.model.preprocess import ImageError, decode_image
from rsplatform.records import WEB_PAIR_SCHEMA
from rsplatform.sources.web import Candidate, CandidateSource, all_candidates, count_candidates, read_candidates
from rsplatform.stage import Artifact, Stage, finished, open_stage

STAGE, EVALUATION_STAGE = "filter_web", "evaluation_images"
TABLE = "web_pairs.lance"
EVALUATION_HASHES = "work/evaluation_hashes.json"
SHARD_CANDIDATES = 256
VALIDATION_SEED = "validation"


class FilterWebConfig(StageConfig):
    """Candidates, the classifier that judges them, and what they must not repeat.

    Without `overhead` pictures of every view are kept, which is what a first phase on web pairs of all kinds wants.
    `evaluation_images`: no candidate may be a copy of one of these. `max_text_repeats`: how many rows may carry the
    same caption. `validation_fraction`: the share of rows whose split is val, drawn by their id alone. (The numbers are
    our defaults.)
    """

    candidates: list[CandidateSource] = Field(min_length=1)
    overhead: Annotated[InputArtifact, of_kind("overhead")] | None = None
    evaluation_images: list[CandidateSource] = Field(default_factory=list)
    max_text_repeats: int = Field(default=20, ge=1)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)


def filter_web(config: FilterWebConfig, cluster: Cluster) -> Artifact:
    """Keep the overhead pictures among web pairs, with a reason for every drop."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        evaluation_counts = store_evaluation_hashes(config, cluster, stage.artifact)
        shards = make_shards(config, cluster)
        run_pipeline(make_pipeline(config, cluster, stage.artifact), shards, cluster)
        repeats = drop_repeats(stage.artifact, config.max_text_repeats)
        write_drops(stage.artifact, STAGE, "repeats", repeats)
        table = _open(stage.artifact)
        num_inputs = sum(shard["stop"] - shard["start"] for shard in shards)
        drops = read_drops(stage.artifact).filter(pc.field("stage") == STAGE)
        stage.counts = counts(num_inputs, table.count_rows(), drops["reason"].to_pylist())
        stage.counts["evaluation_images"] = evaluation_counts
        stage.log({"web_pairs": table.count_rows(), "kept_fraction": table.count_rows() / num_inputs})
        _log_pictures(stage)
    return stage.artifact


def make_shards(config: FilterWebConfig, cluster: Cluster) -> list[Shard]:
    """Runs of at most SHARD_CANDIDATES candidates of one source."""
    shards = []
    for number, source in enumerate(config.candidates):
        total = count_candidates(source, cluster.resolve)
        for start in range(0, total, SHARD_CANDIDATES):
            stop = min(start + SHARD_CANDIDATES, total)
            shards.append({"shard": f"{number:03d}-{start:08d}", "source": number, "start": start, "stop": stop})
    return shards


def make_pipeline(config: FilterWebConfig, cluster: Cluster, artifact: Artifact) -> Pipeline:
    """Read and check as tasks, score in actors that hold the classifier, if there is one."""
    read = ReadCandidates(config, cluster, artifact.path(EVALUATION_HASHES))
    if config.overhead is None:
        return Pipeline(STAGE, artifact, TABLE, _table_schema(), read, (leave_unscored,))
    overhead_uri = open_artifact(cluster.root, config.overhead).uri
    return Pipeline(STAGE, artifact, TABLE, _table_schema(), read, (Loaded(ScoreOverhead, (overhead_uri,)),))


def _table_schema() -> pa.Schema:
    return pa.schema([*WEB_PAIR_SCHEMA, ("content_sha256", pa.string()), ("difference_hash", pa.binary())])


@dataclass(frozen=True)
class ReadCandidates:
    """Reads a shard, decodes its pictures once, and applies the rules that need no model."""

    config: FilterWebConfig
    cluster: Cluster
    evaluation_uri: str

    def __call__(self, shard: Shard) -> pa.Table:
        source = self.config.candidates[shard["source"]]
        content, near = _load_hashes(self.evaluation_uri)
        found = read_candidates(source, self.cluster.resolve, shard["start"], shard["stop"])
        rows = [self._row(candidate, content, near) | {"source": source.type} for candidate in found]
        schema = pa.schema([*_table_schema(), *DROP_FIELDS, ("crop", pa.binary())])
        return pa.Table.from_pylist(rows, schema=schema)

    def _row(self, candidate: Candidate, content: frozenset[str], near: NearIndex) -> dict[str, Any]:
        row: dict[str, Any] = {"id": candidate.id, "image": candidate.image, "captions": []}
        row["split"] = "val" if is_validation(candidate.id, self.config.validation_fraction) else "train"
        try:
            if candidate.problem or candidate.image is None:
                raise ImageError(candidate.problem or "no_image", "")
            image_HWC = decode_image(candidate.image)
            row |= {"content_sha256": content_hash(image_HWC), "difference_hash": difference_hash(image_HWC)}
            row["crop"] = prepare(image_HWC).tobytes()
            copied = near.find(row["difference_hash"])
            if row["content_sha256"] in content or copied:
                raise ImageError("evaluation_image", f"copy of {copied or 'an evaluation image'}")
            row["captions"] = clean_captions(candidate.texts)
        except (ImageError, TextRejected) as error:
            row |= {"drop_reason": error.reason, "drop_detail": error.detail}
        return row


def is_validation(candidate_id: str, fraction: float) -> bool:
    """Whether a row belongs to split val: by a hash of its id, so neither order nor shards nor neighbours matter."""
    digest = hashlib.sha256(f"{VALIDATION_SEED}/{candidate_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def clean_captions(texts: tuple[str, ...]) -> list[str]:
    """The usable texts of a candidate, each once.

    Raises:
        TextRejected: none is usable; with the reason of the first.
    """
    captions, first = [], TextRejected("no_text", "no text at all")
    for number, text in enumerate(texts):
        try:
            captions.append(clean_text(text))
        except TextRejected as error:
            first = error if number == 0 else first
    if not captions:
        raise first
    return list(dict.fromkeys(captions))


class ScoreOverhead:
    """Adds the overhead score; drops what is below the threshold and what the classifier was trained on."""

    def __init__(self, overhead_uri: str):
        self._scorer = OverheadScorer(overhead_uri)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.select(["crop", "content_sha256", "drop_reason", "drop_detail"]).to_pylist()
        undecided = [index for index, row in enumerate(rows) if row["drop_reason"] is None]
        shape = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
        found = self._scorer.score([np.frombuffer(rows[index]["crop"], np.uint8).reshape(shape) for index in undecided])
        scores: list[float | None] = [None] * len(rows)
        for index, score in zip(undecided, found, strict=True):
            scores[index] = float(score)
            if rows[index]["content_sha256"] in self._scorer.training_hashes:
                rows[index] |= {"drop_reason": "training_picture", "drop_detail": "the classifier was trained on it"}
            elif score < self._scorer.threshold:
                detail = f"score {score:.3f} < {self._scorer.threshold:.3f}"
                rows[index] |= {"drop_reason": "not_overhead", "drop_detail": detail}
        for name in ("drop_reason", "drop_detail"):
            table = replace_column(table, name, pa.array([row[name] for row in rows], pa.string()))
        return replace_column(table, "overhead_score", pa.array(scores, pa.float32()))


def leave_unscored(table: pa.Table) -> pa.Table:
    """No classifier judges the pictures: their overhead score is null."""
    return replace_column(table, "overhead_score", pa.nulls(table.num_rows, pa.float32()))


def drop_repeats(artifact: Artifact, max_text_repeats: int) -> list[Drop]:
    """Delete later copies of a picture, and rows all of whose captions were already seen too often; first row wins."""
    table = _open(artifact)
    near, first_of, texts = NearIndex(), dict[str, str](), Counter[str]()
    drops, gone = [], []
    columns = ["id", "captions", "content_sha256", "difference_hash"]
    rows = table.to_table(columns=columns, with_row_id=True).to_pylist()
    for row in track(rows, description="find repeats", transient=True):
        same, similar = first_of.get(row["content_sha256"]), near.find(row["difference_hash"])
        if same or similar:
            drops.append(Drop(row["id"], "duplicate" if same else "near_duplicate", f"of {same or similar}"))
            gone.append(row["_rowid"])
            continue
        if all(texts[caption] >= max_text_repeats for caption in row["captions"]):
            drops.append(Drop(row["id"], "repeated_text", repr(row["captions"][0][:60])))
            gone.append(row["_rowid"])
            continue
        first_of[row["content_sha256"]] = row["id"]
        near.add(row["id"], row["difference_hash"])
        texts.update(row["captions"])
    _keep_pictures(artifact, table, gone, drops)
    # by row id: two rows of a careless table may share an id, and only one of them is to go
    for start in range(0, len(gone), 500):
        table.delete(f"_rowid IN ({', '.join(map(str, gone[start : start + 500]))})")
    return drops


def _keep_pictures(artifact: Artifact, table: lance.LanceDataset, row_ids: list[int], drops: list[Drop]) -> None:
    """Set some pictures aside before their rows are deleted."""
    reason_of = {row_ids[index]: drops[index].reason for index in spread(len(row_ids))}
    if reason_of:
        chosen = f"_rowid IN ({', '.join(map(str, reason_of))})"
        images = table.to_table(columns=["image"], filter=chosen, with_row_id=True)
        reasons = pa.array([reason_of[row_id] for row_id in images["_rowid"].to_pylist()], pa.string())
        keep_dropped_pictures(artifact, "repeats", images.append_column("drop_reason", reasons))


def _open(artifact: Artifact) -> lance.LanceDataset:
    uri = artifact.path(TABLE)
    return lance.dataset(uri, storage_options=storage.lance_options(uri))


def store_evaluation_hashes(config: FilterWebConfig, cluster: Cluster, artifact: Artifact) -> dict[str, Any]:
    """Hashes of every evaluation picture, for the workers; the funnel of these pictures.

    One that cannot be decoded protects nothing: it goes to the ledger under stage `evaluation_images`.
    """
    hashes, drops = [], []
    for source in config.evaluation_images:
        for candidate in all_candidates(source, cluster.resolve, "hash evaluation images"):
            try:
                if candidate.problem or candidate.image is None:
                    raise ImageError(candidate.problem or "no_image", "")
                image_HWC = decode_image(candidate.image)
            except ImageError as error:
                drops.append(Drop(candidate.id, error.reason, error.detail))
                continue
            hashes.append([candidate.id, content_hash(image_HWC), difference_hash(image_HWC).hex()])
    storage.write_json(artifact.path(EVALUATION_HASHES), hashes)
    write_drops(artifact, EVALUATION_STAGE, EVALUATION_STAGE, drops)
    return counts(len(hashes) + len(drops), len(hashes), [drop.reason for drop in drops])


def _load_hashes(uri: str) -> tuple[frozenset[str], NearIndex]:
    near = NearIndex()
    hashes = storage.read_json(uri)
    for name, _, difference in hashes:
        near.add(name, bytes.fromhex(difference))
    return frozenset(content for _, content, _ in hashes), near


def _log_pictures(stage: Stage) -> None:
    """Contact sheets of kept pairs with their first caption, and of dropped ones with the reason."""
    table = _open(stage.artifact)
    rows = table.take(spread(table.count_rows()), columns=["image", "captions"]).to_pylist()
    kept: list[LabelledPicture] = [(row["image"], row["captions"][0]) for row in rows]
    log_contact_sheets(stage.run, kept, dropped_pictures(stage.artifact))
