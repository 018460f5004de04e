"""The loop: N steps equal k steps, an end of any kind, and N - k steps, bitwise; it stops when it is told to."""

import time
from pathlib import Path

import pytest
import torch

from rsplatform.model.losses import LossConfig
from rsplatform.model.normalise import normalise
from rsplatform.model.recall import recall_at_k
from rsplatform.train.checkpoint import CheckpointError, CheckpointFolder
from rsplatform.train.engine import PlainEngine
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import ASK_EVERY_SECONDS, Hooks, LoopConfig, Progress, TrainingDivergedError, fit
from rsplatform.train.step import StepConfig
from rsplatform.train.validate import VALIDATION_METRICS, validation_losses
from tests.unit.train.tiny_training import tiny_loader, tiny_model

NUM_STEPS = 12


def train(folder: str | Path, num_steps: int = NUM_STEPS, on_save=None, reports: dict | None = None, **settings):
    """Train into checkpoints below `folder`, from the newest one there; (progress, tensors of the last)."""
    torch.set_num_threads(1)
    checkpoints = CheckpointFolder(str(folder), keep_last=1000)

    def save(tensors, progress: Progress) -> None:
        checkpoints.save(tensors, progress)
        if on_save:
            on_save(progress.step)

    def report(metrics: dict[str, float], step: int) -> None:
        if reports is not None:
            reports.setdefault(step, {}).update(metrics)

    values = {"seed": 1, "checkpoint_every_steps": 1, "ema_decay": 0.8, "report_every_steps": 1} | settings
    engine = PlainEngine(tiny_model(patch_dropout=0.25), OptimizerConfig())
    hooks = Hooks(report, save)
    progress = fit(
        engine, tiny_loader().batches, lambda s: 1e-3, LoopConfig(num_steps, **values), hooks, checkpoints.latest()
    )
    saved = checkpoints.latest()
    assert saved is not None
    return progress, saved[0]


def assert_bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("whole"))[1]


@pytest.mark.parametrize("num_before", [1, 5, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, uninterrupted, num_before: int) -> None:
    train(tmp_path, num_before)
    assert_bitwise(train(tmp_path)[1], uninterrupted)


def test_max_minutes_stops_at_the_next_step_and_says_so(tmp_path: Path) -> None:
    progress, _ = train(tmp_path, max_minutes=1e-9)
    assert progress.step == 1
    assert "max_minutes" in progress.stopped
    assert train(tmp_path, max_minutes=1e-9)[0] == progress  # the time counts over restarts


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every_steps=None, checkpoint_every_minutes=1e-9)
    assert CheckpointFolder(str(tmp_path)).steps() == list(range(1, NUM_STEPS + 1))


def test_reports_tell_losses_pace_and_rate(tmp_path: Path) -> None:
    reports: dict[int, dict[str, float]] = {}
    train(tmp_path, reports=reports, report_every_steps=5)
    assert sorted(reports) == [5, 10, 12]
    expected = "loss contrastive caption logit_scale gradient_norm learning_rate skipped_steps undecodable"
    expected += " tokens_per_text"
    pace = "samples_per_s samples_per_s_per_device data_wait_fraction save_s"
    assert set(reports[5]) == {*expected.split(), *pace.split()}
    assert reports[5]["samples_per_s"] == reports[5]["samples_per_s_per_device"]
    assert 5 < reports[5]["tokens_per_text"] <= 16
    assert reports[12]["loss"] < reports[5]["loss"]


def test_the_pace_is_that_of_the_training_alone() -> None:
    """Slow validations and checkpoints take no part in it, also where they fall between two reports."""
    rows: list[dict[str, float]] = []

    def validate() -> dict[str, float]:
        time.sleep(0.1)
        return {"val_loss": 1.0}

    hooks = Hooks(lambda metrics, step: rows.append(metrics), lambda tensors, progress: time.sleep(0.1), validate)
    config = LoopConfig(6, report_every_steps=2, validate_every_steps=1, checkpoint_every_steps=3)
    started = time.perf_counter()
    fit(PlainEngine(tiny_model(), OptimizerConfig()), tiny_loader().batches, lambda step: 1e-3, config, hooks)
    elapsed_s = time.perf_counter() - started
    training_s = sum(2 * 8 / row["samples_per_s"] for row in rows if "loss" in row)
    assert training_s < elapsed_s - 0.8  # 6 validations and 2 checkpoints
    assert [row["validate_s"] >= 0.1 for row in rows if "val_loss" in row] == [True] * 6
    assert ["save_s" in row for row in rows if "loss" in row] == [False, True, False]


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    engine = PlainEngine(tiny_model(), OptimizerConfig())
    with torch.no_grad():
        engine.model.image_to_text.weight[0, 0] = torch.nan
    hooks = Hooks(lambda metrics, step: None, CheckpointFolder(str(tmp_path)).save)
    with pytest.raises(TrainingDivergedError, match="loss is nan at step 5 .*; the 5 steps before it"):
        fit(engine, tiny_loader().batches, lambda step: 1e-3, LoopConfig(8), hooks)
    assert CheckpointFolder(str(tmp_path)).latest() is None


def ask_for_checkpoints(answers: list[bool], num_steps: int) -> list[int]:
    """The steps that were saved of a run that never reports before its end; what it was not asked for stays."""
    saved: list[int] = []
    hooks = Hooks(
        lambda metrics, step: None,
        lambda tensors, progress: saved.append(progress.step),
        wants_checkpoint=lambda: answers.pop(0),
    )
    config = LoopConfig(num_steps, report_every_steps=num_steps)
    fit(PlainEngine(tiny_model(), OptimizerConfig()), tiny_loader().batches, lambda step: 1e-3, config, hooks)
    return saved


def test_a_checkpoint_that_is_wanted_at_once_waits_for_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsplatform.train.pretrain.ASK_EVERY_SECONDS", 0.0)
    answers = [False, False, True, False, False]
    assert ask_for_checkpoints(answers, 5) == [3, 5]
    assert answers == []


def test_who_is_asked_for_checkpoints_is_asked_by_the_clock() -> None:
    answers, started = [True] * 4, time.perf_counter()
    ask_for_checkpoints(answers, 4)
    assert 4 - len(answers) <= (time.perf_counter() - started) / ASK_EVERY_SECONDS


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reports: dict[str, dict] = {"float32": {}, "bfloat16": {}}
    for precision, steps in reports.items():
        train(tmp_path / precision, reports=steps, precision=precision)
    losses = [reports[precision][NUM_STEPS]["loss"] for precision in reports]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_validation_is_repeatable_and_leaves_the_model_training() -> None:
    engine = PlainEngine(tiny_model(patch_dropout=0.5), OptimizerConfig())
    loader = tiny_loader()
    first = validation_losses(engine, loader.batches, 2, StepConfig())
    assert first == validation_losses(engine, loader.batches, 2, StepConfig())
    chances = {name for name in first if name.startswith("val_chance_")}
    assert len(chances) == 7
    assert set(first) - chances == set(VALIDATION_METRICS)
    assert engine.model.training


def options_model(seed: int = 0):
    scale = {"ground_sample_distance_encoding": True, "ground_sample_distance_positions": True}
    return tiny_model(seed, logit_bias=True, **scale)


def test_every_option_of_the_model_and_the_loss_learns_and_is_validated() -> None:
    """What the loader knows of the pictures' scale reaches the model, and the loss's weights reach its forward."""
    loss = LossConfig("sigmoid", z_loss_weight=1e-2)
    engine, reports = PlainEngine(options_model(), OptimizerConfig()), []
    before = validation_losses(engine, tiny_loader().batches, 2, StepConfig(loss))
    hooks = Hooks(lambda metrics, step: reports.append(metrics), lambda tensors, progress: None)
    fit(engine, tiny_loader().batches, lambda step: 2e-3, LoopConfig(30, loss=loss, report_every_steps=30), hooks)
    after = validation_losses(engine, tiny_loader().batches, 2, StepConfig(loss))
    assert all(after[f"val_{name}"] < before[f"val_{name}"] for name in ("loss", "contrastive", "caption"))
    assert {"logit_bias", "z_loss"} <= set(reports[0])
    learned, start = engine.model.state_dict(), options_model().state_dict()
    for name in ("logit_bias", "vision.scale_encoding.weight_DF", "vision.scale_positions.gain_D"):
        assert not torch.equal(learned[name], start[name])


def test_validation_recall_is_that_of_all_held_out_pairs_together() -> None:
    """Over the batches, not within each: 16 pictures, and as the evaluation computes it."""
    engine, loader = PlainEngine(tiny_model(), OptimizerConfig()), tiny_loader()
    found = validation_losses(engine, loader.batches, 2, StepConfig())
    batches = list(loader.batches(0, 2))
    model = engine.model.eval()
    with torch.no_grad():
        images = torch.cat(
            [model.encode_image(normalise(batch.images_BHWC, (0.5,) * 3, (0.5,) * 3)) for batch in batches]
        )
        texts = torch.cat([model.encode_text(batch.tokens_BT) for batch in batches])
    expected = recall_at_k(images.numpy(), texts.numpy(), range(16))
    assert {name: found[f"val_{name}"] for name in expected} == pytest.approx(expected)
    assert found["val_chance_t2i_r5"] == pytest.approx(100 * 5 / 16)


def test_only_the_newest_checkpoints_are_kept_and_damage_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep_last=2)
    for step in (1, 2, 3):
        folder.save({"model/x": torch.full((2,), float(step))}, Progress(step, elapsed_s=step / 3))
    (tmp_path / ".step_00000009.safetensors.tmp").write_bytes(b"half")
    assert folder.steps() == [2, 3]
    saved = folder.latest()
    assert saved is not None
    assert saved[1] == Progress(3, elapsed_s=1.0)
    newest = tmp_path / "step_00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"step_00000003.*delete it"):
        folder.latest()
