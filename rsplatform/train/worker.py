"""What every training worker runs, inside Ray Train or alone in this process: data, engine, loop, checkpoints.

In: a picklable `WorkerJob`. Out: checkpoints and history.json below the job's folder, metrics in its MLflow run.
Started again after a crash it goes on from the newest checkpoint. Exporting the model is the launcher's work.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from rsplatform import storage
from rsplatform.cluster import TrainPlacement
from rsplatform.dataset.store import SampleStore
from rsplatform.model.float32_products import goes_through_onednn, use_onednn_products
from rsplatform.model.mammut import Mammut
from rsplatform.model.resolution import with_image_size
from rsplatform.model.state import model_from_tensors
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.weights import TOKENIZER_FILE, load_model
from rsplatform.train.allocator import keep_freed_memory
from rsplatform.train.checkpoint import BackgroundWriter, CheckpointFolder, HostImage, agreed_step
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.engine import MODEL, Engine, gather_of_default_group
from rsplatform.train.engines import make_engine
from rsplatform.train.guard import DamagedDataError
from rsplatform.train.hardest import write_hardest
from rsplatform.train.held_out import HeldOutPlace, held_out_validation
from rsplatform.train.job import WorkerJob
from rsplatform.train.loader import Loader, Share
from rsplatform.train.node_meter import reporting_node
from rsplatform.train.pretrain import EMA, Hooks, Progress, TrainingDivergedError, fit
from rsplatform.train.progress import LINE_EVERY_SECONDS, STEP_METRIC, describe
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.traffic import layout_of, sent_gb_per_step

# Why a run ends on all processes alike, by the name it has in a worker's answer: a restart would meet it again.
ENDS: dict[str, type[Exception]] = {
    "diverged": TrainingDivergedError,
    "mismatch": RecipeMismatchError,
    "damaged": DamagedDataError,
}

logger = logging.getLogger("rsplatform.train")


def ray_train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """`run_worker` as Ray Train calls it. What a restart would meet again is an answer, not a failure.

    The answer also holds the metrics that MLflow has not taken, `unsent`: the driver tries once more.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from rsplatform.train.elastic import PreemptionNotice  # not above: the local launcher does without Ray

    job: WorkerJob = loop_config["job"]
    try:
        answer: dict[str, Any] = {"progress": asdict(run_worker(job, PreemptionNotice()))}
    except tuple(ENDS.values()) as error:
        answer = {name: str(error) for name, kind in ENDS.items() if isinstance(error, kind)}
    return answer | {"unsent": job.run.outbox.rows if job.run else []}


def run_worker(job: WorkerJob, wants_checkpoint: Callable[[], bool] | None = None) -> Progress:
    """Train this process's part of `job` to the end, from its newest checkpoint; `wants_checkpoint` as Hooks has it.

    Raises:
        TrainingDivergedError: the loss or the gradient is not finite.
        DamagedDataError: too many pictures cannot be decoded.
    """
    torch.set_num_threads(max(1, round(job.placement.cpus_per_worker)))
    if job.placement.launcher == "local":  # Ray's workers start with it
        keep_freed_memory()
    if not job.placement.gpus_per_worker:
        use_onednn_products()
    with _process_group(job.placement):
        gather = gather_of_default_group()
        share = Share(gather.rank, gather.world_size) if gather else Share()
        tokenizer = load_tokenizer(job.folder)
        engine = make_engine(job.config, job.placement, initial_model(job.config, job.root), share)
        config = job.config.loader_config(engine.model.config, job.placement.decode_threads)
        store = SampleStore(job.root, job.config.dataset, job.config.split)
        plan = job.config.curriculum.plan(store.origins, job.config.batch_size, job.config.seed)
        loader = Loader(store, tokenizer, plan, config, share)
        own_step = agreed_step(job.checkpoints, gather, engine.device)
        from_step = own_step or job.first_step
        micro_batch = job.config.chosen_micro_batch_size(engine.model.config, job.placement, share.world_size)
        loop = replace(job.config.loop_config(job.placement, micro_batch), num_steps=job.num_steps)
        if share.rank == 0 and job.run is not None:
            job.run.log_metrics(_what_the_place_makes_of_it(job, engine, micro_batch), from_step)
            job = replace(job, run=job.run.going_on())
        with Recorder(job, is_first=share.rank == 0, from_step=from_step) as recorder:
            look = partial(write_hardest, job.folder, tokenizer) if share.rank == 0 else None
            place = HeldOutPlace(job.root, tokenizer, config, share, micro_batch)
            validate = held_out_validation(job.config, engine, place, look)
            report = reporting_node(recorder.report, job.run, engine.device, is_first=share.rank == 0)
            curriculum = job.config.curriculum
            hooks = Hooks(report, recorder.save, validate, None, curriculum.frozen_parts, wants_checkpoint)
            # handed over without a name here, which would hold it in host memory beside the training
            return fit(engine, loader.batches, curriculum.learning_rate, loop, hooks, job.resume(own_step))


def _what_the_place_makes_of_it(job: WorkerJob, engine: Engine, micro_batch: int | None) -> dict[str, float]:
    """Metrics that stay as they are until the run is started elsewhere."""
    world_size = engine.gather.world_size if engine.gather else 1
    products = float(goes_through_onednn())  # another library, other roundings
    own = job.config.batch_size // world_size
    metrics = {"train/workers": float(world_size), "train/micro_batch_size": float(min(own, micro_batch or own))}
    metrics["train/onednn_products"] = products
    if world_size > 1:
        layout = layout_of(job.placement, world_size, job.config.optimizer.kind)
        metrics["train/sent_gb_per_step"] = sent_gb_per_step(layout, engine.model.config, own, micro_batch)
    return metrics


def initial_model(config: PretrainConfig, root: str) -> Mammut:
    """The model before its first step, in float32: seeded, or the weights of the artifact that `start_from` names.

    Moments have their weights' dtype, and steps are smaller than a bfloat16 weight's next neighbour is far.
    """
    if config.start_from is not None:
        with storage.local_folder(f"{root}/{config.start_from}/model") as folder:
            return load_model(folder)[0].float().train()
    assert config.model is not None, "the recipe's validator demands one of model and start_from"
    torch.manual_seed(config.seed)
    return Mammut(config.model.mammut_config())


def model_of_checkpoint(
    config: PretrainConfig, root: str, checkpoints: CheckpointFolder, step: int
) -> tuple[Mammut, Progress]:
    """The model that a checkpoint would be exported as, in eval mode, and where it stood. It needs the file no more.

    Its weights are their moving average if there is one. Its own image size is the last phase's: the size that the
    finished model's weights were last trained at, so that numbers of one run's checkpoints compare.

    Raises:
        CheckpointError: the file is damaged.
        OSError: there is no checkpoint of that step, or there is none any more.
    """
    prefix = EMA if config.ema_decay is not None else MODEL
    tensors, progress = checkpoints.read(step, prefix)
    weights = {name.removeprefix(prefix): value for name, value in tensors.items()}
    architecture = config.architecture(root)
    model = model_from_tensors(architecture, weights, f"{checkpoints.uri}, step {step}")
    return with_image_size(model, config.curriculum.image_sizes(architecture)[-1]), progress


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer that the launcher put into the job's folder."""
    with storage.local_folder(f"{folder}/tokenizer") as local:
        return Tokenizer.load(local / TOKENIZER_FILE)


class Recorder:
    """The loop's reports and checkpoints, written by the first process only; to be used in a `with`.

    The loop goes on while a checkpoint is written, until the next one is due. What went wrong with a checkpoint is
    raised by the next `save` or at the end of the `with`, which waits for the last one.
    """

    def __init__(self, job: WorkerJob, *, is_first: bool, from_step: int) -> None:
        self.job = job
        self.is_first = is_first
        self.history = [row for row in read_history(job.folder) if row["step"] <= from_step]
        self._last_line = 0.0
        self._image = HostImage()
        self._writer = BackgroundWriter()
        if is_first:
            storage.delete_temporaries(job.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finish the last checkpoint, and send what MLflow has not taken yet.

        A warning says what it never will take, which history.json still holds.
        """
        try:
            self._writer.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"the last checkpoint was not written either: {failure}")
        finally:
            if self.job.run is not None:
                self.job.run.flush()

    def report(self, metrics: dict[str, float], step: int) -> None:
        """Metrics to MLflow, to the history and, in local mode now and then, to the log."""
        if not self.is_first:
            return
        self.history.append({"step": step, **metrics})
        if self.job.run is not None:
            tracked = {f"train/{name}": value for name, value in metrics.items()}
            self.job.run.log_metrics(tracked | {STEP_METRIC: step}, step)
        if self.job.on_report is not None:
            self.job.on_report(metrics, step)
        if self.job.placement.launcher == "ray":  # its driver shows the progress
            return
        num_steps = self.job.num_steps
        if "loss" in metrics and (step == num_steps or time.monotonic() - self._last_line > LINE_EVERY_SECONDS):
            self._last_line = time.monotonic()
            line = describe({f"train/{name}": value for name, value in metrics.items()})
            logger.info("step %d/%d  %s", step, num_steps, line)

    def save(self, tensors: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Copy the state to host memory, and write it beside the training that goes on."""
        if not self.is_first:
            return
        self._writer.wait()  # before the memory that it writes from is filled again
        data = self._image.fill(tensors, progress)
        self._writer.start(partial(self._write, list(self.history), data, progress.step))

    def _write(self, history: list[dict[str, float]], data: memoryview, step: int) -> None:
        """The history first, so that it is never shorter than its checkpoint; the new one before old ones go."""
        storage.write_json(f"{self.job.folder}/history.json", history)
        checkpoints, keep_best = self.job.checkpoints, self.job.config.keep_best
        checkpoints.write(data, step)
        best = keep_best.step(history, checkpoints.steps()) if keep_best else None
        checkpoints.prune(keep=() if best is None else (best,))


def read_history(folder: str) -> list[dict[str, float]]:
    """Rows of metrics that a run has reported, in order; empty before its first checkpoint."""
    path = f"{folder}/history.json"
    return storage.read_json(path) if storage.exists(path) else []


@contextlib.contextmanager
def _process_group(placement: TrainPlacement) -> Iterator[None]:
    """Ray Train makes the group of its workers; DeepSpeed or FSDP alone in this process needs one of its own."""
    if dist.is_initialized() or placement.engine == "plain":
        yield
        return
    backend = "nccl" if placement.gpus_per_worker > 0 else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
