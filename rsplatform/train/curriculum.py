"""A training run as phases: which samples, how many steps, which learning rates. Pure arithmetic on the step.

In: phases from a recipe and the samples' tables and weights. Out: for every step its learning rate and the sample
indices of its global batch. Phases follow RECIPE.md "Curriculum" (web pairs, then landmarks, then a mix of both);
their lengths are our defaults. Reads no pixels and keeps no state. Freezing and resolution per phase are not here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.train.optimizer import Schedule


class RecipeMismatchError(ValueError):
    """A valid recipe that asks for what its dataset or its placement cannot give; the message says what to change."""


@dataclass(frozen=True)
class Phase:
    """`mixture`: share of the draws by kind of source, e.g. {web_pairs: 0.5, chips: 0.5}; a kind that is not named
    is not drawn. Empty: all samples by their own weights. The schedule warms up and decays within the phase."""

    name: str
    steps: int
    schedule: Schedule
    mixture: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phase {self.name}: steps {self.steps} must be at least 1")
        if any(share <= 0 for share in self.mixture.values()):
            raise ValueError(f"phase {self.name}: mixture shares must be above 0; leave a kind out to draw none")


@dataclass(frozen=True)
class Curriculum:
    """Phases one after the other."""

    phases: Sequence[Phase]

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """The first step of each phase but the first."""
        return tuple(accumulate(phase.steps for phase in self.phases[:-1]))

    def locate(self, step: int) -> tuple[int, int]:
        """(phase, step within it) of a step of the run."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} lies outside of the run's {self.num_steps} steps")
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return index, step
            step -= phase.steps
        raise AssertionError("unreachable: the phases' steps add up to num_steps")

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step."""
        index, phase_step = self.locate(step)
        phase = self.phases[index]
        return phase.schedule.at(phase_step, phase.steps)

    def plan(
        self, tables: Sequence[str], weights: np.ndarray, batch_size: int, seed: int
    ) -> Callable[[int], np.ndarray]:
        """Global batch of sample indices by step; `tables` and `weights` are those of the samples.

        Raises:
            RecipeMismatchError: a mixture names a kind that the dataset does not hold.
        """
        kinds = np.array([table.split("/")[0] for table in tables])
        draws = [
            _phase_draws(phase, kinds, weights, batch_size, seed * 1_009 + index)
            for index, phase in enumerate(self.phases)
        ]

        def batch(step: int) -> np.ndarray:
            index, phase_step = self.locate(step)
            return draws[index](phase_step)

        return batch


def _phase_draws(
    phase: Phase, kinds: np.ndarray, weights: np.ndarray, batch_size: int, seed: int
) -> Callable[[int], np.ndarray]:
    unknown = set(phase.mixture) - set(kinds)
    if unknown:
        held = ", ".join(sorted(set(kinds.tolist())))
        raise RecipeMismatchError(f"phase {phase.name}: mixture names {sorted(unknown)}, but the dataset holds {held}")
    members = np.flatnonzero(np.isin(kinds, list(phase.mixture))) if phase.mixture else np.arange(len(kinds))
    chances = np.asarray(weights, dtype=np.float64)[members]
    for kind, share in phase.mixture.items():
        chosen = kinds[members] == kind
        chances[chosen] *= share / chances[chosen].sum()
    # equal chances need no draws with replacement: an epoch sees every sample once
    is_even = np.allclose(chances, chances[0], rtol=1e-9)
    sampler = GlobalSampler(len(members), batch_size, seed, None if is_even else tuple(chances.tolist()))
    return lambda step: members[sampler.batch(step)]
