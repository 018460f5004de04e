"""The Engine that shards with torch alone: FSDP2 (`fully_shard`) behind the same calls as PlainEngine.

In: a model, our optimizer config and how many processes share one copy of it. Weights, gradients and moments are
shards outside of a block's forward and backward. Its state is the whole model by parameter name, so a checkpoint
resumes under any engine and world size. What is given up: sharded checkpoints (a whole state has to fit each
process's host), and under bfloat16 autocast the bfloat16 copies of the weights stay until the backward pass.
Shapes: B batch, C channels, H W pixels, T tokens.
"""

import math
import warnings
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rsplatform.model.gather import FeatureGather
from rsplatform.model.mammut import Mammut, MammutOutput
from rsplatform.train.engine import (
    FIRST_MOMENT,
    MODEL,
    MOMENTS,
    gather_of_default_group,
    owners,
    update_counts,
    updates_of,
)
from rsplatform.train.freezing import names_of_parts
from rsplatform.train.optimizer import OptimizerConfig, build_optimizers, set_learning_rate

# Entries of the model beside `forward`: each collects the root's shards first, on all processes together.
_INFERENCE = ("encode_image", "encode_text", "image_tokens", "caption_logits", "patch_features", "head")


def shard_mesh(device_type: str, shard_size: int | None) -> DeviceMesh:
    """All processes in one row, or copies of the model (rows) that `shard_size` neighbours share each (HSDP).

    Raises:
        ValueError: the processes do not divide into rows of `shard_size`.
    """
    world_size = dist.get_world_size()
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    if shard_size < 1 or world_size % shard_size:
        raise ValueError(
            f"train.shard_size {shard_size} does not divide the {world_size} workers: "
            "choose a divisor of train.num_workers, or leave it out to shard over all"
        )
    sides = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, sides, mesh_dim_names=("replicate", "shard"))


class FsdpEngine:
    """One process's shards. Needs a running process group, also for one process; all start from equal weights.

    Each block is a unit that is collected for its own forward and backward only; what is outside the blocks
    (embeddings, positions, pooling, the logit scale) belongs to the root unit, which stays for the whole step.

    Raises:
        RuntimeError: no process group.
        ValueError: a `shard_size` that does not divide the number of processes.
    """

    keeps_model_whole = False

    def __init__(self, model: Mammut, config: OptimizerConfig, *, shard_size: int | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("FsdpEngine needs torch.distributed.init_process_group before it")
        self.gather: FeatureGather | None = gather_of_default_group()
        self._model = model
        self._config = config
        mesh = shard_mesh(model.log_logit_scale.device.type, shard_size)
        for block in (*model.vision.blocks, *model.text.blocks, *model.text.cross_blocks):
            fully_shard(block, mesh=mesh)
        root = fully_shard(model, mesh=mesh)
        assert isinstance(root, FSDPModule)
        self._root = root
        # it warns of outputs that are views: changed in place they would lose their hook; our losses change nothing
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for method in _INFERENCE:
            register_fsdp_forward_method(model, method)
        self._optimizers = build_optimizers(model, config)
        self._optimizer_of = owners(self._optimizers)
        self._settle()

    @property
    def model(self) -> Mammut:
        """The module; its parameters are shards outside of `forward` and the methods for inference."""
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
        """Both passes; each block's shards are collected as it goes."""
        return self._model(images_BCHW, tokens_BT, ground_sample_distance_m_B, z_loss_weight, sample_keys_B)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Gradients of the own shards, averaged over processes while the last ones are made.

        Until then they are whole: the price of sending them once a step.
        """
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_is_last_backward(is_last)
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip and update the own shards; returns the norm of the whole gradient before clipping.

        A norm that is not finite: no update.
        """
        parameters = self._shards().values()
        norm = float(_whole(nn.utils.clip_grad_norm_(parameters, self._config.gradient_clip)))
        for optimizer in self._optimizers:
            if math.isfinite(norm):
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def freeze(self, parts: Collection[str]) -> None:
        """Leave exactly these parts as they are from now on: without a gradient optimizers pass them over."""
        frozen = names_of_parts(self._model, parts)
        for name, parameter in self._shards().items():
            parameter.requires_grad_(name not in frozen)

    def _settle(self) -> None:
        """FSDP2 chooses each unit's dtypes at the first call, among the parameters that need a gradient then: a unit
        that began frozen could never be trained. So the first call comes here, before anything is frozen."""
        with torch.no_grad():
            scale = self._model.log_logit_scale
            self._model.head(torch.zeros(1, self._model.config.vision.width, dtype=scale.dtype, device=scale.device))
        self._root.reshard()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by parameter name, whole and in every process's host memory; PlainEngine's names."""
        tensors, updates = {}, {}
        for name, parameter in self._shards().items():
            tensors[MODEL + name] = _whole(parameter.detach()).cpu()
            own = self._optimizer_of[parameter].state[parameter]
            tensors |= {prefix + name: _whole(own[key]).cpu() for prefix, key in MOMENTS.items() if key in own}
            if "step" in own:
                updates[name] = float(_whole(own["step"]))
        return tensors | update_counts(updates)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Cut the own shards out of a whole state of any engine; KeyError if it is the state of another model."""
        for name, parameter in self._shards().items():
            parameter.copy_(_cut_like(parameter, tensors[MODEL + name]))
            kept = {key: tensors[prefix + name] for prefix, key in MOMENTS.items() if prefix + name in tensors}
            own = {key: torch.zeros_like(parameter).copy_(_cut_like(parameter, kept[key])) for key in kept}
            if FIRST_MOMENT + name in tensors:
                own["step"] = updates_of(tensors, name).clone().to(self.device)
            self._optimizer_of[parameter].state[parameter].update(own)

    def shards(self) -> dict[str, Tensor]:
        """The own part of each weight."""
        return {name: _local(parameter.detach()) for name, parameter in self._shards().items()}

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, one after the other, in every process's host memory."""
        return {name: _whole(_placed_like(parameter, shards[name])).cpu() for name, parameter in self._shards().items()}

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The own part of each whole tensor; KeyError if one is missing."""
        return {name: _local(_cut_like(parameter, whole[name])) for name, parameter in self._shards().items()}

    def _shards(self) -> dict[str, nn.Parameter]:
        """The sharded parameters. After a forward without backward (validation) the root is still collected."""
        self._root.reshard()
        return dict(self._model.named_parameters())


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold shards or partial norms of; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _placed_like(parameter: Tensor, shard: Tensor) -> Tensor:
    """The tensor that the processes' `shard`s are parts of, as `parameter`'s are."""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _cut_like(shard: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, placed as `shard` is; every process has the whole, so nothing is sent."""
    assert isinstance(shard, DTensor)
    return distribute_tensor(whole.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
