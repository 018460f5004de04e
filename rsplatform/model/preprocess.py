"""The only way to pixels: untrusted image bytes -> uint8 RGB -> square crop.

In: JPEG, PNG or WEBP bytes. Out: numpy uint8 (H, W, 3). What a model sees of encoded bytes is their `read_square`, in
training, evaluation, index and service alike, so that all see the same pixels. EXIF orientation is ignored on purpose:
overhead images have no "up", and training and serving must agree. Does not read GeoTIFF or URLs; model/normalise.py
makes the model's floats. Shapes: H W pixels, C channels (red, green, blue).
"""

import io
import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 64 * 10**6
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# A JPEG may be decoded at a half, a quarter or an eighth of its size, which libjpeg-turbo does fast (the eighths
# between it does not). At least twice the pixels that are wanted stay, so that the resampling which follows still
# decides on the detail: 43 dB or more to the whole decode on aerial pictures, at a third of its time (our default).
SCALED_DECODES = (8, 4, 2)
KEPT_FACTOR = 2


class ImageError(ValueError):
    """Bytes that are no acceptable picture; `reason` is one word for the ledger, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickled with both parts: it crosses from Ray's workers to the driver."""
        return type(self), (self.reason, self.detail)


class Square(NamedTuple):
    """A picture as the model sees it: uint8 (S, S, 3), and the metres that a pixel of it covers, NaN if unknown."""

    pixels_HWC: np.ndarray
    ground_sample_distance_m: float


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS, max_bytes: int = MAX_IMAGE_BYTES) -> np.ndarray:
    """Decode JPEG, PNG or WEBP bytes to uint8 (H, W, 3) RGB; alpha is dropped, 16-bit grey is scaled to 8.

    Raises:
        ImageError: reason empty | too_many_bytes | too_many_pixels | unreadable (another format, damaged, cut off).
    """
    return _decode(data, None, max_pixels, max_bytes).pixels_HWC


def read_square(
    data: bytes, size: int, ground_sample_distance_m: float = math.nan, *, max_pixels: int = MAX_IMAGE_PIXELS
) -> Square:
    """`square` of an encoded picture; a JPEG much larger than `size` is decoded at a part of its size.

    Raises:
        ImageError: as `decode_image`.
    """
    decoded = _decode(data, size, max_pixels, MAX_IMAGE_BYTES)
    distance_m = ground_sample_distance_m * min(decoded.height, decoded.width) / size
    return Square(_centre_square(decoded, size), distance_m)


class _Decoded(NamedTuple):
    """Pixels, and the height and width of the whole picture, of which they may be a half, a quarter or an eighth."""

    pixels_HWC: np.ndarray
    height: int
    width: int
    factor: int = 1


def _decode(data: bytes, size: int | None, max_pixels: int, max_bytes: int) -> _Decoded:
    if not data:
        raise ImageError("empty", "no bytes")
    if len(data) > max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} bytes, at most {max_bytes} are accepted")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)  # reads the header, makes no pixel yet
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("too_many_pixels", f"{width}x{height} px, at most {max_pixels} are accepted")
        if image.format == "JPEG" and image.mode == "RGB":
            return _decode_jpeg(data, image, size)
        return _Decoded(_to_rgb(image), height, width)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, … on bad bytes
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes, image: Image.Image, size: int | None) -> _Decoded:
    width, height = image.size
    fitting = (each for each in SCALED_DECODES if size and min(height, width) >= KEPT_FACTOR * size * each)
    factor = next(fitting, 1)
    rows, columns = (-(-height // factor), -(-width // factor)) if factor > 1 else (0, 0)  # 0: all of them
    try:
        pixels_HWC = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=rows, min_width=columns)
        return _Decoded(pixels_HWC, height, width, factor)
    except ValueError as error:
        # pictures cut off or with broken entropy codes are refused: Pillow would fill up the rest with grey
        if any(word in str(error).lower() for word in ("premature", "huffman")):
            raise
        # stray bytes between markers and rare subsamplings, both common on the web
        return _Decoded(_to_rgb(image), height, width)


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey_HW = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def resize_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Shortest side to `size` pixels (bicubic, antialiased), centre crop -> uint8 (size, size, 3); deterministic."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or 0 in image_HWC.shape:
        raise ValueError(f"expected a uint8 (H, W, 3) picture, got {image_HWC.dtype} {image_HWC.shape}")
    return _centre_square(_Decoded(image_HWC, *image_HWC.shape[:2]), size)


def _centre_square(decoded: _Decoded, size: int) -> np.ndarray:
    image_HWC, height, width, factor = decoded
    if height == width == size:
        return image_HWC
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    # resampling the centre square alone gives resize-then-crop without the pixels that would be cropped away; its
    # edges are those in the whole picture, of which a scaled one's last pixel may hold only a part
    box = (left / factor, top / factor, (left + side) / factor, (top + side) / factor)
    return np.array(Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BICUBIC, box=box))


def square(image_HWC: np.ndarray, size: int, ground_sample_distance_m: float = math.nan) -> Square:
    """`resize_crop` of a picture whose pixels cover so many metres, with the metres of the new pixels."""
    distance_m = resized_ground_sample_distance_m(image_HWC, size, ground_sample_distance_m)
    return Square(resize_crop(image_HWC, size), distance_m)


def resized_ground_sample_distance_m(image_HWC: np.ndarray, size: int, ground_sample_distance_m: float) -> float:
    """Metres per pixel of `resize_crop(image_HWC, size)`, from those per pixel of `image_HWC`; NaN stays NaN."""
    return ground_sample_distance_m * min(image_HWC.shape[:2]) / size
