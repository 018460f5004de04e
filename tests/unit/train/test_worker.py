"""A worker that resumes lets go of what it resumed from, and tells MLflow nothing twice."""

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rsplatform import tracking
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import WorkerJob, run_worker
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


def test_a_restored_checkpoint_does_not_stay_in_memory(tmp_path: Path) -> None:
    make_tiny_dataset(str(tmp_path))
    config = PretrainConfig(**tiny_recipe(ema_decay=0.5, report_every_steps=1, max_minutes=1e-9))
    folder, states = str(tmp_path / "run"), []
    prepare_tokenizer(config, Cluster(root=str(tmp_path)), folder)

    def count_states(metrics: Mapping[str, float], step: int) -> None:
        every = gc.get_objects()
        states.append((step, sum(type(each) is dict and "exp_avg/log_logit_scale" in each for each in every)))

    placement = TrainPlacement(launcher="local")
    assert run_worker(WorkerJob(config, str(tmp_path), folder, placement)).step == 1
    config = config.model_copy(update={"max_minutes": None})
    run_worker(WorkerJob(config, str(tmp_path), folder, placement, on_report=count_states))
    assert [count for step, count in states if step > 1] == [0] * len(states)


def test_steps_after_the_last_checkpoint_are_taken_again_and_tracked_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    make_tiny_dataset(root)
    config = PretrainConfig(**tiny_recipe(checkpoint_every_steps=4, validate_every_steps=4, report_every_steps=1))
    folder, run = str(tmp_path / "run"), tracking.start_run(root, "pipeline", "killed", {}, tags={})
    prepare_tokenizer(config, Cluster(root=root), folder)
    steps: list[int] = []

    def die_once(metrics: Mapping[str, float], step: int) -> None:
        steps.append(step)
        if step == 6 and steps.count(6) == 1:
            raise ZeroDivisionError

    job = WorkerJob(config, root, folder, TrainPlacement(launcher="local"), run, die_once)
    with pytest.raises(ZeroDivisionError):
        run_worker(job)
    run_worker(job)
    assert steps.count(5) == steps.count(6) == 2
    history = {
        name: [row.step for row in MlflowClient(run.uri).get_metric_history(run.run_id, f"train/{name}")]
        for name in ("loss", "val_contrastive", "workers")
    }
    assert history == {"loss": list(range(1, 9)), "val_contrastive": [4, 8], "workers": [0, 4]}
