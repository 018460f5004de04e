"""Front door `follow`: a training run and pinned benchmarks in, a score of each of its checkpoints out, while it runs.

Reads whole checkpoints from storage, so it may run beside the training, on another machine, or afterwards; the training
neither knows nor waits. The numbers are those that `evaluate` gives the same weights; they go into the training's own
MLflow run, at the checkpoint's step. Every n-th step is scored for sure where the training's recipe keeps it
(`keep_every_steps`); else what is pruned before it is read is left out, with a warning. On a machine whose GPU is
the training's, hide it (CUDA_VISIBLE_DEVICES=) and it scores on the cores.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from watchfiles import watch

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import ArtifactRef, StageConfig, validate
from rsplatform.evaluate.benchmarks import Benchmark
from rsplatform.evaluate.run import numbers, score
from rsplatform.localize.window import SmoothWindow
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.tracking import Run
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import load_tokenizer, model_of_checkpoint

SCORES_FILE = "scores.json"

logger = logging.getLogger("rsplatform.evaluate")


class FollowConfig(StageConfig):
    """An evaluation's recipe whose model may still be in training. `every_steps`: steps between scored checkpoints.

    Exactly its multiples are scored if the training's `keep_every_steps` divides it, however late they are read. The
    last checkpoint is scored in any case. No input of the artifact: a fingerprint needs a finished model.
    """

    model: ArtifactRef
    benchmarks: list[Benchmark] = Field(min_length=1)
    window: Annotated[SmoothWindow, Field(ge=3)] = 3
    every_steps: int = Field(default=1, ge=1)


class FollowError(RuntimeError):
    """A training that gives no more checkpoints; the message says for how long."""


@dataclass(frozen=True)
class Training:
    """The model artifact of a training that has at least begun, with its recipe and its MLflow run."""

    artifact: Artifact
    recipe: PretrainConfig
    run_id: str

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Where its checkpoints appear."""
        return CheckpointFolder(self.artifact.path("checkpoints"))

    def keeps(self, every_steps: int) -> bool:
        """Whether it prunes no checkpoint of a multiple of `every_steps`."""
        kept = self.recipe.keep_every_steps
        return kept is not None and every_steps % kept == 0


def follow(config: FollowConfig, cluster: Cluster) -> Artifact:
    """Score each checkpoint of a training on pinned benchmarks, while it runs or afterwards.

    Raises:
        ArtifactError: nobody has begun the training, or its folder was made anew since the first checkpoint was scored.
        ConfigError: `model` was not made by pretrain.
        FollowError: no new checkpoint for the placement's `patience_minutes`; the next call goes on from there.
    """
    training = _open_training(config.model, cluster)
    _check_same_training(Artifact(cluster.root, config.output), training)
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        stage.run.set_tags({f"input.{config.model}": training.run_id})
        rows = _score_all(config, cluster, stage, training)
        stage.counts = {"checkpoints": len(rows), "last_step": rows[-1]["step"]}
    return stage.artifact


def _open_training(ref: str, cluster: Cluster) -> Training:
    artifact = Artifact(cluster.root, ref)
    known, run_id = artifacts.known_recipe(artifact), artifacts.noted_run(artifact)
    if known is None or run_id is None:
        raise ArtifactError(f"{artifact.uri}: nobody has begun to train it; start its pretrain job first")
    return Training(artifact, validate(PretrainConfig, known["config"], f"{artifact.uri}: its recipe"), run_id)


def _check_same_training(output: Artifact, training: Training) -> None:
    path = output.path(SCORES_FILE)
    known = storage.read_json(path) if storage.exists(path) else {}
    if known.get("model") == training.artifact.ref and known["mlflow_run_id"] != training.run_id:
        raise ArtifactError(
            f"{output.uri} holds scores of an earlier training of {training.artifact.ref}; "
            "name a new version in `output`, or delete the folder"
        )


def _score_all(config: FollowConfig, cluster: Cluster, stage: Stage, training: Training) -> list[dict[str, Any]]:
    """Rows of scores.json, one a checkpoint; those that it already holds are not scored again."""
    path, place = stage.artifact.path(SCORES_FILE), cluster.follow
    rows = storage.read_json(path)["checkpoints"] if storage.exists(path) else []
    training_run = Run(stage.run.uri, training.run_id)
    news_at_s = time.monotonic()
    while True:
        is_finished = training.artifact.is_finished  # asked first: then the last checkpoint is among the steps
        steps, scored = training.checkpoints.steps(), [row["step"] for row in rows]
        step = next_step(steps, scored, config.every_steps, is_finished, training.keeps(config.every_steps))
        if step is not None:
            row = _score_checkpoint(config, cluster, stage, training, step)
            if row is not None:
                training_run.log_metrics(row["metrics"], step)
                rows.append(row)
                document = {"model": config.model, "mlflow_run_id": training.run_id, "checkpoints": rows}
                storage.write_json(path, document)
            news_at_s = time.monotonic()
        elif is_finished:
            break
        elif time.monotonic() - news_at_s >= place.patience_minutes * 60:
            training_run.flush()
            raise FollowError(
                f"{training.checkpoints.uri}: no checkpoint to score for {place.patience_minutes:g} minutes; see that "
                "the training runs, then run the same command again to go on"
            )
        else:
            _wait_for_change(training.artifact.uri, place.poll_seconds)
    training_run.flush()
    if not rows:
        raise ArtifactError(
            f"{training.artifact.uri} is finished and holds no checkpoints; `evaluate` scores its model/"
        )
    return rows


def next_step(
    steps: list[int], scored: list[int], every_steps: int, is_finished: bool, are_kept: bool = False
) -> int | None:
    """Of the checkpoints that are there, the first one due; of a finished training the last one is always due.

    `are_kept`: no multiple of `every_steps` is ever pruned, so exactly these are due.
    """
    last = max(scored, default=0)
    due = [
        step for step in steps if (step > last and step % every_steps == 0 if are_kept else step >= last + every_steps)
    ]
    if not due and is_finished and steps and steps[-1] > last:
        due = steps[-1:]
    return due[0] if due else None


def _score_checkpoint(
    config: FollowConfig, cluster: Cluster, stage: Stage, training: Training, step: int
) -> dict[str, Any] | None:
    """One row of scores.json; None if the training has pruned the checkpoint meanwhile."""
    checkpoints = training.checkpoints
    try:
        model, _ = model_of_checkpoint(training.recipe, cluster.root, checkpoints, step)
    except OSError:
        if step in checkpoints.steps():
            raise
        logger.warning(
            "%s: the checkpoint of step %d was pruned before it could be read; keep_every_steps: %d in the training's "
            "recipe would have kept it",
            config.model,
            step,
            config.every_steps,
        )
        return None
    embedder = Embedder(model.to(driver_device()), load_tokenizer(training.artifact.uri))
    row: dict[str, Any] = {"step": step, "model_hash": embedder.model_hash, "benchmarks": {}, "metrics": {}}
    for benchmark in config.benchmarks:
        result = score(
            benchmark,
            config.window,
            cluster,
            embedder,
            lambda figure, name: stage.run.log_picture(figure, f"step_{step:08d}/{name}"),
        )
        stage.run.set_tags({f"pin.{benchmark.name}": result["pin"]})
        metrics = numbers(benchmark.name, result)
        stage.log(metrics, step)
        row["metrics"] |= {f"evaluation/{name}": value for name, value in metrics.items()}
        row["benchmarks"][benchmark.name] = result
    logger.info("%s: scored the checkpoint of step %d", config.model, step)
    return row


def _wait_for_change(folder: str, poll_seconds: float) -> None:
    """Return when a checkpoint or the manifest appears, or after `poll_seconds`.

    Object stores tell nobody of changes, network disks not of those that another machine makes: there the clock
    alone decides.
    """
    if storage.is_s3(folder):
        threading.Event().wait(poll_seconds)
        return
    ours = (".safetensors", artifacts.MANIFEST)
    changes = watch(
        folder,
        watch_filter=lambda _, path: path.endswith(ours),
        rust_timeout=round(poll_seconds * 1000),
        yield_on_timeout=True,
    )
    next(changes)
    changes.close()
