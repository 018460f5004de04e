"""The held-out pairs whose own text ranks worst, for a person to look at: wrong captions, look-alikes, blind spots.

In: what a validation has seen. Out: hardest.json below the run's folder, written anew by each validation, and in the
end one figure of it. Decides nothing about the training.
Shapes: P pairs, whose image and text share a row (B where a validation hands them over), E embedding, T tokens.
"""

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rsplatform import storage
from rsplatform.dataset.store import SampleStore
from rsplatform.model.preprocess import decode_image, resize_crop
from rsplatform.model.recall import TIE_TOLERANCE, unit_rows
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.validate import HeldOut

HARDEST_FILE = "hardest.json"
SHOWN_PAIRS = 12  # our default: what one screen shows
COLUMNS = 4
PICTURE_SIZE_PX = 256
LONGEST_CAPTION = 90  # characters; the rest is cut in the figure


@dataclass(frozen=True)
class HardPair:
    """A pair, the rank of its own text among all (1 is best) and the text that its picture agrees with most."""

    index: int
    rank: int
    own_cosine: float
    preferred: int
    preferred_cosine: float


def hardest_pairs(images_PE: np.ndarray, texts_PE: np.ndarray, count: int = SHOWN_PAIRS) -> list[HardPair]:
    """At most `count` pairs by the rank of their own text, worst first; of equal ranks the wider gap, then the order.

    Pairs whose own text is among the best are left out. Unlike recall, a tie is no preference here: many pictures share
    a caption word for word, and to show them as errors would teach nothing.

    Raises:
        ValueError: tables of another shape than each other, empty ones, NaN or infinity.
    """
    images_PE, texts_PE = unit_rows(images_PE, "images_PE"), unit_rows(texts_PE, "texts_PE")
    if images_PE.shape != texts_PE.shape:
        raise ValueError(f"images {images_PE.shape} and texts {texts_PE.shape} are no pairs: their shapes differ")
    cosines_PP = images_PE @ texts_PE.T
    own_P = cosines_PP.diagonal()
    rank_P = 1 + (cosines_PP > own_P[:, None] + TIE_TOLERANCE).sum(axis=1)
    preferred_P = cosines_PP.argmax(axis=1)
    best_P = cosines_PP.max(axis=1)
    order = np.lexsort((own_P - best_P, -rank_P))  # the last key counts first; stable
    return [
        HardPair(int(i), int(rank_P[i]), float(own_P[i]), int(preferred_P[i]), float(best_P[i]))
        for i in order[:count]
        if rank_P[i] > 1
    ]


def write_hardest(folder: str, tokenizer: Tokenizer, seen: HeldOut) -> None:
    """Write the hardest pairs of a validation to hardest.json; captions are as the model reads them."""
    captions = [tokenizer.decode(tokens_T.numpy()) for tokens_T in seen.tokens_T]
    rows = [
        {
            "sample_id": seen.sample_ids[pair.index],
            "caption": captions[pair.index],
            "own_cosine": pair.own_cosine,
            "rank": pair.rank,
            "num_pairs": len(captions),
            "preferred_caption": captions[pair.preferred],
            "preferred_cosine": pair.preferred_cosine,
        }
        for pair in hardest_pairs(seen.images_BE.numpy(), seen.texts_BE.numpy())
    ]
    storage.write_json(f"{folder}/{HARDEST_FILE}", rows)


def hardest_figure(folder: str, store: SampleStore) -> Figure | None:
    """The pictures of hardest.json, each under its caption and the one that the model prefers; None without a pair."""
    path = f"{folder}/{HARDEST_FILE}"
    rows: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
    if not rows:
        return None
    ids = store.all_ids()
    samples = store.read([ids.index(row["sample_id"]) for row in rows])
    num_rows = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 4.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, row, sample in zip(panels[: len(rows)], rows, samples, strict=True):
        axes.imshow(resize_crop(decode_image(sample.image), PICTURE_SIZE_PX))
        own = f"own, rank {row['rank']} of {row['num_pairs']}, {row['own_cosine']:.3f}:\n{_wrapped(row['caption'])}"
        other = f"preferred, {row['preferred_cosine']:.3f}:\n{_wrapped(row['preferred_caption'])}"
        axes.set_title(f"{own}\n{other}", fontsize=8, loc="left", parse_math=False)
    return figure


def _wrapped(caption: str) -> str:
    return textwrap.fill(textwrap.shorten(caption, LONGEST_CAPTION, placeholder=" …"), 46)
