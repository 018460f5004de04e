"""The README's examples are commands that work: each line of its table of jobs passes a dry run."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"\| `python (jobs/\S+\.py [^`]+)` \|", (REPOSITORY / "README.md").read_text())


def test_every_job_has_an_example() -> None:
    assert {example.split()[0] for example in EXAMPLES} == {
        f"jobs/{path.name}" for path in REPOSITORY.glob("jobs/*.py")
    }


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_passes_a_dry_run(
    example: str, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [*shlex.split(example), f"cluster.root={root}", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert "to be made" in printed.out


@pytest.mark.parametrize("example", [example for example in EXAMPLES if "=" in example])
def test_a_changed_recipe_names_an_output_of_its_own(example: str) -> None:
    """Else the person who has just run `make demo` is refused: that version stands under another recipe."""
    assert " output=" in example
