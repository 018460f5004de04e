"""Fingerprints of pictures: decoded pixels in; a content hash and a 256-bit difference hash out; near pairs found.

Content hash: sha256 of the picture at 32 px, equal for the same pixels in another file. Difference hash: neighbours
compared on a 17×16 grey grid, close for re-encoded or resized copies (our defaults). Decides nothing.
"""

import hashlib
from collections import defaultdict

import numpy as np
from PIL import Image

from rsplatform.model.preprocess import resize_crop

HASH_SIDE = 16
# Up to this many of 256 bits may differ between copies (our default).
NEAR_BITS = 10
_BANDS = 16


def content_hash(image_HWC: np.ndarray) -> str:
    """sha256 of the picture's pixels at 32 px."""
    return hashlib.sha256(resize_crop(image_HWC, 32).tobytes()).hexdigest()


def difference_hash(image_HWC: np.ndarray) -> bytes:
    """32 bytes: whether each cell of a 17×16 grey grid is darker than its right neighbour."""
    grey = Image.fromarray(image_HWC).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(grey).astype(np.int16)
    return np.packbits(values[:, 1:] > values[:, :-1]).tobytes()


class NearIndex:
    """Difference hashes seen so far; `find` gives the id of one within NEAR_BITS.

    With 16 bands of 16 bits, ten differing bits leave six bands equal: looking up equal bands misses nothing.
    """

    def __init__(self) -> None:
        self._bands: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
        self._hashes: list[np.ndarray] = []
        self._ids: list[str] = []

    def find(self, difference: bytes) -> str | None:
        """The id of a picture whose hash is near, None if there is none.

        A nearly flat picture (water, snow: almost no bit or every bit set) has no copies: its hash says nothing.
        """
        bits = np.unpackbits(np.frombuffer(difference, np.uint8))
        if not 2 * NEAR_BITS <= np.count_nonzero(bits) <= len(bits) - 2 * NEAR_BITS:
            return None
        seen = {number for band, part in self._parts(difference) for number in self._bands[band].get(part, ())}
        for number in sorted(seen):
            if np.count_nonzero(self._hashes[number] != bits) <= NEAR_BITS:
                return self._ids[number]
        return None

    def add(self, picture_id: str, difference: bytes) -> None:
        """Remember a picture."""
        for band, part in self._parts(difference):
            self._bands[band][part].append(len(self._ids))
        self._hashes.append(np.unpackbits(np.frombuffer(difference, np.uint8)))
        self._ids.append(picture_id)

    @staticmethod
    def _parts(difference: bytes) -> list[tuple[int, bytes]]:
        step = len(difference) // _BANDS
        return [(band, difference[band * step : (band + 1) * step]) for band in range(_BANDS)]
