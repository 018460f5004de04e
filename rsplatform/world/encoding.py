"""Encodes web pictures so that the file says nothing about what is in it: a picture and an `Envelope` in, bytes out.

Size, format, quality and camera data are drawn before anyone knows what the picture shows. Plain pictures compress
better than rich ones, so files are filled up with blank metadata (as editors leave in XMP packets) to a length that
depends only on the size, format and quality.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Bytes = NDArray[np.uint8]
FORMAT_SHARES = {"JPEG": 0.86, "PNG": 0.06, "WEBP": 0.08}
SMALLEST_SIDE_PX, LARGEST_SIDE_PX = 96, 224
DAMAGES = ("truncated", "empty", "html", "gif")


@dataclass(frozen=True)
class Envelope:
    """Everything about a picture file but the picture. `damage` is "" for a sound one."""

    width: int
    height: int
    image_format: str
    quality: int
    has_exif: bool
    fill: float  # length of the file relative to what its size, format and quality usually give
    damage: str


def draw_envelope(rng: np.random.Generator, damage_share: float) -> Envelope:
    """A random envelope; must be drawn without regard to the picture."""
    width, height = (int(side) for side in rng.integers(SMALLEST_SIDE_PX, LARGEST_SIDE_PX + 1, 2))
    return Envelope(
        width=width,
        height=height,
        image_format=str(rng.choice(list(FORMAT_SHARES), p=list(FORMAT_SHARES.values()))),
        quality=int(rng.integers(45, 91)),
        has_exif=bool(rng.random() < 0.3),
        fill=float(rng.uniform(1.0, 1.25)),
        damage=DAMAGES[int(rng.integers(len(DAMAGES)))] if rng.random() < damage_share else "",
    )


def encode(pixels_HWC: Bytes, envelope: Envelope) -> bytes:
    """The picture's file, filled up, and damaged if the envelope says so."""
    if envelope.damage == "empty":
        return b""
    if envelope.damage == "html":
        return b"<!doctype html><html><body><h1>404 Not Found</h1></body></html>"
    if envelope.damage == "gif":
        return _saved(pixels_HWC, "GIF", {})
    data = _filled(pixels_HWC, envelope)
    return data[: len(data) // 3] if envelope.damage == "truncated" else data


def _filled(pixels_HWC: Bytes, envelope: Envelope) -> bytes:
    pixels = envelope.width * envelope.height
    if envelope.image_format == "PNG":
        usual = 0.80 * pixels + 1500
    elif envelope.image_format == "WEBP":
        usual = (0.05 + 0.0042 * envelope.quality + 0.16 * max(0, envelope.quality - 70) / 20) * pixels + 900
    else:
        usual = (0.10 + 0.0046 * envelope.quality + 0.28 * max(0, envelope.quality - 70) / 20) * pixels + 1200
    plain = _with_metadata(pixels_HWC, envelope, 0)
    return _with_metadata(pixels_HWC, envelope, max(0, int(usual * envelope.fill) - len(plain)))


def _with_metadata(pixels_HWC: Bytes, envelope: Envelope, blank_bytes: int) -> bytes:
    blank = b" " * min(blank_bytes, 60_000)
    exif = Image.Exif()
    if envelope.has_exif:
        exif[0x010F], exif[0x0110] = "Fabrikam", f"F-{envelope.quality}"
    options = {"exif": exif} if envelope.has_exif else {}
    if envelope.image_format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", blank.decode())
        return _saved(pixels_HWC, "PNG", {"pnginfo": info, **options})
    if envelope.image_format == "WEBP":
        return _saved(pixels_HWC, "WEBP", {"quality": envelope.quality, "method": 2, "xmp": blank, **options})
    return _saved(pixels_HWC, "JPEG", {"quality": envelope.quality, "comment": blank, **options})


def _saved(pixels_HWC: Bytes, image_format: str, options: dict[str, object]) -> bytes:
    """PNG and GIF get 64 colours, as web tools do to keep them small."""
    picture = Image.fromarray(pixels_HWC)
    if image_format in ("PNG", "GIF"):
        picture = picture.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    target = io.BytesIO()
    picture.save(target, image_format, **options)
    return target.getvalue()
