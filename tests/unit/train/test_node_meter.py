"""The use of a node: readings in range, who reads, and that they travel with the report."""

from pathlib import Path

import pytest
import torch

from rsplatform import tracking
from rsplatform.train.node_meter import NodeMeter, reporting_node

CPU = torch.device("cpu")


def test_cores_and_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "3")
    meter = NodeMeter(CPU)
    sum(range(200_000))
    values = meter.read()
    assert set(values) == {
        f"system/node_3/{name}"
        for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage")
    }
    assert 0 <= values["system/node_3/cpu_utilization_percentage"] <= 100
    assert 0 < values["system/node_3/system_memory_usage_percentage"] < 100
    assert values["system/node_3/system_memory_usage_megabytes"] > 10


def test_each_pace_brings_a_reading_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracking.start_run(str(tmp_path), "tests", "node", {}, tags={})
    seen: list[int] = []

    def report(metrics: dict[str, float], step: int) -> None:
        seen.append(step)
        run.log_metrics(metrics, step)

    both = reporting_node(report, run, CPU, is_first=True)
    both({"samples_per_s": 1.0}, 4)
    rows = run.latest_metrics()
    assert "system/node_0/cpu_utilization_percentage" in rows and rows["samples_per_s"] == 1.0
    both({"val_loss": 1.0}, 5)
    assert seen == [4, 5] and not run.outbox.rows


def test_only_the_first_worker_of_a_node_reads_and_only_where_it_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(metrics: dict[str, float], step: int) -> None: ...

    on_disk = tracking.Run("sqlite:////nowhere/mlflow.db", "1")
    assert reporting_node(report, None, CPU, is_first=True) is report
    assert reporting_node(report, on_disk, CPU, is_first=False) is report
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert reporting_node(report, tracking.Run("http://127.0.0.1:9", "1"), CPU, is_first=False) is report


def test_a_server_that_is_away_leaves_readings_waiting(caplog: pytest.LogCaptureFixture) -> None:
    away = tracking.Run("http://127.0.0.1:9", "1")
    reports: list[int] = []
    both = reporting_node(lambda metrics, step: reports.append(step), away, CPU, is_first=False)
    both({"samples_per_s": 1.0}, 2)
    assert reports == [2]
    assert {step for *_, step in away.outbox.rows} == {2}
    assert "does not answer" in caplog.text
