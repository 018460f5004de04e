"""The trials of a sweep on disk and in MLflow: each has a folder, a child run, a note of its values and a result file.

What stands is not done again: a sweep that goes on opens the same trials and trains those without a result.
"""

from dataclasses import dataclass
from typing import Any

from rsplatform import storage, tracking
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.stage import Stage
from rsplatform.train.search_space import Values
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.worker import read_history

RESULT, TRIAL = "result.json", "trial.json"


class SweepError(RuntimeError):
    """A sweep without a best trial; the message says what to change."""


@dataclass(frozen=True)
class Trial:
    """One trial: a folder of the sweep and a child run in MLflow."""

    index: int
    folder: str
    run: tracking.Run

    @property
    def is_done(self) -> bool:
        """Whether its result stands."""
        return storage.exists(f"{self.folder}/{RESULT}")

    def result(self) -> dict[str, Any]:
        """The step it ended at, the objective there, and whether it was stopped before its end."""
        return storage.read_json(f"{self.folder}/{RESULT}")

    def finish(self, result: dict[str, Any]) -> None:
        """Leave the result."""
        storage.write_json(f"{self.folder}/{RESULT}", result)

    def note(self, values: Values) -> None:
        """Leave the run and the values that the trial has."""
        storage.write_json(f"{self.folder}/{TRIAL}", {"run_id": self.run.run_id, "values": values})


def open_trial(config: TuneConfig, cluster: Cluster, stage: Stage, index: int, values: Values) -> Trial:
    """Trial `index` with its child run, the one that it had before if the sweep goes on."""
    folder = stage.artifact.path(f"trials/{index}")
    note = f"{folder}/{TRIAL}"
    resume = storage.read_json(note)["run_id"] if storage.exists(note) else None
    name, tags = f"{config.output} trial {index}", {"kind": "trial", "trial": str(index), "ref": config.output}
    trial = Trial(
        index, folder, tracking.start_run(cluster.root, config.pipeline, name, values, tags=tags, resume=resume)
    )
    trial.note(values)
    return trial


def last_measured(folder: str, objective: str) -> dict[str, float]:
    """The last step at which a training measured the objective, and what it was, from the history that lies beside its
    checkpoints: a run that died after its last one has left it too. Empty if it never did."""
    row = next((row for row in reversed(read_history(folder)) if objective in row), {})
    return {name: row[name] for name in ("step", objective) if name in row}


def trial_placement(cluster: Cluster) -> TrainPlacement:
    """One worker in one process, with what the cluster file grants a trial."""
    own = {"launcher": "local", "engine": "plain", "num_workers": 1}
    resources = {"cpus_per_worker": cluster.tune.cpus_per_trial, "gpus_per_worker": cluster.tune.gpus_per_trial}
    return cluster.train.model_copy(update=own | resources)
