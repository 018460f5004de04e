"""The localize job without Ray, on small scenes: files, ledger, counts, resume, memory, and bad input."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tiny_service
from rasterio.transform import Affine

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, validate
from rsplatform.curate.pipeline import Pipeline, Shard, run_plain
from rsplatform.ledger import read_drops
from rsplatform.localize import score_scenes
from rsplatform.localize.products import ENDINGS, product_names
from rsplatform.localize.run import LocalizeConfig, localize_with
from rsplatform.stage import open_stage
from tests.conftest import REPOSITORY

CLASSES = [{"name": "stadium", "prompts": ["a stadium"]}, {"name": "harbour", "prompts": ["harbour and water"]}]
BACKGROUND = ["an aerial image of a field"]
UTM = Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 5_500_000.0)
Run = Callable[[Pipeline, Sequence[Shard]], dict[str, Any]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model, and a folder of one good scene, one truncated and one without CRS."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    whole = (root / "scenes" / f"{tiny_service.SCENE}.tif").read_bytes()
    (root / "scenes" / "broken.tif").write_bytes(whole[: len(whole) // 3])
    return Cluster(root=str(root), data_root=str(root))


def recipe(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {"output": "localization/a/v1", "model": tiny_service.MODEL, "classes": CLASSES}
    values |= {"background_prompts": BACKGROUND, "ground_sample_distance_m": 4.0, "min_area_m2": 0.0}
    return values | {"scenes": {"path": "scenes"}} | changes


def localize_plainly(cluster: Cluster, run: Run = run_plain, **changes: object) -> Artifact:
    config = validate(LocalizeConfig, recipe(**changes), "recipe.yaml")
    with open_stage(config, cluster) as stage:
        localize_with(config, cluster, stage, run)
    return stage.artifact


def write_scene(path: Path, image_HWC: np.ndarray, **profile: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place: dict[str, Any] = {"crs": "EPSG:32632", "transform": UTM} | profile
    height, width, count = image_HWC.shape
    kind = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": image_HWC.dtype}
    with rasterio.open(path, "w", **kind, **place) as raster:
        raster.write(np.moveaxis(image_HWC, 2, 0))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8)


def features(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return json.loads(storage.read_bytes(artifact.path(name)))["features"]


def test_files_are_georeferenced_and_bad_scenes_have_a_reason(cluster: Cluster) -> None:
    artifact = localize_plainly(cluster)
    manifest = artifact.manifest()
    assert (manifest["counts"]["inputs"], manifest["counts"]["kept"]) == (2, 1)
    assert manifest["counts"]["dropped"] == {"unreadable": 1}
    assert [row["id"] for row in read_drops(artifact).to_pylist()] == ["scenes/broken.tif"]
    name = tiny_service.SCENE
    with (
        rasterio.open(artifact.path(f"{name}_scores.tif")) as scores,
        rasterio.open(artifact.path(f"{name}_mask.tif")) as mask,
        rasterio.open(Path(cluster.root) / "scenes" / f"{name}.tif") as scene,
    ):
        assert scores.count == len(CLASSES) + len(BACKGROUND)
        assert scores.tags()["model"] == tiny_service.MODEL
        assert mask.res == (4.0, 4.0)
        np.testing.assert_allclose(mask.bounds, scene.bounds, atol=1e-6)
        assert set(np.unique(mask.read(1))) <= {0, 1, 2}
    polygons = features(artifact, f"{name}.geojson")
    assert len(polygons) == len(features(artifact, f"{name}_objects.geojson")) == manifest["metrics"]["regions"]
    assert all(feature["properties"]["area_m2"] > 0 for feature in polygons)
    assert all(storage.exists(artifact.path(f"{name}{ending}")) for ending in ENDINGS)


def test_counts_are_by_scene_and_class(cluster: Cluster) -> None:
    artifact = Artifact(cluster.root, "localization/a/v1")
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(artifact.path("counts.csv")).decode())))
    polygons = features(artifact, f"{tiny_service.SCENE}.geojson")
    assert [(row["scene"], row["class"], row["area_unit"]) for row in rows] == [
        (tiny_service.SCENE, name, "m2") for name in ("stadium", "harbour")
    ]
    for row in rows:
        own = [item["properties"]["area_m2"] for item in polygons if item["properties"]["class"] == row["class"]]
        assert int(row["regions"]) == len(own) == artifact.manifest()["counts"]["regions"][row["class"]]
        assert float(row["area"]) == pytest.approx(sum(own), abs=0.1)


def test_no_usable_scene_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="scenes: no usable one among 1: unreadable.*; mend them or name others"):
        localize_plainly(cluster, output="localization/b/v1", scenes={"path": "scenes", "pattern": "broken.tif"})
    with pytest.raises(ConfigError, match=r"\*\.jp2"):
        localize_plainly(cluster, output="localization/c/v1", scenes={"path": "scenes", "pattern": "*.jp2"})


def test_files_of_the_same_name_do_not_meet(tmp_path: Path, cluster: Cluster) -> None:
    for number, name in enumerate(("a.tif", "east/a.tif", "west/a.tif", "west/a.tiff")):
        write_scene(tmp_path / "many" / name, noise(40, 40, number))
    artifact = localize_plainly(cluster, output="localization/many/v1", scenes={"path": str(tmp_path / "many")})
    names = {"a", "east/a", "west/a.tif", "west/a.tiff"}
    assert {file.removesuffix("_mask.tif") for file in storage.list_files(artifact.uri) if "mask" in file} == names
    scores = [storage.read_bytes(artifact.path(f"{name}_scores.tif")) for name in names]
    assert len(set(scores)) == 4
    assert product_names(["x/a.tif", "x/a_objects.tif"], "x") == {
        "x/a.tif": "a.tif",
        "x/a_objects.tif": "a_objects.tif",
    }


class Interrupted(Exception):
    """What ends a run in the middle."""


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had begun: strips that were scored are not scored again, files of finished scenes not written."""
    monkeypatch.setattr(score_scenes, "STRIP_PATCHES", 64)  # several strips a scene
    for number in range(3):
        write_scene(tmp_path / "three" / f"{number}.tif", noise(150 + 10 * number, 130, number))
    source = {"path": str(tmp_path / "three")}
    whole = localize_plainly(cluster, output="localization/whole/v1", scenes=source)
    done: list[str] = []

    def until(stage: str, number: int) -> Run:
        def run(pipeline: Pipeline, shards: Sequence[Shard]) -> dict[str, Any]:
            done.extend(
                f"{pipeline.stage} {shard['shard']}"
                for shard in shards
                if not storage.exists(pipeline.artifact.path(f"work/parts/{shard['shard']}.json"))
            )
            if pipeline.stage == stage:
                run_plain(pipeline, shards[:number])
                raise Interrupted
            return run_plain(pipeline, shards)

        return run

    for stage, number in (("localize_strips", 4), ("localize", 2)):
        with pytest.raises(Interrupted):
            localize_plainly(cluster, until(stage, number), output="localization/cut/v1", scenes=source)
    cut = localize_plainly(cluster, until("", 0), output="localization/cut/v1", scenes=source)
    strips = [name for name in done if name.startswith("localize_strips")]
    assert len(strips) == 2 * len(set(strips)) - 4 and len(set(strips)) == 6
    assert [name for name in done if name.startswith("localize scene")] == [
        *(f"localize scene_{number:06d}" for number in range(3)),
        "localize scene_000002",
    ]
    files = [name for name in storage.list_files(whole.uri) if name.endswith((*ENDINGS, "counts.csv"))]
    assert len(files) == 3 * len(ENDINGS) + 1
    differing = [name for name in files if storage.read_bytes(whole.path(name)) != storage.read_bytes(cut.path(name))]
    assert differing == []
    assert cut.manifest()["counts"] == whole.manifest()["counts"]


def test_strips_leave_no_trace_in_the_scores(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scene(tmp_path / "one" / "a.tif", noise(300, 200))
    source = {"path": str(tmp_path / "one")}
    found = []
    for name, patches in (("whole", 2**17), ("strips", 60)):
        monkeypatch.setattr(score_scenes, "STRIP_PATCHES", patches)
        artifact = localize_plainly(cluster, output=f"localization/{name}_one/v1", scenes=source)
        with rasterio.open(artifact.path("a_scores.tif")) as raster:
            found.append(raster.read())
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_odd_scenes_have_a_stated_meaning(tmp_path: Path, cluster: Cluster) -> None:
    """No CRS: pixels. All nodata: a drop. Floats: stretched. One pixel: a scene."""
    folder = tmp_path / "odd"
    write_scene(folder / "nowhere.tif", noise(64, 80), crs=None, transform=Affine.identity())
    write_scene(folder / "no_transform.tif", noise(64, 80), transform=Affine.identity())
    write_scene(folder / "empty.tif", np.zeros((64, 64, 3), np.uint8), nodata=0)
    write_scene(folder / "pixel.tif", noise(1, 1))
    floats = noise(64, 64).astype(np.float32) / 255
    floats[:20, :20] = np.nan
    write_scene(folder / "floats.tif", floats)
    write_scene(folder / "empty_floats.tif", np.full((64, 64, 3), np.nan, np.float32), nodata=float("nan"))
    write_scene(folder / "two_bands.tif", noise(64, 64)[..., :2])
    artifact = localize_plainly(cluster, output="localization/odd/v1", scenes={"path": str(folder)})
    reasons = {Path(row["id"]).stem: row["reason"] for row in read_drops(artifact).to_pylist()}
    assert reasons == {"empty": "no_data", "empty_floats": "no_data", "two_bands": "too_few_bands"}
    for name in ("nowhere", "no_transform"):
        document = storage.read_json(artifact.path(f"{name}.geojson"))
        assert document["coordinates"] == "pixel (column, row): the scene has no CRS"
        with rasterio.open(artifact.path(f"{name}_mask.tif")) as raster:
            assert raster.crs is None and raster.shape == (64, 80)
    units = {row["scene"]: row["area_unit"] for row in csv.DictReader(io.StringIO(counts_of(artifact)))}
    assert units == {"nowhere": "px", "no_transform": "px", "pixel": "m2", "floats": "m2"}
    with rasterio.open(artifact.path("pixel_scores.tif")) as raster:
        assert raster.shape == (1, 1) and np.isfinite(raster.read()).all()
    with rasterio.open(artifact.path("floats_mask.tif")) as raster:
        assert (raster.read(1)[:9, :9] == 255).all() and (raster.read(1)[12:, 12:] != 255).all()


def counts_of(artifact: Artifact) -> str:
    return storage.read_bytes(artifact.path("counts.csv")).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background_prompts": [" "]}, r"background_prompts\.0: .*empty text asks for nothing"),
        ({"classes": [{"name": "a", "prompts": [""]}]}, r"classes\.0\.prompts\.0: .*empty text"),
        ({"classes": [{"name": "", "prompts": ["a"]}]}, r"classes\.0\.name: .*empty text"),
        ({"classes": [{"name": "a", "prompts": []}]}, r"classes\.0\.prompts"),
        ({"classes": CLASSES[:1] * 2}, "two are called 'stadium'"),
        ({"classes": [{"name": str(n), "prompts": ["a"]} for n in range(999)]}, "999, but a mask has room for 254"),
        ({"background_prompts": ["a"] * 1000}, "1002 prompts, at most 1000"),
        ({"window": 4}, "window: .*take 3 or 5"),
        ({"window": 1001}, "window"),
        ({"ground_sample_distance_m": 0}, "ground_sample_distance_m"),
        ({"guided_filter": {"radius_px": 0}}, r"guided_filter\.radius_px"),
        ({"max_hole_m2": -1}, "max_hole_m2"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml: .*{message}"):
        validate(LocalizeConfig, recipe(**changes), "recipe.yaml")


def test_a_thousand_texts_are_mapped(tmp_path: Path, cluster: Cluster) -> None:
    write_scene(tmp_path / "one" / "a.tif", noise(40, 40))
    classes = [{"name": f"class {n}", "prompts": [f"thing {n}", f"a thing {n}"]} for n in range(254)]
    changes = {"classes": classes, "background_prompts": [f"land {n}" for n in range(1000 - 508)]}
    source = {"path": str(tmp_path / "one")}
    artifact = localize_plainly(cluster, output="localization/texts/v1", scenes=source, **changes)
    with rasterio.open(artifact.path("a_scores.tif")) as raster:
        assert raster.count == 1000 and np.isfinite(raster.read(1000)).all()


def test_the_filter_of_the_recipe_reaches_the_maps(tmp_path: Path, cluster: Cluster) -> None:
    write_scene(tmp_path / "one" / "a.tif", np.repeat(np.repeat(noise(10, 10), 16, 0), 16, 1))
    maps = []
    for name, settings in (("plain", None), ("sharp", {"radius_px": 4, "epsilon": 1e-3})):
        changes = {"output": f"localization/{name}/v1", "guided_filter": settings, "ground_sample_distance_m": 2.0}
        artifact = localize_plainly(cluster, scenes={"path": str(tmp_path / "one")}, **changes)
        with rasterio.open(artifact.path("a_scores.tif")) as raster:
            maps.append(raster.read())
    assert np.isfinite(maps[1]).all()
    # inside of a block the picture is flat, so that the filtered map is flatter there
    steps = [np.abs(np.diff(one[:, 6:10, :], axis=1)).mean() for one in maps]
    assert 0 < steps[1] < 0.9 * steps[0]


PEAK = """
import resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
import bright_embedder, numpy as np, torch
from rsplatform.geo import Grid
from rsplatform.localize import score_scenes
from rsplatform.localize.legend import Legend
from rsplatform.localize.picture import encoder, tiling
from rsplatform.localize.products import ProductRecipe, write_products
from rsplatform.localize.scene import SceneReader, score_strips
from rsplatform.localize.vectorize import Limits

embedder, texts = bright_embedder.bright_embedder(16, 128), bright_embedder.bright_and_dark_texts()
legend = Legend(("dark", "bright"), (0, 1), ("bright",), "model/a/v1", "h")

def make(height):
    def read(row, column, rows, columns):
        rows, columns = np.arange(row, row + rows) // 64, np.arange(column, column + columns) // 64
        grey = (rows[:, None] * 7 + columns * 13) % 5 * 50
        return np.repeat(grey[..., None].astype(np.uint8), 3, axis=2)

    reader = SceneReader(height, 1024, read)
    strips = score_strips(reader, encoder(embedder), texts, tiling(embedder, 3))
    grid = Grid("EPSG:32632", (1.0, 0.0, 500000.0, 0.0, -1.0, 5500000.0), 1024, height)
    recipe = ProductRecipe(legend, 1.0, 16, Limits(), None)
    write_products(Path(sys.argv[1]) / str(height), strips, reader, grid, recipe)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

print(make(2048), make(16384))
"""


def test_memory_does_not_grow_with_the_scene(tmp_path: Path) -> None:
    """Eight times the scene, whose scores alone are 134 MB: the peak of the process stays."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    small_mb, large_mb = (int(text) for text in done.stdout.split())
    assert large_mb - small_mb < 50, done.stdout
