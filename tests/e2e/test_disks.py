"""A full and a read-only disk: one sentence and an exit code; with room again, the same command goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsplatform.world.generate import WorldConfig, make_world

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
# A mount of one's own needs a namespace of one's own; as root of it, any user may mount a tmpfs.
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`ingest_scenes` over a small world on a good disk, as one shell line; its root is $ROOT."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces for this user")
    world = tmp_path_factory.mktemp("world")
    size = WorldConfig(scene_size_px=512, num_train_scenes=3, num_val_scenes=1, num_web_pairs=0, num_train_pairs=0)
    make_world(size, world, num_workers=1)
    sources = {
        "scenes": f"[{{path: {world}/scenes}}]",
        "landmarks": f"[{{path: {world}/landmarks.geojson}}]",
        "holdout_scenes": "[]",
        "composites": "[]",
    }
    overrides = " ".join(f"'{key}={value}'" for key, value in sources.items())
    recipe = "configs/ingest_scenes/world.yaml cluster/local.yaml"
    return f"{sys.executable} jobs/ingest_scenes.py {recipe} cluster.root=$ROOT {overrides}"


def run_mounted(script: str, mount_point: Path) -> subprocess.CompletedProcess[str]:
    """Run shell lines in which a tmpfs may be mounted at $ROOT, which vanishes with them."""
    mount_point.mkdir()
    tracking = f"sqlite:///{mount_point.parent}/mlflow.db"  # on a good disk, so that the rows meet the full one
    variables = os.environ | {"ROOT": str(mount_point), "MLFLOW_TRACKING_URI": tracking}
    command = [*NAMESPACE, "sh", "-c", script]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def test_a_disk_that_fills_up_is_named_and_the_job_goes_on_with_room(job: str, tmp_path: Path) -> None:
    script = f"""
        mount -t tmpfs -o size=400k tmpfs $ROOT || exit 90
        {job}; echo "first exit $?"; ls $ROOT/chips/demo/v1 | grep -c manifest
        mount -o remount,size=200m $ROOT || exit 91
        {job} >&2; echo "second exit $?"
        cat $ROOT/chips/demo/v1/manifest.json
    """
    done = run_mounted(script, tmp_path / "disk")
    before, _, manifest = done.stdout.partition("second exit 0\n")
    assert "first exit 1\n0\n" in before, done.stdout + done.stderr
    assert "no space is left on a disk" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    counts = json.loads(manifest)["counts"]
    assert counts["inputs"] == counts["kept"] + sum(counts["dropped"].values()) > 0


def test_a_read_only_disk_is_refused_before_any_work(job: str, tmp_path: Path) -> None:
    done = run_mounted(f"mount -t tmpfs -o ro tmpfs $ROOT || exit 90; {job}", tmp_path / "disk")
    assert done.returncode == 1, done.stderr
    assert "cannot write here (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr
