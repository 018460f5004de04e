"""Front door `tune`: a pretraining recipe and the fields to search in, the best recipe out, through Ray Tune.

Trials are drawn from the seed before the sweep starts, so a resumed sweep has the same ones; a finished trial
left its result file, an unfinished one goes on from its checkpoint, also after a Ctrl-C. ASHA stops poor ones; a
population (population.py, evolution.py) runs one Ray Tune experiment per generation. A trial is one worker in one Tune
actor (launcher "local"); a trial over several workers is not here.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from ray import tune as ray_tune
from ray.tune import RunConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.runtime import ray_runtime
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.train.evolution import Evolution, evolve, train_generation
from rsplatform.train.job import WorkerJob
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.population import Population
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.sweep_recipe import Asha, TuneConfig
from rsplatform.train.trials import RESULT, SweepError, Trial, last_measured, open_trial, trial_placement
from rsplatform.train.worker import run_worker

BEST_RECIPE = "best.yaml"
LOGGER = logging.getLogger("rsplatform.tune")


def tune(config: TuneConfig, cluster: Cluster) -> Artifact:
    """Search a pretraining recipe's fields with Ray Tune and write the best recipe as YAML."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        trials: list[Trial] = []
        with _failing_with_the_sweep(trials):
            for index, (values, _) in enumerate(config.trials()):
                trials.append(open_trial(config, cluster, stage, index, values))
            scheduler = config.scheduler
            if isinstance(scheduler, Population):
                recipes = _search_population(Evolution(config, scheduler, cluster, trials, stage.artifact.uri), stage)
            else:
                recipes = _search_asha(config, scheduler, cluster, stage, trials)
            _conclude(config, stage, trials, recipes)
    return stage.artifact


@contextlib.contextmanager
def _failing_with_the_sweep(trials: list[Trial]) -> Iterator[None]:
    """The trials' runs are closed as FAILED when the sweep fails, those with a result as FINISHED: none stays open."""
    try:
        yield
    except BaseException:
        for trial in trials:
            trial.run.fail("FINISHED" if trial.is_done else "FAILED")
        raise


def _search_asha(
    config: TuneConfig, scheduler: Asha, cluster: Cluster, stage: Stage, trials: Sequence[Trial]
) -> list[PretrainConfig]:
    """Train the trials without a result, and leave it; the recipe of every trial."""
    recipes = [recipe for _, recipe in config.trials()]
    num_steps = max(recipe.curriculum.num_steps for recipe in recipes)
    placement = trial_placement(cluster)
    jobs = []
    for trial, recipe in zip(trials, recipes, strict=True):
        if not trial.is_done:
            # a trial that cannot fit its card is refused before any begins
            recipe.chosen_micro_batch_size(recipe.architecture(cluster.root), placement, num_workers=1)
            prepare_tokenizer(recipe, cluster, trial.folder)
            jobs.append(WorkerJob(recipe, cluster.root, trial.folder, placement, trial.run))
    if jobs:
        halving = _Halving(
            jobs,
            config.objective,
            time_attr="step",
            max_t=num_steps,
            grace_period=min(scheduler.grace_steps, num_steps),
            reduction_factor=scheduler.reduction_factor,
        )
        with ray_runtime(cluster):
            outcomes = _run_trials(config, cluster, stage, jobs, _trial, halving)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if _has_diverged(outcome):
                result = {"step": 0, "stopped_early": True, "diverged": True}
                storage.write_json(f"{job.folder}/{RESULT}", result)
        _raise_failures(outcomes)
    return recipes


class _Halving(ASHAScheduler):
    """ASHA that leaves the result of a trial as it stops it: only this is known to be no interruption."""

    def __init__(self, jobs: Sequence[WorkerJob], objective: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._jobs, self._objective = jobs, objective

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            _record_stopped(self._jobs[trial.config["index"]], result, self._objective)
        return decision


def _search_population(evolution: Evolution, stage: Stage) -> list[PretrainConfig]:
    """Train all generations, each in an experiment of its own; the recipe of every trial."""
    with contextlib.ExitStack() as runtime:

        def train(jobs: list[WorkerJob]) -> None:
            runtime.enter_context(ray_runtime(evolution.cluster))  # the first call starts Ray, later ones find it
            config, cluster = evolution.config, evolution.cluster
            _raise_failures(_run_trials(config, cluster, stage, jobs, _generation, FIFOScheduler()))

        return evolve(evolution, train)


def _run_trials(
    config: TuneConfig,
    cluster: Cluster,
    stage: Stage,
    jobs: Sequence[WorkerJob],
    trainable: Callable[..., None],
    scheduler: TrialScheduler,
) -> list[ray_tune.Result]:
    """What became of each job.

    Raises:
        SweepError: Tune was interrupted before every job had come to an end.
    """
    # Tune would take a Ctrl-C for itself and return as if all trials had ended
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    resources = {"cpu": cluster.tune.cpus_per_trial, "gpu": cluster.tune.gpus_per_trial}
    system, path = storage.filesystem(stage.artifact.path("work/ray_tune"))
    system.create_dir(path)
    parameters = {"jobs": jobs, "objective": config.objective}
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(trainable, **parameters), resources),
        param_space={"index": ray_tune.grid_search(list(range(len(jobs))))},
        tune_config=ray_tune.TuneConfig(
            metric=config.objective,
            mode=config.mode,
            scheduler=scheduler,
            max_concurrent_trials=cluster.tune.max_concurrent_trials,
            reuse_actors=True,  # a process takes longer to start than a small trial to run
        ),
        run_config=RunConfig(name="sweep", storage_path=path, storage_filesystem=system, verbose=1),
    )
    try:
        outcomes = tuner.fit()
    finally:
        system.delete_dir(path)
    return _in_order(config, [outcomes[place] for place in range(len(outcomes))])


def _in_order(config: TuneConfig, outcomes: Sequence[ray_tune.Result]) -> list[ray_tune.Result]:
    by_index = {}
    for outcome in outcomes:
        found = outcome.metrics or {}
        if not outcome.config or (outcome.error is None and not found.get("done")):  # a SIGUSR1 ends Tune like that
            raise outcome.error or SweepError(f"{config.output}: interrupted; run the same command to go on")
        by_index[outcome.config["index"]] = outcome
    return [by_index[index] for index in sorted(by_index)]


def _has_diverged(outcome: ray_tune.Result) -> bool:
    """Ray hands the error over wrapped in its own type."""
    return TrainingDivergedError.__name__ in repr(outcome.error)


def _raise_failures(outcomes: Sequence[ray_tune.Result]) -> None:
    """The first error that is not a trial's own divergence."""
    for outcome in outcomes:
        if outcome.error is not None and not _has_diverged(outcome):
            LOGGER.error("a trial failed in %s", outcome.path)
            raise outcome.error


def _generation(parameters: Mapping[str, Any], jobs: Sequence[WorkerJob], objective: str) -> None:
    """One member's part of a generation, in its own process."""
    result = train_generation(jobs[parameters["index"]], objective)
    ray_tune.report({"step": result["step"], objective: result.get(objective, math.nan)})


def _trial(parameters: Mapping[str, Any], jobs: Sequence[WorkerJob], objective: str) -> None:
    """One trial, in its own process: train, report each held-out loss to Tune, leave the result file."""
    job = jobs[parameters["index"]]
    last: dict[str, float] = {}

    def report(metrics: Mapping[str, float], step: int) -> None:
        if objective in metrics:
            last.update(step=step, **{objective: metrics[objective]})
            if step == job.num_steps:
                storage.write_json(f"{job.folder}/{RESULT}", last | {"stopped_early": False})
            ray_tune.report({"step": step, objective: metrics[objective]})

    progress = run_worker(replace(job, on_report=report))
    if not storage.exists(f"{job.folder}/{RESULT}"):  # its minutes ended it, or it had ended before it was started
        found = {"step": 0} | last_measured(job.folder, objective)
        storage.write_json(f"{job.folder}/{RESULT}", found | {"stopped_early": progress.step < job.num_steps})
        if not last and objective in found:
            ray_tune.report(found)  # the others are measured by it, too


def _record_stopped(job: WorkerJob, metrics: Mapping[str, Any], objective: str) -> None:
    """The result of a trial that was stopped before its last step; one that came to its end has left its own."""
    if not storage.exists(f"{job.folder}/{RESULT}"):
        found = {key: metrics[key] for key in ("step", objective) if key in metrics}
        result = {"step": 0} | found | {"stopped_early": True}
        storage.write_json(f"{job.folder}/{RESULT}", result)


def _conclude(config: TuneConfig, stage: Stage, trials: Sequence[Trial], recipes: Sequence[PretrainConfig]) -> None:
    """Close the child runs and write the best recipe among the trials that ran to their end."""
    results = [trial.result() for trial in trials]
    for trial, result in zip(trials, results, strict=True):
        trial.run.set_tags({"stopped_early": str(result["stopped_early"])})
        trial.run.end("FINISHED")
    losses = [math.inf if r["stopped_early"] else config.as_loss(r[config.objective]) for r in results]
    best = min(range(len(trials)), key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise SweepError(f"{config.output}: no trial ran to its end; lengthen max_minutes or lower the learning rates")
    text = yaml.safe_dump(recipes[best].model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(stage.artifact.path(BEST_RECIPE), text.encode())
    stage.run.log_text(text, BEST_RECIPE)
    stage.log({f"best/{config.objective}": results[best][config.objective], "best/trial": best})
    line = results[best].get("values") or [config.trials()[best][0]]
    stage.run.set_tags({f"best.{key}": _told([values[key] for values in line]) for key in config.search})
    num_stopped = sum(result["stopped_early"] for result in results)
    stage.counts = {"trials": len(trials), "complete": len(trials) - num_stopped, "stopped_early": num_stopped}


def _told(values: Sequence[Any]) -> str:
    """The values of a field one after the other, without those that stayed."""
    changes = [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
    return " → ".join(str(value) for value in changes)
