"""A training run as phases: which samples, how many steps, which learning rates. Pure arithmetic on the step.

In: phases from a recipe and the samples' tables and weights. Out: for every step its learning rate and the sample
indices of its global batch. Phases follow RECIPE.md "Curriculum" (web pairs, then landmarks, then a mix of both);
their lengths, what they freeze and their resolutions are our defaults. Reads no pixels and keeps no state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.model.mammut import MammutConfig
from rsplatform.train.freezing import check_parts, covers_all
from rsplatform.train.optimizer import Schedule


class RecipeMismatchError(ValueError):
    """A valid recipe that asks for what its dataset or its placement cannot give; the message says what to change."""


@dataclass(frozen=True)
class Phase:
    """`mixture`: share of the draws by kind of source, e.g. {web_pairs: 0.5, chips: 0.5}; a kind that is not named
    is not drawn. Empty: all samples by their own weights. The schedule warms up and decays within the phase.

    `freeze`: parts of the model (freezing.py) that the phase leaves bitwise as they are, with their moments.
    `image_size`: pixels of a side in this phase; None: the model's own. The last phase's is the finished model's.
    """

    name: str
    steps: int
    schedule: Schedule
    mixture: Mapping[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phase {self.name}: steps {self.steps} must be at least 1")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"phase {self.name}: schedule.warmup_steps {self.schedule.warmup_steps} is more than its {self.steps} "
                "steps: the learning rate would never be reached"
            )
        check_parts(self.freeze, f"phase {self.name}: freeze")
        if covers_all(self.freeze):
            raise ValueError(f"phase {self.name}: freeze names the whole model; leave a part out to train it")
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

    def frozen_parts(self, step: int) -> tuple[str, ...]:
        """Parts of the model that a step leaves as they are."""
        return self.phases[self.locate(step)[0]].freeze

    @property
    def freezable(self) -> frozenset[str]:
        """Parts that any phase freezes."""
        return frozenset(part for phase in self.phases for part in phase.freeze)

    def image_sizes(self, model: MammutConfig) -> tuple[int, ...]:
        """Pixels of a side in each phase.

        Raises:
            RecipeMismatchError: a size that does not divide into the model's patches.
        """
        patch_size = model.vision.patch_size
        for phase in self.phases:
            if phase.image_size is not None and (phase.image_size < 1 or phase.image_size % patch_size):
                raise RecipeMismatchError(
                    f"phase {phase.name}: image_size {phase.image_size} is not a multiple of patch_size {patch_size}"
                )
        return tuple(phase.image_size or model.vision.image_size for phase in self.phases)

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
