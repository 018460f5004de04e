"""The command line: usage, exit codes, and errors of ours told in one sentence wherever Ray has put them."""

import errno
import logging
import os
import pickle
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cli import _run, own_error
from rsplatform.cluster import Cluster
from rsplatform.config import StageConfig
from rsplatform.curate.pipeline import PipelineError
from rsplatform.model.preprocess import ImageError
from rsplatform.storage import StorageError
from rsplatform.train.checkpoint import CheckpointError
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.world.generate import WorldError
from tests.unit.test_stage import CopyConfig, copy


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A recipe, a cluster file and the root that it names."""
    folder = tmp_path_factory.mktemp("cli")
    places = {"RECIPE": folder / "recipe.yaml", "CLUSTER": folder / "cluster.yaml"}
    places["RECIPE"].write_text("output: text/cli/v1\n")
    places["CLUSTER"].write_text(f"metadata: {{rsplatform: {{root: {folder}/artifacts}}}}\n")
    return {name: str(path) for name, path in places.items()}


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
        (
            ["RECIPE", "CLUSTER", "output=text/cli/v3", "source=text/none/v1", "--dry-run"],
            2,
            [
                "source = text/none/v1 (does not exist: run its job first)",
                "to be made",
                "error: ",
                "/text/none/v1 does not",
            ],
        ),
        (["RECIPE", "CLUSTER", "output=text/cli/v4", "cluster.root=/proc/nowhere"], 1, ["cannot write", "/proc"]),
    ],
)
def test_exit_codes_and_messages(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: list[str]
) -> None:
    assert _run("copy", CopyConfig, copy, "r.yaml c.yaml", [places.get(a, a) for a in arguments]) == code
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.out + captured.err


def outcome_of(
    error: BaseException, places: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> tuple[int, str, bool]:
    """(exit code, what stderr says, whether a traceback is told) of a job that raises `error`."""

    def raises(config: StageConfig, cluster: Cluster) -> Artifact:
        raise error

    with caplog.at_level(logging.INFO):
        code = _run("copy", CopyConfig, raises, "r.yaml c.yaml", [places["RECIPE"], places["CLUSTER"]])
    return code, capsys.readouterr().err, any(record.exc_info for record in caplog.records)


OURS = [
    (ArtifactError("chips/a/v1 is unfinished"), 2),
    (StorageError("/disk: cannot write"), 1),
    (WorldError("the folder holds another world"), 1),
    (PipelineError("nothing was kept"), 1),
    (CheckpointError("step_1: not readable"), 1),
    (TrainingDivergedError("loss is nan at step 3"), 1),
    (ImageError("unreadable", "sample 7"), 1),
]


@pytest.mark.parametrize(("error", "code"), OURS, ids=lambda item: type(item).__name__)
def test_our_errors_are_one_sentence(
    error: Exception,
    code: int,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen, told, has_traceback = outcome_of(error, places, capsys, caplog)
    assert (seen, has_traceback) == (code, False)
    assert str(error) in told and told.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), OURS, ids=lambda item: type(item).__name__)
def test_our_errors_are_found_inside_of_rays(error: Exception, code: int) -> None:
    task = RayTaskError("read", "Traceback: 30 lines", pickle.loads(pickle.dumps(error)))
    wrapped = UserExceptionWithTraceback(error, "Traceback: 30 lines")
    for outer in (task, task.make_dual_exception_instance(), ControllerError(task), wrapped):
        assert str(own_error(outer)) == str(error)
    assert str(own_error(WorkerGroupError("2 failed", {0: KeyError("x"), 1: wrapped}))) == str(error)


def test_a_wrapped_error_keeps_its_exit_code(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    task = RayTaskError("read", "Traceback: 30 lines", ArtifactError("chips/a/v1 is unfinished"))
    assert outcome_of(task, places, capsys, caplog) == (2, "error: chips/a/v1 is unfinished\n", False)


def test_other_errors_keep_their_traceback(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("a bug")
    error.__cause__ = WorldError("told to someone who mishandled it")
    code, told, has_traceback = outcome_of(error, places, capsys, caplog)
    assert (code, has_traceback) == (1, True)
    assert "copy failed" in told and "a bug" in told


def test_a_full_disk_is_one_sentence(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (full, RayTaskError("write", f"Traceback: {full}", full)):
        code, told, has_traceback = outcome_of(error, places, capsys, caplog)
        assert (code, has_traceback) == (1, False)
        assert "no space is left on a disk; make room below metadata.rsplatform.root" in told


def test_ctrl_c_says_how_to_go_on(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert outcome_of(KeyboardInterrupt(), places, capsys, caplog)[:2] == (
        130,
        "stopped; run the same command again to resume\n",
    )


def test_credentials_are_not_told(
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-key-1234")
    told = outcome_of(WorldError("no canary-key-1234 here"), places, capsys, caplog)[1]
    assert "canary" not in told


def test_jobs_find_their_recipes_from_a_folder_elsewhere(places: dict[str, str], capsys, monkeypatch) -> None:
    monkeypatch.chdir(Path(places["RECIPE"]).parent)
    assert _run("copy", CopyConfig, copy, "r.yaml", ["recipe.yaml", "cluster.yaml", "--dry-run"]) == 0
    assert "text/cli/v1" in capsys.readouterr().out
