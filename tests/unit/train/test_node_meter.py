"""The use of a node: readings in range, who reads, and that they travel with the report."""

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


def test_each_pace_brings_a_reading_that_the_first_workers_report_sends() -> None:
    run = tracking.Run("http://127.0.0.1:9", "1")
    waiting_at_report: list[int] = []
    both = reporting_node(lambda metrics, step: waiting_at_report.append(len(run.outbox.rows)), run, CPU, is_first=True)
    both({"samples_per_s": 1.0}, 4)
    both({"val_loss": 1.0}, 5)
    assert waiting_at_report == [3, 3] and not run.outbox.is_server_away, "queued, not sent by itself"
    assert {(name.split("/")[1], step) for name, _, _, step in run.outbox.rows} == {("node_0", 4)}


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
