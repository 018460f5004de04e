"""A population's way through its generations: what to train next from what stands on disk, and a result per trial.

In: a sweep's recipe, its trials, and a function that trains jobs (Ray Tune's, or a loop in this process). Out: results
and recipes. Each generation of a trial has a folder of its own: nothing that another member may still need is written
over, and a driver that dies at any moment finds what its members had reached and decides again as it had decided
(population.py). Checkpoints of a generation go once the one after it has ended.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rsplatform import storage
from rsplatform.cluster import Cluster
from rsplatform.model.weights import TOKENIZER_FILE
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.job import WorkerJob
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.population import Member, Population, member_recipe, next_generation
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.trials import RESULT, SweepError, Trial, last_measured, trial_placement
from rsplatform.train.worker import run_worker


@dataclass(frozen=True)
class Evolution:
    """A population's sweep: its recipe, where it runs, its trials, and the folder of the tokenizer that they share."""

    config: TuneConfig
    population: Population
    cluster: Cluster
    trials: Sequence[Trial]
    folder: str

    def job(self, member: Member) -> WorkerJob:
        """The training of a member's newest generation, which goes on from the checkpoint of the one before."""
        population, recipe = self.population, self.config.recipe
        generation, trial = len(member.values) - 1, self.trials[member.trials[-1]]
        origin = None
        if generation > 0:
            parent = self._generation_folder(member.trials[-2], generation - 1)
            origin = (CheckpointFolder(f"{parent}/checkpoints"), population.end(recipe, generation - 1))
        return WorkerJob(
            member_recipe(recipe, member.values, population.interval_steps),
            self.cluster.root,
            self._generation_folder(trial.index, generation),
            trial_placement(self.cluster),
            trial.run,
            origin=origin,
            until_step=population.end(recipe, generation),
        )

    def begin(self, member: Member, job: WorkerJob) -> None:
        """Give the job its tokenizer, and tell its run the values and whose weights they are."""
        tokenizer = storage.read_bytes(f"{self.folder}/tokenizer/{TOKENIZER_FILE}")
        storage.write_bytes(f"{job.folder}/tokenizer/{TOKENIZER_FILE}", tokenizer)
        generation, values, trial = len(member.values) - 1, member.values[-1], self.trials[member.trials[-1]]
        start = generation * self.population.interval_steps
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        trial.run.log_metrics({f"search/{key}": value for key, value in numbers.items()}, start)
        line = " ".join(str(index) for index in member.trials)
        trial.run.set_tags({f"generation.{generation}": f"{json.dumps(values)} line of trials {line}"})

    def forget(self, generation: int) -> None:
        """Remove the checkpoints of a generation, which the next one has gone on from."""
        for trial in self.trials if generation >= 0 else ():
            uri = f"{self._generation_folder(trial.index, generation)}/checkpoints"
            system, path = storage.filesystem(uri)
            for name in storage.list_files(uri):
                system.delete_file(f"{path}/{name}")

    def _generation_folder(self, trial: int, generation: int) -> str:
        return f"{self.trials[trial].folder}/generation_{generation}"


def evolve(evolution: Evolution, train: Callable[[list[WorkerJob]], None]) -> list[PretrainConfig]:
    """Train every generation that has not been, and leave each trial's result; returns each trial's recipe.

    `train` is given the jobs of one generation that have no result yet, and leaves it (`train_generation`).

    Raises:
        RecipeMismatchError: the card that the placement names cannot hold what is to be in memory at once.
        SweepError: all members of a generation diverged.
    """
    config, population, trials = evolution.config, evolution.population, evolution.trials
    last = population.num_generations(config.recipe) - 1
    placement = trial_placement(evolution.cluster)
    config.recipe.chosen_micro_batch_size(config.recipe.architecture(evolution.cluster.root), placement, num_workers=1)
    prepare_tokenizer(config.recipe, evolution.cluster, evolution.folder)
    members = [Member((values,), (index,)) for index, (values, _) in enumerate(config.trials())]
    for generation in range(last + 1):
        results = _train_missing(evolution, members, train)
        losses = [config.as_loss(result.get(config.objective)) for result in results]
        if not any(math.isfinite(loss) for loss in losses):
            raise SweepError(
                f"{config.output}: all trials diverged in generation {generation}; lower the learning rates"
            )
        evolution.forget(generation - 1)
        if generation < last:
            members = next_generation(members, losses, config.search, population, config.seed)
            continue
        for trial, member, result in zip(trials, members, results, strict=True):
            trial.note(member.values[-1])
            trial.finish(result | {"values": member.values, "trials": member.trials})
    return [member_recipe(config.recipe, member.values, population.interval_steps) for member in members]


def _train_missing(
    evolution: Evolution, members: Sequence[Member], train: Callable[[list[WorkerJob]], None]
) -> list[dict[str, Any]]:
    """The results of a generation, after training the members that have none."""
    jobs = [evolution.job(member) for member in members]
    waiting = [index for index, job in enumerate(jobs) if not storage.exists(f"{job.folder}/{RESULT}")]
    for index in waiting:
        evolution.begin(members[index], jobs[index])
    if waiting:
        train([jobs[index] for index in waiting])
    return [storage.read_json(f"{job.folder}/{RESULT}") for job in jobs]


def train_generation(job: WorkerJob, objective: str) -> dict[str, Any]:
    """Train a member's job to its end, once its last checkpoint stands leave its result, and return it."""
    try:
        run_worker(job)
        result: dict[str, Any] = last_measured(job.folder, objective) | {"stopped_early": False}
    except TrainingDivergedError as error:
        result = {"step": 0, "stopped_early": True, "diverged": str(error)}
    storage.write_json(f"{job.folder}/{RESULT}", result)
    return result
