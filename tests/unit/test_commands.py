"""The last lines of the demo: what they say to type starts this run's index, wherever and whatever it was."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from rsplatform import commands
from rsplatform.cluster import Cluster, load_cluster
from rsplatform.config import load_config
from rsplatform.serve.deployment import ServeConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def printed(recipe: str, cluster: Cluster, *overrides: str) -> str:
    serve = load_config(ServeConfig, REPOSITORY / "configs" / "serve" / f"{recipe}.yaml", list(overrides))
    return "\n".join(commands.lines(serve, cluster))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_default_demo_needs_no_variables() -> None:
    text = printed("world", load_cluster("cluster/local.yaml"))
    assert text == (
        "what every job recorded: make mlflow\nsearch it yourself:      make serve    then open http://127.0.0.1:8000"
    )


def test_recipe_root_and_placement_are_named_where_they_differ() -> None:
    cluster = load_cluster("cluster/local.yaml", ["root=/elsewhere/a b", "serve.port=0"])
    text = printed("real", cluster, "smooth_attention_window=5")
    assert "make mlflow ROOT='/elsewhere/a b'" in text
    assert "make serve RECIPE=real CLUSTER=" in text
    assert "the address that it prints" in text


def test_a_server_of_the_environment_is_named_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert "open http://127.0.0.1:5000" in printed("world", load_cluster("cluster/local.yaml"))


def test_make_gives_the_job_just_this_recipe_and_placement(tmp_path: Path) -> None:
    """`make --dry-run` of the printed line, read back by the same functions as the job reads its arguments."""
    cluster = load_cluster("cluster/local.yaml", [f"root={tmp_path}/a b", "serve.port=8123"])
    text = printed("real", cluster, "smooth_attention_window=5", "model=model/other/v1")
    line = next(line for line in text.splitlines() if "make serve" in line)
    command = shlex.split(line[line.index("make serve") : line.index("    then open")])
    # as a person types it: below `make test` the inner make would tell its directory last
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    told = subprocess.run([*command, "--dry-run"], env=shell, capture_output=True, text=True, check=True).stdout
    arguments = shlex.split(told.splitlines()[-1])
    paths, overrides = arguments[2:4], arguments[4:]
    assert paths == ["configs/serve/real.yaml", "cluster/local.yaml"]
    placed = [item.removeprefix("cluster.") for item in overrides if item.startswith("cluster.")]
    serve = load_config(ServeConfig, paths[0], [item for item in overrides if not item.startswith("cluster.")])
    assert load_cluster(paths[1], placed) == cluster
    assert (serve.model, serve.smooth_attention_window, serve.output) == ("model/other/v1", 5, "deployment/real/v1")
