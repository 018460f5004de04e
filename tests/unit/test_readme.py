"""The README's commands work: a job's example is that of its usage, after the demo and before it, and the chain over
data of one's own is whole."""

import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact
from rsplatform.config import iter_inputs, load_config, nested_jobs
from rsplatform.demo import DemoConfig

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in REPOSITORY.glob("jobs/*.py"))
README = (REPOSITORY / "README.md").read_text()
TABLE = re.findall(r"^\| `(\w+)` \|.*\| `python (jobs/\S+\.py [^`]+)` \|$", README, re.M)


def run(arguments: list[str]) -> int:
    """The exit code of a job's file, started as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / arguments[0]), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def example(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Script and arguments of the example that a job prints when it is given none."""
    assert run([f"jobs/{request.param}.py"]) == 2
    (line,) = re.findall(r"^example: python (.*)$", capsys.readouterr().err, re.M)
    return shlex.split(line)


of_each_job = functools.partial(pytest.mark.parametrize, "example", JOBS, indirect=True)


def test_the_readme_has_a_line_for_each_job() -> None:
    assert sorted(job for job, _ in TABLE) == JOBS


@of_each_job()
def test_the_readme_shows_the_example_of_the_usage(example: list[str]) -> None:
    (shown,) = [line for job, line in TABLE if example[0] == f"jobs/{job}.py"]
    assert shlex.split(shown) == example


def finish(root: str, name: str) -> None:
    """Put an artifact, or a path in one, where a job looks for it: a manifest, and a file with nothing in it."""
    storage.write_bytes(f"{root}/{name}/file", b"")
    artifact = Artifact(root, "/".join(name.split("/")[:3]))
    artifacts.commit(artifact, artifacts.identity({}, {}), counts={}, metrics={}, run_id="none")


@of_each_job()
def test_an_example_passes_a_dry_run_once_its_inputs_stand(
    example: list[str], root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, the dry run shows the plan, says what is missing and exits as the job would."""
    monkeypatch.chdir(REPOSITORY)
    arguments = [*example, f"cluster.root={root}", "--dry-run"]
    code, printed = run(arguments), capsys.readouterr()
    missing = re.findall(r"^input  \S+ = (?:artifact://)?(\S+) \(does not exist", printed.out, re.M)
    assert code == (2 if missing else 0), printed.err
    assert "to be made" in printed.out
    if missing:
        first = "/".join(missing[0].split("/")[:3])
        assert f"/{first} does not exist; run the job that makes {first} first" in printed.err
    for name in missing:
        finish(root, name)
    code, printed = run(arguments), capsys.readouterr()
    assert code == 0, printed.err
    assert "to be made" in printed.out


@of_each_job()
def test_a_changed_recipe_names_an_output_of_its_own(example: list[str]) -> None:
    """Else the person who has just run `make demo` is refused, and one who has not takes the demo's address away."""
    changes = [item for item in example if "=" in item and not item.startswith("cluster.")]
    assert not changes or any(item.startswith("output=") for item in changes)


def test_the_chain_over_own_data_reads_what_it_has_made(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line passes a dry run with nothing but scenes, landmarks and what the lines above make."""
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "north_1.tif").touch()
    (tmp_path / "landmarks.geojson").touch()
    monkeypatch.chdir(REPOSITORY)
    (block,) = re.findall(r'^own="(.*)"\n(.*?)^```', README, re.M | re.S)
    own = block[0].replace("/your/data", str(tmp_path)).split()
    made: set[str] = set()
    for line in block[1].replace("\\\n", " ").splitlines():
        python, script, recipe, variable, *changes = shlex.split(line)
        assert (python, variable) == ("python", "$own")
        code = run([script, recipe, *own, *changes, f"cluster.root={root}", "--dry-run"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        outputs = re.findall(rf"^output {re.escape(root)}/(\S+) \(to be made\)", printed.out, re.M)
        for ref in outputs:
            finish(root, ref)
        made |= set(outputs)
    assert {ref.split("/")[0] for ref in made} >= {"model", "evaluation", "localization", "deployment"}


def test_the_tree_of_public_data_shows_every_folder_that_the_real_recipe_reads() -> None:
    config = load_config(DemoConfig, REPOSITORY / "configs/demo/real.yaml")
    places = [item.value for job in nested_jobs(config).values() for item in iter_inputs(job) if item.artifact is None]
    shown = re.findall(r"^(\w+/)  ", README, re.M)
    assert {f"{place.split('/')[0]}/" for place in places} == set(shown)
