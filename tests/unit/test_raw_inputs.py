"""Raw inputs: what was added, removed or changed since an artifact was begun is named; a copy is the same data."""

import os
import shutil
from pathlib import Path

import pytest

from rsplatform import artifacts, raw_inputs, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, InputPath, StageConfig
from rsplatform.raw_inputs import RAW_INPUTS, list_raw_inputs
from rsplatform.sources.landmarks import LandmarkSource
from rsplatform.sources.scenes import SceneSource
from rsplatform.stage import check_input_artifacts, finished, plan, recipe_identity


class Table(Config):
    """A file of rows."""

    path: InputPath


class ReadConfig(StageConfig):
    """A stage that reads scenes of two patterns and a table."""

    output: str = "rows/a/v1"
    scenes: list[SceneSource] = [SceneSource(path="scenes", pattern="a*"), SceneSource(path="scenes", pattern="b*")]
    table: Table = Table(path="tables/pairs.parquet")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data root with five files that the recipe reads and one that it does not."""
    folder = tmp_path / "data"
    for name in (
        "scenes/a1.tif",
        "scenes/a2.tif",
        "scenes/b1.tif",
        "scenes/b2.tif",
        "scenes/other.tif",
        "tables/pairs.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    return folder


@pytest.fixture
def cluster(tmp_path: Path, data: Path) -> Cluster:
    return Cluster(root=str(tmp_path / "artifacts"), data_root=str(data))


def begin(cluster: Cluster, *, is_finished: bool) -> Artifact:
    """The artifact of ReadConfig, begun as a stage does, and perhaps committed."""
    config = ReadConfig()
    artifact, recipe = Artifact(cluster.root, config.output), recipe_identity(config, cluster)
    artifacts.begin(artifact, recipe)
    raw_inputs.record(artifact, list_raw_inputs(config, cluster))
    storage.write_bytes(artifact.path("rows.bin"), b"rows")
    if is_finished:
        artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="run")
    return artifact


def check(artifact: Artifact, cluster: Cluster) -> None:
    """What a rerun does of a finished artifact, and a resumed run and a dry run of an unfinished one."""
    if artifact.is_finished:
        assert finished(ReadConfig(), cluster) == artifact
    else:
        raw_inputs.check_unchanged(artifact, list_raw_inputs(ReadConfig(), cluster))
    plan(ReadConfig(), cluster)


def rewrite(path: Path, content: bytes) -> None:
    """New content at another time, whatever the clock's resolution."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("is_finished", [False, True])
def test_what_was_added_removed_or_changed_is_named(data: Path, cluster: Cluster, is_finished: bool) -> None:
    artifact = begin(cluster, is_finished=is_finished)
    check(artifact, cluster)
    (data / "scenes" / "other2.tif").touch()
    (data / "scenes" / ".a3.tif").touch()
    check(artifact, cluster)  # neither matches a pattern
    (data / "scenes" / "a3.TIFF").touch()
    (data / "scenes" / "b1.tif").unlink()
    (data / "scenes" / "a2.tif").write_bytes(b"shorter")
    rewrite(data / "tables" / "pairs.parquet", b"x" * 2000)
    state = "made" if is_finished else "begun"
    words = (
        rf"{state} with other raw data: added scenes/a3\.TIFF; removed scenes/b1\.tif; "
        r"changed scenes/a2\.tif \(1,300 → 7 bytes\); changed tables/pairs\.parquet \(rewritten\)\. Name a new version"
    )
    with pytest.raises(ArtifactError, match=words):
        check(artifact, cluster)
    with pytest.raises(ArtifactError, match="added scenes"):
        plan(ReadConfig(), cluster)


def test_one_file_rewritten_in_its_size_is_seen_among_others(data: Path, cluster: Cluster) -> None:
    artifact = begin(cluster, is_finished=True)
    rewrite(data / "scenes" / "a1.tif", (data / "scenes" / "a1.tif").read_bytes())
    with pytest.raises(ArtifactError, match=r"data: changed scenes/a1\.tif \(rewritten\)\. "):
        check(artifact, cluster)


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_copy_elsewhere_is_the_same_data_unless_its_bytes_differ(
    tmp_path: Path, data: Path, cluster: Cluster, is_finished: bool
) -> None:
    artifact = begin(cluster, is_finished=is_finished)
    moved = tmp_path / "disk" / "data"
    shutil.copytree(data, moved)
    for path in (item for item in moved.rglob("*") if item.is_file()):
        rewrite(path, path.read_bytes())
    elsewhere = cluster.model_copy(update={"data_root": str(moved)})
    check(artifact, elsewhere)
    size = (moved / "scenes" / "a2.tif").stat().st_size
    rewrite(moved / "scenes" / "a2.tif", b"x" * size)
    with pytest.raises(ArtifactError, match=r"changed scenes/a1\.tif \(rewritten\), scenes/a2\.tif"):
        check(artifact, elsewhere)


def test_of_a_finished_artifact_the_raw_data_may_be_put_away(data: Path, cluster: Cluster) -> None:
    artifact = begin(cluster, is_finished=True)
    shutil.rmtree(data)
    check(artifact, cluster)
    assert "input  table.path = tables/pairs.parquet (gone; what was made of it stands)" in plan(ReadConfig(), cluster)
    check(artifact, cluster.model_copy(update={"data_root": None}))


def test_an_unfinished_artifact_needs_its_raw_data(data: Path, cluster: Cluster) -> None:
    (data / "tables" / "pairs.parquet").unlink()
    with pytest.raises(
        ConfigError, match=r"table\.path: .*/pairs\.parquet does not exist; fix the recipe or .*data_root"
    ):
        plan(ReadConfig(), cluster)
    with pytest.raises(ConfigError, match=r"scenes\.0\.path: .*/scenes: no file matches 'c\*'; fix `pattern`"):
        plan(ReadConfig(scenes=[SceneSource(path="scenes", pattern="c*")]), cluster)


@pytest.mark.parametrize("is_finished", [False, True])
def test_artifacts_from_before_there_were_records_are_accepted(data: Path, cluster: Cluster, is_finished: bool) -> None:
    artifact = begin(cluster, is_finished=is_finished)
    Path(artifact.path(RAW_INPUTS)).unlink()
    (data / "scenes" / "a3.tif").touch()
    check(artifact, cluster)


def test_a_shapefile_is_all_of_its_files(tmp_path: Path) -> None:
    class MapConfig(StageConfig):
        output: str = "rows/map/v1"
        landmarks: LandmarkSource = LandmarkSource(path="water.shp")

    for name in ("water.shp", "water.dbf", "water.prj", "water.txt", "rivers.dbf"):
        (tmp_path / name).write_text(name)
    cluster = Cluster(root=str(tmp_path / "artifacts"), data_root=str(tmp_path))
    assert set(list_raw_inputs(MapConfig(), cluster)["water.shp"].files) == {"water.shp", "water.dbf", "water.prj"}


def test_the_sample_sees_every_part_of_a_file(tmp_path: Path) -> None:
    """A large file is sampled from its first to its last sixteenth."""
    path = tmp_path / "large.bin"
    content = bytearray(3 * 2**20)
    path.write_bytes(content)
    cluster, config = Cluster(root=str(tmp_path)), ReadConfig(scenes=[], table=Table(path=str(path)))

    def sample() -> str:
        return list_raw_inputs(config, cluster)[str(path)].sample()

    seen = {sample()}
    for sixteenth in range(raw_inputs.SAMPLE_BLOCKS):
        content[sixteenth * len(content) // raw_inputs.SAMPLE_BLOCKS + 100] ^= 255
        path.write_bytes(content)
        seen.add(sample())
    assert len(seen) == raw_inputs.SAMPLE_BLOCKS + 1


def test_plans_say_how_many_files_there_are_and_artifacts_that_nobody_makes_are_named(cluster: Cluster) -> None:
    config = ReadConfig(table=Table(path="artifact://rows/none/v1/pairs.parquet"))
    lines = plan(config, cluster)
    assert f"input  scenes.0.path = scenes (4 files in {cluster.data_root}/scenes)" in lines
    with pytest.raises(ArtifactError, match="rows/none/v1 does not exist"):
        check_input_artifacts(config, cluster)
