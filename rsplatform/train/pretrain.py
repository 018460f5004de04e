"""The training loop: batches in, an engine stepped, metrics and checkpoints out through callables.

Knows torch and our model, not Ray, MLflow, DeepSpeed or storage: it runs on a bare machine. A step is a pure
function of (state, seed, step), so N steps equal k steps, a crash and N - k steps, bitwise on CPU.
Shapes: B batch, C channels, H W pixels, T tokens, K values.
"""

import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rsplatform.model.losses import LossConfig
from rsplatform.train import guard
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine, mean_over_processes
from rsplatform.train.guard import GuardConfig, GuardState
from rsplatform.train.meter import Devices, Window
from rsplatform.train.optimizer import AveragedWeights
from rsplatform.train.step import AuxiliaryLoss, StepConfig, prepare_step

EMA = "ema/"
# How often the loop asks whether a checkpoint is wanted at once: asking Ray is a barrier of milliseconds, and a machine
# that is taken away is announced half a minute before, or more.
ASK_EVERY_SECONDS = 1.0


class TrainingDivergedError(RuntimeError):
    """Losses or gradients that are not finite or far too high; a restart would meet the same steps again."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how; `max_minutes` counts over restarts and stops at the next step.

    `ema_ramps`: AveragedWeights' `ramps`; not for a start from weights that the average is to stay near.
    `micro_batch_size`: samples of one process in memory at once, None all; it changes no number but by
    rounding. `phase_starts`: steps at which the data change, where the guard forgets earlier losses. `phase_losses`:
    (first step, loss) in their order, where a later loss replaces `loss`. `peak_tflops` of one device in the precision
    used, for `mfu`.
    """

    num_steps: int
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = None
    ema_ramps: bool = True
    max_minutes: float | None = None
    report_every_steps: int = 10
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    validate_every_steps: int | None = None
    micro_batch_size: int | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    phase_starts: tuple[int, ...] = ()
    phase_losses: tuple[tuple[int, LossConfig], ...] = ()
    peak_tflops: float | None = None

    def step_config(self, step: int) -> StepConfig:
        """What a step computes."""
        loss = next((loss for start, loss in reversed(self.phase_losses) if start <= step), self.loss)
        return StepConfig(loss, self.precision, self.seed, self.micro_batch_size)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, seconds of training over all restarts, why it stopped early, if it did, and
    what the guard has seen."""

    step: int = 0
    elapsed_s: float = 0.0
    stopped: str = ""
    guard: GuardState = field(default_factory=GuardState)

    def __post_init__(self) -> None:
        if isinstance(self.guard, Mapping):  # as JSON gives it back
            object.__setattr__(self, "guard", GuardState(**self.guard))


# What a checkpoint gives back: the tensors of `full_state` and where the run stood.
Resume = tuple[Mapping[str, Tensor], Progress]


@dataclass(frozen=True)
class Hooks:
    """What the loop calls: `report(metrics, step)`, `save(tensors, progress)`, `validate() -> metrics`.

    `auxiliary_loss(model, step) -> (loss, detached parts)` is added to MaMMUT's loss (self-training's patch loss);
    it runs the module itself, so it is only for engines that keep it whole. `frozen_parts(step)` names the parts of the
    model (freezing.py) that the step leaves as they are. `wants_checkpoint()` is asked every
    second, after a step, whether one has to be saved at once: by the first process's clock, so that all processes ask
    equally often.

    Each is called on every process (state, validation and that question are collective); write on rank 0 only.
    """

    report: Callable[[dict[str, float], int], None]
    save: Callable[[dict[str, Tensor], Progress], None]
    validate: Callable[[], dict[str, float]] | None = None
    auxiliary_loss: AuxiliaryLoss | None = None
    frozen_parts: Callable[[int], Collection[str]] | None = None
    wants_checkpoint: Callable[[], bool] | None = None


def fit(
    engine: Engine,
    batches: Callable[[int, int], Generator[Batch]],
    learning_rate: Callable[[int], float],
    config: LoopConfig,
    hooks: Hooks,
    resume: Resume | None = None,
) -> Progress:
    """Train from step 0, or from where `resume` (what `hooks.save` got) left off, to `config.num_steps`.

    `batches(start, end)` yields this process's batches of those steps. Saves at the end as well. What is resumed from
    is let go as soon as it is loaded: it takes no host memory if the caller keeps no reference.

    A validation's row has its `validate_s`; `save_s` is what saving has taken since the last report, and stands in the
    next one. The pace counts neither.

    Raises:
        TrainingDivergedError: more steps in a row than `config.guard` lets pass had to be skipped.
        DamagedDataError: more pictures than `config.guard` lets pass could not be decoded.
        ValueError: an auxiliary loss on an engine that shards the weights, or with micro-batches.
    """
    _check_engine(engine, hooks)
    averaged = AveragedWeights(engine.shards(), config.ema_decay, ramps=config.ema_ramps) if config.ema_decay else None
    progress, resume = _restore(engine, averaged, resume) if resume else Progress(), None
    world_size = engine.gather.world_size if engine.gather else 1
    devices = Devices(world_size, engine.device, config.peak_tflops)
    started = time.perf_counter() - progress.elapsed_s
    last_save_s, last_asked_s, window = progress.elapsed_s, progress.elapsed_s, Window()
    frozen: Collection[str] = ()
    with closing(batches(progress.step, config.num_steps)) as stream:
        while progress.step < config.num_steps and not progress.stopped:
            waiting_since = time.perf_counter()
            batch = next(stream)
            data_wait_s = time.perf_counter() - waiting_since
            frozen = _freeze(engine, hooks, progress.step, frozen)
            elapsed_s = time.perf_counter() - started
            votes = _votes(config, hooks, (elapsed_s, elapsed_s - last_save_s, elapsed_s - last_asked_s), engine)
            rate = learning_rate(progress.step)
            outcome = _take_step(engine, batch, progress, Plan(config, hooks.auxiliary_loss, rate, votes))
            if averaged and outcome.values:
                averaged.update(engine.shards(), progress.step - outcome.guard.skipped_steps)
            window.add(outcome.values, len(batch.sample_ids) * world_size, data_wait_s, batch.images_BHWC.shape[1])
            progress = _advance(progress, time.perf_counter() - started, config, outcome)
            is_last = progress.step == config.num_steps or bool(progress.stopped)
            last_asked_s = progress.elapsed_s if outcome.votes.asks else last_asked_s
            saves = _is_wanted(hooks, outcome.votes) or outcome.votes.saves or is_last
            saves = saves or _is_due(progress.step, config.checkpoint_every_steps)
            if is_last or progress.step % config.report_every_steps == 0:
                counted = {"learning_rate": rate} | progress.guard.counts
                hooks.report(window.metrics(engine.model.config, devices) | counted, progress.step)
                window = Window()
            if hooks.validate and (is_last or _is_due(progress.step, config.validate_every_steps)):
                with window.aside() as spent:
                    held_out = hooks.validate()
                hooks.report(held_out | {"validate_s": spent.seconds}, progress.step)
            if saves:
                with window.aside() as spent:
                    hooks.save(full_state(engine, averaged), progress)
                window.save_s += spent.seconds
                last_save_s = progress.elapsed_s
    return progress


class Votes(NamedTuple):
    """What the clock says is due after a step: to stop, to save, to ask whether a checkpoint is wanted."""

    stops: bool = False
    saves: bool = False
    asks: bool = False


class Plan(NamedTuple):
    """How a step is taken, and this process's votes."""

    config: LoopConfig
    auxiliary_loss: AuxiliaryLoss | None
    learning_rate: float
    votes: Votes


class Outcome(NamedTuple):
    """What all processes know of a step: its values (none if it was skipped), the guard's state, what is due."""

    values: dict[str, float]
    guard: GuardState
    votes: Votes


def _take_step(engine: Engine, batch: Batch, progress: Progress, plan: Plan) -> Outcome:
    """Forward, then backward and update unless the guard objects: to the loss before, to the gradient's norm after."""
    config, seen = plan.config, progress.guard
    if progress.step in config.phase_starts:
        seen = guard.in_new_phase(seen)
    prepared = prepare_step(engine, batch, progress.step, config.step_config(progress.step), plan.auxiliary_loss)
    read = {"undecodable": torch.tensor(float(batch.undecodable), device=engine.device)}
    values, votes = _agree(engine, prepared.parts | read, plan.votes)
    world_size = engine.gather.world_size if engine.gather else 1
    num_drawn = (progress.step + 1) * len(batch.sample_ids) * world_size
    seen = guard.after_reading(seen, values.pop("undecodable") * world_size, num_drawn, config.guard)
    objection = guard.loss_objection(values["loss"], seen, config.guard)
    if not objection:
        prepared.make_gradients()
        values["gradient_norm"] = engine.step(plan.learning_rate)
        objection = guard.norm_objection(values["gradient_norm"])
    if objection:
        seen = guard.after_skipped(seen)
        _check_patience(objection, seen, progress.step, plan)
        return Outcome({}, seen, votes)
    return Outcome(values, guard.after_accepted(seen, values["loss"], config.guard), votes)


def _check_engine(engine: Engine, hooks: Hooks) -> None:
    if hooks.auxiliary_loss and not engine.keeps_model_whole:
        name = type(engine).__name__
        raise ValueError(f"an auxiliary loss runs the module itself, which {name} shards: use PlainEngine")


def full_state(engine: Engine, averaged: AveragedWeights | None) -> dict[str, Tensor]:
    """Weights, moments and moving average, whole and by name: what a checkpoint holds beside the progress."""
    extra = {EMA + name: value for name, value in engine.gathered(averaged.tensors).items()} if averaged else {}
    return engine.state() | extra


def _restore(engine: Engine, averaged: AveragedWeights | None, resume: Resume) -> Progress:
    tensors, progress = resume
    engine.load_state(tensors)
    if averaged:
        averaged.load(engine.cut({name.removeprefix(EMA): tensors[name] for name in tensors if name.startswith(EMA)}))
    return progress


def _freeze(engine: Engine, hooks: Hooks, step: int, frozen: Collection[str]) -> Collection[str]:
    """Tell the engine which parts are frozen where that changes; returns them."""
    wanted = hooks.frozen_parts(step) if hooks.frozen_parts else ()
    if set(wanted) != set(frozen):
        engine.freeze(wanted)
    return wanted


def _advance(progress: Progress, elapsed_s: float, config: LoopConfig, outcome: Outcome) -> Progress:
    step = progress.step + 1
    early = outcome.votes.stops and step < config.num_steps
    stopped = f"max_minutes {config.max_minutes} reached after step {step}" if early else ""
    return Progress(step, elapsed_s, stopped, outcome.guard)


def _votes(config: LoopConfig, hooks: Hooks, elapsed_s: tuple[float, float, float], engine: Engine) -> Votes:
    """As the first process's clock sees it: seconds of the run, since it saved and since it asked. Others abstain."""
    if engine.gather is not None and engine.gather.rank != 0:
        return Votes()
    asks = None if hooks.wants_checkpoint is None else ASK_EVERY_SECONDS / 60
    limits = zip((config.max_minutes, config.checkpoint_every_minutes, asks), elapsed_s, strict=True)
    return Votes(*(minutes is not None and seconds >= minutes * 60 for minutes, seconds in limits))


def _is_wanted(hooks: Hooks, votes: Votes) -> bool:
    return votes.asks and hooks.wants_checkpoint is not None and hooks.wants_checkpoint()


def _agree(engine: Engine, parts: dict[str, Tensor], votes: Votes) -> tuple[dict[str, float], Votes]:
    """Means of the parts over processes and the votes of any of them, in one collective call."""
    values = [part.double() for part in parts.values()]
    values += [torch.tensor(float(vote), dtype=torch.float64, device=engine.device) for vote in votes]
    agreed = mean_over_processes(torch.stack(values), engine.gather).tolist()
    means = dict(zip(parts, agreed[: len(parts)], strict=True))
    return means, Votes(*(vote > 0 for vote in agreed[len(parts) :]))


def _check_patience(objection: str, seen: GuardState, step: int, plan: Plan) -> None:
    patience = plan.config.guard.max_skipped_steps
    if seen.skipped_in_row <= patience:
        return
    skipped = f"; the {patience} steps before it were skipped for the like" if patience else ""
    raise TrainingDivergedError(
        f"{objection} at step {step} (learning rate {plan.learning_rate:.2e}){skipped}; the weights of the last "
        "checkpoint are still good. Lower the learning rate, lengthen the warm-up or use float32"
    )


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
