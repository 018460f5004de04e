"""What the HTTP API accepts and returns, as pydantic models with limits and examples: the source of openapi.json.

Degrees are WGS 84; boxes are [west, south, east, north]; pictures travel as base64 of JPEG, PNG or WEBP. No image
URLs on purpose: the server fetches nothing for a caller. Nothing here computes.
"""

import base64
import binascii
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from rsplatform.index.filters import parse_interval
from rsplatform.serve.query import read_query

MAX_K = 100
MAX_TEXTS = 16
MAX_UNWANTED = 8
MAX_IMAGES = 16
# How a heatmap begins that comes with its answer, because no link could ask for it again.
INLINE_PNG = "data:image/png;base64,"
HEATMAP_URL = "Made when it is asked for; that of an uploaded picture is a data: URL, and there only with `localize`"
MAX_TEXT_CHARACTERS = 512
MAX_IMAGE_CHARACTERS = 8 * 2**20
MAX_IMAGE_PIXELS = 32 * 10**6
# Ids hold the names of users' files: anything but slashes and control characters, and no leading dot.
ID_PATTERN = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,199}$"
DATA_URL = re.compile(r"^data:image/[a-z]+;base64,")


def _is_interval(text: str) -> str:
    parse_interval(text)
    return text


def _asks_for_something(text: str) -> str:
    read_query(text)
    return text


def is_box(bbox: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    west, south, east, north = bbox
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise ValueError("expected [west, south, east, north] in degrees with south ≤ north")
    return bbox


def _is_range(limits: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= limits[0] <= limits[1]:
        raise ValueError("expected [min, max] in metres with 0 ≤ min ≤ max")
    return limits


Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARACTERS, strip_whitespace=True)]
ChipId = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
ImageBase64 = Annotated[str, StringConstraints(min_length=1, max_length=MAX_IMAGE_CHARACTERS)]
LonLat = tuple[float, float]
Box = tuple[float, float, float, float]


def image_bytes(image: str) -> bytes:
    """The bytes of a base64 picture, with or without a `data:image/…;base64,` prefix; ValueError if it is none."""
    try:
        return base64.b64decode(DATA_URL.sub("", image, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("image: not base64; send the bytes of a JPEG, PNG or WEBP file in base64") from None


class Request(BaseModel):
    """Base of requests: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def exactly_one(request: BaseModel, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)}; got {', '.join(given) or 'none'}")


class SearchRequest(Request):
    """A text, a picture or a known chip to compare with, and what the chips must meet."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": "a runway beside fields", "k": 5, "localize": True},
                {"text": "harbour", "k": 10, "bbox": [9.0, 53.0, 10.5, 54.0], "gsd_m": [0.3, 2]},
                {"text": "a harbour, not a marina", "k": 5},
                {"chip_id": "scene_01-000042", "without": ["water"], "k": 8, "datetime": "2020-01-01T00:00:00Z/.."},
            ]
        }
    )
    text: Annotated[Text, AfterValidator(_asks_for_something)] | None = Field(
        default=None,
        description='What to look for, in words; "harbour, not marina" and "road without water" say what is not '
        "wanted, a semicolon joins several wanted things",
    )
    without: list[Text] = Field(default=[], max_length=MAX_UNWANTED, description="What the chips should not look like")
    image: ImageBase64 | None = Field(default=None, description="A picture to compare with, in base64")
    chip_id: ChipId | None = Field(default=None, description="Find more like this chip; it is left out itself")
    k: int = Field(default=10, ge=1, le=MAX_K, description="How many chips")
    bbox: Annotated[Box, AfterValidator(is_box)] | None = Field(
        default=None, description="[west, south, east, north]; west > east crosses the antimeridian"
    )
    bbox_relation: Literal["intersects", "within"] = Field(
        default="intersects", description="Chips that touch the box (STAC), or only those wholly inside"
    )
    datetime: Annotated[str, StringConstraints(max_length=80), AfterValidator(_is_interval)] | None = Field(
        default=None, description="RFC 3339 time, or start/end with .. for an open side"
    )
    gsd_m: Annotated[tuple[float, float], AfterValidator(_is_range)] | None = Field(
        default=None, description="[min, max] ground sample distance in metres"
    )
    kinds: list[Text] = Field(default=[], max_length=32, description="At least one of these landmark kinds")
    localize: bool = Field(default=False, description="Also say where in each chip the answer is")

    @model_validator(mode="after")
    def _one_query(self) -> "SearchRequest":
        exactly_one(self, ("text", "image", "chip_id"))
        return self


class Spot(BaseModel):
    """Where in a picture a text fits best: cosine there, the place as fractions of the picture and on Earth."""

    score: float
    peak_fraction: tuple[float, float] = Field(description="(row, column) of the peak, 0…1 from the top left")
    box_fraction: Box = Field(description="(top, left, bottom, right) of the region around the peak, 0…1")
    peak_lonlat: LonLat | None = None
    box_lonlat: Box | None = None


class SearchResult(BaseModel):
    """One chip; `corners_lonlat` run top left, top right, bottom right, bottom left of the picture.

    A picture of a folder has no place on Earth: its bounds, corners and its spot's lon/lat are null.
    """

    chip_id: str
    score: float = Field(description="Cosine with the query's vector, -1…1")
    bounds_lonlat: Box | None
    corners_lonlat: list[LonLat] | None
    scene: str
    datetime: str | None
    ground_sample_distance_m: float | None
    caption: str
    kinds: list[str]
    thumbnail_url: str
    heatmap_url: str | None = Field(default=None, description=HEATMAP_URL)
    spot: Spot | None = Field(default=None, description="Where in the chip; only with localize: true")


class ReadAs(BaseModel):
    """How the text of a query was understood."""

    wanted: list[str]
    unwanted: list[str]


EXAMPLE_RESULT = {
    "chip_id": "scene_01-000042",
    "score": 0.31,
    "bounds_lonlat": [9.97, 53.53, 9.98, 53.54],
    "corners_lonlat": [[9.97, 53.54], [9.98, 53.54], [9.98, 53.53], [9.97, 53.53]],
    "scene": "scene_01",
    "datetime": "2021-06-01T10:00:00Z",
    "ground_sample_distance_m": 2.0,
    "caption": "an aerial image of a harbour and water",
    "kinds": ["harbour", "water"],
    "thumbnail_url": "/chips/scene_01-000042.jpg?version=stable&state=0a1b2c3d4e5f",
    "heatmap_url": "/heatmaps/scene_01-000042.png?text=harbour&version=stable&state=0a1b2c3d4e5f",
    "spot": {
        "score": 0.42,
        "peak_fraction": [0.44, 0.56],
        "box_fraction": [0.25, 0.25, 0.75, 0.75],
        "peak_lonlat": [9.9756, 53.5356],
        "box_lonlat": [9.9725, 53.5325, 9.9775, 53.5375],
    },
}


class SearchResponse(BaseModel):
    """The k best chips, best first; fewer only where fewer meet the conditions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "results": [EXAMPLE_RESULT],
                    "read_as": {"wanted": ["a harbour"], "unwanted": ["a marina"]},
                    "model_hash": "7fed784520",
                }
            ]
        }
    )
    results: list[SearchResult]
    read_as: ReadAs = Field(description="What was looked for in words, and what was not wanted")
    model_hash: str


class Health(BaseModel):
    """`status` is "ok" once the model has encoded one sample."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"status": "ok", "model_hash": "7fed784520", "num_chips": 9197}]}
    )
    status: Literal["ok"]
    model_hash: str
    num_chips: int


class SceneSummary(BaseModel):
    """A scene whose tiles are served, and the zooms between which it is worth showing."""

    id: str
    bounds_lonlat: Box
    ground_sample_distance_m: float
    datetime: str
    attribution: str
    min_zoom: int
    max_zoom: int


class Stats(BaseModel):
    """What is served: artifacts, the model, how many chips show each kind of landmark, the scenes."""

    model: str
    index: str
    chips: list[str] = Field(description="The artifacts whose chips the index holds; none where it holds folders alone")
    model_hash: str
    embedding_width: int
    image_size_px: int
    num_chips: int
    search: str = Field(description="exact, or the kind of the approximate index")
    kinds: dict[str, int]
    datetime: tuple[str, str] | None = Field(default=None, description="First and last of the chips, where any has one")
    gsd_m: tuple[float, float] | None = Field(default=None, description="Finest and coarsest of the chips, in metres")
    scenes: list[SceneSummary]


class Problem(BaseModel):
    """What every refused request gets: one sentence that says what was wrong and, where it helps, the remedy."""

    detail: str
