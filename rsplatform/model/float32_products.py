"""Float32 matrix products on a CPU through oneDNN instead of MKL, where no digit is lost by it.

torch hands them to MKL, which takes a slow path on processors of other makers than Intel: 0.20 against 0.44 TFLOP/s on
two cores of an AMD EPYC (2026-11-25). torch's precision "medium" sends the same products to oneDNN. That may round to
bfloat16, and does where a processor multiplies it faster (AMX), so it is tried first, and undone where digits are lost.
Shapes: B batch, K heads, T queries, S keys, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

THROUGH_ONEDNN = "medium"
# Of 2^10 products added in float32, 1e-6 of the largest sum is lost; with bfloat16 factors 1e-3.
LOST_DIGITS = 1e-5
# Attention weights above are not worth their memory (our default).
MOST_SCORE_BYTES = 64 * 2**20


def use_onednn_products() -> bool:
    """For this process, from now on; whether it is so. Leaves alone what somebody has already chosen.

    Never where torch sees a CUDA device: there the same setting would round that device's products to TF32.
    """
    if goes_through_onednn() or torch.cuda.is_available():
        return goes_through_onednn()
    try:
        is_chosen = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # somebody has set a precision by backend, which the older call does not read
        is_chosen = True
    if is_chosen:
        return False
    torch.set_float32_matmul_precision(THROUGH_ONEDNN)
    if _lost_digits() < LOST_DIGITS:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def goes_through_onednn() -> bool:
    """Whether this process multiplies float32 through oneDNN on a CPU."""
    settings: Any = torch.backends.mkldnn  # its stub lacks matmul
    return settings.matmul.fp32_precision == "bf16"


def _lost_digits() -> float:
    """The largest error of a few products (plain, transposed, of many matrices), as part of the largest number."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((512, 1024), (1024, 512)), ((48, 77, 64), (48, 64, 77)))
    lost = 0.0
    for first_shape, second_shape in shapes:
        first, second = (torch.randn(shape, generator=generator) for shape in (first_shape, second_shape))
        exact = first.double() @ second.double()
        for product in (first @ second, (second.mT @ first.mT).mT):
            lost = max(lost, float((product.double() - exact).abs().max() / exact.abs().max()))
    return lost


def attention(
    query_BKTd: Tensor,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    mask_B11S: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Scaled dot-product attention (B, K, T, d); the mask is True where a key counts, for one query at least.

    torch's own, but in float32 on a CPU through oneDNN, where its many small products are slower than before. A few
    large ones are faster, most of all where a process keeps its freed memory (train/allocator.py).
    """
    score_bytes = 4 * query_BKTd.shape[:3].numel() * key_BKSd.shape[2]
    if score_bytes > MOST_SCORE_BYTES or not _is_ours(query_BKTd):
        return F.scaled_dot_product_attention(query_BKTd, key_BKSd, value_BKSd, attn_mask=mask_B11S, is_causal=causal)
    scores_BKTS = (query_BKTd * query_BKTd.shape[-1] ** -0.5) @ key_BKSd.transpose(2, 3)
    if causal:
        later_TS = torch.ones(scores_BKTS.shape[2:], dtype=torch.bool).triu(1)
        scores_BKTS = scores_BKTS.masked_fill(later_TS, -torch.inf)
    if mask_B11S is not None:
        scores_BKTS = scores_BKTS.masked_fill(~mask_B11S, -torch.inf)
    return scores_BKTS.softmax(-1) @ value_BKSd


def _is_ours(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return goes_through_onednn()
