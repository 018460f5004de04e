"""The protocol between the training loop and what runs the model, and its plain implementation.

An engine holds the model and its optimizer: forward, backward, one step, and the full state as named tensors.
`PlainEngine` runs one process, or several that average their gradients by all_reduce. Its state and those of
DeepSpeedEngine and FsdpEngine have the same names: a checkpoint of one resumes under another, at any world size.
Shapes: B batch, C channels, H W pixels, T tokens, K values, N numbers.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsplatform.model.gather import FeatureGather
from rsplatform.model.mammut import Mammut, MammutOutput
from rsplatform.train.freezing import names_of_parts
from rsplatform.train.optimizer import OptimizerConfig, build_optimizers, set_learning_rate

MODEL, FIRST_MOMENT, SECOND_MOMENT, NUM_STEPS = "model/", "exp_avg/", "exp_avg_sq/", "num_steps"
MUON_MOMENT = "momentum/"
# Where a checkpoint keeps what torch's optimizers call by these names.
MOMENTS = {FIRST_MOMENT: "exp_avg", SECOND_MOMENT: "exp_avg_sq", MUON_MOMENT: "momentum_buffer"}
# Number of updates of a parameter that was frozen for a while; all others have had `num_steps`.
UPDATES = "updates/"
# Gradients are averaged in pieces of this many numbers, to bound the extra memory.
BUCKET_NUMBERS = 32 * 2**20


class Engine(Protocol):
    """What the loop needs. Every method but `model` is called by all processes together.

    `backward` adds gradients; a step may have several, all but the last with `is_last=False`, so that gradients
    cross the network once a step. `step` returns the gradient's norm; where that is not finite, nothing is updated.
    `shards`: what this process holds of each weight, all of it where nothing is sharded. `gathered` makes whole tensors
    in host memory of others that are cut like them (a moving average), and `cut` is its inverse.
    """

    gather: FeatureGather | None

    @property
    def keeps_model_whole(self) -> bool: ...

    @property
    def model(self) -> Mammut: ...

    @property
    def device(self) -> torch.device: ...

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        z_loss_weight: float = 0.0,
        sample_keys_B: Tensor | None = None,
    ) -> MammutOutput: ...

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None: ...

    def step(self, learning_rate: float) -> float: ...

    def freeze(self, parts: Collection[str]) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...

    def shards(self) -> dict[str, Tensor]: ...

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def mean_over_processes(values_K: Tensor, gather: FeatureGather | None) -> Tensor:
    """Mean of each process's values; every process gets the same."""
    if gather is None:
        return values_K
    return gather.total(values_K) / gather.world_size


def gather_of_default_group() -> FeatureGather | None:
    """The gather of the running process group; None where a process trains alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return FeatureGather.of_group()


def update_counts(counts: Mapping[str, float]) -> dict[str, Tensor]:
    """The part of an engine's state that says how many updates each parameter has had; those without any are left out.

    Adam's bias correction reads it: a part that was frozen goes on where its own moments stopped.
    """
    most = max(counts.values(), default=0.0)
    own = {UPDATES + name: torch.tensor(float(count)) for name, count in counts.items() if 0 < count < most}
    return {NUM_STEPS: torch.tensor(float(most))} | own


def owners(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, torch.optim.Optimizer]:
    """Which of the optimizers has each parameter."""
    return {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def updates_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """How many updates a parameter with moments has had; the inverse of `update_counts`."""
    return tensors.get(UPDATES + name, tensors[NUM_STEPS])


class PlainEngine:
    """One copy of the model per process. `gather` None: this process alone."""

    keeps_model_whole = True

    def __init__(self, model: Mammut, config: OptimizerConfig, gather: FeatureGather | None = None) -> None:
        self.gather = gather
        self._model = model
        self._config = config
        self._optimizers = build_optimizers(model, config)
        self._optimizer_of = owners(self._optimizers)

    @property
    def model(self) -> Mammut:
        """The module itself, whole on every process."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.log_logit_scale.device

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        z_loss_weight: float = 0.0,
        sample_keys_B: Tensor | None = None,
    ) -> MammutOutput:
        """Both passes of the model."""
        return self._model(images_BCHW, tokens_BT, ground_sample_distance_m_B, z_loss_weight, sample_keys_B)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Add the gradients of this process's loss; `step` averages them over processes, once for all of a step."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Average gradients, clip, update; returns the norm before clipping. A norm that is not finite: no update."""
        if self.gather is not None:
            self._average_gradients(self.gather)
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._config.gradient_clip))
        for optimizer in self._optimizers:
            if math.isfinite(norm):
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def freeze(self, parts: Collection[str]) -> None:
        """Leave exactly these parts as they are from now on: without a gradient optimizers pass them over."""
        frozen = names_of_parts(self._model, parts)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimizer's moments by parameter name, and the number of AdamW's updates."""
        tensors, updates = {}, {}
        for name, parameter in self._model.named_parameters():
            tensors[MODEL + name] = parameter.detach()
            own = self._moments_of(parameter)
            tensors |= {prefix + name: own[key] for prefix, key in MOMENTS.items() if key in own}
            if "step" in own:
                updates[name] = float(own["step"])
        return tensors | update_counts(updates)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken; KeyError if it is the state of another model."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(tensors[MODEL + name])
            kept = {key: tensors[prefix + name] for prefix, key in MOMENTS.items() if prefix + name in tensors}
            own = {key: value.to(parameter.device).clone() for key, value in kept.items()}
            if FIRST_MOMENT + name in tensors:
                own["step"] = updates_of(tensors, name).clone().to(parameter.device)
            self._moments_of(parameter).update(own)

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the parameter's optimizer keeps of it; nothing, kept nowhere, for one that was never to be trained."""
        optimizer = self._optimizer_of.get(parameter)
        return {} if optimizer is None else optimizer.state[parameter]

    def shards(self) -> dict[str, Tensor]:
        """The weights themselves, whole."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are: whole, where the weights are."""
        return dict(shards)

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return dict(whole)

    def _average_gradients(self, gather: FeatureGather) -> None:
        """Written out instead of DDP: DDP rearranges its buckets after the first step, so that a resumed run of
        three or more processes would add in another order and lose bitwise equality. What is given up: overlap
        of communication with the backward pass (DeepSpeedEngine has it)."""
        for bucket in _buckets([p for p in self._model.parameters() if p.requires_grad]):
            flat_N = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
            dist.all_reduce(flat_N, group=gather.group)
            flat_N /= gather.world_size
            pieces = flat_N.split([parameter.numel() for parameter in bucket])
            for parameter, piece_N in zip(bucket, pieces, strict=True):
                parameter.grad = piece_N.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, up to BUCKET_NUMBERS numbers at a time."""
    bucket: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        if bucket and (numbers + parameter.numel() > BUCKET_NUMBERS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(parameter)
        numbers += parameter.numel()
    if bucket:
        yield bucket
