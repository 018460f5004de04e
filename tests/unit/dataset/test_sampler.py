"""The sampler: a pure function of (seed, step), exact over epochs, ranks and restarts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplatform.dataset.sampler import GlobalSampler


@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 5))
def test_each_sample_once_before_any_twice(num_samples: int, batch_size: int, seed: int) -> None:
    sampler = GlobalSampler(num_samples, batch_size, seed)
    num_batches = -(-3 * num_samples // batch_size)
    drawn = np.concatenate([sampler.batch(step) for step in range(num_batches)])
    for epoch in range(len(drawn) // num_samples):
        assert sorted(drawn[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(st.integers(2, 60), st.integers(1, 25), st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_resume_and_world_size_change_nothing(num_samples: int, batch_size: int, step: int, world: int) -> None:
    fresh, other = GlobalSampler(num_samples, batch_size, 7), GlobalSampler(num_samples, batch_size, 7)
    for earlier in range(step):
        other.batch(earlier)
    np.testing.assert_array_equal(fresh.batch(step), other.batch(step))
    shares = [fresh.batch(step)[rank::world] for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(fresh.batch(step))


def test_weights_set_the_mixture() -> None:
    sampler = GlobalSampler(4, 1000, 0, weights=(0.0, 1.0, 1.0, 2.0))
    counts = np.bincount(np.concatenate([sampler.batch(step) for step in range(20)]), minlength=4) / 20_000
    assert counts[0] == 0
    assert counts[1:] == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    np.testing.assert_array_equal(sampler.batch(3), GlobalSampler(4, 1000, 0, weights=(0.0, 1.0, 1.0, 2.0)).batch(3))


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (1.0, -1.0)])
def test_bad_mixtures_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        GlobalSampler(2, 4, 0, weights=weights)
