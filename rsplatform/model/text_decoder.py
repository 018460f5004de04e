"""One text decoder, run twice with shared weights (MaMMUT, RECIPE.md "Model").

Contrastive pass: bidirectional, no cross-attention, averaged -> one embedding a text. Generative pass: causal,
cross-attention to image features after every nth layer -> hidden states for the next token.
Does not tokenise and does not weigh losses.
Shapes: B batch, T tokens, N non-pad tokens of the batch, S image tokens, D width, E embedding, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsplatform.model.transformer import (
    CrossAttention,
    Mlp,
    SelfAttention,
    TokenLayout,
    fill_normal,
    initialise_blocks,
)
from rsplatform.model.vocabulary_loss import PAD_ID, TokenLoss, vocabulary_loss


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Pooling "masked_mean" leaves pads out; "mean_all" is openMaMMUT's mean of every position.

    `self_mlp_before_cross=False` drops the MLP of the layers that a cross-attention follows; `cross_mlp` gives
    the cross-attention blocks an MLP of their own.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    context_length: int
    vocab_size: int
    pooling: Literal["masked_mean", "mean_all"] = "masked_mean"
    cross_attention_every: int = 2
    self_mlp_before_cross: bool = True
    cross_mlp: bool = False
    projection: bool = True
    tied_vocabulary: bool = True

    def __post_init__(self):
        if self.pooling not in ("masked_mean", "mean_all"):
            raise ValueError(f"text.pooling: '{self.pooling}' is not one of masked_mean, mean_all")
        if self.width % self.num_heads:
            raise ValueError(f"text.width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.cross_attention_every < 1:
            raise ValueError(f"text.cross_attention_every {self.cross_attention_every} is not at least 1")


class DecoderBlock(nn.Module):
    """Self-attention (causal or not) and, unless left out, an MLP. Works on pad-free rows (N, D)."""

    def __init__(self, config: TextConfig, has_mlp: bool):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.norm_mlp = nn.LayerNorm(config.width) if has_mlp else None
        self.mlp = Mlp(config.width, config.mlp_width) if has_mlp else None

    def forward(self, rows_ND: Tensor, layout: TokenLayout, *, causal: bool, mask_B11T: Tensor | None) -> Tensor:
        qkv_BTX = layout.unpack(self.attention.qkv(self.norm_attention(rows_ND)))
        mixed_BTD = self.attention.attend(qkv_BTX, causal=causal, mask_B11T=mask_B11T)
        rows_ND = rows_ND + self.attention.out(layout.pack(mixed_BTD))
        if self.mlp is None or self.norm_mlp is None:
            return rows_ND
        return rows_ND + self.mlp(self.norm_mlp(rows_ND))


class CrossBlock(nn.Module):
    """Cross-attention to the image features and, if asked, an MLP of its own."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.norm_text = nn.LayerNorm(config.width)
        self.norm_image = nn.LayerNorm(config.width)
        self.attention = CrossAttention(config.width, config.num_heads)
        self.norm_mlp = nn.LayerNorm(config.width) if config.cross_mlp else None
        self.mlp = Mlp(config.width, config.mlp_width) if config.cross_mlp else None

    def forward(self, rows_ND: Tensor, layout: TokenLayout, image_BSD: Tensor) -> Tensor:
        query_BTD = layout.unpack(self.attention.query(self.norm_text(rows_ND)))
        mixed_BTD = self.attention.attend(query_BTD, self.norm_image(image_BSD))
        rows_ND = rows_ND + self.attention.out(layout.pack(mixed_BTD))
        if self.mlp is None or self.norm_mlp is None:
            return rows_ND
        return rows_ND + self.mlp(self.norm_mlp(rows_ND))


class DecoderOutput(NamedTuple):
    """Pooled texts of the contrastive pass; hidden states and summed loss of the generative one."""

    pooled_BE: Tensor
    hidden_BTD: Tensor
    caption: TokenLoss


class TextDecoder(nn.Module):
    """Token ids (B, T), pad id 0, to a pooled embedding (`contrastive`) and to hidden states (`generative`)."""

    def __init__(self, config: TextConfig, embedding_width: int):
        super().__init__()
        if not config.projection and config.width != embedding_width:
            raise ValueError(
                f"embedding_width {embedding_width} differs from text.width {config.width}: "
                "set text.projection to true or make them equal"
            )
        self.config = config
        self.token_embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.position_TD = nn.Parameter(torch.empty(config.context_length, config.width))
        every = config.cross_attention_every
        self.blocks = nn.ModuleList(
            DecoderBlock(config, has_mlp=config.self_mlp_before_cross or index % every != 0)
            for index in range(config.num_layers)
        )
        self.cross_blocks = nn.ModuleList(CrossBlock(config) for _ in range(0, config.num_layers, every))
        self.norm_output = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, embedding_width, bias=False) if config.projection else None
        vocabulary_shape = (config.vocab_size, config.width)
        self.vocabulary_VD = None if config.tied_vocabulary else nn.Parameter(torch.empty(vocabulary_shape))
        self._initialise()

    def _initialise(self) -> None:
        depth = self.config.num_layers + len(self.cross_blocks)
        initialise_blocks(self.blocks, self.config.width, depth)
        initialise_blocks(self.cross_blocks, self.config.width, depth)
        fill_normal(self.token_embedding_VD, std=0.02)
        fill_normal(self.position_TD, std=0.01)
        if self.projection is not None:
            fill_normal(self.projection.weight, std=self.config.width**-0.5)
        if self.vocabulary_VD is not None:
            fill_normal(self.vocabulary_VD, std=self.config.width**-0.5)

    @property
    def vocabulary_weight_VD(self) -> Tensor:
        """The matrix that turns a hidden state into vocabulary logits: its own, or the token embedding."""
        return self.token_embedding_VD if self.vocabulary_VD is None else self.vocabulary_VD

    def forward(self, tokens_BT: Tensor, image_BSD: Tensor, z_loss_weight: float = 0.0) -> DecoderOutput:
        """Both passes, and the caption loss of tokens 1 … T-1 given those before: the training step's one call.

        One call, and matrices owned by this module itself, because ZeRO-3 and FSDP2 put a module's parameters
        together only while its forward runs.
        """
        hidden_BTD = self.generative(tokens_BT[:, :-1], image_BSD)
        targets_BT = tokens_BT[:, 1:]
        caption = vocabulary_loss(hidden_BTD, self.vocabulary_weight_VD, targets_BT, z_loss_weight=z_loss_weight)
        return DecoderOutput(self.contrastive(tokens_BT), hidden_BTD, caption)

    def contrastive(self, tokens_BT: Tensor) -> Tensor:
        """Bidirectional pass without cross-attention -> (B, E), not yet of unit length.

        "mean_all" pads to the full context first, because pads attend, are attended to and are averaged there:
        a shorter batch would give another embedding for the same text.
        """
        if self.config.pooling == "mean_all":
            missing = self.config.context_length - tokens_BT.shape[1]
            tokens_BT = F.pad(tokens_BT, (0, missing), value=PAD_ID)
            layout, mask_B11T, counts_B1 = TokenLayout((len(tokens_BT), tokens_BT.shape[1])), None, None
        else:
            valid_BT = _valid_tokens(tokens_BT)
            layout = TokenLayout((len(tokens_BT), tokens_BT.shape[1]), valid_BT)
            mask_B11T, counts_B1 = valid_BT[:, None, None, :], valid_BT.sum(1, keepdim=True)
        rows_ND = self._embed(tokens_BT, layout)
        for block in self.blocks:
            rows_ND = block(rows_ND, layout, causal=False, mask_B11T=mask_B11T)
        hidden_BTD = layout.unpack(self.norm_output(rows_ND))  # pads are zeros: they add nothing to the sum
        pooled_BD = hidden_BTD.mean(1) if counts_B1 is None else hidden_BTD.sum(1) / counts_B1
        return pooled_BD if self.projection is None else self.projection(pooled_BD)

    def generative(self, tokens_BT: Tensor, image_BSD: Tensor) -> Tensor:
        """Causal pass with cross-attention -> hidden states (B, T, D) after the last norm.

        Pads stand after the text, so the causal mask already hides them. Their own hidden states mean nothing:
        zeros with "masked_mean" (they are not computed).
        """
        packs = self.config.pooling == "masked_mean"
        layout = TokenLayout((tokens_BT.shape[0], tokens_BT.shape[1]), _valid_tokens(tokens_BT) if packs else None)
        rows_ND = self._embed(tokens_BT, layout)
        for index, block in enumerate(self.blocks):
            rows_ND = block(rows_ND, layout, causal=True, mask_B11T=None)
            if index % self.config.cross_attention_every == 0:
                cross_block = self.cross_blocks[index // self.config.cross_attention_every]
                rows_ND = cross_block(rows_ND, layout, image_BSD)
        return layout.unpack(self.norm_output(rows_ND))

    def _embed(self, tokens_BT: Tensor, layout: TokenLayout) -> Tensor:
        num_tokens = tokens_BT.shape[1]
        if num_tokens > self.config.context_length:
            raise ValueError(
                f"{num_tokens} tokens exceed the context length {self.config.context_length}: truncate the texts"
            )
        return layout.pack(F.embedding(tokens_BT, self.token_embedding_VD) + self.position_TD[:num_tokens])


def _valid_tokens(tokens_BT: Tensor) -> Tensor:
    """True where a token is no pad. The first place always counts: an empty text must not divide by zero."""
    valid_BT = tokens_BT != PAD_ID
    valid_BT[:, 0] = True
    return valid_BT
