"""The progress of a run outlives a tracking server that does not answer."""

import logging

import pytest

from rsplatform import tracking
from rsplatform.tracking import Run
from rsplatform.train.progress import LatestMetrics, shown_progress


def test_a_failing_read_shows_the_last_metrics_and_warns_once(root: str, caplog: pytest.LogCaptureFixture) -> None:
    run = tracking.start_run(root, "pipeline", "a run", {}, tags={})
    run.log_metrics({"train/loss": 2.0}, 1)
    latest = LatestMetrics(run)
    assert latest.read() == {"train/loss": 2.0}
    latest.run = Run("http://127.0.0.1:9", run.run_id)
    assert latest.read() == latest.read() == {"train/loss": 2.0}
    told = [record.getMessage() for record in caplog.records if record.name.startswith("rsplatform")]
    assert len(told) == 1 and "cannot be shown now: MLflow at http://127.0.0.1:9" in told[0]
    latest.run = run
    assert latest.read() == {"train/loss": 2.0}
    assert latest.is_readable


def test_the_display_of_an_unreadable_run_ends_with_its_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), shown_progress(Run("http://127.0.0.1:9", "a" * 32), 10):
        pass
