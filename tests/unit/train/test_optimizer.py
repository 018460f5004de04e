"""Schedules, decay groups, moving average and curriculum, each against what its words promise."""

from itertools import pairwise

import pytest
import torch

from rsplatform.train.optimizer import (
    AveragedWeights,
    OptimizerConfig,
    Schedule,
    build_optimizer,
    layer_rate_factors,
    parameter_groups,
    set_learning_rate,
)
from tests.unit.train.tiny_training import tiny_model


@pytest.mark.parametrize("decay", ["cosine", "wsd", "constant"])
def test_schedules_warm_up_and_decay(decay: str) -> None:
    schedule = Schedule(2.0, warmup_steps=10, **{"decay": decay, "final_fraction": 0.1})
    rates = [schedule.at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[10:]))
    end = schedule.at(100, 100)
    assert end == pytest.approx(2.0 if decay == "constant" else 0.2)
    if decay == "wsd":
        assert rates[10:80] == [2.0] * 70
        assert rates[90] == pytest.approx(2.0 - 1.8 / 2)


def test_only_matrices_decay() -> None:
    model = tiny_model()
    decayed, spared = parameter_groups(model, OptimizerConfig(weight_decay=0.2))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert "log_logit_scale" in spared_names
    assert all(name.endswith(("bias", "scale")) or "norm" in name for name in spared_names)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_rates_decay_from_the_last_block_of_each_tower_to_the_first() -> None:
    model = tiny_model(
        vision_num_layers=3,
        text_num_layers=4,
        class_token=True,
        tied_vocabulary=False,
        ground_sample_distance_encoding=True,
        ground_sample_distance_positions=True,
    )
    factors = layer_rate_factors(model, 0.5)
    assert factors.keys() == dict(model.named_parameters()).keys()
    by_beginning = {
        "vision.blocks.2.": 0.5,
        "vision.blocks.1.": 0.25,
        "vision.blocks.0.": 0.125,
        "vision.patch_embedding": 0.0625,
        "vision.position_HWD": 0.0625,
        "vision.class_": 0.0625,
        "vision.scale_": 0.0625,
        "text.blocks.3.": 0.5,
        "text.blocks.2.": 0.25,
        "text.cross_blocks.1.": 0.25,
        "text.blocks.1.": 0.125,
        "text.blocks.0.": 0.0625,
        "text.cross_blocks.0.": 0.0625,
        "text.token_embedding_VD": 0.03125,
        "text.position_TD": 0.03125,
        "vision.norm_output": 1.0,
        "vision.projection": 1.0,
        "text.norm_output": 1.0,
        "text.projection": 1.0,
        "text.vocabulary_VD": 1.0,
        "image_to_text": 1.0,
        "log_logit_scale": 1.0,
    }
    for name, factor in factors.items():
        assert [value for start, value in by_beginning.items() if name.startswith(start)] == [factor], name


def test_the_rate_of_a_step_is_multiplied_by_each_groups_factor() -> None:
    model = tiny_model()
    frozen = {f"vision.{name}" for name, _ in model.vision.named_parameters() if name.startswith("blocks.0.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    factors = layer_rate_factors(model, 0.5)
    for name, parameter in model.named_parameters():
        assert rates.get(id(parameter)) == (None if name in frozen else 0.1 * factors[name])
    set_learning_rate(plain := build_optimizer(model, OptimizerConfig()), 0.1)
    assert [group["lr"] for group in plain.param_groups] == [0.1, 0.1]


def test_the_moving_average_is_the_weighted_sum_of_the_past() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    values = [3.0, 5.0, -1.0]
    with torch.no_grad():
        model.weight.fill_(2.0)
        averaged = AveragedWeights(dict(model.named_parameters()), 0.9, ramps=False)
        for number, value in enumerate(values):
            model.weight.fill_(value)
            averaged.update(dict(model.named_parameters()), number)
    expected = 2.0 * 0.9**3 + sum(value * 0.1 * 0.9 ** (2 - index) for index, value in enumerate(values))
    assert averaged.tensors["weight"].item() == pytest.approx(expected)


def test_a_short_runs_average_has_forgotten_the_first_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        averaged, left = AveragedWeights(dict(model.named_parameters()), 0.999), 1.0
        model.weight.fill_(0.0)
        for number in range(500):
            averaged.update(dict(model.named_parameters()), number)
            left *= min(0.999, (1 + number) / (10 + number))
            assert averaged.tensors["weight"].item() == pytest.approx(left)
    assert left < 1e-6
    with torch.no_grad():
        model.weight.fill_(1.0)
        averaged.update(dict(model.named_parameters()), 10**6)
    assert averaged.tensors["weight"].item() == pytest.approx(0.001, rel=1e-3)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient_clip"):
        OptimizerConfig(gradient_clip=0)
    with pytest.raises(ValueError, match="layer_decay 1.5"):
        OptimizerConfig(layer_decay=1.5)
    with pytest.raises(ValueError, match="learning_rate"):
        Schedule(0.0)
    for fraction in (0.0, -0.2, 1.5):
        with pytest.raises(ValueError, match=r"decay_fraction .* is not in \(0, 1\]"):
            Schedule(1.0, decay="wsd", decay_fraction=fraction)
    with pytest.raises(ValueError, match="final_fraction 2 is not in"):
        Schedule(1.0, final_fraction=2)
