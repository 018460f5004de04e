"""What every engine does alike beside a plain step: rates by layer, recomputed blocks, steps that the guard skips.

The same few steps, one of them with a gradient that is not finite on one process only, under every engine with
recomputed blocks (FSDP2's traced by torch.compile as well), against one plain process that keeps everything. And
steps skipped for their loss, after a forward pass with a graph that nothing runs back: bitwise no trace of them.
"""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsplatform.model.mammut import Mammut, MammutOutput
from rsplatform.train.batch import Batch
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.guard import GuardConfig
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import Hooks, LoopConfig, Progress, fit
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_training import BATCH_SIZE, tiny_loader, tiny_model

NUM_STEPS, BAD_STEP, WORLD_SIZE = 3, 1, 2
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5, layer_decay=0.5)
KINDS = ("plain", "fsdp", "zero0", "zero1", "zero2", "zero3")
# Every kind of forward pass: one process's own weights, FSDP2's shards, ZeRO-3's; by step, what multiplies the loss
LOSS_KINDS, BAD_LOSSES, NUM_LOSS_STEPS = ("plain", "fsdp", "zero3"), {2: 1e4, 3: torch.nan}, 6
State = dict[str, Tensor]


def make_model(dtype: torch.dtype, *, draws: bool = True) -> Mammut:
    model = (tiny_model(patch_dropout=0.25, cropped_positions=True) if draws else tiny_model()).to(dtype)
    # the loop's pixels are float32
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype), *inputs[1:]))
    return model


def make_engine(kind: str, *, recomputes: bool, draws: bool = True) -> Engine:
    model = make_model(torch.float32 if kind.startswith("zero") else torch.float64, draws=draws)
    if recomputes:
        prepare_blocks(model, BlockConfig(1, compile_blocks=kind == "fsdp", compile_backend="eager"))
    if kind == "plain":
        return PlainEngine(model, OPTIMIZER, gather_of_default_group())
    if kind == "fsdp":
        return FsdpEngine(model, OPTIMIZER)
    return DeepSpeedEngine(model, OPTIMIZER, batch_size=BATCH_SIZE // WORLD_SIZE, zero_stage=int(kind[-1]))


def train(kind: str, *, recomputes: bool) -> State:
    """The last state, and under "rows" the losses, norms and skipped steps of each step."""
    engine, rows, saved = make_engine(kind, recomputes=recomputes), [], {}
    backward, steps = engine.backward, []

    def poisoned_backward(loss: Tensor, *, is_last: bool = True) -> None:
        is_first = engine.gather is None or engine.gather.rank == 0
        backward(loss * (torch.nan if is_first and len(steps) == BAD_STEP else 1.0), is_last=is_last)
        steps.append(loss)

    def report(metrics: dict[str, float], step: int) -> None:
        values = [metrics.get(name, 0.0) for name in ("loss", "caption", "gradient_norm", "skipped_steps")]
        rows.append(torch.tensor(values, dtype=torch.float64))

    def save(tensors: State, progress: Progress) -> None:
        saved.update({name: value.clone() for name, value in tensors.items()})

    engine.backward = poisoned_backward
    share = Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
    config = LoopConfig(NUM_STEPS, report_every_steps=1, guard=GuardConfig(max_skipped_steps=1))
    fit(engine, tiny_loader(share).batches, lambda step: 1e-3, config, Hooks(report, save))
    return saved | {"rows": torch.stack(rows)}


def train_past_bad_losses(kind: str, steps: Collection[int], num_skipped: int) -> State:
    """The last state and the losses and norms of the steps taken, over the batches of `steps`; a batch of BAD_LOSSES
    has its bad loss on the first process only. Without draws, which follow the number of a step."""
    engine, rows, saved = make_engine(kind, recomputes=True, draws=False), [], {}
    share, current, skipped = Share(dist.get_rank(), dist.get_world_size()), [0], []
    forward = engine.forward

    def batches(start: int, end: int) -> Generator[Batch]:
        for step, batch in enumerate(tiny_loader(share).batches(0, NUM_LOSS_STEPS)):
            if step in steps:
                current[0] = step
                yield batch

    def poisoned_forward(*arguments: Any, **named: Any) -> MammutOutput:
        output = forward(*arguments, **named)
        assert output.caption_loss_sum.requires_grad
        factor = BAD_LOSSES.get(current[0], 1.0) if share.rank == 0 else 1.0
        return output._replace(caption_loss_sum=output.caption_loss_sum * factor)

    def report(metrics: dict[str, float], step: int) -> None:
        skipped.append(metrics["skipped_steps"])
        if "loss" in metrics:
            rows.append(torch.tensor([metrics["loss"], metrics["gradient_norm"]], dtype=torch.float64))

    def save(tensors: State, progress: Progress) -> None:
        saved.update({name: value.clone() for name, value in tensors.items()})

    engine.forward = poisoned_forward
    guard = GuardConfig(max_skipped_steps=len(BAD_LOSSES), spike_deviations=1000.0, window_steps=2)
    config = LoopConfig(len(steps), report_every_steps=1, guard=guard)
    fit(engine, batches, lambda step: 1e-3, config, Hooks(report, save))
    assert skipped[-1] == num_skipped, f"{kind}: {skipped}"
    return saved | {"rows": torch.stack(rows)}


def check_bad_losses_leave_no_trace() -> None:
    """The good steps around a spike and a loss that is not a number are those of a run without the two."""
    every = range(NUM_LOSS_STEPS)
    good = [step for step in every if step not in BAD_LOSSES]
    for kind in LOSS_KINDS:
        expected = train_past_bad_losses(kind, good, 0)
        found = train_past_bad_losses(kind, every, len(BAD_LOSSES))
        assert found.keys() == expected.keys(), kind
        differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not differing, f"{kind}: {differing[:5]}"


def train_all(kinds: tuple[str, ...]) -> State:
    """All engines in one set of processes: importing DeepSpeed costs more than the training."""
    check_bad_losses_leave_no_trace()
    return {f"{kind}|{name}": value for kind in kinds for name, value in train(kind, recomputes=True).items()}


def test_every_engine_decays_recomputes_and_skips_alike(tmp_path: Path) -> None:
    expected = train("plain", recomputes=False)
    assert expected["rows"][:, 3].tolist() == [0.0, 1.0, 1.0]
    assert expected["num_steps"] == NUM_STEPS - 1
    for tensors in run_processes(WORLD_SIZE, tmp_path, train_all, KINDS):
        assert len(tensors) == len(KINDS) * len(expected)
        for key, actual in tensors.items():
            kind, name = key.split("|")
            tolerance = 1e-5 if kind.startswith("zero") else 1e-10
            torch.testing.assert_close(
                actual.double(),
                expected[name].double(),
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, key=key: f"{key}: {text}",
            )
