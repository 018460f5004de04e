"""The demo looks up what its last arrow reads before its first one begins."""

from pathlib import Path

import pytest

from rsplatform.artifacts import ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, load_config
from rsplatform.demo import DemoConfig, demo
from rsplatform.stage import check_input_artifacts, plan

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "demo" / "real.yaml"
FILES = [
    "dubai_segmentation/Tile 1/images/a.jpg",
    "dubai_segmentation/Tile 1/masks/a.png",
    "oam_osm_buildings/kampala_a_z21.tif",
    "oam_osm_buildings/kampala_osm_buildings.geojson",
    "oam_osm_buildings/panauti_nepal_osm_buildings.geojson",
    "oam_osm_buildings/zanzibar_osm_buildings.geojson",
    "photos/captions.jsonl",
    "qgis_swellendam/3420B_2010_328_RGB_LATLNG.tif",
    "qgis_swellendam/shapefile/protected_areas.shp",
    "qgis_swellendam/shapefile/rivers.shp",
    "qgis_swellendam/shapefile/water.shp",
    "qgis_swellendam/training_data.gpkg",
    "ramp_kampala_chips/val-binarymasks/b.mask.tif",
    "ramp_kampala_chips/val-chips/b.tif",
    "rsicd/RSICD_images/c.jpg",
    "rsicd/dataset_rsicd.json",
    "scenes/naip_2010.tif",
    "whu_rs19/images/d.jpg",
    "whu_rs19/labels.csv",
]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A data root that has all that the recipe names, by name only."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return Cluster(root=str(tmp_path / "artifacts"), data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (
            "ramp_kampala_chips/val-binarymasks/b.mask.tif",
            r"evaluate: benchmarks\.2\.folder: .*no val-binarymasks/b\.mask\.tif, the mask of val-chips/b\.tif",
        ),
        ("dubai_segmentation/Tile 1/masks/a.png", r"evaluate: benchmarks\.3\.folder: .*no Tile 1/masks/a\.png"),
        ("whu_rs19/labels.csv", r"evaluate: benchmarks\.1\.folder: .*no labels\.csv; fix `folder` or `table`"),
        ("photos/captions.jsonl", r"train_overhead: training\.1\.source\.path: .*no captions\.jsonl"),
        ("oam_osm_buildings/kampala_a_z21.tif", r"ingest_scenes: scenes\.0\.path: .*no file matches '\*_z21\.tif'"),
        ("qgis_swellendam/training_data.gpkg", r"ingest_scenes: landmarks\.3\.path: .*gpkg does not exist; fix"),
    ],
)
def test_a_missing_raw_input_of_any_part_is_named_before_anything_begins(
    cluster: Cluster, missing: str, words: str
) -> None:
    config = load_config(DemoConfig, RECIPE)
    assert plan(config, cluster)
    check_input_artifacts(config, cluster)
    Path(f"{cluster.data_root}/{missing}").unlink()
    with pytest.raises(ConfigError, match=words):
        demo(config, cluster)
    assert not Path(cluster.root).exists()


def test_an_artifact_that_no_part_makes_is_named_before_anything_begins(cluster: Cluster) -> None:
    config = load_config(DemoConfig, RECIPE, ["build_index.chips=chips/rael/v1"])
    with pytest.raises(ArtifactError, match="chips/rael/v1 does not exist"):
        demo(config, cluster)
    assert not Path(cluster.root).exists()
