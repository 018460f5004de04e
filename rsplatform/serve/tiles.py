"""Map tiles of the user's own scenes: scene id and web-mercator z/x/y in, JPEG or PNG bytes out.

Opens GeoTIFF only (a VRT under a .tif name could name other files) and keeps each scene open per thread, because
opening costs more than reading. It serves no raster that is not in the catalogue.
"""

import math
import threading
from collections import OrderedDict
from typing import Literal

import numpy as np
import rasterio
from rio_tiler.errors import TileOutsideBounds
from rio_tiler.io import Reader

from rsplatform.serve.catalogue import Catalogue
from rsplatform.storage import gdal_path

TILE_SIZE_PX = 256
MAX_OPEN_SCENES = 16
MAX_ZOOM = 24
# Rasters that are not 8-bit are stretched between these percentiles of an overview (our default).
STRETCH_PERCENTILES = (2, 98)


class Tiles:
    """Reads tiles of the catalogue's scenes; safe to call from several threads."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._local = threading.local()
        self._stretches: dict[str, list[tuple[float, float]]] = {}

    def read(self, scene: str, zoom: int, x: int, y: int, form: Literal["jpg", "png"]) -> bytes | None:
        """One tile of 256 px, None where the scene has no pixels; PNG keeps missing pixels transparent.

        Raises:
            KeyError: no such scene.
            ValueError: z, x, y are no tile of the web-mercator pyramid.
            rasterio.errors.RasterioIOError: the raster cannot be opened or read any more.
        """
        if not (0 <= zoom <= MAX_ZOOM and 0 <= x < 2**zoom and 0 <= y < 2**zoom):
            raise ValueError(f"tile {zoom}/{x}/{y} does not exist: 0 ≤ z ≤ {MAX_ZOOM} and 0 ≤ x, y < 2^z")
        reader = self._reader(scene)
        indexes = (1, 2, 3) if reader.dataset.count >= 3 else (1, 1, 1)
        try:
            image = reader.tile(x, y, zoom, tilesize=TILE_SIZE_PX, indexes=indexes)
        except TileOutsideBounds:
            return None
        if reader.dataset.dtypes[0] != "uint8":
            image.rescale(in_range=self._stretch(scene, reader))
        options = {"quality": 85} if form == "jpg" else {"zlevel": 1}
        return image.render(img_format="JPEG" if form == "jpg" else "PNG", add_mask=form == "png", **options)

    def zooms(self, scene: str) -> tuple[int, int]:
        """The zooms at which the scene fills about one tile, and at which one tile pixel is one of its own."""
        entry = self.catalogue.scenes[scene]
        west, south, east, north = entry.bounds_lonlat
        metres_per_pixel = 156_543.03 * math.cos(math.radians((south + north) / 2))  # at zoom 0
        finest = math.ceil(math.log2(metres_per_pixel / entry.ground_sample_distance_m))
        coarsest = math.floor(math.log2(360 / max(east - west, north - south, 1e-9)))
        return max(0, min(coarsest - 2, MAX_ZOOM)), max(0, min(finest, MAX_ZOOM))

    def _reader(self, scene: str) -> Reader:
        entry = self.catalogue.scenes[scene]
        readers: OrderedDict[str, Reader] = getattr(self._local, "readers", None) or OrderedDict()
        self._local.readers = readers
        if scene not in readers:
            dataset = rasterio.open(gdal_path(entry.uri), driver="GTiff")
            readers[scene] = Reader(None, dataset=dataset)
            if len(readers) > MAX_OPEN_SCENES:
                _, oldest = readers.popitem(last=False)
                oldest.dataset.close()
        readers.move_to_end(scene)
        return readers[scene]

    def _stretch(self, scene: str, reader: Reader) -> list[tuple[float, float]]:
        """Value range per band that becomes 0…255: one for the whole scene, so that tiles meet without seams."""
        if scene not in self._stretches:
            indexes = (1, 2, 3) if reader.dataset.count >= 3 else (1, 1, 1)
            preview = reader.preview(max_size=512, indexes=indexes).array
            bands = [band.compressed() for band in preview]
            self._stretches[scene] = [_range(band) for band in bands]
        return self._stretches[scene]


def _range(band: np.ndarray) -> tuple[float, float]:
    if not band.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(band, STRETCH_PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)
