"""Draws of samples: published numbers of SplitMix64, uniform, unlike between keys; the same in any batch and order."""

import torch

from rsplatform.model.draws import (
    PATCH_DROPOUT,
    POSITION_CROP,
    _number,
    fresh_keys,
    random_bits,
    random_fractions,
    sample_keys,
)

# The first numbers of SplitMix64 for seed 1234567, as its implementations list them.
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


def test_the_numbers_are_splitmix64s() -> None:
    numbers = _number(torch.tensor(1234567), torch.arange(5))
    assert tuple(number % 2**64 for number in numbers.tolist()) == PUBLISHED


def test_fractions_are_uniform_over_samples_numbers_and_steps() -> None:
    """Means and correlations of neighbours in each direction, within five deviations of what chance gives."""
    keys = [sample_keys(seed, step, torch.arange(64)) for seed in range(4) for step in range(8)]
    fractions_SBN = torch.stack([random_fractions(keys_B, POSITION_CROP, 16) for keys_B in keys]).double()
    assert 0 <= fractions_SBN.min() < 1e-3 and 1 - 1e-3 < fractions_SBN.max() < 1
    centred_SBN = (fractions_SBN - 0.5) * 12**0.5
    spread = 5 / centred_SBN.numel() ** 0.5
    assert abs(centred_SBN.mean()) < spread
    assert abs((centred_SBN**2).mean() - 1) < spread
    for axis in range(3):
        assert abs((centred_SBN * centred_SBN.roll(1, axis)).mean()) < spread, axis
    dropped_SBN = torch.stack([random_fractions(keys_B, PATCH_DROPOUT, 16) for keys_B in keys]).double()
    assert abs((centred_SBN * (dropped_SBN - 0.5)).mean()) < spread


def test_a_samples_numbers_are_its_own_in_any_batch() -> None:
    keys_B = sample_keys(3, 5, torch.arange(8))
    bits_BN = random_bits(keys_B, PATCH_DROPOUT, 20)
    order = torch.tensor([6, 1, 3])
    share_B = sample_keys(3, 5, order)
    assert torch.equal(share_B, keys_B[order])
    assert torch.equal(random_bits(share_B, PATCH_DROPOUT, 12), bits_BN[order, :12])


def test_keys_without_a_place_follow_torchs_generator() -> None:
    torch.manual_seed(4)
    first_B = fresh_keys(5, torch.device("cpu"))
    torch.manual_seed(4)
    assert torch.equal(first_B, fresh_keys(5, torch.device("cpu")))
    assert len(first_B.unique()) == 5
