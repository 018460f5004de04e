"""Workers resume from one checkpoint, or not at all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.train.checkpoint import CheckpointError, CheckpointFolder, agreed_step
from rsplatform.train.engine import gather_of_default_group
from rsplatform.train.pretrain import Progress
from tests.processes.process_group import run_processes


def steps_from(shared: str, own: str) -> dict[str, torch.Tensor]:
    """What the processes agree on with one folder, and what they say of a folder that each has for itself."""
    gather, device = gather_of_default_group(), torch.device("cpu")
    found = torch.tensor([agreed_step(CheckpointFolder(shared), gather, device)])
    nothing = agreed_step(CheckpointFolder(f"{own}/absent"), gather, device)
    folder = CheckpointFolder(f"{own}/{dist.get_rank()}")
    if dist.get_rank() == 0:
        folder.save({"model/x": torch.ones(1)}, Progress(4))
    with pytest.raises(CheckpointError, match=r"own/\d: .*worker 0 step 4, worker 1 none.*root in the cluster file"):
        agreed_step(folder, gather, device)
    return {"found": found, "nothing": torch.tensor([nothing])}


def test_all_processes_resume_from_the_same_step_or_say_that_they_would_not(tmp_path: Path) -> None:
    shared = CheckpointFolder(str(tmp_path / "shared"))
    for step in (2, 6):
        shared.save({"model/x": torch.ones(1)}, Progress(step))
    for tensors in run_processes(2, tmp_path / "group", steps_from, shared.uri, str(tmp_path / "own")):
        assert {name: value.item() for name, value in tensors.items()} == {"found": 6, "nothing": 0}
    assert agreed_step(shared, None, torch.device("cpu")) == 6
