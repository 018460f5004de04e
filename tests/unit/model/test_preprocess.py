"""Pixels: safe decoding with reasons, square crops against resize-then-crop."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rsplatform.model.preprocess import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    ImageError,
    _decode,
    decode_image,
    read_square,
    resize_crop,
    square,
)


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4 % 256, columns * 3 % 256, (rows + columns) % 256], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_lossless_formats_decode_to_the_same_pixels():
    image = Image.fromarray(picture())
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(decode_image(data), picture())


def test_jpeg_decodes_close_to_the_pixels_in_rgb_order():
    smooth = np.full((32, 32, 3), (200, 100, 30), np.uint8)
    decoded = decode_image(encoded(Image.fromarray(smooth), "JPEG", quality=95))
    assert decoded.dtype == np.uint8 and np.abs(decoded.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(encoded(Image.fromarray(picture()).convert(mode), kind))
    assert decoded.shape == (40, 60, 3) and decoded.dtype == np.uint8


def test_16_bit_grey_is_scaled_not_clipped():
    grey = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    decoded = decode_image(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(decoded[..., 1], grey >> 8)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_bombs_are_refused_from_the_header(side):
    with pytest.raises(ImageError) as caught:
        decode_image(png_header(side, side))
    assert caught.value.reason == "too_many_pixels"


def test_each_bad_input_has_its_reason():
    jpeg = encoded(Image.fromarray(picture()), "JPEG")
    cases = {
        b"": "empty",
        b"not a picture": "unreadable",
        jpeg[: len(jpeg) // 2]: "unreadable",
        encoded(Image.fromarray(picture()), "PNG")[:80]: "unreadable",
        encoded(Image.fromarray(picture()), "GIF"): "unreadable",
        encoded(Image.fromarray(picture()), "TIFF"): "unreadable",
    }
    for data, reason in cases.items():
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        assert caught.value.reason == reason
    with pytest.raises(ImageError) as caught:
        decode_image(jpeg, max_bytes=10)
    assert caught.value.reason == "too_many_bytes"
    with pytest.raises(ImageError) as caught:
        decode_image(jpeg, max_pixels=100)
    assert caught.value.reason == "too_many_pixels"


def test_stray_bytes_around_a_jpegs_data_are_accepted_but_broken_data_is_not():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(noise), "JPEG")
    np.testing.assert_array_equal(decode_image(jpeg + b"\x00trailing"), decode_image(jpeg))
    tables = jpeg.index(b"\xff\xdb")
    with_stray_bytes = jpeg[:tables] + b"\x00\x00" + jpeg[tables:]
    np.testing.assert_allclose(decode_image(with_stray_bytes), decode_image(jpeg), atol=2)
    middle = len(jpeg) // 2
    with pytest.raises(ImageError, match="unreadable"):
        decode_image(jpeg[:middle] + b"\xff\xd9" + jpeg[middle + 2 :])


@pytest.mark.parametrize("shape", [(40, 60), (64, 32), (16, 16), (9, 100)])
def test_resize_crop_equals_resizing_then_cropping(shape):
    size, image = 16, picture(*shape)
    cropped = resize_crop(image, size)
    scale = size / min(shape)
    whole = Image.fromarray(image).resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = np.asarray(whole)[top : top + size, left : left + size]
    assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
    assert np.abs(cropped.astype(int) - expected).mean() < 12  # half a pixel of shift at most
    np.testing.assert_array_equal(cropped, resize_crop(image, size))


def test_resize_crop_averages_fine_detail_and_refuses_what_is_no_picture():
    checkerboard = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    assert np.abs(resize_crop(checkerboard, 8).astype(int) - 127).max() <= 2  # antialiased
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            resize_crop(bad, 8)


def aerial(height: int, width: int) -> Image.Image:
    """Coarse and fine detail, as in a photograph."""
    rng, total = np.random.default_rng(4), np.zeros((height, width, 3))
    for cell, strength in ((64, 40.0), (16, 25.0), (4, 12.0)):
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)) * strength
        for channel in range(3):
            total[..., channel] += np.asarray(Image.fromarray(coarse[..., channel]).resize((width, height)))
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "size", "factor"),
    [(224, 224, 80, 1), (255, 400, 64, 1), (301, 517, 64, 2), (803, 1001, 64, 4), (1030, 1101, 64, 8)],
)
def test_large_jpegs_are_decoded_at_a_part_of_their_size(height: int, width: int, size: int, factor: int) -> None:
    """As the whole decode but for noise, whether or not the size divides; never with less than twice the pixels."""
    data = encoded(aerial(height, width), "JPEG", quality=95)
    decoded = _decode(data, size, MAX_IMAGE_PIXELS, MAX_IMAGE_BYTES)
    assert decoded.factor == factor and min(decoded.pixels_HWC.shape[:2]) >= (2 * size if factor > 1 else size)
    assert decoded.pixels_HWC.shape[:2] == (-(-height // factor), -(-width // factor))
    seen = read_square(data, size, 0.5)
    whole = square(decode_image(data), size, 0.5)
    assert seen.ground_sample_distance_m == pytest.approx(whole.ground_sample_distance_m)
    difference = seen.pixels_HWC.astype(float) - whole.pixels_HWC
    assert 10 * np.log10(255**2 / max(1e-3, (difference**2).mean())) > 42
    if factor == 1:
        np.testing.assert_array_equal(seen.pixels_HWC, whole.pixels_HWC)


def test_a_damaged_large_jpeg_is_refused_at_any_size() -> None:
    data = encoded(aerial(1030, 1101), "JPEG", quality=95)
    with pytest.raises(ImageError, match="unreadable"):
        read_square(data[: len(data) // 2] + b"\xff\xd9", 64)
    np.testing.assert_array_equal(
        read_square(encoded(aerial(400, 300), "PNG"), 64).pixels_HWC, resize_crop(np.asarray(aerial(400, 300)), 64)
    )
