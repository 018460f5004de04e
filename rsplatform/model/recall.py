"""Recall at k, image to text and text to image, from embeddings alone.

In: image and text embeddings and the image that each text describes. Out: percentages, and what chance would
give. It knows no model and no data set, and never holds the whole IxT table.
Shapes: I images, T texts, D embedding width.
"""

import math
from collections.abc import Sequence

import numpy as np

# Scores are computed in float64, where rounding stays below 1e-14; so scores of equal embeddings that leave
# the matrix product by different kernels still tie.
TIE_TOLERANCE = 1e-9
CHUNK_SCORES = 8_000_000


def recall_at_k(
    image_embeddings_ID: np.ndarray,
    text_embeddings_TD: np.ndarray,
    image_of_text_T: np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall in percent by cosine: i2t_r{k}, t2i_r{k} for each k and their mean, mean_recall.

    Text to image: a hit if fewer than k other images score at least as high as the text's own image. Image to
    text: any text of the image is a hit, so fewer than k texts of other images score at least as high as its
    best own one. Ties count against the model: constant embeddings score 0 as soon as there are k others.
    Images without a text ask no image-to-text question, but stay as distractors.

    Raises ValueError for NaN or infinite embeddings, empty or unfitting inputs, an index out of range, or k <
    1.
    """
    images_ID = unit_rows(image_embeddings_ID, "image_embeddings_ID")
    texts_TD = unit_rows(text_embeddings_TD, "text_embeddings_TD")
    image_of_text_T = _checked_index(image_of_text_T, images_ID, texts_TD, ks)

    own_score_T = np.einsum("td,td->t", images_ID[image_of_text_T], texts_TD)
    best_own_I = np.full(len(images_ID), -np.inf)
    np.maximum.at(best_own_I, image_of_text_T, own_score_T)
    own_among_best_T = own_score_T >= best_own_I[image_of_text_T] - TIE_TOLERANCE
    at_least_best_I = -np.bincount(image_of_text_T, weights=own_among_best_T, minlength=len(images_ID))
    at_least_own_T = -np.ones(len(texts_TD))  # the own image reaches its own score and does not count
    rows = max(1, CHUNK_SCORES // len(texts_TD))
    for start in range(0, len(images_ID), rows):
        chunk = slice(start, start + rows)
        scores_IT = images_ID[chunk] @ texts_TD.T
        at_least_own_T += (scores_IT >= own_score_T - TIE_TOLERANCE).sum(axis=0)
        at_least_best_I[chunk] += (scores_IT >= best_own_I[chunk, None] - TIE_TOLERANCE).sum(axis=1)
    asked_I = np.isfinite(best_own_I)
    return _percentages(
        {k: float((at_least_best_I[asked_I] < k).mean()) for k in ks},
        {k: float((at_least_own_T < k).mean()) for k in ks},
    )


def chance_recall(num_images: int, num_texts: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Expected recall of a random ranking, in percent under the keys of `recall_at_k`.

    Texts are spread over the images as evenly as they go. An image with m texts is hit by chance with
    probability 1 - C(T - m, k) / C(T, k). Raises ValueError for counts or k below 1.
    """
    if min(num_images, num_texts, *ks) < 1:
        raise ValueError(f"counts and k must be at least 1, got {num_images} images, {num_texts} texts, ks {ks}")
    fewest, images_with_one_more = divmod(num_texts, num_images)
    counts = {fewest: num_images - images_with_one_more, fewest + 1: images_with_one_more}
    asked = {texts: images for texts, images in counts.items() if texts > 0 and images > 0}

    def image_to_text(k: int) -> float:
        hits = sum(images * _chance_of_any(num_texts, texts, k) for texts, images in asked.items())
        return hits / sum(asked.values())

    return _percentages({k: image_to_text(k) for k in ks}, {k: min(1.0, k / num_images) for k in ks})


def _chance_of_any(num_texts: int, own_texts: int, k: int) -> float:
    if k > num_texts - own_texts:
        return 1.0
    return 1.0 - math.comb(num_texts - own_texts, k) / math.comb(num_texts, k)


def _percentages(image_to_text: dict[int, float], text_to_image: dict[int, float]) -> dict[str, float]:
    recalls = {f"i2t_r{k}": 100 * share for k, share in image_to_text.items()}
    recalls |= {f"t2i_r{k}": 100 * share for k, share in text_to_image.items()}
    return recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}


def unit_rows(embeddings: np.ndarray, name: str) -> np.ndarray:
    """Rows of length one in float64 (zeros stay). Raises ValueError naming the first NaN or infinite row."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name} must be a non-empty table of (rows, width), got shape {rows.shape}")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinity in {bad.sum()} rows, the first is row {int(bad.argmax())}")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


def _checked_index(
    image_of_text_T: np.ndarray | Sequence[int],
    images_ID: np.ndarray,
    texts_TD: np.ndarray,
    ks: Sequence[int],
) -> np.ndarray:
    index_T = np.asarray(image_of_text_T)
    if images_ID.shape[1] != texts_TD.shape[1]:
        raise ValueError(f"images have width {images_ID.shape[1]} but texts have {texts_TD.shape[1]}")
    if index_T.shape != (len(texts_TD),) or not np.issubdtype(index_T.dtype, np.integer):
        raise ValueError(
            f"image_of_text_T must hold one integer for each of {len(texts_TD)} texts, got {index_T.shape}"
        )
    if index_T.min() < 0 or index_T.max() >= len(images_ID):
        raise ValueError(f"image_of_text_T must lie in 0…{len(images_ID) - 1}, got {index_T.min()}…{index_T.max()}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be one or more ranks of at least 1, got {ks}")
    return index_T
