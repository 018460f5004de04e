"""Thresholds from captions on a world that nothing was fitted or chosen on: IoU of masks before and after.

In: an artifact root with the demo's model, chips and captions, as `make demo` leaves it. Another world is made from
`--seed` (its scenes are of other places and share nothing with the first but the way they are drawn), localized with
the recipe `configs/localize/world_calibrated.yaml` as it stands and without its `calibration`, and the masks are
compared with the world's. Out: a line per class, over all scenes together. Masks decide nothing.
Run: `python benchmarks/calibration.py --root artifacts --seed 11`
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.vrt import WarpedVRT

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import load_config
from rsplatform.curate.pipeline import run_plain
from rsplatform.localize.decide import NO_DATA
from rsplatform.localize.run import LocalizeConfig, localize_with
from rsplatform.stage import finished, open_stage
from rsplatform.world.generate import WorldConfig, make_world

RECIPE = str(Path(__file__).parent.parent / "configs" / "localize" / "world_calibrated.yaml")


def localized(arguments: argparse.Namespace, world: Path, name: str, changes: list[str]) -> Artifact:
    """The products of one recipe over all scenes of the world, without Ray."""
    scenes = [f"scenes.path={world / 'scenes'}", "scenes.pattern='*.tif'"]
    output = f"output=localization/calibration_{name}/seed{arguments.seed}"
    config = load_config(LocalizeConfig, RECIPE, [output, *scenes, *changes])
    cluster = Cluster(root=str(arguments.root))
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        localize_with(config, cluster, stage, run_plain)
    return stage.artifact


def overlaps(artifact: Artifact, world: Path, class_names: list[str]) -> np.ndarray:
    """(C, 2) pixels of intersection and union with the world's masks, on the maps' grid."""
    true_ids = {name: int(label) for label, name in json.loads((world / "masks/classes.json").read_text()).items()}
    sums = np.zeros((len(class_names), 2), dtype=np.int64)
    for mask in sorted((world / "masks").glob("*.tif")):
        with (
            rasterio.open(artifact.path(f"{mask.stem}_mask.tif")) as found,
            rasterio.open(mask) as true,
            WarpedVRT(
                true, crs=found.crs, transform=found.transform, width=found.width, height=found.height, nodata=NO_DATA
            ) as placed,
        ):
            found_HW, true_HW = found.read(1), placed.read(1)
        seen_HW = (found_HW != NO_DATA) & (true_HW != NO_DATA)
        for index, name in enumerate(class_names):
            pair = (found_HW[seen_HW] == index + 1, true_HW[seen_HW] == true_ids[name])
            sums[index] += (np.logical_and(*pair).sum(), np.logical_or(*pair).sum())
    return sums


def main() -> None:
    """Make the world, localize twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("artifacts"))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--scenes", type=int, default=4)
    arguments = parser.parse_args()
    arguments.root = arguments.root.resolve()
    world = arguments.root / "benchmark_worlds" / f"seed{arguments.seed}"
    sizes: dict[str, Any] = {"num_train_scenes": arguments.scenes, "num_val_scenes": 0}
    make_world(WorldConfig(seed=arguments.seed, num_web_pairs=0, num_train_pairs=0, **sizes), world)
    plain = localized(arguments, world, "none", ["calibration=null"])
    fitted = localized(arguments, world, "captions", [])
    names = [item.name for item in load_config(LocalizeConfig, RECIPE, []).classes]
    before, after = (overlaps(artifact, world, names) for artifact in (plain, fitted))
    ious = [100 * sums[:, 0] / np.maximum(sums[:, 1], 1) for sums in (before, after)]
    for name, one, other in zip([*names, "mean"], *[[*iou, iou.mean()] for iou in ious], strict=True):
        print(f"seed {arguments.seed}, {name}: IoU {one:.1f} → {other:.1f}")


if __name__ == "__main__":
    main()
