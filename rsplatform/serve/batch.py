"""Front door `predict`: many instances in the form of POST /predict, or URIs of pictures, in; predictions out.

In: `.jsonl` files (one instance a line) and `.txt` files (one URI of a picture a line: below the data root, absolute,
or s3://), one file or a folder of them. Out: `predictions.lance`, a row per line that could be answered, and the same
as JSONL files, one a shard; what could not be answered is in the ledger with its reason. It fetches no web address.
"""

import io
import json
from collections.abc import Iterator
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, InputPath, ModelArtifact, StageConfig
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, Shard, replace_column, run_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.model.embedder import granted_device
from rsplatform.model.preprocess import ImageError, decode_image
from rsplatform.serve.api import MAX_IMAGE_CHARACTERS, image_bytes
from rsplatform.serve.predict import Instance, predictions
from rsplatform.stage import finished, open_stage

STAGE, TABLE = "predict", "predictions.lance"
MAX_LINE_BYTES = MAX_IMAGE_CHARACTERS + 64 * 1024
VALUES = pa.list_(pa.float32())
SCHEMA = pa.schema([("id", pa.string()), ("embedding", VALUES), ("scores", VALUES)])


class PredictConfig(StageConfig):
    """What is asked of which model. `rows_per_shard` is the unit of resuming and of the JSONL files that come out."""

    model: ModelArtifact
    instances: InputPath
    rows_per_shard: int = Field(default=256, ge=1)


def predict(config: PredictConfig, cluster: Cluster) -> Artifact:
    """Embed or score every line of JSONL files, or every picture of a list of URIs, with a model."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        pipeline, shards = predict_pipeline(config, cluster, stage.artifact)
        stage.counts = run_pipeline(pipeline, shards, cluster)
        write_jsonl(stage.artifact, config.rows_per_shard)
    return stage.artifact


def predict_pipeline(config: PredictConfig, cluster: Cluster, artifact: Artifact) -> tuple[Pipeline, list[Shard]]:
    """The pipeline and its shards: ranges of bytes of the files, whole lines each.

    Raises:
        ConfigError: no file of a known kind, or only empty ones.
    """
    place = cluster.resolve(config.instances).rstrip("/")
    found = _files(place)
    shards = [shard for uri in found for shard in _shards(uri, len(found), config.rows_per_shard)]
    if not shards:
        raise ConfigError(f"instances {config.instances}: no line in any .jsonl or .txt file there")
    device = granted_device(cluster.data.gpus_per_actor)
    predictor = Loaded(Predictor, (cluster, config.model, device))
    return Pipeline(STAGE, artifact, TABLE, SCHEMA, _read_lines, (predictor,)), shards


def write_jsonl(artifact: Artifact, rows_per_file: int) -> None:
    """The table as `predictions/00000.jsonl` and so on, in the closed product's form with the line's id."""
    uri = artifact.path(TABLE)
    table = lance.dataset(uri, storage_options=storage.lance_options(uri))
    for number, batch in enumerate(table.to_batches(batch_size=rows_per_file)):
        rows = [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_bytes(artifact.path(f"predictions/{number:05d}.jsonl"), lines.encode())


class Predictor:
    """Table operation: loads the model once, then answers one shard after the other."""

    def __init__(self, cluster: Cluster, model_ref: str, device: str) -> None:
        self._cluster = cluster
        self._embedder = load_embedder(cluster.root, model_ref, device)

    def __call__(self, lines: pa.Table) -> pa.Table:
        """The rows of `lines` with an embedding or scores, or a reason to drop them."""
        answers: list[dict[str, Any]] = [{} for _ in range(lines.num_rows)]
        drops: list[tuple[str | None, str | None]] = [(None, None)] * lines.num_rows
        asked: list[tuple[int, Instance, np.ndarray | None]] = []
        for index, (chip_id, line) in enumerate(zip(lines["id"].to_pylist(), lines["line"].to_pylist(), strict=True)):
            try:
                asked.append((index, *self._asked(chip_id, line)))
            except ImageError as error:
                drops[index] = (error.reason, error.detail)
            except (ValueError, OSError) as error:
                drops[index] = ("no_instance", _reason(error))
        instances = [instance for _, instance, _ in asked]
        images = [pixels for _, _, pixels in asked if pixels is not None]
        texts = [text for each in instances for text in ([each.text] if each.text else each.texts)]
        vectors = self._embedder.embed_images(images), self._embedder.embed_texts(texts)
        for (index, _, _), answer in zip(asked, predictions(instances, *vectors), strict=True):
            answers[index] = answer
        for name in ("embedding", "scores"):
            lines = replace_column(lines, name, pa.array([answer.get(name) for answer in answers], VALUES))
        for name, values in zip(("drop_reason", "drop_detail"), zip(*drops, strict=True), strict=True):
            lines = replace_column(lines, name, pa.array(values, pa.string()))
        return lines

    def _asked(self, uri: str, line: str) -> tuple[Instance, np.ndarray | None]:
        """One instance and its decoded picture; a line that is no JSON object is the URI of a picture."""
        if not line.lstrip().startswith("{"):
            if "://" in line and not storage.is_s3(line):
                raise ValueError(f"{line[:80]}: only files and s3:// are read, no web address")
            data = storage.read_bytes(self._cluster.resolve(line))
            return Instance.model_construct(image="", text=None, texts=[]), decode_image(data)
        instance = Instance.model_validate_json(line)
        return instance, None if instance.image is None else decode_image(image_bytes(instance.image))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(problem["msg"] for problem in error.errors()[:3])
    return str(error)[:300]


def _files(place: str) -> list[str]:
    if place.endswith((".jsonl", ".txt")):
        return [place]
    names = sorted(name for name in storage.list_files(place) if name.endswith((".jsonl", ".txt")))
    return [f"{place}/{name}" for name in names]


def _shards(uri: str, num_files: int, rows_per_shard: int) -> Iterator[Shard]:
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


def _read_lines(shard: Shard) -> pa.Table:
    """All lines of one shard; their ids are file name and line number, for a URI the URI itself."""
    system, path = storage.filesystem(shard["uri"])
    with system.open_input_file(path) as file:
        lines = file.read_at(shard["end"] - shard["start"], shard["start"]).splitlines()
    name = shard["uri"].rsplit("/", 1)[1]
    rows = [_row(f"{name}:{shard['first'] + number + 1}", line) for number, line in enumerate(lines)]
    return pa.Table.from_pylist(rows, schema=pa.schema([("id", pa.string()), ("line", pa.string()), *DROP_FIELDS]))


def _row(line_id: str, line: bytes) -> dict[str, Any]:
    text = line[:MAX_LINE_BYTES].decode(errors="replace").strip()
    is_uri = text and not text.startswith("{")
    return {"id": f"{line_id} {text[:300]}" if is_uri else line_id, "line": text}
