"""The pictures of hits as they are shown and looked at: chips as they were written, pictures of folders made smaller.

In: hits. Out: JPEG; those of folders have at most MAX_SHOWN_PIXELS. A picture of a folder that is gone or damaged since
it was indexed is None: the other hits of a search still stand.
"""

import io
import math
from collections.abc import Callable, Sequence

from PIL import Image

from rsplatform.index.pictures import Pictures
from rsplatform.index.store import Hit
from rsplatform.model.preprocess import IMAGE_FORMATS, ImageError, decode_image

# Blocks of a JPEG that tell more than its pixels: a turn that browsers make and the model does not, the place of the
# camera, names of people. "photoshop" holds IPTC.
TOLD_BESIDE = {"exif", "xmp", "photoshop", "comment"}
# Several times what a model sees of a picture and a screen shows of it; a camera's 24 MP would be 8 MB a card.
MAX_SHOWN_PIXELS = 2 * 10**6
JPEG_QUALITY = 88


class ChipPictures:
    """Reads the pictures of hits; threads may share it. `resolve` is Cluster.resolve."""

    def __init__(self, root: str, resolve: Callable[[str], str]) -> None:
        self._pictures = Pictures(root, resolve)

    def read(self, hits: Sequence[Hit]) -> list[bytes | None]:
        """One picture a hit, None for one of a folder that cannot be read any more.

        Raises:
            ArtifactError: the chips that a hit points to are gone.
            RuntimeError: the chips were made again since, and another chip lies in the row.
        """
        chips = [hit for hit in hits if hit.row >= 0]
        found: dict[str, bytes | None] = {
            hit.id: data for hit, data in zip(chips, self._pictures.read(chips), strict=True)
        }
        return [found[hit.id] if hit.row >= 0 else self._of_folder(hit) for hit in hits]

    def _of_folder(self, hit: Hit) -> bytes | None:
        try:
            return shown_jpeg(self._pictures.read([hit])[0])
        except (OSError, ImageError):
            return None


def shown_jpeg(data: bytes) -> bytes:
    """A picture as JPEG of at most MAX_SHOWN_PIXELS, its form kept; a small JPEG of nothing but pixels as it is.

    Others are encoded again without EXIF, unturned: as the model and its heatmap see them.

    Raises:
        ImageError: no acceptable picture.
    """
    picture_HWC = decode_image(data)
    height, width = picture_HWC.shape[:2]
    factor = math.sqrt(MAX_SHOWN_PIXELS / (height * width))
    if factor >= 1 and _is_bare_jpeg(data):
        return data
    picture = Image.fromarray(picture_HWC)
    if factor < 1:
        size = (max(1, math.floor(width * factor)), max(1, math.floor(height * factor)))
        picture = picture.resize(size, Image.Resampling.BOX, reducing_gap=2)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _is_bare_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8"):
        return False
    picture = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)  # reads the header alone
    return not TOLD_BESIDE & picture.info.keys()
