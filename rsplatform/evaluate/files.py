"""Files that a benchmark names: bytes, tables and pixels in memory, or one sentence that names the file and the remedy.

Everything that is missing or damaged becomes a ConfigError: the recipe names data that is not as it says. A
benchmark never goes on without a picture, because its number would be of another set.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.errors

from rsplatform.config import ConfigError
from rsplatform.model.preprocess import ImageError, Square, decode_image, read_square
from rsplatform.sources.scenes import (
    DRIVER,
    ENDINGS,
    SceneError,
    SceneSource,
    describe_scene,
    open_pixels,
    read_window,
)
from rsplatform.storage import exists, gdal_options, gdal_path, read_bytes

FIX_PLACE = "fix the recipe or metadata.rsplatform.data_root"
FIX_PICTURE = "replace it by the original; a number without it would be of another set"


def bytes_of(uri: str, remedy: str = FIX_PLACE) -> bytes:
    """The whole file; ConfigError if it is missing or cannot be read."""
    try:
        return read_bytes(uri)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: no such file; {remedy}") from error
    except OSError as error:
        raise ConfigError(f"{uri}: cannot be read ({error}); {remedy}") from error


def caption_entries(path: str) -> list[tuple[str, str, list[str]]]:
    """(split, file name, sentences) of every picture in RSICD's layout; ConfigError if the file is none."""
    try:
        images = json.loads(bytes_of(path))["images"]
        return [
            (item["split"], item["filename"], [sentence["raw"] for sentence in item["sentences"]]) for item in images
        ]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: not RSICD's layout ({type(error).__name__}: {error}); expected JSON with `images`, each with "
            "`filename`, `split` and `sentences` of `raw`; download it again or fix `captions`"
        ) from error


def label_rows(table: str) -> list[tuple[str, str]]:
    """(file, label) of every line of a CSV table; ConfigError if it is missing, damaged or lacks one of them."""
    try:
        text = bytes_of(table, "fix `folder` or `table` of the benchmark, or metadata.rsplatform.data_root").decode(
            "utf-8-sig"
        )
        rows = list(csv.DictReader(io.StringIO(text)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table}: not a CSV table in UTF-8 ({error}); save it as one") from error
    if not rows or not {"file", "label"} <= set(rows[0]):
        raise ConfigError(f"{table}: needs a header with the columns file and label, and a line per picture")
    for number, row in enumerate(rows, 2):
        if not row["file"] or not row["label"]:
            raise ConfigError(f"{table}: line {number} lacks its file or label; complete or remove it")
    return [(row["file"], row["label"]) for row in rows]


def squares(
    names: Sequence[str], images: Sequence[bytes], size: int, ground_sample_distances_m: Sequence[float] | None = None
) -> Iterator[Square]:
    """Pictures as the model sees them, one at a time; ConfigError names the one that cannot be decoded.

    Distances are metres per pixel of the pictures as they come here, NaN (or no list) where unknown.
    """
    distances_m = [math.nan] * len(images) if ground_sample_distances_m is None else ground_sample_distances_m
    for name, image, distance_m in zip(names, images, distances_m, strict=True):
        try:
            yield read_square(image, size, distance_m)
        except ImageError as error:
            raise ConfigError(f"{name}: {error}; {FIX_PICTURE}") from error


def read_picture(uri: str) -> tuple[np.ndarray, float | None]:
    """uint8 RGB pixels (H, W, 3), and metres a pixel; None for pictures that are no GeoTIFF.

    GeoTIFFs are read as ingest reads them (bands, stretch, nodata): a model is scored on the pixels it was trained on.

    Raises:
        ConfigError: missing, damaged, or a GeoTIFF that ingest would refuse as well.
    """
    try:
        if not uri.lower().endswith(ENDINGS):
            return decode_image(bytes_of(uri)), None
        with rasterio.Env(**dict[str, Any](gdal_options())):
            scene = describe_scene(uri, uri, SceneSource(path=uri))
            pixels_HW4 = read_window(open_pixels(scene), 0, 0, scene.grid.height, scene.grid.width)
    except (ImageError, SceneError) as error:
        raise ConfigError(f"{uri}: {error}; {FIX_PICTURE}") from error
    return np.ascontiguousarray(pixels_HW4[..., :3]), scene.grid.ground_sample_distance_m()


def read_mask(uri: str, image_uri: str) -> np.ndarray:
    """A mask's values: (H, W) of one band, or (H, W, 3) colours; palettes are resolved to colours.

    Raises:
        ConfigError: missing or damaged; names the picture as well.
    """
    remedy = f"it is the mask of {image_uri}: fix `mask_replace` or restore it"
    if not exists(uri):
        raise ConfigError(f"{uri}: no such file; {remedy}")
    try:
        if not uri.lower().endswith(ENDINGS):
            return decode_image(bytes_of(uri, remedy))
        with rasterio.Env(**dict[str, Any](gdal_options())), rasterio.open(gdal_path(uri), driver=DRIVER) as raster:
            return raster.read(1)
    except (ImageError, rasterio.errors.RasterioError) as error:
        raise ConfigError(f"{uri}: {error}; {remedy}") from error
