"""The curation pipelines on Ray: killed workers and drivers leave the rows right, and equal to a run without Ray."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dying_workers as dying
import interrupted_pipeline as interrupted
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import shapely

from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError
from rsplatform.curate import caption, chips, filter_web
from rsplatform.curate.overhead_model import OverheadNet, prepare, save_overhead, scores
from rsplatform.curate.pipeline import Loaded, Pipeline, Shard, run_pipeline, run_plain
from rsplatform.ledger import read_drops
from rsplatform.runtime import ray_runtime
from rsplatform.sources.web import ParquetCandidates
from tests.tiny_service import finish
from tests.unit.curate.test_chips import config_of, write_scene
from tests.unit.curate.test_filter_web import encoded, smooth_picture

pytestmark = pytest.mark.ray
EXPECTED = [value for value in range(interrupted.NUM_SHARDS * interrupted.SHARD_ROWS) if value % 5]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for module in (interrupted, dying):  # workers cannot import what lies in the tests' folder
        ray.cloudpickle.register_pickle_by_value(module)
    with ray_runtime(interrupted.cluster(str(tmp_path_factory.mktemp("ray")))):
        yield


def rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    return lance.dataset(pipeline.artifact.path(pipeline.table)).to_table().to_pylist()


def test_a_killed_task_and_a_killed_actor_leave_the_rows_right(root: str, runtime: None) -> None:
    killers = [interrupted.KillOnce(root, 45), Loaded(interrupted.KillOnce, (root, 101))]
    pipeline = interrupted.make_pipeline(root, *killers)
    counts = run_pipeline(pipeline, interrupted.shards(root), interrupted.cluster(root))
    assert {path.name for path in Path(root).glob("killed-*")} == {"killed-45", "killed-101"}
    assert counts == {"inputs": 160, "kept": 128, "dropped": {"fifth": 32}}
    assert [row["value"] for row in rows(pipeline)] == EXPECTED
    assert read_drops(pipeline.artifact).num_rows == 32


def test_ray_and_a_plain_loop_give_the_same_rows(root: str, tmp_path: Path, runtime: None) -> None:
    with_ray = interrupted.make_pipeline(root)
    plain = interrupted.make_pipeline(str(tmp_path / "plain"))
    counts = run_pipeline(with_ray, interrupted.shards(root), interrupted.cluster(root))
    assert counts == run_plain(plain, interrupted.shards(str(tmp_path / "plain")))
    assert rows(with_ray) == rows(plain)


def assert_deaths_change_nothing(undisturbed: Pipeline, disturbed: Pipeline, shards: Sequence[Shard]) -> None:
    """On Ray, with workers that die, the same counts, rows and drops as in a loop without Ray."""
    root = disturbed.artifact.root
    counts = run_pipeline(disturbed, shards, interrupted.cluster(root))
    assert counts == run_plain(undisturbed, shards) and counts["kept"] and counts["dropped"]
    assert rows(disturbed) == rows(undisturbed)
    assert read_drops(disturbed.artifact).sort_by("id") == read_drops(undisturbed.artifact).sort_by("id")


def deaths(folder: Path, *victims: str) -> list[dying.Death]:
    return [dying.Death(victim, str(folder / f"died-{number}")) for number, victim in enumerate(victims)]


def num_died(folder: Path) -> int:
    return len(list(folder.glob("died-*")))


def test_cutters_joiners_and_describers_that_die_change_nothing(root: str, tmp_path: Path, runtime: None) -> None:
    for name in ("train_a", "val_b"):
        write_scene(tmp_path / f"{name}.tif")
    place = shapely.geometry.mapping(shapely.box(-99.0, 36.1425, -98.998, 36.1445))
    house = {"type": "Feature", "properties": {"building": "yes"}, "geometry": place}
    (tmp_path / "houses.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [house]}))
    landmarks = {"landmarks": [{"path": str(tmp_path / "houses.geojson")}], "keep_without_landmark": False}
    config, cluster = config_of(tmp_path, **landmarks), interrupted.cluster(root)
    artifact, again = Artifact(root, "chips/plain/v1"), Artifact(root, "chips/killed/v1")
    scenes, _, _ = chips._scenes(config, cluster)
    chips._store_landmarks(config, cluster, artifact)
    shards, _ = chips._shards(config, scenes)
    plain = chips.make_pipeline(config, artifact)
    cut, join, describe = deaths(tmp_path, "val_b_0007_0007", "train_a_0003_0003", "val_b_0001_0002")
    join_arguments = (artifact.path(chips.LANDMARKS_FILE), config.recipe, join)
    joiner, cutter = Loaded(dying.DyingJoiner, join_arguments), dying.DyingCutter(config.recipe, cut)
    assert_deaths_change_nothing(plain, replace(plain, artifact=again, read=cutter, operations=(joiner,)), shards)
    assert num_died(tmp_path) == 2

    finish(root, again.ref)
    recipe = caption.CaptionConfig(output="captions/plain/v1", chips=again.ref, rows_per_shard=10)
    plain, shards = caption.caption_pipeline(recipe, root, Artifact(root, recipe.output))
    describer = dying.DyingDescriber(again.path(chips.CHIPS_TABLE), recipe.captioner, describe)
    killed = replace(plain, artifact=Artifact(root, "captions/killed/v1"), read=describer)
    assert run_pipeline(killed, shards, cluster) == run_plain(plain, shards)
    assert rows(killed) == rows(plain) and num_died(tmp_path) == 3


def test_filters_that_die_change_nothing(root: str, tmp_path: Path, runtime: None) -> None:
    pictures = [smooth_picture(seed) for seed in range(24)]
    sources = []
    for part in range(2):
        images = [encoded(picture, "JPEG", quality=90) for picture in pictures[part::2]]
        names = [f"web-{part}-{number}" for number in range(len(images))]
        columns = {"id": names, "image": images, "alt_text": [f"a lake beside road {name}" for name in names]}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
        sources.append(ParquetCandidates(path=str(tmp_path / f"{part}.parquet")))
    classifier, overhead = OverheadNet().eval(), Artifact(root, "overhead/t/v1")
    threshold = float(np.median(scores(classifier, [prepare(picture) for picture in pictures])))
    save_overhead(classifier, overhead.uri, {"threshold": threshold, "training_hashes": []})
    finish(root, overhead.ref)
    config = filter_web.FilterWebConfig(output="web_pairs/plain/v1", overhead=overhead.ref, candidates=sources)
    cluster, artifact = interrupted.cluster(root), Artifact(root, config.output)
    filter_web.store_evaluation_hashes(config, cluster, artifact)
    plain = filter_web.make_pipeline(config, cluster, artifact)
    read, score = deaths(tmp_path, "web-1-5", "web-0-3")
    reader = dying.DyingReader(config, cluster, artifact.path(filter_web.EVALUATION_HASHES), read)
    scorer = Loaded(dying.DyingScorer, (overhead.uri, score))
    killed = replace(plain, artifact=Artifact(root, "web_pairs/killed/v1"), read=reader, operations=(scorer,))
    assert_deaths_change_nothing(plain, killed, filter_web.make_shards(config, cluster))
    assert num_died(tmp_path) == 2


def test_too_few_cpus_for_the_actors_are_refused_at_once(root: str) -> None:
    pipeline = interrupted.make_pipeline(root, Loaded(interrupted.KillOnce, (root, 1)))
    small = interrupted.cluster(root).model_copy(update={"num_cpus": 1})
    with pytest.raises(ConfigError, match="num_cpus >= 2"):
        run_pipeline(pipeline, interrupted.shards(root), small)


def test_a_killed_driver_is_resumed_without_doubled_rows(root: str) -> None:
    command = [sys.executable, interrupted.__file__, root]
    first = subprocess.run([*command, "driver"], capture_output=True, text=True, timeout=120)
    assert first.returncode == -signal.SIGKILL, first.stderr
    pipeline = interrupted.make_pipeline(root)
    finished = {path.stem for path in Path(root).glob("rows/test/v1/work/parts/*.json")}
    assert finished and len(finished) < interrupted.NUM_SHARDS
    assert not Path(pipeline.artifact.path("rows.lance/_versions")).exists(), "nothing was committed yet"
    reads_before = set(Path(root, "reads").iterdir())
    second = subprocess.run([*command, "nobody"], capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert [row["value"] for row in rows(pipeline)] == EXPECTED
    read_again = {path.name.split("-")[0] for path in set(Path(root, "reads").iterdir()) - reads_before}
    assert read_again.isdisjoint(finished), "finished shards are not read again"
    assert "'kept': 128" in second.stdout
