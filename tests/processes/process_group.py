"""Runs one function on several CPU processes that share a gloo group, as Ray Train's workers do."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn


def run_processes(world_size: int, folder: Path, function: Callable[..., dict[str, torch.Tensor]], *arguments):
    """`function(*arguments)` on every process; the tensors that each returned, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_one_process, (world_size, folder, function, arguments), nprocs=world_size)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world_size)]


def _one_process(rank: int, world_size: int, folder: Path, function, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        tensors = {name: value.detach().clone().contiguous() for name, value in function(*arguments).items()}
        save_file(tensors, folder / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()
