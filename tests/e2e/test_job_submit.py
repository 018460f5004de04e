"""`ray job submit` against a real cluster on this machine: both spellings of a job, joined and not started anew."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.runtime_env.packaging import create_package

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.world.build import MakeWorldConfig, make_world_artifact
from rsplatform.world.generate import WorldConfig
from tests.unit.train.tiny_dataset import make_tiny_dataset

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A Ray head with its job server on loopback, stopped by its own process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="rs-")  # short: Unix sockets below it have paths of at most 107 bytes
    variables = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 starves workers beside any other work
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--port=0",
        "--num-cpus=2",
        "--block",
        "--node-ip-address=127.0.0.1",
    ]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert head.stdout
    started = next((line for line in head.stdout if "Ray runtime started" in line), None)
    if not started:
        head.kill()
        pytest.fail("ray start ended without a runtime")
    threading.Thread(target=deque, args=(head.stdout, 0), daemon=True).start()  # unread, its pipe would fill up
    yield variables | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    for process in [*psutil.Process(head.pid).children(recursive=True), head]:  # a polite end takes Ray half a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with a very small world, and a dataset of a few pictures."""
    root = str(tmp_path_factory.mktemp("root"))
    size = WorldConfig(scene_size_px=256, num_train_scenes=2, num_val_scenes=1, num_web_pairs=0, num_train_pairs=0)
    make_world_artifact(MakeWorldConfig(output="world/demo/v1", world=size), Cluster(root=root))
    make_tiny_dataset(root)
    return root


def submit(environment: dict[str, str], job: list[str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as a person types it, again while the fresh head does not answer or has no agent."""
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *job]
    deadline = time.monotonic() + 600  # on a loaded machine the agent takes minutes
    while True:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
        is_starting = "No available agent" in done.stderr or "Failed to connect to Ray" in done.stderr
        if not is_starting or time.monotonic() > deadline:
            return done


@pytest.mark.parametrize("spelling", [["python", "jobs/ingest_scenes.py"], ["jobs/ingest_scenes.py"]])
def test_a_submitted_job_joins_the_cluster(environment: dict[str, str], root: str, spelling: list[str]) -> None:
    output = f"chips/submitted_{len(spelling)}/v1"
    job = [*spelling, "configs/ingest_scenes/world.yaml", "cluster/local.yaml"]
    job += [f"cluster.root={root}", f"output={output}", "composites=[]"]
    done = submit(environment, job)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"Job 'raysubmit_\w+' succeeded", done.stdout)
    assert Artifact(root, output).manifest()["counts"]["kept"] > 0


def test_a_submitted_training_trains(environment: dict[str, str], root: str) -> None:
    """The demo's mini model for two steps, one of each phase: Ray Train inside of a submitted job."""
    job = ["python", "jobs/pretrain.py", "configs/pretrain/world.yaml", "cluster/local.yaml", f"cluster.root={root}"]
    job += ["output=model/submitted/v1", "dataset=dataset/tiny/v1", "phases.0.steps=1", "phases.1.steps=1"]
    done = submit(environment, [*job, "batch_size=8"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"Job 'raysubmit_\w+' succeeded", done.stdout)
    trained = Artifact(root, "model/submitted/v1")
    assert (trained.manifest()["counts"]["steps"], trained.manifest()["counts"]["samples_seen"]) == (2, 16)
    assert Path(trained.uri, "model", "model.safetensors").is_file()


def test_a_failing_job_fails(environment: dict[str, str], root: str) -> None:
    job = ["jobs/ingest_scenes.py", "configs/ingest_scenes/world.yaml", "cluster/local.yaml", "chip_size=3"]
    done = submit(environment, job)
    assert done.returncode != 0
    assert "chip_size_px" in done.stdout


def test_the_working_directory_stays_small(tmp_path: Path) -> None:
    """The package that Ray makes of `--working-dir .`: all that jobs need, no artifacts, environment or history."""
    package = tmp_path / "working_dir.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:10]
    assert package.stat().st_size < 2 * 2**20, largest
    folders = {name.split("/")[0] for name in sizes if "/" in name.rstrip("/")}
    assert {"rsplatform", "jobs", "configs", "cluster"} <= folders
    assert not folders & {"artifacts", ".venv", ".git", "tests", "mlruns"}
