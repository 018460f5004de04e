"""Global shuffle, mixture and exact resume as arithmetic: a batch is a pure function of (seed, step).

No state but the step: a resumed job, another world size or another number of decode threads sees the same
sample ids in the same global batches. A batch costs time in proportion to its own size. Only numpy; reads no pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from rsplatform.dataset.permutation import permuted


@dataclass(frozen=True)
class Draws:
    """What the batches take of one source: epoch after epoch, each in an order of its own.

    `taken(step)`: how many samples of the source the batches before `step` have had; it never falls, and grows by
    `per_step` on average and by at most `most_per_step`. Every sample comes once before any comes twice, and never
    twice in one batch unless the batch wants more than there are. A source of fewer than two batches keeps one
    order for all epochs: that alone keeps a batch free of repeats there.
    """

    num_samples: int
    key: tuple[int, ...]
    taken: Callable[[int], int]
    per_step: float
    most_per_step: int

    def batch(self, step: int) -> np.ndarray:
        """int64 samples that the batch of `step` takes."""
        start, end = self.taken(step), self.taken(step + 1)
        if self.num_samples < 2 * self.most_per_step:
            return permuted(np.arange(start, end) % self.num_samples, self.num_samples, (*self.key, 0))
        parts = [np.empty(0, dtype=np.int64)]
        for epoch in range(start // self.num_samples, -(-end // self.num_samples)):
            offset = epoch * self.num_samples
            parts.append(self._samples(epoch, max(start - offset, 0), min(end - offset, self.num_samples)))
        return np.concatenate(parts)

    def _samples(self, epoch: int, first: int, end: int) -> np.ndarray:
        """The samples at places first … end - 1 of an epoch."""
        samples = self._shuffled(epoch, first, end)
        if epoch > 0 and first < self.most_per_step:
            head = self._head(epoch)[first:end]
            samples[: len(head)] = head
        return samples

    def _head(self, epoch: int) -> np.ndarray:
        """The first samples of an epoch, so ordered that the batch which ends the epoch before has no repeat.

        That batch takes the last `before` samples of the one epoch and the first `after` of the next: among the next
        epoch's first `before + after`, at least `after` are not among them and move to the front. The last places of
        an epoch are as shuffled, because it is at least two batches long.
        """
        border = epoch * self.num_samples
        step = self._step_of(border)
        before, after = border - self.taken(step), self.taken(step + 1) - border
        head = self._shuffled(epoch, 0, before + after)
        fresh = np.flatnonzero(~np.isin(head, self._shuffled(epoch - 1, self.num_samples - before, self.num_samples)))
        front = fresh[:after]
        return np.concatenate([head[front], np.delete(head, front)])

    def _step_of(self, draw: int) -> int:
        """The step whose batch holds the source's draw number `draw`."""
        step = int(draw / self.per_step)
        while self.taken(step) > draw:
            step -= 1
        while self.taken(step + 1) <= draw:
            step += 1
        return step

    def _shuffled(self, epoch: int, first: int, end: int) -> np.ndarray:
        return permuted(np.arange(first, end), self.num_samples, (*self.key, epoch))


@dataclass(frozen=True)
class GlobalSampler:
    """Indices of the global batch of every step: each sample once before any twice.

    Raises:
        ValueError: no samples or no batch.
    """

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"need samples and a batch, got {self.num_samples} samples, batch {self.batch_size}")

    def batch(self, step: int) -> np.ndarray:
        """int64 (batch_size,) sample indices of global batch `step`; `[rank::world]` is a rank's share."""
        return self._draws.batch(step)

    @cached_property
    def _draws(self) -> Draws:
        size = self.batch_size
        return Draws(self.num_samples, (self.seed,), lambda step: step * size, float(size), size)


@dataclass(frozen=True)
class Group:
    """Samples that are drawn alike: their rows in the dataset and their share of the draws, relative to other groups'.

    `key` decides on the group's orders, with the seed: groups of one mixture need different ones.
    """

    rows: np.ndarray
    share: float
    key: tuple[int, ...]


@dataclass(frozen=True)
class MixtureSampler:
    """Batches of several groups by their shares, each without replacement in its own epochs.

    Long-run shares are exact: after any number of draws a group has had its share of them, rounded (within half a
    draw for each group before it). Rows of one group stand together in a batch, so that ranks, which take every
    world-size-th row, get the same mixture.

    Raises:
        ValueError: no group, or shares that are not above 0.
    """

    groups: Sequence[Group]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.groups or any(not len(group.rows) or not group.share > 0 for group in self.groups):
            raise ValueError("a mixture needs groups with samples and shares above 0")

    def batch(self, step: int) -> np.ndarray:
        """int64 (batch_size,) sample indices of global batch `step`; `[rank::world]` is a rank's share."""
        drawn = zip(self.groups, self._draws, strict=True)
        return np.concatenate([group.rows[draws.batch(step)] for group, draws in drawn])

    @cached_property
    def _draws(self) -> list[Draws]:
        shares = [Fraction(group.share) for group in self.groups]
        return [self._draws_of(index, shares) for index in range(len(shares))]

    def _draws_of(self, index: int, shares: list[Fraction]) -> Draws:
        group, size = self.groups[index], self.batch_size
        per_step = float(shares[index] / sum(shares)) * size
        most = min(size, math.ceil(per_step) + len(shares))
        key = (self.seed, *group.key)
        return Draws(len(group.rows), key, lambda step: quotas(shares, step * size)[index], per_step, most)


def quotas(shares: Sequence[Fraction], num_draws: int) -> list[int]:
    """How many of the first `num_draws` draws each share has had; whole numbers whose sum is `num_draws`.

    Each takes its rounded part of what those before it leave. So no number ever falls as the draws go on, which
    rounding each share by itself would not promise; fractions, because floats would not either after 2^53 draws.
    """
    counts, left, rest = [], num_draws, sum(shares)
    for share in shares[:-1]:
        count = math.floor(left * share / rest + Fraction(1, 2))
        counts.append(count)
        left, rest = left - count, rest - share
    return [*counts, left]
