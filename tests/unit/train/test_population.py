"""A population's decisions and what a member's recipe says: cut phases that nothing changed in are as if uncut."""

import math

import numpy as np
import pytest

from rsplatform.dataset.store import Origins
from rsplatform.train.curriculum import Curriculum, Phase
from rsplatform.train.optimizer import Schedule
from rsplatform.train.population import Member, Population, member_recipe, next_generation
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.search_space import SearchField
from tests.unit.train.tiny_dataset import tiny_recipe

RATE, WEIGHT, SHARE = "phases.1.schedule.learning_rate", "loss.caption_weight", "phases.1.mixture.web_pairs"
SEARCH = {RATE: SearchField(log_uniform=(1e-4, 1e-2)), WEIGHT: SearchField(choices=[0.5, 1.0, 2.0])}
POPULATION = Population(interval_steps=3)


def members(number: int) -> list[Member]:
    return [Member(({RATE: 1e-3 * (1 + index), WEIGHT: 1.0},), (index,)) for index in range(number)]


def test_the_worst_follow_the_best_and_the_others_go_on() -> None:
    losses = [3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 7.0, 0.5]
    after = next_generation(members(8), losses, SEARCH, POPULATION, seed=1)
    assert [member.trials[-1] for member in after] == list(range(8))
    parents = [member.trials[-2] for member in after]
    assert parents[:5] + parents[7:] == [0, 1, 2, 3, 4, 7]
    assert set(parents[5:7]) <= {1, 7}
    for member, parent in zip(after, parents, strict=True):
        before = members(8)[parent]
        assert member.values[:-1] == before.values, "values that its weights have gone through"
        assert (member.values[-1] == before.values[-1]) == (member.trials[-2] == member.trials[-1])
        assert 1e-4 <= member.values[-1][RATE] <= 1e-2 and member.values[-1][WEIGHT] in (0.5, 1.0, 2.0)


def test_decisions_are_a_function_of_seed_generation_and_scores() -> None:
    losses = [1.0, 4.0, 2.0, 3.0]
    once = next_generation(members(4), losses, SEARCH, POPULATION, seed=1)
    assert next_generation(members(4), losses, SEARCH, POPULATION, seed=1) == once
    others = [next_generation(members(4), losses, SEARCH, POPULATION, seed=seed) for seed in range(2, 6)]
    assert any(other != once for other in others)
    again = next_generation(once, losses, SEARCH, POPULATION, seed=1)
    assert [len(member.values) for member in again] == [3] * 4


def test_a_member_that_diverged_is_always_replaced_and_equal_ones_never() -> None:
    after = next_generation(members(4), [math.nan, 1.0, math.inf, math.inf], SEARCH, POPULATION, seed=0)
    assert [member.trials[-2] for member in after] == [1, 1, 1, 1]
    after = next_generation(members(4), [0.0] * 4, SEARCH, POPULATION, seed=0)
    assert [member.trials[-2] for member in after] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="diverged"):
        next_generation(members(2), [math.nan, math.inf], SEARCH, POPULATION, seed=0)


def test_cutting_a_phase_changes_nothing() -> None:
    """Rates, draws, epochs, the later phases and where the guard forgets: all as in the uncut curriculum."""
    schedule = Schedule(1.0, warmup_steps=3, decay="wsd", final_fraction=0.1)
    web = {"web_pairs": 1.0}
    whole = Curriculum((Phase("a", 10, schedule, web), Phase("b", 6, schedule)))
    cut = Curriculum(
        (
            Phase("a", 2, schedule, web),
            Phase("a", 5, schedule, web, continues=True),
            Phase("a", 3, schedule, web, continues=True),
            Phase("b", 5, schedule),
            Phase("b", 1, schedule, continues=True),
        )
    )
    assert cut.num_steps == whole.num_steps and cut.phase_starts == whole.phase_starts == (10,)
    assert [cut.learning_rate(step) for step in range(16)] == [whole.learning_rate(step) for step in range(16)]
    origins = Origins(
        ("chips", "web_pairs"), np.repeat(np.array([1, 0], dtype=np.int16), [9, 4]), np.ones(13, np.float32)
    )
    plans = [curriculum.plan(origins, 4, seed=5) for curriculum in (whole, cut)]
    for step in range(16):
        assert (plans[0](step) == plans[1](step)).all()


def test_a_changed_piece_changes_its_own_steps_only() -> None:
    recipe = PretrainConfig.model_validate(tiny_recipe(validate_every_steps=2))
    first, second = {RATE: 1e-3, WEIGHT: 1.0, SHARE: 0.25}, {RATE: 2e-3, WEIGHT: 0.5, SHARE: 0.5}
    uncut = member_recipe(recipe, [first, first, first], 3)
    assert [phase.steps for phase in uncut.phases] == [3, 5]
    assert uncut.phases[1].mixture == recipe.phases[1].mixture
    cut = member_recipe(recipe, [first, first, second], 3)
    assert [(phase.name, phase.steps, phase.continues) for phase in cut.phases] == [
        ("web", 3, False),
        ("mix", 3, False),
        ("mix", 2, True),
    ]
    rates = [[config.curriculum.learning_rate(step) for step in range(8)] for config in (uncut, cut)]
    assert rates[0][:6] == rates[1][:6] and rates[1][6:] == pytest.approx([2 * rate for rate in rates[0][6:]])
    losses = cut.curriculum.losses(cut.loss)
    assert [(start, loss.caption_weight) for start, loss in losses] == [(0, 1.0), (3, 1.0), (6, 0.5)]
    assert cut.phases[2].mixture == {"web_pairs": 0.5, "chips": 0.5}
    assert cut.curriculum.phase_starts == (3, 6), "another loss, another mixture: the guard forgets"
    assert member_recipe(recipe, [first, second], 3).phases[0] == uncut.phases[0], "a generation inside of one phase"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_weights": {"focal_gamma": 1.0}}, "loss_weights names .*focal_gamma"),
        ({"loss_weights": {"caption_weight": -1.0}}, "not be negative"),
        ({"continues": True}, "it is the first"),
    ],
)
def test_phases_that_cannot_be_are_refused(change: dict, words: str) -> None:
    phase = {"name": "a", "steps": 2, "schedule": {"learning_rate": 1e-3}} | change
    with pytest.raises(ValueError, match=words):
        PretrainConfig.model_validate(tiny_recipe(phases=[phase]))
