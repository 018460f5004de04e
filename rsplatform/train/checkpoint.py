"""Checkpoints of a training run: one safetensors file each, on a local path or S3, whole or not there at all.

In: named tensors and the progress. Out: the newest checkpoint, the best one, or None. Never a pickle. The random
state is not stored: it is a function of (seed, step). `HostImage` and `BackgroundWriter` let the training go on
while the bytes travel. Does not decide when to save. Whole states only: a sharded format for models that do not fit
one host is not here. Shapes: N bytes.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsplatform import storage
from rsplatform.model.gather import FeatureGather
from rsplatform.train.pretrain import Progress

_NAME = re.compile(r"^step_(\d{8})\.safetensors$")
_PROGRESS_KEY = "progress"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
# Of one request to an object store.
_PIECE_BYTES = 64 * 2**20
# NFS keeps what it knows of a folder for up to a minute (its acdirmax).
LISTING_TRIES, LISTING_WAIT_S = 90, 1.0


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class KeepBest:
    """The checkpoint with the lowest (`min`) or highest `metric` of the validation stays beside the newest ones.

    `export` says which of the two becomes the artifact's model/.
    """

    metric: str = "val_contrastive"
    mode: Literal["min", "max"] = "min"
    export: Literal["best", "last"] = "best"

    def step(self, history: Sequence[Mapping[str, float]], steps: Collection[int]) -> int | None:
        """Of `steps`, the one whose row of the history is best, the earliest of equals; None if none was measured."""
        sign = 1 if self.mode == "min" else -1
        measured = [
            (sign * row[self.metric], int(row["step"]))
            for row in history
            if self.metric in row and row["step"] in steps and math.isfinite(row[self.metric])
        ]
        return min(measured)[1] if measured else None


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints below `uri`; the newest `keep_last` are kept, and with `keep_every` each whose step it divides."""

    uri: str
    keep_last: int = 2
    keep_every: int | None = None

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the checkpoint of `progress.step`, then remove those beyond `keep_last`."""
        self.write(HostImage().fill(tensors, progress), progress.step)
        self.prune()

    def write(self, data: memoryview, step: int) -> None:
        """Put a `HostImage` under the name of its step."""
        storage.write_bytes(self._path(step), data)

    def prune(self, keep: Collection[int] = ()) -> None:
        """Remove the checkpoints beyond `keep_last`, except every `keep_every`-th step's and those in `keep`."""
        for step in self.steps()[: -self.keep_last]:
            is_every = self.keep_every is not None and step % self.keep_every == 0
            if step not in keep and not is_every:
                system, path = storage.filesystem(self._path(step))
                system.delete_file(path)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending; files still being written do not count."""
        names = (_NAME.match(name) for name in storage.list_files(self.uri))
        return sorted(int(match.group(1)) for match in names if match)

    def has(self, step: int) -> bool:
        """Whether the whole checkpoint of a step is there: asked by its name, a disk answers sooner than by a list."""
        return storage.exists(self._path(step))

    def latest(self) -> tuple[dict[str, Tensor], Progress] | None:
        """Tensors and progress of the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> tuple[dict[str, Tensor], Progress]:
        """Tensors and progress of one checkpoint. From a local path the tensors are read when they are, and share the
        page cache with the other processes of the host: the file has to stay until they have been.

        Raises:
            CheckpointError: the file is damaged.
            FileNotFoundError: there is no checkpoint of that step.
        """
        path = self._path(step)
        return _with_progress(path, _read if storage.is_s3(path) else _map_local)

    def read(self, step: int, prefix: str) -> tuple[dict[str, Tensor], Progress]:
        """As `load`, but only the tensors whose names begin with `prefix`, and read now: whoever does not write the
        checkpoints may find them pruned at any time, and on a network disk a vanished mapped file ends the process.

        Raises:
            CheckpointError: the file is damaged.
            OSError: there is no checkpoint of that step, or there is none any more.
        """
        return _with_progress(self._path(step), partial(_read, prefix=prefix))

    def _path(self, step: int) -> str:
        return f"{self.uri}/step_{step:08d}.safetensors"


# What a file holds: tensors by name, and the metadata.
_Content = tuple[dict[str, Tensor], dict[str, str]]


def _with_progress(path: str, read: Callable[[str], _Content]) -> tuple[dict[str, Tensor], Progress]:
    try:
        tensors, metadata = read(path)
        return tensors, Progress(**json.loads(metadata[_PROGRESS_KEY]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}); delete it to resume from the one before"
        ) from error


def _map_local(path: str) -> _Content:
    with safetensors.safe_open(storage.filesystem(path)[1], framework="pt") as file:
        return file.get_tensors(), file.metadata()


def _read(path: str, prefix: str = "") -> _Content:
    """The tensors of a prefix, views of one piece of memory: safetensors would hold the file's bytes beside them.

    `HostImage` sorts by width, then by name: what has a prefix lies together, and each at a multiple of its size.
    """
    system, inner = storage.filesystem(path)
    with system.open_input_file(inner) as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > file.size():
            raise ValueError("its header is cut off")
        header = json.loads(file.read(start - 8))
        metadata = header.pop("__metadata__")
        wanted = {name: entry for name, entry in header.items() if name.startswith(prefix)}
        offsets = [offset for entry in wanted.values() for offset in entry["data_offsets"]]
        begin, end = min(offsets, default=0), max(offsets, default=0)
        if start + end > file.size():
            raise ValueError("its tensors are cut off")
        data_N = torch.empty(end - begin, dtype=torch.uint8)
        file.seek(start + begin)
        for piece_N in data_N.split(_PIECE_BYTES):
            file.readinto(piece_N.numpy())
    tensors = {}
    for name, entry in wanted.items():
        first, last = (offset - begin for offset in entry["data_offsets"])
        tensors[name] = data_N[first:last].view(_DTYPES_BY_NAME[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


def agreed_step(
    checkpoints: CheckpointFolder,
    gather: FeatureGather | None,
    device: torch.device,
    tries: int = LISTING_TRIES,
    wait_s: float = LISTING_WAIT_S,
) -> int:
    """The step of the first process's newest checkpoint, 0 where nobody has one. Collective.

    Network disks show a file to other machines up to a minute late: who does not see it yet looks again, `tries` times.

    Raises:
        CheckpointError: some process does not see it even then.
    """
    own = max(checkpoints.steps(), default=0)
    if gather is None:
        return own
    seen = gather.rows(torch.tensor([own], device=device)).tolist()
    step = seen[0] or max(seen)  # a first process that sees nothing is late as well
    tries_left = tries
    while not (is_there := not step or checkpoints.has(step)) and tries_left:
        tries_left -= 1
        time.sleep(wait_s)
    if not all(gather.rows(torch.tensor([is_there], device=device)).tolist()):
        told = ", ".join(f"worker {rank} {f'step {own}' if own else 'none'}" for rank, own in enumerate(seen))
        raise CheckpointError(
            f"{checkpoints.uri}: not all workers see the checkpoint of step {step}, even after {tries * wait_s:.0f} s "
            f"(newest at first: {told}); root in the cluster file has to be one place that all machines share, a "
            "network file system or s3://"
        )
    return step


class HostImage:
    """The bytes of a checkpoint's file in host memory, which the training cannot change any more.

    Laid out here, not by the safetensors library, which would copy everything twice more and hold the interpreter's
    lock meanwhile. The memory is kept from one checkpoint to the next: its first touch costs more than the copy.
    """

    def __init__(self) -> None:
        self._bytes_N = torch.empty(0, dtype=torch.uint8)

    def fill(self, tensors: Mapping[str, Tensor], progress: Progress) -> memoryview:
        """Copy the state out of the model and its optimizer. What the call before returned is overwritten."""
        header: dict[str, Any] = {"__metadata__": {_PROGRESS_KEY: json.dumps(asdict(progress))}}
        end = 0
        # wide numbers first, so that each lies at a multiple of its size
        for name, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            begin, end = end, end + value.numel() * value.element_size()
            header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        if len(self._bytes_N) < start + end:
            self._bytes_N = torch.empty(start + end + 4096, dtype=torch.uint8)  # a later header may be longer
        view = self._bytes_N.numpy().data[: start + end]
        view[:8] = len(text).to_bytes(8, "little")
        view[8:start] = text
        data_N = self._bytes_N[start : start + end]
        for name, value in tensors.items():
            begin, end = header[name]["data_offsets"]
            data_N[begin:end].view(value.dtype).view(value.shape).copy_(value.detach())
        return view


class BackgroundWriter:
    """Does pieces of writing in a thread of its own, one at a time. Python waits for that thread when it exits."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def wait(self) -> None:
        """Return when the last piece is written; raises what went wrong with it, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def start(self, write: Callable[[], None]) -> None:
        """Wait as above, then run `write` beside the caller."""
        self.wait()
        self._pending = self._thread.submit(write)

    def close(self) -> None:
        """Wait as above, then end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
