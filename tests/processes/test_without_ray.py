"""The job as a person types it with the local launcher, in a process that cannot import Ray."""

import subprocess
import sys
from pathlib import Path

import yaml

from rsplatform.artifacts import Artifact
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]

BLOCKED = """
import runpy, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoRay())
sys.argv = ["jobs/pretrain.py", *sys.argv[1:]]
runpy.run_path("jobs/pretrain.py", run_name="__main__")
"""


def test_the_local_launcher_trains_where_ray_is_not_installed(tmp_path: Path) -> None:
    make_tiny_dataset(str(tmp_path / "root"))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(phases=tiny_recipe()["phases"][:1])))
    arguments = [str(recipe), "cluster/local.yaml", f"cluster.root={tmp_path}/root", "cluster.train.launcher=local"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert Artifact(str(tmp_path / "root"), "model/tiny/v1").manifest()["counts"]["steps"] == 3
