"""Front door `train_tokenizer`: the captions of datasets in, a tokenizer artifact out; and how recipes name tokenizers.

A tokenizer is fixed with its checkpoints: runs that are to be compared or continued share one. Trains no model.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from pydantic import Field
from rich.console import Console

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import DatasetArtifact, StageConfig
from rsplatform.dataset.store import SampleStore
from rsplatform.model.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from rsplatform.model.weights import TOKENIZER_FILE
from rsplatform.stage import finished, open_stage

logger = logging.getLogger("rsplatform.train")
# Enough captions for a steady mean, few enough to cost nothing.
MEASURED_CAPTIONS = 10_000


class TrainTokenizerConfig(StageConfig):
    """Which captions, and how many tokens at most: special tokens, 256 bytes and learned pieces."""

    datasets: list[DatasetArtifact] = Field(min_length=1)
    split: str = "train"
    vocab_size: int = Field(ge=SMALLEST_VOCABULARY)


def train_tokenizer(config: TrainTokenizerConfig, cluster: Cluster) -> Artifact:
    """Learn a byte-level BPE vocabulary from the captions of datasets."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        stores = [SampleStore(cluster.root, dataset, config.split) for dataset in config.datasets]
        tokenizer, num_captions = learn(_captions(stores), config.vocab_size)
        storage.write_bytes(stage.artifact.path(TOKENIZER_FILE), tokenizer.to_json().encode())
        # read once more: together they may be larger than the driver's memory
        measured = list(islice(_captions(stores), 0, None, -(-num_captions // MEASURED_CAPTIONS)))
        words = sum(len(caption.split()) for caption in measured)
        tokens = sum(len(ids) for ids in tokenizer.token_ids(measured))
        lengths = {"tokens_per_caption": tokens / len(measured), "tokens_per_word": tokens / max(1, words)}
        stage.log(lengths | {"vocab_size": tokenizer.vocab_size})
        stage.counts = {"inputs": num_captions, "kept": num_captions, "dropped": {}}
    return stage.artifact


def _captions(stores: Sequence[SampleStore]) -> Iterator[str]:
    return chain.from_iterable(store.all_captions() for store in stores)


def learn(captions: Iterable[str], vocab_size: int) -> tuple[Tokenizer, int]:
    """A tokenizer of at most `vocab_size` tokens, and from how many captions; the same ones give the same one.

    They are taken one after the other and not held.
    """
    num_captions = 0

    def counted() -> Iterator[str]:
        nonlocal num_captions
        for caption in captions:
            num_captions += 1
            yield caption

    with Console(stderr=True).status(f"tokenizer: learning up to {vocab_size} tokens"):
        tokenizer = Tokenizer.train(counted(), vocab_size)
    logger.info("tokenizer: %d tokens from %d captions", tokenizer.vocab_size, num_captions)
    return tokenizer, num_captions


def read_tokenizer(path: str, cluster: Cluster) -> Tokenizer:
    """The tokenizer that a recipe names: a tokenizer.json, a folder with one, or artifact://tokenizer/NAME/VERSION.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no tokenizer that fits our models.
    """
    place = cluster.resolve(path).rstrip("/")
    file = place if place.endswith(".json") else f"{place}/{TOKENIZER_FILE}"
    if not storage.exists(file):
        raise FileNotFoundError(f"{file}: no tokenizer there; make one with jobs/train_tokenizer.py")
    return Tokenizer.from_json(storage.read_bytes(file).decode(), file)
