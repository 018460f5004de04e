"""MLflow away or silent: metrics wait in order, other writes warn, and a job loses little time over it."""

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsplatform import tracking
from rsplatform.tracking import Run, TrackingError


@pytest.fixture
def silent() -> Iterator[Run]:
    """A run at a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Run(f"http://127.0.0.1:{listener.getsockname()[1]}", "a" * 32)


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own warnings; those of the HTTP library are silenced on the command line."""
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    return [record.getMessage() for record in records if record.name.startswith("rsplatform")]


def test_a_silent_server_is_asked_seldom_and_warned_of_once(silent: Run, caplog: pytest.LogCaptureFixture) -> None:
    silent.log_metrics({"loss": 3.0}, 1)
    started = time.monotonic()
    for step in range(2, 200):
        silent.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 1  # one more question would take a second
    assert [row[3] for row in silent.outbox.rows] == list(range(1, 200))
    told = ours(caplog)
    assert len(told) == 1 and silent.uri in told[0] and "later" in told[0]
    silent.flush()
    assert "199 metrics of steps 1 to 199" in caplog.text


def test_writes_to_an_absent_server_warn_and_reads_raise(caplog: pytest.LogCaptureFixture) -> None:
    run = Run("http://127.0.0.1:9", "a" * 32)
    run.set_tags({"best": "3"})
    run.log_document({"a": 1}, "report.json")
    run.log_text("a", "summary.txt")
    run.end("FINISHED")
    told = ours(caplog)
    for text, word in zip(told, ("tags best", "report.json", "summary.txt", "the end (FINISHED)"), strict=True):
        assert text.startswith(word) and "not recorded" in text and "127.0.0.1:9" in text
    with pytest.raises(TrackingError, match="does not answer"):
        run.latest_metrics()


def test_a_broken_database_of_our_own_is_an_error(root: str) -> None:
    run = tracking.start_run(root, "pipeline", "a run", {}, tags={})
    run.log_metrics({"loss": 1.0}, 1)
    assert not run.outbox.rows
    with pytest.raises(Exception, match="not found"):
        Run(run.uri, "b" * 32).log_metrics({"loss": 1.0}, 1)


def test_steps_that_are_taken_again_have_one_point(root: str) -> None:
    run = tracking.start_run(root, "pipeline", "killed", {}, tags={})
    for step in range(1, 5):
        run.log_metrics({"loss": float(step)}, step)
    run.log_metrics({"val_loss": 2.0}, 2)
    resumed = run.going_on()
    for step in range(3, 7):
        resumed.queue_metrics({"memory": 0.5}, step)
        resumed.log_metrics({"loss": float(step), "val_loss": 9.0}, step)
    client = tracking._client(run.uri)
    steps = {name: [row.step for row in client.get_metric_history(run.run_id, name)] for name in ("loss", "val_loss")}
    assert steps == {"loss": [1, 2, 3, 4, 5, 6], "val_loss": [2, 3, 4, 5, 6]}
    assert len(client.get_metric_history(run.run_id, "memory")) == 4


def test_an_absent_server_lets_a_run_go_on(caplog: pytest.LogCaptureFixture) -> None:
    run = Run("http://127.0.0.1:9", "a" * 32)
    assert run.going_on() is run
    assert "two points" in ours(caplog)[0]


def test_what_waits_travels_with_the_run(silent: Run) -> None:
    silent.log_metrics({"loss": 3.0}, 1)
    assert pickle.loads(pickle.dumps(silent)).outbox.rows == silent.outbox.rows


def test_words_are_redacted_while_other_threads_set_and_unset_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "never-to-be-seen")
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            os.environ["PASSING_BY"] = "1"
            os.environ.pop("PASSING_BY", None)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        assert {tracking.redact("a never-to-be-seen b") for _ in range(3000)} == {"a [redacted] b"}
    finally:
        stop.set()
        changing.join()


def test_mlflow_tells_nobody_how_it_is_used(tmp_path: Path) -> None:
    """Also outside of CI, whose variables turn MLflow's telemetry off by themselves, and of pytest, which does too."""
    ask = f"from rsplatform import tracking; tracking.start_run({str(tmp_path)!r}, 'quiet', 'run', {{}}, tags={{}})\n"
    ask += "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", ask], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
