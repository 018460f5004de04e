"""Typed Python client of the HTTP API: pictures as bytes or files in, the models of api.py out.

Needs httpx and pydantic only at run time of a call; it does not retry, and it reads no artifact.
"""

import base64
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
import numpy as np
from pydantic import BaseModel

from rsplatform.serve.api import Health, SearchResponse
from rsplatform.serve.api_pictures import CaptionResponse, EmbedResponse, LocalizeResponse

Model = TypeVar("Model", bound=BaseModel)
Image = bytes | Path


class ApiError(RuntimeError):
    """A request that the server refused; `status` is the HTTP status, the message the server's own words."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


class Client:
    """A connection to one server, e.g. `Client("http://127.0.0.1:8000")`; use it in a `with` block."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 60) -> None:
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
        return self._read(Health, self._http.get("/health"))

    def search(
        self, text: str | None = None, *, image: Image | None = None, chip_id: str | None = None, **conditions: Any
    ) -> SearchResponse:
        """The best chips for a text, a picture or a chip; `conditions` are the other fields of SearchRequest.

        Example: `client.search("a harbour", k=5, bbox=[9, 53, 10.5, 54], localize=True)`.
        """
        query = {"text": text, "image": _encoded(image), "chip_id": chip_id}
        return self._post(SearchResponse, "/v1/search", query | conditions)

    def localize(
        self, texts: list[str], *, image: Image | None = None, chip_id: str | None = None, output: str = "scores"
    ) -> LocalizeResponse:
        """Where in a picture or chip each text is: score grids and spots, or GeoJSON regions (chips only)."""
        body = {"texts": texts, "image": _encoded(image), "chip_id": chip_id, "output": output}
        return self._post(LocalizeResponse, "/v1/localize", body)

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
        return self._read(model, self._http.post(path, json=given))

    def _read(self, model: type[Model], response: httpx.Response) -> Model:
        if response.is_success:
            return model.model_validate_json(response.content)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        detail = response.json().get("detail", response.text) if is_json else response.text
        raise ApiError(response.status_code, str(detail)[:1000])


def _encoded(image: Image | None) -> str | None:
    if image is None:
        return None
    return base64.b64encode(image.read_bytes() if isinstance(image, Path) else image).decode()
