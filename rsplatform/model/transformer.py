"""The pre-LN transformer parts that the vision encoder and the text decoder share.

In: token features. Out: token features. Knows nothing of pictures, words, padding rules or losses.
Shapes: B batch, T target tokens, S source tokens, D width, K heads, d head width, N rows (tokens of all samples).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsplatform.model.float32_products import attention


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.expand = nn.Linear(width, mlp_width)
        self.contract = nn.Linear(mlp_width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(features)))


class SelfAttention(nn.Module):
    """Self-attention with one packed projection; `attend` is separate so that pads can be left out of the rest."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def attend(self, qkv_BTX: Tensor, *, causal: bool = False, mask_B11T: Tensor | None = None) -> Tensor:
        """Packed (B, T, 3 D) -> (B, T, D). A float mask is never built: causal is a flag, padding a bool mask."""
        batch, num_tokens, packed = qkv_BTX.shape
        head_width = packed // (3 * self.num_heads)
        qkv = qkv_BTX.view(batch, num_tokens, 3, self.num_heads, head_width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed_BKTd = attention(query, key, value, mask_B11T, causal=causal)
        return mixed_BKTd.transpose(1, 2).reshape(batch, num_tokens, packed // 3)

    def forward(self, features_BTD: Tensor) -> Tensor:
        return self.out(self.attend(self.qkv(features_BTD)))


class CrossAttention(nn.Module):
    """Text asks, the image answers: query from text features, key and value from image features of equal width."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def attend(self, query_BTD: Tensor, source_BSD: Tensor) -> Tensor:
        """Projected queries (B, T, D) over source features (B, S, D) -> (B, T, D), before the output projection."""
        batch, num_tokens, width = query_BTD.shape
        head_width = width // self.num_heads
        query = query_BTD.view(batch, num_tokens, self.num_heads, head_width).transpose(1, 2)
        key_value = self.key_value(source_BSD).view(batch, -1, 2, self.num_heads, head_width)
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BKTd = attention(query, key, value)
        return mixed_BKTd.transpose(1, 2).reshape(batch, num_tokens, width)


class EncoderBlock(nn.Module):
    """Pre-LN self-attention and MLP, each with its residual."""

    def __init__(self, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, features_BTD: Tensor) -> Tensor:
        features_BTD = features_BTD + self.attention(self.norm_attention(features_BTD))
        return features_BTD + self.mlp(self.norm_mlp(features_BTD))


def fill_normal(tensor: Tensor, std: float) -> None:
    """Normal numbers in place; nothing on the meta device, where torch would import its compiler first (3 s)."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def initialise_blocks(module: nn.Module, width: int, num_layers: int) -> None:
    """Scaled normal initialisation, as CLIP's: what writes to the residual stream shrinks with its depth."""
    input_std = width**-0.5
    residual_std = input_std * (2 * num_layers) ** -0.5
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        writes_residual = name.endswith(("out", "contract"))
        std = residual_std if writes_residual else input_std
        if name.endswith("expand"):
            std = (2 * width) ** -0.5
        fill_normal(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class _ScatterRows(torch.autograd.Function):
    """Rows into zeros at unique places; the gradient is a plain gather (index_put would sort or add atomically)."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, places_N: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(places_N)
        return rows_ND.new_zeros(num_places, rows_ND.shape[1]).index_copy_(0, places_N, rows_ND)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (places_N,) = ctx.saved_tensors
        return gradients[0].index_select(0, places_N), None, None


class _GatherRows(torch.autograd.Function):
    """Rows from unique places; the gradient is a plain copy into zeros, not a scatter-add."""

    @staticmethod
    def forward(ctx, places_PD: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.num_places = places_PD.shape[0]
        return places_PD.index_select(0, places_N)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (places_N,) = ctx.saved_tensors
        gradient_PD = gradients[0].new_zeros(ctx.num_places, gradients[0].shape[1])
        return gradient_PD.index_copy_(0, places_N, gradients[0]), None


class TokenLayout:
    """Which places of a padded (B, T) batch hold tokens, and the way between padded and pad-free features.

    Linear maps, norms and MLPs run on the pad-free rows (N, D); only attention sees the padded form. Pads are
    then never computed, and read as zeros. With `valid_BT=None` nothing is packed and both ways are reshapes.
    """

    def __init__(self, shape_BT: tuple[int, int], valid_BT: Tensor | None = None):
        self.shape_BT = shape_BT
        self.places_N = None if valid_BT is None else valid_BT.flatten().nonzero().squeeze(1)

    def pack(self, padded_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (N, D)."""
        flat_PD = padded_BTD.flatten(0, 1)
        return flat_PD if self.places_N is None else _pack_rows(flat_PD, self.places_N)

    def unpack(self, rows_ND: Tensor) -> Tensor:
        """(N, D) -> (B, T, D) with zeros where the pads are."""
        if self.places_N is not None:
            rows_ND = _unpack_rows(rows_ND, self.places_N, self.shape_BT[0] * self.shape_BT[1])
        return rows_ND.view(*self.shape_BT, rows_ND.shape[1])


def _pack_rows(flat_PD: Tensor, places_N: Tensor) -> Tensor:
    packed = _GatherRows.apply(flat_PD, places_N)
    assert isinstance(packed, Tensor)
    return packed


def _unpack_rows(rows_ND: Tensor, places_N: Tensor, num_places: int) -> Tensor:
    padded = _ScatterRows.apply(rows_ND, places_N, num_places)
    assert isinstance(padded, Tensor)
    return padded
