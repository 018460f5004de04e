"""The self-training job on a small random model: rounds, bad input, and no mask in reach."""

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
import tiny_service
import torch

from rsplatform import storage, tracking
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.localize.pseudo_labels import PseudoLabelRule, patch_loss
from rsplatform.localize.run import Sought
from rsplatform.localize.self_train import Lesson, SelfTrainConfig, chip_pictures, lesson_loss, self_train
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.localize.teacher import TeacherLabels, view_maps
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import Square, decode_image, square
from rsplatform.records import CHIP_SCHEMA, SAMPLE_SCHEMA
from rsplatform.train.guard import DamagedDataError

CLASSES = [Sought(name="stadium", prompts=["a stadium"]), Sought(name="harbour", prompts=["harbour and water"])]
BACKGROUND = ["an aerial image of a field"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    return Cluster(root=str(root), data_root=str(root))


def test_views_are_turned_back_into_the_pictures_own_frame(cluster: Cluster) -> None:
    """A picture that is its own mirror image in both axes gives the same map in every view."""
    embedder = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    quarter = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    half = np.concatenate([quarter, quarter[::-1]])
    symmetric = np.concatenate([half, half[:, ::-1]], axis=1)
    texts = torch.from_numpy(embedder.embed_texts(["a stadium", "harbour and water"]))
    maps_VBPHW = view_maps(embedder, [square(symmetric, 64)], texts, 3)
    assert torch.equal(maps_VBPHW[0], maps_VBPHW[1].flip(-2))
    assert maps_VBPHW.shape == (4, 1, 2, 8, 8)


def test_views_are_made_where_the_model_is(cluster: Cluster) -> None:
    elsewhere = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model", "meta")
    black = square(np.zeros((64, 64, 3), dtype=np.uint8), 64)
    maps_VBPHW = view_maps(elsewhere, [black], torch.ones(2, elsewhere.embedding_width), 3)
    assert maps_VBPHW.device.type == "meta" and maps_VBPHW.shape == (4, 1, 2, 8, 8)


def test_the_teacher_knows_the_scale_of_each_chip(tmp_path: Path) -> None:
    """Its maps are those of the embedder's patch features at the chip's own distance, as resizing leaves it."""
    root = str(tmp_path)
    tiny_service.make_scaled_model(root)
    embedder = Embedder.load(tmp_path / tiny_service.MODEL / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    distances_m = [0.5, 6.0, None, 2.0] * 6
    rows = [
        {"id": f"chip-{n}", "image": tiny_service.jpeg(pixels), "split": "train", "ground_sample_distance_m": metres}
        for n, metres in enumerate(distances_m)
    ]
    lance.write_dataset(pa.Table.from_pylist(rows, schema=CHIP_SCHEMA), f"{root}/chips/plain/v1/chips.lance")
    tiny_service.finish(root, "chips/plain/v1")
    pictures = chip_pictures(plain_course(), Cluster(root=root), embedder.image_size)
    seen_m = [picture.ground_sample_distance_m for picture in pictures.held_out]
    np.testing.assert_array_equal(seen_m, [1.0, np.nan, 1.0])  # chips 0, 10 and 20, of half as many pixels
    texts = torch.from_numpy(embedder.embed_texts(["a stadium", "harbour and water"]))
    maps_BPHW = view_maps(embedder, pictures.held_out + pictures.train[:1], texts, 3)[0]
    image_BHWC = torch.from_numpy(square(decode_image(rows[0]["image"]), 32).pixels_HWC)[None]
    for map_PHW, distance_m in zip(maps_BPHW, [1.0, float("nan"), 1.0, 12.0], strict=True):
        features = embedder.patch_features(image_BHWC, distance_m)
        expected = smooth_attention(
            features.values_BHWD, texts, head=embedder.head, scores_BHW=features.scores_BKHW, window=3
        )
        torch.testing.assert_close(map_PHW, expected[0], atol=1e-5, rtol=0)
    assert all((maps_BPHW[a] - maps_BPHW[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 3), (1, 3)))


def test_the_student_learns_at_the_scale_of_each_chip(tmp_path: Path) -> None:
    """The loss of a lesson is that of the pictures' patch features, each at its own distance."""
    tiny_service.make_scaled_model(str(tmp_path))
    embedder = Embedder.load(tmp_path / tiny_service.MODEL / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    labels_BHW = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    rule, prompts = PseudoLabelRule((0, 1), temperature=0.1), ["an aerial image of a field", "a stadium"]
    config = plain_course().model_copy(update={"batch_size": 2, "patch_loss_weight": 1.0})

    def loss(distances_m: list[float]) -> torch.Tensor:
        lesson = Lesson(prompts, rule, [Square(pixels, metres) for metres in distances_m], TeacherLabels(labels_BHW, 1))
        with torch.no_grad():
            return lesson_loss(config, embedder, lesson, 1)(embedder.model.eval(), 0)[0]

    images_BHWC = torch.from_numpy(np.stack([pixels, pixels]))
    values_BHWD = embedder.patch_features(images_BHWC, [0.5, 6.0]).values_BHWD
    texts_PE = torch.from_numpy(embedder.embed_texts(prompts))
    expected = patch_loss(embedder.head(values_BHWD), texts_PE, labels_BHW, 0.1, rule.class_of_prompt)
    torch.testing.assert_close(loss([0.5, 6.0]), expected, atol=1e-5, rtol=0)
    assert (loss([6.0, 0.5]) - expected).abs() > 1e-4


def plain_course() -> SelfTrainConfig:
    """The recipe of a course on chips/plain/v1."""
    refs = {"model": tiny_service.MODEL, "dataset": "dataset/plain/v1", "chips": "chips/plain/v1"}
    return SelfTrainConfig.model_validate(
        refs | {"output": "model/taught/v1", "classes": CLASSES, "background_prompts": BACKGROUND}
    )


@pytest.fixture(scope="module")
def course(cluster: Cluster) -> SelfTrainConfig:
    """Chips and a dataset of random pictures: the root holds no mask of any kind."""
    rng = np.random.default_rng(1)
    ids = [f"chip-{i}" for i in range(40)]
    images = [tiny_service.jpeg(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in ids]
    rows = [{"id": i, "image": image, "split": "train"} for i, image in zip(ids, images, strict=True)]
    samples = [
        {"id": i, "table": "chips/plain/v1", "row": n, "captions": ["a stadium"], "split": "train"}
        | {"source": "chips", "weight": 1.0}
        for n, i in enumerate(ids)
    ]
    for ref, table, schema, values in (
        ("chips/plain/v1", "chips.lance", CHIP_SCHEMA, rows),
        ("dataset/plain/v1", "samples.lance", SAMPLE_SCHEMA, samples),
    ):
        lance.write_dataset(pa.Table.from_pylist(values, schema=schema), f"{cluster.root}/{ref}/{table}")
        tiny_service.finish(cluster.root, ref)
    return plain_course().model_copy(update={"rounds": 2, "steps_per_round": 3, "batch_size": 8})


def test_rounds_run_without_any_mask_and_stop_when_agreement_falls(cluster: Cluster, course: SelfTrainConfig) -> None:
    artifact = self_train(course, cluster)
    history = storage.read_json(artifact.path("rounds.json"))
    assert 1 <= len(history) <= 2
    for entry in history:
        assert entry["kept"] == (entry["held_out_agreement"] >= entry["held_out_agreement_before"])
    assert all(entry["kept"] for entry in history[:-1])  # the first fall is the last round
    counts = artifact.manifest()["counts"]
    assert counts["inputs"] == counts["kept"] + sum(counts["dropped"].values()) == len(history)
    taught = Embedder.load(artifact.path("model"))
    untaught = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    assert (taught.model_hash != untaught.model_hash) == any(entry["kept"] for entry in history)
    assert not list(Path(cluster.root).rglob("*mask*.png"))


def test_a_damaged_chip_is_named(cluster: Cluster, course: SelfTrainConfig) -> None:
    table = f"{cluster.root}/chips/plain/v1/chips.lance"
    rows = lance.dataset(table).to_table().to_pylist()
    rows[7]["image"] = rows[7]["image"][:200]
    lance.write_dataset(pa.Table.from_pylist(rows, schema=CHIP_SCHEMA), f"{cluster.root}/chips/cut/v1/chips.lance")
    tiny_service.finish(cluster.root, "chips/cut/v1")
    changes = {"output": "model/taught/v3", "chips": "chips/cut/v1"}
    with pytest.raises(ConfigError, match=r"chips/cut/v1: the picture of chip 'chip-7' is unreadable: .*make"):
        self_train(course.model_copy(update=changes), cluster)


def test_a_failed_round_is_told_as_it_failed(
    cluster: Cluster, course: SelfTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever MLflow says when the round's run is to be closed."""
    rows = lance.dataset(f"{cluster.root}/chips/plain/v1/chips.lance").to_table().to_pylist()
    samples = lance.dataset(f"{cluster.root}/dataset/plain/v1/samples.lance").to_table().to_pylist()
    rows = [row | {"image": row["image"][:200]} for row in rows]
    samples = [sample | {"table": "chips/dark/v1"} for sample in samples]
    for ref, table, schema, values in (
        ("chips/dark/v1", "chips.lance", CHIP_SCHEMA, rows),
        ("dataset/dark/v1", "samples.lance", SAMPLE_SCHEMA, samples),
    ):
        lance.write_dataset(pa.Table.from_pylist(values, schema=schema), f"{cluster.root}/{ref}/{table}")
        tiny_service.finish(cluster.root, ref)

    def broken(run: tracking.Run, status: str) -> None:
        raise OSError(f"no {status} can be written")

    monkeypatch.setattr(tracking.Run, "end", broken)
    with pytest.raises(DamagedDataError, match="decoded"):
        self_train(course.model_copy(update={"output": "model/taught/v4", "dataset": "dataset/dark/v1"}), cluster)


def test_self_training_is_deterministic(cluster: Cluster, course: SelfTrainConfig) -> None:
    again = self_train(course.model_copy(update={"output": "model/taught/v2"}), cluster)
    first = storage.read_json(f"{cluster.root}/model/taught/v1/rounds.json")
    assert storage.read_json(again.path("rounds.json")) == first
