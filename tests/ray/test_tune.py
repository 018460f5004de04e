"""Ray Tune: four trials as child runs, a best recipe that pretrain accepts, a sweep that goes on after a Ctrl-C and
repeats nothing; and a population, generation by generation."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from watchfiles import watch

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
from rsplatform.train.trials import RESULT, TRIAL
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).resolve().parents[2]


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


def test_a_sweep_goes_on_after_a_ctrl_c_and_finds_a_recipe(cluster: Cluster, tmp_path: Path, ctrl_c: None) -> None:
    schedule = {"learning_rate": 1e-3, "warmup_steps": 2}
    phases = [{"name": name, "steps": steps, "schedule": schedule} for name, steps in (("web", 4), ("mix", 36))]
    changes = {"phases": phases, "validate_every_steps": 20, "checkpoint_every_steps": 10}
    recipe = tiny_recipe(output="model/tuned/v1", **changes)
    config = sweep_config(recipe=recipe, scheduler={"type": "asha", "grace_steps": 20})
    one_by_one = cluster.model_copy(update={"tune": cluster.tune.model_copy(update={"max_concurrent_trials": 1})})
    folder = Path(cluster.root) / config.output / "trials"
    interrupt(config, one_by_one, folder / "2" / "checkpoints", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{RESULT}")}
    stood = {path.parent.name for path in before}
    assert {"0", "1"} <= stood < {"0", "1", "2", "3"}, "what had ended is known, and nothing else"
    statuses = child_statuses(cluster, config.output)
    assert statuses == {index: "FINISHED" if index in stood else "FAILED" for index in "0123"}
    assert not (folder.parent / BEST_RECIPE).exists() and not Artifact(cluster.root, config.output).is_finished
    begun = {path.parents[1].name for path in folder.glob("*/checkpoints/step_*")} - stood

    artifact = tune(config, one_by_one)
    after = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{RESULT}")}
    assert len(after) == 4 and all(after[path] == before[path] for path in before)
    for index in begun:
        assert first_steps(cluster, folder / index)[-1] > 0, "went on from its checkpoint"

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
    assert child_statuses(cluster, config.output) == {"0": "FAILED", "1": "FAILED"}


def interrupt(config: TuneConfig, cluster: Cluster, begun: Path, folder: Path) -> None:
    """Start the job as a process on this module's Ray, and press Ctrl-C when there is a checkpoint in `begun`."""
    recipe, place = folder / "recipe.yaml", folder / "cluster.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    place.write_text(yaml.safe_dump({"metadata": {"rsplatform": cluster.model_dump(mode="json", exclude_none=True)}}))
    job = subprocess.Popen(
        [sys.executable, "jobs/tune.py", str(recipe), str(place)],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors.txt").open("w"),
    )
    for changes in watch(cluster.root, step=20, rust_timeout=1000, yield_on_timeout=True):
        assert job.poll() is None, (folder / "errors.txt").read_text()[-4000:]
        if any(path.startswith(f"{begun}/step_") for _, path in changes):
            break
    job.send_signal(signal.SIGINT)
    code, told = job.wait(timeout=60), (folder / "errors.txt").read_text()
    assert code == 130 and told.endswith("stopped; run the same command again to resume\n"), (code, told[-4000:])


def first_steps(cluster: Cluster, trial: Path) -> list[int]:
    """The steps at which a trial's training was started."""
    client = tracking._client(tracking.tracking_uri(cluster.root))
    run_id = storage.read_json(str(trial / TRIAL))["run_id"]
    return [metric.step for metric in client.get_metric_history(run_id, "train/workers")]


def child_statuses(cluster: Cluster, ref: str) -> dict[str, str]:
    """Statuses of the trials' MLflow runs of a sweep that did not finish, by trial."""
    parent = artifacts.noted_run(Artifact(cluster.root, ref))
    client = tracking._client(tracking.tracking_uri(cluster.root))
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.data.tags["trial"]: run.info.status for run in children}


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
