"""Front door `tune`: a pretraining recipe and the fields to search in, the best recipe out, through Ray Tune.

Trials are drawn from the seed before the sweep starts, so a resumed sweep has the same ones; a finished trial
left its result file, an unfinished one goes on from its checkpoint. ASHA stops poor ones. A trial is one worker in
one Tune actor (launcher "local"); a trial over several workers is not here.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, model_validator
from ray import tune as ray_tune
from ray.tune import RunConfig
from ray.tune.schedulers import ASHAScheduler

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, StageConfig, TemplateMarker, validate
from rsplatform.runtime import ray_runtime
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import WorkerJob, run_worker

BEST_RECIPE = "best.yaml"
RESULT, TRIAL = "result.json", "trial.json"
LOGGER = logging.getLogger("rsplatform.tune")


class SweepError(RuntimeError):
    """A sweep without a best trial; the message says what to change."""


class SearchField(Config):
    """How one field is drawn: from `choices`, or between two numbers on a log scale. Exactly one of the two."""

    choices: list[Any] | None = Field(default=None, min_length=1)
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "SearchField":
        if (self.choices is None) == (self.log_uniform is None):
            raise ValueError("give either choices: […] or log_uniform: [low, high]")
        if self.log_uniform is not None and not 0 < self.log_uniform[0] < self.log_uniform[1]:
            raise ValueError("log_uniform needs 0 < low < high")
        return self

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        assert self.log_uniform is not None, "the validator demands one of the two"
        low, high = (math.log(bound) for bound in self.log_uniform)
        return float(f"{math.exp(rng.uniform(low, high)):.3g}")


class TuneConfig(StageConfig):
    """`search` maps dotted keys of the recipe (phases.0.schedule.learning_rate) to how they are drawn.

    `recipe` is what the trials are copies of; best.yaml is the best copy, with the recipe's own output.
    """

    recipe: Annotated[PretrainConfig, TemplateMarker()]
    search: dict[str, SearchField] = Field(min_length=1)
    num_trials: int = Field(default=4, ge=1)
    seed: int = Field(default=0, ge=0)
    objective: Literal["val_contrastive", "val_caption", "val_loss"] = "val_contrastive"
    grace_steps: int = Field(default=1, ge=1)  # no trial is stopped before
    reduction_factor: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _trials_are_valid(self) -> "TuneConfig":
        if self.recipe.validate_every_steps is None:
            raise ValueError("recipe.validate_every_steps: a sweep compares held-out losses while it runs; set it")
        try:
            self.trials()
        except (ConfigError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"search: {error}") from error
        return self

    def trials(self) -> list[tuple[dict[str, Any], PretrainConfig]]:
        """(drawn values, recipe) of every trial, a function of the seed."""
        rng = np.random.default_rng(self.seed)
        trials = []
        for index in range(self.num_trials):
            values = {key: field.draw(rng) for key, field in self.search.items()}
            document = self.recipe.model_dump(mode="json")
            for key, value in values.items():
                set_value(document, key, value)
            trials.append((values, validate(PretrainConfig, document, f"trial {index}")))
        return trials


def set_value(document: Any, dotted_key: str, value: Any) -> None:
    """Set an existing field in place; list items are named by their index.

    Raises:
        KeyError: the document has no such field.
    """
    *parents, last = [int(part) if part.isdigit() else part for part in dotted_key.split(".")]
    for part in parents:
        document = document[part]
    if isinstance(document, dict) and last not in document:
        raise KeyError(f"{dotted_key}: the recipe has no such field (valid here: {', '.join(sorted(document))})")
    document[last] = value


def tune(config: TuneConfig, cluster: Cluster) -> Artifact:
    """Search a pretraining recipe's fields with Ray Tune and write the best recipe as YAML."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        jobs: list[WorkerJob] = []
        with _failing_with_the_sweep(jobs):
            for index in range(config.num_trials):
                jobs.append(_job(config, cluster, stage, index))
            waiting = [index for index, job in enumerate(jobs) if not storage.exists(f"{job.folder}/{RESULT}")]
            if waiting:
                with ray_runtime(cluster):
                    _run_trials(config, cluster, jobs, waiting, stage)
            results = [storage.read_json(f"{job.folder}/{RESULT}") for job in jobs]
            _conclude(config, stage, jobs, results)
    return stage.artifact


@contextlib.contextmanager
def _failing_with_the_sweep(jobs: list[WorkerJob]) -> Iterator[None]:
    """The trials' runs are closed as FAILED when the sweep fails, those with a result as FINISHED: none stays open."""
    try:
        yield
    except BaseException:
        for job in jobs:
            assert job.run is not None, "every trial has its run"
            job.run.fail("FINISHED" if storage.exists(f"{job.folder}/{RESULT}") else "FAILED")
        raise


def _job(config: TuneConfig, cluster: Cluster, stage: Stage, index: int) -> WorkerJob:
    values, recipe = config.trials()[index]
    folder = stage.artifact.path(f"trials/{index}")
    note = f"{folder}/{TRIAL}"
    resume = storage.read_json(note)["run_id"] if storage.exists(note) else None
    name, tags = f"{config.output} trial {index}", {"kind": "trial", "trial": str(index), "ref": config.output}
    run = tracking.start_run(cluster.root, config.pipeline, name, values, tags=tags, resume=resume)
    storage.write_json(note, {"run_id": run.run_id, "values": values})
    prepare_tokenizer(recipe, cluster, folder)
    own = {"launcher": "local", "engine": "plain", "num_workers": 1}
    resources = {"cpus_per_worker": cluster.tune.cpus_per_trial, "gpus_per_worker": cluster.tune.gpus_per_trial}
    placement = cluster.train.model_copy(update=own | resources)
    recipe.chosen_micro_batch_size(recipe.architecture(cluster.root), placement, num_workers=1)  # or refuse it now
    return WorkerJob(recipe, cluster.root, folder, placement, run)


def _run_trials(config: TuneConfig, cluster: Cluster, jobs: list[WorkerJob], waiting: list[int], stage: Stage) -> None:
    num_steps = max(job.config.curriculum.num_steps for job in jobs)
    scheduler = ASHAScheduler(
        time_attr="step",
        max_t=num_steps,
        grace_period=min(config.grace_steps, num_steps),
        reduction_factor=config.reduction_factor,
    )
    resources = {"cpu": cluster.tune.cpus_per_trial, "gpu": cluster.tune.gpus_per_trial}
    system, path = storage.filesystem(stage.artifact.path("work/ray_tune"))
    system.create_dir(path)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(_trial, jobs=jobs, objective=config.objective), resources),
        param_space={"index": ray_tune.grid_search(waiting)},
        tune_config=ray_tune.TuneConfig(
            metric=config.objective,
            mode="min",
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
    for outcome in outcomes:
        index = (outcome.config or {})["index"]
        if TrainingDivergedError.__name__ in repr(outcome.error):  # Ray hands it over wrapped in its own type
            storage.write_json(f"{jobs[index].folder}/{RESULT}", {"step": 0, "stopped_early": True, "diverged": True})
            continue
        if outcome.error is not None:
            LOGGER.error("trial %d failed", index)
            raise outcome.error
        _record_stopped(jobs[index], outcome.metrics or {}, config.objective)


def _trial(parameters: Mapping[str, Any], jobs: list[WorkerJob], objective: str) -> None:
    """One trial, in its own process: train, report each held-out loss to Tune, leave the result file."""
    job = jobs[parameters["index"]]
    last: dict[str, float] = {}

    def report(metrics: Mapping[str, float], step: int) -> None:
        if objective in metrics:
            last.update(step=step, **{objective: metrics[objective]})
            if step == job.config.curriculum.num_steps:
                storage.write_json(f"{job.folder}/{RESULT}", last | {"stopped_early": False})
            ray_tune.report({"step": step, objective: metrics[objective]})

    run_worker(WorkerJob(job.config, job.root, job.folder, job.placement, job.run, report))


def _record_stopped(job: WorkerJob, metrics: Mapping[str, Any], objective: str) -> None:
    """The result of a trial that ASHA stopped, which could not write it itself."""
    if not storage.exists(f"{job.folder}/{RESULT}"):
        found = {key: metrics[key] for key in ("step", objective) if key in metrics}
        result = {"step": 0} | found | {"stopped_early": True}
        storage.write_json(f"{job.folder}/{RESULT}", result)


def _conclude(config: TuneConfig, stage: Stage, jobs: list[WorkerJob], results: list[dict[str, Any]]) -> None:
    """Close the child runs and write the best recipe among the trials that ran to their end."""
    for job, result in zip(jobs, results, strict=True):
        assert job.run is not None, "every trial has its run"
        job.run.set_tags({"stopped_early": str(result["stopped_early"])})
        job.run.end("FINISHED")
    complete = [index for index, result in enumerate(results) if not result["stopped_early"]]
    if not complete:
        raise SweepError(f"{config.output}: no trial ran to its end; lengthen max_minutes or lower the learning rates")
    best = min(complete, key=lambda index: results[index][config.objective])
    text = yaml.safe_dump(jobs[best].config.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(stage.artifact.path(BEST_RECIPE), text.encode())
    stage.run.log_text(text, BEST_RECIPE)
    stage.log({f"best/{config.objective}": results[best][config.objective], "best/trial": best})
    stage.run.set_tags({f"best.{key}": str(value) for key, value in config.trials()[best][0].items()})
    stage.counts = {"trials": len(jobs), "complete": len(complete), "stopped_early": len(jobs) - len(complete)}
