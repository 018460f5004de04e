"""Typed Python client of the HTTP API: pictures as bytes or files in, the models of api.py out.

Needs httpx and pydantic only at run time of a call. Every call is a read, so that one that met a lost connection or a
busy server is sent again; it reads no artifact.
"""

import base64
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
import numpy as np
from pydantic import BaseModel

from rsplatform.serve.api import INLINE_PNG, Health, SearchResponse, Stats
from rsplatform.serve.api_pictures import CaptionResponse, EmbedResponse, LocalizeResponse
from rsplatform.serve.predict import PredictResponse

Model = TypeVar("Model", bound=BaseModel)
Image = bytes | Path
# What the server asks to wait before another try is believed up to here.
MAX_WAIT_S = 5.0


class ApiError(RuntimeError):
    """A request that the server refused; `status` is the HTTP status, the message the server's own words."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


class Client:
    """A connection to one server, e.g. `Client("http://127.0.0.1:8000")`; use it in a `with` block.

    `retries`: how often a call is sent again after a lost connection, a 500, or a 503, whose Retry-After it waits for.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 60, retries: int = 1) -> None:
        self._retries = retries
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def health(self) -> Health:
        """Whether the model answers. Raises ApiError, or httpx.TransportError if nobody listens."""
        return self._read(Health, self._send("GET", "/health"))

    def stats(self) -> Stats:
        """What is served: artifacts, model, kinds of landmarks, scenes."""
        return self._read(Stats, self._send("GET", "/v1/stats"))

    def search(
        self, text: str | None = None, *, image: Image | None = None, chip_id: str | None = None, **conditions: Any
    ) -> SearchResponse:
        """The best chips for a text, a picture or a chip; `conditions` are the other fields of SearchRequest.

        Example: `client.search("a harbour", k=5, bbox=[9, 53, 10.5, 54], localize=True)`.
        """
        query = {"text": text, "image": _encoded(image), "chip_id": chip_id}
        return self._post(SearchResponse, "/v1/search", query | conditions)

    def localize(
        self, texts: list[str], *, image: Image | None = None, output: str = "scores", **place: Any
    ) -> LocalizeResponse:
        """Where in a picture each text is: score grids, masks, or GeoJSON regions (not of an upload).

        `place` is `chip_id`, or `scene_id` with `bbox` (and `gsd_m`), in place of an image.
        """
        body = {"texts": texts, "image": _encoded(image), "output": output}
        return self._post(LocalizeResponse, "/v1/localize", body | place)

    def predict(self, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The closed product's form: instances with base64 pictures and texts in, one prediction for each out."""
        return self._post(PredictResponse, "/predict", {"instances": instances}).predictions

    def picture(self, url: str) -> bytes:
        """Bytes behind a thumbnail_url or heatmap_url of an answer, or of a tile; empty where a tile has no pixels.

        Raises:
            ValueError: not a path of this server, nor a heatmap that came with its answer.
        """
        if url.startswith(INLINE_PNG):
            return base64.b64decode(url.removeprefix(INLINE_PNG), validate=True)
        if not url.startswith("/") or url.startswith("//"):
            raise ValueError(f"expected a path of this server such as /chips/ID.jpg, got {url!r}")
        response = self._send("GET", url)
        self._check(response)
        return response.content

    def caption(self, *, image: Image | None = None, chip_id: str | None = None) -> str:
        """The model's own words for a picture or chip."""
        return self._post(CaptionResponse, "/v1/caption", {"image": _encoded(image), "chip_id": chip_id}).caption

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (T, E) float32."""
        response = self._post(EmbedResponse, "/v1/embed", {"texts": texts})
        return np.asarray(response.text_embeddings, dtype=np.float32)

    def embed_images(self, images: list[Image]) -> np.ndarray:
        """Unit vectors (I, E) float32."""
        response = self._post(EmbedResponse, "/v1/embed", {"images": [_encoded(image) for image in images]})
        return np.asarray(response.image_embeddings, dtype=np.float32)

    def _post(self, model: type[Model], path: str, body: dict[str, Any]) -> Model:
        given = {key: value for key, value in body.items() if value is not None}
        return self._read(model, self._send("POST", path, json=given))

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        for tries_left in range(self._retries, -1, -1):
            try:
                response = self._http.request(method, path, **content)
            except httpx.TransportError:
                if not tries_left:
                    raise
                continue
            if response.status_code not in (500, 503) or not tries_left:
                return response
            given = response.headers.get("retry-after", "0")
            time.sleep(min(float(given) if given.isdecimal() else 0, MAX_WAIT_S))
        raise ValueError(f"retries {self._retries}: expected 0 or more")

    def _read(self, model: type[Model], response: httpx.Response) -> Model:
        self._check(response)
        return model.model_validate_json(response.content)

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        is_json = response.headers.get("content-type", "").startswith("application/json")
        detail = response.json().get("detail", response.text) if is_json else response.text
        raise ApiError(response.status_code, str(detail)[:1000])


def _encoded(image: Image | None) -> str | None:
    if image is None:
        return None
    return base64.b64encode(image.read_bytes() if isinstance(image, Path) else image).decode()
