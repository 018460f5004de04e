"""Stages: no-op, resume, refusal, plans, lineage in MLflow; what failed is told as it failed."""

import os
from pathlib import Path
from typing import Annotated

import pytest

from rsplatform import artifacts, storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, InputArtifact, InputPath, StageConfig, TemplateMarker
from rsplatform.stage import check_input_artifacts, finished, open_stage, plan, recipe_identity


class CopyConfig(StageConfig):
    source: InputArtifact | None = None
    text: str = "hello"
    fails: bool = False


class PairConfig(StageConfig):
    """One job that it runs, and a recipe that it only makes copies of."""

    first: CopyConfig
    sketch: Annotated[CopyConfig, TemplateMarker()]


class LaterSection(Config):
    level: int = 1


class LaterCopyConfig(CopyConfig):
    """What CopyConfig is after an upgrade: with a field, and a section, that have defaults."""

    repeats: int = 1
    later: LaterSection = LaterSection()


class ReadConfig(CopyConfig):
    """A stage with raw data."""

    table: InputPath


class TwoConfig(StageConfig):
    """Two jobs that it runs."""

    first: CopyConfig
    second: CopyConfig


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
    config = CopyConfig(output="text/shrunk/v1", source=source.ref)
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


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_field_that_came_later_is_another_recipe_only_if_it_is_set(cluster: Cluster, is_finished: bool) -> None:
    config = CopyConfig(output=f"text/upgraded/{is_finished}", text="first")
    artifact, recipe = Artifact(cluster.root, config.output), recipe_identity(config, cluster)
    artifacts.begin(artifact, recipe)
    storage.write_bytes(artifact.path("text"), b"first")
    if is_finished:
        artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")
    later = LaterCopyConfig(output=config.output, text="first")
    assert plan(later, cluster)
    with pytest.raises(ArtifactError, match="another recipe: config.repeats: 1 → 2. Name"):
        plan(later.model_copy(update={"repeats": 2}), cluster)
    with pytest.raises(ArtifactError, match="another recipe: config.later.level: 1 → 2. Name"):
        plan(later.model_copy(update={"later": LaterSection(level=2)}), cluster)
    with pytest.raises(ArtifactError, match="config.repeats: 3 → None"):
        made = Artifact(cluster.root, f"text/downgraded/{is_finished}")
        after = LaterCopyConfig(output=made.ref, repeats=3)
        artifacts.begin(made, recipe_identity(after, cluster))
        storage.write_bytes(made.path("text"), b"hello")
        plan(CopyConfig(output=made.ref), cluster)
    assert copy(later, cluster).manifest()["config"]["text"] == "first"


def test_a_stage_keeps_what_it_was_begun_with_and_refuses_other_data(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    here = cluster.model_copy(update={"data_root": str(tmp_path)})
    config = ReadConfig(output="text/raw/v1", table="rows.csv", fails=True)
    with pytest.raises(RuntimeError, match="burned"):
        copy(config, here)
    (tmp_path / "rows.csv").write_text("a,b,c\n")
    with pytest.raises(ArtifactError, match=r"begun with other raw data: changed rows\.csv \(4 → 6 bytes\)"):
        copy(config, here)
    done = copy(config.model_copy(update={"output": "text/raw/v2", "fails": False}), here)
    assert done.manifest()["raw_inputs"] == {"rows.csv": {"files": 1, "bytes": 6}}
    assert "raw_inputs.json" in done.manifest()["checksums"]
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ArtifactError, match=r"made with other raw data: changed rows\.csv"):
        copy(config.model_copy(update={"output": "text/raw/v2", "fails": False}), here)


def test_a_job_that_made_nothing_leaves_its_name_to_the_corrected_recipe(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    here = cluster.model_copy(update={"data_root": str(tmp_path)})
    wrong = ReadConfig(output="text/corrected/v1", table="rows.csv", text="wrong")
    with pytest.raises(RuntimeError, match="at once"), open_stage(wrong, here):
        raise RuntimeError("it failed at once")
    (tmp_path / "rows.csv").write_text("a,b,c\n")
    right = wrong.model_copy(update={"text": "right"})
    assert "(unfinished: will be resumed)" in plan(right, here)[-1]
    made = copy(right, here)
    assert made.manifest()["config"]["text"] == "right"
    assert made.manifest()["raw_inputs"]["rows.csv"]["bytes"] == len("a,b,c\n")
    assert copy(right, here) == made
    with pytest.raises(ArtifactError, match="was finished with another recipe"):
        copy(wrong, here)


def test_nothing_is_begun_without_the_raw_data(cluster: Cluster, tmp_path: Path) -> None:
    here = cluster.model_copy(update={"data_root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"table: .*/rows\.csv does not exist"):
        copy(ReadConfig(output="text/raw/v3", table="rows.csv"), here)
    assert not storage.exists(Artifact(cluster.root, "text/raw/v3").uri)


def test_missing_artifacts_are_told_from_unfinished_and_misspelt_ones(cluster: Cluster) -> None:
    source = copy(CopyConfig(output="text/long_name/v1"), cluster)
    artifacts.begin(Artifact(cluster.root, "text/begun/v1"), artifacts.identity({}, {}))
    for ref, state in (
        ("text/begun/v1", "is unfinished (no manifest): run its job first"),
        ("text/lnog_name/v1", f"does not exist (did you mean {source.ref}?): run its job first"),
        ("txet/long_name/v1", f"does not exist (did you mean {source.ref}?): run its job first"),
        ("text/q/v7", "does not exist: run its job first"),
    ):
        config = CopyConfig(output="text/planned/v1", source=ref)
        assert f"input  source = {ref} ({state})" in plan(config, cluster)
        with pytest.raises(ArtifactError, match=f"{ref} .*; run the job that makes {ref} first"):
            check_input_artifacts(config, cluster)


def test_what_a_job_makes_itself_is_no_missing_input(cluster: Cluster) -> None:
    second = CopyConfig(output="text/second_part/v1", source="text/first_part/v1")
    config = TwoConfig(output="pair/b/v1", first=CopyConfig(output="text/first_part/v1"), second=second)
    assert "second: input  source = text/first_part/v1 (made by first)" in plan(config, cluster)
    check_input_artifacts(config, cluster)
    wrong = config.model_copy(update={"second": second.model_copy(update={"source": "text/frist/v1"})})
    with pytest.raises(ArtifactError, match="text/frist/v1 does not exist"):
        check_input_artifacts(wrong, cluster)


def test_a_path_that_a_finished_artifact_lacks_is_named(cluster: Cluster) -> None:
    source = copy(CopyConfig(output="text/holder/v1"), cluster)
    assert plan(ReadConfig(output="text/reader/v1", table=f"artifact://{source.ref}/text"), cluster)
    with pytest.raises(ConfigError, match="table: .*/text/holder/v1/txt does not exist"):
        plan(ReadConfig(output="text/reader/v1", table=f"artifact://{source.ref}/txt"), cluster)


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
