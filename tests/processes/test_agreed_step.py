"""Workers resume from one checkpoint, or not at all; one that is shown it late waits for it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.train.checkpoint import CheckpointError, CheckpointFolder, agreed_step
from rsplatform.train.engine import gather_of_default_group
from rsplatform.train.pretrain import Progress
from tests.processes.process_group import run_processes


class LateFolder(CheckpointFolder):
    """A folder as a network disk shows it to one process: without its files when it is first listed and asked."""

    def __init__(self, uri: str, late_rank: int) -> None:
        super().__init__(uri)
        object.__setattr__(self, "answers", [None] * 3 if dist.get_rank() == late_rank else [])

    def steps(self) -> list[int]:
        """Nothing at first."""
        return [] if self.is_late() else super().steps()

    def has(self, step: int) -> bool:
        """No at first."""
        return not self.is_late() and super().has(step)

    def is_late(self) -> bool:
        """Whether this answer still is."""
        answers = vars(self)["answers"]
        return bool(answers) and answers.pop() is None


def steps_from(shared: str, own: str) -> dict[str, torch.Tensor]:
    """What the processes agree on with one folder, and what they say of a folder that each has for itself."""
    gather, device = gather_of_default_group(), torch.device("cpu")
    found = torch.tensor([agreed_step(CheckpointFolder(shared), gather, device)])
    nothing = agreed_step(CheckpointFolder(f"{own}/absent"), gather, device)
    folder = CheckpointFolder(f"{own}/{dist.get_rank()}")
    if dist.get_rank() == 0:
        folder.save({"model/x": torch.ones(1)}, Progress(4))
    with pytest.raises(CheckpointError, match=r"own/\d: .*worker 0 step 4, worker 1 none.*root in the cluster file"):
        agreed_step(folder, gather, device, tries=2, wait_s=0.0)
    late = [agreed_step(LateFolder(shared, late_rank=rank), gather, device, tries=3, wait_s=0.0) for rank in (0, 1)]
    return {"found": found, "nothing": torch.tensor([nothing]), "late": torch.tensor(late)}


def test_all_processes_resume_from_the_same_step_or_say_that_they_would_not(tmp_path: Path) -> None:
    shared = CheckpointFolder(str(tmp_path / "shared"))
    for step in (2, 6):
        shared.save({"model/x": torch.ones(1)}, Progress(step))
    for tensors in run_processes(2, tmp_path / "group", steps_from, shared.uri, str(tmp_path / "own")):
        assert {name: value.tolist() for name, value in tensors.items()} == {
            "found": [6],
            "nothing": [0],
            "late": [6, 6],
        }
    assert agreed_step(shared, None, torch.device("cpu")) == 6
