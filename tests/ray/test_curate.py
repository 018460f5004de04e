"""The curation pipelines on Ray: killed workers and drivers leave the rows right, and equal to a run without Ray."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interrupted_pipeline as interrupted
import lance
import pytest
import ray.cloudpickle

from rsplatform.config import ConfigError
from rsplatform.curate.pipeline import Loaded, Pipeline, run_pipeline, run_plain
from rsplatform.ledger import read_drops
from rsplatform.runtime import ray_runtime

pytestmark = pytest.mark.ray
EXPECTED = [value for value in range(interrupted.NUM_SHARDS * interrupted.SHARD_ROWS) if value % 5]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(interrupted)  # workers cannot import what lies in the tests' folder
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
