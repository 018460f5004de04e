"""Map tiles of the user's own scenes: scene id and web-mercator z/x/y in, JPEG or PNG bytes out.

Opens GeoTIFF only (a VRT under a .tif name could name other files) and keeps each scene open per thread, because
opening costs more than reading. It serves no raster that is not in the catalogue.
"""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

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
        raster = self._open(scene)
        try:
            image = raster.reader.tile(x, y, zoom, tilesize=TILE_SIZE_PX, indexes=raster.bands)
        except TileOutsideBounds:
            return None
        if raster.dataset.dtypes[0] != "uint8":
            image.rescale(in_range=self._stretch(scene, raster))
        if form == "jpg":
            return image.render(img_format="JPEG", add_mask=False, quality=85)
        return image.render(img_format="PNG", add_mask=True, zlevel=1)

    def zooms(self, scene: str) -> tuple[int, int]:
        """The zooms at which the scene fills about one tile, and at which one tile pixel is one of its own."""
        entry = self.catalogue.scenes[scene]
        west, south, east, north = entry.bounds_lonlat
        metres_per_pixel = 156_543.03 * math.cos(math.radians((south + north) / 2))  # at zoom 0
        finest = math.ceil(math.log2(metres_per_pixel / entry.ground_sample_distance_m))
        coarsest = math.floor(math.log2(360 / max(east - west, north - south, 1e-9)))
        return max(0, min(coarsest - 2, MAX_ZOOM)), max(0, min(finest, MAX_ZOOM))

    def _open(self, scene: str) -> "_OpenScene":
        entry = self.catalogue.scenes[scene]
        opened: OrderedDict[str, _OpenScene] = getattr(self._local, "opened", None) or OrderedDict()
        self._local.opened = opened
        if scene not in opened:
            dataset = rasterio.open(gdal_path(entry.uri), driver="GTiff")
            bands = (1, 2, 3) if dataset.count >= 3 else (1, 1, 1)
            opened[scene] = _OpenScene(dataset, Reader(input=None, dataset=dataset, options={}), bands)
            if len(opened) > MAX_OPEN_SCENES:
                opened.popitem(last=False)[1].dataset.close()
        opened.move_to_end(scene)
        return opened[scene]

    def _stretch(self, scene: str, raster: "_OpenScene") -> list[tuple[float, float]]:
        """Value range per band that becomes 0…255: one for the whole scene, so that tiles meet without seams."""
        if scene not in self._stretches:
            preview = raster.reader.preview(max_size=512, indexes=raster.bands).array
            self._stretches[scene] = [_range(band.compressed()) for band in preview]
        return self._stretches[scene]


@dataclass(frozen=True)
class _OpenScene:
    """A raster held open by one thread, and the bands that make its picture."""

    dataset: Any
    reader: Reader
    bands: tuple[int, int, int]


def _range(band: np.ndarray) -> tuple[float, float]:
    if not band.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(band, STRETCH_PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)
