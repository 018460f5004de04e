"""The Engine that DeepSpeed runs: ZeRO stages 0 to 3 behind the same calls as PlainEngine. The only module that
imports deepspeed.

In: a model, our optimizer config and a stage. Its state is the whole model by parameter name, gathered from the
shards: no pickle of DeepSpeed's, and a checkpoint resumes at any stage, world size, or under PlainEngine.
Float32 weights, gradients and collectives, also under bfloat16 autocast. What is given up: sharded checkpoints (a
whole state has to fit each process's host).
Shapes: B batch, C channels, H W pixels, T tokens.
"""

import math
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rsplatform.model.gather import FeatureGather
from rsplatform.model.mammut import Mammut, MammutOutput
from rsplatform.train.deepspeed_config import deepspeed_config
from rsplatform.train.engine import (
    FIRST_MOMENT,
    MODEL,
    SECOND_MOMENT,
    gather_of_default_group,
    update_counts,
    updates_of,
)
from rsplatform.train.freezing import is_in_parts, names_of_parts
from rsplatform.train.optimizer import OptimizerConfig, build_optimizer, set_learning_rate

_MOMENTS = {FIRST_MOMENT: "exp_avg", SECOND_MOMENT: "exp_avg_sq"}


def _check_needs(config: OptimizerConfig) -> None:
    if not torch.distributed.is_initialized():
        raise RuntimeError("DeepSpeedEngine needs torch.distributed.init_process_group before it")
    if config.kind != "adamw":
        raise ValueError(f"optimizer.kind: {config.kind} needs whole matrices, DeepSpeed keeps flat pieces; use fsdp")


class DeepSpeedEngine:
    """One process's part of a model that DeepSpeed shards. Needs a running process group, also for one process.

    `freezable`: all parts that will ever be frozen. DeepSpeed lays out gradients and shards once, so these parts keep
    shards of their own; frozen, their gradients are set to zero and AdamW passes them over. What is given up: their
    gradients are computed all the same. `precision`: that of every forward, fixed here because DeepSpeed's own setting
    wins over a torch.autocast around it.

    Raises:
        RuntimeError: no process group.
        ValueError: another optimizer than AdamW.
    """

    def __init__(
        self,
        model: Mammut,
        config: OptimizerConfig,
        *,
        batch_size: int,
        zero_stage: int,
        freezable: Collection[str] = (),
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        _check_needs(config)
        # read at import: without it DeepSpeed looks for an accelerator extension and fails on CPU-only machines
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # launchers of many processes, Ray Train among them, set it
        import deepspeed

        # shared-memory collectives would be compiled at run time: not every machine has a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.gather: FeatureGather | None = gather_of_default_group()
        self._model = model
        self._zero_stage = zero_stage
        self._named = dict(model.named_parameters())
        self._precision, self._freezable = precision, frozenset(freezable)
        self._optimizer = build_optimizer(model, config, sorted(self._freezable))
        # DeepSpeed puts flat shards in place of the parameters: which belong to a group has to be noted before
        members = [{id(p) for p in group["params"]} for group in self._optimizer.param_groups]
        self._group_names = [[n for n, p in self._named.items() if id(p) in ids] for ids in members]
        self._frozen_names: frozenset[str] = frozenset()
        self._mask_gradients()
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(batch_size, config, zero_stage, precision),
            dist_init_required=False,
        )[0]
        self._reduction, self._holds_back = ExitStack(), False
        self._updates = dict.fromkeys(self._named, 0)
        self._gradient_clip = config.gradient_clip
        self._make_moments()

    @property
    def keeps_model_whole(self) -> bool:
        """Whether `model` can be run and read outside of `forward`."""
        return self._zero_stage < 3

    @property
    def model(self) -> Mammut:
        """The module; under stage 3 its parameters are shards outside of `forward`."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._engine.device

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        z_loss_weight: float = 0.0,
        sample_keys_B: Tensor | None = None,
    ) -> MammutOutput:
        """Both passes; stage 3 collects each layer's shards as it goes.

        Raises:
            ValueError: run under torch.autocast without having been made for it, or the other way round.
        """
        if torch.is_autocast_enabled(self.device.type) != (self._precision == "bfloat16"):
            raise ValueError(f"DeepSpeedEngine was made for {self._precision}: give it the precision of the steps")
        return self._engine(images_BCHW, tokens_BT, ground_sample_distance_m_B, z_loss_weight, sample_keys_B)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Gradients, averaged over processes with the last ones of a step.

        By itself ZeRO 2 and 3 would reduce after every backward; until the last one they keep whole gradients here.
        """
        if self._zero_stage == 0:
            self._engine.set_gradient_accumulation_boundary(is_last)
        elif not is_last and not self._holds_back:
            self._reduction.enter_context(self._engine.coalesce_grad_reduction())
            self._holds_back = True
        self._engine.backward(loss)
        if is_last:
            self._reduction.close()
            self._holds_back = False

    def step(self, learning_rate: float) -> float:
        """Clip and update the own shard; returns the norm before clipping. A norm that is not finite: no update."""
        set_learning_rate(self._optimizer, learning_rate)
        if self._zero_stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._gradient_clip))
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
        else:  # DeepSpeed itself leaves the update out
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        if math.isfinite(norm):
            for name in self._named:
                self._updates[name] += name not in self._frozen_names
        return norm

    def freeze(self, parts: Collection[str]) -> None:
        """Leave exactly these parts as they are from now on.

        Raises:
            ValueError: a part that was not named in `freezable`.
        """
        unknown = set(parts) - self._freezable
        if unknown:
            raise ValueError(f"DeepSpeedEngine was not made to freeze {sorted(unknown)}: name all parts in `freezable`")
        self._frozen_names = names_of_parts(self._model, parts)
        for group in self._optimizer.param_groups:
            group["frozen"] = not set(parts).isdisjoint(group["parts"])

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by parameter name, whole and in every process's host memory; PlainEngine's names."""
        tensors = {}
        for name, parameter in self._named.items():
            keys = {MODEL: None} | (_MOMENTS if self._updates[name] else {})
            for prefix, key in keys.items():
                # one by one: together they would be three models in the device's memory
                tensors[prefix + name] = self._whole(parameter, key).cpu()
        return tensors | update_counts(self._updates)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights and moments back into the shards, whatever engine and world size they came from."""
        for name, parameter in self._named.items():
            has_moments = FIRST_MOMENT + name in tensors
            self._updates[name] = int(updates_of(tensors, name)) if has_moments else 0
            keys = {MODEL: None} | (_MOMENTS if has_moments else {})
            for prefix, key in keys.items():
                self._put(parameter, tensors[prefix + name].to(self.device), key)
        for group, partition in self._partitions:
            # all of a group were frozen and thawed together
            self._optimizer.state[partition]["step"].fill_(self._updates[self._group_names[group][0]])

    def shards(self) -> dict[str, Tensor]:
        """The weights, of which stage 3 has a part here: equal ones, flat, the last padded with zeros."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self.keeps_model_whole:
            return {name: parameter.detach() for name, parameter in self._named.items()}
        return {name: safe_get_local_fp32_param(parameter) for name, parameter in self._named.items()}

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, under stage 3 one after the other and in every process's host memory."""
        if self.keeps_model_whole:
            return dict(shards)
        whole = {}
        for name, shard in shards.items():
            shape = _shape(self._named[name])
            padded = shard if self.gather is None else self.gather.rows(shard)
            whole[name] = padded[: shape.numel()].view(shape).cpu()
        return whole

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The own part of each whole tensor; KeyError if one is missing."""
        if self.keeps_model_whole:
            return dict(whole)
        return {name: self._own_slice(parameter, whole[name]) for name, parameter in self._named.items()}

    def _whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A parameter (key None) or one of its moments, gathered from all shards."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._zero_stage == 0:
            return parameter.detach() if key is None else self._optimizer.state[parameter][key]
        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, "DeepSpeed knows no shard of a parameter that it was given"
        return whole.view(_shape(parameter))

    def _put(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """The inverse of `_whole`."""
        from deepspeed import utils

        if self._zero_stage == 0:
            (parameter if key is None else self._optimizer.state[parameter][key]).copy_(value)
        elif self._zero_stage == 3:
            own = self._own_slice(parameter, value)
            if key is None:
                utils.safe_set_local_fp32_param(parameter, own)
                vars(parameter)["ds_tensor"].data.copy_(own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def _own_slice(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's shard under stage 3: equal parts, the last one padded with zeros."""
        from deepspeed.utils import safe_get_local_fp32_param

        numbers = safe_get_local_fp32_param(parameter).numel()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        padded = torch.zeros(numbers * world_size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        return padded[rank * numbers : (rank + 1) * numbers]

    def _mask_gradients(self) -> None:
        """Zero gradients of what is frozen at the time, before DeepSpeed takes them."""

        def mask(name: str, parameter: nn.Parameter) -> None:
            parameter.register_hook(lambda grad: torch.zeros_like(grad) if name in self._frozen_names else grad)

        for name, parameter in self._named.items():
            if is_in_parts(name, self._freezable):
                mask(name, parameter)

    def _make_moments(self) -> None:
        """Moments before the first step. AdamW would make them in it, parameter group by group, but DeepSpeed looks
        for those of all groups after the first group's step, and never again."""
        sharded = self._engine.optimizer
        if self._zero_stage == 0:
            groups = enumerate(self._group_names)
            self._partitions = [(group, self._named[name]) for group, names in groups for name in names]
        elif self._zero_stage == 3:
            flat = enumerate(sharded.fp32_partitioned_groups_flat)
            self._partitions = [(sharded.sub_group_to_group_id[index], partition) for index, partition in flat]
        else:
            self._partitions = list(enumerate(sharded.single_partition_of_fp32_groups))
        for _, partition in self._partitions:
            self._optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        if self._zero_stage in (1, 2):  # lets the parameters find their part of the new moments
            sharded._lazy_init_hp_params_optimizer_state()


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
