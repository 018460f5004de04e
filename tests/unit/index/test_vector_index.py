"""Lists of near rows: what they compare, what their recall is, how little they cost where vectors flock together."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.index.nearest import nearest
from rsplatform.index.table import IndexMeta
from rsplatform.index.vector_index import VectorIndex, _queries, exact_nearest, nearest_centroid, train_vector_index

ROWS, WIDTH, FLOCKS = 6000, 24, 60


def flocks(seed: int = 0) -> torch.Tensor:
    """Unit float16 vectors (N, E) around some centres, of sizes that differ by much."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(FLOCKS, WIDTH))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    weights = rng.pareto(1.5, FLOCKS) + 0.1
    vectors = centres[rng.choice(FLOCKS, ROWS, p=weights / weights.sum())] + rng.normal(size=(ROWS, WIDTH)) * 0.05
    return torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))


@pytest.fixture(scope="module")
def vectors_NE() -> torch.Tensor:
    return flocks()


@pytest.fixture(scope="module")
def index(vectors_NE: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> VectorIndex:
    folder = str(tmp_path_factory.mktemp("lists"))
    texts = flocks(seed=1)[:40].float().numpy()
    return VectorIndex(folder, train_vector_index(folder, IndexMeta("a" * 64, WIDTH, ROWS, 1000), vectors_NE, texts))


def test_one_pass_over_blocks_finds_what_a_full_sort_finds(vectors_NE: torch.Tensor) -> None:
    queries = flocks(seed=2)[:30].float()
    unit = vectors_NE.double() / vectors_NE.double().norm(dim=1, keepdim=True)
    expected = torch.argsort(queries.double() @ unit.T, dim=1, descending=True)[:, :7]
    assert (exact_nearest(vectors_NE, queries, 7) == expected).float().mean() > 0.99  # float32 may swap equals


def test_the_recorded_recall_is_that_of_the_search(index: VectorIndex, vectors_NE: torch.Tensor) -> None:
    rng, found = np.random.default_rng(3), []
    for row in rng.choice(ROWS, 200, replace=False):
        query = vectors_NE[row].float().numpy()
        truth = nearest(vectors_NE, query, 11)[0]
        found.append(np.isin(truth, nearest(vectors_NE, query, 11, index.near(query, 10))[0]).mean())
    assert index.meta.recall_at_10 is not None and index.meta.recall_at_10 >= 0.98
    assert np.mean(found) >= 0.97


def test_the_recall_is_measured_with_others_than_those_that_chose(index: VectorIndex, vectors_NE: torch.Tensor) -> None:
    (chosen, few), measured = _queries(vectors_NE, np.eye(WIDTH, dtype=np.float32)[:20])
    assert len(measured) == 1 and len(few[0]) == 20, "too few texts to share"
    assert not set(chosen[1].tolist()) & set(measured[0][1].tolist())
    assert index.meta.recall_queries == len(measured[0][1]) == 256
    texts = flocks(seed=5)[:100].float().numpy()
    (_, ours), (_, others) = _queries(vectors_NE, texts)
    assert not {tuple(each) for each in ours[0].tolist()} & {tuple(each) for each in others[0].tolist()}
    assert len(ours[0]) == len(others[0]) == 50


def test_a_search_visits_few_rows(index: VectorIndex, vectors_NE: torch.Tensor) -> None:
    visited = [len(index.near(vector.float().numpy(), 10)) for vector in vectors_NE[::100]]
    assert np.median(visited) < ROWS / 6


@given(share=st.floats(0.001, 1), seed=st.integers(0, 99), k=st.sampled_from([1, 10, 70]))
@settings(max_examples=40)
def test_a_filter_never_makes_the_search_coarser(index: VectorIndex, share: float, seed: int, k: int) -> None:
    """As many rows are compared as without it, or all that pass."""
    rng = np.random.default_rng(seed)
    query = flocks(seed=4)[seed].float().numpy()
    passing = np.flatnonzero(rng.random(ROWS) < share)
    near = index.near(query, k, passing)
    assert index.meta.num_probes and index.meta.num_partitions
    wanted = index.meta.num_probes * -(-k // 10) * ROWS // index.meta.num_partitions
    assert np.isin(near, passing).all() and (np.diff(near) > 0).all()
    assert len(near) >= min(len(passing), max(k, wanted))


def test_vectors_without_any_order_are_searched_exactly(tmp_path: Path) -> None:
    """In 256 random dimensions every list is as far as any other."""
    vectors = np.random.default_rng(0).normal(size=(1500, 256))
    unit = torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    meta = IndexMeta("a" * 64, 256, 1500, 1000)
    assert train_vector_index(str(tmp_path), meta, unit, None) == replace(meta, target_recall=0.98)
    assert not list(tmp_path.iterdir())


def test_a_box_that_holds_twenty_of_very_many_rows_still_gives_k(tmp_path: Path) -> None:
    """A filter so narrow that the lists near the query hold none of its rows."""
    rows, width, lists = 200_000, 16, 900
    unit_NE = torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), dim=1)
    centroids_CE = unit_NE[:lists]
    stored = io.BytesIO()
    np.savez(stored, centroids=centroids_CE.numpy(), list_of_row=nearest_centroid(unit_NE, centroids_CE))
    passing = np.sort(np.random.default_rng(0).choice(rows, 20, replace=False))
    (tmp_path / "lists.npz").write_bytes(stored.getvalue())
    index = VectorIndex(str(tmp_path), IndexMeta("a" * 64, width, rows, 1000, num_partitions=lists, num_probes=3))
    for query in unit_NE[::10_000].numpy():
        for k in (10, 20, 50):
            near = index.near(query, k, passing)
            found = nearest(unit_NE.half(), query, k, near)[0]
            truth = nearest(unit_NE.half(), query, k, passing)[0]
            assert len(found) == min(k, 20) and list(found) == list(truth)
