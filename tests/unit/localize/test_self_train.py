"""Courses of self-training on a small random model: rounds as artifacts, resume, and no mask in reach."""

import sys
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
import tiny_service
import torch

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.evaluate.run import EvaluateConfig, evaluate
from rsplatform.localize.forgetting import held_out_recall
from rsplatform.localize.run import Sought
from rsplatform.localize.self_train import SelfTrainConfig, has_fallen, rejection, round_ref, self_train
from rsplatform.model.embedder import Embedder
from rsplatform.model.recall import recall_at_k
from rsplatform.records import CHIP_SCHEMA, SAMPLE_SCHEMA
from rsplatform.train.guard import DamagedDataError

CLASSES = [Sought(name="stadium", prompts=["a stadium"]), Sought(name="harbour", prompts=["harbour and water"])]
BACKGROUND = ["an aerial image of a field"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    return Cluster(root=str(root), data_root=str(root))


def plain_course() -> SelfTrainConfig:
    """The recipe of a course on chips/plain/v1."""
    refs = {"model": tiny_service.MODEL, "dataset": "dataset/plain/v1", "chips": "chips/plain/v1"}
    return SelfTrainConfig.model_validate(
        refs | {"output": "model/taught/v1", "classes": CLASSES, "background_prompts": BACKGROUND}
    )


@pytest.fixture(scope="module")
def course(cluster: Cluster) -> SelfTrainConfig:
    """Chips and a dataset of random pictures: the root holds no mask of any kind."""
    rng = np.random.default_rng(1)
    ids = [f"chip-{i}" for i in range(40)]
    images = [tiny_service.jpeg(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in ids]
    rows = [{"id": i, "image": image, "split": "train"} for i, image in zip(ids, images, strict=True)]
    samples = [
        {"id": i, "table": "chips/plain/v1", "row": n, "captions": ["a stadium"], "split": "train"}
        | {"source": "chips", "weight": 1.0}
        for n, i in enumerate(ids)
    ]
    for ref, table, schema, values in (
        ("chips/plain/v1", "chips.lance", CHIP_SCHEMA, rows),
        ("dataset/plain/v1", "samples.lance", SAMPLE_SCHEMA, samples),
    ):
        lance.write_dataset(pa.Table.from_pylist(values, schema=schema), f"{cluster.root}/{ref}/{table}")
        tiny_service.finish(cluster.root, ref)
    small = {"rounds": 2, "steps_per_round": 3, "batch_size": 8, "validation_split": "train"}
    return plain_course().model_copy(update=small)


def test_rounds_are_artifacts_and_stop_when_agreement_falls(cluster: Cluster, course: SelfTrainConfig) -> None:
    artifact = self_train(course, cluster)
    history = storage.read_json(artifact.path("rounds.json"))
    assert 1 <= len(history) <= 2
    for entry in history:
        fell = entry["held_out_agreement"] < entry["held_out_agreement_before"]
        assert entry["rejected"] != "agreement_fell" or fell
    assert not any(entry["rejected"] for entry in history[:-1])  # the first fall is the last round
    first = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    assert history[0]["mean_recall_before"] == held_out_recall(first, cluster.root, course.dataset, "train")
    counts = artifact.manifest()["counts"]
    assert counts["inputs"] == counts["kept"] + sum(counts["dropped"].values()) == len(history)
    taught = Embedder.load(artifact.path("model"))
    rounds = [Artifact(cluster.root, round_ref(course.output, entry["round"])) for entry in history]
    models = [tiny_service.MODEL, *(made.ref for made in rounds)]
    assert [made.manifest()["config"]["model"] for made in rounds] == models[:-1]
    kept = models[sum(not entry["rejected"] for entry in history)]
    assert taught.model_hash == Embedder.load(Path(cluster.root) / kept / "model").model_hash
    assert not Artifact(cluster.root, round_ref(course.output, len(history) + 1)).is_finished
    parent = artifact.manifest()["mlflow_run_id"]
    with tracking._answered(tracking.tracking_uri(cluster.root)) as client:
        runs = [client.get_run(made.manifest()["mlflow_run_id"]) for made in rounds]
    assert all(run.data.tags["mlflow.parentRunId"] == parent and run.info.status == "FINISHED" for run in runs)
    assert not list(Path(cluster.root).rglob("*mask*"))


def test_a_round_is_rejected_for_what_it_lost() -> None:
    agreement = torch.full((20,), 0.5)
    assert rejection(agreement, agreement, None, None) is None
    assert rejection(agreement, agreement - 0.1, 5.0, 9.0) == "agreement_fell"
    assert (
        rejection(agreement, agreement, 5.0, 4.01) is None
        and rejection(agreement, agreement, 5.0, 3.99) == "recall_fell"
    )


def test_held_out_recall_is_that_of_a_split(cluster: Cluster, course: SelfTrainConfig) -> None:
    embedder = Embedder.load(Path(cluster.root) / tiny_service.MODEL / "model")
    samples = lance.dataset(f"{cluster.root}/dataset/plain/v1/samples.lance").to_table().to_pylist()
    names = ["a stadium", "harbour and water", "a field", "a road"]
    few = [sample | {"captions": [names[n], f"no {names[n]}"], "split": "val"} for n, sample in enumerate(samples[:4])]
    table = pa.Table.from_pylist(few, schema=SAMPLE_SCHEMA)
    lance.write_dataset(table, f"{cluster.root}/dataset/few/v1/samples.lance")
    tiny_service.finish(cluster.root, "dataset/few/v1")
    rows = lance.dataset(f"{cluster.root}/chips/plain/v1/chips.lance").to_table().to_pylist()
    images_ID = embedder.embed_images([rows[sample["row"]]["image"] for sample in few])
    texts_TD = embedder.embed_texts([text for sample in few for text in sample["captions"]])
    expected = recall_at_k(images_ID, texts_TD, [0, 0, 1, 1, 2, 2, 3, 3])["mean_recall"]
    assert held_out_recall(embedder, cluster.root, "dataset/few/v1", "val") == expected
    with pytest.raises(ConfigError, match="no samples in split 'test'"):
        held_out_recall(embedder, cluster.root, "dataset/few/v1", "test")


@pytest.mark.parametrize("number", [4, 100, 1000])
def test_agreement_has_fallen_if_chance_does_not_explain_it(number: int) -> None:
    before = torch.rand(number, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(number, generator=torch.Generator().manual_seed(1)) - 0.5
    error = float(noise.std()) / number**0.5
    assert not has_fallen(before, before) and not has_fallen(before, before + noise - noise.mean())
    assert not has_fallen(before, before + noise - noise.mean() - 1.9 * error)
    assert has_fallen(before, before + noise - noise.mean() - 2.1 * error)
    assert has_fallen(before, before - 1e-3)  # all alike: no doubt


def test_any_round_can_be_evaluated(cluster: Cluster, course: SelfTrainConfig) -> None:
    self_train(course, cluster)
    benchmark = {"type": "dataset_retrieval", "name": "own", "dataset": "dataset/plain/v1", "split": "train"}
    config = {"output": "evaluation/round/v1", "model": round_ref(course.output, 1), "benchmarks": [benchmark]}
    report = storage.read_json(evaluate(EvaluateConfig.model_validate(config), cluster).path("report.json"))
    assert report["model"] == round_ref(course.output, 1)


def test_a_damaged_chip_is_named(cluster: Cluster, course: SelfTrainConfig) -> None:
    table = f"{cluster.root}/chips/plain/v1/chips.lance"
    rows = lance.dataset(table).to_table().to_pylist()
    rows[7]["image"] = rows[7]["image"][:200]
    lance.write_dataset(pa.Table.from_pylist(rows, schema=CHIP_SCHEMA), f"{cluster.root}/chips/cut/v1/chips.lance")
    tiny_service.finish(cluster.root, "chips/cut/v1")
    changes = {"output": "model/taught/v3", "chips": "chips/cut/v1"}
    with pytest.raises(ConfigError, match=r"chips/cut/v1: the picture of chip 'chip-7' is unreadable: .*make"):
        self_train(course.model_copy(update=changes), cluster)


def test_a_failed_round_is_told_as_it_failed(
    cluster: Cluster, course: SelfTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever MLflow says when the round's run is to be closed."""
    rows = lance.dataset(f"{cluster.root}/chips/plain/v1/chips.lance").to_table().to_pylist()
    samples = lance.dataset(f"{cluster.root}/dataset/plain/v1/samples.lance").to_table().to_pylist()
    rows = [row | {"image": row["image"][:200]} for row in rows]
    samples = [sample | {"table": "chips/dark/v1"} for sample in samples]
    for ref, table, schema, values in (
        ("chips/dark/v1", "chips.lance", CHIP_SCHEMA, rows),
        ("dataset/dark/v1", "samples.lance", SAMPLE_SCHEMA, samples),
    ):
        lance.write_dataset(pa.Table.from_pylist(values, schema=schema), f"{cluster.root}/{ref}/{table}")
        tiny_service.finish(cluster.root, ref)

    def broken(run: tracking.Run, status: str) -> None:
        raise OSError(f"no {status} can be written")

    monkeypatch.setattr(tracking.Run, "end", broken)
    with pytest.raises(DamagedDataError, match="decoded"):
        self_train(
            course.model_copy(
                update={"output": "model/taught/v4", "dataset": "dataset/dark/v1", "validation_split": None}
            ),
            cluster,
        )


def test_no_mask_is_read(cluster: Cluster, course: SelfTrainConfig) -> None:
    """The same numbers and the same weights in a root without a mask and in one full of unreadable ones."""
    self_train(course, cluster)
    for place in ("world/demo/v1/masks", "chips/plain/v1/masks", "dataset/plain/v1/masks", "scenes/masks"):
        folder = Path(cluster.root) / place
        folder.mkdir(parents=True)
        for name in ("chip-1.png", "train_000.tif"):
            (folder / name).write_bytes(b"poison")
    opened: list[str] = []
    listening = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if listening and event == "open" else None)
    again = self_train(course.model_copy(update={"output": "model/taught/v2"}), cluster)
    listening = False
    assert opened and not [path for path in opened if "mask" in path.lower()]
    first = Artifact(cluster.root, course.output)
    assert storage.read_json(again.path("rounds.json")) == storage.read_json(first.path("rounds.json"))
    assert Embedder.load(again.path("model")).model_hash == Embedder.load(first.path("model")).model_hash


class KilledError(BaseException):
    """Stands for a kill: no handler of errors is meant to catch it."""


@pytest.mark.parametrize(
    "place",
    [
        "-round1/recipe.json",
        "-round1/checkpoints/step_00000002.safetensors",
        "-round1/checkpoints/step_00000003.safetensors",
        "-round1/model/model.safetensors",
        "-round1/manifest.json",
        "v1/model/model.safetensors",
        "v1/rounds.json",
    ],
)
def test_a_course_that_dies_at_any_write_ends_as_if_it_had_not(
    cluster: Cluster, course: SelfTrainConfig, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every durable write goes through one function, which ends the course before that of `place`."""
    whole = self_train(course, cluster)
    output = f"model/killed_{place.strip('-').replace('/', '_')}/v1"
    config, real = course.model_copy(update={"output": output}), storage.write_bytes

    def dying(uri: str, data: bytes | memoryview) -> None:
        if uri.endswith(place):
            raise KilledError(uri)
        real(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", dying)
        patch.setattr("rsplatform.localize.self_train.CHECKPOINT_EVERY_STEPS", 1)
        with pytest.raises(KilledError):
            self_train(config, cluster)
    resumed = self_train(config, cluster)
    assert storage.read_json(resumed.path("rounds.json")) == storage.read_json(whole.path("rounds.json"))
    assert Embedder.load(resumed.path("model")).model_hash == Embedder.load(whole.path("model")).model_hash
