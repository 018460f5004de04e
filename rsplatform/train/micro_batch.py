"""The default of `micro_batch_size`: as many samples at a time as the card of the placement holds, by arithmetic.

In: one worker's step and its memory. Out: a divisor of its batch, or a sentence that names the settings with which one
sample would fit; a recipe's own number is held to the same arithmetic. A pure function of recipe and placement: a run
that goes on in the same place goes on bitwise. On another card the pieces may have another size, and then sums are
rounded otherwise, no more: what is drawn for a sample follows from its place in the global batch.
"""

from collections.abc import Iterator
from dataclasses import replace

from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.memory import WorkerStep, held_bytes, needed_bytes
from rsplatform.train.traffic import Layout

# The margin, our default: the driver's context with its libraries, and a tenth for fragments and what is not counted.
CONTEXT_BYTES, USABLE_FRACTION = 1.0e9, 0.9


def usable_bytes(memory_gb: float) -> float:
    """Of a card's (or a share's) memory in 10^9 bytes, what our arithmetic may fill."""
    return memory_gb * 1e9 * USABLE_FRACTION - CONTEXT_BYTES


def largest_micro_batch_size(worker: WorkerStep, memory_gb: float) -> int | None:
    """The largest divisor of the worker's batch that fits; None if not even one sample does."""
    sizes = range(worker.batch_size, 0, -1)
    divisors = (size for size in sizes if worker.batch_size % size == 0)
    return next((size for size in divisors if needed_bytes(worker, size) <= usable_bytes(memory_gb)), None)


def fitting_micro_batch_size(worker: WorkerStep, memory_gb: float) -> int:
    """`largest_micro_batch_size`, a pure function of the recipe and the placement.

    Raises:
        RecipeMismatchError: not even one sample fits; the message names the settings with which one would.
    """
    found = largest_micro_batch_size(worker, memory_gb)
    if found is not None:
        return found
    fitting = {words: largest_micro_batch_size(other, memory_gb) for words, other in _alternatives(worker)}
    remedies = [f"{words} (micro_batch_size {size})" for words, size in fitting.items() if size is not None]
    advice = (
        f"what would fit: {'; or '.join(remedies)}"
        if remedies
        else "no engine and no recomputation makes it fit: take cards with more memory, more workers to shard over, "
        "or a smaller model"
    )
    raise RecipeMismatchError(
        f"one sample at a time needs {needed_bytes(worker, 1) / 1e9:.1f} GB by our arithmetic, of which "
        f"{held_bytes(worker, is_split=worker.batch_size > 1) / 1e9:.1f} GB are weights, gradients and moments; of the "
        f"{memory_gb:g} GB a worker has, {max(0.0, usable_bytes(memory_gb)) / 1e9:.1f} may be filled; {advice}"
    )


def given_micro_batch_size(worker: WorkerStep, memory_gb: float, size: int) -> int:
    """`size`, a recipe's own number, if it fits.

    Raises:
        RecipeMismatchError: it does not, or not even one sample does; the message names what would.
    """
    fitting = fitting_micro_batch_size(worker, memory_gb)
    needed = needed_bytes(worker, min(size, worker.batch_size))
    if needed > usable_bytes(memory_gb):
        raise RecipeMismatchError(
            f"micro_batch_size {size} of the recipe needs {needed / 1e9:.1f} GB a worker by our arithmetic, and of the "
            f"{memory_gb:g} GB a worker has, {usable_bytes(memory_gb) / 1e9:.1f} may be filled: leave it out, which "
            f"takes {fitting} here"
        )
    return size


def _alternatives(worker: WorkerStep) -> Iterator[tuple[str, WorkerStep]]:
    """Settings of the placement that need less: recomputation, then engines that shard, then both."""
    recomputing = replace(worker, shape=replace(worker.shape, recompute_every_blocks=1))
    yield "cluster.train.recompute_every_blocks=1", recomputing
    if worker.layout.num_devices == 1:
        return
    engines: dict[str, Layout] = {
        "cluster.train.engine=deepspeed cluster.train.zero_stage=2": Layout("zero2", worker.layout.num_devices),
        "cluster.train.engine=deepspeed cluster.train.zero_stage=3": Layout("zero3", worker.layout.num_devices),
        "cluster.train.engine=fsdp": Layout("fsdp", worker.layout.num_devices),
    }
    for words, layout in engines.items():
        yield words, replace(worker, layout=layout)
        yield f"{words} cluster.train.recompute_every_blocks=1", replace(recomputing, layout=layout)
