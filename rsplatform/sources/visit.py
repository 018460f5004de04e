"""One file of a scene: an open GeoTIFF in; how its bands become uint8 colours, and which of its pixels are data, out.

8-bit files are described by their header alone. Others need a stretch, which the recipe gives as a value range, or a
bounded sample: a close overview, or some blocks spread over the file. Opens nothing and knows no grid, date or chip.
Shapes: B bands, H W pixels, V valid pixels.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

# The sample of a stretch: a picture of about this side, shrunk from at most SHRINK times as much, …
SAMPLE_SIDE_PX = 512
SHRINK = 4
# … else, where no overview is that close, this many blocks with data, thinned to as many pixels together; they are
# looked for in at most so many blocks, and further only while none has been found.
SAMPLE_BLOCKS, MAX_BLOCKS = 64, 256
STRETCH_PERCENTILES = (2, 98)


def _pair_per_band(value: Any) -> Any:
    """One pair of numbers stands for all three bands."""
    is_one = isinstance(value, list | tuple) and len(value) == 2 and not any(isinstance(x, list | tuple) for x in value)
    return (value, value, value) if is_one else value


def _rises(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError(f"[{pair[0]:g}, {pair[1]:g}] does not rise; write [low, high] in the file's own values")
    return pair


# (low, high) of red, green and blue in values of the file: what becomes 0 and 255.
BandRange = Annotated[tuple[float, float], AfterValidator(_rises)]
ValueRange = Annotated[tuple[BandRange, BandRange, BandRange], BeforeValidator(_pair_per_band)]


class SceneError(ValueError):
    """A file that is no usable scene; `reason` is one word for the ledger, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["SceneError"], tuple[str, str]]:
        """Pickled with both parts: it crosses from Ray's workers to the driver."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Visit:
    """One file of a scene: what turns its bands into uint8 and tells data from nothing."""

    uri: str
    bands: tuple[int, ...]
    nodata: float | None
    alpha_band: int | None
    has_mask: bool  # a mask inside the file, which only a warp reads
    stretch: tuple[tuple[float, float], ...] | None  # (low, high) per band → 0..255; None: uint8 as it is


def visit_from_json(document: dict[str, Any]) -> Visit:
    """A visit from what JSON gives back of its fields."""
    stretch = document["stretch"]
    pairs = None if stretch is None else tuple((low, high) for low, high in stretch)
    return Visit(**document | {"bands": tuple(document["bands"]), "stretch": pairs})


def describe_visit(
    dataset: Any, place: str, bands: tuple[int, ...], value_range: tuple[tuple[float, float], ...] | None = None
) -> Visit:
    """The visit of an open rasterio dataset. No pixel is read of an 8-bit file, or where the value range is given.

    Raises:
        SceneError: reason no_data: a file whose stretch is to be measured, all of whose pixels are nodata.
    """
    alpha_bands = [index for index, colour in enumerate(dataset.colorinterp, 1) if colour == ColorInterp.alpha]
    flags = dataset.mask_flag_enums[bands[0] - 1]
    has_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    visit = Visit(place, bands, dataset.nodata, alpha_bands[0] if alpha_bands else None, has_mask, value_range)
    if value_range is not None or all(dataset.dtypes[band - 1] == "uint8" for band in bands):
        return visit
    sample_BV = sample_valid(dataset, visit)
    if not sample_BV.shape[1]:
        raise SceneError("no_data", f"{place}: every pixel is nodata")
    limits_2B = np.percentile(sample_BV, STRETCH_PERCENTILES, axis=1)
    return replace(visit, stretch=tuple((float(low), float(high)) for low, high in limits_2B.T))


def sample_valid(dataset: Any, visit: Visit) -> np.ndarray:
    """float64 (B, V): colours of valid pixels from all over the file, always the same ones; V = 0 if it has none.

    Reads at most (SAMPLE_SIDE_PX · SHRINK)² pixels where an overview or the file itself is that small, else blocks: at
    most MAX_BLOCKS unless all of those are empty.
    """
    factor = max(1.0, max(dataset.width, dataset.height) / SAMPLE_SIDE_PX)
    level = max(level for level in (1, *dataset.overviews(visit.bands[0])) if level <= factor)
    if factor <= SHRINK * level:
        shape = (dataset.count, max(1, round(dataset.height / factor)), max(1, round(dataset.width / factor)))
        return _valid_colours(dataset.read(out_shape=shape), visit)
    return _sample_blocks(dataset, visit)


def _sample_blocks(dataset: Any, visit: Visit) -> np.ndarray:
    height, width = dataset.block_shapes[visit.bands[0] - 1]
    num_rows, num_columns = -(-dataset.height // height), -(-dataset.width // width)
    max_pixels = SAMPLE_SIDE_PX**2 // SAMPLE_BLOCKS
    parts: list[np.ndarray] = []
    # at random, so that no pattern of the land can fall in step with the sample; by a fixed seed
    generator = np.random.default_rng(0)
    for number, block in enumerate(generator.permutation(num_rows * num_columns).tolist()):
        if len(parts) == SAMPLE_BLOCKS or (parts and number >= MAX_BLOCKS):
            break
        row, column = divmod(block, num_columns)
        window = Window.from_slices(
            (row * height, min((row + 1) * height, dataset.height)),
            (column * width, min((column + 1) * width, dataset.width)),
        )
        values_BV = _valid_colours(dataset.read(window=window), visit)
        if values_BV.shape[1]:
            chosen = generator.permutation(values_BV.shape[1])[:max_pixels]
            parts.append(values_BV[:, chosen])
    return np.concatenate(parts, axis=1) if parts else np.empty((len(visit.bands), 0))


def _valid_colours(raw_BHW: np.ndarray, visit: Visit) -> np.ndarray:
    return raw_BHW[[band - 1 for band in visit.bands]][:, _valid(raw_BHW, visit)].astype(np.float64)


def _valid(raw_BHW: np.ndarray, visit: Visit) -> np.ndarray:
    """bool (H, W): where the file has data. Nodata counts where all colours have it."""
    colours_BHW = raw_BHW[[band - 1 for band in visit.bands]]
    valid_HW = np.asarray(np.isfinite(colours_BHW).all(axis=0))
    if visit.alpha_band is not None:
        valid_HW = valid_HW & (raw_BHW[visit.alpha_band - 1] > 0)
    elif visit.nodata is not None and np.isfinite(visit.nodata):
        valid_HW = valid_HW & (colours_BHW != np.array(visit.nodata).astype(raw_BHW.dtype)).any(axis=0)
    return valid_HW


def to_colours(raw_BHW: np.ndarray, visit: Visit) -> np.ndarray:
    """All bands of a file → uint8 (4, H, W): red, green, blue by the scene's stretch, and validity (0 or 255)."""
    colours_BHW = raw_BHW[[band - 1 for band in visit.bands]]
    valid_HW = _valid(raw_BHW, visit)
    if visit.stretch is not None:
        limits = np.array(visit.stretch, np.float32)
        low, range_ = limits[:, :1, None], np.maximum(limits[:, 1:, None] - limits[:, :1, None], 1e-12)
        scaled = np.nan_to_num((colours_BHW.astype(np.float32) - low) / range_)
        colours_BHW = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)
    return np.concatenate([np.where(valid_HW, colours_BHW, 0).astype(np.uint8), valid_HW[None] * np.uint8(255)])
