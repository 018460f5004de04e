"""A tracking server that dies in the middle: training ends with the right weights, and says what is not recorded."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from rsplatform import tracking
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import Recorder
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.e2e


class Server:
    """`mlflow server` on loopback, with one database over all its lives."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it says that it answers."""
        command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host=127.0.0.1", f"--port={self.port}"]
        command += ["--workers=1", f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db"]
        command += [f"--artifacts-destination={self.folder}/artifacts"]
        variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = self.process.stdout
        assert lines
        started = next((line for line in lines if "Application startup complete" in line), None)
        assert started, "mlflow server ended before it answered"
        threading.Thread(target=deque, args=(lines, 0), daemon=True).start()  # unread, its pipe would fill up
        assert httpx.get(f"{self.uri}/health", timeout=30, trust_env=False).is_success

    def kill(self) -> None:
        """SIGKILL for it and its workers, which are in its own session."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server that MLFLOW_TRACKING_URI names."""
    server = Server(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    return Cluster(root=root, train=TrainPlacement(launcher="local"))


def after_checkpoint(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `act` happen when the checkpoint of `step` has been written."""
    save = Recorder.save

    def save_then_act(self: Recorder, tensors, progress) -> None:
        save(self, tensors, progress)
        if progress.step == step:
            act()

    monkeypatch.setattr(Recorder, "save", save_then_act)


def weights_of(artifact: Artifact) -> dict:
    return load_file(Path(artifact.uri) / "model" / "model.safetensors")


def test_training_outlives_its_tracking_server(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = weights_of(pretrain(PretrainConfig(**tiny_recipe(output="model/undisturbed/v1")), cluster))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    after_checkpoint(4, server.kill, monkeypatch)
    artifact = pretrain(PretrainConfig(**tiny_recipe(output="model/alone/v1")), cluster)
    weights = weights_of(artifact)
    assert all((weights[name] == value).all() for name, value in undisturbed.items())
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "sends its metrics later" in text]) == 1
    assert any("steps 6 to 8" in text and "could not be sent" in text and server.uri in text for text in warnings)


def test_what_waited_is_sent_in_order_when_the_server_is_back(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = iter([server.kill, lambda: None, server.start])
    for step in (2, 4, 6):
        after_checkpoint(step, next(steps), monkeypatch)
    with caplog.at_level(logging.INFO):
        artifact = pretrain(PretrainConfig(**tiny_recipe(output="model/interrupted/v1")), cluster)
    client = tracking._client(server.uri)
    history = client.get_metric_history(artifact.manifest()["mlflow_run_id"], "train/loss")
    assert [metric.step for metric in history] == [2, 4, 6, 8]
    assert sorted(metric.timestamp for metric in history) == [metric.timestamp for metric in history]
    assert client.get_run(artifact.manifest()["mlflow_run_id"]).info.status == "FINISHED"
    told = [record.getMessage() for record in caplog.records]
    assert any("answers again" in text for text in told)
    assert not any("could not be sent" in text for text in told)
