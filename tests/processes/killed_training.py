"""Training workers that die by SIGKILL at a chosen place, started in milliseconds from a server that forks them.

In: a `WorkerJob` (or, for the front door, a recipe) and where to die. Out: what the real `run_worker` leaves in the
job's folder, and a log of the sample ids of each step. The places are reached by wrapping the engine, the hooks and
the files of this process.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rsplatform.cluster import Cluster
from rsplatform.train import worker
from rsplatform.train.batch import Batch
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.engine import Engine
from rsplatform.train.job import WorkerJob
from rsplatform.train.launch import pretrain
from rsplatform.train.pretrain import Hooks, Progress, Resume, fit
from rsplatform.train.recipe import PretrainConfig

IN_A_STEP = ("start", "backward", "step", "report", "state", "save", "clock")
# By the first process only: halves and wholes of temporary files before their rename, and what lies between them.
IN_A_SAVE = ("half history", "whole history", "no checkpoint", "half checkpoint", "whole checkpoint", "prune")
# By the driver, after the last step.
IN_AN_EXPORT = ("half model", "no manifest", "half manifest", "whole manifest")
# Longer than any attempt takes: what is reached means that a process hangs.
PATIENCE_S = 120


@dataclass(frozen=True)
class Kill:
    """Who dies where: at the first passage of `place` once the batch of `step` is there, `delay_s` after ("clock").

    The other processes are killed with it, as Ray Train does (`takes_all`), or find out by themselves.
    """

    place: str
    rank: int
    step: int
    delay_s: float = 0.0
    takes_all: bool = True


@dataclass(frozen=True)
class Attempt:
    """One start of all processes of a job. Their logs lie in `folder`, under the attempt's number."""

    job: WorkerJob
    folder: Path
    number: int
    world_size: int
    kill: Kill | None = None

    def log(self, rank: int) -> Path:
        """One line with the step that a process starts from, then one for each step with its sample ids."""
        return self.folder / f"attempt-{self.number}-rank-{rank}.jsonl"


def run_attempt(context: ForkServerContext, attempt: Attempt) -> bool:
    """Run all processes to their ends; whether one died by the attempt's kill.

    Raises:
        RuntimeError: a process failed although none was killed, or hung; with its traceback.
    """
    attempt.folder.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=train_one_rank, args=(attempt, rank), name=f"rank {rank}")
        for rank in range(attempt.world_size)
    ]
    for process in processes:
        process.start()
    try:
        was_killed = _wait_for_victim(attempt, processes)
        if was_killed and attempt.kill is not None and attempt.kill.takes_all:
            for process in processes:
                process.kill()
        for process in processes:
            process.join(PATIENCE_S)
        if not was_killed and any(process.exitcode != 0 for process in processes):
            raise RuntimeError(_failures(attempt, processes))
        if any(process.exitcode is None for process in processes):
            raise RuntimeError(f"a process hangs after {attempt.kill}: {_failures(attempt, processes)}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return was_killed


def _wait_for_victim(attempt: Attempt, processes: list[ForkServerProcess]) -> bool:
    alive = list(processes)
    while alive:
        ended = connection.wait([process.sentinel for process in alive], PATIENCE_S)
        if not ended:
            return False
        for process in [process for process in alive if process.sentinel in ended]:
            process.join()
            if attempt.kill is not None and process is processes[attempt.kill.rank]:
                return process.exitcode == -signal.SIGKILL
            alive.remove(process)
    return False


def _failures(attempt: Attempt, processes: list[ForkServerProcess]) -> str:
    told = [f"{attempt}"]
    for rank, process in enumerate(processes):
        errors = attempt.log(rank).with_suffix(".stderr")
        told.append(f"rank {rank}: exit code {process.exitcode}\n{errors.read_text()[-3000:]}")
    return "\n".join(told)


def train_one_rank(attempt: Attempt, rank: int) -> None:
    """One process of an attempt, from its start to its end of either kind."""
    _speak_into(attempt.log(rank).with_suffix(".stderr"))
    os.environ["LOCAL_RANK"] = str(rank)
    is_victim = attempt.kill is not None and attempt.kill.rank == rank
    trap = Trap(attempt.kill if is_victim else None, attempt.log(rank))
    pytest.MonkeyPatch().setattr(worker, "fit", trap.fit)  # what `run_worker` calls
    rendezvous = f"file://{attempt.folder}/rendezvous-{attempt.number}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=attempt.world_size)
    worker.run_worker(attempt.job)
    if trap.timer is not None:
        trap.timer.join()
    dist.destroy_process_group()


def pretrain_until_killed(config: PretrainConfig, cluster: Cluster, kill: Kill | None, log: Path) -> None:
    """The front door with launcher "local", by a driver that dies; without a kill it does not."""
    _speak_into(log)
    pytest.MonkeyPatch().setattr(worker, "fit", Trap(kill, log).fit)
    pretrain(config, cluster)


def _speak_into(file: Path) -> None:
    handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    faulthandler.enable()


class Trap:
    """Follows the training of one process, and kills the process where its attempt says."""

    def __init__(self, kill: Kill | None, log: Path) -> None:
        self.kill = kill
        self.step = 0
        self.timer: threading.Timer | None = None
        self._log = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        if kill is not None and kill.place in (*IN_A_SAVE, *IN_AN_EXPORT):
            self._watch_files()

    def at(self, place: str) -> None:
        """Die here, if this is the place and it is time."""
        if self.kill is not None and self.kill.place == place and self.step >= self.kill.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the place in front of it."""

        def call(*arguments: Any, **named: Any) -> Any:
            self.at(place)
            return function(*arguments, **named)

        return call

    def fit(self, engine: Engine, batches, learning_rate, config, hooks: Hooks, resume: Resume | None) -> Progress:
        """The real `fit` with everything it calls wrapped."""
        self._write({"start": resume[1].step if resume else 0})
        if self.kill is not None and self.kill.place == "start":
            if resume:
                engine.load_state(resume[0])
            os.kill(os.getpid(), signal.SIGKILL)
        for place in ("backward", "step", "state"):
            setattr(engine, place, self.before(place, getattr(engine, place)))
        report, save = self.before("report", hooks.report), self.before("save", hooks.save)
        followed = replace(hooks, report=report, save=save)
        return fit(engine, self._followed(batches), learning_rate, config, followed, resume)

    def _followed(self, batches: Callable[[int, int], Generator[Batch]]) -> Callable[[int, int], Generator[Batch]]:
        def follow(start_step: int, end_step: int) -> Generator[Batch]:
            with contextlib.closing(batches(start_step, end_step)) as stream:
                for step, batch in enumerate(stream, start_step):
                    self.step = step
                    self._write({"step": step, "ids": batch.sample_ids})
                    self._start_the_clock()
                    yield batch

        return follow

    def _start_the_clock(self) -> None:
        kill = self.kill
        if kill is not None and kill.place == "clock" and self.step >= kill.step and self.timer is None:
            self.timer = threading.Timer(kill.delay_s, self.at, ("clock",))
            self.timer.start()

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._log, f"{json.dumps(line)}\n".encode())

    def _watch_files(self) -> None:
        open_file, rename = Path.open, Path.replace

        def watched_open(path: Path, *arguments: Any, **named: Any) -> Any:
            name = _file_being_written(path)
            self.at(f"no {name}")
            stream = open_file(path, *arguments, **named)
            return HalfWritten(stream, self, f"half {name}") if name else stream

        def watched_rename(path: Path, target: Path) -> Path:
            self.at(f"whole {_file_being_written(path)}")
            return rename(path, target)

        patch = pytest.MonkeyPatch()  # never undone: the process ends
        patch.setattr(Path, "open", watched_open)
        patch.setattr(Path, "replace", watched_rename)
        patch.setattr(CheckpointFolder, "prune", self.before("prune", CheckpointFolder.prune))


class HalfWritten:
    """An open file whose writer may die in the middle of it."""

    def __init__(self, stream: Any, trap: Trap, place: str) -> None:
        self._stream, self._trap, self._place = stream, trap, place

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes | memoryview) -> None:
        """In two parts, with the place between them."""
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        self._trap.at(self._place)
        self._stream.write(data[len(data) // 2 :])


def _file_being_written(path: Path) -> str:
    if path.suffix != ".tmp":
        return ""
    prefixes = {".history.": "history", ".step_": "checkpoint", ".model.": "model", ".manifest.": "manifest"}
    return next((name for prefix, name in prefixes.items() if path.name.startswith(prefix)), "")
