"""Parity: the same losses and weights on one process, on two, and under every ZeRO stage; checkpoints cross over."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.model.losses import LossConfig
from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import PlainEngine, gather_of_default_group
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import Hooks, LoopConfig, fit
from tests.unit.train.process_group import run_processes
from tests.unit.train.tiny_training import tiny_loader, tiny_model

NUM_STEPS, BATCH_SIZE = 4, 8
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)


def make_engine(kind: str):
    if kind == "plain":
        return PlainEngine(tiny_model(), OPTIMIZER, gather_of_default_group())
    world_size = dist.get_world_size()
    return DeepSpeedEngine(tiny_model(), OPTIMIZER, batch_size=BATCH_SIZE // world_size, zero_stage=int(kind[-1]))


def train(kind: str, loss: LossConfig, kind_after: str | None = None) -> dict[str, torch.Tensor]:
    """A few steps; with `kind_after`, the second half under another engine that got the first one's state."""
    share = Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
    losses, saved = {}, []

    def report(metrics: dict[str, float], step: int) -> None:
        losses[step] = [metrics["loss"], metrics["contrastive"], metrics["caption"], metrics["gradient_norm"]]

    def save(tensors: dict[str, torch.Tensor], progress) -> None:
        saved[:] = [({name: value.detach().clone() for name, value in tensors.items()}, progress)]

    hooks = Hooks(report, save)
    halves = [kind, kind_after] if kind_after else [kind]
    for half, name in enumerate(halves, 1):
        config = LoopConfig(NUM_STEPS * half // len(halves), seed=3, loss=loss, report_every_steps=1)
        fit(make_engine(name), tiny_loader(share).batches, lambda step: 1e-3, config, hooks, *saved)
    return saved[0][0] | {"losses": torch.tensor([losses[step] for step in sorted(losses)])}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def single() -> dict[str, torch.Tensor]:
    return train("plain", LossConfig())


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig("focal_sigmoid", caption_weight=2.0)])
def test_two_plain_processes_equal_one(tmp_path: Path, loss: LossConfig) -> None:
    first, second = run_processes(2, tmp_path, train, "plain", loss)
    assert_same(second, first, 0.0)
    assert_same(first, train("plain", loss), 1e-5)


def every_stage(world: int) -> dict[str, torch.Tensor]:
    """All stages in one pair of processes: importing DeepSpeed costs more than the training."""
    results = {}
    for kind in ("zero0", "zero1", "zero2", "zero3"):
        results |= {f"{kind}|{name}": value for name, value in train(kind, LossConfig()).items()}
    for pair in (("zero1", "plain"), ("plain", "zero1"), ("zero2", "zero3"), ("zero3", "zero2"), ("zero0", "zero0")):
        results |= {f"{'>'.join(pair)}|{name}": v for name, v in train(pair[0], LossConfig(), pair[1]).items()}
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_equals_the_plain_engine(tmp_path: Path, single, world_size: int) -> None:
    ranks = run_processes(world_size, tmp_path, every_stage, world_size)
    for tensors in ranks:
        for kind in sorted({name.split("|")[0] for name in tensors}):
            own = {name.split("|")[1]: value for name, value in tensors.items() if name.startswith(f"{kind}|")}
            assert_same(own, single, 1e-5)


def test_deepspeed_without_a_process_group_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        DeepSpeedEngine(tiny_model(), OPTIMIZER, batch_size=8, zero_stage=1)
