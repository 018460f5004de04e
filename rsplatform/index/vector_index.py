"""Which rows of a large table a search compares: k-means lists of its vectors, trained, tuned by measuring, asked.

In: the vectors of a written table. Out: `lists.npz` beside them, how many lists a search visits, chosen so that
recall@10 against the exact search reaches the target on the table's own vectors (and on texts, where the caller has
some); numbers of rows near a query. The comparison is nearest.py's, on the whole float16 vectors.

Lance's own IVF-PQ did not finish over 1 M × 512 float16 vectors within 20 minutes on 2 cores, nor within 5 with
centroids and codes handed to it. Lists without codes cost 4 bytes a row and read a thousandth of the vectors.
Shapes: Q queries, N rows, E embedding, C lists.
"""

import io
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from rsplatform.index.table import IndexMeta
from rsplatform.model.float32_products import use_onednn_products
from rsplatform.storage import read_bytes, write_bytes

LISTS_FILE = "lists.npz"
TARGET_RECALL = 0.98
# What the chosen parameter reaches on the queries that it is chosen with; others than these get the target.
TUNED_RECALL = 0.985
K = 10
# Queries from the table itself, as many to choose with as to measure with; texts may stand beside them, and are shared
# between both where there are so many.
OWN_QUERIES = 256
SHARED_TEXTS = 64
# Lists for each root of a row (FAISS's guidelines say 4 to 16; fewer are trained and assigned sooner: our default).
LISTS_PER_ROOT = 2
# Training: rows for each list, and rounds of k-means (the mean cosine moves by 1e-4 in the tenth at 1 M × 512).
SAMPLE_PER_LIST, ITERATIONS = 64, 10
# Above this share of the rows lists save less than they lose, and the search stays exact (our default).
LARGEST_VISITED = 0.5
BLOCK_ROWS = 16_384


class VectorIndex:
    """The lists of a finished table, asked with the parameters in `meta`. Threads may share it."""

    def __init__(self, artifact_uri: str, meta: IndexMeta) -> None:
        with np.load(io.BytesIO(read_bytes(f"{artifact_uri}/{LISTS_FILE}")), allow_pickle=False) as stored:
            self._centroids_CE, self._list_of_row = torch.from_numpy(stored["centroids"]), stored["list_of_row"]
        self.meta = meta
        self._sizes = np.bincount(self._list_of_row, minlength=len(self._centroids_CE))
        self._ends = np.cumsum(self._sizes)
        self._rows_by_list = np.argsort(self._list_of_row, kind="stable")

    def near(self, query_E: np.ndarray, k: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Numbers of the rows to compare with a query, ascending: all of `rows` (None: of the table) in its lists.

        A filter does not make the search coarser: lists are added until as many rows that pass it are compared as
        without one, or none are left. More than 10 to be found take so many more lists.
        """
        assert self.meta.num_probes, "made by train_vector_index"
        probes = self.meta.num_probes * -(-k // K)
        wanted = max(k, probes * self.meta.num_rows // len(self._centroids_CE))
        if wanted >= (self.meta.num_rows if rows is None else len(rows)):
            return np.arange(self.meta.num_rows) if rows is None else rows
        scores_C = self._centroids_CE @ torch.from_numpy(query_E.astype(np.float32, copy=False))
        order = torch.argsort(scores_C, descending=True).numpy()
        list_of_row = None if rows is None else self._list_of_row[rows]
        sizes = self._sizes if list_of_row is None else np.bincount(list_of_row, minlength=len(order))
        enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
        visited = order[: max(probes, enough)]
        if rows is None or list_of_row is None:
            parts = [self._rows_by_list[self._ends[one] - self._sizes[one] : self._ends[one]] for one in visited]
            return np.sort(np.concatenate(parts))
        is_visited = np.zeros(len(order), dtype=bool)
        is_visited[visited] = True
        return rows[is_visited[list_of_row]]


def train_vector_index(
    artifact_uri: str, meta: IndexMeta, vectors_NE: torch.Tensor, texts_QE: np.ndarray | None
) -> IndexMeta:
    """Train lists and choose how many are visited; the meta with its parameters and their measured recall@10.

    The fewest that reach TUNED_RECALL, both for some of the table's own vectors (each without itself) and for texts of
    `texts_QE`; the recall is measured with others. If the lists hold more than half of the rows, the search stays exact
    and the meta says so.
    """
    use_onednn_products()
    centroids_CE = train_centroids(vectors_NE, default_lists(meta.num_rows))
    list_of_row = nearest_centroid(vectors_NE, centroids_CE)
    choosing, measuring = (
        [_ranks_of_truth(vectors_NE, *group, centroids_CE, list_of_row) for group in groups]
        for groups in _queries(vectors_NE, texts_QE)
    )
    probes = max(_fewest_lists(each) for each in choosing)
    if probes > LARGEST_VISITED * len(centroids_CE):
        return replace(meta, target_recall=TARGET_RECALL)
    stored = io.BytesIO()
    np.savez(stored, centroids=centroids_CE.numpy(), list_of_row=list_of_row)
    write_bytes(f"{artifact_uri}/{LISTS_FILE}", stored.getvalue())
    return replace(
        meta,
        search="ivf",
        num_partitions=len(centroids_CE),
        num_probes=probes,
        target_recall=TARGET_RECALL,
        recall_at_10=min(float((each < probes).mean()) for each in measuring),
        recall_queries=sum(len(each) for each in measuring),
    )


def default_lists(num_rows: int) -> int:
    """How many lists a table gets."""
    return max(1, round(LISTS_PER_ROOT * math.sqrt(num_rows)))


def train_centroids(vectors_NE: torch.Tensor, num_lists: int) -> torch.Tensor:
    """Unit centroids (C, E) float32 of spherical k-means over a sample of the rows, the same for the same rows."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(vectors_NE), generator=generator)[: SAMPLE_PER_LIST * num_lists]
    sample_NE = F.normalize(vectors_NE[drawn.sort().values].float(), dim=1)
    centroids_CE = sample_NE[torch.randperm(len(sample_NE), generator=generator)[:num_lists]]
    for _ in range(ITERATIONS):
        scores, lists = _best(sample_NE, centroids_CE)
        sums_CE = torch.zeros_like(centroids_CE).index_add_(0, lists, sample_NE)
        empty = torch.bincount(lists, minlength=num_lists) == 0
        # an empty list takes one of the rows that lie farthest from their own
        sums_CE[empty] = sample_NE[scores.topk(int(empty.sum()), largest=False).indices]
        centroids_CE = F.normalize(sums_CE, dim=1)
    return centroids_CE


def nearest_centroid(vectors_NE: torch.Tensor, centroids_CE: torch.Tensor) -> np.ndarray:
    """The list (N,) int32 of each row."""
    return _best(vectors_NE, centroids_CE)[1].numpy().astype(np.int32)


def _best(vectors_NE: torch.Tensor, centroids_CE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and number of the centroid nearest to each row."""
    blocks = [F.linear(block.float(), centroids_CE).max(dim=1) for block in vectors_NE.split(BLOCK_ROWS)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


Group = tuple[torch.Tensor, torch.Tensor]  # queries (Q, E) and, for each, the row that is no answer to it (-1: none)


def _queries(vectors_NE: torch.Tensor, texts_QE: np.ndarray | None) -> tuple[list[Group], list[Group]]:
    """Queries that choose the parameters, and others that measure what these reach."""
    rows = torch.from_numpy(np.unique(np.linspace(0, len(vectors_NE) - 1, 2 * OWN_QUERIES).astype(int)))
    choosing, measuring = ([(vectors_NE[own].float(), own)] for own in (rows[::2], rows[1::2]))
    if texts_QE is not None and len(texts_QE):
        texts = torch.from_numpy(texts_QE.astype(np.float32))
        are_shared = len(texts) >= SHARED_TEXTS
        choosing.append(_no_rows(texts[::2] if are_shared else texts))
        measuring += [_no_rows(texts[1::2])] if are_shared else []
    return choosing, measuring


def _no_rows(queries_QE: torch.Tensor) -> Group:
    return queries_QE, torch.full((len(queries_QE),), -1)


def _ranks_of_truth(
    vectors_NE: torch.Tensor,
    queries_QE: torch.Tensor,
    own_Q: torch.Tensor,
    centroids_CE: torch.Tensor,
    list_of_row: np.ndarray,
) -> np.ndarray:
    """For each query and each of its ten nearest rows, how many lists are visited before that row's: (Q, 10)."""
    truths = exact_nearest(vectors_NE, queries_QE, K + 1).numpy()
    order = torch.argsort(queries_QE @ centroids_CE.T, dim=1, descending=True)
    ranks = torch.argsort(order, dim=1).numpy()
    kept = [[row for row in rows if row != own][:K] for rows, own in zip(truths.tolist(), own_Q.tolist(), strict=True)]
    return np.stack([rank[list_of_row[rows]] for rank, rows in zip(ranks, kept, strict=True)])


def exact_nearest(vectors_NE: torch.Tensor, queries_QE: torch.Tensor, k: int) -> torch.Tensor:
    """Numbers (Q, k) of the rows of highest cosine to each query, best first, in float32 and one pass over the rows."""
    best = torch.full((len(queries_QE), k), -math.inf)
    numbers = torch.zeros((len(queries_QE), k), dtype=torch.int64)
    for start in range(0, len(vectors_NE), BLOCK_ROWS):
        block = F.normalize(vectors_NE[start : start + BLOCK_ROWS].float(), dim=1)
        scores = torch.cat([best, queries_QE @ block.T], dim=1)
        own = torch.arange(start, start + len(block)).expand(len(queries_QE), -1)
        best, places = scores.topk(k, dim=1)
        numbers = torch.cat([numbers, own], dim=1).gather(1, places)
    return numbers


def _fewest_lists(ranks_QK: np.ndarray) -> int:
    """The fewest lists in which TUNED_RECALL of the rows lie."""
    return int(np.sort(ranks_QK.ravel())[math.ceil(TUNED_RECALL * ranks_QK.size) - 1]) + 1
