"""Chips without Ray: a bad scene or block costs itself, held-out scenes are val, and every window is accounted for."""

from pathlib import Path

import lance
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.curate import chips
from rsplatform.curate.pipeline import run_plain
from rsplatform.ledger import read_drops
from rsplatform.sources.scenes import SceneSource


def write_scene(path: Path, *, has_crs: bool = True) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 256, 256)).astype(np.uint8)
    profile = {"count": 3, "height": 256, "width": 256, "dtype": "uint8", "tiled": True, "compress": "deflate"}
    profile |= {"blockxsize": 64, "blockysize": 64, "transform": from_origin(500_000, 4_000_000, 2, 2)}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32614" if has_crs else None, **profile) as target:
        target.write(pixels)
    return path


def config_of(folder: Path, **changes: object) -> chips.IngestScenesConfig:
    values = {"output": "chips/t/v1", "scenes": [SceneSource(path=str(folder))], "keep_without_landmark": True}
    values |= {"chip_size_px": 32, "ground_sample_distance_m": 2.0, "holdout_scenes": ["val_*"]}
    return chips.IngestScenesConfig.model_validate(values | changes)


def test_bad_scenes_and_blocks_are_ledger_rows(tmp_path: Path, root: str) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("train_a", "val_b"):
        write_scene(folder / f"{name}.tif")
    write_scene(folder / "no_crs.tif", has_crs=False)
    (folder / "broken.tif").write_bytes(b"II*\0")
    config, cluster = config_of(folder), Cluster(root=root)
    scenes, drops = chips._scenes(config, cluster)
    assert {Path(drop.id).stem: drop.reason for drop in drops} == {"broken": "unreadable", "no_crs": "no_crs"}
    assert {scene.id: scene.split for scene in scenes} == {"train_a": "train", "val_b": "val"}
    cut = folder / "train_a.tif"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    artifact = Artifact(root, config.output)
    chips._store_landmarks(config, cluster, artifact)
    shards, num_windows = chips._shards(config, scenes)
    counts = run_plain(chips.make_pipeline(config, artifact), shards)
    assert counts["inputs"] == num_windows == counts["kept"] + sum(counts["dropped"].values())
    assert 0 < counts["dropped"]["unreadable"] < num_windows / 2, "chips of the sound half of the cut file are kept"
    assert {drop["id"][:7] for drop in read_drops(artifact).to_pylist()} == {"train_a"}
    rows = lance.dataset(artifact.path(chips.CHIPS_TABLE)).to_table(columns=["id", "split"]).to_pylist()
    assert {row["split"] for row in rows if row["id"].startswith("val_")} == {"val"}


def test_no_usable_scene_and_misspelt_globs_are_errors(tmp_path: Path, root: str) -> None:
    write_scene(tmp_path / "no_crs.tif", has_crs=False)
    with pytest.raises(ConfigError, match="none of 1 files is usable: no_crs"):
        chips._scenes(config_of(tmp_path), Cluster(root=root))
    write_scene(tmp_path / "train_a.tif")
    with pytest.raises(ConfigError, match=r"'val_\*' matches no usable scene; there are train_a"):
        chips._scenes(config_of(tmp_path), Cluster(root=root))
