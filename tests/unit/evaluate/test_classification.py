"""Zero-shot accuracy equals counting by hand; ties are misses; the prompt is used to the letter."""

import numpy as np
import pytest

from rsplatform.evaluate.classification import BATCH_IMAGES, zero_shot_accuracy

NAMES = ("airport", "stadium", "harbour")


def texts_along_axes(prompts):
    assert tuple(prompts) == tuple(f"An aerial image of {name}" for name in NAMES)
    return 3.0 * np.eye(3)


def identity(images):
    return np.stack(images)


def test_counts_by_class_over_several_batches():
    generator = np.random.default_rng(0)
    images = generator.normal(size=(3 * BATCH_IMAGES + 7, 3))
    labels = generator.integers(0, 3, len(images))
    scores = zero_shot_accuracy(identity, texts_along_axes, iter(images), labels, NAMES)
    correct = images.argmax(axis=1) == labels
    assert scores.top1 == pytest.approx(100 * correct.mean())
    assert scores.accuracy_by_class["stadium"] == pytest.approx(100 * correct[labels == 1].mean())
    assert scores.mean_class_accuracy == pytest.approx(np.mean([*scores.accuracy_by_class.values()]))
    assert scores.num_images == len(images)


def test_ties_are_misses_and_absent_classes_have_no_accuracy():
    images = [np.array([1.0, 1.0, 0.0]), np.array([0.0, 2.0, 1.0]), np.zeros(3)]
    scores = zero_shot_accuracy(identity, texts_along_axes, images, [0, 1, 0], NAMES)
    assert scores.accuracy_by_class == {"airport": 0.0, "stadium": 100.0}


@pytest.mark.parametrize(
    ("images", "labels", "names", "prompt", "words"),
    [
        (np.eye(3), [0, 1], NAMES, "An aerial image of {class name}", "3 image embeddings for 2 labels"),
        (np.eye(3), [0, 1, 2, 0], NAMES, "An aerial image of {class name}", "3 images for 4"),
        (np.eye(3), [0, 1, 3], NAMES, "An aerial image of {class name}", "0…2"),
        (np.full((3, 3), np.nan), [0, 1, 2], NAMES, "An aerial image of {class name}", "NaN"),
        (np.eye(3), [0, 1, 1], ("a", "b", "a"), "An aerial image of {class name}", "different"),
        (np.eye(3), [0, 1, 2], NAMES, "An aerial image of {}", "must contain"),
    ],
)
def test_bad_input_is_named(images, labels, names, prompt, words):
    with pytest.raises(ValueError, match=words):
        zero_shot_accuracy(identity, lambda texts: np.eye(3)[: len(texts)], images, labels, names, prompt)
