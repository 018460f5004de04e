"""The recipe of a sweep: what its trials are copies of, the fields to search in, how trials compete and by what.

In: a YAML's values. Out: `TuneConfig`, and the values and recipe that every trial begins with, a function of the seed.
Needs no Ray: a bad search is refused before anything starts.
"""

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rsplatform.config import Config, ConfigError, StageConfig, TemplateMarker, validate
from rsplatform.train.curriculum import LOSS_WEIGHTS
from rsplatform.train.population import Population, member_recipe, refused_fields
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.search_space import SearchField, Values, get_value, is_share, with_values

Loss = Literal["val_contrastive", "val_caption", "val_loss"]
Recall = Literal[
    "val_mean_recall",
    "val_i2t_r1",
    "val_i2t_r5",
    "val_i2t_r10",
    "val_t2i_r1",
    "val_t2i_r5",
    "val_t2i_r10",
]
LOSSES: tuple[Loss, ...] = ("val_contrastive", "val_caption", "val_loss")

# The sweep's own inputs and yardstick: all trials share them.
SHARED = ("output", "pipeline", "dataset", "validation_split", "start_from", "tokenizer", "validate_every_steps")
_CONTRASTIVE = ("loss.contrastive", "loss.focal_gamma", "loss.focal_alpha", "loss.mask_identical_texts")
_TOKENS = ("model.settings.vocab_size", "model.settings.context_length")
_WEIGHTS = tuple(f"loss.{name}" for name in LOSS_WEIGHTS)
# Fields that change what an objective means, so that values of two trials would not compare. Held-out batches have the
# trial's batch size, on which a contrastive loss and the number of ranked pictures depend.
CHANGES_MEANING: dict[str, tuple[str, ...]] = {
    "val_contrastive": ("batch_size", *_CONTRASTIVE),
    "val_caption": _TOKENS,
    "val_loss": ("batch_size", *_CONTRASTIVE, *_TOKENS, *_WEIGHTS),
}


class Asha(Config):
    """Successive halving (arXiv 1810.05934): whenever a trial validates, it is stopped if it is not among the best
    1/`reduction_factor` of those that came so far; none before `grace_steps`.

    What came so far is in the driver's memory. A sweep that goes on keeps every result that stands, and measures the
    trials without one against each other alone, at the steps that they report from then on.
    """

    type: Literal["asha"] = "asha"
    grace_steps: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=2, ge=2)


class TuneConfig(StageConfig):
    """`search` maps dotted keys of the recipe (phases.0.schedule.learning_rate) to how they are drawn.

    `recipe` is what the trials are copies of; best.yaml is the best copy, with the recipe's own output. Held-out
    losses are minimised, recalls maximised.
    """

    recipe: Annotated[PretrainConfig, TemplateMarker()]
    search: dict[str, SearchField] = Field(min_length=1)
    num_trials: int = Field(default=4, ge=1)
    seed: int = Field(default=0, ge=0)
    objective: Loss | Recall = "val_contrastive"
    scheduler: Annotated[Asha | Population, Field(discriminator="type")] = Asha()

    @model_validator(mode="after")
    def _trials_are_valid(self) -> "TuneConfig":
        if self.recipe.validate_every_steps is None:
            raise ValueError("recipe.validate_every_steps: a sweep compares held-out numbers while it runs; set it")
        _check_fields(self.search, self.objective)
        try:
            _check_mixtures(self.recipe, self.search)
            self.trials()
            if isinstance(self.scheduler, Population):
                _check_population(self, self.scheduler)
        except (ConfigError, TypeError) as error:  # a choice may be of a type that its field cannot have
            raise ValueError(f"search: {error}") from error
        return self

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which way the objective is better."""
        return "min" if self.objective in LOSSES else "max"

    def as_loss(self, value: float | None) -> float:
        """A value of the objective such that lower is better; infinite if there is none or it is not finite."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value

    def trials(self) -> list[tuple[Values, PretrainConfig]]:
        """(drawn values, recipe) of every trial, a function of the seed."""
        rng = np.random.default_rng(self.seed)
        drawn = [{key: field.draw(rng) for key, field in self.search.items()} for _ in range(self.num_trials)]
        return [(values, self.recipe_with(values, f"trial {index}")) for index, values in enumerate(drawn)]

    def recipe_with(self, values: Values, name: str) -> PretrainConfig:
        """The recipe with these values from its first step on.

        Raises:
            ConfigError: a field that the recipe does not have, or a value that it cannot have.
        """
        if isinstance(self.scheduler, Population):
            return member_recipe(self.recipe, [values], self.scheduler.interval_steps)
        return validate(PretrainConfig, with_values(self.recipe.model_dump(mode="json"), values), name)


def _check_fields(search: dict[str, SearchField], objective: str) -> None:
    shared = [key for key in search if key in SHARED]
    if shared:
        raise ValueError(f"search: {', '.join(shared)}: all trials of a sweep share it; make a sweep for each")
    unlike = [key for key in search if key in CHANGES_MEANING.get(objective, ("batch_size",))]
    if unlike:
        raise ValueError(
            f"search: {objective} of trials that differ in {', '.join(unlike)} cannot be compared; choose another "
            "objective or leave the field out"
        )


def _check_mixtures(recipe: PretrainConfig, search: dict[str, SearchField]) -> None:
    """Refused whatever is drawn: shares that could leave nothing for the other sources, or a mixture of one."""
    document = recipe.model_dump(mode="json")
    for mixture in sorted({key.rpartition(".")[0] for key in search if is_share(key)}):
        sources = get_value(document, mixture)
        highest = {key: max(field.choices or field.ends) for key, field in search.items() if is_share(key)}
        own = {key: high for key, high in highest.items() if key.rpartition(".")[0] == mixture}
        if len(sources) == 1:
            raise ConfigError(f"{mixture} has one source only; its share is always 1")
        if len(own) < len(sources) and sum(own.values()) >= 1:
            raise ConfigError(
                f"{mixture}: the highest shares of {', '.join(own)} add up to {sum(own.values()):g} and leave nothing "
                "for the other sources; lower them, or search all sources, whose shares are then scaled to 1"
            )


def _check_population(config: TuneConfig, population: Population) -> None:
    refused = refused_fields(config.search)
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: a population goes on with copied weights and cuts phases, so it searches "
            f"phases.N.schedule.…, phases.N.mixture.…, phases.N.loss_weights.… and {', '.join(_WEIGHTS)}; "
            "search other fields with scheduler: {type: asha}"
        )
    if config.num_trials < 2 or population.num_generations(config.recipe) < 2:
        raise ConfigError(
            f"a population needs num_trials of at least 2 (now {config.num_trials}) and scheduler.interval_steps below "
            f"the recipe's {config.recipe.curriculum.num_steps} steps (now {population.interval_steps})"
        )
    if config.recipe.max_minutes is not None:
        raise ConfigError("recipe.max_minutes: a population's generations end by steps; leave it out")
    first: dict[str, Any] = config.trials()[0][0]
    for key, field in config.search.items():  # values move to the ends of their ranges later
        for end in field.choices or field.ends:
            config.recipe_with(first | {key: end}, f"search.{key} at {end}")
