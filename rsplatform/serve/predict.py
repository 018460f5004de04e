"""POST /predict in the closed product's form, so that its clients work unchanged (RECIPE.md, last section).

`{"instances": [{"image"} | {"text"} | {"image", "texts"}], "parameters": {"batch_size"}}` → one prediction per
instance: an embedding, or the cosines of the picture with each text. `parameters` are accepted, whatever else they
hold, and bound nothing: our batches are formed on the server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rsplatform.serve.api import ImageBase64, Request, Text

MAX_INSTANCES = 128
# Different ones of all instances together: each is encoded once, the same classes are asked of many pictures.
MAX_PREDICT_TEXTS = 512


class Instance(Request):
    """A picture, a text, or a picture with texts to score."""

    image: ImageBase64 | None = None
    text: Text | None = None
    texts: list[Text] = []

    @model_validator(mode="after")
    def _known_form(self) -> "Instance":
        if (self.image is None) == (self.text is None) or (self.texts and self.image is None):
            raise ValueError('an instance is {"image"}, {"text"} or {"image", "texts"}')
        return self

    def all_texts(self) -> list[str]:
        """Its text, or its texts."""
        return self.texts if self.text is None else [self.text]


class PredictParameters(BaseModel):
    """Accepted for compatibility, with keys that we do not know."""

    batch_size: int | None = Field(default=None, ge=1)


class PredictRequest(Request):
    """The closed product's request body."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"instances": [{"text": "a stadium"}], "parameters": {"batch_size": 2}}]}
    )
    instances: list[Instance] = Field(min_length=1, max_length=MAX_INSTANCES)
    parameters: PredictParameters | None = None

    @model_validator(mode="after")
    def _not_too_many_texts(self) -> "PredictRequest":
        if (number := len(self.texts())) > MAX_PREDICT_TEXTS:
            raise ValueError(f"instances: {number} different texts, at most {MAX_PREDICT_TEXTS} in one request")
        return self

    def texts(self) -> list[str]:
        """The different texts of all instances."""
        return list(dict.fromkeys(text for instance in self.instances for text in instance.all_texts()))


class PredictResponse(BaseModel):
    """One dictionary per instance: `embedding`, or `scores` in the order of its texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"predictions": [{"embedding": [0.6, 0.8]}, {"scores": [0.31]}]}]}
    )

    predictions: list[dict[str, Any]]


def predictions(
    instances: Sequence[Instance], image_vectors_IE: np.ndarray, vector_of_text: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Deal out vectors: of the pictures in the order of the instances, and of each text by the text."""
    images = iter(image_vectors_IE)
    dealt: list[dict[str, Any]] = []
    for instance in instances:
        if instance.text is not None:
            dealt.append({"embedding": vector_of_text[instance.text].tolist()})
            continue
        vector = next(images)
        if instance.texts:
            dealt.append({"scores": [float(vector @ vector_of_text[text]) for text in instance.texts]})
        else:
            dealt.append({"embedding": vector.tolist()})
    return dealt
