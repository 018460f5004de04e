"""A sweep whose driver is killed: the same command goes on, and what its trials had reached stays as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_sweep as killed
import pytest

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.train.job import WorkerJob
from rsplatform.train.trials import RESULT, trial_placement
from rsplatform.train.worker import run_worker
from tests.unit.train.tiny_dataset import make_tiny_dataset

pytestmark = pytest.mark.ray


def test_results_outlive_a_killed_driver_and_a_training_that_stands_finished_without_one(root: str) -> None:
    make_tiny_dataset(root)
    first = drive(root, "2")
    assert first.returncode == -signal.SIGKILL, first.stderr[-4000:]
    artifact = Artifact(root, killed.sweep_config().output)
    folder = Path(artifact.uri) / "trials"
    before = results(folder)
    assert before.keys() == {"0", "1"}, "also of one that was stopped"
    assert before["0"]["step"] == killed.NUM_STEPS and not before["0"]["stopped_early"], "nobody had come before it"
    # as a trial that its minutes end stands without a driver: its last checkpoint, and no result
    recipe = killed.sweep_config().trials()[0][1]
    run_worker(WorkerJob(recipe, root, str(folder / "0"), trial_placement(killed.cluster(root))))
    (folder / "0" / RESULT).unlink()

    again = drive(root, "nobody")
    assert again.returncode == 0, again.stderr[-4000:]
    after = results(folder)
    assert after.keys() == {"0", "1", "2"}
    assert {index: after[index] for index in before} == before
    assert artifact.is_finished


def drive(root: str, victim: str) -> subprocess.CompletedProcess[str]:
    """The driver on a Ray of its own: on another test's, its workers would outlive it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    repository = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([repository, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, killed.__file__, root, victim]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: storage.read_json(str(path)) for path in folder.glob(f"*/{RESULT}")}
