"""The main job as a person runs it: a small cut of each recipe, from the command line to the closing summary."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from watchfiles import watch

from rsplatform import tracking
from rsplatform.artifacts import MANIFEST, Artifact, verify
from rsplatform.ledger import read_drops

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 900
MARK = "RSPLATFORM_DEMO_TEST"

SMALL_WORLD = [
    "world.world={seed: 7, scene_size_px: 768, num_train_scenes: 6, num_val_scenes: 2, num_web_pairs: 200, "
    "num_train_pairs: 160}",
    "train_overhead.epochs=8",
    "pretrain.phases.0.steps=5",
    "pretrain.phases.1.steps=120",
    "pretrain.checkpoint_every_steps=25",
    "tune.num_trials=2",
    "tune.recipe.phases.0.steps=20",
    "self_train.steps_per_round=10",
    "self_train.max_chips=60",
    "checks.min_recall_over_chance=1.5",
    "checks.segmentation=null",  # so short a training promises nothing about smoothing
]
FEW_IMAGES = (100, 60, 4, 1)  # of each benchmark of the real recipe
SMALL_REAL = [
    *(f"evaluate.benchmarks.{i}.max_images={number}" for i, number in enumerate(FEW_IMAGES)),
    *(f"evaluate_self_trained.benchmarks.{i}.max_images={number}" for i, number in enumerate(FEW_IMAGES)),
    "ingest_scenes.scenes.0.pattern='*_b_z21.tif'",
    "train_overhead.training.0.source.rows={stop: 100}",
    "train_overhead.training.1.source.rows={stop: 100}",
    "train_overhead.epochs=3",
    "filter_web.candidates.0.rows={start: 400, stop: 800}",
    "pretrain.phases.0.steps=6",
    "tune.num_trials=2",
    "tune.recipe.phases.0.steps=4",
    "self_train.steps_per_round=2",
    "self_train.max_chips=40",
    "checks.min_recall_over_chance=0",
    "checks.min_overhead_average_precision=0.8",  # a fifth of the pictures, three epochs
]


@dataclass(frozen=True)
class Demo:
    """One finished demo: where its artifacts lie, what it printed and what it logged."""

    root: str
    printed: str
    log: str

    def report(self, ref: str) -> dict:
        """The benchmarks of an evaluation."""
        return json.loads(Path(self.root, ref, "report.json").read_text())["benchmarks"]


def start_demo(root: Path, recipe: str, overrides: list[str]) -> subprocess.Popen[str]:
    """The job with a mark in its environment, which every process that it starts inherits; it prints to files."""
    cluster = root / "cluster.yaml"
    root.mkdir(parents=True, exist_ok=True)
    text = (REPOSITORY / "cluster" / "local.yaml").read_text().replace("./artifacts", str(root / "artifacts"))
    cluster.write_text(text.replace("port: 8000", "port: 0"))
    command = [sys.executable, "jobs/demo.py", recipe, str(cluster), *overrides]
    with (root / "printed.txt").open("w") as printed, (root / "errors.txt").open("w") as errors:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {MARK: str(root)},
            stdout=printed,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def run_demo(root: Path, recipe: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    """The job from its start to its end."""
    process = start_demo(root, recipe, overrides)
    try:
        assert left_behind(root), "the mark must be visible while the job runs, else its absence proves nothing"
        process.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    out, errors = (root / "printed.txt").read_text(), (root / "errors.txt").read_text()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def kill_in_training(root: Path) -> None:
    """Start the demo and SIGKILL its driver when pretraining has written its first checkpoint."""
    process = start_demo(root, "configs/demo/world.yaml", SMALL_WORLD)
    for changes in watch(root, step=20, rust_timeout=2000, yield_on_timeout=True):
        if any("/model/demo/v1/checkpoints/step_" in path for _, path in changes):
            break
        assert process.poll() is None, (root / "errors.txt").read_text()[-4000:]
    process.kill()
    process.wait()


def summary_of(printed: str) -> list[str]:
    """The closing summary, without what Ray printed before and between."""
    assert "arrows ran" in printed
    lines = printed[printed.index("rsplatform demo:") :].splitlines()
    return [line for line in lines if line and "(raylet)" not in line]


def left_behind(root: Path) -> list[str]:
    """Command lines of living processes that inherited the demo's environment, Ray's own included."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get(MARK) == str(root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or []))
        except psutil.Error:
            continue  # ended while we looked
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The small cut of the world demo, killed in the middle of its training and started again."""
    folder = tmp_path_factory.mktemp("demo")
    kill_in_training(folder)
    done = run_demo(folder, "configs/demo/world.yaml", SMALL_WORLD)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    assert not left_behind(folder)
    return Demo(str(folder / "artifacts"), done.stdout, done.stderr)


def test_a_killed_demo_goes_on_where_it_was(demo: Demo) -> None:
    for stage in ("ingest_scenes", "filter_web", "caption", "build_dataset"):
        assert f"{stage} stands from an earlier run" in demo.log
    assert "pretrain → model/demo/v1" in demo.log
    headline = summary_of(demo.printed)[0]
    assert "7 of 13 arrows ran" in headline and headline.endswith("filter_web, caption, build_dataset")
    history = json.loads(Path(demo.root, "model/demo/v1/history.json").read_text())
    steps = [row["step"] for row in history if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 125


def test_the_summary_tells_the_whole_story(demo: Demo) -> None:
    for word in (
        "scenes",
        "chips",
        "web pairs",
        "dataset",
        "training",
        "world_val",
        "mIoU raw",
        "nearest colour",
        "smooth",
        "self-trained",
    ):
        assert word in demo.printed
    for word in ("× chance", "where in it", "lon ", "make mlflow ROOT=", "make serve CLUSTER=", "is best: val_"):
        assert word in demo.printed


def test_every_artifact_is_whole_and_accounts_for_its_inputs(demo: Demo) -> None:
    refs = [
        "world/demo/v1", "chips/demo/v1", "overhead/demo/v1", "web_pairs/demo/v1", "captions/demo/v1",
        "dataset/demo/v1", "model/demo/v1", "evaluation/demo/v1", "index/demo/v1", "sweep/demo/v1",
        "localization/demo/v1", "model/demo_self_trained/v1", "evaluation/demo_self_trained/v1", "demo/world/v1",
    ]  # fmt: skip
    for ref in refs:
        artifact = Artifact(demo.root, ref)
        verify(artifact)
        counts = artifact.manifest()["counts"]
        if "dropped" in counts:
            assert counts["inputs"] == counts["kept"] + sum(counts["dropped"].values()), ref
    drops = read_drops(Artifact(demo.root, "web_pairs/demo/v1"))["reason"].to_pylist()
    counts = Artifact(demo.root, "web_pairs/demo/v1").manifest()["counts"]
    assert len(drops) == sum(counts["dropped"].values()) > 0


def test_mlflow_holds_one_run_a_job_below_the_demo(demo: Demo) -> None:
    client = tracking._client(tracking.tracking_uri(demo.root))
    parent = Artifact(demo.root, "demo/world/v1").manifest()["mlflow_run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    names = {run.info.run_name for run in children}
    assert {"model/demo/v1", "chips/demo/v1", "sweep/demo/v1", "evaluation/demo/v1"} <= names
    assert all(run.info.status == "FINISHED" for run in children)
    model = next(run for run in children if run.info.run_name == "model/demo/v1")
    assert len(client.get_metric_history(model.info.run_id, "train/loss")) > 3
    sweep = next(run for run in children if run.info.run_name == "sweep/demo/v1")
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert len(trials) == 2
    assert "phases.0.schedule.learning_rate" in model.data.params
    assert sweep.data.tags["input.dataset/demo/v1"]


def test_mlflow_holds_the_pictures_of_every_stage(demo: Demo) -> None:
    assert {"contact_sheets/kept.png", "contact_sheets/dropped.png"} <= logged_files(demo, "web_pairs/demo/v1")
    assert {"contact_sheets/kept.png", "contact_sheets/dropped.png"} <= logged_files(demo, "chips/demo/v1")
    assert "loss.png" in logged_files(demo, "model/demo/v1")
    evaluation = logged_files(demo, "evaluation/demo/v1")
    assert {"world_val_recall.png", "report.json"} <= evaluation
    assert any(name.startswith("world_masks/") and name.endswith("_heat.png") for name in evaluation)
    assert "best.yaml" in logged_files(demo, "sweep/demo/v1")
    assert "summary.txt" in logged_files(demo, "demo/world/v1")


def logged_files(demo: Demo, ref: str) -> set[str]:
    """Every file in the MLflow run of an artifact, as MLflow's client lists them."""
    client = tracking._client(tracking.tracking_uri(demo.root))
    run_id = Artifact(demo.root, ref).manifest()["mlflow_run_id"]
    found, folders = set(), [""]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop() or None):
            if item.is_dir:
                folders.append(item.path)
            else:
                found.add(item.path)
    return found


def test_a_second_run_finishes_at_once_and_says_the_same(demo: Demo) -> None:
    again = run_demo(Path(demo.root).parent, "configs/demo/world.yaml", SMALL_WORLD)
    assert again.returncode == 0
    assert summary_of(again.stdout) == summary_of(demo.printed)
    assert "INFO" not in again.stderr  # no stage ran again: each of them announces itself


def test_a_bar_that_is_missed_is_an_error_and_leaves_no_finished_demo(demo: Demo) -> None:
    changes = ["output=demo/strict/v1", "checks.min_recall_over_chance=1000"]
    failed = run_demo(Path(demo.root).parent, "configs/demo/world.yaml", [*SMALL_WORLD, *changes])
    assert failed.returncode == 1, failed.stderr[-4000:]
    assert "0 of 13 arrows ran" in summary_of(failed.stdout)[0], "the summary is told all the same"
    assert "error: demo failed: text→image R@10 on world_val is" in failed.stderr
    assert not Path(demo.root, "demo/strict/v1", MANIFEST).exists()
    assert not left_behind(Path(demo.root).parent)


def test_another_recipe_under_the_same_version_is_refused(demo: Demo) -> None:
    changed = run_demo(Path(demo.root).parent, "configs/demo/world.yaml", [*SMALL_WORLD, "search.text=water"])
    assert changed.returncode == 2
    assert "search.text" in changed.stderr
    assert "new version" in changed.stderr


def test_the_nearest_colour_reaches_at_most_60_percent_of_the_models_miou(demo: Demo) -> None:
    """Masks are used to fit the colours, which the model never saw: the comparison favours the colours."""
    scores = demo.report("evaluation/demo/v1")["world_masks"]
    assert 0 < scores["nearest_colour_miou"] <= 0.6 * scores["smooth_miou"]


def test_the_real_recipe_runs_on_a_small_cut(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSPLATFORM_TEST_DATA", str(data_root))
    done = run_demo(tmp_path, "configs/demo/real.yaml", SMALL_REAL)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    for word in ("rsicd_val", "whu_rs19", "kampala_buildings", "dubai", "where in it"):
        assert word in done.stdout
    counts = Artifact(str(tmp_path / "artifacts"), "chips/real/v1").manifest()["counts"]
    assert counts["kept"] > 50
    assert counts["landmarks"]["dropped"]
    assert not left_behind(tmp_path)
