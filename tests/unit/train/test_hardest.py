"""Hardest pairs: those that a slow count over all texts finds, drawn for a finished run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplatform import storage
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.dataset.store import SampleStore
from rsplatform.train.hardest import HARDEST_FILE, HardPair, hardest_figure, hardest_pairs
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


def slow_hardest(images_PE: np.ndarray, texts_PE: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(index, rank, preferred) by loops over pairs."""
    found = []
    for i, image_E in enumerate(images_PE):
        cosines = [float(image_E @ text_E / np.linalg.norm(image_E) / np.linalg.norm(text_E)) for text_E in texts_PE]
        rank = 1 + sum(cosine > cosines[i] + 1e-9 for cosine in cosines)
        if rank > 1:
            found.append((-rank, cosines[i] - max(cosines), i, cosines.index(max(cosines))))
    return [(i, -rank, preferred) for rank, _, i, preferred in sorted(found)[:count]]


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 12))
def test_the_pairs_are_those_of_the_slow_count(seed: int, num_pairs: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    images_PE, texts_PE = rng.normal(size=(2, num_pairs, 5))
    found = hardest_pairs(images_PE, texts_PE, count)
    assert [(pair.index, pair.rank, pair.preferred) for pair in found] == slow_hardest(images_PE, texts_PE, count)
    assert all(pair.own_cosine < pair.preferred_cosine <= 1 + 1e-9 for pair in found)


def test_the_wrong_pair_comes_out_and_equal_captions_are_no_error() -> None:
    texts_PE = np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    images_PE = texts_PE.copy()
    assert hardest_pairs(images_PE, texts_PE) == []
    images_PE[3] = [0, 1, 0]
    assert hardest_pairs(images_PE, texts_PE) == [HardPair(3, 3, 0.0, 1, 1.0)]


def test_tables_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        hardest_pairs(np.ones((3, 2)), np.ones((4, 2)))


def test_a_run_leaves_its_hardest_pairs_and_their_pictures(root: str) -> None:
    make_tiny_dataset(root)
    cluster = Cluster(root=root, train=TrainPlacement(launcher="local"))
    artifact = pretrain(PretrainConfig(**tiny_recipe()), cluster)
    rows = storage.read_json(artifact.path(HARDEST_FILE))
    store = SampleStore(root, "dataset/tiny/v1", "val")
    samples = {sample.id: sample for sample in store.read(range(len(store)))}
    captions = {text for sample in samples.values() for text in sample.captions}
    assert rows, "a model of eight steps errs"
    for row in rows:
        assert row["caption"] in samples[row["sample_id"]].captions
        assert row["preferred_caption"] in captions - {row["caption"]}
        assert row["rank"] > 1 and row["preferred_cosine"] > row["own_cosine"]
    assert [row["rank"] for row in rows] == sorted((row["rank"] for row in rows), reverse=True)
    figure = hardest_figure(artifact.uri, store)
    assert figure is not None and sum(bool(axes.images) for axes in figure.axes) == len(rows)
    logged = storage.list_files(f"{root}/mlflow-artifacts/{artifact.manifest()['mlflow_run_id']}/artifacts")
    assert logged["hardest_pairs.png"] > 1000
    storage.write_json(artifact.path(HARDEST_FILE), [])
    assert hardest_figure(artifact.uri, store) is None
