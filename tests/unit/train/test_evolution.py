"""A population on disk, without Ray: killed twice it goes on, and each winner's recipe repeats its weights bitwise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rsplatform import storage
from rsplatform.cluster import Cluster
from rsplatform.stage import open_stage
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.evolution import Evolution, evolve, train_generation
from rsplatform.train.job import WorkerJob
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.population import Population
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.trials import RESULT, open_trial, trial_placement
from rsplatform.train.worker import run_worker
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

NUM_TRIALS = 3


class UnpluggedError(RuntimeError):
    """What stands for kill -9: nothing after it runs."""


def population_config() -> TuneConfig:
    return TuneConfig.model_validate(
        {
            "output": "sweep/population/v1",
            "recipe": tiny_recipe(output="model/evolved/v1", validate_every_steps=4, checkpoint_every_steps=1),
            "search": {
                "phases.1.schedule.learning_rate": {"log_uniform": [1e-4, 1e-2]},
                "loss.caption_weight": {"uniform": [0.5, 2.0]},
                "phases.1.mixture.web_pairs": {"uniform": [0.1, 0.9]},
            },
            "num_trials": NUM_TRIALS,
            "objective": "val_caption",
            "scheduler": {"type": "population", "interval_steps": 3},
        }
    )


def run(config: TuneConfig, cluster: Cluster, train: Callable[[list[WorkerJob]], None]) -> list[PretrainConfig]:
    with open_stage(config, cluster) as stage:
        trials = [open_trial(config, cluster, stage, i, values) for i, (values, _) in enumerate(config.trials())]
        population = config.scheduler
        assert isinstance(population, Population)
        return evolve(Evolution(config, population, cluster, trials, stage.artifact.uri), train)


def train_all(jobs: list[WorkerJob]) -> None:
    for job in jobs:
        train_generation(job, "val_caption")


def die_between_members(jobs: list[WorkerJob]) -> None:
    """The second generation ends for one member; another has a checkpoint in its midst, and no result."""
    if jobs[0].origin is None:
        return train_all(jobs)
    train_all(jobs[:1])
    assert jobs[1].until_step == 6
    run_worker(replace(jobs[1], until_step=5))
    raise UnpluggedError


def die_before_the_result(jobs: list[WorkerJob]) -> None:
    """The last checkpoint stands, its result does not."""
    for job in jobs:
        run_worker(job)
    raise UnpluggedError


def test_a_killed_population_goes_on_and_its_recipes_repeat_it_bitwise(root: str) -> None:
    make_tiny_dataset(root)
    cluster, config = Cluster(root=root), population_config()
    folder = Path(root) / config.output / "trials"
    with pytest.raises(UnpluggedError):
        run(config, cluster, die_between_members)
    stood = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/generation_*/{RESULT}")}
    assert len(stood) == NUM_TRIALS + 1
    with pytest.raises(UnpluggedError):
        run(config, cluster, die_before_the_result)
    recipes = run(config, cluster, train_all)
    assert {path: path.stat().st_mtime_ns for path in stood} == stood, "what stood was not trained again"
    results = [storage.read_json(str(folder / str(index) / RESULT)) for index in range(NUM_TRIALS)]
    lines = [result["trials"] for result in results]
    assert any(line != [index] * 3 for index, line in enumerate(lines)), "someone was replaced"
    assert not list(folder.glob("*/generation_1/checkpoints/*")), "only the last generation's checkpoints are kept"
    for index, recipe in enumerate(recipes):
        scratch = f"{root}/scratch/{index}"
        prepare_tokenizer(recipe, cluster, scratch)
        job = WorkerJob(recipe, root, scratch, trial_placement(cluster))
        run_worker(job)
        expected = CheckpointFolder(str(folder / str(index) / "generation_2/checkpoints")).load(8)
        assert_same_state(job.checkpoints.load(8)[0], expected[0])


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
