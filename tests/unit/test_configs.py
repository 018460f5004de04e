"""Every recipe is valid for its job, every cluster file for Ray and for us, and nobody's machine is in a recipe."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from mlflow.utils.validation import _validate_param_name

from rsplatform import artifacts, storage, tracking
from rsplatform.artifacts import Artifact
from rsplatform.cluster import load_cluster
from rsplatform.config import StageConfig, load_config
from rsplatform.dataset.build import BuildDatasetConfig, source_name
from rsplatform.dotted_keys import flatten
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.train.import_model import ImportModelConfig
from rsplatform.train.launch import check_start, check_workers
from rsplatform.train.recipe import PretrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(REPOSITORY.glob("configs/*/*.yaml"))
PRETRAININGS = [path for path in RECIPES if path.parent.name == "pretrain"]
CLUSTERS = [path for path in sorted(REPOSITORY.glob("cluster/*.yaml")) if "metadata" in path.read_text()]


def config_class_of(job: str) -> type[StageConfig]:
    """The config class that a job file hands to run_job."""
    source = (REPOSITORY / "jobs" / f"{job}.py").read_text()
    found = re.search(r"from (rsplatform\.[\w.]+) import (\w+Config)", source)
    assert found, f"jobs/{job}.py imports no config class"
    return getattr(importlib.import_module(found[1]), found[2])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_are_valid_for_their_job(path: Path) -> None:
    config = load_config(config_class_of(path.parent.name), path)
    first = path.stem.split("_")[0]
    assert config.pipeline == (f"demo-{first}" if first in ("world", "real") else first)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_key_of_a_recipe_is_a_param_of_its_own(path: Path) -> None:
    """MLflow takes the names as they are made, and no two fields share one."""
    config = load_config(config_class_of(path.parent.name), path)
    keys = flatten(config.model_dump(mode="json"))
    names = {tracking._param_name(key) for key in keys}
    assert len(names) == len(keys)
    for name in names:
        _validate_param_name(name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_hold_no_machine_paths(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(^|[\s:'\"])(/(home|root|mnt|data|tmp|work|opt|Users)\b|~/|s3://|\.\./shared)", text)


def test_the_papers_variants_differ_in_what_they_are_compared_for() -> None:
    """Data, phases and where they start; else a difference between their numbers would mean nothing."""
    paths = sorted(REPOSITORY.glob("configs/pretrain/mt_rs*.yaml"))
    documents = [load_config(PretrainConfig, path).model_dump() for path in paths]
    assert len(documents) == 4
    for document in documents:
        assert document["start_from"] == "model/mt_webli/v1"
        for key in ("output", "phases", "dataset"):
            document.pop(key)
        assert document == documents[0]


def test_the_holdout_differs_from_the_whole_curriculum_in_its_data_alone() -> None:
    names = ("mt_rswebli_rslandmarks", "mt_rswebli_rslandmarks_holdout")
    both, holdout = (load_config(PretrainConfig, REPOSITORY / f"configs/pretrain/{name}.yaml") for name in names)
    assert both.phases == holdout.phases
    made = load_config(BuildDatasetConfig, REPOSITORY / "configs/build_dataset/mt_holdout.yaml")
    assert (made.output, bool(made.holdout)) == (holdout.dataset, True)


@pytest.mark.parametrize("path", PRETRAININGS, ids=lambda path: path.stem)
def test_mixtures_name_sources_of_the_dataset_that_the_recipe_trains_on(path: Path) -> None:
    makers = [load_config(BuildDatasetConfig, other) for other in REPOSITORY.glob("configs/build_dataset/*.yaml")]
    names = {maker.output: {source_name(source) for source in maker.sources} for maker in makers}
    recipe = load_config(PretrainConfig, path)
    for phase in recipe.phases:
        assert set(phase.mixture) <= names[recipe.dataset]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_one_cluster_file_serves_ray_up_and_our_jobs(path: Path) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec and spec.origin
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    assert load_cluster(path).root


@pytest.fixture(scope="module")
def started_from(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with the models that recipes start from, as far as a start reads them: the sizes."""
    root = str(tmp_path_factory.mktemp("root"))
    imported = load_config(ImportModelConfig, REPOSITORY / "configs/import_model/openmammut.yaml")
    assert imported.architecture is not None
    models = {imported.output: config_of_layout(imported.architecture, "recipe")}
    for path in PRETRAININGS:
        recipe = load_config(PretrainConfig, path)
        if recipe.model is not None:
            models[recipe.output] = recipe.model.mammut_config()
    for ref, model in models.items():
        artifact, identity = Artifact(root, ref), artifacts.identity({"output": ref}, {})
        artifacts.begin(artifact, identity)
        storage.write_json(artifact.path("model/config.json"), model.to_dict())
        artifacts.commit(artifact, identity, counts={}, metrics={}, run_id="none")
    return root


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
@pytest.mark.parametrize("recipe", PRETRAININGS, ids=lambda path: path.stem)
def test_every_training_fits_every_cluster_file(recipe: Path, path: Path, started_from: str) -> None:
    """Its batch divides among the workers, and a card holds what the arithmetic says it takes."""
    config, cluster = load_config(PretrainConfig, recipe), load_cluster(path)
    check_workers(config.batch_size, cluster.train)
    check_start(config, cluster.model_copy(update={"root": started_from}))
    lines = config.plan_lines(cluster.model_copy(update={"root": started_from}))
    assert any(line.startswith("memory micro_batch_size") for line in lines) == (cluster.train.gpu is not None)


@pytest.mark.parametrize("job", sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py")))
def test_every_job_has_a_recipe_for_the_demo_world(job: str) -> None:
    assert (REPOSITORY / "configs" / job / "world.yaml").is_file()
