"""localize on Ray Data: the same files as without Ray, also if workers die between scoring and writing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dying_workers as dying
import lance
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import ray.cloudpickle
from rasterio.transform import Affine
from tiny_service import CAPTIONS, CHIPS, MODEL, finish, make_artifacts, tiny_cluster

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import validate
from rsplatform.curate.pipeline import Loaded, Pipeline, Shard, run_pipeline, run_plain
from rsplatform.localize import score_scenes
from rsplatform.localize.products import ENDINGS, MakeProducts
from rsplatform.localize.run import LocalizeConfig, localize, localize_with
from rsplatform.records import CHIP_SCHEMA
from rsplatform.runtime import ray_runtime
from rsplatform.stage import open_stage

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(dying)  # workers cannot import what lies in the tests' folder
    with ray_runtime(tiny_cluster(str(tmp_path_factory.mktemp("ray")))):
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model, chips, and a folder of three scenes, one of them damaged."""
    root = tmp_path_factory.mktemp("root")
    make_artifacts(str(root))
    scenes = root / "three"
    scenes.mkdir()
    place = {"crs": "EPSG:32632", "transform": Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 5_500_000.0)}
    for number in range(3):
        pixels = np.random.default_rng(number).integers(1, 255, (3, 200, 160), dtype=np.uint8)
        profile = {"driver": "GTiff", "width": 160, "height": 200, "count": 3, "dtype": "uint8"}
        with rasterio.open(scenes / f"{number}.tif", "w", **profile, **place) as raster:
            raster.write(pixels)
    damaged = (scenes / "1.tif").read_bytes()
    (scenes / "1.tif").write_bytes(damaged[: len(damaged) // 2])
    return tiny_cluster(str(root), data_root=str(root))


def recipe(name: str, **changes: object) -> LocalizeConfig:
    classes = [{"name": "stadium", "prompts": ["a stadium"]}, {"name": "chip", "prompts": ["harbour"], "words": ["3"]}]
    values = {"output": f"localization/{name}/v1", "model": MODEL, "scenes": {"path": "three"}, "classes": classes}
    values |= {"background_prompts": ["a field"], "ground_sample_distance_m": 2.0, "min_area_m2": 100.0}
    return validate(LocalizeConfig, values | changes, "test")


def files(artifact: Artifact) -> dict[str, bytes]:
    names = storage.list_files(artifact.uri)
    return {name: storage.read_bytes(artifact.path(name)) for name in names if name.endswith((*ENDINGS, ".csv"))}


def test_workers_that_die_change_nothing(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dies with a scored strip in its hands, one after it has written a scene's files; both are done again."""
    monkeypatch.setattr(score_scenes, "STRIP_PATCHES", 100)  # five strips a scene, which the driver cuts
    whole = localize(recipe("whole"), cluster)
    deaths = [dying.Death("three/0.tif#10", str(tmp_path / "a")), dying.Death("three/2.tif", str(tmp_path / "b"))]

    def run(pipeline: Pipeline, shards: Sequence[Shard]) -> dict[str, Any]:
        (operation,) = pipeline.operations
        if isinstance(operation, Loaded):
            operation = Loaded(dying.DyingStripScorer, (*operation.arguments, deaths[0]))
        else:
            assert isinstance(operation, MakeProducts)
            known = (operation.artifact, operation.strips_uri, operation.recipe)
            operation = dying.DyingProducer(*known, deaths[1])
        return run_pipeline(replace(pipeline, operations=(operation,)), shards, cluster)

    with open_stage(recipe("killed"), cluster) as stage:
        localize_with(recipe("killed"), cluster, stage, run)
    killed = stage.artifact
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
    assert files(killed) == files(whole) and len(files(whole)) == 2 * len(ENDINGS) + 1
    for artifact in (whole, killed):
        counts = artifact.manifest()["counts"]
        assert {key: counts[key] for key in ("inputs", "kept", "dropped")} == {
            "inputs": 3,
            "kept": 2,
            "dropped": {"unreadable": 1},
        }


def test_thresholds_are_fitted_on_ray_as_without_it(cluster: Cluster) -> None:
    """Chip 3 says so in its caption, and chip 0 names a stadium: one image for each class."""
    chips = lance.dataset(Artifact(cluster.root, CHIPS).path("chips.lance")).to_table().to_pylist()
    taught = pa.Table.from_pylist([chip | {"split": "train"} for chip in chips], schema=CHIP_SCHEMA)
    lance.write_dataset(taught, Artifact(cluster.root, "chips/taught/v1").path("chips.lance"))
    finish(cluster.root, "chips/taught/v1")
    calibration = {"chips": "chips/taught/v1", "captions": CAPTIONS, "min_images": 1, "max_images": 64}
    config = recipe("calibrated", calibration=calibration)
    artifact = localize(config, cluster)
    plain = config.model_copy(update={"output": "localization/plain/v1"})
    with open_stage(plain, cluster) as stage:
        localize_with(plain, cluster, stage, run_plain)
    found, expected = (storage.read_json(item.path("thresholds.json")) for item in (artifact, stage.artifact))
    assert [item["name"] for item in found] == ["stadium", "chip"]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    with rasterio.open(artifact.path("0_mask.tif")) as raster:
        assert "thresholds" in raster.tags()
