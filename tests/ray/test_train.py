"""Ray Train: two workers and DeepSpeed give one process's model; a killed worker changes nothing in the weights."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.train import TrainingFailedError
from safetensors.torch import load_file
from watchfiles import watch

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cli import own_error
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.runtime import ray_runtime
from rsplatform.train.checkpoint import CheckpointError
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.launch import pretrain
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.ray
LOCAL = TrainPlacement(launcher="local")


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
    # eps well above rounding: Adam would blow up the rounding in gradients that are zero (a key's bias)
    steady = {"optimizer": {"eps": 1e-4}}
    alone = train(cluster, "alone", LOCAL, **steady)
    two = train(cluster, "two", TrainPlacement(num_workers=2), **steady)
    sharded = train(cluster, "sharded", TrainPlacement(num_workers=2, engine="deepspeed", zero_stage=1), **steady)
    assert greatest_difference(two, alone) < 1e-5
    assert greatest_difference(sharded, alone) < 1e-5
    assert not (Path(two.uri) / "work" / "ray_train").exists()


def test_a_divergence_is_not_retried(cluster: Cluster) -> None:
    phases = [{"name": "mad", "steps": 8, "schedule": {"learning_rate": 1e30, "decay": "constant"}}]
    with pytest.raises(TrainingDivergedError, match="Lower the learning rate"):
        train(cluster, "mad", TrainPlacement(max_failures=3), phases=phases)


def test_a_recipe_that_does_not_fit_is_not_retried(cluster: Cluster) -> None:
    with pytest.raises(RecipeMismatchError, match="^batch_size 7 does not divide among 2 workers"):
        train(cluster, "odd", TrainPlacement(num_workers=2, max_failures=3), batch_size=7)


def test_a_workers_error_of_ours_is_found_in_rays(cluster: Cluster) -> None:
    storage.write_bytes(f"{cluster.root}/model/hurt/v1/checkpoints/step_00000002.safetensors", b"damaged")
    with pytest.raises(TrainingFailedError) as raised:
        train(cluster, "hurt", TrainPlacement(max_failures=0))
    told = own_error(raised.value)
    assert isinstance(told, CheckpointError)
    assert "delete it to resume from the one before" in str(told)


@pytest.mark.parametrize(("num_workers", "engine"), [(1, "plain"), (2, "deepspeed")])
def test_a_killed_worker_changes_nothing(cluster: Cluster, num_workers: int, engine: str) -> None:
    phases = [{"name": "long", "steps": 400, "schedule": {"learning_rate": 1e-3, "warmup_steps": 10}}]
    long = {"phases": phases, "checkpoint_every_steps": 25, "keep_checkpoints": 3, "validation_split": None}
    placement = TrainPlacement.model_validate({"num_workers": num_workers, "engine": engine, "max_failures": 2})
    undisturbed = train(cluster, f"undisturbed-{engine}", placement, **long)
    killed: list[int] = []
    folder = Path(cluster.root) / "model" / f"killed-{engine}" / "v1"
    run_ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, args=(folder, run_ended, killed))
    killer.start()
    try:
        survivor = train(cluster, f"killed-{engine}", placement, **long)
    finally:
        run_ended.set()
        killer.join()
    assert killed, "the run ended before its worker could be killed"
    assert greatest_difference(survivor, undisturbed) == 0.0


def kill_a_worker_after_a_checkpoint(folder: Path, run_ended: threading.Event, killed: list[int]) -> None:
    """SIGKILL one training process of this test's Ray when the first checkpoint of `folder` appears."""
    for changes in watch(folder.parents[2], stop_event=run_ended, step=10):
        if any(path.startswith(f"{folder}/checkpoints/step_") for _, path in changes):
            for pid in descendants(os.getpid()):
                if "RayTrainWorker" in command_line(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return


def descendants(ancestor: int) -> list[int]:
    """Processes whose line of parents leads to `ancestor`; other Ray runtimes on the machine are left alone."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # the process has ended meanwhile
            continue
        parents[int(fields["Pid"])] = int(fields["PPid"])
    found = {ancestor}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted(found - {ancestor})


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
