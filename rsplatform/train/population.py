"""Population based training (arXiv 1711.09846) as decisions: scores of a generation in, the next generation out.

All of it is a function of (seed, generation, scores), so that a driver that died decides again what it had decided.
Ray's own PopulationBasedTraining does not give that: it draws from the global random state, compares whichever scores
have arrived by then, and holds who copied whom in memory. A member's values are different ones in each generation, so
its recipe has phases cut at the generations (`member_recipe`); all members begin from one seed, and training that
recipe from scratch repeats what the member and those that it descends from have done. Trains nothing, writes nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from rsplatform.config import Config, validate
from rsplatform.train.curriculum import LOSS_WEIGHTS
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.search_space import SearchField, Values, with_values


class Population(Config):
    """Every `interval_steps` the worst part of the population goes on from the weights, the optimizer's state and the
    values of one of the best part; each value is then drawn again, or multiplied by one of `factors`.

    The factors are the paper's [2]; that the parts are a fourth each and the chance of a new draw are our defaults [D].
    """

    type: Literal["population"] = "population"
    interval_steps: int = Field(ge=1)
    replaced_fraction: float = Field(default=0.25, gt=0, le=0.5)
    redraw_chance: float = Field(default=0.25, ge=0, le=1)
    factors: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.2)

    def num_generations(self, recipe: PretrainConfig) -> int:
        """The last one may be shorter."""
        return math.ceil(recipe.curriculum.num_steps / self.interval_steps)

    def end(self, recipe: PretrainConfig, generation: int) -> int:
        """The step at which a generation ends."""
        return min((generation + 1) * self.interval_steps, recipe.curriculum.num_steps)


@dataclass(frozen=True)
class Member:
    """One of a generation, by what its weights have gone through: the values and the trial of each generation up to
    it. Its own trial comes last; the one before it differs where the member was replaced."""

    values: tuple[Values, ...]
    trials: tuple[int, ...]


def next_generation(
    members: Sequence[Member],
    losses: Sequence[float],
    search: Mapping[str, SearchField],
    config: Population,
    seed: int,
) -> list[Member]:
    """What each member goes on as; `losses` of this generation, lower is better, not finite: it cannot go on.

    A member is replaced if it cannot go on, or if it is among the worst and worse than the one that it would follow.

    Raises:
        ValueError: no member can go on.
    """
    if not any(math.isfinite(loss) for loss in losses):
        raise ValueError("every member of the population diverged")
    generation = len(members[0].values)
    order = sorted(range(len(members)), key=lambda index: (_finite(losses[index]), index))
    num_replaced = min(max(1, int(len(members) * config.replaced_fraction)), len(members) // 2)
    best = [index for index in order[:num_replaced] if math.isfinite(losses[index])]
    worst = order[len(order) - num_replaced :]
    following = []
    for index, member in enumerate(members):
        rng = np.random.default_rng((seed, generation, index))
        parent = best[int(rng.integers(len(best)))]
        loss = _finite(losses[index])
        if loss > _finite(losses[parent]) and (index in worst or loss == math.inf):
            member = members[parent]
            values = explore(member.values[-1], search, config, rng)
        else:
            values = member.values[-1]
        following.append(Member((*member.values, values), (*member.trials, index)))
    return following


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def explore(values: Values, search: Mapping[str, SearchField], config: Population, rng: np.random.Generator) -> Values:
    """Values beside these, within their fields' bounds."""
    moved = {}
    for key, field in search.items():
        redraws, factor = rng.random() < config.redraw_chance, config.factors[int(rng.integers(2))]
        moved[key] = field.draw(rng) if redraws else field.move(values[key], factor, rng)
    return moved


def refused_fields(search: Mapping[str, SearchField]) -> list[str]:
    """Keys that a population cannot search: what copied weights, or a phase of a recipe, cannot change on the way."""
    return [key for key in search if not (_is_loss_weight(key) or _is_of_phase(key))]


def _is_loss_weight(key: str) -> bool:
    return key in {f"loss.{name}" for name in LOSS_WEIGHTS}


def _is_of_phase(key: str) -> bool:
    parts = key.split(".")
    return len(parts) == 4 and parts[0] == "phases" and parts[2] in ("schedule", "mixture", "loss_weights")


def member_recipe(recipe: PretrainConfig, values: Sequence[Values], interval_steps: int) -> PretrainConfig:
    """`recipe` with the values of generation g from step g · interval_steps on; those of the last go on to the end.

    Each phase is cut where a generation ends that changed something in it; later pieces `continue` the first.
    """
    document = recipe.model_dump(mode="json")
    generations = [_phases_of(document, own) for own in values]
    phases: list[dict[str, Any]] = []
    start = 0
    for index, phase in enumerate(recipe.phases):
        first = len(phases)
        for generation, num_steps in _pieces(start, start + phase.steps, interval_steps, len(values)):
            piece = generations[generation][index] | {"steps": num_steps}
            if len(phases) > first:
                piece["continues"] = True
                before = phases[-1] | {"continues": True}
                if before == piece | {"steps": before["steps"]}:
                    phases[-1]["steps"] += num_steps
                    continue
            phases.append(piece)
        start += phase.steps
    return validate(PretrainConfig, document | {"phases": phases}, f"{recipe.output} of a population's member")


def _phases_of(document: dict[str, Any], values: Values) -> list[dict[str, Any]]:
    """The phases with these values; a weight of the loss is written into each, which a phase's own weight outlives."""
    weights = {key.partition(".")[2]: value for key, value in values.items() if _is_loss_weight(key)}
    own = {key: value for key, value in values.items() if not _is_loss_weight(key)}
    phases = with_values(document, own)["phases"]
    return [phase | {"loss_weights": weights | phase["loss_weights"]} for phase in phases]


def _pieces(start: int, end: int, interval_steps: int, num_generations: int) -> Iterator[tuple[int, int]]:
    """(generation, steps) of the pieces of a phase from step `start` to `end`."""
    while start < end:
        generation = min(start // interval_steps, num_generations - 1)
        until = end if generation == num_generations - 1 else min(end, (generation + 1) * interval_steps)
        yield generation, until - start
        start = until
