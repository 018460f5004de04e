"""Requests and answers about single pictures: localize, embed, caption. The rules of api.py hold here too.

A picture is sent, or named: a chip of the index, or a box of a scene. Nothing here computes.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rsplatform.serve.api import (
    MAX_IMAGES,
    MAX_TEXTS,
    Box,
    ChipId,
    ImageBase64,
    LonLat,
    Request,
    Spot,
    Text,
    exactly_one,
    is_box,
)


class LocalizeRequest(Request):
    """A picture, a chip or a box of a scene, and the texts to find in it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"chip_id": "scene_01-000042", "texts": ["a runway", "water"]},
                {"scene_id": "scene_01", "bbox": [9.97, 53.53, 9.98, 53.54], "texts": ["water"], "output": "geojson"},
            ]
        }
    )
    image: ImageBase64 | None = Field(default=None, description="A picture in base64")
    chip_id: ChipId | None = None
    scene_id: ChipId | None = Field(default=None, description="A scene of /v1/stats; give bbox with it")
    bbox: Annotated[Box, AfterValidator(is_box)] | None = Field(
        default=None, description="[west, south, east, north] in the scene"
    )
    gsd_m: float | None = Field(
        default=None, gt=0, le=10_000, description="Metres a pixel at which the box is looked at; default: the scene's"
    )
    texts: list[Text] = Field(min_length=1, max_length=MAX_TEXTS)
    output: Literal["scores", "mask", "geojson"] = Field(
        default="scores", description="Score grids, masks in pixels, or regions on Earth (not of an upload)"
    )

    @model_validator(mode="after")
    def _one_picture(self) -> "LocalizeRequest":
        exactly_one(self, ("image", "chip_id", "scene_id"))
        if (self.scene_id is None) != (self.bbox is None):
            raise ValueError("give scene_id and bbox together")
        if self.gsd_m is not None and self.scene_id is None:
            raise ValueError("gsd_m is for scene_id and bbox alone")
        if self.output == "geojson" and self.image is not None:
            raise ValueError("an uploaded picture has no place on Earth: use a chip_id or scene_id, or another output")
        return self


class TextMap(BaseModel):
    """The agreement of one text with each cell of the picture's grid, and the spot where it is highest."""

    text: str
    scores: list[list[float]] = Field(description="Cosine per cell, rows from the top")
    spot: Spot
    heatmap_url: str | None = None


class TextMask(BaseModel):
    """The pixels of the picture that a text fits: more than half-way from the median of its scores to their peak."""

    text: str
    mask: str = Field(description="PNG of one byte a pixel in base64: 255 where the text fits, 0 elsewhere")
    width_px: int
    height_px: int
    spot: Spot


EXAMPLE_LOCALIZED = {
    "maps": [
        {
            "text": "a runway",
            "scores": [[0.11, 0.42], [0.09, 0.13]],
            "spot": {"score": 0.42, "peak_fraction": [0.25, 0.75], "box_fraction": [0.0, 0.5, 0.5, 1.0]},
            "heatmap_url": "/heatmaps/scene_01-000042.png?text=a+runway&version=stable&state=0a1b2c3d4e5f",
        }
    ],
    "corners_lonlat": [[9.97, 53.54], [9.98, 53.54], [9.98, 53.53], [9.97, 53.53]],
    "model_hash": "7fed784520",
}


class LocalizeResponse(BaseModel):
    """`maps` for output scores, `masks` for mask, `geojson` (a FeatureCollection of regions) for geojson."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_LOCALIZED]})

    maps: list[TextMap] = []
    masks: list[TextMask] = []
    geojson: dict[str, Any] | None = None
    corners_lonlat: list[LonLat] | None = Field(
        default=None, description="Of the picture: top left, top right, bottom right, bottom left; null for an upload"
    )
    model_hash: str


class EmbedRequest(Request):
    """Texts, pictures or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["a stadium", "a harbour"]}]})
    texts: list[Text] = Field(default=[], max_length=MAX_TEXTS)
    images: list[ImageBase64] = Field(default=[], max_length=MAX_IMAGES)

    @model_validator(mode="after")
    def _something(self) -> "EmbedRequest":
        if not self.texts and not self.images:
            raise ValueError("give at least one text or image")
        return self


class EmbedResponse(BaseModel):
    """Unit vectors in the order of the request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text_embeddings": [[0.6, 0.8]], "image_embeddings": [], "model_hash": "7fed784520"}]
        }
    )

    text_embeddings: list[list[float]]
    image_embeddings: list[list[float]]
    model_hash: str


class CaptionRequest(Request):
    """A picture or a chip to describe."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"chip_id": "scene_01-000042"}]})
    image: ImageBase64 | None = None
    chip_id: ChipId | None = None

    @model_validator(mode="after")
    def _one_picture(self) -> "CaptionRequest":
        exactly_one(self, ("image", "chip_id"))
        return self


class CaptionResponse(BaseModel):
    """The model's own words (greedy generation), not the caption stored with the chip."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"caption": "an aerial image of a harbour", "model_hash": "7fed784520"}]}
    )

    caption: str
    model_hash: str
