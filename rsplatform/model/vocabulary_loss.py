"""Next-token cross-entropy from hidden states and the vocabulary matrix, without ever holding (B, T, V) logits.

In: hidden states and targets (pad id 0 is ignored). Out: the summed loss and the number of tokens it is over.
The gradients are made chunk by chunk in the forward pass and only scaled in the backward one: three matmuls, no
recomputation, and at most `chunk_rows` rows of logits in memory.
Shapes: B batch, T tokens, N non-pad tokens of the batch, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_ID = 0


class TokenLoss(NamedTuple):
    """Sum of the losses of all non-pad targets, and their number (float, so that ranks can add it).

    `z_loss_sum`: the sum of log² Z alone, unweighted and without gradient; None where its weight is 0.
    """

    sum: Tensor
    count: Tensor
    z_loss_sum: Tensor | None = None


def vocabulary_loss(
    hidden_BTD: Tensor,
    vocabulary_VD: Tensor,
    targets_BT: Tensor,
    chunk_rows: int = 2048,
    z_loss_weight: float = 0.0,
) -> TokenLoss:
    """Cross-entropy of `hidden @ vocabulary.T` against `targets`, summed over the non-pad targets.

    `z_loss_weight` adds weight · log² Z for each of them, Z the sum of the exponentials of its logits (PaLM, arXiv
    2204.02311, section 5): it keeps logits from drifting, which the cross-entropy does not see.
    """
    kept_N = (targets_BT.flatten() != PAD_ID).nonzero().squeeze(1)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, kept_N)
    targets_N = targets_BT.flatten().index_select(0, kept_N)
    count = torch.tensor(float(len(kept_N)), device=hidden_BTD.device)
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_ND, vocabulary_VD = hidden_ND.to(dtype), vocabulary_VD.to(dtype)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or vocabulary_VD.requires_grad):
        sums_2 = _ChunkedCrossEntropy.apply(hidden_ND, vocabulary_VD, targets_N, chunk_rows, z_loss_weight)
        assert isinstance(sums_2, Tensor)
        return _token_loss(sums_2, count, z_loss_weight)
    sums_2 = torch.zeros(2, dtype=_loss_dtype(hidden_ND), device=hidden_ND.device)
    for rows_ND, rows_N in zip(hidden_ND.split(chunk_rows), targets_N.split(chunk_rows), strict=True):
        logits_NV = (rows_ND @ vocabulary_VD.T).to(sums_2.dtype)
        sums_2[0] += F.cross_entropy(logits_NV, rows_N, reduction="sum")
        if z_loss_weight:
            sums_2[1] += logits_NV.logsumexp(1).square().sum()
    sums_2[0] += z_loss_weight * sums_2[1]
    return _token_loss(sums_2, count, z_loss_weight)


def _token_loss(sums_2: Tensor, count: Tensor, z_loss_weight: float) -> TokenLoss:
    return TokenLoss(sums_2[0], count, sums_2[1].detach() if z_loss_weight else None)


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The two sums (loss with weighted z-loss, z-loss alone); a gradient flows back from the first one only."""

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, vocabulary_VD: Tensor, targets_N: Tensor, chunk_rows: int, z_loss_weight: float
    ) -> Tensor:
        sums_2 = torch.zeros(2, dtype=_loss_dtype(hidden_ND), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        # added up over the chunks in the loss's precision, also where the weights are bfloat16
        gradient_VD = torch.zeros_like(vocabulary_VD, dtype=sums_2.dtype)
        for start in range(0, len(hidden_ND), chunk_rows):
            rows = slice(start, start + chunk_rows)
            targets_R1 = targets_N[rows].unsqueeze(1)
            logits_RV = (hidden_ND[rows] @ vocabulary_VD.T).to(sums_2.dtype)
            log_sum_R1 = logits_RV.logsumexp(1, keepdim=True)
            sums_2[0] += (log_sum_R1 - logits_RV.gather(1, targets_R1)).sum()
            error_RV = logits_RV.sub_(log_sum_R1).exp_()
            if z_loss_weight:
                sums_2[1] += log_sum_R1.square().sum()
                error_RV.mul_(1 + 2 * z_loss_weight * log_sum_R1)  # d log² Z = 2 log Z softmax
            error_RV.scatter_add_(1, targets_R1, torch.full_like(log_sum_R1, -1.0))
            error_RV = error_RV.to(hidden_ND.dtype)
            gradient_ND[rows] = error_RV @ vocabulary_VD
            gradient_VD += error_RV.T @ hidden_ND[rows]
        sums_2[0] += z_loss_weight * sums_2[1]
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.vocabulary_dtype = vocabulary_VD.dtype
        return sums_2

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gradient_ND, gradient_VD = ctx.saved_tensors
        gradient = gradients[0][0]
        scaled_VD = (gradient_VD * gradient).to(ctx.vocabulary_dtype)
        return gradient_ND * gradient.to(gradient_ND.dtype), scaled_VD, None, None, None
