"""Phases: which samples each draws, from which sources of the dataset, in which shares."""

from collections import Counter

import numpy as np
import pytest

from rsplatform.dataset.store import Origins
from rsplatform.train.curriculum import Curriculum, Phase, RecipeMismatchError
from rsplatform.train.optimizer import Schedule

NAMES = ("chips", "rs_webli", "webli")  # two tables of web pairs, which only their names tell apart
SIZES = (10, 30, 60)


def origins(weights: tuple[float, ...] = (1.0, 1.0, 1.0), sizes: tuple[int, ...] = SIZES) -> Origins:
    source_N = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
    return Origins(NAMES, source_N, np.asarray(weights, dtype=np.float32)[source_N])


def drawn(plan, steps: range) -> Counter:
    source_N = origins().source_N
    return Counter(NAMES[source_N[index]] for step in steps for index in plan(step))


def test_one_recipe_goes_through_webli_rs_webli_landmarks_and_a_mix() -> None:
    schedule = Schedule(1.0, warmup_steps=2, decay="constant")
    curriculum = Curriculum(
        (
            Phase("webli", 10, schedule, {"webli": 1.0}),
            Phase("rs_webli", 5, schedule, {"rs_webli": 1.0, "webli": 0.0}),
            Phase("rs_landmarks", 5, schedule, {"chips": 1.0}),
            Phase("mix", 200, schedule, {"rs_webli": 0.5, "chips": 0.5}),
        )
    )
    assert curriculum.phase_starts == (10, 15, 20)
    assert [curriculum.locate(step) for step in (0, 9, 10, 219)] == [(0, 0), (0, 9), (1, 0), (3, 199)]
    assert [curriculum.learning_rate(step) for step in (9, 10, 11)] == [1.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="outside"):
        curriculum.locate(220)
    plan = curriculum.plan(origins(), 6, seed=1)
    assert sorted(np.concatenate([plan(step) for step in range(10)])) == list(range(40, 100)), "each sample once"
    assert drawn(plan, range(10, 15)) == {"rs_webli": 30}
    assert drawn(plan, range(15, 20)) == {"chips": 30}
    assert drawn(plan, range(20, 220)) == {"rs_webli": 600, "chips": 600}


def test_an_unknown_source_is_refused_with_the_names_of_all() -> None:
    curriculum = Curriculum((Phase("mix", 5, Schedule(1.0), {"web_pairs": 1.0, "chips": 1.0}),))
    with pytest.raises(RecipeMismatchError, match="names web_pairs, .* are chips, rs_webli, webli"):
        curriculum.plan(origins(), 6, seed=1)


@pytest.mark.parametrize("mixture", [{"chips": -0.5}, {"chips": 0.0}])
def test_shares_that_draw_nothing_are_refused(mixture: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="share"):
        Phase("mix", 5, Schedule(1.0), mixture)


def test_without_a_mixture_samples_are_drawn_by_their_own_weights() -> None:
    curriculum = Curriculum((Phase("all", 300, Schedule(1.0)),))
    even = curriculum.plan(origins(), 10, seed=0)
    assert sorted(np.concatenate([even(step) for step in range(10)])) == list(range(100))
    weighted = curriculum.plan(origins((9.0, 1.0, 1.0)), 10, seed=0)
    assert drawn(weighted, range(180)) == {"chips": 900, "rs_webli": 300, "webli": 600}


def test_an_even_mixture_of_large_unequal_sources_is_no_draw_of_all_samples_alike() -> None:
    """Each sample's chance is about 1e-6, which a comparison with an absolute tolerance took for equal."""
    sizes = (1_000_000, 0, 2_000_000)
    source_N = np.repeat(np.arange(3, dtype=np.int16), sizes)
    large = Origins(NAMES, source_N, np.ones(3_000_000, dtype=np.float32))
    curriculum = Curriculum((Phase("mix", 50, Schedule(1.0), {"chips": 0.5, "webli": 0.5}),))
    plan = curriculum.plan(large, 100, seed=0)
    assert Counter(source_N[np.concatenate([plan(step) for step in range(50)])].tolist()) == {0: 2500, 2: 2500}


def test_samples_of_one_source_keep_their_own_weights_in_a_mixture() -> None:
    weight_N = np.where(np.arange(100) % 2, 3.0, 1.0).astype(np.float32)
    plan = Curriculum((Phase("mix", 100, Schedule(1.0), {"chips": 0.5, "webli": 0.5}),)).plan(
        Origins(NAMES, origins().source_N, weight_N), 8, seed=0
    )
    chosen = np.concatenate([plan(step) for step in range(100)])
    assert Counter(weight_N[chosen].tolist()) == {1.0: 200, 3.0: 600}


def test_a_warm_up_that_outlasts_the_phases_that_run_as_one_is_remarked() -> None:
    whole = Schedule(1.0, warmup_steps=5)
    assert not Curriculum([Phase("web", 5, whole)]).remarks
    assert not Curriculum([Phase("web", 3, whole), Phase("web", 2, whole, continues=True)]).remarks
    (remark,) = Curriculum([Phase("web", 4, whole), Phase("mix", 5, whole)]).remarks
    assert remark.startswith("phase web: warmup_steps 5 is more than its 4 steps")
