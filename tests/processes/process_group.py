"""Runs one function on several CPU processes that share a gloo group, as Ray Train's workers do.

The processes are forked in milliseconds from a server that has imported everything and runs nothing: importing torch
and DeepSpeed takes longer than most of what they do.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import start_processes

# pytest is the main module; the first optimizer imports torch._dynamo, and DeepSpeed's first one its own Muon with
# torch's whole compiler: either takes longer than most tests here
PRELOADED = (
    "pytest",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "rsplatform.train.fsdp",
    "tests.processes.killed_training",
)
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def start_server() -> ForkServerContext:
    """The server of this session, started if it does not run yet; its forks are clean."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def run_processes(world_size: int, folder: Path, function: Callable[..., dict[str, torch.Tensor]], *arguments):
    """`function(*arguments)` on every process; the tensors that each returned, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    start_server()
    # copied: torch would share each tensor through a file descriptor of its own, and there may be 256
    everything = (world_size, folder, function, pickle.dumps(arguments))
    start_processes(_one_process, everything, nprocs=world_size, start_method="forkserver")
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world_size)]


def _one_process(rank: int, world_size: int, folder: Path, function, pickled_arguments: bytes) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        tensors = {
            name: value.detach().clone().contiguous()
            for name, value in function(*pickle.loads(pickled_arguments)).items()
        }
        save_file(tensors, folder / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()
