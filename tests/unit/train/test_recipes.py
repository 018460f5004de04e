"""Every shipped pretraining recipe trains: its own settings through the front door, on a model and a dataset shrunk by
overrides as a person would give them on the command line. What the settings do is tested where they are.
"""

import math
from pathlib import Path

import pytest

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.config import load_config
from rsplatform.model.embedder import Embedder
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import read_history
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "pretrain"
SOURCES = ("web_pairs", "chips", "webli", "rs_webli", "rs_landmarks", "world", "scenes", "rsicd")
# What they start from; openMaMMUT's weights are the architecture that world_openmammut trains.
FIRST = {"model/mt_webli/v1": "mt_webli", "model/openmammut/v1": "world_openmammut"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root, num_samples=20, num_validation=5, sources=SOURCES)
    return Cluster(root=root, train=TrainPlacement(launcher="local"))


def shrunk(name: str, *more: str) -> PretrainConfig:
    """A recipe with a step for each phase, two for the first, and its pictures and model at the least size."""
    path = FOLDER / f"{name}.yaml"
    recipe = load_config(PretrainConfig, path)
    num_steps = len(recipe.phases) + 1
    changes = ["dataset=dataset/tiny/v1", "batch_size=4", "report_every_steps=1", "phases.0.steps=2", *more]
    changes += [f"phases.{index}.steps=1" for index in range(1, len(recipe.phases))]
    changes += [f"phases.{index}.schedule.warmup_steps=0" for index in range(len(recipe.phases))]
    changes += [f"phases.{i}.image_size=24" for i, phase in enumerate(recipe.phases) if phase.image_size is not None]
    clocks = ("validate_every_steps", "checkpoint_every_steps", "keep_every_steps")
    changes += [f"{clock}={num_steps}" for clock in clocks if getattr(recipe, clock) is not None]
    if recipe.tokenizer is not None:
        changes.append("tokenizer=null")  # one of this dataset's captions, which the model's vocabulary holds
    if recipe.model is not None:
        sizes = tiny_recipe()["model"]["settings"]
        changes += ["model.size=mini", *(f"model.settings.{name}={value}" for name, value in sizes.items())]
    return load_config(PretrainConfig, path, changes)


def started(cluster: Cluster, config: PretrainConfig) -> Artifact | None:
    """The model that a recipe starts from, trained by its own recipe if it is not there yet."""
    if config.start_from is None or Artifact(cluster.root, config.start_from).is_finished:
        return None
    return pretrain(shrunk(FIRST[config.start_from], f"output={config.start_from}"), cluster)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_recipe_trains(cluster: Cluster, name: str) -> None:
    config = shrunk(name)
    started(cluster, config)
    artifact = pretrain(config, cluster)
    counts = artifact.manifest()["counts"]
    assert (counts["steps"], counts["skipped_steps"]) == (len(config.phases) + 1, 0)
    rows = [row for row in read_history(artifact.uri) if "loss" in row]
    assert len(rows) == counts["steps"]
    assert all(math.isfinite(row[part]) for row in rows for part in ("loss", "contrastive", "caption", "gradient_norm"))
    assert all(row["gradient_norm"] > 0 for row in rows)
    size = config.curriculum.image_sizes(config.architecture(cluster.root))[-1]
    assert Embedder.load(Path(artifact.uri) / "model").image_size == size
