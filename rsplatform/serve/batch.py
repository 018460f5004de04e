"""Front door `predict`: many instances in the form of POST /predict, URIs of pictures, or chips in; predictions out.

In: `.jsonl` files (one instance a line) and `.txt` files (one URI of a picture a line: below the data root, absolute,
or s3://), one file or a folder of them; or a chips artifact. Out: `predictions.lance`, a row per line or chip that
could be answered, and the same as JSONL files, one a shard; what could not be answered is in the ledger with its
reason. It fetches no web address.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ChipsArtifact, ConfigError, InputPath, ModelArtifact, StageConfig
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, Shard, replace_column, run_pipeline
from rsplatform.dataset.store import open_table
from rsplatform.index.embed import load_embedder
from rsplatform.model.embedder import granted_device
from rsplatform.model.preprocess import ImageError, Square, read_square
from rsplatform.serve.api import MAX_IMAGE_CHARACTERS, MAX_TEXTS, Text, exactly_one, image_bytes
from rsplatform.serve.predict import Instance, predictions
from rsplatform.stage import finished, open_stage

STAGE, TABLE = "predict", "predictions.lance"
MAX_LINE_BYTES = MAX_IMAGE_CHARACTERS + 64 * 1024
VALUES = pa.list_(pa.float32())
SCHEMA = pa.schema([("id", pa.string()), ("embedding", VALUES), ("scores", VALUES)])
# A line of a file, or a chip's picture with the metres of its pixels.
QUESTIONS = pa.schema(
    [("id", pa.string()), ("line", pa.string()), ("image", pa.binary()), ("ground_sample_distance_m", pa.float32())]
)


class PredictConfig(StageConfig):
    """What is asked of which model: `instances` in files, or every picture of `chips`, which is embedded, or scored for
    each of `texts`. `rows_per_shard` is the unit of resuming and of the JSONL files that come out.
    """

    model: ModelArtifact
    instances: InputPath | None = None
    chips: ChipsArtifact | None = None
    texts: list[Text] = Field(default_factory=list, max_length=MAX_TEXTS)
    rows_per_shard: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "PredictConfig":
        exactly_one(self, ("instances", "chips"))
        if self.texts and not self.chips:
            raise ValueError("texts are for chips; a line of instances names its own")
        return self


def predict(config: PredictConfig, cluster: Cluster) -> Artifact:
    """Embed or score every line of JSONL files, every picture of a list of URIs, or every chip, with a model."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        pipeline, shards = predict_pipeline(config, cluster, stage.artifact)
        stage.counts = run_pipeline(pipeline, shards, cluster)
        write_jsonl(stage.artifact, config.rows_per_shard)
    return stage.artifact


def predict_pipeline(config: PredictConfig, cluster: Cluster, artifact: Artifact) -> tuple[Pipeline, list[Shard]]:
    """The pipeline and its shards: ranges of bytes of the files, whole lines each, or of rows of the chips.

    Raises:
        ConfigError: no file of a known kind, or only empty ones.
    """
    if config.chips:
        shards = list(_chip_shards(cluster.root, config.chips, config.rows_per_shard))
    else:
        found = _files(cluster.resolve(config.instances or "").rstrip("/"))
        shards = [shard for uri in found for shard in _file_shards(uri, config.rows_per_shard)]
    if not shards:
        raise ConfigError(f"instances {config.instances}: no line in any .jsonl or .txt file there")
    device = granted_device(cluster.data.gpus_per_actor)
    predictor = Loaded(Predictor, (cluster, config.model, device, config.texts))
    return Pipeline(STAGE, artifact, TABLE, SCHEMA, ReadQuestions(cluster.root), (predictor,)), shards


def write_jsonl(artifact: Artifact, rows_per_file: int) -> None:
    """The table as `predictions/00000.jsonl` and so on, in the closed product's form with the line's id."""
    uri = artifact.path(TABLE)
    table = lance.dataset(uri, storage_options=storage.lance_options(uri))
    for number, batch in enumerate(table.to_batches(batch_size=rows_per_file)):
        rows = [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_bytes(artifact.path(f"predictions/{number:05d}.jsonl"), lines.encode())


class Predictor:
    """Table operation: loads the model once, then answers one shard after the other; `texts` are asked of chips."""

    def __init__(self, cluster: Cluster, model_ref: str, device: str = "cpu", texts: list[str] | None = None) -> None:
        self._cluster = cluster
        self._texts = texts or []
        self._embedder = load_embedder(cluster.root, model_ref, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with an embedding or scores, or a reason to drop them."""
        answers: list[dict[str, Any]] = [{} for _ in range(rows.num_rows)]
        drops: list[tuple[str | None, str | None]] = [(None, None)] * rows.num_rows
        asked: list[tuple[int, Instance, Square | None]] = []
        for index, row in enumerate(rows.select(QUESTIONS.names).to_pylist()):
            try:
                asked.append((index, *self._asked(row)))
            except ImageError as error:
                drops[index] = (error.reason, error.detail)
            except (ValueError, OSError) as error:
                drops[index] = ("no_instance", _reason(error))
        instances = [instance for _, instance, _ in asked]
        images_IE = self._embed_images([seen for _, _, seen in asked if seen])
        dealt = predictions(instances, images_IE, self._vector_of_text(instances))
        for (index, _, _), answer in zip(asked, dealt, strict=True):
            answers[index] = answer
        for name in ("embedding", "scores"):
            rows = replace_column(rows, name, pa.array([answer.get(name) for answer in answers], VALUES))
        for name, values in zip(("drop_reason", "drop_detail"), zip(*drops, strict=True), strict=True):
            rows = replace_column(rows, name, pa.array(values, pa.string()))
        return rows

    def _asked(self, row: dict[str, Any]) -> tuple[Instance, Square | None]:
        """One instance and its picture; a line that is no JSON object is the URI of a picture."""
        size, line = self._embedder.image_size, row["line"]
        if row["image"] is not None:
            picture = read_square(row["image"], size, row["ground_sample_distance_m"])
            return _about_a_picture(self._texts), picture
        if not line.startswith("{"):
            if "://" in line and not storage.is_s3(line):
                raise ValueError(f"{line[:80]}: only files and s3:// are read, no web address")
            return _about_a_picture([]), read_square(storage.read_bytes(self._cluster.resolve(line)), size)
        instance = Instance.model_validate_json(line)
        return instance, None if instance.image is None else read_square(image_bytes(instance.image), size)

    def _embed_images(self, seen: list[Square]) -> np.ndarray:
        return self._embedder.embed_images(
            [each.pixels_HWC for each in seen], [each.ground_sample_distance_m for each in seen]
        )

    def _vector_of_text(self, instances: list[Instance]) -> dict[str, np.ndarray]:
        """Each text goes through the model once."""
        texts = list(dict.fromkeys(text for each in instances for text in each.all_texts()))
        return dict(zip(texts, self._embedder.embed_texts(texts), strict=True))


def _about_a_picture(texts: list[str]) -> Instance:
    return Instance.model_construct(image="", text=None, texts=texts)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(problem["msg"] for problem in error.errors()[:3])
    return str(error)[:300]


def _files(place: str) -> list[str]:
    if place.endswith((".jsonl", ".txt")):
        return [place]
    names = sorted(name for name in storage.list_files(place) if name.endswith((".jsonl", ".txt")))
    return [f"{place}/{name}" for name in names]


def _file_shards(uri: str, rows_per_shard: int) -> Iterator[Shard]:
    """Ranges of whole lines; one pass over the file, which holds one line at a time."""
    system, path = storage.filesystem(uri)
    with system.open_input_stream(path) as stream:
        lines = io.BufferedReader(cast(Any, stream))  # Arrow's files lack only the name of the type
        start = end = first = number = 0
        for line in lines:
            number, end = number + 1, end + len(line)
            if number - first == rows_per_shard:
                yield _shard(uri, first, start, end)
                start, first = end, number
        if end > start:
            yield _shard(uri, first, start, end)


def _shard(uri: str, first: int, start: int, end: int) -> Shard:
    name = "".join(letter if letter.isalnum() else "_" for letter in uri.rsplit("/", 1)[1])
    return {"shard": f"{name}_{first:09d}", "uri": uri, "first": first, "start": start, "end": end}


def _chip_shards(root: str, chips_ref: str, rows_per_shard: int) -> Iterator[Shard]:
    num_rows = open_table(root, chips_ref).count_rows()
    for start in range(0, num_rows, rows_per_shard):
        number = min(rows_per_shard, num_rows - start)
        yield {"shard": f"chips-{start:012d}", "chips": chips_ref, "start": start, "rows": number}


@dataclass(frozen=True)
class ReadQuestions:
    """Reads the rows of a shard, with the columns of QUESTIONS and DROP_FIELDS."""

    root: str

    def __call__(self, shard: Shard) -> pa.Table:
        if "chips" not in shard:
            return _read_lines(shard)
        columns = ["id", "image", "ground_sample_distance_m"]
        chips = open_table(self.root, shard["chips"]).to_table(columns, offset=shard["start"], limit=shard["rows"])
        return pa.Table.from_pylist(chips.to_pylist(), schema=pa.schema([*QUESTIONS, *DROP_FIELDS]))


def _read_lines(shard: Shard) -> pa.Table:
    """All lines of one shard; their ids are file name and line number, for a URI the URI itself."""
    system, path = storage.filesystem(shard["uri"])
    with system.open_input_file(path) as file:
        lines = file.read_at(shard["end"] - shard["start"], shard["start"]).splitlines()
    name = shard["uri"].rsplit("/", 1)[1]
    rows = [_row(f"{name}:{shard['first'] + number + 1}", line) for number, line in enumerate(lines)]
    return pa.Table.from_pylist(rows, schema=pa.schema([*QUESTIONS, *DROP_FIELDS]))


def _row(line_id: str, line: bytes) -> dict[str, Any]:
    text = line[:MAX_LINE_BYTES].decode(errors="replace").strip()
    is_uri = text and not text.startswith("{")
    return {"id": f"{line_id} {text[:300]}" if is_uri else line_id, "line": text}
