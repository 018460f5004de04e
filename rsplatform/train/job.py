"""One training run as its workers see it: a recipe, a folder, a placement, and where to begin and to stop. Picklable.

Made by the launcher or by a sweep, run by worker.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rsplatform.cluster import TrainPlacement
from rsplatform.tracking import Run
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.pretrain import Resume
from rsplatform.train.recipe import PretrainConfig


@dataclass(frozen=True)
class WorkerJob:
    """One training run as its workers see it. `folder` is where tokenizer/, checkpoints/ and history.json lie.

    `origin`: a checkpoint (folder, step) of another run to go on from, while there is none of its own. `until_step`:
    where to stop, as a whole run would at its end; None: the recipe's last step.
    """

    config: PretrainConfig
    root: str
    folder: str
    placement: TrainPlacement
    run: Run | None = None
    on_report: Callable[[Mapping[str, float], int], None] | None = None
    origin: tuple[CheckpointFolder, int] | None = None
    until_step: int | None = None

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoints."""
        return CheckpointFolder(
            f"{self.folder}/checkpoints", self.config.keep_checkpoints, self.config.keep_every_steps
        )

    @property
    def num_steps(self) -> int:
        """The last step of this run."""
        return self.config.curriculum.num_steps if self.until_step is None else self.until_step

    @property
    def first_step(self) -> int:
        """The step that it begins at while it has no checkpoint of its own."""
        return 0 if self.origin is None else self.origin[1]

    def resume(self, own_step: int) -> Resume | None:
        """Its own checkpoint of a step; for step 0 what it begins from, None at the very beginning.

        Raises:
            FileNotFoundError: the checkpoint is gone.
        """
        if own_step:
            return self.checkpoints.load(own_step)
        return None if self.origin is None else self.origin[0].load(self.origin[1])
