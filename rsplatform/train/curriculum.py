"""A training run as phases: which samples, how many steps, which learning rates. Pure arithmetic on the step.

In: phases from a recipe and the samples' sources and weights. Out: for every step its learning rate, its loss and the
sample indices of its global batch. Phases follow RECIPE.md "Curriculum" (web pairs, then landmarks, then a mix of
both); their lengths, what they freeze and their resolutions are our defaults. Reads no pixels and keeps no state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from rsplatform.dataset.sampler import GlobalSampler, Group, MixtureSampler
from rsplatform.dataset.store import Origins
from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import MammutConfig
from rsplatform.train.augment import Augmentation
from rsplatform.train.freezing import check_parts, covers_all
from rsplatform.train.optimizer import Schedule

LOSS_WEIGHTS = ("contrastive_weight", "caption_weight", "z_loss_weight")


class RecipeMismatchError(ValueError):
    """A valid recipe that asks for what its dataset or its placement cannot give; the message says what to change."""


@dataclass(frozen=True)
class Phase:
    """`mixture`: share of the draws by the names of the dataset's sources, e.g. {web_pairs: 0.5, chips: 0.5}; a source
    without a share, or with 0, is not drawn. Empty: all samples by their own weights. The schedule warms up and decays
    within the phase.

    `freeze`: parts of the model (freezing.py) that the phase leaves bitwise as they are, with their moments.
    `image_size`: pixels of a side in this phase; None: the model's own. The last phase's is the finished model's.
    `augmentation`: in place of the recipe's (web pictures have an up, overhead ones have none).
    `loss_weights`: the recipe's loss weights that are others in this phase, e.g. {caption_weight: 2.0}; held-out
    losses are computed with the recipe's in every phase.
    `continues`: the phase goes on with the one before it: warm-up, decay and draws run over both as over one phase, so
    that cutting a phase in two changes nothing. What differs are its values (a population's winner is written so).
    """

    name: str
    steps: int
    schedule: Schedule
    mixture: Mapping[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    image_size: int | None = None
    augmentation: Augmentation | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    continues: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phase {self.name}: steps {self.steps} must be at least 1")
        check_parts(self.freeze, f"phase {self.name}: freeze")
        if covers_all(self.freeze):
            raise ValueError(f"phase {self.name}: freeze names the whole model; leave a part out to train it")
        if any(share < 0 for share in self.mixture.values()):
            raise ValueError(f"phase {self.name}: mixture shares must not be negative; 0 draws none of a source")
        if self.mixture and not any(self.mixture.values()):
            raise ValueError(f"phase {self.name}: a mixture needs a share above 0; leave it out to draw all samples")
        unknown = set(self.loss_weights) - set(LOSS_WEIGHTS)
        if unknown:
            names = ", ".join(LOSS_WEIGHTS)
            raise ValueError(f"phase {self.name}: loss_weights names {sorted(unknown)}; a phase may change {names}")
        if any(weight < 0 for weight in self.loss_weights.values()):
            raise ValueError(f"phase {self.name}: loss_weights must not be negative")


@dataclass(frozen=True)
class Curriculum:
    """Phases one after the other."""

    phases: Sequence[Phase]

    def __post_init__(self) -> None:
        if self.phases and self.phases[0].continues:
            raise ValueError(f"phase {self.phases[0].name} continues, but it is the first: leave `continues` out")

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """The first step of each phase but the first that changes the data or the loss."""
        starts = accumulate(phase.steps for phase in self.phases)
        neighbours = zip(starts, self.phases, self.phases[1:], strict=False)
        return tuple(start for start, before, phase in neighbours if not _goes_on_alike(before, phase))

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
        before, num_steps = self._whole(index)
        return self.phases[index].schedule.at(before + phase_step, num_steps)

    @property
    def remarks(self) -> list[str]:
        """What may be meant, as in a short trial, but should be known: a warm-up that its phases end before."""
        return [
            f"phase {phase.name}: warmup_steps {phase.schedule.warmup_steps} is more than its {num_steps} steps, so "
            "its learning rate is never reached"
            for phase, (_, num_steps) in ((phase, self._whole(index)) for index, phase in enumerate(self.phases))
            if phase.schedule.warmup_steps > num_steps
        ]

    def losses(self, loss: LossConfig) -> tuple[tuple[int, LossConfig], ...]:
        """(first step, loss) of every phase, where any changes the recipe's `loss`; else none."""
        if not any(phase.loss_weights for phase in self.phases):
            return ()
        starts = accumulate((phase.steps for phase in self.phases), initial=0)
        return tuple((start, replace(loss, **p.loss_weights)) for start, p in zip(starts, self.phases, strict=False))

    def _whole(self, index: int) -> tuple[int, int]:
        """Steps before phase `index`, and in all, of the phases that run as one with it."""
        first = max(i for i in range(index + 1) if i == 0 or not self.phases[i].continues)
        later = range(index + 1, len(self.phases))
        end = next((i for i in later if not self.phases[i].continues), len(self.phases))
        before = sum(phase.steps for phase in self.phases[first:index])
        return before, before + sum(phase.steps for phase in self.phases[index:end])

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

    def plan(self, origins: Origins, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
        """Global batch of sample indices by step; every phase draws without replacement (sampler.py).

        Raises:
            RecipeMismatchError: a mixture names a source that the dataset does not hold, or gives none a share.
        """
        strata = _strata(origins)
        numbers = accumulate((int(not phase.continues) for phase in self.phases[1:]), initial=0)
        draws = [
            _phase_draws(phase, strata, batch_size, seed * 1_009 + number)
            for number, phase in zip(numbers, self.phases, strict=True)
        ]

        def batch(step: int) -> np.ndarray:
            index, phase_step = self.locate(step)
            return draws[index](self._whole(index)[0] + phase_step)

        return batch


def _goes_on_alike(before: Phase, phase: Phase) -> bool:
    looks = [(each.mixture, each.image_size, each.augmentation, each.loss_weights) for each in (before, phase)]
    return phase.continues and looks[0] == looks[1]


class Stratum(NamedTuple):
    """The samples of one source that have one weight: their rows, and the sum of their weights."""

    source: str
    rows: np.ndarray
    total_weight: float
    key: tuple[int, int]


def _strata(origins: Origins) -> list[Stratum]:
    strata = []
    for index, source in enumerate(origins.names):
        rows = np.flatnonzero(origins.source_N == index)
        weight_R = origins.weight_N[rows]
        for number, weight in enumerate(np.unique(weight_R)):
            members = rows[weight_R == weight]
            strata.append(Stratum(source, members, float(weight) * len(members), (index, number)))
    return strata


def _phase_draws(phase: Phase, strata: list[Stratum], batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    totals: dict[str, float] = {}
    for stratum in strata:
        totals[stratum.source] = totals.get(stratum.source, 0.0) + stratum.total_weight
    unknown = set(phase.mixture) - set(totals)
    if unknown:
        raise RecipeMismatchError(
            f"phase {phase.name}: mixture names {', '.join(sorted(unknown))}, but the sources of this dataset's split "
            f"are {', '.join(totals)}"
        )
    shares = phase.mixture or totals  # a source's own weight, where no mixture says otherwise
    groups = [
        Group(each.rows, shares[each.source] * each.total_weight / totals[each.source], each.key)
        for each in strata
        if shares.get(each.source, 0.0) > 0
    ]
    num_samples = sum(len(group.rows) for group in groups)
    # one epoch over all sources, where no sample is to come more often than another
    if not phase.mixture and len({each.total_weight / len(each.rows) for each in strata}) == 1:
        return GlobalSampler(num_samples, batch_size, seed).batch
    return MixtureSampler(groups, batch_size, seed).batch
