"""Datasets: inputs = kept + dropped, and every sample's picture is the one its source first wrote."""

import pickle

import lance
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from rsplatform import artifacts
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
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
    ids = store.all_ids()
    order = np.array([len(store) - 1, 0, 3, 0])
    for index, sample in zip(order, store.read(order), strict=True):
        kind, number = ids[index].split("-")
        assert sample.id == ids[index] and sample.image == f"{kind} {number}".encode()
        assert sample.captions == ((f"caption {number}", f"other {number}") if kind == "chip" else ("web",))
        assert sample.caption_weights == pytest.approx([1 / len(sample.captions)] * len(sample.captions))
    captions = store.all_captions()
    assert iter(captions) is captions, "one after the other, not all at once"
    assert list(store.all_captions()) == [text for sample in store.read(range(len(store))) for text in sample.captions]
    assert store.origins.weight_N.tolist() == [1.0] * 4 + [2.0] * 2
    assert [store.origins.names[source] for source in store.origins.source_N] == ["chips"] * 4 + ["web_pairs"] * 2
    val = SampleStore(cluster.root, "dataset/a/v1", "val")
    assert val.all_ids() == ["chip-5", "web-2"], "of both sources"
    assert [sample.captions for sample in val.read([0, 1])] == [("caption 5", "other 5"), ("web",)]


def test_missing_splits_and_tables_are_named(cluster: Cluster) -> None:
    build_dataset(BuildDatasetConfig(output="dataset/b/v1", sources=SOURCES[:1]), cluster)
    with pytest.raises(ConfigError, match="no samples in split 'test'; it has train, val"):
        SampleStore(cluster.root, "dataset/b/v1", "test")
    with pytest.raises(ArtifactError, match="chips/none/v1 does not exist"):
        open_table(cluster.root, "chips/none/v1")
    with pytest.raises(ConfigError, match="hold no pictures"):
        open_table(cluster.root, "dataset/b/v1")


def test_a_dataset_of_nothing_is_refused_with_what_to_change(cluster: Cluster) -> None:
    captions = [{"id": "chip-of-another-world", "captions": ["a lake"], "claims": []}]
    write_artifact(
        cluster.root, "captions/other/v1", "captions.lance", pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA)
    )
    source = ChipSource(chips="chips/a/v1", captions="captions/other/v1")
    with pytest.raises(ConfigError, match=r"no sample is left of 6 pictures \(6 no_caption\); give captions"):
        build_dataset(BuildDatasetConfig(output="dataset/none/v1", sources=[source]), cluster)
    with pytest.raises(ConfigError, match=r"chips/a/v1 holds no captions .* such as captions/NAME/v1"):
        open_table(cluster.root, "chips/a/v1", "captions.lance")


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
    assert SampleStore(cluster.root, "dataset/h/v1", "train").all_ids() == ["chip-1", "web-b"]
    details = {row["id"]: row["detail"] for row in read_drops(artifact).to_pylist()}
    assert details["chip-0"] == "landmark: stadium"
    assert details["web-a"] == "caption: boats in two harbours"
    assert "no sample names 'windmill'" in caplog.text
    own = [sources[0].model_copy(update={"holdout": ["stadium"]}), sources[1]]
    build_dataset(BuildDatasetConfig(output="dataset/own/v1", sources=own, holdout=["field"]), cluster)
    assert SampleStore(cluster.root, "dataset/own/v1", "train").all_ids() == ["chip-1", "web-a"]
    with pytest.raises(ValidationError, match="holdout"):
        BuildDatasetConfig(output="dataset/own/v2", sources=[own[0].model_copy(update={"holdout": [""]})])


def test_sources_have_names_and_captions_have_weights(cluster: Cluster) -> None:
    other = [{"id": f"chip-{i}", "captions": ["seen"], "claims": []} for i in (1, 2)]
    write_artifact(
        cluster.root, "captions/seen/v1", "captions.lance", pa.Table.from_pylist(other, schema=CAPTION_SCHEMA)
    )
    recaptioned = [{"id": f"web-{i}", "captions": ["again", "once more"], "claims": []} for i in range(2)]
    write_artifact(
        cluster.root, "captions/web/v1", "captions.lance", pa.Table.from_pylist(recaptioned, schema=CAPTION_SCHEMA)
    )
    captions = [{"captions": "captions/a/v1"}, {"captions": "captions/seen/v1", "weight": 3.0}]
    web = {"type": "web", "web_pairs": "web_pairs/a/v1", "captions": [{"captions": "captions/web/v1", "weight": 2.0}]}
    recipe = {"sources": [{"type": "chips", "name": "rs_landmarks", "chips": "chips/a/v1", "captions": captions}, web]}
    artifact = build_dataset(BuildDatasetConfig.model_validate(recipe | {"output": "dataset/w/v1"}), cluster)
    store = SampleStore(cluster.root, "dataset/w/v1", "train")
    assert store.origins.names == ("rs_landmarks", "web_pairs")
    samples = {sample.id: sample for sample in store.read(range(len(store)))}
    drawn = {name: dict(zip(each.captions, each.caption_weights, strict=True)) for name, each in samples.items()}
    assert drawn["chip-0"] == {"caption 0": 0.5, "other 0": 0.5}
    assert drawn["chip-1"] == {"caption 1": 0.5, "other 1": 0.5, "seen": 3.0}
    assert drawn["chip-2"] == {"seen": 3.0}, "captioned by the second captioner alone"
    assert drawn["web-0"] == {"web": 1.0, "again": 1.0, "once more": 1.0}
    inputs = str(artifact.manifest()["inputs"])
    assert "captions/seen/v1" in inputs and "captions/web/v1" in inputs, "lineage knows them"
    only_new = {"sources": [web | {"own_caption_weight": 0.0}]}
    build_dataset(BuildDatasetConfig.model_validate(only_new | {"output": "dataset/o/v1"}), cluster)
    rest = SampleStore(cluster.root, "dataset/o/v1", "train")
    assert {sample.captions for sample in rest.read(range(len(rest)))} == {("again", "once more")}


@pytest.mark.parametrize(
    ("names", "words"), [((None, None), "several sources are called chips"), (("a.b", None), "pattern")]
)
def test_names_that_mixtures_could_not_use_are_refused(names: tuple, words: str) -> None:
    sources = [{"type": "chips", "chips": "chips/a/v1", "captions": "captions/a/v1", "name": name} for name in names]
    with pytest.raises(ValueError, match=words):
        BuildDatasetConfig.model_validate({"output": "dataset/c/v1", "sources": sources})


def test_a_store_holds_no_object_for_each_sample(cluster: Cluster) -> None:
    """Three numbers a sample: at 18 M samples, strings would be gigabytes in every worker."""
    build_dataset(BuildDatasetConfig(output="dataset/m/v1", sources=SOURCES), cluster)
    store = SampleStore(cluster.root, "dataset/m/v1", "train")
    store.read([0, 1])
    held = [*vars(store).values(), *vars(store.origins).values()]
    arrays = [value for value in held if isinstance(value, np.ndarray)]
    assert sorted(str(array.dtype) for array in arrays) == ["float32", "int16", "int64"]
    assert all(len(array) == len(store) for array in arrays)
    assert not any(isinstance(value, list | dict) and len(value) >= len(store) for value in held)


def test_a_dataset_of_another_schema_is_told_to_be_built_again(cluster: Cluster) -> None:
    old = pa.table({"id": ["a"], "table": ["chips/a/v1"], "row": [0], "captions": [["a"]], "split": ["train"]})
    write_artifact(cluster.root, "dataset/old/v1", "samples.lance", old)
    with pytest.raises(ArtifactError, match="lack caption_weights, .*source.*build it again"):
        SampleStore(cluster.root, "dataset/old/v1", "train")
