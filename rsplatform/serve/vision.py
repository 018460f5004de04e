"""The heavy work on pictures: maps, embeddings, captions; as a protocol, and in threads of this process.

In: pictures that were decoded once before (nothing here meets an unreadable one) and unit query vectors. app.py puts
the same work into replicas of its own, where pictures of different requests share a batch.
Shapes: I pictures, C queries, H W patch grid, E embedding, S side of the model's picture.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rsplatform.model.embedder import Embedder
from rsplatform.serve.captioning import greedy_captions
from rsplatform.serve.localization import Localization, Look

# Pictures of one batch of a forward; so many queries wait for it at most.
MAX_PICTURE_BATCH = 16


@dataclass(frozen=True)
class Described:
    """A picture to describe, and the metres that a pixel of it covers, NaN where unknown."""

    image: bytes
    ground_sample_distance_m: float


class VisionWork(Protocol):
    """The heavy work on pictures, here or in another replica."""

    async def maps(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """Maps (C, H, W) of each picture for each of its query vectors."""
        ...

    async def embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors (I, E) of pictures as the model sees them, uint8 (S, S, 3), of unknown scale."""
        ...

    async def caption(self, picture: Described) -> str:
        """The model's own words for a picture."""
        ...


class PictureModel:
    """The work itself, one batch at a time, blocking; the methods of VisionWork are these in threads or replicas."""

    def __init__(self, embedder: Embedder, window: int = 3) -> None:
        self.embedder = embedder
        self._localization = Localization(embedder, window)

    def look(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """See VisionWork.maps."""
        return self._localization.look(looks)

    def embed(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One vector (E,) a picture."""
        return list(self.embedder.embed_images(pixels))

    def captions(self, pictures: Sequence[Described]) -> list[str]:
        """See VisionWork.caption."""
        distances_m = [picture.ground_sample_distance_m for picture in pictures]
        return greedy_captions(self.embedder, [picture.image for picture in pictures], distances_m)


class LocalVisionWork:
    """`VisionWork` in threads of this process, without batching across requests."""

    def __init__(self, embedder: Embedder, window: int = 3) -> None:
        self._model = PictureModel(embedder, window)

    async def maps(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """See VisionWork."""
        return await asyncio.to_thread(self._model.look, looks)

    async def embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See VisionWork."""
        return np.stack(await asyncio.to_thread(self._model.embed, pixels))

    async def caption(self, picture: Described) -> str:
        """See VisionWork."""
        return (await asyncio.to_thread(self._model.captions, [picture]))[0]
