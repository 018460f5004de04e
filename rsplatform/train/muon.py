"""Muon: the update of a matrix is replaced by the nearest one whose singular values are all alike.

Rare directions then learn as fast as common ones, and there is one moment instead of two. In: groups of parameters,
whole or sharded by FSDP2. Out: an optimizer. torch's own Muon takes no shards; numbers and formula are the same.
Every process turns every matrix, so that engines agree: the price is that work once a process, and, where matrices
are sharded, one more collection of them a step.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rsplatform.model.mammut import Mammut

# Jordan 2024, "Muon: An optimizer for hidden layers in neural networks" [F]: momentum (Nesterov's), and five steps of a
# quintic Newton-Schulz iteration, chosen to be steep at 0 and to end between 0.7 and 1.2 rather than at 1.
MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
# arXiv 2502.16982 [F]: updates as long as AdamW's usually are. Rate and decay are those of the group, times its factor.
UPDATE_RMS = 0.2


def hidden_matrices(model: Mammut) -> set[Tensor]:
    """The weights that Muon is meant for: matrices of hidden layers, not the first, which reads pixels.

    Our default: the packed maps to queries, keys and values count as one matrix, and the projections into the
    embedding as hidden. Embeddings, positions, the vocabulary, the pooling's folded query and key, and all vectors stay
    AdamW's.
    """
    first = model.vision.patch_embedding
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not first]
    return {layer.weight for layer in layers}


def split_groups(
    groups: Collection[dict[str, Any]], matrices: Collection[Tensor], rate_factor: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups without and with the `matrices`, whose rates are `rate_factor` times the others'."""
    chosen = {id(parameter) for parameter in matrices}
    others, turned = [], []
    for group in groups:
        rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if rest:
            others.append(group | {"params": rest})
        if own:
            turned.append(group | {"params": own, "rate_factor": group["rate_factor"] * rate_factor})
    return others, turned


class Muon(torch.optim.Optimizer):
    """Over matrices alone; groups have `lr` and `weight_decay`. A matrix without a gradient stays as it is."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        moment = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        turned = _part_like(parameter, orthogonal(_whole(gradient.lerp(moment, MOMENTUM))))
        parameter.mul_(1 - rate * weight_decay)
        parameter.add_(turned.to(parameter.dtype), alpha=-rate * UPDATE_RMS * max(parameter.shape) ** 0.5)


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """About U V^T of U S V^T: singular values between 0.7 and 1.2. A matrix of zeros stays.

    In bfloat16 on an accelerator [F], where that is many times faster; a CPU keeps the digits, so that engines agree.
    """
    turned = matrix_MN if matrix_MN.device.type == "cpu" else matrix_MN.bfloat16()
    is_tall = turned.shape[0] > turned.shape[1]
    turned = turned.T if is_tall else turned
    turned = turned / turned.norm().clamp(min=1e-7)  # no singular value above 1
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        gram = turned @ turned.T
        turned = torch.addmm(turned, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), turned, beta=first)
    return turned.T if is_tall else turned


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold shards of; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, which every process has, placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
