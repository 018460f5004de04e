"""Random numbers that belong to samples: each sample has a key, and its n-th number is a function of key and n alone.

In: keys. Out: the same numbers on any device, in any order and in any batch, so that a training's draws depend neither
on how many processes share a batch nor on how many samples one of them runs at a time. Counter-based (SplitMix64),
because torch's generators give other numbers on other devices and have no state per sample.
Shapes: B batch, N numbers.
"""

import torch
from torch import Tensor

# What is drawn for a sample; each has numbers of its own.
POSITION_CROP, PATCH_DROPOUT = 0, 1

# SplitMix64 (Steele, Lea and Flood 2014): the step of its counter, then shifts and factors of its mixing.
_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_FLOAT32_BITS = 24


def sample_keys(seed: int, step: int, places_B: Tensor) -> Tensor:
    """The keys (B,) of the samples at these places (int64) in the global batch of a step."""
    return _number(_number(torch.tensor(_signed(seed)), torch.tensor(step)), places_B)


def fresh_keys(batch: int, device: torch.device) -> Tensor:
    """Keys (B,) from torch's own generator, for samples that have no place in a global batch."""
    return torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)


def random_bits(keys_B: Tensor, drawn: int, count: int) -> Tensor:
    """The first `count` numbers of each key for what is `drawn`: (B, N) int64, all 64 bits at random."""
    own_B = _number(keys_B, torch.tensor(drawn))
    return _number(own_B.unsqueeze(1), torch.arange(count, device=keys_B.device))


def random_fractions(keys_B: Tensor, drawn: int, count: int) -> Tensor:
    """The same as (B, N) float32, uniform in [0, 1)."""
    return _shifted(random_bits(keys_B, drawn, count), 64 - _FLOAT32_BITS).to(torch.float32) * 2.0**-_FLOAT32_BITS


def _number(keys: Tensor, index: Tensor) -> Tensor:
    """Number `index` of the generator seeded with `keys`. Products of int64 wrap around, as SplitMix64 wants it."""
    bits = keys + (index + 1) * _signed(_STEP)
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, _LAST_SHIFT)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros moving in: torch's own shift of int64 repeats the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    """The int64 of the same last 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
