"""Stages and the command line: no-op, resume, refusal, lineage in MLflow, exit codes that say how it went."""

import os
from pathlib import Path

import pytest

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cli import _run
from rsplatform.cluster import Cluster
from rsplatform.config import InputArtifact, StageConfig
from rsplatform.stage import finished, open_stage, plan


class CopyConfig(StageConfig):
    source: InputArtifact | None = None
    text: str = "hello"
    fails: bool = False


def copy(config: CopyConfig, cluster: Cluster) -> Artifact:
    """Write a text."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        storage.write_bytes(stage.artifact.path("text"), config.text.encode())
        stage.log({"length": len(config.text)})
        if config.fails and not os.environ.get("REPAIRED"):
            raise RuntimeError("the disk of the worker burned")
        stage.counts = {"inputs": 1, "kept": 1, "dropped": {}}
    return stage.artifact


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(root=str(tmp_path_factory.mktemp("root")))


def test_lineage_reaches_mlflow_and_a_rerun_does_nothing(cluster: Cluster) -> None:
    first = copy(CopyConfig(output="text/first/v1"), cluster)
    second = copy(CopyConfig(output="text/second/v1", source="text/first/v1", text="s3://b/k?X-Secret=1"), cluster)
    manifest = second.manifest()
    assert manifest["inputs"] == {"text/first/v1": first.fingerprint()}
    client = tracking._client(tracking.tracking_uri(cluster.root))
    run = client.get_run(manifest["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["length"] == 19
    assert run.data.metrics["counts.kept"] == 1
    assert run.data.params["text"] == "s3://b/k"
    assert run.data.tags["input.text/first/v1"] == first.manifest()["mlflow_run_id"]
    num_runs = len(client.search_runs([run.info.experiment_id]))
    assert copy(CopyConfig(output="text/first/v1"), cluster) == first
    assert len(client.search_runs([run.info.experiment_id])) == num_runs
    with pytest.raises(ArtifactError, match=r"config\.text: 'hello' → 'bye'"):
        copy(CopyConfig(output="text/first/v1", text="bye"), cluster)


def test_a_failed_stage_is_resumed_under_the_same_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CopyConfig(output="text/failing/v1", fails=True)
    with pytest.raises(RuntimeError, match="burned"):
        copy(config, cluster)
    assert not Artifact(cluster.root, config.output).is_finished
    with pytest.raises(ArtifactError, match="unfinished"):
        copy(CopyConfig(output="text/after/v1", source=config.output), cluster)
    assert "unfinished: will be resumed" in plan(config, cluster)[-1]
    monkeypatch.setenv("REPAIRED", "1")
    run_id = storage.read_json(Artifact(cluster.root, config.output).path("recipe.json"))["mlflow_run_id"]
    assert copy(config, cluster).manifest()["mlflow_run_id"] == run_id


def test_children_know_their_parent(cluster: Cluster) -> None:
    parent = tracking.start_run(cluster.root, "pipeline", "parent", {}, tags={})
    with tracking.child_runs_of(parent):
        child = tracking.start_run(cluster.root, "pipeline", "child", {}, tags={})
    tags = tracking._client(child.uri).get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_an_unreachable_mlflow_is_named_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(tracking.TrackingError, match=r"127\.0\.0\.1:9 does not answer.*MLFLOW_TRACKING_URI"):
        copy(CopyConfig(output="text/unreachable/v1"), cluster)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(tracking.TrackingError, match="MLFLOW_TRACKING_URI"):
        tracking.tracking_uri("s3://bucket/root")


def test_secrets_stay_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-key-1234")
    assert tracking.redact("see https://h/p?sig=1#x and canary-key-1234") == "see https://h/p and [redacted]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["usage", "python jobs/copy.py"]),
        (["--help"], 0, ["usage", "example", "Write a text"]),
        (["recipe.yaml"], 2, ["expected RECIPE and CLUSTER"]),
        (["RECIPE", "CLUSTER", "--dryrun"], 2, ["--dryrun"]),
        (["RECIPE", "CLUSTER", "--dry-run"], 0, ["output", "to be made"]),
        (["RECIPE", "CLUSTER"], 0, ["copy: ", "text/cli/v1"]),
        (["RECIPE", "CLUSTER", "text=other"], 2, ["config.text", "new version"]),
        (["RECIPE", "CLUSTER", "txt=other"], 2, ["txt", "text"]),
        (["RECIPE", "CLUSTER", "output=text/cli/v2", "fails=true"], 1, ["copy failed", "burned"]),
        (["RECIPE", "CLUSTER", "output=text/cli/v3", "source=text/none/v1"], 2, ["text/none/v1 does not exist"]),
        (["RECIPE", "CLUSTER", "output=text/cli/v4", "cluster.root=/proc/nowhere"], 1, ["cannot write", "/proc"]),
    ],
)
def test_exit_codes_and_messages(
    cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text("output: text/cli/v1\n")
    (tmp_path / "cluster.yaml").write_text(f"metadata: {{rsplatform: {{root: {cluster.root}}}}}\n")
    places = {"RECIPE": str(tmp_path / "recipe.yaml"), "CLUSTER": str(tmp_path / "cluster.yaml")}
    assert _run("copy", CopyConfig, copy, "r.yaml c.yaml", [places.get(a, a) for a in arguments]) == code
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.out + captured.err
