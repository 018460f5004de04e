"""Front door `import_model`: weights in the openMaMMUT / open_clip layout and a tokenizer in, a model artifact out.

What comes out is a model artifact like any other: `start_from` continues it, `evaluate` scores it, both in float32;
its own weights keep the file's dtype. Downloads nothing.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, InputPath, StageConfig
from rsplatform.model.embedder import Embedder
from rsplatform.model.openmammut import BESIDE, load_openmammut
from rsplatform.model.weights import save_model
from rsplatform.stage import finished, open_stage
from rsplatform.train.train_tokenizer import read_tokenizer


class ImportModelConfig(StageConfig):
    """`weights`: a .safetensors file, or a training checkpoint (.pt, .pth, .bin; read without unpickling objects).

    `tokenizer`: the tokenizer.json that the weights were trained with. `architecture`: {vision: {…}, text: {…}} in the
    layout's words, or what an open_clip config file holds; without it the file's metadata, then `<file stem>.json`,
    `open_clip_config.json` or `config.json` beside it, is read.
    """

    weights: InputPath
    tokenizer: InputPath
    architecture: dict[str, Any] | None = None


def import_model(config: ImportModelConfig, cluster: Cluster) -> Artifact:
    """Make a model artifact from openMaMMUT or open_clip weights.

    Raises:
        ConfigError: no such weights file.
        WeightsError: no config, one that does not fit the weights, or fewer tokens than the tokenizer has.
    """
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        with _local_file(cluster.resolve(config.weights)) as path:
            model, _ = load_openmammut(path, config.architecture)
        tokenizer = read_tokenizer(config.tokenizer, cluster)
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), model, tokenizer)
            storage.upload_folder(Path(folder), stage.artifact.path("model"))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        stage.log({"parameters": num_parameters, "vocab_size": model.config.text.vocab_size})
        stage.run.set_tags({"model_hash": Embedder(model.float(), tokenizer).model_hash})  # as what embeds has it
        stage.counts = {"inputs": 1, "kept": 1, "dropped": {}}
    return stage.artifact


@contextlib.contextmanager
def _local_file(uri: str) -> Iterator[Path]:
    """The weights as a local file, with the JSON files that may stand beside it."""
    if not storage.exists(uri):
        raise ConfigError(f"weights: {uri} does not exist; name a file in the openMaMMUT layout")
    if not storage.is_s3(uri):
        yield Path(uri.removeprefix("file://"))
        return
    parent, _, name = uri.rpartition("/")
    with tempfile.TemporaryDirectory() as folder:
        for wanted in dict.fromkeys((name, f"{Path(name).stem}.json", *BESIDE)):
            if storage.exists(f"{parent}/{wanted}"):
                (Path(folder) / wanted).write_bytes(storage.read_bytes(f"{parent}/{wanted}"))
        yield Path(folder) / name
