"""Map tiles of the user's own scenes: scene id and web-mercator z/x/y in, JPEG or PNG bytes out.

Opens GeoTIFF only (a VRT under a .tif name could name other files) and keeps each scene open per thread, because
opening costs more than reading. It serves no raster that is not in the catalogue.
"""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import rasterio
from rio_tiler.errors import TileOutsideBounds
from rio_tiler.io import Reader

from rsplatform.geo import BoundsLonLat, distance_m
from rsplatform.serve.catalogue import Catalogue
from rsplatform.storage import gdal_path

TILE_SIZE_PX = 256
MAX_OPEN_SCENES = 16
MAX_ZOOM = 24
# A box of a scene that is looked at as one picture.
MIN_WINDOW_PX = 16
MAX_WINDOW_PIXELS = 4 * 10**6
WGS84 = "EPSG:4326"


class Tiles:
    """Reads tiles of the catalogue's scenes; safe to call from several threads."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._local = threading.local()

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
            image = raster.reader.tile(x, y, zoom, tilesize=TILE_SIZE_PX, indexes=self.catalogue.scenes[scene].bands)
        except TileOutsideBounds:
            return None
        stretch = self.catalogue.scenes[scene].stretch
        if stretch is not None:  # the one that the chips were made with, so that tiles look like chips
            image.rescale(in_range=list(stretch))
        if form == "jpg":
            return image.render(img_format="JPEG", add_mask=False, quality=85)
        return image.render(img_format="PNG", add_mask=True, zlevel=1)

    def window(self, scene: str, bounds_lonlat: BoundsLonLat, ground_sample_distance_m: float) -> bytes:
        """PNG of a box of a scene, north up, with pixels of so many metres; what the scene lacks is black.

        Raises:
            KeyError: no such scene.
            ValueError: the box lies outside of the scene, or holds too few or too many pixels.
            rasterio.errors.RasterioIOError: the raster cannot be opened or read any more.
        """
        entry = self.catalogue.scenes[scene]
        west, south, east, north = bounds_lonlat
        inside = entry.bounds_lonlat
        if west >= east or south >= north or not _touch(bounds_lonlat, inside):
            raise ValueError(f"bbox: expected a box with west < east that touches the scene, {list(inside)}")
        height = round(distance_m((west, south), (west, north)) / ground_sample_distance_m)
        middle = (south + north) / 2
        width = round(distance_m((west, middle), (east, middle)) / ground_sample_distance_m)
        if not (min(height, width) >= MIN_WINDOW_PX and height * width <= MAX_WINDOW_PIXELS):
            raise ValueError(
                f"bbox: {height} × {width} px at {ground_sample_distance_m:g} m; each side needs at least "
                f"{MIN_WINDOW_PX} px and both together at most {MAX_WINDOW_PIXELS}: change bbox or gsd_m"
            )
        reader = self._open(scene).reader
        image = reader.part(
            bounds_lonlat, bounds_crs=WGS84, dst_crs=WGS84, indexes=entry.bands, height=height, width=width
        )
        if entry.stretch is not None:
            image.rescale(in_range=list(entry.stretch))
        return image.render(img_format="PNG", add_mask=False, zlevel=1)

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
            opened[scene] = _OpenScene(dataset, Reader(input=None, dataset=dataset, options={}))
            if len(opened) > MAX_OPEN_SCENES:
                opened.popitem(last=False)[1].dataset.close()
        opened.move_to_end(scene)
        return opened[scene]


@dataclass(frozen=True)
class _OpenScene:
    """A raster held open by one thread."""

    dataset: Any
    reader: Reader


def _touch(a: BoundsLonLat, b: BoundsLonLat) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
