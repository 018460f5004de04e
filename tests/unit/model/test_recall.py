"""Recall equals an obvious double loop, ties included; chance equals a simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.model import recall
from rsplatform.model.recall import chance_recall, recall_at_k


def slow_recall(images, texts, image_of_text, ks):
    """One question at a time, on exact integer vectors of equal norm."""
    text_to_image, image_to_text = [], []
    for text, own in enumerate(image_of_text):
        others = [image for image in range(len(images)) if image != own]
        text_to_image.append(sum(images[image] @ texts[text] >= images[own] @ texts[text] for image in others))
    for image in sorted(set(image_of_text)):
        best = max(images[image] @ texts[text] for text, own in enumerate(image_of_text) if own == image)
        foreign = [text for text, own in enumerate(image_of_text) if own != image]
        image_to_text.append(sum(images[image] @ texts[text] >= best for text in foreign))
    result = {f"i2t_r{k}": 100 * np.mean([rank < k for rank in image_to_text]) for k in ks}
    result |= {f"t2i_r{k}": 100 * np.mean([rank < k for rank in text_to_image]) for k in ks}
    return result | {"mean_recall": np.mean(list(result.values()))}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 7, 8_000_000]))
def test_equals_the_slow_version_with_many_ties(data, rows):
    num_images, num_texts = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 16))
    # Vectors of ±1 have one norm and few different products, so most questions have ties.
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4)
    images = np.array(data.draw(st.lists(signs, min_size=num_images, max_size=num_images)))
    texts = np.array(data.draw(st.lists(signs, min_size=num_texts, max_size=num_texts)))
    owners = st.lists(st.integers(0, num_images - 1), min_size=num_texts, max_size=num_texts)
    image_of_text = data.draw(owners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "CHUNK_SCORES", rows)
        found = recall_at_k(images.astype(np.float32), texts.astype(np.float32), image_of_text, (1, 2, 5))
    assert found == pytest.approx(slow_recall(images, texts, image_of_text, (1, 2, 5)))


def test_constant_embeddings_earn_nothing_and_perfect_ones_everything():
    image_of_text = np.repeat(np.arange(1000), 5)
    constant = recall_at_k(np.full((1000, 24), 0.3), np.full((5000, 24), 0.7), image_of_text)
    assert set(constant.values()) == {0.0}
    assert list(constant) == ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall"]
    images = np.random.default_rng(0).normal(size=(1000, 24))
    assert set(recall_at_k(images, images[image_of_text], image_of_text).values()) == {100.0}


def test_lengths_do_not_matter_and_an_image_without_texts_only_distracts():
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    texts = np.array([[5.0, 0.1], [0.0, 0.2]])
    found = recall_at_k(images, texts, [0, 1], ks=(1,))
    assert found == {"i2t_r1": 100.0, "t2i_r1": 100.0, "mean_recall": 100.0}
    assert recall_at_k(images, texts[::-1], [0, 1], ks=(1,))["t2i_r1"] == 0.0


def test_chance_is_what_random_rankings_give():
    generator = np.random.default_rng(1)
    image_of_text = np.arange(52) % 12
    drawn = [
        recall_at_k(generator.normal(size=(12, 60)), generator.normal(size=(52, 60)), image_of_text, (1, 5))
        for _ in range(400)
    ]
    for name, expected in chance_recall(12, 52, (1, 5)).items():
        assert np.mean([recall[name] for recall in drawn]) == pytest.approx(expected, abs=2.5)
    assert chance_recall(1094, 5470)["t2i_r10"] == pytest.approx(1000 / 1094)


@pytest.mark.parametrize(
    ("images", "texts", "owners", "ks", "words"),
    [
        (np.array([[np.nan, 1.0]]), np.ones((1, 2)), [0], (1,), "image_embeddings_ID holds NaN"),
        (np.ones((1, 2)), np.array([[np.inf, 1.0]]), [0], (1,), "text_embeddings_TD holds NaN or infinity"),
        (np.ones((1, 2)), np.ones((1, 3)), [0], (1,), "width"),
        (np.ones((2, 2)), np.ones((1, 2)), [2], (1,), "0…1"),
        (np.ones((2, 2)), np.ones((1, 2)), [-1], (1,), "0…1"),
        (np.ones((2, 2)), np.ones((2, 2)), [0], (1,), "one integer"),
        (np.ones((2, 2)), np.ones((1, 2)), [0.5], (1,), "one integer"),
        (np.ones((0, 2)), np.ones((1, 2)), [0], (1,), "non-empty"),
        (np.ones((2, 2)), np.ones((1, 2)), [0], (0,), "ks"),
    ],
)
def test_bad_input_is_named(images, texts, owners, ks, words):
    with pytest.raises(ValueError, match=words):
        recall_at_k(images, texts, owners, ks)
