"""What the routes call: search, localization, captions and tiles, as coroutines over the plain classes.

`encode_texts` and `VisionWork` are given from outside, so that the same code runs in one process (tests, a bare
server) and spread over replicas (app.py). Errors a caller can mend leave as `RequestError` with an HTTP status.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rasterio.errors import RasterioIOError

from rsplatform.index.store import Hit
from rsplatform.serve.api import MAX_IMAGES, ReadAs, SearchRequest, SearchResponse
from rsplatform.serve.api_pictures import (
    CaptionRequest,
    CaptionResponse,
    EmbedRequest,
    EmbedResponse,
    LocalizeRequest,
    LocalizeResponse,
    TextMap,
)
from rsplatform.serve.batching import Batcher, parts
from rsplatform.serve.catalogue import corners
from rsplatform.serve.localization import Look, find_peak, regions_geojson
from rsplatform.serve.pictures import Decoding, Picture, scene_picture, sent_picture, text_mask
from rsplatform.serve.predict import PredictRequest, PredictResponse, predictions
from rsplatform.serve.query import Query, query_vector, read_query
from rsplatform.serve.record import stage
from rsplatform.serve.retrieval import Retrieval, known_m, looked_at, spot
from rsplatform.serve.tiles import Tiles
from rsplatform.serve.vision import Described, LocalVisionWork, VisionWork

# Texts of one forward; queries of many requests share it.
MAX_TEXT_BATCH = 32


class RequestError(Exception):
    """A request that cannot be answered; `status` is its HTTP status, `detail` says what to change."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


EncodeText = Callable[[str], Awaitable[np.ndarray]]


@dataclass(frozen=True)
class Services:
    """One served model, index and set of scenes. `encode_text` gives the unit vector (E,) of a text."""

    retrieval: Retrieval
    tiles: Tiles
    encode_text: EncodeText
    vision: VisionWork
    decoding: Decoding = field(default_factory=Decoding)
    version: str = "stable"

    async def search(self, request: SearchRequest) -> SearchResponse:
        """The k best chips; with `localize`, where in each of them."""
        read = _read(request.text, request.without)
        vector_E = await self._query_vector(read, request.image, request.chip_id)
        with stage("search"):
            hits = await asyncio.to_thread(self.retrieval.search, request, vector_E)
        results = [self.retrieval.result(hit, request, self.version) for hit in hits]
        if request.localize and hits:
            seen = await self._looked_at(hits, vector_E, is_inline=request.image is not None)
            results = [each.model_copy(update=seen.get(each.chip_id, {})) for each in results]
        read_as = ReadAs(wanted=list(read.wanted), unwanted=list(read.unwanted))
        return SearchResponse(results=results, read_as=read_as, model_hash=self.model_hash)

    async def localize(self, request: LocalizeRequest) -> LocalizeResponse:
        """Where in a picture, a chip or a box of a scene the texts are."""
        picture = await self._picture_of(request)
        if picture.place is None and request.output == "geojson":
            raise RequestError(422, f"chip {request.chip_id} has no place on Earth: ask for scores or mask")
        texts_CE = await self._encode(request.texts)
        look = Look(picture.data, texts_CE, picture.ground_sample_distance_m, as_it_is=picture.is_window)
        return await asyncio.to_thread(self._localized, request, picture, (await self._maps([look]))[0])

    def _localized(self, request: LocalizeRequest, picture: Picture, maps_CHW: np.ndarray) -> LocalizeResponse:
        place = picture.place
        answer: dict[str, Any] = {"corners_lonlat": corners(place) if place else None, "model_hash": self.model_hash}
        if place and request.output == "geojson":
            return LocalizeResponse(geojson=regions_geojson(maps_CHW, request.texts, place), **answer)
        pairs = list(zip(request.texts, maps_CHW, strict=True))
        if request.output == "mask":
            size_px = picture.mask_size_px()
            return LocalizeResponse(masks=[text_mask(*pair, size_px, place) for pair in pairs], **answer)
        link = self.retrieval.heatmap_url
        maps = [
            TextMap(
                text=text,
                scores=scores_HW.tolist(),
                spot=spot(find_peak(scores_HW), place),
                heatmap_url=link(request.chip_id, self.version, text) if request.chip_id else None,
            )
            for text, scores_HW in pairs
        ]
        return LocalizeResponse(maps=maps, **answer)

    async def heatmap(self, chip_id: str, text: str | None, like: str | None, without: list[str]) -> np.ndarray:
        """Scores (H, W) of a chip for a text, or for likeness to another chip, as a search for the same ranks it."""
        if (text is None) == (like is None):
            raise RequestError(422, "give exactly one of text and like")
        vector_E = await self._query_vector(_read(text, without), None, like)
        picture = await self._chip_picture(chip_id)
        look = Look(picture.data, vector_E[None], picture.ground_sample_distance_m)
        return (await self._maps([look]))[0][0]

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Unit vectors of texts and pictures."""
        images_IE = await self._embed_images(request.images)
        texts_TE = await self._encode(request.texts)
        return EmbedResponse(
            text_embeddings=texts_TE.tolist(), image_embeddings=images_IE.tolist(), model_hash=self.model_hash
        )

    async def caption(self, request: CaptionRequest) -> CaptionResponse:
        """The generative pass of the model over a picture or chip."""
        picture = await self._picture_of(request)
        with stage("caption"):
            caption = await self.vision.caption(Described(picture.data, picture.ground_sample_distance_m))
        return CaptionResponse(caption=caption, model_hash=self.model_hash)

    async def predict(self, request: PredictRequest) -> PredictResponse:
        """The closed product's form."""
        images_IE = await self._embed_images([item.image for item in request.instances if item.image is not None])
        vector_of_text = dict(zip(request.texts(), await self._encode(request.texts()), strict=True))
        return PredictResponse(predictions=predictions(request.instances, images_IE, vector_of_text))

    async def chip_image(self, chip_id: str) -> bytes:
        """JPEG of a chip."""
        return (await self._chip_picture(chip_id)).data

    async def tile(self, scene: str, zoom: int, x: int, y: int, form: str) -> bytes | None:
        """One map tile of a scene; None where it has no pixels."""
        with _scene_errors(scene, wrong=404), stage("tile"):
            return await asyncio.to_thread(self.tiles.read, scene, zoom, x, y, "jpg" if form == "jpg" else "png")

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

    async def _query_vector(self, read: Query, image: str | None, chip_id: str | None) -> np.ndarray:
        texts_TE = await self._encode([*read.wanted, *read.unwanted])
        wanted_PE = texts_TE[: len(read.wanted)]
        if image is not None:
            wanted_PE = await self._embed_images([image])
        elif not read.wanted:
            wanted_PE = (await self._chip_vector(chip_id or ""))[None]
        return query_vector(wanted_PE, texts_TE[len(read.wanted) :])

    async def _chip_vector(self, chip_id: str) -> np.ndarray:
        try:
            return await asyncio.to_thread(self.retrieval.index.vector, chip_id)
        except KeyError:
            raise _no_chip(chip_id) from None

    async def _looked_at(self, hits: list[Hit], vector_E: np.ndarray, is_inline: bool) -> dict[str, dict[str, Any]]:
        """What a look at each hit adds to its result, by its id; a picture that is gone adds nothing."""
        images = await self._chip_images(hits)
        seen = [(image, hit) for image, hit in zip(images, hits, strict=True) if image is not None]
        maps = await self._maps([Look(image, vector_E[None], known_m(hit)) for image, hit in seen])
        place_of = self.retrieval.catalogue.place_of

        def found() -> dict[str, dict[str, Any]]:
            return {hit.id: looked_at(m[0], place_of(hit), is_inline) for m, (_, hit) in zip(maps, seen, strict=True)}

        return await asyncio.to_thread(found)  # a hundred peaks would hold up everybody's bodies

    async def _chip_images(self, hits: list[Hit]) -> list[bytes | None]:
        """The hits' pictures; those of folders may be large, and wait for each other as uploads do."""
        read = self.retrieval.pictures.read
        with stage("chip_pictures"):
            if any(hit.row < 0 for hit in hits):
                return await self.decoding.run(lambda: read(hits))
            return await asyncio.to_thread(read, hits)

    async def _maps(self, looks: list[Look]) -> list[np.ndarray]:
        with stage("maps"):
            return await self.vision.maps(looks)

    async def _encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors: list[np.ndarray] = []
        with stage("encode_text"):
            for some in parts(texts, MAX_TEXT_BATCH):
                vectors += await asyncio.gather(*(self.encode_text(text) for text in some))
        return np.stack(vectors) if vectors else self._no_vectors

    async def _embed_images(self, images: Sequence[str]) -> np.ndarray:
        vectors = [await self._embed_some(some) for some in parts(images, MAX_IMAGES)]
        return np.concatenate([self._no_vectors, *vectors])

    @property
    def _no_vectors(self) -> np.ndarray:
        return np.empty((0, self.retrieval.index.meta.embedding_width), dtype=np.float32)

    async def _embed_some(self, images: Sequence[str]) -> np.ndarray:
        try:
            with stage("decode"):
                pixels = await self.decoding.run(lambda: [self.retrieval.picture(image) for image in images])
        except ValueError as error:
            raise _bad_picture(error) from error
        with stage("encode_image"):
            return await self.vision.embed(pixels)

    async def _picture_of(self, request: LocalizeRequest | CaptionRequest) -> Picture:
        if request.image is not None:
            image = request.image
            try:
                with stage("decode"):
                    return await self.decoding.run(lambda: sent_picture(image))
            except ValueError as error:
                raise _bad_picture(error) from error
        if isinstance(request, LocalizeRequest) and request.scene_id is not None and request.bbox is not None:
            with _scene_errors(request.scene_id, wrong=422), stage("tile"):
                return await self.decoding.run(
                    lambda: scene_picture(
                        self.tiles, request.scene_id or "", request.bbox or (0, 0, 0, 0), request.gsd_m
                    )
                )
        return await self._chip_picture(request.chip_id or "")

    async def _chip_picture(self, chip_id: str) -> Picture:
        try:
            hit = await asyncio.to_thread(self.retrieval.chip, chip_id)
        except KeyError:
            raise _no_chip(chip_id) from None
        (data,) = await self._chip_images([hit])
        if data is None:
            raise RequestError(404, f"the picture of chip {chip_id!r} cannot be read any more")
        return Picture(data, known_m(hit), self.retrieval.catalogue.place_of(hit))


def local_services(retrieval: Retrieval, window: int = 3, version: str = "stable") -> Services:
    """Everything in threads of this process."""
    vision = LocalVisionWork(retrieval.embedder, window)
    return Services(retrieval, Tiles(retrieval.catalogue), text_batcher(retrieval), vision, version=version)


def text_batcher(retrieval: Retrieval, observe: Callable[[int], None] | None = None) -> Batcher[str, np.ndarray]:
    """`encode_text` of Services: texts of different requests share a forward; `observe` hears each batch's size."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        return list(retrieval.embedder.embed_texts(texts))

    return Batcher(encode, MAX_TEXT_BATCH, observe)


def _read(text: str | None, without: Sequence[str]) -> Query:
    """What a request wants and what not; texts of URLs come here unchecked."""
    try:
        read = read_query(text) if text is not None else Query(())
    except ValueError as error:
        raise RequestError(422, f"text: {error}") from error
    return Query(read.wanted, (*read.unwanted, *without))


@contextlib.contextmanager
def _scene_errors(scene: str, wrong: int) -> Iterator[None]:
    """Errors of tiles.py as answers; `wrong` is the status for numbers that name no place of the scene."""
    try:
        yield
    except KeyError:
        raise RequestError(404, f"no scene {scene!r}; GET /v1/stats lists the scenes") from None
    except ValueError as error:
        raise RequestError(wrong, str(error)) from error
    except RasterioIOError as error:
        raise RequestError(404, f"scene {scene!r}: its raster cannot be read any more") from error


def _bad_picture(error: Exception) -> RequestError:
    return RequestError(422, str(error) if str(error).startswith("image") else f"image: {error}")


def _no_chip(chip_id: str | None) -> RequestError:
    return RequestError(404, f"no chip {chip_id!r} in the index")
