"""Which steps are left out: a loss or gradient norm that is not finite, and a loss far above the recent ones; and how
many pictures that cannot be decoded a run puts up with.

In: the loss of the global batch, and the losses of the last accepted steps. Out: an objection or none, and the state
for the next step. A pure function of numbers that all processes share and a checkpoint holds: every process decides
alike, and a resumed run decides as the uninterrupted one would. Does not touch weights or gradients.
"""

import math
import statistics
from dataclasses import dataclass, replace

# A normal distribution's standard deviation, in median absolute deviations.
DEVIATION_PER_MAD = 1.4826
# Fewer undecodable pictures than this end no run, whatever part they are of the first ones drawn.
FEW_UNDECODABLE = 10
# Losses that hardly vary must not make a spike of rounding: no deviation counts as less than this part of the median.
LEAST_DEVIATION = 0.01


class DamagedDataError(RuntimeError):
    """Pictures that cannot be decoded, too many to train on; a restart would meet the same ones again."""


@dataclass(frozen=True)
class GuardConfig:
    """All of it is our default [D]. A step is left out if its loss or gradient norm is not finite, or its loss lies
    more than `spike_deviations` robust standard deviations above the median of the last `window_steps` accepted losses;
    one more than `max_skipped_steps` such steps in a row ends the run. No limit applies until the window is full.

    `max_skipped_steps`: a bad batch or two cost their own steps, while weights gone bad, which no skipping mends, show
    within a few. Long runs on pictures that nobody has seen may want more. 0 turns it off: no loss is a spike, and the
    first that is not finite ends the run.

    `max_undecodable_fraction`: of the pictures drawn so far; a run with more (and more than a few) ends.
    """

    max_skipped_steps: int = 5
    spike_deviations: float = 10.0
    window_steps: int = 50
    max_undecodable_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.max_skipped_steps < 0 or self.spike_deviations <= 0 or self.window_steps < 2:
            raise ValueError(
                "guard: max_skipped_steps must not be negative, spike_deviations above 0 and window_steps at least 2"
            )
        if not 0 <= self.max_undecodable_fraction <= 1:
            raise ValueError(f"guard: max_undecodable_fraction {self.max_undecodable_fraction} is not in [0, 1]")


@dataclass(frozen=True)
class GuardState:
    """The last accepted losses, how many steps were skipped, in a row and in the whole run, and how many pictures met
    could not be decoded."""

    recent_losses: tuple[float, ...] = ()
    skipped_in_row: int = 0
    skipped_steps: int = 0
    undecodable: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "recent_losses", tuple(self.recent_losses))  # JSON makes a list of it

    @property
    def counts(self) -> dict[str, float]:
        """What a run reports: skipped steps and undecodable pictures since its first step."""
        return {"skipped_steps": float(self.skipped_steps), "undecodable": float(self.undecodable)}


def spike_limit(state: GuardState, config: GuardConfig) -> float:
    """The highest loss that passes; infinite while there are too few losses, or none may be skipped."""
    if config.max_skipped_steps == 0 or len(state.recent_losses) < config.window_steps:
        return math.inf
    median = statistics.median(state.recent_losses)
    mad = statistics.median(abs(loss - median) for loss in state.recent_losses)
    deviation = max(DEVIATION_PER_MAD * mad, LEAST_DEVIATION * abs(median))
    return median + config.spike_deviations * deviation


def loss_objection(loss: float, state: GuardState, config: GuardConfig) -> str:
    """Why a step of this loss is not taken; empty if it is."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    limit = spike_limit(state, config)
    if loss > limit:
        return f"loss is {loss:.4g}, above the limit of {limit:.4g} that the last {config.window_steps} losses set"
    return ""


def norm_objection(gradient_norm: float) -> str:
    """Why a step of this gradient norm is not taken; empty if it is."""
    return "" if math.isfinite(gradient_norm) else f"gradient norm is {gradient_norm}"


def after_reading(state: GuardState, undecodable: float, num_drawn: int, config: GuardConfig) -> GuardState:
    """The state when a step's pictures were read, `num_drawn` since the first step.

    Raises:
        DamagedDataError: too many could not be decoded.
    """
    total = state.undecodable + undecodable
    if total > max(FEW_UNDECODABLE, config.max_undecodable_fraction * num_drawn):
        many = f"{total:.0f}" if math.isfinite(total) else "a whole row"
        raise DamagedDataError(
            f"{many} of the {num_drawn} pictures drawn so far cannot be decoded, more than "
            f"guard.max_undecodable_fraction {config.max_undecodable_fraction:g} allows; the workers' logs name them. "
            "The tables with them are damaged: restore them, or make them and the dataset again under another version"
        )
    return replace(state, undecodable=round(total))


def after_skipped(state: GuardState) -> GuardState:
    """The state when a step was left out; its loss does not count for later limits."""
    return replace(state, skipped_in_row=state.skipped_in_row + 1, skipped_steps=state.skipped_steps + 1)


def after_accepted(state: GuardState, loss: float, config: GuardConfig) -> GuardState:
    """The state when a step was taken."""
    if config.max_skipped_steps == 0:
        return state
    return replace(state, recent_losses=(*state.recent_losses, loss)[-config.window_steps :], skipped_in_row=0)


def in_new_phase(state: GuardState) -> GuardState:
    """The state when the data change: other data have other losses, so that earlier ones set no limit."""
    return replace(state, recent_losses=())
