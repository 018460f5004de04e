"""POST /predict in the closed product's form, so that its clients work unchanged (RECIPE.md, last section).

`{"instances": [{"image"} | {"text"} | {"image", "texts"}], "parameters": {"batch_size"}}` → one prediction per
instance: an embedding, or the cosines of the picture with each text. `batch_size` is accepted and bounds nothing:
our batches are formed on the server.
"""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rsplatform.serve.api import MAX_IMAGES, MAX_TEXTS, ImageBase64, Request, Text


class Instance(Request):
    """A picture, a text, or a picture with texts to score."""

    image: ImageBase64 | None = None
    text: Text | None = None
    texts: list[Text] = Field(default=[], max_length=MAX_TEXTS)

    @model_validator(mode="after")
    def _known_form(self) -> "Instance":
        if (self.image is None) == (self.text is None) or (self.texts and self.image is None):
            raise ValueError('an instance is {"image"}, {"text"} or {"image", "texts"}')
        return self


class PredictParameters(Request):
    """Accepted for compatibility."""

    batch_size: int = Field(default=2, ge=1, le=1024)


class PredictRequest(Request):
    """The closed product's request body."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"instances": [{"text": "a stadium"}], "parameters": {"batch_size": 2}}]}
    )
    instances: list[Instance] = Field(min_length=1, max_length=MAX_IMAGES)
    parameters: PredictParameters = PredictParameters()


class PredictResponse(BaseModel):
    """One dictionary per instance: `embedding`, or `scores` in the order of its texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"predictions": [{"embedding": [0.6, 0.8]}, {"scores": [0.31]}]}]}
    )

    predictions: list[dict[str, Any]]


def predictions(
    instances: list[Instance], image_vectors_IE: np.ndarray, text_vectors_TE: np.ndarray
) -> list[dict[str, Any]]:
    """Deal out vectors, which lie in the order of `instances` (texts: its text, else its texts)."""
    images, texts = iter(image_vectors_IE), iter(text_vectors_TE)
    dealt: list[dict[str, Any]] = []
    for instance in instances:
        if instance.image is None:
            dealt.append({"embedding": next(texts).tolist()})
            continue
        vector = next(images)
        if instance.texts:
            dealt.append({"scores": [float(vector @ next(texts)) for _ in instance.texts]})
        else:
            dealt.append({"embedding": vector.tolist()})
    return dealt
