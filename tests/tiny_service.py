"""A whole served world in a temporary root: one GeoTIFF scene, its chips, captions, a tiny random model.

Made through the same writers that the stages use. The model is not trained: tests state contracts, not quality.
"""

import io
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from rsplatform.artifacts import Artifact, commit
from rsplatform.cluster import Cluster
from rsplatform.config import validate
from rsplatform.curate.pipeline import run_plain
from rsplatform.geo import Grid
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.finish import finish_index
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.weights import save_model
from rsplatform.records import CAPTION_SCHEMA, CHIP_SCHEMA
from rsplatform.sources.scenes import SceneSource, describe_scene
from rsplatform.storage import write_json

SCENE = "town_north"
SCENE_SIZE_PX = 512
CHIP_SIZE_PX = 64
GSD_M = 2.0
KINDS = ("stadium", "harbour", "road", "o'hara field")
# A caption that would run in a page that trusts it.
HOSTILE_CAPTION = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> a stadium"
MODEL, CHIPS, CAPTIONS, INDEX = "model/tiny/v1", "chips/tiny/v1", "captions/tiny/v1", "index/tiny/v1"


def tiny_cluster(root: str, **values: Any) -> Cluster:
    """Two CPUs, everything below `root`, a free port."""
    serve = {"host": "127.0.0.1", "port": 0, "cpus_per_replica": 0.4}
    data = {"num_actors": 1, "cpus_per_actor": 0.5, "memory_per_task_gb": 0.1}
    return validate(Cluster, {"root": root, "num_cpus": 2, "serve": serve, "data": data} | values, "test")


def build_config() -> BuildIndexConfig:
    """The recipe of the tiny index."""
    return BuildIndexConfig(output=INDEX, model=MODEL, chips=CHIPS, captions=CAPTIONS, rows_per_shard=20)


def make_artifacts(root: str) -> None:
    """Model, chips and captions, each with its manifest; the index is left to the test."""
    make_model(root)
    make_chips(root)


def make_all(root: str) -> None:
    """The same, and the index, built without Ray."""
    make_artifacts(root)
    make_index(root)


def make_index(root: str) -> None:
    """The index of the model and the chips, built without Ray."""
    config = build_config()
    artifact = Artifact(root, INDEX)
    pipeline, shards = index_pipeline(config, tiny_cluster(root), artifact)
    counts = run_plain(pipeline, shards)
    finish_index(artifact.uri, load_embedder(root, MODEL).model_hash, config.exact_below_rows)
    finish(root, INDEX, counts)


def finish(root: str, ref: str, counts: dict[str, Any] | None = None) -> None:
    """Write the manifest of an artifact that a test made by hand."""
    commit(Artifact(root, ref), {"config": {}, "inputs": {}}, counts=counts or {}, metrics={}, run_id="none")


def make_model(root: str, ref: str = MODEL, seed: int = 0) -> None:
    """A small random MaMMUT at 64 px with a tokenizer trained on a few words."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["a stadium beside a road", "harbour and water", "an aerial image of a field"], 300)
    model = Mammut(mammut_config("mini", vocab_size=tokenizer.vocab_size))
    folder = Path(Artifact(root, ref).path("model"))
    folder.mkdir(parents=True)
    save_model(folder, model, tokenizer)
    finish(root, ref)


def make_scaled_model(root: str, ref: str = MODEL) -> None:
    """The same at 32 px, so that chips are resized, and as if it had learned something about scale."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a stadium beside a road", "harbour and water", "an aerial image of a field"], 300)
    sizes = {f"{part}_{name}": 32 for part in ("vision", "text") for name in ("width", "mlp_width")}
    sizes |= {"vision_num_layers": 1, "image_size": 32, "vocab_size": tokenizer.vocab_size}
    model = Mammut(mammut_config("mini", **sizes, ground_sample_distance_encoding=True))
    assert model.vision.scale_encoding is not None
    with torch.no_grad():
        model.vision.scale_encoding.weight_DF.normal_()
    save_model(Path(Artifact(root, ref).path("model")), model, tokenizer)
    finish(root, ref)


def make_chips(root: str) -> None:
    """A UTM scene of coloured blocks, its 64 chips, their captions and the catalogue."""
    artifact = Artifact(root, CHIPS)
    scene_path = Path(root) / "scenes" / f"{SCENE}.tif"
    pixels_HWC = _scene_pixels()
    grid = _write_scene(scene_path, pixels_HWC)
    rows = [_chip(pixels_HWC, grid, index) for index in range((SCENE_SIZE_PX // CHIP_SIZE_PX) ** 2)]
    lance.write_dataset(pa.Table.from_pylist(rows, schema=CHIP_SCHEMA), artifact.path("chips.lance"))
    source = SceneSource(path=str(scene_path), attribution="© Test <b>Survey</b>", dates={"*": "2021-06-01"})
    entry = describe_scene(str(scene_path), str(scene_path), source).to_json()
    write_json(artifact.path("scenes.json"), [entry])
    finish(root, CHIPS)
    captions = [
        {"id": row["id"], "captions": [HOSTILE_CAPTION if n == 0 else f"chip {n}"], "claims": [], "captioner": "test"}
        for n, row in enumerate(rows)
    ]
    path = Artifact(root, CAPTIONS).path("captions.lance")
    lance.write_dataset(pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA), path)
    finish(root, CAPTIONS)


def jpeg(pixels_HWC: np.ndarray) -> bytes:
    """Encoded picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _scene_pixels() -> np.ndarray:
    rng = np.random.default_rng(7)
    blocks = rng.integers(40, 215, (16, 16, 3))
    pixels = np.kron(blocks, np.ones((SCENE_SIZE_PX // 16, SCENE_SIZE_PX // 16, 1)))
    noisy = pixels + rng.normal(0, 12, (SCENE_SIZE_PX, SCENE_SIZE_PX, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def _write_scene(path: Path, pixels_HWC: np.ndarray) -> Grid:
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = from_origin(500_000, 5_500_000, GSD_M, GSD_M)
    profile = {"driver": "GTiff", "width": SCENE_SIZE_PX, "height": SCENE_SIZE_PX, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32632", transform=transform, tiled=True, **profile) as raster:
        raster.write(np.moveaxis(pixels_HWC, 2, 0))
    a, b, c, d, e, f = tuple(transform)[:6]
    return Grid("EPSG:32632", (a, b, c, d, e, f), SCENE_SIZE_PX, SCENE_SIZE_PX)


def _chip(pixels_HWC: np.ndarray, grid: Grid, index: int) -> dict[str, Any]:
    row, column = (CHIP_SIZE_PX * part for part in divmod(index, SCENE_SIZE_PX // CHIP_SIZE_PX))
    kind = KINDS[index % len(KINDS)]
    landmark = {"id": f"way/{index}", "kind": kind, "name": "", "position": "centre", "area_fraction": 0.2}
    return {
        "id": f"{SCENE}-{index:04d}",
        "image": jpeg(pixels_HWC[row : row + CHIP_SIZE_PX, column : column + CHIP_SIZE_PX]),
        "scene": SCENE,
        "split": "val",
        "row_px": row,
        "column_px": column,
        "height_px": CHIP_SIZE_PX,
        "width_px": CHIP_SIZE_PX,
        "bounds_lonlat": grid.bounds_lonlat(row, column, CHIP_SIZE_PX, CHIP_SIZE_PX),
        "ground_sample_distance_m": GSD_M,
        "datetime": "2021-06-01T10:00:00Z" if index % 2 else "",
        "nodata_fraction": 0.0,
        "landmarks": [landmark] if index % 8 else [],
    }
