"""A small sweep whose driver kills itself in the middle, for test_killed_sweep.py; runs as a driver by itself.

usage: python killed_sweep.py ROOT (TRIAL|nobody)
"""

import os
import signal
import sys
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler

from rsplatform.cluster import Cluster, TunePlacement
from rsplatform.train.sweep import tune
from rsplatform.train.sweep_recipe import TuneConfig
from tests.unit.train.tiny_dataset import tiny_recipe

NUM_STEPS, VALIDATE_EVERY_STEPS = 40, 20


def sweep_config() -> TuneConfig:
    phases = [{"name": "web", "steps": NUM_STEPS, "schedule": {"learning_rate": 1e-3, "warmup_steps": 2}}]
    changes = {"validate_every_steps": VALIDATE_EVERY_STEPS, "checkpoint_every_steps": 10}
    sweep = {
        "output": "sweep/killed/v1",
        "recipe": tiny_recipe(output="model/tuned/v1", phases=phases, **changes),
        "search": {"loss.caption_weight": {"choices": [0.5, 1.0, 2.0]}},
        "num_trials": 3,
        "scheduler": {"type": "asha", "grace_steps": VALIDATE_EVERY_STEPS},
    }
    return TuneConfig.model_validate(sweep)


def cluster(root: str) -> Cluster:
    """One trial after the other."""
    return Cluster(root=root, num_cpus=2, tune=TunePlacement(max_concurrent_trials=1))


def kill_at_the_first_report_of(index: int) -> None:
    """The driver dies when it hears of a trial for the first time, in the middle of its training."""
    hear = ASHAScheduler.on_trial_result

    def on_trial_result(scheduler: ASHAScheduler, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.config["index"] == index:
            os.kill(os.getpid(), signal.SIGKILL)
        return hear(scheduler, controller, trial, result)

    pytest.MonkeyPatch().setattr(ASHAScheduler, "on_trial_result", on_trial_result)


def main(root: str, victim: str) -> None:
    if victim != "nobody":
        kill_at_the_first_report_of(int(victim))
    print(tune(sweep_config(), cluster(root)).uri)


if __name__ == "__main__":
    main(*sys.argv[1:])
