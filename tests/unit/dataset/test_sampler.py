"""The sampler: a pure function of (seed, step), exact over epochs, shares, ranks and restarts, as fast as its batch."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.dataset.permutation import permuted
from rsplatform.dataset.sampler import GlobalSampler, Group, MixtureSampler, quotas

SHARES = st.lists(st.integers(1, 50).map(lambda tenths: tenths / 10), min_size=1, max_size=5)


def mixture(sizes: list[int], shares: list[float], batch_size: int, seed: int = 3) -> MixtureSampler:
    ends = np.cumsum(sizes)
    rows = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    groups = [Group(own, share, (index,)) for index, (own, share) in enumerate(zip(rows, shares, strict=True))]
    return MixtureSampler(groups, batch_size, seed)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2000), st.integers(0, 5))
def test_an_order_holds_every_sample_once(num_samples: int, key: int) -> None:
    order = permuted(np.arange(num_samples), num_samples, (key,))
    assert sorted(order) == list(range(num_samples))
    some = np.arange(num_samples)[::7]
    np.testing.assert_array_equal(permuted(some, num_samples, (key,)), order[some])


@pytest.mark.parametrize("num_samples", [10, 97, 256])
def test_orders_are_random(num_samples: int) -> None:
    """Chi-squared of which sample lies where, and of the step from a sample to the next, over many keys."""
    orders = np.stack([permuted(np.arange(num_samples), num_samples, (7, key)) for key in range(1500)])
    for values, num_bins in (
        (orders + num_samples * np.arange(num_samples), num_samples**2),
        ((np.diff(orders) % num_samples) - 1, num_samples - 1),
    ):
        counts = np.bincount(values.ravel(), minlength=num_bins)
        expected = values.size / num_bins
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - num_bins) < 6 * (2 * num_bins) ** 0.5


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 5))
def test_each_sample_once_before_any_twice_and_never_twice_in_a_batch(
    num_samples: int, batch_size: int, seed: int
) -> None:
    sampler = GlobalSampler(num_samples, batch_size, seed)
    batches = [sampler.batch(step) for step in range(-(-3 * num_samples // batch_size))]
    drawn = np.concatenate(batches)
    for epoch in range(len(drawn) // num_samples):
        assert sorted(drawn[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))
    for batch in batches:
        most = max(Counter(batch.tolist()).values())
        assert most == 1 if batch_size <= num_samples else most <= -(-batch_size // num_samples)


def test_epochs_differ() -> None:
    sampler = GlobalSampler(40, 10, 0)
    epochs = {tuple(np.concatenate([sampler.batch(4 * epoch + i) for i in range(4)])) for epoch in range(20)}
    assert len(epochs) == 20


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(1, 25), st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_resume_and_world_size_change_nothing(num_samples: int, batch_size: int, step: int, world: int) -> None:
    fresh, other = GlobalSampler(num_samples, batch_size, 7), GlobalSampler(num_samples, batch_size, 7)
    for earlier in range(step):
        other.batch(earlier)
    np.testing.assert_array_equal(fresh.batch(step), other.batch(step))
    shares = [fresh.batch(step)[rank::world] for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(fresh.batch(step))


@settings(deadline=None, max_examples=60)
@given(SHARES, st.integers(0, 3000), st.integers(1, 40))
def test_quotas_are_the_shares_rounded_and_never_fall(tenths: list[float], num_draws: int, more: int) -> None:
    shares = [Fraction(share) for share in tenths]
    counts, later = quotas(shares, num_draws), quotas(shares, num_draws + more)
    assert sum(counts) == num_draws
    assert all(after >= before >= 0 for before, after in zip(counts, later, strict=True))
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - num_draws * share / sum(shares)) <= len(shares) / 2


@settings(deadline=None, max_examples=40)
@given(SHARES, st.integers(1, 12), st.data())
def test_a_mixture_keeps_its_shares_and_draws_each_source_without_replacement(
    shares: list[float], batch_size: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=len(shares), max_size=len(shares)))
    sampler, steps = mixture(sizes, shares, batch_size), 30
    batches = [sampler.batch(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    of_source = np.repeat(np.arange(len(sizes)), sizes)
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        drawn = np.concatenate([batch[of_source[batch] == source] for batch in batches])
        assert abs(len(drawn) - steps * batch_size * share / sum(shares)) <= len(shares) / 2
        seen = np.bincount(drawn - sum(sizes[:source]), minlength=size)
        assert seen.max() - seen.min() <= 1
        for batch in batches:
            own = batch[of_source[batch] == source]
            assert len(own) > size or len(set(own.tolist())) == len(own)


def test_a_real_recipes_mixture_repeats_no_picture_in_a_batch_and_leaves_none_out() -> None:
    """The sizes of configs/pretrain/real.yaml; with replacement, 8 of 256 were repeats and 612 of 4,375 never came."""
    sampler = mixture([3445, 930], [0.92, 0.08], 256)
    batches = [sampler.batch(step) for step in range(40)]
    assert all(len(set(batch.tolist())) == 256 for batch in batches)
    seen = np.bincount(np.concatenate(batches), minlength=4375)
    assert (seen[:3445] >= 2).all() and (seen[:3445] <= 3).all()
    assert seen[3445:].max() == 1 and seen[3445:].sum() == round(0.08 * 10_240)


def test_every_step_can_be_asked_alone() -> None:
    sampler = mixture([50, 20, 7], [0.5, 0.3, 0.2], 10)
    in_order = [sampler.batch(step) for step in range(50)]
    for step in (49, 3, 17):
        np.testing.assert_array_equal(mixture([50, 20, 7], [0.5, 0.3, 0.2], 10).batch(step), in_order[step])


def test_a_batch_costs_no_more_in_a_large_dataset() -> None:
    """18 M samples: a table of them took seconds for each batch."""
    uniform = GlobalSampler(18_000_000, 256, 0)
    mixed = mixture([15_000_000, 3_000_000], [0.5, 0.5], 256)
    started = time.process_time()
    for step in range(0, 100_000, 5_000):
        assert len(uniform.batch(step)) == len(mixed.batch(step)) == 256
    assert (time.process_time() - started) / 20 < 0.1


def test_bad_sizes_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="need samples"):
        GlobalSampler(0, 4, 0)
    for sizes, shares in (([], []), ([3, 0], [1.0, 1.0]), ([3], [0.0]), ([3], [float("nan")])):
        with pytest.raises(ValueError, match="shares above 0"):
            mixture(sizes, shares, 4)
