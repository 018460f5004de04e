"""A sweep whose driver is killed: the same command goes on, and what its trials had reached stays as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from watchfiles import watch

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import load_config
from rsplatform.train.job import WorkerJob
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.train.trials import RESULT, trial_placement
from rsplatform.train.worker import run_worker
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).resolve().parents[2]


def test_results_outlive_a_killed_driver_and_a_training_that_stands_finished_without_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_tiny_dataset(str(root))
    command, errors = sweep_command(tmp_path, root), tmp_path / "errors.txt"
    folder = root / "sweep" / "killed" / "v1" / "trials"
    with errors.open("w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, env=own_ray())
        for changes in watch(root, step=20, rust_timeout=1000, yield_on_timeout=True):
            assert driver.poll() is None, errors.read_text()[-4000:]
            if any(path.startswith(f"{folder}/2/checkpoints/step_") for _, path in changes):
                break
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(timeout=60) == -signal.SIGKILL
    before = results(folder)
    assert {"0"} <= before.keys() < {"0", "1", "2"}
    assert before["0"]["step"] == 40 and not before["0"]["stopped_early"], "nobody had come before it"
    # as a trial that its minutes end stands without a driver: its last checkpoint, and no result
    recipe = load_config(TuneConfig, tmp_path / "recipe.yaml").trials()[0][1]
    run_worker(WorkerJob(recipe, str(root), str(folder / "0"), trial_placement(Cluster(root=str(root)))))
    (folder / "0" / RESULT).unlink()

    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=own_ray(), timeout=600)
    assert again.returncode == 0, again.stderr[-4000:]
    after = results(folder)
    assert after.keys() == {"0", "1", "2"}
    assert {index: after[index] for index in before} == before
    assert Artifact(str(root), "sweep/killed/v1").is_finished


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: storage.read_json(str(path)) for path in folder.glob(f"*/{RESULT}")}


def sweep_command(folder: Path, root: Path) -> list[str]:
    """Three trials of 40 steps, one after the other."""
    schedule = {"learning_rate": 1e-3, "warmup_steps": 2}
    phases = [{"name": "web", "steps": 40, "schedule": schedule}]
    recipe = tiny_recipe(output="model/tuned/v1", phases=phases, validate_every_steps=20, checkpoint_every_steps=10)
    sweep = {
        "output": "sweep/killed/v1",
        "recipe": recipe,
        "search": {"loss.caption_weight": {"choices": [0.5, 1.0, 2.0]}},
        "num_trials": 3,
        "scheduler": {"type": "asha", "grace_steps": 20},
    }
    place = {"root": str(root), "num_cpus": 2, "tune": {"max_concurrent_trials": 1}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"metadata": {"rsplatform": place}}))
    return [sys.executable, "jobs/tune.py", str(folder / "recipe.yaml"), str(folder / "cluster.yaml")]


def own_ray() -> dict[str, str]:
    """No address of a Ray that another test may have: its workers would outlive the driver."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
