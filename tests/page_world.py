"""The tiny world of the page's tests: the town, a dark coast beside it with one bright landmark, and two photographs.

The model is bright_embedder's with a text side that reads every text as "bright", so that a heatmap's peak is known.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import rasterio
import torch
from bright_embedder import bright_embedder
from PIL import Image
from rasterio.transform import from_origin
from tiny_service import CAPTIONS, CHIP_SIZE_PX, CHIPS, GSD_M, MODEL, finish, jpeg, make_chips, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.curate.pipeline import run_plain
from rsplatform.geo import Grid
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.finish import finish_index
from rsplatform.model.embedder import Embedder
from rsplatform.model.weights import save_model
from rsplatform.records import CHIP_SCHEMA
from rsplatform.sources.scenes import SceneSource, describe_scene
from rsplatform.storage import write_json

COAST, COAST_CHIPS, INDEX = "dark_coast", "chips/coast/v1", "index/page/v1"
SIDE_PX, NUM_SIDE = 4 * CHIP_SIZE_PX, 4
COAST_GSD_M, COAST_TIME = 4.0, "2019-03-01T10:00:00Z"
LANDMARK_KIND, LANDMARK_CHIP = "lighthouse", f"{COAST}-0005"
LANDMARK_PX = (44, 20)  # row and column in its chip
# Bright enough for the model, and no colour of the page's own.
CYAN, DARK = (0, 255, 255), (24, 26, 24)


@dataclass(frozen=True)
class PageWorld:
    """What was made, as the deployment's recipe names it."""

    cluster: Cluster
    model: str = MODEL
    index: str = INDEX
    chips: tuple[str, ...] = (CHIPS, COAST_CHIPS)


def make_page_world(root: str, data_root: Path) -> PageWorld:
    """Model, chips of both scenes, photographs in `data_root`/photos, and the index of all."""
    cluster = tiny_cluster(root, data_root=str(data_root))
    embedder = _bright_texts(bright_embedder(image_size=CHIP_SIZE_PX))
    save_model(Path(Artifact(root, MODEL).path("model")), embedder.model, embedder.tokenizer)
    finish(root, MODEL)
    make_chips(root)
    _make_coast(root)
    (data_root / "photos").mkdir(parents=True)
    for name, level in (("bright.jpg", 200), ("dim.jpg", 90)):
        pixels = np.full((120, 200, 3), 30, dtype=np.uint8)
        pixels[30:60, 120:160] = level
        (data_root / "photos" / name).write_bytes(jpeg(pixels))
    sources = {
        "chips": [{"chips": CHIPS, "captions": CAPTIONS}, {"chips": COAST_CHIPS}],
        "folders": [{"path": "photos", "scene": "photos"}],
    }
    config = BuildIndexConfig.model_validate({"output": INDEX, "model": MODEL} | sources)
    artifact = Artifact(root, INDEX)
    counts = run_plain(*index_pipeline(config, cluster, artifact))
    finish_index(artifact.uri, Embedder.load(Path(Artifact(root, MODEL).path("model"))).model_hash, 1000)
    finish(root, INDEX, counts)
    return PageWorld(cluster)


def _bright_texts(embedder: Embedder) -> Embedder:
    text = embedder.model.text
    with torch.no_grad():
        for parameter in text.blocks.parameters():
            parameter.zero_()
        text.position_TD.zero_()
        text.token_embedding_VD.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]))
        if text.projection is not None:
            text.projection.weight.copy_(torch.eye(4))
    return embedder


def _make_coast(root: str) -> None:
    """A dark scene south of the town whose one bright thing lies off the middle of its chip."""
    pixels_HWC = np.full((SIDE_PX, SIDE_PX, 3), DARK, dtype=np.uint8)
    pixels_HWC += np.random.default_rng(3).integers(0, 12, pixels_HWC.shape, dtype=np.uint8)
    top, left = (CHIP_SIZE_PX * part for part in divmod(5, NUM_SIDE))
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5
    distance_px = np.hypot(rows - top - LANDMARK_PX[0], columns - left - LANDMARK_PX[1])
    pixels_HWC[distance_px <= 9] = CYAN
    path = Path(root) / "scenes" / f"{COAST}.tif"
    transform = from_origin(500_000, 5_498_900, GSD_M, GSD_M)
    profile = {"driver": "GTiff", "width": SIDE_PX, "height": SIDE_PX, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32632", transform=transform, tiled=True, **profile) as raster:
        raster.write(np.moveaxis(pixels_HWC, 2, 0))
    grid = describe_scene(str(path), str(path), SceneSource(path=str(path), dates={"*": COAST_TIME})).grid
    chips = [_chip(pixels_HWC, grid, index) for index in range(NUM_SIDE**2)]
    artifact = Artifact(root, COAST_CHIPS)
    lance.write_dataset(pa.Table.from_pylist(chips, schema=CHIP_SCHEMA), artifact.path("chips.lance"))
    source = SceneSource(path=str(path), attribution="© Test Coast", dates={"*": COAST_TIME})
    entry = describe_scene(str(path), str(path), source).to_json()
    credits = {"landmark_attributions": ["© OpenStreetMap contributors, ODbL"]}
    write_json(artifact.path("scenes.json"), [entry | credits])
    finish(root, COAST_CHIPS)


def _chip(pixels_HWC: np.ndarray, grid: Grid, index: int) -> dict[str, Any]:
    row, column = (CHIP_SIZE_PX * part for part in divmod(index, NUM_SIDE))
    landmark = {"id": "way/1", "kind": LANDMARK_KIND, "name": "", "position": "left", "area_fraction": 0.1}
    return {
        "id": f"{COAST}-{index:04d}",
        "image": jpeg(pixels_HWC[row : row + CHIP_SIZE_PX, column : column + CHIP_SIZE_PX]),
        "scene": COAST,
        "split": "val",
        "row_px": row,
        "column_px": column,
        "height_px": CHIP_SIZE_PX,
        "width_px": CHIP_SIZE_PX,
        "bounds_lonlat": grid.bounds_lonlat(row, column, CHIP_SIZE_PX, CHIP_SIZE_PX),
        "ground_sample_distance_m": COAST_GSD_M,  # told so, to have two scales to choose from
        "datetime": COAST_TIME,
        "nodata_fraction": 0.0,
        "landmarks": [landmark] if index == 5 else [],
    }


def centre_px(screen: Image.Image, low: tuple[int, int, int], high: tuple[int, int, int]) -> tuple[float, float]:
    """Mean x and y of the pixels of a screenshot whose colours lie between two."""
    pixels_HWC = np.asarray(screen.convert("RGB"))
    rows, columns = np.nonzero(((pixels_HWC >= low) & (pixels_HWC <= high)).all(axis=2))
    assert len(rows), f"no pixel between {low} and {high}"
    return float(columns.mean()), float(rows.mean())
