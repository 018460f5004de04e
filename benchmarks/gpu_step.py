"""Samples per second, memory and MFU of the training step on one GPU, over what trades memory for speed.

In: a size and a device (random pictures, captions of --tokens tokens without pads). Out: the matrix-product peak of the
same card in the same run, then a line per setting: engine, samples in memory at once, torch.compile of the blocks,
recomputation, patch dropout. Engines are ours on one card: plain, FSDP2, and ZeRO-1 where DeepSpeed is installed; the
last two beside what plain needs for the same. The step is the loop's own. Needs torch and Pillow, no Ray. Without a
CUDA device it says so and ends.
Run: `python benchmarks/gpu_step.py`, or to try it anywhere `python benchmarks/gpu_step.py --device cpu --size mini`
"""

import argparse
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from rsplatform.model.mammut import Mammut, MammutConfig, mammut_config
from rsplatform.train.batch import Batch
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from rsplatform.train.engine import Engine, PlainEngine
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.meter import training_flops_per_sample
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, prepare_step

RATE = 1e-5
# The first steps allocate, choose kernels and compile.
NUM_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """One line of the table. `micro_batch_size` None: the whole batch is in memory at once."""

    engine: str
    batch_size: int
    compiles: bool = False
    recompute_every: int | None = None
    patch_dropout: float = 0.0
    micro_batch_size: int | None = None

    @property
    def title(self) -> str:
        """The setting in words."""
        words = [f"{self.engine:5} batch {self.batch_size:4d}"]
        if self.micro_batch_size is not None:
            words.append(f"in pieces of {self.micro_batch_size}")
        words += ["compiled"] * self.compiles
        if self.recompute_every is not None:
            words.append("all recomputed" if self.recompute_every == 1 else f"1 of {self.recompute_every} recomputed")
        if self.patch_dropout:
            words.append(f"patch dropout {self.patch_dropout}")
        return ", ".join(words)


def settings(batch_sizes: list[int], can_compile: bool) -> list[Setting]:
    """Micro-batch by compilation, then one change at a time at the largest batch; recomputation makes room for more."""
    largest, compiles = max(batch_sizes), can_compile
    rows = [
        Setting("plain", size, flag) for flag in ((False, True) if can_compile else (False,)) for size in batch_sizes
    ]
    rows += [Setting("plain", factor * largest, compiles, every) for factor, every in ((1, 2), (1, 1), (4, 1))]
    rows += [Setting("plain", factor * largest, compiles, None, 0.5) for factor in (1, 2)]
    rows.append(Setting("plain", 4 * largest, compiles, micro_batch_size=largest))
    rows += [Setting("fsdp", largest, compiles), Setting("fsdp", largest, compiles, 1)]
    rows.append(Setting("zero1", largest, compiles))  # the last: whatever DeepSpeed may keep is in nobody's way
    return rows


def why_left_out(setting: Setting) -> str | None:
    """What the setting's engine lacks here."""
    is_missing = setting.engine == "zero1" and importlib.util.find_spec("deepspeed") is None
    return "left out, as deepspeed is not installed" if is_missing else None


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several products of two large square matrices, in 10^12 operations a second."""
    side, seconds = (8192 if device.type == "cuda" else 1024), []
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    for _ in range(20):
        synchronise(device)
        started = time.perf_counter()
        torch.matmul(left, right, out=product)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds) / 1e12


def make_batch(model: MammutConfig, batch_size: int, num_tokens: int) -> Batch:
    """Random pictures and token ids in host memory, as a loader hands them over."""
    generator = torch.Generator().manual_seed(0)
    size = model.vision.image_size
    images_BHWC = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    tokens_BT = torch.randint(3, model.text.vocab_size, (batch_size, num_tokens), generator=generator)
    return Batch(images_BHWC, tokens_BT, tuple(map(str, range(batch_size))), torch.arange(batch_size))


def make_engine(setting: Setting, model: Mammut, precision: Literal["bfloat16", "float32"]) -> Engine:
    """The setting's engine, as training has it on one device."""
    if setting.engine == "plain":
        return PlainEngine(model, OptimizerConfig())
    if setting.engine == "fsdp":
        return FsdpEngine(model, OptimizerConfig())
    from rsplatform.train.deepspeed import DeepSpeedEngine  # takes seconds to import

    size = setting.batch_size
    return DeepSpeedEngine(model, OptimizerConfig(), batch_size=size, zero_stage=1, precision=precision)


def make_step(setting: Setting, model: MammutConfig, arguments: argparse.Namespace) -> Callable[[], None]:
    """One whole step, with the loop's one look at the loss."""
    torch.manual_seed(0)
    module = Mammut(model).to(arguments.device).train()
    prepare_blocks(module, BlockConfig(setting.recompute_every, setting.compiles))
    engine = make_engine(setting, module, arguments.precision)
    config = StepConfig(precision=arguments.precision, micro_batch_size=setting.micro_batch_size)
    batch = make_batch(model, setting.batch_size, arguments.tokens)

    def step() -> None:
        prepared = prepare_step(engine, batch, 0, config)
        float(prepared.parts["loss"])
        prepared.make_gradients()
        engine.step(RATE)

    return step


def measure(setting: Setting, arguments: argparse.Namespace, peak_tflops: float) -> dict[str, float]:
    """Samples/s by the median step, MFU against the measured peak, peak memory.

    Raises:
        torch.OutOfMemoryError: the setting needs more than the device has.
    """
    device = torch.device(arguments.device)
    model = mammut_config(arguments.size, patch_dropout=setting.patch_dropout)
    step, seconds = make_step(setting, model, arguments), []
    for _ in range(NUM_WARMUP_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(arguments.steps):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    pace = setting.batch_size / statistics.median(seconds)
    flops = training_flops_per_sample(model, arguments.tokens, model.vision.image_size)
    row = {"samples_per_s": pace, "mfu": pace * flops / (peak_tflops * 1e12)}
    if device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def forget(device: torch.device) -> None:
    """Give back what the last setting held: graphs, blocks of memory."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """FSDP2 asks for a process group, also of one process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def print_table(arguments: argparse.Namespace) -> list[dict]:
    """Every setting in turn; one that does not fit is a line that says so."""
    device = torch.device(arguments.device)
    peak_tflops = matmul_peak_tflops(device, getattr(torch, arguments.precision))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    model = mammut_config(arguments.size)
    flops = training_flops_per_sample(model, arguments.tokens, model.vision.image_size)
    print(f"{name}, torch {torch.__version__}, {arguments.precision}, {arguments.size}, T = {arguments.tokens}")
    print(f"matrix-product peak {peak_tflops:.2f} TFLOP/s; {flops / 1e12:.3g} TFLOP a sample: at the peak", end=" ")
    print(f"{peak_tflops * 1e12 / flops:.0f} samples/s")
    rows: list[dict] = []
    for setting in settings(arguments.batch_sizes, arguments.compile):
        found, why_not = {}, why_left_out(setting)
        try:
            found = {} if why_not else measure(setting, arguments, peak_tflops)
        except torch.OutOfMemoryError:
            why_not = "out of memory"
        forget(device)
        rows.append(asdict(setting) | found)
        print(f"  {setting.title:60} {why_not or told(found, plain_pace(setting, rows))}", flush=True)
    return rows


def plain_pace(setting: Setting, rows: list[dict]) -> float | None:
    """Samples/s of the plain engine at what is otherwise the same setting, for another engine."""
    same = asdict(replace(setting, engine="plain"))
    paces = [row.get("samples_per_s") for row in rows if same.items() <= row.items()]
    return paces[0] if paces and setting.engine != "plain" else None


def told(found: dict[str, float], plain_samples_per_s: float | None) -> str:
    """What was measured, and how a step's time compares with the plain engine's."""
    words = [f"{found['samples_per_s']:8.1f} samples/s, MFU {found['mfu']:6.1%}"]
    words += [f"{found['memory_gb']:6.1f} GB"] if "memory_gb" in found else []
    if plain_samples_per_s is not None:
        words.append(f"{plain_samples_per_s / found['samples_per_s']:.2f} × plain's time")
    return ", ".join(words)


def main() -> None:
    """Parse, measure, print; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="so400m")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, help="of every caption; by default 64, or the context if it is shorter")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="by default 64 128 256; on a CPU 4 8")
    parser.add_argument("--steps", type=int, help="timed ones; by default 10, on a CPU 2")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the compiled settings out")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured. To try the script: --device cpu --size mini --no-compile")
        return
    is_cpu = arguments.device == "cpu"
    arguments.tokens = arguments.tokens or min(64, mammut_config(arguments.size).text.context_length)
    arguments.batch_sizes = arguments.batch_sizes or ([4, 8] if is_cpu else [64, 128, 256])
    arguments.steps = arguments.steps or (2 if is_cpu else 10)
    with group_of_one(torch.device(arguments.device)):
        rows = print_table(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
