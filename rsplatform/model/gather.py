"""Collects rows from every process so that a contrastive loss sees the global batch.

In: this process's rows (B, …), the same number everywhere. Out: all rows (G, …) in rank order, with gradient.
Works on any torch.distributed backend; does not start or configure process groups.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class FeatureGather:
    """Gathers over a process group (None: the default group). Make one with `FeatureGather.of_group`."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None) -> "FeatureGather":
        """The gather of an initialised process group."""
        return cls(rank=dist.get_rank(group), world_size=dist.get_world_size(group), group=group)

    def rows(self, rows_B: Tensor) -> Tensor:
        """All processes' rows in rank order; gradients flow back to the process that sent the row."""
        gathered = _GatherWithGradient.apply(rows_B, self)
        assert isinstance(gathered, Tensor)
        return gathered

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes of a value that carries no gradient."""
        summed = value.detach().clone()
        dist.all_reduce(summed, group=self.group)
        return summed


class _GatherWithGradient(torch.autograd.Function):
    """all_gather forward; backward sums what every process wants of each row and hands it to the row's owner."""

    @staticmethod
    def forward(ctx, rows_B: Tensor, gather: FeatureGather) -> Tensor:
        ctx.gather = gather
        ctx.num_rows = len(rows_B)
        received = [torch.empty_like(rows_B) for _ in range(gather.world_size)]
        dist.all_gather(received, rows_B.contiguous(), group=gather.group)
        return torch.cat(received)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gather = ctx.gather
        # all_reduce instead of reduce_scatter: gloo has no reduce_scatter for every dtype
        summed_G = gradients[0].contiguous().clone()
        dist.all_reduce(summed_G, group=gather.group)
        return summed_G[gather.rank * ctx.num_rows : (gather.rank + 1) * ctx.num_rows], None
