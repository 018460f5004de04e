"""The training loop: batches in, an engine stepped, metrics and checkpoints out through callables.

Knows torch and our model, not Ray, MLflow, DeepSpeed or storage: it runs on a bare machine. A step is a pure
function of (state, seed, step), so N steps equal k steps, a crash and N - k steps, bitwise on CPU.
Shapes: B batch, C channels, H W pixels, T tokens, K values.
"""

import math
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine, mean_over_processes
from rsplatform.train.optimizer import AveragedWeights

EMA = "ema/"


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite; a restart would meet the same step again."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how; `max_minutes` counts over restarts and stops at the next step."""

    num_steps: int
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = None
    max_minutes: float | None = None
    report_every_steps: int = 10
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    validate_every_steps: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, seconds of training over all restarts, and why it stopped early, if it did."""

    step: int = 0
    elapsed_s: float = 0.0
    stopped: str = ""


# What a checkpoint gives back: the tensors of `full_state` and where the run stood.
Resume = tuple[Mapping[str, Tensor], Progress]


AuxiliaryLoss = Callable[[Mammut, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Hooks:
    """What the loop calls: `report(metrics, step)`, `save(tensors, progress)`, `validate() -> metrics`.

    `auxiliary_loss(model, step) -> (loss, detached parts)` is added to MaMMUT's loss (self-training's patch loss);
    it runs the module itself, so it is only for engines that keep it whole. `frozen_parts(step)` names the parts of the
    model (freezing.py) that the step leaves as they are.

    Each is called on every process (state and validation are collective); write on rank 0 only.
    """

    report: Callable[[dict[str, float], int], None]
    save: Callable[[dict[str, Tensor], Progress], None]
    validate: Callable[[], dict[str, float]] | None = None
    auxiliary_loss: AuxiliaryLoss | None = None
    frozen_parts: Callable[[int], Collection[str]] | None = None


@dataclass
class Window:
    """Sums since the last report."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    samples: int = 0
    data_wait_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, parts: dict[str, float], samples: int, data_wait_s: float) -> None:
        """Count one step."""
        self.steps += 1
        self.samples += samples
        self.data_wait_s += data_wait_s
        self.parts = {name: self.parts.get(name, 0.0) + value for name, value in parts.items()}

    def metrics(self) -> dict[str, float]:
        """Means per step, and the pace."""
        seconds = max(1e-9, time.perf_counter() - self.started)
        means = {name: value / self.steps for name, value in self.parts.items()}
        pace = {"samples_per_s": self.samples / seconds, "data_wait_fraction": self.data_wait_s / seconds}
        return means | pace


def fit(
    engine: Engine,
    batches: Callable[[int, int], Generator[Batch]],
    learning_rate: Callable[[int], float],
    config: LoopConfig,
    hooks: Hooks,
    resume: Resume | None = None,
) -> Progress:
    """Train from step 0, or from where `resume` (what `hooks.save` got) left off, to `config.num_steps`.

    `batches(start, end)` yields this process's batches of those steps. Saves at the end as well.

    Raises:
        TrainingDivergedError: the loss or the gradient norm is not finite.
        ValueError: an auxiliary loss or a moving average on an engine that shards the weights.
    """
    _check_engine(engine, config, hooks)
    averaged = AveragedWeights(engine.model, config.ema_decay) if config.ema_decay else None
    progress = _restore(engine, averaged, resume) if resume else Progress()
    world_size = engine.gather.world_size if engine.gather else 1
    started = time.perf_counter() - progress.elapsed_s
    last_save_s, window = progress.elapsed_s, Window()
    frozen: Collection[str] = ()
    with closing(batches(progress.step, config.num_steps)) as stream:
        while progress.step < config.num_steps and not progress.stopped:
            waiting_since = time.perf_counter()
            batch = next(stream)
            data_wait_s = time.perf_counter() - waiting_since
            rate = learning_rate(progress.step)
            frozen = _freeze(engine, hooks, progress.step, frozen)
            parts = forward_backward(engine, batch, progress.step, config, hooks.auxiliary_loss)
            elapsed_s = time.perf_counter() - started
            votes = _votes(config, elapsed_s, elapsed_s - last_save_s, engine)
            values, (stops, saves) = _agree(engine, parts, votes)
            _check_finite(values["loss"], "loss", progress.step, rate)
            values["gradient_norm"] = engine.step(rate)
            _check_finite(values["gradient_norm"], "gradient norm", progress.step, rate)
            if averaged:
                averaged.update(engine.model)
            window.add(values, len(batch.sample_ids) * world_size, data_wait_s)
            progress = _advance(progress, elapsed_s, config, stops)
            is_last = progress.step == config.num_steps or bool(progress.stopped)
            if is_last or progress.step % config.report_every_steps == 0:
                hooks.report({**window.metrics(), "learning_rate": rate}, progress.step)
                window = Window()
            if hooks.validate and (is_last or _is_due(progress.step, config.validate_every_steps)):
                hooks.report(hooks.validate(), progress.step)
            if is_last or saves or _is_due(progress.step, config.checkpoint_every_steps):
                hooks.save(full_state(engine, averaged), progress)
                last_save_s = elapsed_s
    return progress


def _check_engine(engine: Engine, config: LoopConfig, hooks: Hooks) -> None:
    if engine.keeps_model_whole:
        return
    name = type(engine).__name__
    if hooks.auxiliary_loss:
        raise ValueError(f"an auxiliary loss runs the module itself, which {name} shards: use PlainEngine")
    if config.ema_decay:
        raise ValueError(f"ema_decay averages whole weights, which {name} shards: use the plain engine or no EMA")


def full_state(engine: Engine, averaged: AveragedWeights | None) -> dict[str, Tensor]:
    """Weights, moments and moving average, by name: what a checkpoint holds beside the progress."""
    extra = {EMA + name: value for name, value in averaged.tensors.items()} if averaged else {}
    return engine.state() | extra


def _restore(engine: Engine, averaged: AveragedWeights | None, resume: Resume) -> Progress:
    tensors, progress = resume
    engine.load_state(tensors)
    if averaged:
        averaged.load({name.removeprefix(EMA): value for name, value in tensors.items() if name.startswith(EMA)})
    return progress


def _freeze(engine: Engine, hooks: Hooks, step: int, frozen: Collection[str]) -> Collection[str]:
    """Tell the engine which parts are frozen where that changes; returns them."""
    wanted = hooks.frozen_parts(step) if hooks.frozen_parts else ()
    if set(wanted) != set(frozen):
        engine.freeze(wanted)
    return wanted


def _advance(progress: Progress, elapsed_s: float, config: LoopConfig, stops: bool) -> Progress:
    step = progress.step + 1
    early = stops and step < config.num_steps
    stopped = f"max_minutes {config.max_minutes} reached after step {step}" if early else ""
    return Progress(step, elapsed_s, stopped)


def forward_backward(
    engine: Engine, batch: Batch, step: int, config: LoopConfig, auxiliary_loss: AuxiliaryLoss | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of one batch; returns the detached parts of the loss."""
    rank = engine.gather.rank if engine.gather else 0
    # counter-based: the state of every random draw in the model is (seed, step, rank), so nothing needs saving
    torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + rank)
    vision = engine.model.config.vision
    tokens_BT = batch.tokens_BT.to(engine.device)
    images_BCHW = normalise(batch.images_BHWC.to(engine.device), vision.pixel_mean, vision.pixel_std)
    is_bfloat16 = config.precision == "bfloat16"
    with torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
        output = engine.forward(images_BCHW, tokens_BT)
    loss, parts = mammut_loss(output, tokens_BT, config.loss, engine.gather)
    if auxiliary_loss:
        extra, extra_parts = auxiliary_loss(engine.model, step)
        loss, parts = loss + extra, parts | extra_parts | {"loss": (loss + extra).detach()}
    engine.backward(loss)
    return parts


def _votes(config: LoopConfig, elapsed_s: float, since_save_s: float, engine: Engine) -> list[bool]:
    """(stop now, save now) as the first process's clock sees it; the other processes abstain."""
    if engine.gather is not None and engine.gather.rank != 0:
        return [False, False]
    limits = ((config.max_minutes, elapsed_s), (config.checkpoint_every_minutes, since_save_s))
    return [minutes is not None and seconds >= minutes * 60 for minutes, seconds in limits]


def _agree(engine: Engine, parts: dict[str, Tensor], votes: list[bool]) -> tuple[dict[str, float], list[bool]]:
    """Means of the parts over processes and the votes of any of them, in one collective call."""
    values = [part.double() for part in parts.values()]
    values += [torch.tensor(float(vote), dtype=torch.float64, device=engine.device) for vote in votes]
    agreed = mean_over_processes(torch.stack(values), engine.gather).tolist()
    means = dict(zip(parts, agreed[: len(parts)], strict=True))
    return means, [vote > 0 for vote in agreed[len(parts) :]]


def _check_finite(value: float, name: str, step: int, learning_rate: float) -> None:
    if not math.isfinite(value):
        raise TrainingDivergedError(
            f"{name} is {value} at step {step} (learning rate {learning_rate:.2e}); the weights of the last "
            "checkpoint are still good. Lower the learning rate, lengthen the warm-up or use float32"
        )


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
