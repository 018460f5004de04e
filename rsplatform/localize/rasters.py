"""Score maps and masks to files that a GIS opens: COGs, written row by row.

In: strips of scores or labels at pixel size, in order. Out: files on the local disk, each written under another name
and renamed when complete, so a half-written one is never seen.
Shapes: P prompts, HxW pixels.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import shapely
from affine import Affine
from rasterio.features import rasterize
from rasterio.io import DatasetWriter

from rsplatform.geo import Grid
from rsplatform.localize.decide import BACKGROUND, NO_DATA
from rsplatform.localize.legend import Legend

WriteRows = Callable[[int, np.ndarray], None]
Erase = Callable[[Sequence[shapely.Polygon]], None]
ERASED_ROWS = 512  # held at a time


@contextmanager
def score_cog(path: Path, grid: Grid, legend: Legend) -> Iterator[WriteRows]:
    """Score COG: float32, one band a prompt, NaN for no data. Gives a function of (row, scores_PHW) to fill it with.

    A grid with an empty `crs` is written without one. Raises ValueError if the rows do not fill the grid in order.
    """
    profile = {"count": len(legend.prompts), "dtype": "float32", "nodata": float("nan")}
    with _raster_to_cog(path, grid, profile, "AVERAGE", legend) as (write, _):
        yield write


@contextmanager
def mask_cog(path: Path, grid: Grid, legend: Legend) -> Iterator[tuple[WriteRows, Erase]]:
    """Mask COG: uint8 class ids, 255 for no data.

    Gives a function of (row, labels_1HW), like `score_cog`, and one that afterwards turns the regions inside outlines
    in pixels back into background.
    """
    profile = {"count": 1, "dtype": "uint8", "nodata": NO_DATA}
    with _raster_to_cog(path, grid, profile, "NEAREST", legend) as (write, raster):

        def erase(outlines_px: Sequence[shapely.Polygon]) -> None:
            tree = shapely.STRtree(outlines_px)
            for row in range(0, grid.height if len(outlines_px) else 0, ERASED_ROWS):
                end = min(row + ERASED_ROWS, grid.height)
                here = [outlines_px[index] for index in tree.query(shapely.box(0, row, grid.width, end))]
                if here:
                    window = ((row, end), (0, grid.width))
                    labels_HW = raster.read(1, window=window)
                    burnt = ((outline, BACKGROUND) for outline in here)
                    rasterize(burnt, out=labels_HW, transform=Affine.translation(0, row))
                    raster.write(labels_HW, 1, window=window)

        yield write, erase


@contextmanager
def _raster_to_cog(
    path: Path, grid: Grid, profile: dict[str, Any], overview_resampling: str, legend: Legend
) -> Iterator[tuple[WriteRows, DatasetWriter]]:
    """A plain GeoTIFF to write rows into; turned into a COG at `path` if the block ends well.

    The COG driver itself would keep the whole raster in memory while it is written.
    """
    place = {"width": grid.width, "height": grid.height, "transform": grid.affine, "crs": grid.crs or None}
    next_row = 0
    with replacing(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder) / "plain.tif"
        with rasterio.open(plain, "w+", driver="GTiff", bigtiff="IF_SAFER", **place, **profile) as raster:

            def write(row: int, values_BHW: np.ndarray) -> None:
                nonlocal next_row
                expected = (profile["count"], values_BHW.shape[1], grid.width)
                if row != next_row or values_BHW.shape != expected:
                    raise ValueError(f"rows from {row} of {values_BHW.shape} where row {next_row} of {expected} fits")
                next_row += values_BHW.shape[1]
                raster.write(values_BHW, window=((row, next_row), (0, grid.width)))

            yield write, raster
            if next_row != grid.height:
                raise ValueError(f"strips fill {next_row} of {grid.height} rows")
            raster.update_tags(**legend.tags())
            if profile["count"] == len(legend.prompts):
                for band, prompt in enumerate(legend.prompts, start=1):
                    raster.set_band_description(band, prompt)
        options = {"compress": "DEFLATE", "predictor": "YES", "overview_resampling": overview_resampling}
        rasterio.shutil.copy(plain, temporary, driver="COG", bigtiff="IF_SAFER", **options)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of the same ending; renamed over it if the block ends well, removed if not."""
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
