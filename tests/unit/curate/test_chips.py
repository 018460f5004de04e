"""Chips without Ray: a bad scene or block costs itself, held-out scenes are val, and every window is accounted for."""

import json
from pathlib import Path

import lance
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, load_config
from rsplatform.curate import chips, cut_chips
from rsplatform.curate.caption import ReadAndDescribe, TemplateCaptioner
from rsplatform.curate.pipeline import run_plain
from rsplatform.ledger import read_drops
from rsplatform.model.preprocess import decode_image
from rsplatform.serve.catalogue import Catalogue
from rsplatform.sources.scenes import SceneSource, describe_scene

REPOSITORY = Path(__file__).resolve().parents[3]
FAR_AWAY = json.dumps(
    {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"building": "yes"},
                "geometry": shapely.geometry.mapping(shapely.box(10, 50, 10.001, 50.001)),
            }
        ],
    }
)


def write_scene(path: Path, *, crs: str | None = "EPSG:32614") -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 256, 256)).astype(np.uint8)
    profile = {"count": 3, "height": 256, "width": 256, "dtype": "uint8", "tiled": True, "compress": "deflate"}
    profile |= {"blockxsize": 64, "blockysize": 64, "transform": from_origin(500_000, 4_000_000, 2, 2)}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, **profile) as target:
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
    write_scene(folder / "no_crs.tif", crs=None)
    (folder / "broken.tif").write_bytes(b"II*\0")
    write_scene(folder / "site.tif", crs='LOCAL_CS["site grid",UNIT["metre",1]]')
    config, cluster = config_of(folder), Cluster(root=root)
    scenes, drops, num_files = chips._scenes(config, cluster)
    assert num_files == 5
    assert {Path(drop.id).stem: drop.reason for drop in drops} == {
        "broken": "unreadable",
        "no_crs": "no_crs",
        "site": "unusable_crs",
    }
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


def cut(config: chips.IngestScenesConfig, cluster: Cluster) -> tuple[dict, list[dict]]:
    """Counts and rows of a recipe, without Ray or a stage."""
    artifact = Artifact(cluster.root, config.output)
    scenes, _, _ = chips._scenes(config, cluster)
    chips._store_landmarks(config, cluster, artifact)
    shards, _ = chips._shards(config, scenes)
    counts = run_plain(chips.make_pipeline(config, artifact), shards)
    return counts, lance.dataset(artifact.path(chips.CHIPS_TABLE)).to_table().to_pylist()


def test_a_row_of_chips_is_read_in_runs_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip across a wide scene would not fit a task's memory; the chips are the same however they are read."""
    path = write_scene(tmp_path / "a.tif")
    config = config_of(tmp_path)
    scene = describe_scene("a.tif", str(path), config.scenes[0])
    windows = cut_chips.windows_of(scene, config.recipe)
    chip_px = 32 * 33
    for max_px in (1, 3 * chip_px, 10**9):
        runs = list(cut_chips.read_together(windows, max_px))
        assert [window for run in runs for window in run] == windows
        assert all(cut_chips._area_px(run[0], run[-1]) <= max_px or len(run) == 1 for run in runs)
        assert all(len({window.chip_row for window in run}) == 1 for run in runs)
        assert max(len(run) for run in runs) == {1: 1, 3 * chip_px: 5, 10**9: 15}[max_px]
    shard = {"scene": scene.to_json(), "start": 10, "stop": 40}
    whole = cut_chips.CutChips(config.recipe)(shard)
    monkeypatch.setattr(cut_chips, "MAX_READ_PX", 2 * chip_px)
    assert cut_chips.CutChips(config.recipe)(shard) == whole


def test_a_source_decides_whether_chips_without_landmarks_stay(tmp_path: Path, root: str) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("kept_a", "kept_b", "strict"):
        write_scene(folder / f"{name}.tif")
    (tmp_path / "none.geojson").write_text(FAR_AWAY)
    sources = [
        SceneSource(path=str(folder), pattern="kept_*", keep_without_landmark=True),
        SceneSource(path=str(folder), pattern="strict*"),
    ]
    changes = {"scenes": sources, "landmarks": [{"path": str(tmp_path / "none.geojson")}], "holdout_scenes": []}
    changes |= {"keep_without_landmark": False, "composites": [{"name": "pair", "members": ["kept_*"]}]}
    counts, rows = cut(config_of(folder, **changes), Cluster(root=root))
    assert counts["dropped"] == {"no_landmark": counts["inputs"] / 2}
    assert {row["scene"] for row in rows} == {"pair"}, "the composite says what its members' source says"
    assert all(row["landmarks"] == [] for row in rows)
    kept = [
        source.model_copy(update={"keep_without_landmark": keep})
        for source, keep in zip(sources, (False, True), strict=True)
    ]
    _, rows = cut(config_of(folder, **changes | {"scenes": kept, "output": "chips/t/v2"}), Cluster(root=root))
    assert {row["scene"] for row in rows} == {"strict"}


def test_with_a_value_range_chips_of_a_part_are_as_bright_as_those_of_the_whole(tmp_path: Path, root: str) -> None:
    """And the service's tiles are stretched alike, as the catalogue says."""
    pixels = np.random.default_rng(0).integers(1, 3000, (3, 256, 256)).astype(np.uint16)
    pixels[:, :64] += 5000
    found = []
    for name, top in (("whole", 0), ("part", 64)):
        place = from_origin(500_000, 4_000_000 - 2 * top, 2, 2)
        profile = {"driver": "GTiff", "count": 3, "height": 256 - top, "width": 256, "dtype": "uint16"}
        (tmp_path / name).mkdir()
        with rasterio.open(tmp_path / name / "a.tif", "w", crs="EPSG:32614", transform=place, **profile) as target:
            target.write(pixels[:, top:])
        source = SceneSource.model_validate({"path": str(tmp_path / name), "value_range": [0, 8000]})
        changes = {"scenes": [source], "holdout_scenes": [], "stride_fraction": 1.0, "output": f"chips/{name}/v1"}
        config = config_of(tmp_path, **changes)
        scenes, _, _ = chips._scenes(config, Cluster(root=root))
        entries = json.loads(json.dumps(chips._catalogue(config, scenes)))
        assert Catalogue(entries, str).scenes["a"].stretch == ((0, 8000),) * 3
        found.append([decode_image(row["image"]).mean() for row in cut(config, Cluster(root=root))[1]])
    assert len(found[1]) == 48 and min(found[0][:8]) > 190
    expected = 255 * pixels[:, 64:].mean() / 8000
    assert found[1] == pytest.approx([expected] * 48, abs=3) and found[0][16:] == pytest.approx(found[1], abs=1)


def test_a_composite_may_not_take_the_id_of_a_scene_that_stays(tmp_path: Path, root: str) -> None:
    for name in ("train_a", "train_b", "val_000"):
        write_scene(tmp_path / f"{name}.tif")
    cluster = Cluster(root=root)
    with pytest.raises(ConfigError, match=r"composites: val_000 is also the id of .*val_000\.tif; give it another"):
        chips._scenes(config_of(tmp_path, composites=[{"name": "val_000", "members": ["train_*"]}]), cluster)
    twice = [{"name": "pair", "members": ["train_a"]}, {"name": "pair", "members": ["train_b"]}]
    with pytest.raises(ConfigError, match="composites: pair is also the id"):
        chips._scenes(config_of(tmp_path, composites=twice), cluster)
    own = config_of(tmp_path, composites=[{"name": "train_a", "members": ["train_*"]}])
    scenes, drops, num_files = chips._scenes(own, cluster)
    assert {scene.id: len(scene.visits) for scene in scenes} == {"train_a": 2, "val_000": 1}
    assert num_files == sum(len(scene.visits) for scene in scenes) == 3 and not drops


def test_everybody_whose_scenes_and_maps_went_in_is_credited(tmp_path: Path, root: str) -> None:
    for name in ("train_a", "train_b", "val_c"):
        write_scene(tmp_path / f"{name}.tif")
    (tmp_path / "none.geojson").write_text(FAR_AWAY)
    credits = {"train_a": "© A", "train_b": "© B", "val_c": ""}
    sources = [SceneSource(path=str(tmp_path), pattern=f"{name}*", attribution=text) for name, text in credits.items()]
    maps = [{"path": str(tmp_path / "none.geojson"), "attribution": text} for text in ("© Mappers", "", "© Mappers")]
    composites = [{"name": "pair", "members": ["train_*"]}]
    config = config_of(tmp_path, scenes=sources, landmarks=maps, composites=composites)
    scenes, _, _ = chips._scenes(config, Cluster(root=root))
    shown = Catalogue(json.loads(json.dumps(chips._catalogue(config, scenes))), str).scenes
    assert {name: scene.summary()["attribution"] for name, scene in shown.items()} == {
        "pair": "© A; © B; © Mappers",
        "val_c": "© Mappers",
    }


def test_the_real_recipe_credits_its_maps() -> None:
    recipe = load_config(chips.IngestScenesConfig, REPOSITORY / "configs/ingest_scenes/real.yaml")
    assert {source.attribution for source in recipe.landmarks} == {"© OpenStreetMap contributors, ODbL"}


def test_no_landmarks_at_all_are_refused_unless_a_source_keeps_its_chips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no landmarks, so every chip would be dropped"):
        config_of(tmp_path, keep_without_landmark=False)
    sources = [SceneSource(path=str(tmp_path)), SceneSource(path=str(tmp_path), keep_without_landmark=True)]
    assert config_of(tmp_path, keep_without_landmark=False, scenes=sources).scenes == sources


def test_the_real_composite_of_two_dates_leaves_chips(data_root: Path, root: str) -> None:
    recipe = load_config(chips.IngestScenesConfig, REPOSITORY / "configs/ingest_scenes/real.yaml")
    naip = [source for source in recipe.scenes if source.pattern.startswith("naip")]
    changes = {"scenes": naip, "landmarks": recipe.landmarks[:1], "holdout_scenes": []}
    counts, rows = cut(recipe.model_copy(update=changes), Cluster(root=root, data_root=str(data_root)))
    assert counts["kept"] > 100 and "no_landmark" not in counts["dropped"]
    assert {(row["scene"], row["split"], row["ground_sample_distance_m"]) for row in rows} == {("naip", "train", 5.0)}
    assert len({row["image"] for row in rows}) == len(rows) and rows[0]["datetime"].startswith("2020")


def test_chips_without_landmarks_get_no_caption_and_the_reason_says_so(tmp_path: Path, root: str) -> None:
    write_scene(tmp_path / "train_a.tif")
    config = config_of(tmp_path, holdout_scenes=[])
    _, rows = cut(config, Cluster(root=root))
    described = ReadAndDescribe(Artifact(root, config.output).path(chips.CHIPS_TABLE), TemplateCaptioner())
    captions = described({"shard": "0", "start": 0, "rows": len(rows)}).to_pylist()
    assert {(row["drop_reason"], row["captions"]) for row in captions} == {("no_landmark", None)}


def test_no_usable_scene_and_misspelt_globs_are_errors(tmp_path: Path, root: str) -> None:
    write_scene(tmp_path / "no_crs.tif", crs=None)
    with pytest.raises(ConfigError, match="none of 1 files is usable: no_crs"):
        chips._scenes(config_of(tmp_path), Cluster(root=root))
    write_scene(tmp_path / "train_a.tif")
    with pytest.raises(ConfigError, match=r"'val_\*' matches no usable scene; there are train_a"):
        chips._scenes(config_of(tmp_path), Cluster(root=root))
