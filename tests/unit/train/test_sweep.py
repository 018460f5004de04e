"""A sweep's plan and lineage without Ray: what its template reads is its own input, and makes nothing itself."""

from pathlib import Path

import pytest

from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.stage import finished, input_artifacts, plan, recipe_identity
from rsplatform.train.sweep import TuneConfig
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


@pytest.fixture
def cluster(root: str) -> Cluster:
    make_tiny_dataset(root)
    return Cluster(root=root)


def sweep_config(**changes) -> TuneConfig:
    recipe = tiny_recipe(output="model/tuned/v1", validate_every_steps=2, **changes)
    search = {"loss.caption_weight": {"choices": [0.5, 1.0]}}
    return TuneConfig.model_validate({"output": "sweep/tiny/v1", "recipe": recipe, "search": search})


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
