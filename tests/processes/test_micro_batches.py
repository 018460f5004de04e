"""Micro-batches of any size take the step of the whole batch: losses, every gradient, weights and moments.

The gradients are compared by their norm and by the first moments, which are sums of clipped gradients.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import Mammut
from rsplatform.train.batch import Batch
from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, prepare_step
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_training import tiny_model

NUM_STEPS, BATCH_SIZE = 2, 12
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)
LOSSES = {
    "softmax": LossConfig(),
    "focal": LossConfig("focal_sigmoid", caption_weight=2.0),
    "sigmoid": LossConfig("sigmoid", z_loss_weight=1e-2),
}
# A process has 6 or 12 samples: the last piece is smaller, or not. ZeRO's stages differ in no loss
SIZES = (("softmax", 1), ("softmax", 4))
CASES = dict.fromkeys(("zero0", "zero1", "zero2"), SIZES)
CASES |= dict.fromkeys(("plain", "fsdp", "zero3"), (*SIZES, ("focal", 4), ("sigmoid", 4)))
KINDS = {1: ("plain", "fsdp", "zero0", "zero3"), 2: ("plain", "fsdp", "zero0", "zero1", "zero2", "zero3")}
# Left as they are by the first step and trained by the second
FROZEN = ("vision", "logit_scale")
FROZEN_KINDS = {1: (), 2: ("fsdp", "zero2", "zero3")}
State = dict[str, torch.Tensor]


def make_model(dtype: torch.dtype, loss: LossConfig) -> Mammut:
    """With a logit scale above its clamp, where only gradients that lead down pass (SigLIP's stays below), and with
    patches and positions drawn at random."""
    drawn = {"patch_dropout": 0.25, "cropped_positions": True}
    model = tiny_model(vision_pooling="map", logit_bias=loss.contrastive == "sigmoid", **drawn).to(dtype)
    with torch.no_grad():
        model.log_logit_scale.add_(2.0)
    # the loop's pixels are float32
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype), *inputs[1:]))
    return model


def make_engine(kind: str, loss: LossConfig, freezable: tuple[str, ...] = ()) -> Engine:
    model = make_model(torch.float32 if kind.startswith("zero") else torch.float64, loss)
    if kind == "plain":
        return PlainEngine(model, OPTIMIZER, gather_of_default_group())
    if kind == "fsdp":
        return FsdpEngine(model, OPTIMIZER)
    rows = BATCH_SIZE // dist.get_world_size()
    return DeepSpeedEngine(model, OPTIMIZER, batch_size=rows, zero_stage=int(kind[-1]), freezable=freezable)


def own_batch(step: int) -> Batch:
    """This process's rows of the step's batch; texts differ in length, and two are the same."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(3, 300, (BATCH_SIZE, 14), generator=generator)
    for row in range(BATCH_SIZE):
        tokens_BT[row, 3 + row :] = 0
    tokens_BT[7] = tokens_BT[1]
    images_BHWC = torch.randint(0, 256, (BATCH_SIZE, 16, 16, 3), dtype=torch.uint8, generator=generator)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    places_B = torch.arange(rank, BATCH_SIZE, world_size)
    return Batch(images_BHWC[places_B], tokens_BT[places_B], tuple(map(str, places_B.tolist())), places_B)


def train(kind: str, loss: LossConfig, micro_batch_size: int | None, frozen: tuple[str, ...] = ()) -> State:
    """The state after a few steps, and under "rows" what each step gave, over all processes; `frozen` in the first."""
    engine, rows = make_engine(kind, loss, frozen), []
    config = StepConfig(loss, seed=3, micro_batch_size=micro_batch_size)
    for step in range(NUM_STEPS):
        engine.freeze(() if step else frozen)
        prepared = prepare_step(engine, own_batch(step), step, config)
        values_K = torch.stack([part.double() for part in prepared.parts.values()])
        if engine.gather is not None:
            values_K = engine.gather.total(values_K) / engine.gather.world_size
        prepared.make_gradients()
        norm = torch.tensor([engine.step(1e-3)], dtype=torch.float64)
        rows.append(torch.cat([values_K, norm]))
    return {name: value.clone() for name, value in engine.state().items()} | {"rows": torch.stack(rows)}


class Reductions(TorchDispatchMode):
    """Counts the calls that add up tensors of several processes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d" and "reduce" in func.__name__
        return func(*args, **(kwargs or {}))


def num_reductions(kind: str, micro_batch_size: int) -> int:
    """How often the gradients of one step cross the network."""
    engine = make_engine(kind, LossConfig())
    prepared = prepare_step(engine, own_batch(0), 0, StepConfig(micro_batch_size=micro_batch_size))
    with Reductions() as reductions:
        prepared.make_gradients()
        engine.step(1e-3)
    return reductions.count


def train_all(world_size: int) -> State:
    """All cases of one world size in one set of processes: importing DeepSpeed costs more than the training."""
    results = {
        f"{kind}|{name}|{size}": train(kind, LOSSES[name], size)
        for kind in KINDS[world_size]
        for name, size in CASES[kind]
    }
    results |= {f"{kind}|frozen|4": train(kind, LossConfig(), 4, FROZEN) for kind in FROZEN_KINDS[world_size]}
    for kind in KINDS[world_size] if world_size > 1 else ():
        assert num_reductions(kind, 1) == num_reductions(kind, 3) > 0, kind
    return {f"{case}|{name}": value for case, state in results.items() for name, value in state.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_take_the_step_of_the_whole_batch(tmp_path: Path, world_size: int) -> None:
    whole = {name: train("plain", loss, None) for name, loss in LOSSES.items()}
    num_tensors = sum(len(whole[name]) for kind in KINDS[world_size] for name, _ in CASES[kind])
    whole["frozen"] = train("plain", LossConfig(), None, FROZEN)
    for tensors in run_processes(world_size, tmp_path, train_all, world_size):
        assert len(tensors) == num_tensors + len(FROZEN_KINDS[world_size]) * len(whole["frozen"])
        for key, actual in tensors.items():
            kind, loss, _, name = key.split("|")
            tolerance = 1e-5 if kind.startswith("zero") else 1e-10
            torch.testing.assert_close(
                actual.double(),
                whole[loss][name].double(),
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, key=key: f"{key}: {text}",
            )
