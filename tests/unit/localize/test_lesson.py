"""One round's lesson: views that must agree, captions that rule classes out, and the loss at each chip's own scale."""

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
import tiny_service
import torch

from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, validate
from rsplatform.localize.lesson import (
    Lesson,
    LessonConfig,
    captions_by_id,
    chip_pictures,
    lesson_loss,
    possible_classes,
    turned_batch,
)
from rsplatform.localize.pseudo_labels import PseudoLabelRule, class_weights, map_loss
from rsplatform.localize.run import Sought
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.localize.teacher import VIEWS, TeacherLabels, View, teach, view_maps
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import Square, decode_image, square
from rsplatform.records import CHIP_SCHEMA, SAMPLE_SCHEMA

CLASSES = [Sought(name="stadium", prompts=["a stadium"]), Sought(name="harbour", prompts=["harbour and water"])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    return Cluster(root=str(root), data_root=str(root))


def lesson_config() -> LessonConfig:
    """On chips/plain/v1."""
    refs = {"model": tiny_service.MODEL, "dataset": "dataset/plain/v1", "chips": "chips/plain/v1"}
    own = {"output": "model/taught/v1", "classes": CLASSES, "background_prompts": ["an aerial image of a field"]}
    return LessonConfig.model_validate(refs | own)


@pytest.mark.parametrize("view", [view for view in VIEWS if view.scale == 1.0] + [View(3, True)])
def test_views_are_turned_back_into_the_pictures_own_frame(cluster: Cluster, view: View) -> None:
    """A view's map is the map of the turned picture, turned back."""
    embedder = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    turned = np.rot90(pixels, view.quarter_turns)
    turned = turned[:, ::-1] if view.is_mirrored else turned
    texts = torch.from_numpy(embedder.embed_texts(["a stadium", "harbour and water"]))
    (seen,) = view_maps(embedder, [square(pixels, 64)], texts, 3, [view])
    (plain,) = view_maps(embedder, [square(np.ascontiguousarray(turned), 64)], texts, 3, [View()])
    again = np.rot90(plain.flip(-1) if view.is_mirrored else plain, -view.quarter_turns, (-2, -1))
    assert np.array_equal(seen, again)
    assert not np.array_equal(seen, plain) or view == View()


def test_a_view_at_another_size_tells_the_model_and_comes_back_to_the_grid(tmp_path: Path) -> None:
    tiny_service.make_scaled_model(str(tmp_path))
    embedder = Embedder.load(tmp_path / tiny_service.MODEL / "model")
    flat = Square(np.full((32, 32, 3), 90, np.uint8), 3.0)  # of one colour: resizing changes nothing but the distance
    texts = torch.from_numpy(embedder.embed_texts(["a stadium", "harbour and water"]))
    (seen,) = view_maps(embedder, [flat], texts, 3, [View(scale=2.0)])
    features = embedder.patch_features(torch.full((1, 64, 64, 3), 90, dtype=torch.uint8), 1.5)
    expected = smooth_attention(features.values_BHWD, texts, head=embedder.head, scores_BHW=features.scores_BKHW)
    assert seen.shape == (1, 2, 4, 4)
    torch.testing.assert_close(seen.mean((2, 3)), expected.mean((2, 3)), atol=0.02, rtol=0)


def test_only_patches_on_which_all_views_agree_are_labelled(cluster: Cluster) -> None:
    embedder = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    rng = np.random.default_rng(0)
    pictures = [Square(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), 2.0) for _ in range(4)]
    texts = torch.from_numpy(embedder.embed_texts(["a field", "a stadium", "harbour and water"]))
    rule = PseudoLabelRule((0, 1, 2), temperature=0.001, top_share=1.0, balance=1e9)
    labels = teach(embedder, pictures, texts, rule, 3)
    best_VBHW = view_maps(embedder, pictures, texts, 3).argmax(2)
    agrees = (best_VBHW == best_VBHW[0]).all(0)
    assert 0 < agrees.float().mean() < 1
    assert labels.agreement == pytest.approx(float(agrees.float().mean()))
    assert labels.agreement_B.tolist() == pytest.approx(agrees.float().mean((1, 2)).tolist())
    assert labels.labels_BHW[~agrees].eq(-1).all() and labels.labelled_fraction > 0


def test_what_no_caption_names_is_not_labelled_unless_it_is_novel(cluster: Cluster) -> None:
    captions = {"a": ["an aerial image of two stadiums"], "b": ["Harbours and a road"], "c": ["a road"]}
    possible = possible_classes(CLASSES, captions, ["a", "b", "c", "without captions"])
    assert possible.tolist() == [[True, True, False], [True, False, True], [True, False, False], [True, True, True]]
    novel = possible_classes([*CLASSES, Sought(name="runway", prompts=["a runway"])], captions, ["a", "c"])
    assert novel[:, 3].tolist() == [True, True]
    embedder = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    rng = np.random.default_rng(0)
    pictures = [Square(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), 2.0) for _ in range(4)]
    texts = torch.from_numpy(embedder.embed_texts(["a field", "a stadium", "harbour and water"]))
    rule = PseudoLabelRule((0, 1, 2), temperature=0.001, top_share=1.0, balance=1e9)
    labels = teach(embedder, pictures, texts, rule, 3, possible).labels_BHW
    for picture in range(4):
        assert not set(labels[picture].unique().tolist()) - {-1} - set(possible[picture].nonzero().flatten().tolist())
    with pytest.raises(ValueError, match="possible_BC"):
        teach(embedder, pictures, texts, rule, 3, possible[:, :2])


def test_words_beside_other_pictures_make_no_class_known(tmp_path: Path) -> None:
    texts = {"chips/plain/v1": "a road", "web_pairs/plain/v1": "a stadium"}
    rows = [
        {
            "id": f"{table}-0",
            "table": table,
            "row": 0,
            "captions": [text],
            "split": "train",
            "source": "",
            "weight": 1.0,
        }
        for table, text in texts.items()
    ]
    samples = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
    lance.write_dataset(samples, f"{tmp_path}/dataset/plain/v1/samples.lance")
    tiny_service.finish(str(tmp_path), "dataset/plain/v1")
    captions = captions_by_id(str(tmp_path), lesson_config())
    assert captions == {"chips/plain/v1-0": ["a road"]}
    assert possible_classes(CLASSES, captions, list(captions)).all()


def test_background_prompts_without_words_are_refused() -> None:
    values = lesson_config().model_dump() | {"background_prompts": ["a field", " "]}
    with pytest.raises(ConfigError, match=r"r\.yaml: background_prompts\.1: .*an empty text asks for nothing"):
        validate(LessonConfig, values, "r.yaml")


def test_views_are_made_where_the_model_is(cluster: Cluster) -> None:
    elsewhere = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model", "meta")
    black = square(np.zeros((64, 64, 3), dtype=np.uint8), 64)
    maps_VBPHW = view_maps(elsewhere, [black], torch.ones(2, elsewhere.embedding_width), 3)
    assert maps_VBPHW.device.type == "meta" and maps_VBPHW.shape == (len(VIEWS), 1, 2, 8, 8)


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
    pictures = chip_pictures(lesson_config(), root, embedder.image_size)
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
    """The loss of a lesson is that of the pictures' raw and smooth maps, each picture at its own distance.

    Pictures and labels are their own mirror images in all 8 ways, so that no turn changes them.
    """
    tiny_service.make_scaled_model(str(tmp_path))
    embedder = Embedder.load(tmp_path / tiny_service.MODEL / "model")
    pixels = symmetric(np.random.default_rng(0).integers(0, 120, (32, 32, 3), dtype=np.uint8))
    labels_HW = torch.from_numpy(symmetric(np.random.default_rng(1).integers(0, 9, (4, 4))) % 2)
    labels_BHW = torch.stack([labels_HW, 1 - labels_HW])
    rule, prompts = PseudoLabelRule((0, 1), temperature=0.1), ["an aerial image of a field", "a stadium"]
    config = lesson_config().model_copy(update={"batch_size": 2, "patch_loss_weight": 1.0})

    def loss(distances_m: list[float]) -> torch.Tensor:
        lesson = Lesson(
            prompts, rule, [Square(pixels, metres) for metres in distances_m], TeacherLabels(labels_BHW, torch.ones(2))
        )
        with torch.no_grad():
            return lesson_loss(config, embedder, lesson, 1)(embedder.model.eval(), 0)[0]

    features = embedder.patch_features(torch.from_numpy(np.stack([pixels, pixels])), [0.5, 6.0])
    texts_PE = torch.from_numpy(embedder.embed_texts(prompts))
    maps = [
        smooth_attention(
            features.values_BHWD, texts_PE, head=embedder.head, scores_BHW=features.scores_BKHW, window=window
        )
        for window in (1, 3)
    ]
    weights_C = class_weights(labels_BHW, 2)
    expected = torch.stack([map_loss(maps_BPHW, labels_BHW, (0, 1), 0.1, weights_C) for maps_BPHW in maps]).mean()
    torch.testing.assert_close(loss([0.5, 6.0]), expected, atol=1e-5, rtol=0)
    assert (loss([6.0, 0.5]) - expected).abs() > 1e-4


def symmetric(values: np.ndarray) -> np.ndarray:
    """The sum over the 8 symmetries of the square, of the values' own type."""
    turned = [np.rot90(values, turns) // 8 for turns in range(4)]
    return sum((each // 1 + each[:, ::-1] for each in turned), np.zeros_like(values)).astype(values.dtype)


def test_pictures_and_labels_are_turned_together() -> None:
    """Labels that say which patches of a picture are bright still do so after every turn."""
    bright = np.random.default_rng(0).integers(0, 2, (8, 8))
    pixels = np.repeat(np.repeat(bright, 8, 0), 8, 1)[..., None].repeat(3, 2).astype(np.uint8) * 200
    rule = PseudoLabelRule((0, 1), temperature=0.1)
    labels = TeacherLabels(torch.from_numpy(bright)[None], torch.ones(1))
    lesson = Lesson(["a field", "a stadium"], rule, [Square(pixels, 2.0)], labels)
    images_BHWC, labels_BHW, distances_m = turned_batch(lesson, np.zeros(40, dtype=int), (0, 1))
    assert torch.equal((images_BHWC[:, ::8, ::8, 0] > 0).long(), labels_BHW) and distances_m == [2.0] * 40
    assert len({tuple(turned.flatten().tolist()) for turned in labels_BHW}) == 8
