"""Reading a dataset: sample rows from `samples.lance`, image bytes from the tables they point into.

Pictures are read by row id from the artifact that first wrote them (Lance `take`); nothing is copied. No decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lance
import numpy as np

from rsplatform.artifacts import open_artifact
from rsplatform.storage import lance_options

SAMPLES_TABLE = "samples.lance"
# Which Lance table inside an artifact of a kind holds the pictures.
IMAGE_TABLES = {"chips": "chips.lance", "web_pairs": "web_pairs.lance"}


@dataclass(frozen=True)
class Sample:
    """One picture with its captions, still encoded; GSD in metres, NaN where unknown."""

    id: str
    image: bytes
    captions: tuple[str, ...]
    ground_sample_distance_m: float


def open_table(root: str, ref: str, table: str | None = None) -> lance.LanceDataset:
    """The Lance table of a finished artifact (the image table of its kind unless `table` is named).

    Raises:
        ArtifactError: the artifact is missing or unfinished.
        ValueError: the kind holds no pictures and no table is named.
    """
    artifact = open_artifact(root, ref)
    kind = ref.split("/")[0]
    if table is None and kind not in IMAGE_TABLES:
        raise ValueError(f"{ref}: artifacts of kind {kind!r} hold no pictures; use one of {sorted(IMAGE_TABLES)}")
    uri = artifact.path(table or IMAGE_TABLES[kind])
    return lance.dataset(uri, storage_options=lance_options(uri))


class SampleStore:
    """The samples of one split of a dataset artifact; picklable, opens its tables once per process.

    Raises:
        ArtifactError: the dataset or a table it points into is missing.
        ValueError: the split has no samples.
    """

    def __init__(self, root: str, dataset_ref: str, split: str) -> None:
        self.root = root
        self.dataset_ref = dataset_ref
        self.split = split
        table = open_table(root, dataset_ref, SAMPLES_TABLE).to_table(filter=f"split = '{split}'")
        if not table.num_rows:
            raise ValueError(f"{dataset_ref} has no samples in split {split!r}; see its stats.json")
        self.ids: list[str] = table["id"].to_pylist()
        self.tables: list[str] = table["table"].to_pylist()
        self.rows = table["row"].to_numpy()
        self.weights = table["weight"].to_numpy()
        self.ground_sample_distances_m = table["ground_sample_distance_m"].to_numpy()
        self._captions: list[list[str]] = table["captions"].to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def captions(self, index: int) -> list[str]:
        """Captions of one sample."""
        return self._captions[index]

    def all_captions(self) -> list[str]:
        """Every caption of the split, in sample order (for the tokenizer)."""
        return [caption for captions in self._captions for caption in captions]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples at `indices`, in that order; indices may repeat."""
        images: dict[int, bytes] = {}
        by_table: dict[str, list[int]] = {}
        for index in dict.fromkeys(int(i) for i in indices):
            by_table.setdefault(self.tables[index], []).append(index)
        for ref, members in by_table.items():
            taken = self._datasets[ref].take([int(self.rows[i]) for i in members], columns=["image"])
            images |= dict(zip(members, taken["image"].to_pylist(), strict=True))
        return [self._sample(int(index), images[int(index)]) for index in indices]

    def _sample(self, index: int, image: bytes) -> Sample:
        captions = tuple(self._captions[index])
        return Sample(self.ids[index], image, captions, float(self.ground_sample_distances_m[index]))

    @cached_property
    def _datasets(self) -> dict[str, lance.LanceDataset]:
        return {ref: open_table(self.root, ref) for ref in sorted(set(self.tables))}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_datasets"}
