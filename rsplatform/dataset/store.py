"""Reading a dataset: sample rows from `samples.lance`, image bytes from the tables they point into.

Both are read by row when a batch wants them (Lance `take`); nothing is copied, and no caption is held. No decoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from rsplatform.artifacts import ArtifactError, open_artifact
from rsplatform.config import ConfigError
from rsplatform.records import SAMPLE_SCHEMA
from rsplatform.storage import exists, lance_options

SAMPLES_TABLE = "samples.lance"
# Which Lance table inside an artifact of a kind holds the pictures.
IMAGE_TABLES = {"chips": "chips.lance", "web_pairs": "web_pairs.lance"}
READ_COLUMNS = ["id", "table", "row", "captions", "caption_weights", "ground_sample_distance_m"]


@dataclass(frozen=True)
class Sample:
    """One picture with its captions, still encoded; GSD in metres, NaN where unknown.

    `caption_weights`: how often each caption is drawn, relative to the others of the sample; empty: evenly.
    """

    id: str
    image: bytes
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...]
    ground_sample_distance_m: float


@dataclass(frozen=True)
class Origins:
    """Where each of N samples comes from: `names` of the dataset's sources, for each sample its source (int16, an
    index into the names) and its own weight (float32)."""

    names: tuple[str, ...]
    source_N: np.ndarray
    weight_N: np.ndarray


def open_table(root: str, ref: str, table: str | None = None) -> lance.LanceDataset:
    """The Lance table of a finished artifact (the image table of its kind unless `table` is named).

    Raises:
        ArtifactError: the artifact is missing or unfinished.
        ConfigError: the kind holds no pictures and no table is named, or the artifact holds no such table.
    """
    artifact = open_artifact(root, ref)
    kind = ref.split("/")[0]
    if table is None and kind not in IMAGE_TABLES:
        raise ConfigError(f"{ref}: artifacts of kind {kind!r} hold no pictures; use one of {sorted(IMAGE_TABLES)}")
    uri = artifact.path(table or IMAGE_TABLES[kind])
    if not exists(uri):
        wanted = (table or IMAGE_TABLES[kind]).removesuffix(".lance")
        raise ConfigError(f"{ref} holds no {wanted} (no {uri}); name an artifact that does, such as {wanted}/NAME/v1")
    return lance.dataset(uri, storage_options=lance_options(uri))


class SampleStore:
    """The samples of one split of a dataset artifact; picklable, opens its tables once per process.

    In memory are a row number, a source and a weight for each sample, as arrays; all else is read when asked for.

    Raises:
        ArtifactError: the dataset is missing, or was built before its samples named their sources.
        ConfigError: the split has no samples.
    """

    def __init__(self, root: str, dataset_ref: str, split: str) -> None:
        self.root = root
        self.dataset_ref = dataset_ref
        self.split = split
        missing = set(SAMPLE_SCHEMA.names) - set(self._samples.schema.names)
        if missing:
            raise ArtifactError(
                f"{dataset_ref} was built by an earlier version: its samples lack {', '.join(sorted(missing))}; "
                "build it again under another version"
            )
        table = self._samples.to_table(columns=["split", "source", "weight"])
        splits, split_N = _codes(table["split"])
        if split not in splits:
            raise ConfigError(f"{dataset_ref} has no samples in split {split!r}; it has {', '.join(sorted(splits))}")
        self.rows = np.flatnonzero(split_N == splits.index(split))
        self.origins = _origins(table.take(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def all_ids(self) -> list[str]:
        """The id of every sample, in sample order; read anew by each call."""
        return self._samples.to_table(columns=["id"], filter=f"split = '{self.split}'")["id"].to_pylist()

    def all_captions(self) -> Iterator[str]:
        """Every caption of the split, in sample order (for the tokenizer), a batch of rows in memory at a time."""
        for batch in self._samples.to_batches(columns=["captions"], filter=f"split = '{self.split}'"):
            yield from batch["captions"].flatten().to_pylist()

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples at `indices`, in that order; indices may repeat."""
        wanted, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        taken = self._samples.take(self.rows[wanted], columns=READ_COLUMNS)
        tables, rows = taken["table"].to_pylist(), taken["row"].to_pylist()
        members: dict[str, list[int]] = {}
        for place, ref in enumerate(tables):
            members.setdefault(ref, []).append(place)
        images: dict[int, bytes] = {}
        for ref, own in members.items():
            column = self._pictures(ref).take([rows[place] for place in own], columns=["image"])["image"]
            images |= dict(zip(own, column.to_pylist(), strict=True))
        distances_m = taken["ground_sample_distance_m"].to_numpy()
        samples = [
            Sample(sample_id, images[place], tuple(captions), tuple(weights or ()), float(distances_m[place]))
            for place, (sample_id, captions, weights) in enumerate(
                zip(*(taken[name].to_pylist() for name in ("id", "captions", "caption_weights")), strict=True)
            )
        ]
        return [samples[place] for place in places]

    @cached_property
    def _samples(self) -> lance.LanceDataset:
        return open_table(self.root, self.dataset_ref, SAMPLES_TABLE)

    @cached_property
    def _opened(self) -> dict[str, lance.LanceDataset]:
        return {}

    def _pictures(self, ref: str) -> lance.LanceDataset:
        if ref not in self._opened:
            self._opened[ref] = open_table(self.root, ref)
        return self._opened[ref]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_samples", "_opened")}


def _origins(samples: pa.Table) -> Origins:
    names, source_N = _codes(samples["source"])
    order = np.argsort(names)  # by name, so that splits with the same sources agree
    source_N = np.argsort(order).astype(np.int16)[source_N]
    return Origins(tuple(names[index] for index in order), source_N, samples["weight"].to_numpy())


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct texts of a column, and for each row which of them it holds."""
    encoded = column.dictionary_encode().unify_dictionaries()
    return encoded.chunk(0).dictionary.to_pylist(), np.concatenate([part.indices.to_numpy() for part in encoded.chunks])
