"""Ray Train: any engine and number of workers give one process's model, whatever is lost on the way: a worker, a
machine, the driver."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train import TrainingFailedError
from safetensors.torch import load_file
from watchfiles import watch

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cli import own_error
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.runtime import ray_runtime
from rsplatform.tracking import tracking_uri
from rsplatform.train.checkpoint import CheckpointError, CheckpointFolder
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.launch import pretrain
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import read_history
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.ray
LOCAL = TrainPlacement(launcher="local")
REPOSITORY = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
# eps well above rounding: Adam would blow up the rounding in gradients that are zero (a key's bias)
STEADY = {"optimizer": {"eps": 1e-4}}
LONG = {
    "phases": [{"name": "long", "steps": 400, "schedule": {"learning_rate": 1e-3, "warmup_steps": 10}}],
    "checkpoint_every_steps": 25,
    "keep_checkpoints": 3,
    "validation_split": None,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    cluster = Cluster(root=root, num_cpus=2)
    with ray_runtime(cluster):
        yield cluster


def train(cluster: Cluster, name: str, placement: TrainPlacement, **changes) -> Artifact:
    recipe = PretrainConfig(**tiny_recipe(output=f"model/{name}/v1", **changes))
    return pretrain(recipe, cluster.model_copy(update={"train": placement}))


def weights_of(artifact: Artifact) -> dict:
    return load_file(Path(artifact.uri) / "model" / "model.safetensors")


def greatest_difference(first: Artifact, second: Artifact) -> float:
    expected = weights_of(second)
    return max(float((value - expected[name]).abs().max()) for name, value in weights_of(first).items())


def test_ray_and_this_process_train_the_same_model(cluster: Cluster) -> None:
    alone = train(cluster, "alone", LOCAL, **STEADY)
    losses = [(row["step"], row["loss"]) for row in read_history(alone.uri) if "loss" in row]
    for engine in ("plain", "fsdp", "deepspeed"):
        placement = TrainPlacement.model_validate({"num_workers": 2, "engine": engine})
        two = train(cluster, f"two-{engine}", placement, **STEADY)
        assert greatest_difference(two, alone) < 1e-5
        same = [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in read_history(two.uri) if "loss" in row]
        assert losses == same
        assert not (Path(two.uri) / "work" / "ray_train").exists()


def test_a_divergence_is_not_retried(cluster: Cluster) -> None:
    phases = [{"name": "mad", "steps": 8, "schedule": {"learning_rate": 1e30, "decay": "constant"}}]
    with pytest.raises(TrainingDivergedError, match="Lower the learning rate"):
        train(cluster, "mad", TrainPlacement(max_failures=3), phases=phases)


def test_a_recipe_that_does_not_fit_is_not_retried(cluster: Cluster) -> None:
    phase = {"name": "odd", "steps": 8, "schedule": {"learning_rate": 1e-3}, "mixture": {"elsewhere": 1.0}}
    with pytest.raises(RecipeMismatchError, match="^phase odd: mixture names elsewhere"):
        train(cluster, "odd", TrainPlacement(max_failures=3), phases=[phase])


def test_a_workers_error_of_ours_is_found_in_rays(cluster: Cluster) -> None:
    storage.write_bytes(f"{cluster.root}/model/hurt/v1/checkpoints/step_00000002.safetensors", b"damaged")
    with pytest.raises(TrainingFailedError) as raised:
        train(cluster, "hurt", TrainPlacement(max_failures=0))
    told = own_error(raised.value)
    assert isinstance(told, CheckpointError)
    assert "delete it to resume from the one before" in str(told)


@pytest.mark.parametrize(("num_workers", "engine"), [(1, "plain"), (2, "deepspeed")])
def test_a_killed_worker_changes_nothing(cluster: Cluster, num_workers: int, engine: str) -> None:
    placement = TrainPlacement.model_validate({"num_workers": num_workers, "engine": engine, "max_failures": 2})
    undisturbed = train(cluster, f"undisturbed-{engine}", placement, **LONG)
    folder = Path(cluster.root) / "model" / f"killed-{engine}" / "v1"
    with once(folder / "checkpoints", lambda: kill_first(workers_below(os.getpid()))):
        survivor = train(cluster, f"killed-{engine}", placement, **LONG)
    assert greatest_difference(survivor, undisturbed) == 0.0


def test_ctrl_c_stops_a_training_that_goes_on_later(cluster: Cluster, ctrl_c: None) -> None:
    folder = Path(cluster.root) / "model" / "stopped" / "v1"
    with once(folder / "checkpoints", press_ctrl_c), pytest.raises(KeyboardInterrupt):
        train(cluster, "stopped", TrainPlacement(), **LONG)
    assert not Artifact(cluster.root, "model/stopped/v1").is_finished
    resumed = train(cluster, "stopped", TrainPlacement(), **LONG)
    assert greatest_difference(resumed, Artifact(cluster.root, "model/undisturbed-plain/v1")) == 0.0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a later Ctrl-C is not Ray Train's either"


def test_a_machine_that_is_taken_away_leaves_its_share_to_the_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with a worker each; of one it is said that it goes, as cluster/spot_notice.sh does, and it is gone
    when the checkpoint of that notice is there.

    No failure is allowed, so that it has to be a preemption, and no other checkpoint is due.
    """
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # for two workers while one machine is going
    schedule = {"learning_rate": 1e-4, "warmup_steps": 10}
    # a low rate: rounding, which differs between one and two workers, must not grow beyond the tolerance
    changes = {"phases": [{"name": "longer", "steps": 600, "schedule": schedule}], "checkpoint_every_steps": None}
    recipe = STEADY | LONG | changes | {"report_every_steps": 10}
    alone = train(cluster, "unshared", LOCAL, **recipe)
    budgets = {"max_failures": 0, "max_preemptions": 1}
    elastic = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1.25}  # one to a machine, with one thread
    placement = TrainPlacement.model_validate(elastic | budgets | {"checkpoint_every_minutes": 60})
    client = MlflowClient(tracking_uri(cluster.root))
    saved = Path(cluster.root) / "model" / "elastic" / "v1" / "checkpoints"
    with (
        second_machine() as machine,
        once(Path(cluster.root), lambda: announce_if_it_trains(machine, client)),
        once(saved, lambda: take_away(machine)),
    ):
        shared = train(cluster, "elastic", placement, **recipe)
    assert greatest_difference(shared, alone) < 1e-4
    noticed, last = CheckpointFolder(f"{shared.uri}/checkpoints").steps()
    assert 0 < noticed < last == 600
    workers = client.get_metric_history(shared.manifest()["mlflow_run_id"], "train/workers")
    assert [(metric.step, metric.value) for metric in workers] == [(0, 2), (noticed, 1)]


def test_a_lost_driver_is_made_up_for_by_the_same_command(cluster: Cluster, tmp_path: Path) -> None:
    """Its workers go with it, and the next ones go on from the newest checkpoint."""
    alone = train(cluster, "undriven", LOCAL, **LONG)
    recipe, places = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(json.dumps(tiny_recipe(output="model/driven/v1", **LONG)))
    places.write_text(json.dumps({"metadata": {"rsplatform": {"root": cluster.root}}}))
    command = [sys.executable, str(REPOSITORY / "jobs" / "pretrain.py"), str(recipe), str(places)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(command, env=environment)
    with once(Path(cluster.root) / "model" / "driven" / "v1" / "checkpoints", lambda: driver.kill() or True):
        driver.wait()
    made = Artifact(cluster.root, "model/driven/v1")
    assert not made.is_finished
    subprocess.run(command, env=environment, check=True)
    assert made.is_finished
    assert greatest_difference(made, alone) == 0.0


@contextlib.contextmanager
def once(folder: Path, act: Callable[[], bool]) -> Iterator[None]:
    """Call `act` whenever a file below `folder` changes, until it says that it did what it had to do.

    Raises:
        AssertionError: the block ended before.
    """
    done, ended = threading.Event(), threading.Event()

    def look() -> None:
        for changes in watch(folder_that_is(folder), stop_event=ended, step=10):
            is_there = any(Path(path).is_relative_to(folder) and not path.endswith(".tmp") for _, path in changes)
            if is_there and act():
                done.set()
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert done.is_set(), "the block ended before anything could be done to it"


def press_ctrl_c() -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return True


def folder_that_is(folder: Path) -> Path:
    return folder if folder.exists() else folder_that_is(folder.parent)


def announce_if_it_trains(machine: subprocess.Popen, client: MlflowClient) -> bool:
    """Tell Ray that the second machine will be taken away in five seconds; what takes it away is somebody else's."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'RUNNING'")
    if not workers_below(machine.pid) or not any("train/loss" in run.data.metrics for run in runs):
        return False
    here = ray.get_runtime_context().get_node_id()
    (there,) = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    command = [str(RAY), "drain-node", f"--address={ray.get_runtime_context().gcs_address}", f"--node-id={there}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=5"]
    subprocess.run(command, check=True)
    return True


def take_away(machine: subprocess.Popen) -> bool:
    """Kill all processes of a machine at once."""
    for process in [*psutil.Process(machine.pid).children(recursive=True), psutil.Process(machine.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return True


def kill_first(workers: list[int]) -> bool:
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
    return bool(workers)


@contextlib.contextmanager
def second_machine() -> Iterator[subprocess.Popen]:
    """A node of this test's Ray with two cores."""
    folder = tempfile.mkdtemp(prefix="rs-")  # short: Unix sockets below it have paths of at most 107 bytes
    command = [str(RAY), "start", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", "--node-ip-address=127.0.0.1"]
    machine = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert machine.stdout
    try:
        assert any("Ray runtime started" in line for line in machine.stdout), "ray start ended without a runtime"
        threading.Thread(target=machine.stdout.read, daemon=True).start()  # unread, its pipe would fill up
        # by itself, what tells Ray Train the cluster's size looks every 20 seconds
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("nobody", recompute=True))
        yield machine
    finally:
        if machine.poll() is None:
            take_away(machine)
        machine.wait()
        shutil.rmtree(folder, ignore_errors=True)


def workers_below(ancestor: int) -> list[int]:
    """Processes of Ray Train workers whose line of parents leads to `ancestor`; other runtimes are left alone."""
    found = []
    for process in psutil.Process(ancestor).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process.pid)
    return found
