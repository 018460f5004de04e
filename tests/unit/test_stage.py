"""Stages: no-op, resume, refusal, plans, lineage in MLflow; what failed is told as it failed."""

import os
from pathlib import Path
from typing import Annotated

import pytest

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import InputArtifact, StageConfig, TemplateMarker
from rsplatform.stage import finished, open_stage, plan, recipe_identity


class CopyConfig(StageConfig):
    source: InputArtifact | None = None
    text: str = "hello"
    fails: bool = False


class PairConfig(StageConfig):
    """One job that it runs, and a recipe that it only makes copies of."""

    first: CopyConfig
    sketch: Annotated[CopyConfig, TemplateMarker()]


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


def test_an_input_that_lost_something_is_named_before_any_work(cluster: Cluster) -> None:
    source = copy(CopyConfig(output="text/whole/v1"), cluster)
    config = CopyConfig(output="text/of_damaged/v1", source=source.ref)
    path = Path(source.path("text"))
    path.write_bytes(b"hel")
    with pytest.raises(ArtifactError, match="whole/v1/text has 3 bytes, its manifest says 5; delete"):
        copy(config, cluster)
    path.unlink()
    with pytest.raises(ArtifactError, match="whole/v1/text is missing; delete"):
        copy(config, cluster)
    assert not Path(cluster.root, config.output).exists()
    path.write_bytes(b"hello")
    assert copy(config, cluster).is_finished


def test_an_error_survives_a_tracking_that_fails_too(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: tracking.Run, status: str) -> None:
        raise OSError(f"no {status} can be written")

    monkeypatch.setattr(tracking.Run, "end", broken)
    with pytest.raises(RuntimeError, match="burned"):
        copy(CopyConfig(output="text/doubly_failing/v1", fails=True), cluster)


def test_inputs_of_a_template_are_the_jobs_own_and_its_output_is_nobodys(cluster: Cluster) -> None:
    source = copy(CopyConfig(output="text/source/v1"), cluster)
    sketch = CopyConfig(output="text/sketched/v1", source=source.ref)
    config = PairConfig(output="pair/a/v1", first=CopyConfig(output="text/nested/v1"), sketch=sketch)
    assert recipe_identity(config, cluster)["inputs"] == {source.ref: source.fingerprint()}
    lines = plan(config, cluster)
    assert f"input  sketch.source = {source.ref} (finished)" in lines
    assert [line for line in lines if "output " in line] == [
        f"first: output {cluster.root}/text/nested/v1 (to be made)",
        f"output {cluster.root}/pair/a/v1 (to be made)",
    ]
    missing = config.model_copy(update={"sketch": sketch.model_copy(update={"source": "text/none/v1"})})
    with pytest.raises(ArtifactError, match="text/none/v1 does not exist"):
        recipe_identity(missing, cluster)


def test_params_are_dotted_keys_also_inside_lists(cluster: Cluster) -> None:
    params = {"phases": [{"steps": 3, "rates": (0.1, 0.2)}, {"steps": 4}], "names": [], "replace": {"scenes/": 2}}
    run = tracking.start_run(cluster.root, "pipeline", "lists", params, tags={})
    written = tracking._client(run.uri).get_run(run.run_id).data.params
    assert written == {
        "phases.0.steps": "3",
        "phases.0.rates.0": "0.1",
        "phases.0.rates.1": "0.2",
        "phases.1.steps": "4",
        "names": "[]",
        "replace.scenes_": "2",
    }


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
