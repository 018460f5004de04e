"""AdamW or Muon with parameter groups, learning-rate schedules and a moving average of the weights.

In: a module and frozen configs. Out: a torch optimizer, a learning rate per step, an averaged copy. The caller
clips gradients and steps. Torch only. The logit scale's clamp is part of the model (model/mammut.py).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rsplatform.model.mammut import Mammut
from rsplatform.train.freezing import is_in_parts
from rsplatform.train.muon import Muon, hidden_matrices, split_groups

# What comes before the first block of a tower, by its name there.
_BEFORE_BLOCKS = (
    "patch_embedding",
    "position_HWD",
    "class_token_D",
    "class_position_D",
    "norm_input",
    "scale_encoding",
    "scale_positions",
    "token_embedding_VD",
    "position_TD",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Betas, weight decay and clip are those of a published openMaMMUT run (RECIPE.md) [F].

    `kind` muon gives the matrices of linear maps to Muon (muon.py), at `muon_rate_factor` times the learning rate (our
    default, from a few short runs); for engines that keep matrices, so not for DeepSpeed.
    `layer_decay` lowers the learning rate of each block by that factor under the one above it, for continual training:
    what early blocks know stays. Off by default.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    muon_rate_factor: float = 4.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.2
    gradient_clip: float = 1.0
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optimizer.kind: {self.kind!r} is not one of adamw, muon")
        if self.muon_rate_factor <= 0:
            raise ValueError(f"optimizer.muon_rate_factor {self.muon_rate_factor} must be above 0")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay {self.layer_decay} is not in (0, 1]: leave it out for none")
        if self.gradient_clip <= 0:
            raise ValueError(f"optimizer.gradient_clip {self.gradient_clip} must be above 0")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `learning_rate`, then a decay to `final_fraction` of it over the rest of the steps.

    cosine: half a cosine. wsd: constant, then linear over the last `decay_fraction` of the steps. constant: none.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay: Literal["cosine", "wsd", "constant"] = "cosine"
    final_fraction: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warmup_steps < 0:
            raise ValueError("schedule: learning_rate must be above 0 and warmup_steps not negative")
        if self.decay not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule.decay: {self.decay!r} is not one of cosine, wsd, constant")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"schedule.decay_fraction {self.decay_fraction} is not in (0, 1]: the part of the steps that decays"
            )
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction {self.final_fraction} is not in [0, 1]: the part that is left")

    def at(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0 … num_steps - 1; the first step of a warm-up is above 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.learning_rate
        decay_start = self.warmup_steps
        if self.decay == "wsd":
            decay_start = max(decay_start, round(num_steps * (1 - self.decay_fraction)))
        done = (step - decay_start) / max(1, num_steps - decay_start)
        done = min(1.0, max(0.0, done))
        remaining = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * remaining)


def layer_rate_factors(model: Mammut, layer_decay: float) -> dict[str, float]:
    """Factor of the learning rate per parameter name: `layer_decay` to the power of the blocks above it.

    Both towers count by themselves: their last block has 1 · layer_decay, what follows the blocks (norms, pooling,
    projections, the vocabulary where it is not tied, the logit scale) has 1, and what comes before them (patch,
    token and position embeddings) one power more than their first block. A cross block counts as the block before
    it. BEiT's rule (arXiv 2106.08254, appendix) for one tower; for two it is our default [D].
    """
    num_layers = {"vision": len(model.vision.blocks), "text": len(model.text.blocks)}
    every = model.config.text.cross_attention_every

    def num_above(name: str) -> int:
        tower, _, rest = name.partition(".")
        if tower not in num_layers:
            return 0
        kind, _, rest = rest.partition(".")
        if kind in ("blocks", "cross_blocks"):
            index = int(rest.partition(".")[0])
            return num_layers[tower] - (index if kind == "blocks" else index * every)
        return num_layers[tower] + 1 if kind in _BEFORE_BLOCKS else 0

    return {name: layer_decay ** num_above(name) for name, _ in model.named_parameters()}


def parameter_groups(model: Mammut, config: OptimizerConfig, freezable: Collection[str] = ()) -> list[dict[str, Any]]:
    """Groups of equal decay and equal `rate_factor`; parameters without gradient are in none.

    Matrices decay; vectors and single numbers (norms, biases, gains, the logit scale) do not. Parameters that differ
    in which of the parts `freezable` they belong to stand in different groups, so that a group is frozen as a whole
    (`PausableAdamW`).
    """
    factors = layer_rate_factors(model, config.layer_decay) if config.layer_decay else {}
    groups: dict[tuple[tuple[str, ...], bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = tuple(part for part in freezable if is_in_parts(name, [part]))
            groups.setdefault((parts, parameter.ndim < 2, factors.get(name, 1.0)), []).append(parameter)
    return [
        {
            "params": groups[parts, is_vector, factor],
            "weight_decay": 0.0 if is_vector else config.weight_decay,
            "rate_factor": factor,
            "parts": parts,
            "frozen": False,
        }
        for parts, is_vector, factor in sorted(groups)
    ]


class PausableAdamW(torch.optim.AdamW):
    """AdamW that leaves groups with `frozen` set as they are: weights, moments and number of updates."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the groups that are not frozen."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["frozen"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def build_optimizer(model: Mammut, config: OptimizerConfig, freezable: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over all of `parameter_groups`; the learning rate is set before every step."""
    return _adamw(parameter_groups(model, config, freezable), config)


def build_optimizers(model: Mammut, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The config's kind, over `parameter_groups`: AdamW alone, or beside Muon, which needs matrices."""
    groups = parameter_groups(model, config)
    if config.kind == "adamw":
        return [_adamw(groups, config)]
    others, matrices = split_groups(groups, hidden_matrices(model), config.muon_rate_factor)
    return [_adamw(others, config), Muon(matrices)]


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    return PausableAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of a step: each group's is its own factor of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]


class AveragedWeights:
    """Exponential moving average of an engine's shards of the weights, in float32 (or wider, as they are) beside them.

    `ramps`: the nth update decays by no more than (1 + n) / (10 + n), as TensorFlow's ExponentialMovingAverage with
    `num_updates` does: a short run's average is not one of its first weights. Without, by `decay` from the start.
    """

    def __init__(self, shards: Mapping[str, Tensor], decay: float, *, ramps: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay {decay} is not in (0, 1)")
        self.decay, self.ramps = decay, ramps
        self.tensors = {name: value.detach().to(_at_least_float32(value), copy=True) for name, value in shards.items()}

    @torch.no_grad()
    def update(self, shards: Mapping[str, Tensor], num_updates: int) -> None:
        """Move the average towards the present weights, after `num_updates` such moves before."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.ramps else self.decay
        for name, average in self.tensors.items():
            average.lerp_(shards[name].to(average.dtype), 1.0 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the average by a stored one."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
