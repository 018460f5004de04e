"""Instances and URIs in files: each line is answered as POST /predict answers it, or dropped with a reason."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_service import CHIPS, GSD_M, MODEL, jpeg, make_chips, make_model, make_scaled_model, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, validate
from rsplatform.curate.pipeline import run_plain
from rsplatform.dataset.store import open_table
from rsplatform.index.embed import load_embedder
from rsplatform.ledger import read_drops
from rsplatform.model.preprocess import read_square
from rsplatform.serve.batch import PredictConfig, predict_pipeline, write_jsonl


@pytest.fixture
def cluster(tmp_path: Path, root: str) -> Cluster:
    make_model(root)
    (tmp_path / "asked").mkdir()
    return tiny_cluster(root, data_root=str(tmp_path))


def answered(cluster: Cluster, rows_per_shard: int = 3) -> list[dict]:
    config = PredictConfig(output="predictions/a/v1", model=MODEL, instances="asked", rows_per_shard=rows_per_shard)
    artifact = Artifact(cluster.root, config.output)
    run_plain(*predict_pipeline(config, cluster, artifact))
    write_jsonl(artifact, rows_per_shard)
    files = sorted(Path(artifact.path("predictions")).glob("*.jsonl"))
    assert all(len(file.read_text().splitlines()) <= rows_per_shard for file in files)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_lines_are_answered_in_order_and_bad_ones_have_a_reason(cluster: Cluster, tmp_path: Path) -> None:
    picture = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    image = base64.b64encode(picture).decode()
    lines = [{"text": "a road"}, {"image": image}, {"image": image, "texts": ["a road", "water"]}, {"texts": ["a"]}]
    lines += [{"text": "water"}, {"image": base64.b64encode(picture[:200]).decode()}]
    (tmp_path / "asked" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    found = answered(cluster)
    assert [row["id"] for row in found] == [f"a.jsonl:{number}" for number in (1, 2, 3, 5)]
    embedder = load_embedder(cluster.root, MODEL)
    road_E, water_E = embedder.embed_texts(["a road", "water"])
    picture_E = embedder.embed_images([picture])[0]
    assert np.allclose(found[0]["embedding"], road_E, atol=1e-5)
    assert np.allclose(found[1]["embedding"], picture_E, atol=1e-5)
    assert np.allclose(found[2]["scores"], [picture_E @ road_E, picture_E @ water_E], atol=1e-5)
    drops = {drop["id"]: drop["reason"] for drop in dropped(cluster)}
    assert drops == {"a.jsonl:4": "no_instance", "a.jsonl:6": "unreadable", "a.jsonl:7": "no_instance"}


def test_a_list_of_uris_gives_an_embedding_each_and_fetches_nothing(cluster: Cluster, tmp_path: Path) -> None:
    picture = jpeg(np.full((64, 64, 3), 90, dtype=np.uint8))
    (tmp_path / "one.jpg").write_bytes(picture)
    (tmp_path / "asked" / "list.txt").write_text(f"one.jpg\n{tmp_path}/one.jpg\nhttp://127.0.0.1/x.jpg\ngone.jpg\n")
    first, second = answered(cluster)
    assert first["id"] == "list.txt:1 one.jpg" and first["embedding"] == second["embedding"]
    assert [drop["reason"] for drop in dropped(cluster)] == ["no_instance"] * 2


def test_a_folder_without_lines_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "asked" / "a.csv").write_text("a")
    with pytest.raises(ConfigError, match="no line in any"):
        answered(cluster)


def dropped(cluster: Cluster) -> list[dict]:
    return sorted(read_drops(Artifact(cluster.root, "predictions/a/v1")).to_pylist(), key=lambda drop: drop["id"])


def test_every_chip_is_embedded_as_its_index_is_or_scored_for_texts(tmp_path: Path, root: str) -> None:
    make_chips(root)
    make_scaled_model(root)
    cluster = tiny_cluster(root, data_root=str(tmp_path))
    embedder = load_embedder(root, MODEL)
    chips = open_table(root, CHIPS).to_table(["id", "image"]).to_pylist()
    squares = [read_square(chip["image"], embedder.image_size, GSD_M) for chip in chips]
    pixels, metres = zip(*squares, strict=True)
    images_IE = embedder.embed_images(list(pixels), list(metres))
    texts = ["a road", "water", "a road"]
    for asked, name, expected in (
        ([], "embedding", images_IE),
        (texts, "scores", images_IE @ embedder.embed_texts(texts).T),
    ):
        output = f"predictions/{name}/v1"
        config = PredictConfig(output=output, model=MODEL, chips=CHIPS, texts=asked, rows_per_shard=25)
        artifact = Artifact(root, output)
        counts = run_plain(*predict_pipeline(config, cluster, artifact))
        assert counts["kept"] == len(chips)
        write_jsonl(artifact, config.rows_per_shard)
        files = sorted(Path(artifact.path("predictions")).glob("*.jsonl"))
        found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert [row["id"] for row in found] == [chip["id"] for chip in chips]
        assert np.allclose([row[name] for row in found], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of instances, chips"),
        ({"chips": CHIPS, "instances": "asked"}, "exactly one"),
        ({"instances": "asked", "texts": ["a"]}, "texts are for chips"),
        ({"chips": "index/a/v1"}, "kind chips"),
    ],
)
def test_a_recipe_asks_one_thing(given: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(PredictConfig, {"output": "predictions/a/v1", "model": MODEL} | given, "r.yaml")
