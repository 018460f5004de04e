"""build_index on Ray Data: the same rows as without Ray, also if a worker dies; drops with reasons, no-op reruns."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dying_workers as dying
import lance
import numpy as np
import pytest
import ray.cloudpickle
from PIL import Image
from tiny_service import CAPTIONS, CHIPS, INDEX, MODEL, build_config, finish, make_artifacts, make_model, tiny_cluster

from rsplatform.artifacts import Artifact, ArtifactError, open_artifact
from rsplatform.curate.pipeline import Loaded, run_pipeline, run_plain
from rsplatform.index.build import BuildIndexConfig, build_index, index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.sources import FolderSource
from rsplatform.index.store import ChipIndex
from rsplatform.index.table import ROWS_PATH, TABLE_PATH
from rsplatform.ledger import read_drops
from rsplatform.runtime import ray_runtime

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(dying)  # workers cannot import what lies in the tests' folder
    with ray_runtime(tiny_cluster(str(tmp_path_factory.mktemp("ray")))):
        yield


def spoil_two_pictures(root: str) -> None:
    """Chips 5 and 40 become a truncated JPEG and no picture at all."""
    path = Artifact(root, CHIPS).path("chips.lance")
    rows = lance.dataset(path).to_table().to_pylist()
    rows[5]["image"], rows[40]["image"] = rows[5]["image"][:200], b"not a picture"
    schema = lance.dataset(path).schema
    lance.write_dataset(lance.dataset(path).to_table().from_pylist(rows, schema=schema), path, mode="overwrite")
    finish(root, CHIPS)


def test_index_on_ray_equals_the_plain_one(tmp_path: Path) -> None:
    root, plain_root = str(tmp_path / "ray"), str(tmp_path / "plain")
    for place in (root, plain_root):
        make_artifacts(place)
        spoil_two_pictures(place)
    cluster = tiny_cluster(root)
    artifact = build_index(build_config(), cluster)

    plain = Artifact(plain_root, INDEX)
    pipeline, shards = index_pipeline(build_config(), tiny_cluster(plain_root), plain)
    counts = run_plain(pipeline, shards)
    assert artifact.manifest()["counts"] == counts == {"inputs": 64, "kept": 62, "dropped": {"unreadable": 2}}
    assert {row["id"][-4:] for row in read_drops(artifact).to_pylist()} == {"0005", "0040"}
    made = lance.dataset(artifact.path(TABLE_PATH)).to_table()
    expected = lance.dataset(plain.path(ROWS_PATH)).to_table()
    assert made.drop(["vector"]).equals(expected.drop(["vector"]))
    assert made["row"].to_pylist() == [row for row in range(64) if row not in {5, 40}]

    embedder = load_embedder(root, MODEL)
    index = ChipIndex(artifact.uri, embedder.model_hash)
    chip = lance.dataset(Artifact(root, CHIPS).path("chips.lance")).take([7]).to_pylist()[0]
    best = index.search(embedder.embed_images([chip["image"]])[0], 1)[0]
    assert (best.id, best.row) == (chip["id"], 7) and best.score > 0.999

    finished_at = artifact.manifest()["finished"]
    assert build_index(build_config(), cluster).manifest()["finished"] == finished_at
    make_model(root, "model/other/v1", seed=1)
    with pytest.raises(ArtifactError, match="another recipe"):
        build_index(build_config().model_copy(update={"model": "model/other/v1"}), cluster)


def test_an_embedder_that_dies_changes_nothing(tmp_path: Path) -> None:
    root = str(tmp_path)
    make_artifacts(root)
    spoil_two_pictures(root)
    plain, shards = index_pipeline(build_config(), tiny_cluster(root), Artifact(root, "index/plain/v1"))
    death = dying.Death("town_north-0025", str(tmp_path / "died"))  # in the second shard of four
    embedder = Loaded(dying.DyingEmbedder, (root, MODEL, {CHIPS: CAPTIONS}, death))
    killed = replace(plain, artifact=Artifact(root, "index/killed/v1"), operations=(embedder,))
    assert run_pipeline(killed, shards, tiny_cluster(root)) == run_plain(plain, shards)
    assert (tmp_path / "died").exists()
    made, expected = (lance.dataset(item.artifact.path(ROWS_PATH)).to_table() for item in (killed, plain))
    assert made.drop(["vector"]).equals(expected.drop(["vector"]))
    vectors = [np.stack(table["vector"].to_numpy(zero_copy_only=False)) for table in (made, expected)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-3)  # float16


def test_a_large_index_records_the_recall_that_its_lists_were_chosen_for(tmp_path: Path) -> None:
    root, folder = str(tmp_path / "root"), tmp_path / "colours"
    make_model(root)
    folder.mkdir()
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (300, 3), dtype=np.uint8)):
        Image.fromarray(np.tile(colour, (8, 8, 1))).save(folder / f"{number:03d}.png")
    sources = {"folders": [FolderSource(path=str(folder), scene="colours")], "exact_below_rows": 256}
    config = BuildIndexConfig(output="index/colours/v1", model=MODEL, **sources)
    artifact = build_index(config, tiny_cluster(root))
    metrics = artifact.manifest()["metrics"]
    assert metrics["index_target_recall"] == 0.98 and 0.98 <= metrics["index_recall_at_10"] <= 1
    assert metrics["index_num_partitions"] == 35 and 1 <= metrics["index_num_probes"] <= 17
    index = ChipIndex(artifact.uri, load_embedder(root, MODEL).model_hash)
    assert index.meta.search == "ivf" and len(index.search(index.vector("colours:007.png"), 10)) == 10


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    make_model(str(tmp_path / "a"))
    with pytest.raises(ArtifactError, match=CHIPS):
        build_index(build_config(), tiny_cluster(str(tmp_path / "a")))
    with pytest.raises(ArtifactError, match=INDEX):
        open_artifact(str(tmp_path / "a"), INDEX)
