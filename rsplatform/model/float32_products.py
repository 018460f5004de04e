"""Float32 matrix products on a CPU through oneDNN instead of MKL, where no digit is lost by it.

torch hands them to MKL, which takes a slow path on processors of other makers than Intel: 0.20 against 0.44 TFLOP/s on
two cores of an AMD EPYC (2026-11-25). torch's precision "medium" sends the same products to oneDNN. That may round to
bfloat16, and does where a processor multiplies it faster (AMX), so it is tried first, and undone where digits are lost.
Shapes: B batch, K heads, T queries, S keys, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THROUGH_ONEDNN = "medium"
# Of 2^10 products added in float32, 1e-6 of the largest sum is lost; with bfloat16 factors 1e-3.
LOST_DIGITS = 1e-5
# Above, attention weights are not worth their memory.
MOST_TOKENS = 512


def use_onednn_products() -> bool:
    """For this process, from now on; whether it is so. Leaves alone what somebody has already chosen."""
    if torch.get_float32_matmul_precision() != "highest":
        return torch.get_float32_matmul_precision() == THROUGH_ONEDNN
    torch.set_float32_matmul_precision(THROUGH_ONEDNN)
    if _lost_digits() < LOST_DIGITS:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def _lost_digits() -> float:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(512, 1024, generator=generator) for _ in range(2))
    exact = first.double() @ second.double().T
    return float(((first @ second.T).double() - exact).abs().max() / exact.abs().max())


def attention(
    query_BKTd: Tensor,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    mask_B11S: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Scaled dot-product attention (B, K, T, d); the mask is True where a key counts, for one query at least.

    torch's own, but in float32 on a CPU through oneDNN: its many small products would be slower there than before, and
    for short sequences a few large ones are faster than either.
    """
    short = max(query_BKTd.shape[2], key_BKSd.shape[2]) <= MOST_TOKENS
    if not short or not _goes_through_onednn(query_BKTd):
        return F.scaled_dot_product_attention(query_BKTd, key_BKSd, value_BKSd, attn_mask=mask_B11S, is_causal=causal)
    scores_BKTS = (query_BKTd * query_BKTd.shape[-1] ** -0.5) @ key_BKSd.transpose(2, 3)
    if causal:
        later_TS = torch.ones(scores_BKTS.shape[2:], dtype=torch.bool).triu(1)
        scores_BKTS = scores_BKTS.masked_fill(later_TS, -torch.inf)
    if mask_B11S is not None:
        scores_BKTS = scores_BKTS.masked_fill(~mask_B11S, -torch.inf)
    return scores_BKTS.softmax(-1) @ value_BKSd


def _goes_through_onednn(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return torch.get_float32_matmul_precision() == THROUGH_ONEDNN
