"""The deterministic augmentation of a batch's pictures, and its captions as padded token ids.

In: decoded pictures and captions. Out: uint8 pictures of one size and token ids. Every random choice is drawn from
(seed, step, position in the global batch), so threads, ranks and restarts cannot change it. Moves nothing to a
device and does not normalise (model/normalise.py does). Shapes: B batch, H W pixels, C channels, T tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsplatform.model.preprocess import resize_crop
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.batch import bucket_width

# Captions that say where something lies, or which way it goes, would become wrong under a flip or a quarter turn.
_SIDE = r"(?:left|right|upper|lower|top|bottom)"
_COMPASS = r"(?:(?:north|south)[- ]?(?:east|west)|north|south|east|west)"
_DIRECTION = re.compile(
    rf"\b(?:{_SIDE}(?:[- ]?(?:most|hand|handed|side))?|(?:left|right|up|down)wards?"
    rf"|{_COMPASS}(?:ern(?:most)?|most|erly|wards?|bound|side)?"
    r"|vertical(?:ly)?|horizontal(?:ly)?|above|below|beneath|underneath"
    r"|(?:anti|counter)?[- ]?clockwise)\b",
    re.IGNORECASE,
)
# In capitals only: "se", "ne" and "sw" are words and abbreviations in other languages and on the web.
_COMPASS_LETTERS = re.compile(r"\b(?:[NS][EW]|[NS]{2}[EW]|[EW][NS][EW])\b")
# Random crops are cut from a larger copy of the picture, so that they are not blown up (our default).
CROP_HEADROOM = 1.25


@dataclass(frozen=True)
class Augmentation:
    """All our defaults [D]. `symmetries`: one of the 8 of the square, left out under captions with directions.

    `min_crop_area` < 1: a random square crop of at least that fraction of the picture's area, resized back.
    """

    symmetries: bool = True
    min_crop_area: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.min_crop_area <= 1.0:
            raise ValueError(f"augmentation.min_crop_area {self.min_crop_area} is not in (0, 1]")

    def source_size(self, image_size: int) -> int:
        """Side in pixels that pictures are kept at before augmentation."""
        return image_size if self.min_crop_area == 1.0 else round(image_size * CROP_HEADROOM)


NO_AUGMENTATION = Augmentation(symmetries=False)


def has_direction(caption: str) -> bool:
    """Whether a caption names a direction (left, northern, above, clockwise, …), which flips and turns would falsify.

    In doubt it does: a picture that stays upright costs less than a caption that lies.
    """
    return _DIRECTION.search(caption) is not None or _COMPASS_LETTERS.search(caption) is not None


def sample_rng(seed: int, step: int, position: int) -> np.random.Generator:
    """The random source of one place in one global batch."""
    return np.random.default_rng((seed, step, position))


def augment(
    image_HWC: np.ndarray, size: int, config: Augmentation, caption: str, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A (size, size, 3) uint8 view of the square `image_HWC`; the same rng state gives the same pixels.

    With it, how many pixels of the picture the side of one of its pixels covers: below 1, it shows more detail.
    """
    side = float(len(image_HWC))
    if config.min_crop_area < 1.0:
        side = len(image_HWC) * rng.uniform(config.min_crop_area, 1.0) ** 0.5
        left, top = rng.uniform(0.0, len(image_HWC) - side, size=2)
        box = (left, top, left + side, top + side)
        picture = Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BICUBIC, box=box)
        image_HWC = np.asarray(picture)
    else:  # larger where another phase wants larger pictures
        image_HWC = resize_crop(image_HWC, size)
    if config.symmetries and not has_direction(caption):
        image_HWC = square_symmetry(image_HWC, int(rng.integers(8)))
    return image_HWC, side / size


def square_symmetry(image_HWC: np.ndarray, index: int) -> np.ndarray:
    """One of the 8 symmetries of the square: `index % 4` quarter turns, then a flip if index >= 4."""
    turned = np.rot90(image_HWC, index % 4)
    return turned[:, ::-1] if index >= 4 else turned


def draw_caption(captions: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> str:
    """One of a sample's captions, in proportion to their weights; without weights each alike."""
    place = rng.random()
    if not weights:
        return captions[int(place * len(captions))]
    ends = np.cumsum(np.asarray(weights, dtype=np.float64))
    return captions[int(np.searchsorted(ends, place * ends[-1], side="right"))]


def pad_tokens(captions: Sequence[str], tokenizer: Tokenizer, context_length: int) -> Tensor:
    """Token ids (B, T): T is the longest caption's length rounded up to a multiple of 8, at most the context."""
    tokens_BT = tokenizer.encode(captions, context_length, pad_to_longest=True)
    padded_BT = np.zeros((len(tokens_BT), bucket_width(tokens_BT.shape[1], context_length)), dtype=np.int64)
    padded_BT[:, : tokens_BT.shape[1]] = tokens_BT
    return torch.from_numpy(padded_BT)
