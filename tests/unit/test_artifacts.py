"""Artifacts: the manifest comes last, reruns are no-ops, other recipes are refused, damage is seen."""

from pathlib import Path

import pytest

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact, ArtifactError


def recipe(**config: object) -> dict:
    return artifacts.identity(dict(config), {"chips/a/v1": "f00d"})


def finish(artifact: Artifact, identity: dict) -> None:
    artifacts.begin(artifact, identity)
    storage.write_bytes(artifact.path("rows.bin"), b"rows")
    counts = {"inputs": 1, "kept": 1, "dropped": {}}
    artifacts.commit(artifact, identity, counts=counts, metrics={"loss": 1.0}, run_id="run")


def test_a_finished_artifact_holds_its_lineage(root: str) -> None:
    artifact = Artifact(root, "chips/a/v1")
    finish(artifact, recipe(size=(64, 64)))
    manifest = artifact.manifest()
    assert manifest["inputs"] == {"chips/a/v1": "f00d"}
    assert manifest["checksums"]["rows.bin"].startswith("sha256:")
    assert manifest["packages"]["torch"] != "absent"
    assert manifest["git_sha"]
    assert artifacts.begin(artifact, recipe(size=(64, 64)))  # tuples and lists are the same recipe


def test_an_unfinished_artifact_is_not_trusted_but_resumed(root: str) -> None:
    artifact = Artifact(root, "chips/a/v1")
    artifacts.begin(artifact, recipe(size=64))
    storage.write_bytes(artifact.path("rows.bin"), b"rows")
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.open_artifact(root, "chips/a/v1")
    artifacts.note_run(artifact, "run-1")
    assert artifacts.begin(artifact, recipe(size=64)) is None
    assert artifacts.noted_run(artifact) == "run-1"


@pytest.mark.parametrize("is_finished", [False, True])
def test_another_recipe_is_refused_with_the_difference(root: str, is_finished: bool) -> None:
    artifact = Artifact(root, "chips/a/v1")
    if is_finished:
        finish(artifact, recipe(size=64))
    else:
        artifacts.begin(artifact, recipe(size=64))
        storage.write_bytes(artifact.path("work/part.bin"), b"rows")
    with pytest.raises(ArtifactError, match=r"config\.size: 64 → 96.*new version"):
        artifacts.begin(artifact, recipe(size=96))
    with pytest.raises(ArtifactError, match="f00d.*beef"):
        artifacts.begin(artifact, artifacts.identity({"size": 64}, {"chips/a/v1": "beef"}))


def test_a_folder_in_which_nothing_was_made_takes_another_recipe(root: str) -> None:
    artifact = Artifact(root, "chips/a/v1")
    artifacts.begin(artifact, recipe(size=64))
    artifacts.note_run(artifact, "run-1")
    for name in ("raw_inputs.json", "work/lease.json", "work/.lease.json.0123abcd"):
        storage.write_bytes(artifact.path(name), b"{}")
    assert artifacts.begin(artifact, recipe(size=64)) is None and artifacts.noted_run(artifact) == "run-1"
    assert artifacts.begin(artifact, recipe(size=96)) is None
    assert artifacts.known_recipe(artifact) == recipe(size=96) and artifacts.noted_run(artifact) is None
    storage.write_bytes(artifact.path("work/part-0.parquet"), b"rows")
    with pytest.raises(ArtifactError, match=r"was begun with another recipe: config\.size: 96 → 64"):
        artifacts.begin(artifact, recipe(size=64))


def test_damage_and_loss_are_found(root: str) -> None:
    artifact = Artifact(root, "chips/a/v1")
    finish(artifact, recipe(size=64))
    artifacts.verify(artifact)
    Path(artifact.path("rows.bin")).write_bytes(b"rots")
    with pytest.raises(ArtifactError, match=r"rows\.bin differs"):
        artifacts.verify(artifact)
    Path(artifact.path("rows.bin")).unlink()
    with pytest.raises(ArtifactError, match=r"rows\.bin is missing"):
        artifacts.verify(artifact)


def test_missing_artifacts_are_named_with_the_remedy(root: str) -> None:
    with pytest.raises(ArtifactError, match=r"chips/none/v1 does not exist; run the job"):
        artifacts.open_artifact(root, "chips/none/v1")


def test_finished_artifacts_are_listed(root: str) -> None:
    finish(Artifact(root, "chips/a/v1"), recipe(size=1))
    finish(Artifact(root, "chips/b/v2"), recipe(size=1))
    artifacts.begin(Artifact(root, "chips/c/v1"), recipe(size=1))
    assert [item.ref for item in artifacts.list_artifacts(root, "chips")] == ["chips/a/v1", "chips/b/v2"]


@pytest.mark.parametrize("document", [b"", b'{"ref": "chips/a', b"\xff\xfe"])
def test_json_that_is_not_whole_is_named_with_the_remedy(root: str, document: bytes) -> None:
    artifact = Artifact(root, "chips/a/v1")
    finish(artifact, recipe(size=64))
    Path(artifact.path(artifacts.MANIFEST)).write_bytes(document)
    remedy = rf"chips/a/v1/manifest\.json is not whole JSON \(.*\); delete the folder {artifact.uri} and run its job"
    with pytest.raises(ArtifactError, match=remedy):
        artifacts.open_artifact(root, artifact.ref)
    with pytest.raises(ArtifactError, match=remedy):
        artifacts.begin(artifact, recipe(size=64))
    Path(artifact.path(artifacts.MANIFEST)).unlink()
    Path(artifact.path(artifacts.RECIPE)).write_bytes(document)
    with pytest.raises(ArtifactError, match=r"recipe\.json is not whole JSON"):
        artifacts.begin(artifact, recipe(size=64))
    with pytest.raises(storage.NotWholeError, match=r"recipe\.json is not whole JSON .* make it again"):
        storage.read_json(artifact.path(artifacts.RECIPE))


def test_writes_are_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.json"
    storage.write_json(str(target), {"a": 1})
    assert storage.read_json(str(target)) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


def test_unwritable_roots_are_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(storage.StorageError, match="cannot write here"):
        storage.check_writable(str(blocker / "root"))
    with pytest.raises(storage.StorageError, match="only local paths and s3"):
        storage.filesystem("ftp://host/x")
