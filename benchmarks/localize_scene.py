"""`localize` over one large scene in one process: time by step, and the peak of memory, which does not grow with it.

In: nothing; a tiled COG of `--side` pixels squared, a small random model and all products are written below `--root`.
Out: CPU and wall seconds of scoring and of writing, resident peak, sizes of the files. The scene is in a UTM zone, on
the maps' own pixels as Sentinel-2's are, or with `--crs` in another CRS, so that every pixel is resampled.
Run: `python benchmarks/localize_scene.py --threads 1`
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import torch
from rasterio.warp import calculate_default_transform

from rsplatform.artifacts import Artifact, commit
from rsplatform.cluster import Cluster
from rsplatform.config import validate
from rsplatform.curate.pipeline import Pipeline, Shard, run_plain
from rsplatform.localize.run import LocalizeConfig, localize_with
from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.weights import save_model
from rsplatform.stage import open_stage

MODEL = "model/random/v1"
UTM, PIXEL_M, EAST, NORTH = "EPSG:32635", 10.0, 300_000.0, 4_000_020.0
BLOCK_PX = 512


def write_scene(path: Path, side: int, crs: str) -> None:
    """A COG of blobs and noise, written block by block."""
    transform: Any = rasterio.Affine(PIXEL_M, 0.0, EAST, 0.0, -PIXEL_M, NORTH)
    if crs != UTM:
        bounds = (EAST, NORTH - side * PIXEL_M, EAST + side * PIXEL_M, NORTH)
        transform, _, _ = calculate_default_transform(UTM, crs, side, side, *bounds)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "crs": crs}
    profile |= {"tiled": True, "blockxsize": BLOCK_PX, "blockysize": BLOCK_PX, "transform": transform}
    generator = np.random.default_rng(0)
    plain = path.with_name("plain.tif")
    with rasterio.open(plain, "w", **profile) as raster:
        for _, window in raster.block_windows(1):
            coarse = generator.integers(20, 200, (3, BLOCK_PX // 32, BLOCK_PX // 32))
            block = np.repeat(np.repeat(coarse, 32, axis=1), 32, axis=2) + generator.integers(0, 40, (3, 1, BLOCK_PX))
            raster.write(block[:, : window.height, : window.width].astype(np.uint8), window=window)
    rasterio.shutil.copy(plain, path, driver="COG", compress="DEFLATE")
    plain.unlink()


def write_model(root: Path, width: int) -> None:
    """A random model of 64-px pictures; memory and the time of writing do not depend on its weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["an aerial image of a field"], 280)
    sizes: dict[str, Any] = {f"{part}_{name}": width for part in ("vision", "text") for name in ("width", "mlp_width")}
    heads = {"vision_num_heads": 1, "text_num_heads": 1, "vision_num_layers": 1, "text_num_layers": 1}
    artifact = Artifact(str(root), MODEL)
    folder = Path(artifact.path("model"))
    folder.mkdir(parents=True)
    model = Mammut(mammut_config("mini", vocab_size=tokenizer.vocab_size, **sizes, **heads))
    save_model(folder, model, tokenizer)
    commit(artifact, {"config": {}, "inputs": {}}, counts={}, metrics={}, run_id="none")


def peak_gib() -> float:
    """Resident peak of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed_run(pipeline: Pipeline, shards: Sequence[Shard]) -> dict[str, Any]:
    """A step without Ray, and a line about it."""
    wall, cpu = time.perf_counter(), time.process_time()
    counts = run_plain(pipeline, shards)
    taken = f"{time.process_time() - cpu:.0f} s of CPU, {time.perf_counter() - wall:.0f} s"
    print(f"  {pipeline.stage}, {len(shards)} shards: {taken}; resident peak {peak_gib():.2f} GiB", flush=True)
    return counts


def measure(root: Path, arguments: argparse.Namespace) -> None:
    """Write scene and model, localize, report."""
    (root / "scenes").mkdir()
    # by another process, whose memory is not this one's
    writer = get_context("spawn").Process(
        target=write_scene, args=(root / "scenes" / "scene.tif", arguments.side, arguments.crs)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the scene could not be written; see above")
    write_model(root, arguments.model_width)
    print(f"{arguments.side} px squared in {arguments.crs}; before the job: resident peak {peak_gib():.2f} GiB")
    classes = [{"name": f"class {number}", "prompts": [f"thing {number}"]} for number in range(arguments.texts - 1)]
    recipe = {"output": "localization/large/v1", "model": MODEL, "scenes": {"path": "scenes"}, "classes": classes}
    recipe |= {"background_prompts": ["a field"], "ground_sample_distance_m": PIXEL_M, "min_area_m2": 1e5}
    cluster = Cluster(root=str(root), data_root=str(root))
    config = validate(LocalizeConfig, recipe, "benchmark")
    with open_stage(config, cluster) as stage:
        localize_with(config, cluster, stage, timed_run)
    for path in sorted(Path(stage.artifact.uri).glob("scene*")):
        print(f"  {path.name}: {path.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """Parse and run, in a folder that goes away unless one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=10_980, help="pixels; the default is a Sentinel-2 tile at 10 m")
    parser.add_argument("--crs", default=UTM, help="of the scene; maps always lie in its UTM zone")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--model-width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--root", type=Path, help="an empty folder to keep what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    use_onednn_products()
    with ExitStack() as stack:
        root = arguments.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        measure(root, arguments)


if __name__ == "__main__":
    main()
