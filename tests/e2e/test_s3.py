"""`s3://` through the same code: a separate S3 server spoken to over TCP by boto3, Arrow, Lance and GDAL."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import httpx
import lance
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import torch
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from rsplatform import artifacts, cli, lease, raw_inputs, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, read_yaml, validate
from rsplatform.curate.caption import CaptionConfig, caption
from rsplatform.curate.chips import IngestScenesConfig, ingest_scenes
from rsplatform.dataset.build import BuildDatasetConfig, build_dataset
from rsplatform.evaluate.run import EvaluateConfig, evaluate
from rsplatform.index.build import BuildIndexConfig, build_index
from rsplatform.lease import BusyError
from rsplatform.ledger import Drop, read_drops, write_drops
from rsplatform.localize.run import LocalizeConfig, localize
from rsplatform.raw_inputs import list_raw_inputs
from rsplatform.runtime import ray_runtime
from rsplatform.shared_file import shared_file
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.launch import PretrainConfig, pretrain
from rsplatform.train.worker import read_history
from rsplatform.world.build import MakeWorldConfig, make_world_artifact
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def s3_root() -> Iterator[str]:
    """A bucket on an S3 server in a process of its own, as root for artifacts."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout
    endpoint = next(match[0] for line in server.stdout if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
    # it logs every request: unread, its pipe would fill up and stop it
    threading.Thread(target=deque, args=(server.stdout, 0), daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        storage.s3_client().create_bucket(Bucket="scenes")
        yield "s3://scenes/root"
    finally:
        server.terminate()
        server.wait(timeout=10)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def test_artifacts_are_committed_verified_and_refused(s3_root: str) -> None:
    artifact = Artifact(s3_root, "chips/a/v1")
    recipe = artifacts.identity({"size": 64}, {})
    assert artifacts.begin(artifact, recipe) is None
    storage.write_bytes(artifact.path("rows.bin"), b"rows")
    write_drops(artifact, "ingest", "part-0", [Drop("x", "nodata")])
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.open_artifact(s3_root, "chips/a/v1")
    artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="run")
    artifacts.verify(artifacts.open_artifact(s3_root, "chips/a/v1"))
    assert read_drops(artifact).num_rows == 1
    assert [item.ref for item in artifacts.list_artifacts(s3_root, "chips")] == ["chips/a/v1"]
    with pytest.raises(ArtifactError, match="64 → 96"):
        artifacts.begin(artifact, artifacts.identity({"size": 96}, {}))
    storage.write_bytes(artifact.path("rows.bin"), b"rots")
    with pytest.raises(ArtifactError, match="differs"):
        artifacts.verify(artifact)


def test_one_driver_at_a_time_is_at_work_in_the_bucket(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(s3_root, "chips/leased/v1")
    with lease.held(artifact), pytest.raises(BusyError, match=f"process {os.getpid()} on"), lease.held(artifact):
        pass
    assert not storage.exists(artifact.path(lease.LEASE))
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with pytest.raises(BusyError, match="another has taken the work over"), lease.held(artifact):
        for _ in range(60):  # this server looks at a condition and writes in two steps: a beat in between undoes it
            storage.write_bytes(artifact.path(lease.LEASE), b"somebody else's")
            threading.Event().wait(1)
    file = shared_file(artifact.path(lease.LEASE))
    found = file.look()
    assert found is not None and found.data == b"somebody else's" and -5 < found.age_s < 60
    assert file.swap(None, b"a second one's") is None
    taken = file.swap(found, b"a third one's")
    assert taken is not None and file.touch(taken) is not None
    assert (file.touch(found), file.swap(found, b"a late one's")) == (None, None)
    file.remove(found)
    assert storage.read_bytes(artifact.path(lease.LEASE)) == b"a third one's"
    file.remove(taken)
    assert file.look() is None and file.touch(taken) is None


def test_lance_reads_and_writes_the_same_place(s3_root: str) -> None:
    uri = f"{s3_root}/tables/rows.lance"
    table = pa.table({"id": ["a", "b", "c"], "value": [1, 2, 3]})
    lance.write_dataset(table, uri, storage_options=storage.lance_options(uri))
    assert lance.dataset(uri, storage_options=storage.lance_options(uri)).take([2, 0])["id"].to_pylist() == ["c", "a"]
    assert any(name.startswith("rows.lance/") for name in storage.list_files(f"{s3_root}/tables"))


def test_gdal_reads_a_scene_from_the_bucket(s3_root: str) -> None:
    pixels = np.arange(3 * 64 * 64, dtype=np.uint8).reshape(3, 64, 64)
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32735"}
    with MemoryFile() as memory:
        with memory.open(**profile, transform=from_origin(500_000, 7_000_000, 2, 2)) as scene:
            scene.write(pixels)
        storage.write_bytes(f"{s3_root}/imagery/scene.tif", memory.read())
    with (
        rasterio.Env(**storage.gdal_options()),
        rasterio.open(storage.gdal_path(f"{s3_root}/imagery/scene.tif"), driver="GTiff") as scene,
    ):
        np.testing.assert_array_equal(scene.read(), pixels)


def test_presigned_links_need_no_credentials(s3_root: str) -> None:
    storage.write_bytes(f"{s3_root}/pictures/a.bin", b"picture")
    link = storage.presigned_url(f"{s3_root}/pictures/a.bin", expires_s=60)
    assert httpx.get(link, trust_env=False).content == b"picture"


def test_folders_travel_both_ways(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "config.json").write_text("{}")
    storage.upload_folder(tmp_path / "model", f"{s3_root}/model")
    with storage.local_folder(f"{s3_root}/model") as folder:
        assert (folder / "deep" / "config.json").read_text() == "{}"
    assert not folder.exists(), "the copy lives as long as its block"
    assert storage.list_folders(f"{s3_root}/model") == ["deep"]


def test_raw_data_of_a_bucket_are_compared_by_their_etags(s3_root: str, tmp_path: Path) -> None:
    """Put again as they are, they are the same; other bytes of the same size are seen; so is a copy on a disk."""
    place = f"{s3_root}/raw"
    for name in ("scenes/a.tif", "scenes/b.tif", "scenes/c.txt", "scenes_of_others/d.tif"):
        storage.write_bytes(f"{place}/{name}", name.encode())
    config = LocalizeConfig.model_validate(recipe("localize/world.yaml", scenes={"path": "scenes"}))
    cluster = Cluster(root=str(tmp_path), data_root=place)
    artifact, listed = Artifact(str(tmp_path), config.output), list_raw_inputs(config, cluster)
    assert list(listed["scenes"].files) == ["a.tif", "b.tif"]
    raw_inputs.record(artifact, listed)
    storage.write_bytes(artifact.path("map.tif"), b"made of them")
    storage.write_bytes(f"{place}/scenes/a.tif", b"scenes/a.tif")
    raw_inputs.check_unchanged(artifact, list_raw_inputs(config, cluster))
    copied = Cluster(root=str(tmp_path), data_root=str(storage.download_folder(place, tmp_path / "copy")))
    raw_inputs.check_unchanged(artifact, list_raw_inputs(config, copied))
    storage.write_bytes(f"{place}/scenes/a.tif", b"scenes/A.tif")
    with pytest.raises(ArtifactError, match=r"changed scenes/a\.tif \(rewritten\)"):
        raw_inputs.check_unchanged(artifact, list_raw_inputs(config, cluster))
    one = LocalizeConfig.model_validate(recipe("localize/world.yaml", scenes={"path": f"{place}/scenes/a.tif"}))
    assert list(list_raw_inputs(one, cluster)[f"{place}/scenes/a.tif"].files) == ["a.tif"]
    none = LocalizeConfig.model_validate(recipe("localize/world.yaml", scenes={"path": f"{place}/scene"}))
    with pytest.raises(ConfigError, match=r"scenes\.path: s3://scenes/root/raw/scene does not exist"):
        list_raw_inputs(none, cluster)
    lost = LocalizeConfig.model_validate(recipe("localize/world.yaml", scenes={"path": "s3://no-such-bucket/x"}))
    with pytest.raises(storage.StorageError, match="'no-such-bucket' cannot be listed"):
        list_raw_inputs(lost, cluster)


def test_a_job_on_a_bucket_gives_links_to_what_a_person_reads(s3_root: str) -> None:
    artifact, identity = Artifact(s3_root, "evaluation/links/v1"), artifacts.identity({}, {})
    artifacts.begin(artifact, identity)
    for name in ("report.json", "rows.bin"):
        storage.write_bytes(artifact.path(name), name.encode())
    artifacts.commit(artifact, identity, counts={}, metrics={}, run_id="run")
    (line,) = cli._links(artifact)
    name, link = line.split(" (link for an hour): ")
    assert name.strip() == "report.json"
    assert httpx.get(link, trust_env=False).content == b"report.json"


def test_a_missing_bucket_is_named(s3_root: str) -> None:
    with pytest.raises(storage.StorageError, match="no-such-bucket.*not reachable"):
        storage.check_writable("s3://no-such-bucket/root")


KILLED_TRAINING = """
import sys
from pathlib import Path
from rsplatform.cluster import Cluster
from rsplatform.train.recipe import PretrainConfig
from tests.processes.killed_training import Kill, pretrain_until_killed

config, cluster, log = PretrainConfig.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
pretrain_until_killed(config, Cluster.model_validate_json(cluster), Kill("save", 0, 5), log)
"""


def test_a_killed_training_goes_on_from_the_bucket_bitwise(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command, at once: weights, moments and history are the undisturbed run's, what is pruned is gone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    cluster = Cluster.model_validate({"root": f"{s3_root}/killed", "train": {"launcher": "local"}})
    make_tiny_dataset(cluster.root)
    changes = {"ema_decay": 0.8, "keep_checkpoints": 1, "report_every_steps": 1}
    whole, killed = (
        PretrainConfig(**tiny_recipe(output=f"model/{name}/v1", **changes)) for name in ("whole", "killed")
    )
    arguments = [killed.model_dump_json(), cluster.model_dump_json(), str(tmp_path / "log")]
    driver = subprocess.run([sys.executable, "-c", KILLED_TRAINING, *arguments], cwd=REPOSITORY)
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    left = CheckpointFolder(f"{cluster.root}/{killed.output}/checkpoints").steps()
    # it dies as it is to save the third one; the second is being written beside the training, or the first pruned
    assert left in ([2], [2, 4], [4])
    found = []
    for config in (whole, killed):
        artifact = pretrain(config, cluster)
        artifacts.verify(artifact)
        checkpoints = CheckpointFolder(artifact.path("checkpoints"))
        assert checkpoints.steps() == [8]
        history = [
            {name: row[name] for name in ("step", "loss")} for row in read_history(artifact.uri) if "loss" in row
        ]
        weights = storage.read_bytes(artifact.path("model/model.safetensors"))
        found.append((checkpoints.load(8)[0], history, weights))
    (expected, *others), (resumed, *same) = found
    assert resumed.keys() == expected.keys() and others == same
    assert [name for name, value in expected.items() if not torch.equal(resumed[name], value)] == []


def recipe(path: str, **changes: object) -> dict:
    """A recipe of the demo world with other values."""
    return read_yaml(REPOSITORY / "configs" / path) | changes


def test_the_chain_runs_on_a_bucket(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """World, chips, captions, dataset, model, evaluation, index and localization, each with s3:// as its root."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    small = {"scene_size_px": 512, "num_train_scenes": 2, "num_val_scenes": 1, "num_web_pairs": 0, "num_train_pairs": 0}
    placement = {"num_actors": 1, "cpus_per_actor": 1, "memory_per_task_gb": 0.5}
    cluster = Cluster.model_validate(
        {"root": f"{s3_root}/chain", "num_cpus": 2, "data": placement, "train": {"launcher": "local"}}
    )
    pretraining = recipe("pretrain/world.yaml", batch_size=16)
    pretraining["phases"] = [{"name": "chips", "steps": 2, "schedule": {"learning_rate": 1e-4}}]
    sources = [{"type": "chips", "chips": "chips/demo/v1", "captions": "captions/demo/v1"}]
    steps = [
        (make_world_artifact, MakeWorldConfig, recipe("make_world/world.yaml", world=small)),
        (ingest_scenes, IngestScenesConfig, recipe("ingest_scenes/world.yaml")),
        (caption, CaptionConfig, recipe("caption/world.yaml")),
        (build_dataset, BuildDatasetConfig, recipe("build_dataset/world.yaml", sources=sources)),
        (pretrain, PretrainConfig, pretraining),
        (evaluate, EvaluateConfig, recipe("evaluate/world.yaml")),
        (build_index, BuildIndexConfig, recipe("build_index/world.yaml")),
        (localize, LocalizeConfig, recipe("localize/world.yaml")),
    ]
    with ray_runtime(cluster):
        made = {
            front_door.__name__: front_door(validate(kind, values, "test"), cluster)
            for front_door, kind, values in steps
        }
    for artifact in made.values():
        artifacts.verify(artifact)
    report = storage.read_json(made["evaluate"].path("report.json"))
    assert report["benchmarks"]["world_val"]["num_images"] > 0
    assert "smooth_miou" in report["benchmarks"]["world_masks"]
    assert storage.exists(made["localize"].path("val_000_mask.tif"))
    assert made["build_index"].manifest()["counts"]["kept"] == made["ingest_scenes"].manifest()["counts"]["kept"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "mlflow" not in str(path)]
