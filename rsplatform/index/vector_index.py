"""The IVF-PQ index of LanceDB over a large table: training it, choosing its parameters by measuring, asking it.

In: a written table. Out: parameters whose recall@10 against the exact search reaches the target on the table's own
vectors (and on texts, where the caller has some); numbers of candidate rows. The exact comparison is nearest.py's.
Shapes: Q queries, N rows, E embedding.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lancedb.index import IvfPq

from rsplatform.index.nearest import nearest
from rsplatform.index.table import IndexMeta, default_partitions, open_lancedb, open_rows, row_bases, whole_divisor

TARGET_RECALL = 0.98
K = 10
# Queries from the table itself; as many texts may stand beside them.
OWN_QUERIES = 48
# Training, per list: Lance's defaults (256 and 50) take thirteen times as long, and recall is measured anyway.
SAMPLE_RATE, MAX_ITERATIONS = 64, 15
PROBES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CANDIDATES = (20, 40, 80, 160, 320, 640)
# Dimensions that share one byte of the code, coarse first: the coarsest that reaches the target is kept.
DIMENSIONS_PER_CODE = (8, 4, 2)
# What a visited row and a candidate cost, in bytes that are read: a code of E/8 bytes and more; two bytes a dimension,
# read at random places, which costs about eight times as much (our estimate).
RANDOM_READ_FACTOR = 8


class VectorIndex:
    """The vector index of a finished table, asked with the parameters in `meta`."""

    def __init__(self, artifact_uri: str, meta: IndexMeta) -> None:
        self.meta = meta
        self._rows = open_rows(artifact_uri)
        self._first_ids, self._first_numbers = row_bases(self._rows)

    def candidates(self, query_E: np.ndarray, k: int, num_left: int) -> tuple[np.ndarray, int]:
        """Numbers of rows near the query, best first, and how many of them are expected to pass a filter.

        `num_left` rows pass it: so many more lists and candidates are asked for.
        """
        meta = self.meta
        assert meta.candidates and meta.num_probes and meta.num_partitions, "made by train_vector_index"
        factor = -(-meta.num_rows // num_left)
        wanted = max(meta.candidates, meta.candidates * k // K)
        probes = min(meta.num_partitions, meta.num_probes * factor)
        return self.ask(query_E, probes, wanted * factor), wanted

    def ask(self, query_E: np.ndarray, num_probes: int, limit: int) -> np.ndarray:
        """Numbers of the `limit` rows whose codes are nearest to the query, among those of `num_probes` lists."""
        # Lance itself: LanceDB's client takes three turns of its event loop for a query
        asked = {"column": "vector", "q": query_E, "k": limit, "nprobes": num_probes, "metric": "cosine"}
        found = self._rows.to_table(columns=["_rowid", "_distance"], nearest=asked)
        ids = found["_rowid"].to_numpy().astype(np.uint64)
        fragment = np.searchsorted(self._first_ids, ids, side="right") - 1
        return self._first_numbers[fragment] + (ids - self._first_ids[fragment]).astype(np.int64)


@dataclass(frozen=True)
class _Choice:
    num_probes: int
    candidates: int
    recall: float


def train_vector_index(
    artifact_uri: str, meta: IndexMeta, vectors_NE: torch.Tensor, texts_QE: np.ndarray | None
) -> IndexMeta:
    """Train an index and choose how it is asked; the meta with its parameters and their measured recall@10.

    The cheapest parameters by bytes read that reach TARGET_RECALL, both for the table's own vectors (each without
    itself) and for `texts_QE`. If the finest codes do not reach it, the search stays exact and the meta says so.
    """
    table = open_lancedb(artifact_uri)
    partitions = default_partitions(meta.num_rows)
    groups = _queries(vectors_NE, texts_QE)
    for dimensions in DIMENSIONS_PER_CODE:
        sub_vectors = whole_divisor(meta.embedding_width, max(1, meta.embedding_width // dimensions))
        config = IvfPq(
            distance_type="cosine",
            num_partitions=partitions,
            num_sub_vectors=sub_vectors,
            sample_rate=SAMPLE_RATE,
            max_iterations=MAX_ITERATIONS,
        )
        table.create_index("vector", config=config, replace=True)
        trained = replace(
            meta,
            search="ivf_pq",
            num_partitions=partitions,
            num_sub_vectors=sub_vectors,
            target_recall=TARGET_RECALL,
            recall_queries=sum(len(queries) for queries, _ in groups),
        )
        choice = _cheapest(VectorIndex(artifact_uri, trained), vectors_NE, groups)
        if choice:
            chosen = {"num_probes": choice.num_probes, "candidates": choice.candidates, "recall_at_10": choice.recall}
            return replace(trained, **chosen)
    table.drop_index("vector_idx")
    return replace(meta, target_recall=TARGET_RECALL)


Group = tuple[np.ndarray, list[list[int]]]  # queries (Q, E) and, for each, the row that is no answer to it


def _queries(vectors_NE: torch.Tensor, texts_QE: np.ndarray | None) -> list[Group]:
    rows = np.linspace(0, len(vectors_NE) - 1, OWN_QUERIES).astype(int)
    own = vectors_NE[torch.from_numpy(rows)].float().numpy()
    groups: list[Group] = [(own, [[int(row)] for row in rows])]
    if texts_QE is not None and len(texts_QE):
        groups.append((texts_QE, [[]] * len(texts_QE)))
    return groups


def _cheapest(index: VectorIndex, vectors_NE: torch.Tensor, groups: list[Group]) -> _Choice | None:
    meta = index.meta
    assert meta.num_partitions and meta.num_sub_vectors, "the caller's"
    truths = [[_top(vectors_NE, query, own, None) for query, own in zip(*group, strict=True)] for group in groups]
    best: tuple[float, _Choice] | None = None
    for probes in (number for number in PROBES if number <= meta.num_partitions):
        visited = probes / meta.num_partitions * meta.num_rows * meta.num_sub_vectors
        if best and visited > best[0]:
            break
        recalls = [
            _recalls(index, vectors_NE, group, truth, probes) for group, truth in zip(groups, truths, strict=True)
        ]
        for candidates, *measured in zip(CANDIDATES, *recalls, strict=True):
            cost = visited + candidates * meta.embedding_width * 2 * RANDOM_READ_FACTOR
            if min(measured) >= TARGET_RECALL and (best is None or cost < best[0]):
                best = (cost, _Choice(probes, candidates, min(measured)))
    return best[1] if best else None


def _recalls(
    index: VectorIndex, vectors_NE: torch.Tensor, group: Group, truths: list[set[int]], probes: int
) -> list[float]:
    """recall@10 for each of CANDIDATES: the best n of the largest number are what n would have given."""
    found = np.zeros(len(CANDIDATES))
    for query_E, own, truth in zip(*group, truths, strict=True):
        rows = index.ask(query_E, probes, CANDIDATES[-1])
        tops = [_top(vectors_NE, query_E, own, rows[:number]) for number in CANDIDATES]
        found += [len(top & truth) / len(truth) for top in tops]
    return (found / len(truths)).tolist()


def _top(vectors_NE: torch.Tensor, query_E: np.ndarray, own: list[int], rows: np.ndarray | None) -> set[int]:
    numbers: Any = nearest(vectors_NE, query_E, K + len(own), None if rows is None else np.sort(rows))[0].tolist()
    return set([number for number in numbers if number not in own][:K])
