"""Parity of DeepSpeed in float32: the same losses, gradients, weights and moving average on one, two and four processes
and under every ZeRO stage as of one plain process; checkpoints cross over. (Plain processes and FSDP2 in float64:
test_fsdp.py.)
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.model.losses import LossConfig
from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import FIRST_MOMENT, PlainEngine, gather_of_default_group
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import Hooks, LoopConfig, fit
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_training import tiny_loader, tiny_model

NUM_STEPS, BATCH_SIZE = 4, 8
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)


def make_engine(kind: str, loss: LossConfig):
    """Draws at random for each sample. Beside the sigmoid loss, a model that is told its pictures' scale: every option
    that adds a parameter."""
    is_sigmoid = loss.contrastive == "sigmoid"
    drawn = {"patch_dropout": 0.25, "cropped_positions": True}
    model = tiny_model(logit_bias=is_sigmoid, ground_sample_distance_encoding=is_sigmoid, **drawn)
    if kind == "plain":
        return PlainEngine(model, OPTIMIZER, gather_of_default_group())
    world_size = dist.get_world_size()
    return DeepSpeedEngine(model, OPTIMIZER, batch_size=BATCH_SIZE // world_size, zero_stage=int(kind[-1]))


def train(kind: str, loss: LossConfig, kind_after: str | None = None) -> dict[str, torch.Tensor]:
    """A few steps; with `kind_after`, the second half under another engine that got the first one's state.

    Under "gradient/" each parameter's gradient in the first step, clipped: its first moment after it, by 1 - beta1.
    """
    share = Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
    losses, saved, gradients = {}, [], {}

    def report(metrics: dict[str, float], step: int) -> None:
        losses[step] = [metrics["loss"], metrics["contrastive"], metrics["caption"], metrics["gradient_norm"]]

    def save(tensors: dict[str, torch.Tensor], progress) -> None:
        saved[:] = [({name: value.detach().clone() for name, value in tensors.items()}, progress)]
        if progress.step == 1:
            moments = {name: value for name, value in saved[0][0].items() if name.startswith(FIRST_MOMENT)}
            gradients.update({f"gradient/{name}": value / (1 - OPTIMIZER.betas[0]) for name, value in moments.items()})

    hooks = Hooks(report, save)
    halves = [kind, kind_after] if kind_after else [kind]
    for half, name in enumerate(halves, 1):
        num_steps = NUM_STEPS * half // len(halves)
        config = LoopConfig(num_steps, 3, loss, ema_decay=0.8, report_every_steps=1, checkpoint_every_steps=1)
        fit(make_engine(name, loss), tiny_loader(share).batches, lambda step: 1e-3, config, hooks, *saved)
    return saved[0][0] | gradients | {"losses": torch.tensor([losses[step] for step in sorted(losses)])}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


LOSSES = {
    "softmax": LossConfig(),
    "focal": LossConfig("focal_sigmoid", caption_weight=2.0),
    "sigmoid": LossConfig("sigmoid", z_loss_weight=1e-2),
}
CROSSINGS = (("zero1", "plain"), ("plain", "zero1"), ("zero2", "zero3"), ("zero3", "zero2"), ("zero0", "zero0"))


def train_all(kinds: tuple[str, ...], crossings: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """All in one set of processes: importing DeepSpeed costs more than the training."""
    results = {f"plain, {name}": train("plain", loss) for name, loss in LOSSES.items()}
    results |= {f"{kind}, {name}": train(kind, loss) for kind in kinds for name, loss in LOSSES.items()}
    results |= {f"{first} then {second}": train(first, LossConfig(), second) for first, second in crossings}
    return {f"{case}|{name}": value for case, tensors in results.items() for name, value in tensors.items()}


def cases_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        case, name = key.split("|")
        cases.setdefault(case, {})[name] = value
    return cases


@pytest.mark.parametrize(("world_size", "crossings"), [(1, ()), (2, CROSSINGS), (4, ())])
def test_every_engine_and_world_size_trains_the_same_model(tmp_path: Path, world_size: int, crossings) -> None:
    single = {name: train("plain", loss) for name, loss in LOSSES.items()}
    ranks = run_processes(world_size, tmp_path, train_all, ("zero0", "zero1", "zero2", "zero3"), crossings)
    for tensors in ranks:
        cases = cases_of(tensors)
        assert len(cases) == 5 * len(LOSSES) + len(crossings)
        for case, actual in cases.items():
            name = case.partition(", ")[2]
            assert_same(actual, single[name or "softmax"], 1e-5)


def test_deepspeed_without_a_process_group_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        DeepSpeedEngine(tiny_model(), OPTIMIZER, batch_size=8, zero_stage=1)
