"""A sweep's recipe without Ray: what its template reads is its own input; what could not be compared is refused."""

import math
from pathlib import Path

import pytest

from rsplatform import storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.stage import finished, input_artifacts, plan, recipe_identity
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.trials import last_measured
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


@pytest.fixture
def cluster(root: str) -> Cluster:
    make_tiny_dataset(root)
    return Cluster(root=root)


def sweep_config(sweep: dict | None = None, **changes) -> TuneConfig:
    recipe = tiny_recipe(output="model/tuned/v1", validate_every_steps=2, **changes)
    search = {"loss.caption_weight": {"choices": [0.5, 1.0]}}
    return TuneConfig.model_validate({"output": "sweep/tiny/v1", "recipe": recipe, "search": search} | (sweep or {}))


def test_the_dataset_of_the_recipe_is_an_input_of_the_sweep(cluster: Cluster) -> None:
    dataset = Artifact(cluster.root, "dataset/tiny/v1")
    assert input_artifacts(sweep_config()) == {"recipe.dataset": dataset.ref}
    assert recipe_identity(sweep_config(), cluster)["inputs"] == {dataset.ref: dataset.fingerprint()}
    lines = plan(sweep_config(), cluster)
    assert lines == [
        "input  recipe.dataset = dataset/tiny/v1 (finished)",
        f"output {cluster.root}/sweep/tiny/v1 (to be made)",
    ]


def test_a_dataset_made_again_refuses_the_old_sweep(cluster: Cluster) -> None:
    from rsplatform import artifacts

    artifact = Artifact(cluster.root, "sweep/tiny/v1")
    recipe = recipe_identity(sweep_config(), cluster)
    artifacts.begin(artifact, recipe)
    artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")
    assert finished(sweep_config(), cluster) == artifact
    manifest = Path(cluster.root, "dataset/tiny/v1/manifest.json")
    manifest.write_text(manifest.read_text().replace('"counts": {}', '"counts": {"kept": 1}'))
    with pytest.raises(ArtifactError, match=r"inputs\.dataset/tiny/v1.*new version"):
        finished(sweep_config(), cluster)


def test_a_sweep_over_an_absent_dataset_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ArtifactError, match="dataset/none/v1 does not exist"):
        recipe_identity(sweep_config(dataset="dataset/none/v1"), cluster)


def test_size_mixture_and_batch_are_searched_under_an_objective_that_compares_them() -> None:
    search = {
        "model.size": {"choices": ["tiny", "mini"]},
        "phases.1.mixture.chips": {"uniform": [0.1, 0.6]},
        "phases.0.schedule.warmup_steps": {"integers": [0, 2]},
    }
    model = {"size": "mini", "settings": {"image_size": 16, "patch_size": 4}}
    config = sweep_config({"search": search, "num_trials": 8, "objective": "val_t2i_r5"}, model=model)
    assert config.trials() == config.trials(), "a function of the seed"
    for values, recipe in config.trials():
        assert recipe.model is not None and recipe.model.size == values["model.size"]
        share = values["phases.1.mixture.chips"]
        assert recipe.phases[1].mixture == pytest.approx({"web_pairs": 1 - share, "chips": share})
        assert recipe.phases[0].schedule.warmup_steps in (0, 1, 2)
    assert {recipe.model.size for _, recipe in config.trials() if recipe.model} == {"tiny", "mini"}


def test_losses_go_down_and_recalls_up() -> None:
    loss, recall = sweep_config(), sweep_config({"objective": "val_mean_recall"})
    assert (loss.mode, recall.mode) == ("min", "max")
    assert loss.as_loss(1.0) < loss.as_loss(2.0) < loss.as_loss(math.nan) == loss.as_loss(None)
    assert recall.as_loss(20.0) < recall.as_loss(10.0) < recall.as_loss(math.inf) == math.inf


POPULATION = {"scheduler": {"type": "population", "interval_steps": 3}}
RATE = {"phases.0.schedule.learning_rate": {"log_uniform": [1e-4, 1e-3]}}


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"search": {"output": {"choices": ["model/a/v1"]}}}, "all trials of a sweep share it"),
        ({"objective": "val_loss"}, "differ in loss.caption_weight cannot be compared"),
        ({"search": {"batch_size": {"integers": [4, 8]}}}, "differ in batch_size cannot be compared"),
        (POPULATION | {"search": {"model.size": {"choices": ["tiny", "mini"]}}}, "scheduler: .type: asha"),
        (POPULATION | {"search": {"phases.0.steps": {"integers": [2, 4]}}}, "phases.0.steps: a population"),
        (POPULATION | {"search": RATE, "num_trials": 1}, "num_trials of at least 2"),
        ({"scheduler": {"type": "population", "interval_steps": 8}}, "interval_steps below the recipe's 8 steps"),
        (POPULATION | {"search": {"phases.1.mixture.chips": {"uniform": [0.5, 1.0]}}}, "leave nothing"),
        (POPULATION | {"search": {"phases.0.mixture.web_pairs": {"uniform": [0.5, 0.9]}}}, "one source only"),
        (POPULATION | {"search": {"phases.1.mixture.rocks": {"uniform": [0.1, 0.2]}}}, "no field 'rocks'"),
        (POPULATION | {"search": {"loss.caption_weight": {"uniform": [-1, 1]}}}, "not be negative"),
        ({"scheduler": {"type": "hyperband"}}, "hyperband"),
    ],
)
def test_a_sweep_that_could_not_end_well_is_refused_at_load(sweep: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep_config(sweep)


def test_a_population_ends_by_steps() -> None:
    with pytest.raises(ValueError, match="max_minutes"):
        sweep_config(POPULATION, max_minutes=1.0)


def test_a_trials_score_is_the_last_of_its_history(root: str) -> None:
    assert last_measured(root, "val_loss") == {}
    rows = [{"step": 2, "val_loss": 3.0}, {"step": 4, "val_loss": 2.5, "validate_s": 0.1}, {"step": 5, "loss": 1.0}]
    storage.write_json(f"{root}/history.json", rows)
    assert last_measured(root, "val_loss") == {"step": 4, "val_loss": 2.5}
    assert last_measured(root, "val_caption") == {}
