"""Front door `pretrain`: a dataset artifact in, a model artifact out, through Ray Train or in this process.

Makes the tokenizer, starts the workers of the placement, exports the final weights. Ray restarts dead workers;
which step they go on from is decided by our checkpoints. Ray is imported only where it launches: the local launcher
works where it is not installed. The loop itself is in pretrain.py.
"""

import logging
import tempfile
import uuid
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.dataset.store import SampleStore
from rsplatform.model.mammut import MammutConfig
from rsplatform.model.weights import TOKENIZER_FILE, save_model
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.train.allocator import KEEP_FREED_MEMORY
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.hardest import hardest_figure
from rsplatform.train.job import WorkerJob
from rsplatform.train.pretrain import Progress
from rsplatform.train.progress import shown_progress
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.train_tokenizer import learn, read_tokenizer
from rsplatform.train.worker import (
    ENDS,
    load_tokenizer,
    model_of_checkpoint,
    ray_train_worker,
    read_history,
    run_worker,
)

logger = logging.getLogger("rsplatform.train")


def pretrain(config: PretrainConfig, cluster: Cluster) -> Artifact:
    """Train a MaMMUT on a dataset, from scratch or from a model artifact."""
    done = finished(config, cluster)
    if done:
        return done
    check_start(config, cluster)
    if cluster.train.launcher == "ray":
        check_workers(config.batch_size, cluster.train)
    with open_stage(config, cluster) as stage:
        prepare_tokenizer(config, cluster, stage.artifact.uri)
        job = WorkerJob(config, cluster.root, stage.artifact.uri, cluster.train, stage.run)
        progress = launch(job, cluster)
        _describe(stage, config, progress, export_model(job))
    return stage.artifact


def check_start(config: PretrainConfig, cluster: Cluster) -> None:
    """What the recipe asks of the model that it starts from and of the card, before anything is begun for it.

    Raises:
        ArtifactError: the model is missing or unfinished.
        RecipeMismatchError: the loss needs another model, a phase's image size does not fit its patches, or what is
            to be in memory at once does not fit the card.
    """
    model = config.architecture(cluster.root)
    if config.start_from is not None:
        _check_start_from(config, model)
    for line in config.plan_lines(cluster):
        logger.info(line)


def _check_start_from(config: PretrainConfig, model: MammutConfig) -> None:
    if model.logit_bias != (config.loss.contrastive == "sigmoid"):
        has = "has a logit bias" if model.logit_bias else "has no logit bias"
        raise RecipeMismatchError(
            f"start_from {config.start_from} {has}: it goes with loss.contrastive "
            f"{'sigmoid only' if model.logit_bias else 'softmax or focal_sigmoid'}"
        )
    try:
        config.curriculum.image_sizes(model)
    except ValueError as error:
        raise RecipeMismatchError(f"start_from {config.start_from}: {error}") from error


def prepare_tokenizer(config: PretrainConfig, cluster: Cluster, folder: str) -> None:
    """Put the run's tokenizer below `folder`: the named one, `start_from`'s, or one trained on the captions.

    Raises:
        RecipeMismatchError: the named one has more tokens than the model.
    """
    target = f"{folder}/tokenizer/{TOKENIZER_FILE}"
    if storage.exists(target):
        return
    if config.start_from is not None:
        data = storage.read_bytes(f"{cluster.root}/{config.start_from}/model/{TOKENIZER_FILE}")
        storage.write_bytes(target, data)
        return
    assert config.model is not None, "the recipe's validator demands one of model and start_from"
    vocab_size = config.model.mammut_config().text.vocab_size
    if config.tokenizer is not None:
        tokenizer = read_tokenizer(config.tokenizer, cluster)
    else:
        tokenizer, _ = learn(SampleStore(cluster.root, config.dataset, config.split).all_captions(), vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise RecipeMismatchError(
            f"{config.tokenizer} has {tokenizer.vocab_size} tokens, the model a vocabulary of {vocab_size}; "
            f"set model.settings.vocab_size to {tokenizer.vocab_size} or more"
        )
    storage.write_bytes(target, tokenizer.to_json().encode())


def launch(job: WorkerJob, cluster: Cluster) -> Progress:
    """Run the workers of `job` where its placement says, to the end.

    Raises:
        TrainingDivergedError: the loss or the gradient is not finite.
        DamagedDataError: too many pictures cannot be decoded.
        ray.train.TrainingFailedError: workers died more often than `max_failures` and `max_preemptions` let pass.
    """
    if job.placement.launcher == "local":
        return run_worker(job)
    from rsplatform.runtime import ray_runtime  # not above: the local launcher does without Ray

    with ray_runtime(cluster):
        outcome = _ray_train(job)
    if job.run is not None:
        job.run.outbox.rows.extend(outcome["unsent"])
    for name, error in ENDS.items():
        if name in outcome:
            raise error(outcome[name])
    return Progress(**outcome["progress"])


def check_workers(batch_size: int, placement: TrainPlacement) -> None:
    """Refuse numbers of workers that the global batch, or the copies of a sharded model, do not divide among.

    Raises:
        RecipeMismatchError: `num_workers` itself, or an elastic range that has no other number in it.
    """
    counts, most, fewest = placement.worker_counts(batch_size), placement.num_workers, placement.min_workers
    if batch_size % most:
        raise RecipeMismatchError(
            f"batch_size {batch_size} does not divide among {most} workers; "
            "change batch_size in the recipe or train.num_workers in the cluster file"
        )
    if most not in counts:
        raise RecipeMismatchError(
            f"train.shard_size {placement.shard_size} does not divide train.num_workers {most}: "
            "choose a divisor, or leave it out to shard over all"
        )
    if fewest is not None and fewest < most and len(counts) == 1:
        fitting = placement.model_copy(update={"min_workers": 1}).worker_counts(batch_size)
        raise RecipeMismatchError(
            f"train.min_workers {fewest} is no choice: of {fewest} to {most} workers, batch_size {batch_size} (and "
            f"train.shard_size, if set) fits {most} alone; it fits {', '.join(map(str, fitting))}"
        )


def _ray_train(job: WorkerJob) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from rsplatform.train.elastic import ElasticTrainer, stopped_by_ctrl_c

    placement = job.placement
    # a work folder per start: Ray keeps no state of ours there, and its own restore stays out of exact resume
    system, path = storage.filesystem(f"{job.folder}/work/ray_train")
    system.create_dir(path)
    resources = {"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker}
    counts = placement.worker_counts(job.config.batch_size)
    trainer = ElasticTrainer(
        ray_train_worker,
        counts=counts,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(counts[0], counts[-1]) if len(counts) > 1 else placement.num_workers,
            elastic_resize_monitor_interval_s=60 * placement.grow_every_minutes,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount > 0},
        ),
        run_config=RunConfig(
            name=f"start-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(
                max_failures=placement.max_failures,
                max_preemption_failures=-1 if placement.max_preemptions is None else placement.max_preemptions,
            ),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
        ),
    )
    try:
        with stopped_by_ctrl_c(), shown_progress(job.run, job.config.curriculum.num_steps):
            outcome = trainer.fit().return_value
    finally:
        system.delete_dir(path)
    assert outcome is not None, "Ray Train returns what its first worker returned"
    return outcome


def export_model(job: WorkerJob) -> Progress:
    """Write model/ from the last checkpoint, or the best if the recipe says so; returns where it stood."""
    checkpoints, keep_best = job.checkpoints, job.config.keep_best
    steps = checkpoints.steps()
    if not steps:
        raise RuntimeError(f"{checkpoints.uri}: training ended without a checkpoint")
    step = steps[-1]
    if keep_best is not None and keep_best.export == "best":
        step = keep_best.step(read_history(job.folder), steps) or step
    model, progress = model_of_checkpoint(job.config, job.root, checkpoints, step)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, load_tokenizer(job.folder))
        storage.upload_folder(Path(folder), f"{job.folder}/model")
    return progress


def _describe(stage: Stage, config: PretrainConfig, progress: Progress, exported: Progress) -> None:
    """Counts of the whole training; `final/` metrics are the last ones up to the exported step.

    Training and its validations run the weights themselves: where their moving average is exported, that is not what
    was measured. The run's tag and the model card say which is exported.
    """
    history = read_history(stage.artifact.uri)
    last: dict[str, float] = {}
    for row in history:
        last |= row if row["step"] <= exported.step else {}
    stage.log({f"final/{name}": value for name, value in last.items() if name != "step"}, exported.step)
    stage.log({"training_minutes": progress.elapsed_s / 60}, progress.step)
    stage.counts = {
        "steps": progress.step,
        "samples_seen": (progress.step - progress.guard.skipped_steps) * config.batch_size,
        "skipped_steps": progress.guard.skipped_steps,
        "undecodable": progress.guard.undecodable,
        "exported_step": exported.step,
        "stopped_early": int(bool(progress.stopped)),
    }
    if progress.stopped:
        logger.warning("%s: %s", config.output, progress.stopped)
        stage.run.set_tags({"stopped_early": progress.stopped})
    average = config.ema_decay is not None
    stage.run.set_tags({"exported_weights": "moving average, unlike those of final/" if average else "as in final/"})
    stage.run.log_picture(loss_figure(history), "loss.png")
    if config.validation_split is not None:
        store = SampleStore(stage.artifact.root, config.dataset, config.validation_split)
        hardest = hardest_figure(stage.artifact.uri, store)
        if hardest is not None:
            stage.run.log_picture(hardest, "hardest_pairs.png")


def loss_figure(history: list[dict[str, float]]) -> Figure:
    """Loss parts over steps, training and held-out."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name in ("loss", "contrastive", "caption", "val_contrastive", "val_caption"):
        rows = [(row["step"], row[name]) for row in history if name in row]
        if rows:
            axes.plot(*zip(*rows, strict=True), label=name, marker="." if name.startswith("val") else None)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
