"""bfloat16 under every engine: the forward runs in it, gradients and what crosses the network stay float32.

Two processes each, against plain bfloat16 training. The machines that we train on answer a question that DeepSpeed asks
(is torch.autocast on, without a device) for CUDA; here, where it would always hear no, it is answered for the CPU.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rsplatform.train.batch import Batch
from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, forward_micro_batch, prepare_step
from rsplatform.train.validate import validation_losses
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_training import BATCH_SIZE, tiny_loader, tiny_model

NUM_STEPS, WORLD_SIZE = 3, 2
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)
KINDS = ("plain", "fsdp", "zero0", "zero1", "zero2", "zero3")
BFLOAT16 = StepConfig(precision="bfloat16")


class FloatsSent(TorchDispatchMode):
    """The floating-point types of what the processes send each other."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.dtypes |= {tensor.dtype for tensor in _tensors(args) if tensor.is_floating_point()}
        return func(*args, **(kwargs or {}))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def make_engine(kind: str) -> Engine:
    if kind == "plain":
        return PlainEngine(tiny_model(), OPTIMIZER, gather_of_default_group())
    if kind == "fsdp":
        return FsdpEngine(tiny_model(), OPTIMIZER)
    rows = BATCH_SIZE // WORLD_SIZE
    return DeepSpeedEngine(
        tiny_model(), OPTIMIZER, batch_size=rows, zero_stage=int(kind[-1]), precision=BFLOAT16.precision
    )


def batches() -> list[Batch]:
    return list(tiny_loader(Share(dist.get_rank(), WORLD_SIZE)).batches(0, NUM_STEPS))


def train(kind: str, config: StepConfig = BFLOAT16) -> dict[str, Tensor]:
    """The state after a few steps, and under "losses" and "held_out" what they told."""
    engine, losses = make_engine(kind), []
    for step, batch in enumerate(batches()):
        with FloatsSent() as sent:
            prepared = prepare_step(engine, batch, step, config)
            prepared.make_gradients()
            engine.step(1e-3)
        # stage 3 adds up the gradient's norm in float64
        assert torch.float32 in sent.dtypes <= {torch.float32, torch.float64}, f"{kind}: {sent.dtypes}"
        losses.append(prepared.parts["loss"].double())
    held_out = validation_losses(engine, tiny_loader().batches, 2, config)
    tensors = {name: value.clone() for name, value in engine.state().items()}
    assert {value.dtype for value in tensors.values()} == {torch.float32}, kind
    return tensors | {"losses": torch.stack(losses), "held_out": torch.tensor(held_out["val_loss"])}


def hidden_dtypes(kind: str) -> set[torch.dtype]:
    """Of what the decoder reads of the pictures, a matrix product's output, while training and in a validation."""
    engine, batch = make_engine(kind), batches()[0]
    dtypes: set[torch.dtype] = set()
    engine.model.image_to_text.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    forward_micro_batch(engine, batch, 0, BFLOAT16)
    engine.model.eval()
    with torch.no_grad():
        forward_micro_batch(engine, batch, 0, BFLOAT16)
    return dtypes


def train_all() -> dict[str, Tensor]:
    """All engines in one set of processes: importing DeepSpeed costs more than the training."""
    for kind in KINDS:
        assert hidden_dtypes(kind) == {torch.bfloat16}, kind
    is_enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type="cpu": is_enabled(device_type)
    for kind in KINDS:
        assert hidden_dtypes(kind) == {torch.bfloat16}, f"{kind}, asked without a device"
    with pytest.raises(ValueError, match="made for bfloat16"):
        forward_micro_batch(make_engine("zero1"), batches()[0], 0, StepConfig())
    results = {kind: train(kind) for kind in KINDS} | {"float32": train("plain", StepConfig())}
    return {f"{kind}|{name}": value for kind, state in results.items() for name, value in state.items()}


def test_every_engine_trains_in_bfloat16_as_the_plain_one_does(tmp_path: Path) -> None:
    for tensors in run_processes(WORLD_SIZE, tmp_path, train_all):
        # the losses before the first update: the same weights, rounded alike
        first = {kind: tensors[f"{kind}|losses"][0].item() for kind in (*KINDS, "float32")}
        assert abs(first["float32"] - first["plain"]) > 1e-4
        for kind in KINDS:
            assert first[kind] == pytest.approx(first["plain"], abs=1e-6)
        for key, actual in tensors.items():
            kind, name = key.split("|")
            if kind != "float32":
                torch.testing.assert_close(
                    actual,
                    tensors[f"plain|{name}"],
                    atol=2e-3,
                    rtol=2e-2,
                    msg=lambda text, key=key: f"{key}: {text}",
                )
