"""The evaluate job on a small random model: report, pins, and the pictures that MLflow gets."""

import json
import math
import shutil
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
import tiny_service
from PIL import Image

from rsplatform import storage
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, load_config, validate
from rsplatform.evaluate.benchmarks import CaptionFolderRetrieval, DatasetRetrieval, load_retrieval
from rsplatform.evaluate.run import EvaluateConfig, evaluate, retrieval_images
from rsplatform.index.embed import load_embedder
from rsplatform.records import SAMPLE_SCHEMA

REPOSITORY = Path(__file__).resolve().parents[3]
CLASSES = [
    {"name": "land", "values": [0], "prompts": ["a field"]},
    {"name": "port", "values": [1], "prompts": ["harbour and water", "a harbour"]},
]
BENCHMARKS = [
    {"type": "caption_folder_retrieval", "name": "pairs", "captions": "captions.json", "images": "images"},
    {"type": "classification", "name": "kinds", "folder": "."},
    {
        "type": "segmentation",
        "name": "masks",
        "folder": ".",
        "images": "images/*.jpg",
        "mask_replace": {"images/": "masks/", ".jpg": ".tif"},
        "classes": CLASSES,
        "model_ground_sample_distance_m": 1.0,
        "image_ground_sample_distance_m": 0.9,
        "nearest_colour_from": "images/*.jpg",
    },
]
NUM_PICTURES = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A random model, and noisy pictures with captions, labels and masks."""
    root, data = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("data")
    tiny_service.make_model(str(root))
    rng = np.random.default_rng(0)
    (data / "images").mkdir()
    (data / "masks").mkdir()
    for index in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        (data / f"images/{index}.jpg").write_bytes(tiny_service.jpeg(pixels))
        Image.fromarray(rng.integers(0, 2, (70, 90), dtype=np.uint8)).save(data / f"masks/{index}.tif")
    entries = [
        {"filename": f"{index}.jpg", "split": "val", "sentences": [{"raw": f"a field {index}"}]}
        for index in range(NUM_PICTURES)
    ]
    (data / "captions.json").write_text(json.dumps({"images": entries}))
    lines = [f"images/{index}.jpg,{'port' if index % 2 else 'field'}" for index in range(NUM_PICTURES)]
    (data / "labels.csv").write_text("\n".join(["file,label", *lines]))
    return Cluster(root=str(root), data_root=str(data))


def config(**changes: object) -> EvaluateConfig:
    values = {"output": "evaluation/a/v1", "model": tiny_service.MODEL, "benchmarks": BENCHMARKS}
    return validate(EvaluateConfig, values | changes, "test")


def test_numbers_pins_and_pictures_of_every_benchmark_are_kept(cluster: Cluster) -> None:
    artifact = evaluate(config(), cluster)
    report = storage.read_json(artifact.path("report.json"))["benchmarks"]
    assert {name: scores["num_images"] for name, scores in report.items()} == dict.fromkeys(
        ("pairs", "kinds", "masks"), NUM_PICTURES
    )
    assert all(len(scores["pin"]) == 12 for scores in report.values())
    metrics = artifact.manifest()["metrics"]
    assert metrics["pairs/mean_recall"] == report["pairs"]["mean_recall"]
    assert {"kinds/top1", "masks/raw_miou", "masks/smooth_miou", "masks/nearest_colour_miou"} <= set(metrics)
    logged = storage.list_files(f"{cluster.root}/mlflow-artifacts/{artifact.manifest()['mlflow_run_id']}/artifacts")
    overlays = [f"masks/{index}.jpg.png" for index in range(NUM_PICTURES)]
    heatmaps = [f"masks/{index}.jpg_port_heat.png" for index in range(NUM_PICTURES)]
    expected = {"pairs_recall.png", "kinds_classes.png", *overlays, *heatmaps, "report.json", "manifest.json"}
    assert set(logged) == expected
    assert all(logged[name] > 1000 for name in expected if name.endswith(".png"))


def test_several_scales_are_one_more_method_and_part_of_the_pin(cluster: Cluster) -> None:
    """The shipped recipe's scales, on other masks; the other methods stay as they are."""
    shipped = load_config(EvaluateConfig, REPOSITORY / "configs/evaluate/world_scales.yaml")
    reports = []
    for version, scales in (("v1", []), ("v2", shipped.scales)):
        changes = {"benchmarks": [BENCHMARKS[2]], "scales": scales, "output": f"evaluation/scales/{version}"}
        reports.append(
            storage.read_json(evaluate(config(**changes), cluster).path("report.json"))["benchmarks"]["masks"]
        )
    alone, beside = reports
    assert "multi_scale_miou" not in alone and 0 <= beside["multi_scale_miou"] <= 100
    assert all(beside[name] == alone[name] for name in ("raw_miou", "smooth_miou"))
    assert beside["pin"] != alone["pin"]


def test_a_damaged_picture_stops_the_job_with_its_name(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(cluster.data_root or "", data)
    (data / "images/1.jpg").write_bytes((data / "images/1.jpg").read_bytes()[:600])
    damaged = cluster.model_copy(update={"data_root": str(data)})
    for number, benchmark in enumerate(BENCHMARKS):
        with pytest.raises(ConfigError, match=r"images/1\.jpg: unreadable: "):
            evaluate(config(output=f"evaluation/b/v{number}", benchmarks=[benchmark]), damaged)


def test_retrieval_tells_the_model_the_scale_of_each_picture(cluster: Cluster, tmp_path: Path) -> None:
    """Vectors are those of `embed_images` at each sample's distance; files beside captions have none."""
    scaled = Cluster(root=str(tmp_path), data_root=cluster.data_root)
    tiny_service.make_scaled_model(scaled.root)
    tiny_service.make_chips(scaled.root)
    distances_m = [5.0, 0.5, math.nan]
    rows = [
        {"id": f"sample-{9 - n}", "table": tiny_service.CHIPS, "row": n, "captions": ["a field"], "split": "val"}
        | {"source": "chips", "weight": 1.0, "ground_sample_distance_m": metres}
        for n, metres in enumerate(distances_m)
    ]
    table = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
    lance.write_dataset(table, str(tmp_path / "dataset/a/v1/samples.lance"))
    tiny_service.finish(scaled.root, "dataset/a/v1")
    embedder = load_embedder(scaled.root, tiny_service.MODEL)
    data = load_retrieval(DatasetRetrieval(name="own", dataset="dataset/a/v1"), scaled)
    np.testing.assert_array_equal(data.ground_sample_distances_m, distances_m[::-1])  # in order of the ids
    found_IE = retrieval_images(data, embedder, "own")
    np.testing.assert_allclose(found_IE, embedder.embed_images(data.images, distances_m[::-1]), atol=1e-6)
    blind_IE = embedder.embed_images(data.images)
    assert (np.abs(found_IE - blind_IE).max(axis=1) > 0.01).tolist() == [False, True, True]
    folder = CaptionFolderRetrieval(name="pairs", captions="captions.json", images="images")
    others = load_retrieval(folder, scaled)
    np.testing.assert_allclose(
        retrieval_images(others, embedder, "pairs"), embedder.embed_images(others.images), atol=1e-6
    )
