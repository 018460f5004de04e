"""What the traffic model says against what real steps on two processes do: the calls' sizes and the sockets' bytes."""

from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, prepare_step
from rsplatform.train.traffic import (
    Layout,
    TrafficEngine,
    contrastive_transfers,
    model_numbers,
    sent_bytes,
    weight_transfers,
)
from tests.processes.process_group import run_processes
from tests.processes.test_micro_batches import BATCH_SIZE, own_batch
from tests.unit.train.tiny_training import tiny_model

WORLD_SIZE = 2
KINDS = {"allgather": "all_gather", "_reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}
Kind = Literal["adamw", "muon"]
CASES: tuple[tuple[TrafficEngine, int | None, Kind], ...] = (
    ("plain", None, "adamw"),
    ("plain", 3, "muon"),
    ("fsdp", None, "adamw"),
    ("fsdp", 3, "adamw"),
    ("fsdp", None, "muon"),
)
PROCESS_COUNTERS = Path("/proc/self/io")


class WholeBytes(TorchDispatchMode):
    """Bytes of the whole (gathered, to be scattered or to be added up) tensors of each kind of collective call."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = next(
                kind for word, kind in KINDS.items() if word in func.__name__.replace("_allgather", "allgather")
            )
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # allgather_ names each process's piece and then the own one again; the others name whole and shard
            pieces = WORLD_SIZE if func.__name__.startswith("allgather_") else 1
            self.by_kind[kind] += max(sizes) * pieces
        if func.namespace == "_c10d_functional" and "all_gather_into_tensor" in func.__name__:  # given the shard alone
            self.by_kind["all_gather"] += args[0].numel() * args[0].element_size() * WORLD_SIZE
        return func(*args, **(kwargs or {}))


def written_bytes() -> int:
    """Bytes that this process has written so far, to sockets too (Linux)."""
    fields = dict(line.split(": ") for line in PROCESS_COUNTERS.read_text().splitlines())
    return int(fields["wchar"])


def one_step(kind: TrafficEngine, micro_batch_size: int | None, optimizer_kind: Kind) -> dict[str, torch.Tensor]:
    """What a step that is not the first moves: by kind of call, and on the sockets."""
    gather, optimizer = gather_of_default_group(), OptimizerConfig(optimizer_kind)
    model = tiny_model(vision_pooling="map")
    engine: Engine = FsdpEngine(model, optimizer) if kind == "fsdp" else PlainEngine(model, optimizer, gather)
    config = StepConfig(micro_batch_size=micro_batch_size)
    for step in range(2):
        dist.barrier()
        before, calls = written_bytes(), WholeBytes()
        with calls:
            prepare_step(engine, own_batch(step), step, config).make_gradients()
            engine.step(1e-3)
        written = written_bytes() - before
    counted = {kind: torch.tensor(float(value)) for kind, value in calls.by_kind.items()}
    return counted | {"written": torch.tensor(float(written))}


def all_cases() -> dict[str, torch.Tensor]:
    """Every case in one set of processes."""
    results = {case: one_step(*case) for case in CASES}
    return {f"{case}|{name}": value for case, found in results.items() for name, value in found.items()}


@pytest.mark.skipif(not PROCESS_COUNTERS.exists(), reason="the bytes on the sockets are counted by Linux")
def test_the_traffic_of_real_steps_is_that_of_the_model(tmp_path: Path) -> None:
    (found, _) = run_processes(WORLD_SIZE, tmp_path, all_cases)
    numbers, batch_size = model_numbers(tiny_model(vision_pooling="map").config), BATCH_SIZE // WORLD_SIZE
    for case in CASES:
        kind, size, optimizer_kind = case
        num_pieces = 1 if size is None else batch_size // size
        layout = Layout(kind, WORLD_SIZE, optimizer=optimizer_kind)
        transfers = weight_transfers(layout, numbers, num_pieces)
        transfers += contrastive_transfers(WORLD_SIZE, batch_size, numbers.embedding_width)
        wanted: dict[str, float] = dict.fromkeys((transfer.kind for transfer in transfers), 0.0)
        for transfer in transfers:
            wanted[transfer.kind] += transfer.whole_bytes
        counted = {name: float(found[f"{case}|{name}"]) for name in wanted}
        assert counted == pytest.approx(wanted, rel=0.01), case
        # gloo's reduce_scatter is an all_reduce of which each process keeps its part: twice the bytes of a ring's
        twice = sum(transfer.sent_bytes for transfer in transfers if transfer.kind == "reduce_scatter")
        written = float(found[f"{case}|written"])
        assert written == pytest.approx(sent_bytes(transfers) + twice, rel=0.04), case
