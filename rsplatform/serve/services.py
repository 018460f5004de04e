"""What the routes call: search, localization, captions and tiles, as coroutines over the plain classes.

`encode_texts` and `VisionWork` are given from outside, so that the same code runs in one process (tests, a bare
server) and spread over replicas (app.py). Errors a caller can mend leave as `RequestError` with an HTTP status.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rasterio.errors import RasterioIOError

from rsplatform.index.store import Hit
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import decode_image
from rsplatform.serve.api import (
    MAX_IMAGE_PIXELS,
    CaptionRequest,
    CaptionResponse,
    EmbedRequest,
    EmbedResponse,
    LocalizeRequest,
    LocalizeResponse,
    SearchRequest,
    SearchResponse,
    TextMap,
    image_bytes,
)
from rsplatform.serve.captioning import greedy_caption
from rsplatform.serve.localization import Localization, find_peak, regions_geojson
from rsplatform.serve.predict import PredictRequest, PredictResponse, predictions
from rsplatform.serve.retrieval import Retrieval, heatmap_url
from rsplatform.serve.tiles import Tiles


class RequestError(Exception):
    """A request that cannot be answered; `status` is its HTTP status, `detail` says what to change."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class VisionWork(Protocol):
    """The heavy work on pictures, here or in another replica. Distances are metres a pixel, NaN where unknown."""

    async def maps(
        self, images: Sequence[bytes], queries_CE: np.ndarray, ground_sample_distances_m: Sequence[float]
    ) -> list[np.ndarray]:
        """Maps (C, H, W) of each picture for each query vector."""
        ...

    async def caption(self, image: bytes, ground_sample_distance_m: float) -> str:
        """The model's own words for a picture."""
        ...


class LocalVisionWork:
    """`VisionWork` in threads of this process."""

    def __init__(self, embedder: Embedder, window: int = 3) -> None:
        self.embedder = embedder
        self._localization = Localization(embedder, window)

    async def maps(
        self, images: Sequence[bytes], queries_CE: np.ndarray, ground_sample_distances_m: Sequence[float]
    ) -> list[np.ndarray]:
        """See VisionWork."""
        return await asyncio.to_thread(self._localization.maps, images, queries_CE, ground_sample_distances_m)

    async def caption(self, image: bytes, ground_sample_distance_m: float) -> str:
        """See VisionWork."""
        return await asyncio.to_thread(greedy_caption, self.embedder, image, ground_sample_distance_m)


EncodeText = Callable[[str], Awaitable[np.ndarray]]


@dataclass(frozen=True)
class Services:
    """One served model, index and set of scenes. `encode_text` gives the unit vector (E,) of a text."""

    retrieval: Retrieval
    tiles: Tiles
    encode_text: EncodeText
    vision: VisionWork

    async def search(self, request: SearchRequest) -> SearchResponse:
        """The k best chips; with `localize`, where in each of them."""
        vector_E = await self._query_vector(request.text, request.image, request.chip_id)
        hits = await asyncio.to_thread(self.retrieval.search, request, vector_E)
        results = [self.retrieval.result(hit, request) for hit in hits]
        if request.localize and hits:
            images = await asyncio.to_thread(self.retrieval.chip_images, hits)
            maps = await self.vision.maps(images, vector_E[None], [_distance_m(hit) for hit in hits])
            spots = [self.retrieval.spot(find_peak(m[0]), hit) for m, hit in zip(maps, hits, strict=True)]
            results = [r.model_copy(update={"spot": s}) for r, s in zip(results, spots, strict=True)]
        return SearchResponse(results=results, model_hash=self.model_hash)

    async def localize(self, request: LocalizeRequest) -> LocalizeResponse:
        """Where in a picture or chip the texts are."""
        if request.output == "geojson" and request.chip_id is None:
            raise RequestError(422, "an uploaded picture has no place on Earth: use a chip_id, or output scores")
        hit, image = await self._picture(request.image, request.chip_id)
        texts_CE = await self._encode(request.texts)
        maps_CHW = (await self.vision.maps([image], texts_CE, [_distance_m(hit)]))[0]
        if hit and request.output == "geojson":
            place = self.retrieval.catalogue.place
            collection = regions_geojson(maps_CHW, request.texts, lambda row, column: place(hit, row, column))
            return LocalizeResponse(geojson=collection, model_hash=self.model_hash)
        maps = [
            TextMap(
                text=text,
                scores=scores_HW.tolist(),
                spot=self.retrieval.spot(find_peak(scores_HW), hit),
                heatmap_url=heatmap_url(hit.id, text) if hit else None,
            )
            for text, scores_HW in zip(request.texts, maps_CHW, strict=True)
        ]
        return LocalizeResponse(maps=maps, model_hash=self.model_hash)

    async def heatmap(self, chip_id: str, text: str | None, like: str | None) -> np.ndarray:
        """Scores (H, W) of a chip for a text, or for likeness to another chip."""
        if (text is None) == (like is None):
            raise RequestError(422, "give exactly one of text and like")
        vector_E = await self._query_vector(text, None, like)
        hit, image = await self._picture(None, chip_id)
        return (await self.vision.maps([image], vector_E[None], [_distance_m(hit)]))[0][0]

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Unit vectors of texts and pictures."""
        images_IE = await self._embed_images(request.images)
        texts_TE = await self._encode(request.texts)
        return EmbedResponse(
            text_embeddings=texts_TE.tolist(), image_embeddings=images_IE.tolist(), model_hash=self.model_hash
        )

    async def caption(self, request: CaptionRequest) -> CaptionResponse:
        """The generative pass of the model over a picture or chip."""
        hit, image = await self._picture(request.image, request.chip_id)
        caption = await self.vision.caption(image, _distance_m(hit))
        return CaptionResponse(caption=caption, model_hash=self.model_hash)

    async def predict(self, request: PredictRequest) -> PredictResponse:
        """The closed product's form."""
        images = [item.image for item in request.instances if item.image is not None]
        texts = [text for item in request.instances for text in ([item.text] if item.text else item.texts)]
        images_IE, texts_TE = await self._embed_images(images), await self._encode(texts)
        return PredictResponse(predictions=predictions(request.instances, images_IE, texts_TE))

    async def chip_image(self, chip_id: str) -> bytes:
        """JPEG of a chip."""
        return (await self._picture(None, chip_id))[1]

    async def tile(self, scene: str, zoom: int, x: int, y: int, form: str) -> bytes | None:
        """One map tile of a scene; None where it has no pixels."""
        try:
            return await asyncio.to_thread(self.tiles.read, scene, zoom, x, y, "jpg" if form == "jpg" else "png")
        except KeyError:
            raise RequestError(404, f"no scene {scene!r}; GET /v1/stats lists the scenes") from None
        except ValueError as error:
            raise RequestError(404, str(error)) from error
        except RasterioIOError as error:
            raise RequestError(404, f"scene {scene!r}: its raster cannot be read any more") from error

    def stats(self) -> dict[str, Any]:
        """What is served, and the zooms between which each scene is worth showing."""
        stats = self.retrieval.stats
        scenes = []
        for scene in stats["scenes"]:
            coarsest, finest = self.tiles.zooms(scene["id"])
            scenes.append(scene | {"min_zoom": coarsest, "max_zoom": finest})
        return stats | {"scenes": scenes}

    async def check(self) -> None:
        """Encode one sample; raises if the model does not answer with a finite unit vector."""
        vector_E = await self.encode_text("an aerial image")
        if not np.isfinite(vector_E).all() or abs(float(np.linalg.norm(vector_E)) - 1) > 1e-3:
            raise RuntimeError("the model encodes a sample text to no unit vector: its weights are damaged")

    @property
    def model_hash(self) -> str:
        """Hash of the served model."""
        return self.retrieval.index.meta.model_hash

    async def _query_vector(self, text: str | None, image: str | None, chip_id: str | None) -> np.ndarray:
        if text is not None:
            return await self.encode_text(text)
        if image is not None:
            return (await self._embed_images([image]))[0]
        try:
            return await asyncio.to_thread(self.retrieval.index.vector, chip_id or "")
        except KeyError:
            raise _no_chip(chip_id) from None

    async def _encode(self, texts: Sequence[str]) -> np.ndarray:
        width = self.retrieval.index.meta.embedding_width
        vectors = await asyncio.gather(*(self.encode_text(text) for text in texts))
        return np.stack(vectors) if vectors else np.empty((0, width), dtype=np.float32)

    async def _embed_images(self, images: Sequence[str]) -> np.ndarray:
        def embed() -> np.ndarray:
            return self.retrieval.embedder.embed_images([self.retrieval.picture(image) for image in images])

        try:
            return await asyncio.to_thread(embed)
        except ValueError as error:
            raise _bad_picture(error) from error

    async def _picture(self, image: str | None, chip_id: str | None) -> tuple[Hit | None, bytes]:
        if image is not None:
            data = await asyncio.to_thread(_checked_picture, image)
            return None, data
        try:
            hit = await asyncio.to_thread(self.retrieval.chip, chip_id or "")
        except KeyError:
            raise _no_chip(chip_id) from None
        return hit, (await asyncio.to_thread(self.retrieval.chip_images, [hit]))[0]


def local_services(retrieval: Retrieval, window: int = 3) -> Services:
    """Everything in threads of this process, without batching across requests."""

    async def encode_text(text: str) -> np.ndarray:
        return (await asyncio.to_thread(retrieval.embedder.embed_texts, [text]))[0]

    return Services(retrieval, Tiles(retrieval.catalogue), encode_text, LocalVisionWork(retrieval.embedder, window))


def _distance_m(hit: Hit | None) -> float:
    """Metres a pixel of a chip as its index knows them; NaN for an upload and where the index knows none."""
    return math.nan if hit is None or hit.ground_sample_distance_m is None else hit.ground_sample_distance_m


def _checked_picture(image: str) -> bytes:
    """The bytes of a request's picture, decoded once here, so that no other replica meets a bad one."""
    try:
        data = image_bytes(image)
        decode_image(data, max_pixels=MAX_IMAGE_PIXELS)
    except ValueError as error:
        raise _bad_picture(error) from error
    return data


def _bad_picture(error: Exception) -> RequestError:
    return RequestError(422, str(error) if str(error).startswith("image") else f"image: {error}")


def _no_chip(chip_id: str | None) -> RequestError:
    return RequestError(404, f"no chip {chip_id!r} in the index")
