"""Ray Tune: four trials as child runs, a best recipe that pretrain accepts, a resumed sweep that repeats nothing; and
a population, generation by generation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rsplatform import artifacts, storage, tracking
from rsplatform.artifacts import Artifact
from rsplatform.cli import own_error
from rsplatform.cluster import Cluster
from rsplatform.config import load_config
from rsplatform.runtime import ray_runtime
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.population import member_recipe
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.sweep import BEST_RECIPE, tune
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.trials import RESULT
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    cluster = Cluster(root=root, num_cpus=2)
    with ray_runtime(cluster):
        yield cluster


def sweep_config(**changes) -> TuneConfig:
    document = {
        "output": "sweep/tiny/v1",
        "recipe": tiny_recipe(output="model/tuned/v1", validate_every_steps=2),
        "search": {
            "phases.1.schedule.learning_rate": {"log_uniform": [1e-5, 1e-2]},
            "loss.caption_weight": {"choices": [0.5, 1.0, 2.0]},
        },
        "num_trials": 4,
        "scheduler": {"type": "asha", "grace_steps": 2},
    }
    return TuneConfig.model_validate(document | changes)


def test_a_sweep_finds_a_recipe_and_resumes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep_config()
    with monkeypatch.context() as patch:
        patch.setattr("rsplatform.train.sweep._conclude", _break)
        with pytest.raises(OSError, match="unplugged"):
            tune(config, cluster)
    assert set(child_statuses(cluster, config.output)) == {"FINISHED"}  # each trial had its result
    folder = Path(cluster.root) / config.output / "trials"
    before = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{RESULT}")}
    assert len(before) == 4
    (folder / "2" / RESULT).unlink()  # as if the driver had died before this trial ended
    artifact = tune(config, cluster)
    after = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{RESULT}")}
    assert {path for path in before if after[path] != before[path]} == {folder / "2" / RESULT}

    dataset = Artifact(cluster.root, "dataset/tiny/v1")
    assert artifact.manifest()["inputs"] == {dataset.ref: dataset.fingerprint()}
    counts = artifact.manifest()["counts"]
    assert counts["trials"] == 4 == counts["complete"] + counts["stopped_early"]
    best = load_config(PretrainConfig, Path(artifact.uri) / BEST_RECIPE)
    assert best.output == "model/tuned/v1"
    results = [storage.read_json(str(folder / str(index) / RESULT)) for index in range(4)]
    complete = [index for index in range(4) if not results[index]["stopped_early"]]
    winner = min(complete, key=lambda index: results[index]["val_contrastive"])
    assert best == config.trials()[winner][1]
    assert yaml.safe_load((Path(artifact.uri) / BEST_RECIPE).read_text())["loss"]["caption_weight"] in (0.5, 1.0, 2.0)
    assert_children(cluster, artifact.manifest()["mlflow_run_id"], ["0", "1", "2", "3"])


def test_a_population_leaves_the_recipe_of_what_its_best_trial_went_through(cluster: Cluster) -> None:
    scheduler = {"type": "population", "interval_steps": 4, "replaced_fraction": 0.5}
    config = sweep_config(
        output="sweep/population/v1", num_trials=2, objective="val_mean_recall", scheduler=scheduler, seed=1
    )
    artifact = tune(config, cluster)
    results = [storage.read_json(artifact.path(f"trials/{index}/{RESULT}")) for index in range(2)]
    assert [result["step"] for result in results] == [8, 8] and not any(r["stopped_early"] for r in results)
    assert [len(result["values"]) for result in results] == [2, 2]
    best = int(artifact.manifest()["metrics"]["best/trial"])
    assert results[best]["val_mean_recall"] == max(result["val_mean_recall"] for result in results)
    recipe = load_config(PretrainConfig, Path(artifact.uri) / BEST_RECIPE)
    assert recipe == member_recipe(config.recipe, results[best]["values"], 4)
    assert artifact.manifest()["counts"] == {"trials": 2, "complete": 2, "stopped_early": 0}
    assert_children(cluster, artifact.manifest()["mlflow_run_id"], ["0", "1"])


def test_a_failing_trial_fails_the_sweep_in_one_sentence_and_leaves_no_run_open(cluster: Cluster) -> None:
    mixed = {"name": "mix", "steps": 2, "schedule": {"learning_rate": 1e-3}, "mixture": {"web_pair": 1.0}}
    recipe = tiny_recipe(output="model/tuned/v1", validate_every_steps=2, phases=[mixed])
    search = {"loss.caption_weight": {"choices": [1.0]}}
    config = sweep_config(output="sweep/failing/v1", recipe=recipe, search=search, num_trials=2)
    with pytest.raises(Exception, match="web_pair") as raised:
        tune(config, cluster)
    told = own_error(raised.value)
    assert isinstance(told, RecipeMismatchError) and "are chips, web_pairs" in str(told)
    assert child_statuses(cluster, config.output) == ["FAILED", "FAILED"]


def child_statuses(cluster: Cluster, ref: str) -> list[str]:
    """Statuses of the trials' MLflow runs of a sweep that did not finish."""
    parent = artifacts.noted_run(Artifact(cluster.root, ref))
    client = tracking._client(tracking.tracking_uri(cluster.root))
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return [run.info.status for run in children]


def _break(*_) -> None:
    raise OSError("unplugged")


def assert_children(cluster: Cluster, parent: str, trials: list[str]) -> None:
    client = tracking._client(tracking.tracking_uri(cluster.root))
    experiment = client.get_run(parent).info.experiment_id
    assert "best.yaml" in {item.path for item in client.list_artifacts(parent)}
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(run.data.tags["trial"] for run in children) == trials
    assert all("loss.caption_weight" in run.data.params for run in children)
    assert all("train/val_contrastive" in run.data.metrics for run in children)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"phases.0.schedule.learning_rat": {"choices": [1]}}, "learning_rate"),
        ({"loss.caption_weight": {"choices": [-1]}}, "negative"),
        ({"batch_size": {"choices": [8], "log_uniform": [1, 2]}}, "give one of choices"),
    ],
)
def test_a_bad_search_is_refused_at_load(search: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep_config(search=search)
