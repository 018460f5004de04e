"""The bare loop, killed in the middle of a real process's training: bitwise what it would have become."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from rsplatform.train.checkpoint import CheckpointFolder
from tests.processes.process_group import start_server
from tests.unit.train.test_pretrain import NUM_STEPS, assert_bitwise, train


def train_on(folder: str, sender: Connection) -> None:
    """Tells each step as it is saved and goes on, until somebody kills it."""
    train(folder, 10_000, on_save=sender.send)


def test_a_killed_process_resumes_exactly(tmp_path: Path) -> None:
    """kill -9, then go on from what it left."""
    server, killed = start_server(), tmp_path / "killed"
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=train_on, args=(str(killed), sender))
    process.start()
    sender.close()  # so that a child which fails is an end of the file, not a wait for ever
    while receiver.recv() < 4:
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for step in CheckpointFolder(str(killed)).steps():  # the child may have been a few steps further than we read
        if step >= NUM_STEPS:
            (killed / f"step_{step:08d}.safetensors").unlink()
    assert_bitwise(train(killed)[1], train(tmp_path / "whole")[1])
