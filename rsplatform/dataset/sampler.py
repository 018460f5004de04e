"""Global shuffle and exact resume as arithmetic: a batch is a pure function of (seed, step).

No state but the step: a resumed job, another world size or another number of decode threads sees the same
sample ids in the same global batches. Only numpy; reads no pixels.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GlobalSampler:
    """Indices of the global batch of every step.

    Without weights each epoch is one permutation of all samples (each sample once before any twice). With
    weights, draws are with replacement in proportion to them (mixtures of datasets; our default).

    Raises:
        ValueError: no samples, no positive weight, or weights of another length.
    """

    num_samples: int
    batch_size: int
    seed: int
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"need samples and a batch, got {self.num_samples} samples, batch {self.batch_size}")
        if self.weights is not None:
            weights = np.asarray(self.weights)
            if len(weights) != self.num_samples or (weights < 0).any() or weights.sum() <= 0:
                raise ValueError("weights must be >= 0, one per sample, and not all zero")

    def batch(self, step: int) -> np.ndarray:
        """int64 (batch_size,) sample indices of global batch `step`; `[rank::world]` is a rank's share."""
        if self.weights is not None:
            return self._weighted(step)
        start = step * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        epochs = positions // self.num_samples
        indices = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(int(epoch))[positions[chosen] % self.num_samples]
        return indices

    def epoch(self, step: int) -> float:
        """How often the samples have been seen before `step`."""
        return step * self.batch_size / self.num_samples

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(self.num_samples)

    def _weighted(self, step: int) -> np.ndarray:
        probabilities = np.asarray(self.weights, dtype=np.float64)
        draws = np.random.default_rng((self.seed, 1, step))
        return draws.choice(self.num_samples, size=self.batch_size, p=probabilities / probabilities.sum())
