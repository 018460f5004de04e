"""Datasets: inputs = kept + dropped, and every sample's picture is the one its source first wrote."""

import pickle

import lance
import numpy as np
import pyarrow as pa
import pytest

from rsplatform import artifacts
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.dataset.build import BuildDatasetConfig, ChipSource, WebSource, build_dataset
from rsplatform.dataset.store import SampleStore, open_table
from rsplatform.ledger import read_drops
from rsplatform.records import CAPTION_SCHEMA, CHIP_SCHEMA, WEB_PAIR_SCHEMA


def write_artifact(root: str, ref: str, table: str, rows: pa.Table) -> None:
    artifact = Artifact(root, ref)
    lance.write_dataset(rows, artifact.path(table))
    recipe = artifacts.identity({}, {})
    artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")


def chip(index: int, split: str) -> dict:
    row = {"id": f"chip-{index}", "image": f"chip {index}".encode(), "split": split, "landmarks": []}
    return row | {"ground_sample_distance_m": 2.5, "bounds_lonlat": [0.0, 0.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Six chips (one without a caption), four web pairs (one of which repeats a chip's id, and one is val)."""
    root = str(tmp_path_factory.mktemp("root"))
    chips = [chip(i, "val" if i == 5 else "train") for i in range(6)]
    captions = [
        {"id": f"chip-{i}", "captions": [f"caption {i}", f"other {i}"], "claims": []} for i in range(6) if i != 2
    ]
    pairs = [{"id": f"web-{i}", "image": f"web {i}".encode(), "captions": ["web"]} for i in range(3)]
    pairs = [pair | {"split": "val" if pair["id"] == "web-2" else "train"} for pair in pairs]
    pairs.append({"id": "chip-0", "image": b"copy", "captions": ["copy"], "split": "train"})
    write_artifact(root, "chips/a/v1", "chips.lance", pa.Table.from_pylist(chips, schema=CHIP_SCHEMA))
    write_artifact(root, "captions/a/v1", "captions.lance", pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA))
    write_artifact(root, "web_pairs/a/v1", "web_pairs.lance", pa.Table.from_pylist(pairs, schema=WEB_PAIR_SCHEMA))
    return Cluster(root=root)


SOURCES = [
    ChipSource(chips="chips/a/v1", captions="captions/a/v1"),
    WebSource(web_pairs="web_pairs/a/v1", weight=2.0),
]


def test_nothing_is_lost_and_pictures_are_read_from_their_source(cluster: Cluster) -> None:
    artifact = build_dataset(BuildDatasetConfig(output="dataset/a/v1", sources=SOURCES), cluster)
    assert artifact.manifest()["counts"] == {
        "inputs": 10,
        "kept": 8,
        "dropped": {"no_caption": 1, "repeated_id": 1},
    }
    assert set(read_drops(artifact)["id"].to_pylist()) == {"chip-2", "chip-0"}
    store = pickle.loads(pickle.dumps(SampleStore(cluster.root, "dataset/a/v1", "train")))
    order = np.array([len(store) - 1, 0, 3, 0])
    for index, sample in zip(order, store.read(order), strict=True):
        kind, number = store.ids[index].split("-")
        assert sample.image == f"{kind} {number}".encode()
        assert sample.captions == tuple(store.captions(index))
    assert store.weights.tolist() == [1.0] * 4 + [2.0] * 2
    val = SampleStore(cluster.root, "dataset/a/v1", "val")
    assert val.ids == ["chip-5", "web-2"], "of both sources"
    assert [sample.captions for sample in val.read([0, 1])] == [("caption 5", "other 5"), ("web",)]


def test_missing_splits_and_tables_are_named(cluster: Cluster) -> None:
    build_dataset(BuildDatasetConfig(output="dataset/b/v1", sources=SOURCES[:1]), cluster)
    with pytest.raises(ValueError, match="no samples in split 'test'"):
        SampleStore(cluster.root, "dataset/b/v1", "test")
    with pytest.raises(ArtifactError, match="chips/none/v1 does not exist"):
        open_table(cluster.root, "chips/none/v1")
    with pytest.raises(ValueError, match="hold no pictures"):
        open_table(cluster.root, "dataset/b/v1")


def test_held_out_classes_go_to_the_ledger_with_what_showed_them(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    stadium = {"id": "l1", "kind": "stadium", "name": "", "position": "centre", "area_fraction": 0.5}
    chips = [chip(0, "train") | {"landmarks": [stadium]}, chip(1, "train"), chip(2, "val") | {"landmarks": [stadium]}]
    captions = [{"id": f"chip-{i}", "captions": [f"caption {i}"], "claims": []} for i in range(2)]
    texts = {"web-a": ["a quiet bay", "boats in two harbours"], "web-b": ["a field"]}
    pairs = [{"id": name, "image": b"", "captions": text, "split": "train"} for name, text in texts.items()]
    write_artifact(cluster.root, "chips/h/v1", "chips.lance", pa.Table.from_pylist(chips, schema=CHIP_SCHEMA))
    write_artifact(
        cluster.root, "captions/h/v1", "captions.lance", pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA)
    )
    write_artifact(
        cluster.root, "web_pairs/h/v1", "web_pairs.lance", pa.Table.from_pylist(pairs, schema=WEB_PAIR_SCHEMA)
    )
    sources = [ChipSource(chips="chips/h/v1", captions="captions/h/v1"), WebSource(web_pairs="web_pairs/h/v1")]
    holdout = ["stadium", "harbour", "windmill"]
    artifact = build_dataset(BuildDatasetConfig(output="dataset/h/v1", sources=sources, holdout=holdout), cluster)
    dropped = {"holdout_harbour": 1, "holdout_stadium": 1, "no_caption": 1}
    assert artifact.manifest()["counts"] == {"inputs": 5, "kept": 2, "dropped": dropped}
    assert SampleStore(cluster.root, "dataset/h/v1", "train").ids == ["chip-1", "web-b"]
    details = {row["id"]: row["detail"] for row in read_drops(artifact).to_pylist()}
    assert details["chip-0"] == "landmark: stadium"
    assert details["web-a"] == "caption: boats in two harbours"
    assert "no sample names 'windmill'" in caplog.text
