"""Following a training: each checkpoint scores as its weights do, nothing is scored twice, a half follow goes on."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster, FollowPlacement, TrainPlacement
from rsplatform.config import ConfigError, validate
from rsplatform.dataset.store import SampleStore
from rsplatform.evaluate import follow as follow_module
from rsplatform.evaluate.follow import FollowConfig, FollowError, follow, next_step
from rsplatform.evaluate.run import EvaluateConfig, evaluate
from rsplatform.model.embedder import Embedder
from rsplatform.model.recall import recall_at_k
from rsplatform.model.weights import load_model
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import Recorder
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

BENCHMARKS = [{"type": "dataset_retrieval", "name": "val", "dataset": "dataset/tiny/v1"}]
IMPATIENT = FollowPlacement(patience_minutes=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    return Cluster(root=root, train=TrainPlacement(launcher="local"), follow=IMPATIENT)


def train(cluster: Cluster, name: str, **changes) -> Artifact:
    recipe = tiny_recipe(output=f"model/{name}/v1", keep_checkpoints=9, validation_split=None) | changes
    return pretrain(PretrainConfig(**recipe), cluster)


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Artifact:
    return train(cluster, "tiny", ema_decay=0.5)


def config(model: str, output: str = "evaluation_curve/tiny/v1", **changes) -> FollowConfig:
    values = {"output": output, "model": model, "benchmarks": BENCHMARKS}
    return validate(FollowConfig, values | changes, "test")


def scores(artifact: Artifact) -> dict[int, dict]:
    rows = storage.read_json(artifact.path("scores.json"))["checkpoints"]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}


def tracked(cluster: Cluster, run_id: str, name: str) -> dict[int, float]:
    history = MlflowClient(tracking.tracking_uri(cluster.root)).get_metric_history(run_id, name)
    assert len({metric.step for metric in history}) == len(history)
    return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="module")
def followed(trained: Artifact, cluster: Cluster) -> Artifact:
    return follow(config(trained.ref), cluster)


def recalls_of(trained: Artifact, step: int) -> dict[str, float]:
    """The averaged weights of one checkpoint, scored without our jobs."""
    tensors = load_file(Path(trained.uri) / f"checkpoints/step_{step:08d}.safetensors")
    model, tokenizer = load_model(Path(trained.uri) / "model")
    model.load_state_dict({name.removeprefix("ema/"): tensors[name] for name in tensors if name.startswith("ema/")})
    embedder = Embedder(model, tokenizer)
    store = SampleStore(trained.root, "dataset/tiny/v1", "val")
    samples = store.read(np.arange(len(store)))
    texts = [text for sample in samples for text in sample.captions]
    owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
    images_IE = embedder.embed_images([sample.image for sample in samples])
    return recall_at_k(images_IE, embedder.embed_texts(texts), owners)


def test_each_checkpoint_scores_as_its_weights_do(followed: Artifact, trained: Artifact, cluster: Cluster) -> None:
    found = scores(followed)
    assert list(found) == [2, 4, 6, 8]
    for step, row in found.items():
        expected = recalls_of(trained, step)
        assert {name: row["benchmarks"]["val"][name] for name in expected} == expected
    assert len({row["model_hash"] for row in found.values()}) == 4


def test_the_last_checkpoint_is_the_finished_model(followed: Artifact, trained: Artifact, cluster: Cluster) -> None:
    recipe = {"output": "evaluation/tiny/v1", "model": trained.ref, "benchmarks": BENCHMARKS}
    report = storage.read_json(evaluate(validate(EvaluateConfig, recipe, "test"), cluster).path("report.json"))
    last = scores(followed)[8]
    assert (last["benchmarks"], last["model_hash"]) == (report["benchmarks"], report["model_hash"])


def test_the_numbers_stand_in_the_trainings_own_run(followed: Artifact, trained: Artifact, cluster: Cluster) -> None:
    expected = {step: row["benchmarks"]["val"]["mean_recall"] for step, row in scores(followed).items()}
    assert tracked(cluster, trained.manifest()["mlflow_run_id"], "evaluation/val/mean_recall") == expected
    own_run = followed.manifest()["mlflow_run_id"]
    assert tracked(cluster, own_run, "val/mean_recall") == expected
    pictures = storage.list_files(f"{cluster.root}/mlflow-artifacts/{own_run}/artifacts")
    assert {"step_00000002/val_recall.png", "step_00000008/val_recall.png"} <= set(pictures)
    assert follow(config(trained.ref), cluster) == followed
    assert tracked(cluster, own_run, "val/mean_recall") == expected, "a second call scores nothing again"


def test_a_follow_that_broke_goes_on_and_repeats_nothing(
    trained: Artifact, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, read = config(trained.ref, "evaluation_curve/broken/v1"), CheckpointFolder.read

    def read_or_break(self: CheckpointFolder, step: int, prefix: str):
        if step == 6:
            raise OSError("the disk is gone")
        return read(self, step, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "read", read_or_break)
        with pytest.raises(OSError, match="disk"):
            follow(recipe, cluster)
    half = scores(Artifact(cluster.root, recipe.output))
    assert list(half) == [2, 4]
    whole = follow(recipe, cluster)
    assert list(scores(whole)) == [2, 4, 6, 8]
    assert list(tracked(cluster, whole.manifest()["mlflow_run_id"], "val/t2i_r1")) == [2, 4, 6, 8]
    assert whole.manifest()["counts"] == {"checkpoints": 4, "last_step": 8}


def test_a_checkpoint_that_is_pruned_meanwhile_is_left_out(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, read = train(cluster, "pruned"), CheckpointFolder.read

    def prune_then_read(self: CheckpointFolder, step: int, prefix: str):
        if step == 4:
            (Path(self.uri) / "step_00000004.safetensors").unlink()
        return read(self, step, prefix)

    monkeypatch.setattr(CheckpointFolder, "read", prune_then_read)
    assert list(scores(follow(config(trained.ref, "evaluation_curve/pruned/v1"), cluster))) == [2, 6, 8]


def test_a_checkpoint_that_is_lost_while_it_is_scored_is_scored_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes go, as those of a mapped file do where a network disk takes them away."""
    trained = train(cluster, "lost", ema_decay=0.5)
    files = sorted((Path(trained.uri) / "checkpoints").iterdir())
    expected = {step: recalls_of(trained, step) for step in (2, 4, 6, 8)}
    model_of_checkpoint = follow_module.model_of_checkpoint

    def lose_after_reading(recipe: PretrainConfig, root: str, checkpoints: CheckpointFolder, step: int):
        model = model_of_checkpoint(recipe, root, checkpoints, step)
        with files[step // 2 - 1].open("r+b") as file:
            file.write(b"\0" * files[step // 2 - 1].stat().st_size)
        return model

    monkeypatch.setattr(follow_module, "model_of_checkpoint", lose_after_reading)
    found = scores(follow(config(trained.ref, "evaluation_curve/lost/v1"), cluster))
    assert {step: {name: row["benchmarks"]["val"][name] for name in expected[step]} for step, row in found.items()} == (
        expected
    )


def test_what_the_training_keeps_is_scored_however_late(cluster: Cluster) -> None:
    """Every fourth step although only the newest checkpoint stays, and the last one: nothing depends on the clock."""
    trained = train(
        cluster, "kept", keep_checkpoints=1, keep_every_steps=4, checkpoint_every_steps=1, report_every_steps=1
    )
    assert CheckpointFolder(f"{trained.uri}/checkpoints").steps() == [4, 8]
    late = follow(config(trained.ref, "evaluation_curve/kept/v1", every_steps=4), cluster)
    assert list(scores(late)) == [4, 8]


def test_a_training_is_followed_while_it_runs(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, save = config("model/live/v1", "evaluation_curve/live/v1"), Recorder.save

    def save_then_break(self: Recorder, tensors, progress) -> None:
        save(self, tensors, progress)
        if progress.step == 4:
            raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "save", save_then_break)
        with pytest.raises(OSError, match="network"):
            train(cluster, "live", keep_checkpoints=2)
    with pytest.raises(FollowError, match="run the same command again"):
        follow(recipe, cluster)
    assert list(scores(Artifact(cluster.root, recipe.output))) == [2, 4]
    training = threading.Thread(target=train, args=(cluster, "live"), kwargs={"keep_checkpoints": 2})
    training.start()
    patient = cluster.model_copy(update={"follow": FollowPlacement(poll_seconds=1, patience_minutes=3)})
    found = list(scores(follow(recipe, patient)))
    training.join()
    assert found in ([2, 4, 6, 8], [2, 4, 8]), "nothing twice, the last one for sure"


def test_which_checkpoint_is_due() -> None:
    assert next_step([2, 4, 6], [], 1, False) == 2
    assert next_step([2, 4, 6], [2], 1, False) == 4
    assert next_step([2, 4, 6], [2], 4, False) == 6
    assert next_step([2, 4, 6], [2], 5, False) is None
    assert next_step([2, 4, 6], [2], 5, True) == 6, "the last one of a finished training"
    assert next_step([2, 4, 6], [2, 6], 1, True) is None, "one that was kept as the best and is older"
    assert next_step([], [], 1, True) is None
    assert next_step([3, 4, 5, 8], [], 4, False, are_kept=True) == 4, "the multiples, not the first that is far enough"
    assert next_step([4, 9], [4], 4, False, are_kept=True) is None, "the eighth is still to come"
    assert next_step([4, 9], [4], 4, True, are_kept=True) == 9, "the last one of a finished training"


def test_what_cannot_be_followed_is_refused(followed: Artifact, trained: Artifact, cluster: Cluster) -> None:
    with pytest.raises(ArtifactError, match="start its pretrain job first"):
        follow(config("model/absent/v1"), cluster)
    with pytest.raises(ConfigError, match="missing key"):
        follow(config("dataset/tiny/v1"), cluster)
    other = train(cluster, "other")
    with pytest.raises(ArtifactError, match="with another recipe: config.model"):
        follow(config(other.ref), cluster)
    recipe = config(other.ref, "evaluation_curve/other/v1")
    follow(recipe, cluster)
    shutil.rmtree(other.uri)
    train(cluster, "other")
    with pytest.raises(ArtifactError, match="scores of an earlier training"):
        follow(recipe, cluster)
