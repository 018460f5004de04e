"""Which losses pass, and that the loop skips, counts, stops and resumes as the guard says."""

from pathlib import Path

import pytest
import torch

from rsplatform.model.mammut import Mammut
from rsplatform.train import guard
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.engine import PlainEngine
from rsplatform.train.guard import DamagedDataError, GuardConfig, GuardState
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import EMA, Hooks, LoopConfig, Progress, TrainingDivergedError, fit
from tests.unit.train.tiny_training import DamagedStore, TinyStore, tiny_loader, tiny_model

CONFIG = GuardConfig(max_skipped_steps=2, window_steps=4)


def seen(*losses: float) -> GuardState:
    return GuardState(losses)


def test_a_spike_lies_far_above_the_median_of_a_full_window() -> None:
    assert guard.loss_objection(1e6, seen(1.0, 1.0, 1.0), CONFIG) == ""
    state = seen(1.0, 1.2, 1.1, 0.9)  # median 1.05, median deviation 0.1
    limit = 1.05 + 10 * 1.4826 * 0.1
    assert guard.spike_limit(state, CONFIG) == pytest.approx(limit)
    assert guard.loss_objection(limit - 1e-6, state, CONFIG) == ""
    assert "above the limit of" in guard.loss_objection(limit + 1e-6, state, CONFIG)
    assert guard.loss_objection(-5.0, state, CONFIG) == ""
    assert guard.spike_limit(seen(2.0, 2.0, 2.0, 2.0), CONFIG) == pytest.approx(2.0 * 1.1)
    assert guard.spike_limit(state, GuardConfig(max_skipped_steps=0, window_steps=4)) == float("inf")


def test_what_is_not_finite_never_passes() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        assert guard.loss_objection(value, GuardState(), GuardConfig()) == f"loss is {value}"
        assert guard.norm_objection(value) == f"gradient norm is {value}"
    assert guard.norm_objection(3.0) == ""


def test_the_window_holds_the_last_accepted_losses() -> None:
    state = GuardState()
    for loss in (5.0, 4.0, 3.0, 2.0, 1.0):
        state = guard.after_accepted(state, loss, CONFIG)
    state = guard.after_skipped(guard.after_skipped(state))
    assert state == GuardState((4.0, 3.0, 2.0, 1.0), skipped_in_row=2, skipped_steps=2)
    assert guard.after_accepted(state, 1.5, CONFIG) == GuardState((3.0, 2.0, 1.0, 1.5), 0, 2)
    assert guard.in_new_phase(state) == GuardState((), 2, 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped_steps"):
        GuardConfig(max_skipped_steps=-1)


# What is added to the loss of a step.
SPIKES = {6: 100.0, 9: float("nan"), 10: 50.0}
NUM_STEPS = 14
GUARD = GuardConfig(max_skipped_steps=2, window_steps=4)


def spikes(model: Mammut, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor(SPIKES.get(step, 0.0)), {}


def train(folder: Path, num_steps: int = NUM_STEPS, **settings):
    """Train on from the newest checkpoint: (progress, tensors by step, reports by step)."""
    torch.set_num_threads(1)
    checkpoints, reports, states = CheckpointFolder(str(folder)), {}, {}

    def save(tensors: dict[str, torch.Tensor], progress: Progress) -> None:
        checkpoints.save(tensors, progress)
        states[progress.step] = {name: value.clone() for name, value in tensors.items()}

    values = {"checkpoint_every_steps": 1, "report_every_steps": 1, "ema_decay": 0.5, "guard": GUARD} | settings
    engine = PlainEngine(tiny_model(), OptimizerConfig())
    hooks = Hooks(lambda metrics, step: reports.__setitem__(step, metrics), save, auxiliary_loss=spikes)
    config = LoopConfig(num_steps, **values)
    progress = fit(engine, tiny_loader().batches, lambda step: 1e-3, config, hooks, checkpoints.latest())
    return progress, states, reports


def test_spikes_are_skipped_and_counted(tmp_path: Path) -> None:
    progress, states, reports = train(tmp_path)
    assert progress.guard.skipped_steps == len(SPIKES)
    assert [reports[step + 1]["skipped_steps"] for step in range(NUM_STEPS)] == [
        sum(spike <= step for spike in SPIKES) for step in range(NUM_STEPS)
    ]
    for step in range(1, NUM_STEPS):
        unchanged = all(torch.equal(states[step][name], states[step + 1][name]) for name in states[step])
        assert unchanged == (step in SPIKES), step
    assert states[NUM_STEPS]["num_steps"] == NUM_STEPS - len(SPIKES)
    assert any(name.startswith(EMA) for name in states[NUM_STEPS])
    assert "loss" in reports[6] and "loss" not in reports[7] and "samples_per_s" in reports[7]


def test_a_resumed_run_skips_the_same_steps(tmp_path: Path) -> None:
    progress, states, _ = train(tmp_path / "whole")
    for num_steps in (6, 10):  # before a spike, and between two
        train(tmp_path / "parts", num_steps)
    resumed, later, _ = train(tmp_path / "parts")
    assert resumed.guard == progress.guard
    assert all(torch.equal(value, states[NUM_STEPS][name]) for name, value in later[NUM_STEPS].items())


def test_a_bad_batch_ends_no_run_by_default(tmp_path: Path) -> None:
    progress, _, _ = train(tmp_path, guard=GuardConfig())
    assert progress.guard.skipped_steps == 1  # too few losses for a limit, but one of them is not a number


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    guard_of_one = GuardConfig(max_skipped_steps=1, window_steps=4)
    with pytest.raises(TrainingDivergedError, match=r"above the limit .* at step 10 .*; the 1 steps before it"):
        train(tmp_path, guard=guard_of_one)
    saved = CheckpointFolder(str(tmp_path)).latest()
    assert saved is not None and saved[1].step == 10


def test_the_first_losses_of_new_data_set_their_own_limit(tmp_path: Path) -> None:
    progress, _, reports = train(tmp_path, 9, phase_starts=(6,))
    assert progress.guard.skipped_steps == 0
    assert reports[7]["loss"] > 100


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    """The loss is finite, its gradient is not: a hook on a weight makes it so at one step."""
    engine, steps = PlainEngine(tiny_model(), OptimizerConfig()), []
    engine.model.image_to_text.weight.register_hook(lambda gradient: gradient * (torch.nan if len(steps) == 2 else 1))
    hooks = Hooks(lambda metrics, step: steps.append(metrics), lambda tensors, progress: None)
    config = LoopConfig(5, report_every_steps=1, guard=GuardConfig(max_skipped_steps=1))
    progress = fit(engine, tiny_loader().batches, lambda step: 1e-3, config, hooks)
    assert progress.guard.skipped_steps == 1
    assert ["loss" in metrics for metrics in steps] == [True, True, False, True, True]
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())


def test_undecodable_pictures_are_counted_over_restarts_and_too_many_end_the_run(tmp_path: Path) -> None:
    """Two of 24 samples: each batch of 8 has 2/3 of one, and every picture of the run is read."""
    damaged = DamagedStore({"sample-3", "sample-11"})
    loader = tiny_loader(store=damaged)
    checkpoints, reports = CheckpointFolder(str(tmp_path)), {}

    def run(num_steps: int, limit: float) -> Progress:
        hooks = Hooks(lambda metrics, step: reports.update({step: metrics}), checkpoints.save)
        config = LoopConfig(num_steps, report_every_steps=1, guard=GuardConfig(max_undecodable_fraction=limit))
        engine = PlainEngine(tiny_model(), OptimizerConfig())
        return fit(engine, loader.batches, lambda step: 1e-3, config, hooks, checkpoints.latest())

    assert run(7, 0.2).guard.undecodable == reports[7]["undecodable"]
    assert run(15, 0.2).guard.undecodable == reports[15]["undecodable"] == 10, "five epochs"
    with pytest.raises(DamagedDataError, match=r"1\d of the \d+ pictures drawn so far .* 0.05 allows"):
        run(20, 0.05)
    latest = checkpoints.latest()
    assert latest is not None and latest[1].step == 15, "of which the run may go on when the table is whole again"


def test_a_wholly_damaged_table_ends_the_run_before_its_first_step() -> None:
    ids = set(TinyStore(60).ids)
    engine = PlainEngine(tiny_model(), OptimizerConfig())
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    hooks = Hooks(lambda metrics, step: None, lambda tensors, progress: None)
    with pytest.raises(DamagedDataError, match="a whole row of the 8"):
        fit(engine, tiny_loader(store=DamagedStore(ids, 60)).batches, lambda step: 1e-3, LoopConfig(3), hooks)
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    with pytest.raises(ValueError, match="max_undecodable_fraction"):
        GuardConfig(max_undecodable_fraction=1.5)
