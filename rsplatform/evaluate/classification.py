"""Zero-shot classification: the nearest class name by cosine.

In: two embedding functions, images, labels, class names. Out: top-1 accuracy, also by class, with the prompts
that were used. It knows no model; the prompt is the one of the paper [F in the recipe notes] and adds no
article.
Shapes: I images, C classes, E embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rsplatform.model.recall import TIE_TOLERANCE, unit_rows

PROMPT = "An aerial image of {class name}"
BATCH_IMAGES = 64


@dataclass(frozen=True)
class ClassificationScores:
    """Percentages; `mean_class_accuracy` weighs every class alike."""

    top1: float
    mean_class_accuracy: float
    accuracy_by_class: dict[str, float]
    num_images: int
    prompts: tuple[str, ...]


def class_prompts(class_names: Sequence[str], prompt: str = PROMPT) -> tuple[str, ...]:
    """One text per class. Raises ValueError for repeated or too few names or a prompt without its place."""
    if len(class_names) < 2 or len(set(class_names)) < len(class_names):
        raise ValueError(f"class_names must be two or more different names, got {list(class_names)}")
    if "{class name}" not in prompt:
        raise ValueError(f"prompt must contain '{{class name}}', got {prompt!r}")
    return tuple(prompt.replace("{class name}", name) for name in class_names)


def zero_shot_accuracy(
    embed_images: Callable[[Sequence], np.ndarray],
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    images: Iterable,
    labels: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    prompt: str = PROMPT,
) -> ClassificationScores:
    """Top-1 in percent. A tie with any other class counts against the model.

    `images` is whatever `embed_images` takes, read once in batches. Raises ValueError if images and labels
    differ in number, a label is no class, class names repeat, the prompt lacks its place, or an embedding is
    NaN or infinite.
    """
    labels_I = np.asarray(labels)
    num_classes = len(class_names)
    if labels_I.ndim != 1 or not labels_I.size or not 0 <= labels_I.min() <= labels_I.max() < num_classes:
        raise ValueError(f"labels must be one or more integers in 0…{num_classes - 1}, got {labels_I[:5]}…")
    prompts = class_prompts(class_names, prompt)
    texts_CE = unit_rows(embed_texts(prompts), "texts")
    correct = [
        _is_nearest(unit_rows(embed_images(batch), "images"), texts_CE, labels_I[start : start + len(batch)])
        for start, batch in _batches(images, len(labels_I))
    ]
    correct_I = np.concatenate(correct)
    by_class = {
        name: float(100 * correct_I[labels_I == label].mean())
        for label, name in enumerate(class_names)
        if (labels_I == label).any()
    }
    return ClassificationScores(
        top1=float(100 * correct_I.mean()),
        mean_class_accuracy=sum(by_class.values()) / len(by_class),
        accuracy_by_class=by_class,
        num_images=len(labels_I),
        prompts=prompts,
    )


def _batches(images: Iterable, expected: int) -> Iterator[tuple[int, list]]:
    iterator, start = iter(images), 0
    while batch := list(islice(iterator, BATCH_IMAGES)):
        yield start, batch
        start += len(batch)
        if start > expected:
            break
    if start != expected:
        raise ValueError(f"got {'more than ' if start > expected else ''}{start} images for {expected} labels")


def _is_nearest(images_IE: np.ndarray, texts_CE: np.ndarray, labels_I: np.ndarray) -> np.ndarray:
    if len(labels_I) != len(images_IE):
        raise ValueError(f"{len(images_IE)} image embeddings for {len(labels_I)} labels")
    cosines_IC = images_IE @ texts_CE.T
    own_I1 = np.take_along_axis(cosines_IC, labels_I[:, None], axis=1)
    return (cosines_IC >= own_I1 - TIE_TOLERANCE).sum(axis=1) == 1
