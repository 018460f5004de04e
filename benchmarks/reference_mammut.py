"""The open reproduction's MaMMUT training step, restated for comparison: what its users run today.

Written from its published layout and behaviour, keys included, so that its checkpoints load with `load_state_dict`:
convolution as patch embedding, `nn.MultiheadAttention` over (tokens, batch, width), float masks, all 77 positions
computed, the vocabulary head in both passes, cross-entropy over (batch, vocabulary, tokens). Nothing is slowed down.
Shapes: B batch, C channels, H W pixels, L tokens, N image tokens, D width, T text tokens, V vocabulary, E embedding.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceShape(NamedTuple):
    """Sizes of one openMaMMUT model."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    patch_size: int
    image_size: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 77
    vocab_size: int = 49408
    cross_attn_ratio: int = 2
    has_mlp: bool = True

    def layout_config(self) -> dict:
        """The same sizes as the config beside an openMaMMUT checkpoint."""
        vision = {"width": self.vision_width, "layers": self.vision_layers, "heads": self.vision_heads}
        text = {"width": self.text_width, "layers": self.text_layers, "heads": self.text_heads}
        return {
            "vision": vision | {"patch_size": self.patch_size, "image_size": self.image_size},
            "text": text
            | {
                "context_length": self.context_length,
                "vocab_size": self.vocab_size,
                "cross_attn_ratio": self.cross_attn_ratio,
                "has_mlp": self.has_mlp,
            },
        }


# The published configurations mammut_ViT-S-16 and mammut_ViT-B-16.
SHAPES = {
    "S-16": ReferenceShape(384, 12, 6, 16, 224, 384, 12, 6, has_mlp=False),
    "B-16": ReferenceShape(768, 12, 12, 16, 224, 768, 12, 12),
}


class Block(nn.Module):
    """Residual attention, and an MLP unless left out; a cross block normalises what it attends to."""

    def __init__(self, width: int, heads: int, *, has_mlp: bool = True, is_cross: bool = False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        if is_cross:
            self.ln_1_kv = nn.LayerNorm(width)
        if has_mlp:
            self.ln_2 = nn.LayerNorm(width)
            layers = [
                ("c_fc", nn.Linear(width, 4 * width)),
                ("gelu", nn.GELU()),
                ("c_proj", nn.Linear(4 * width, width)),
            ]
            self.mlp = nn.Sequential(OrderedDict(layers))
        self.has_mlp = has_mlp

    def forward(self, x_LBD: Tensor, source_NBD: Tensor | None = None, mask_LL: Tensor | None = None) -> Tensor:
        query = self.ln_1(x_LBD)
        key = query if source_NBD is None else self.ln_1_kv(source_NBD)
        x_LBD = x_LBD + self.attn(query, key, key, need_weights=False, attn_mask=mask_LL)[0]
        return x_LBD + self.mlp(self.ln_2(x_LBD)) if self.has_mlp else x_LBD


class Blocks(nn.Module):
    """The vision tower's blocks, under the layout's name."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x_LBD: Tensor) -> Tensor:
        for block in self.resblocks:
            x_LBD = block(x_LBD)
        return x_LBD


class Visual(nn.Module):
    """ViT with a class token; the mean over all tokens is normalised and projected."""

    def __init__(self, shape: ReferenceShape):
        super().__init__()
        width, num_patches = shape.vision_width, (shape.image_size // shape.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, shape.patch_size, shape.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(width, shape.vision_layers, shape.vision_heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, shape.text_width))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (B, E), not yet of unit length, and all tokens (B, N, D)."""
        x = self.conv1(images_BCHW).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.view(1, 1, -1).expand(len(x), -1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x.mean(dim=1)) @ self.proj, x


class Text(nn.Module):
    """One decoder, bidirectional without an image and causal with one; always makes the vocabulary logits."""

    def __init__(self, shape: ReferenceShape):
        super().__init__()
        width, heads, every = shape.text_width, shape.text_heads, shape.cross_attn_ratio
        self.every = every
        self.token_embedding = nn.Embedding(shape.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(shape.context_length, width))
        self.resblocks = nn.ModuleList(
            Block(width, heads, has_mlp=shape.has_mlp or index % every != 0) for index in range(shape.text_layers)
        )
        self.cross_attn = nn.ModuleList(Block(width, heads, is_cross=True) for _ in range(0, shape.text_layers, every))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, shape.vocab_size))
        mask_TT = torch.full((shape.context_length, shape.context_length), float("-inf")).triu_(1)
        self.register_buffer("attn_mask", mask_TT, persistent=False)

    def forward(self, tokens_BT: Tensor, image_BND: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vocabulary logits (B, T, V) and hidden states (B, T, D)."""
        length = tokens_BT.shape[1]
        x = (self.token_embedding(tokens_BT) + self.positional_embedding[:length]).permute(1, 0, 2)
        source = None if image_BND is None else image_BND.permute(1, 0, 2)
        mask = None if image_BND is None else self.get_buffer("attn_mask")[:length, :length]
        for index, block in enumerate(self.resblocks):
            x = block(x, mask_LL=mask)
            if source is not None and index % self.every == 0:
                x = self.cross_attn[index // self.every](x, source)
        x = self.ln_final(x.permute(1, 0, 2))
        return x @ self.text_projection, x


class ReferenceMammut(nn.Module):
    """The whole model, with the layout's parameter names."""

    def __init__(self, shape: ReferenceShape):
        super().__init__()
        self.visual = Visual(shape)
        self.text = Text(shape)
        self.map_viz2txt_kv = nn.Parameter(shape.vision_width**-0.5 * torch.randn(shape.vision_width, shape.text_width))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image and text embeddings (B, E), caption logits (B, T-1, V)."""
        image_BE, image_BND = self.visual(images_BCHW)
        _, hidden_BTD = self.text(tokens_BT)
        logits_BTV, _ = self.text(tokens_BT[:, :-1], image_BND @ self.map_viz2txt_kv)
        return F.normalize(image_BE, dim=-1), F.normalize(hidden_BTD.mean(1), dim=-1), logits_BTV

    def loss(self, images_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
        """Both losses, weighed 1:1."""
        contrastive, caption = self.losses(images_BCHW, tokens_BT)
        return contrastive + caption

    def losses(self, images_BCHW: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE, and the cross-entropy of the next token (pad id 0 is ignored)."""
        image_BE, text_BE, logits_BTV = self(images_BCHW, tokens_BT)
        labels_B = torch.arange(len(image_BE))
        scale = self.logit_scale.exp()
        contrastive = F.cross_entropy(scale * image_BE @ text_BE.T, labels_B)
        contrastive = (contrastive + F.cross_entropy(scale * text_BE @ image_BE.T, labels_B)) / 2
        return contrastive, F.cross_entropy(logits_BTV.permute(0, 2, 1), tokens_BT[:, 1:], ignore_index=0)


def conformance_gaps(path: Path) -> dict[str, float]:
    """How far this reference is, by name, from the outputs that the original implementation gave: a file of weights
    in its layout, inputs `io.image` and `io.text`, and `io.` outputs."""
    from safetensors import safe_open  # not above: a machine that only compares speeds need not have it
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        layout = json.loads((file.metadata() or {})["config"])
    tensors = load_file(path)
    vision, text = layout["vision"], layout["text"]
    heads = vision["heads"] if "heads" in vision else vision["width"] // vision["head_width"]
    shape = ReferenceShape(
        vision["width"], vision["layers"], heads, vision["patch_size"], vision["image_size"],
        text["width"], text["layers"], text["heads"], text["context_length"], text["vocab_size"],
        text["cross_attn_ratio"], text["has_mlp"],
    )  # fmt: skip
    model = ReferenceMammut(shape).eval()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("io.")})
    inputs = (tensors["io.image"], tensors["io.text"])
    with torch.inference_mode():
        found = dict(zip(("image_features", "text_features", "logits"), model(*inputs), strict=True))
        contrastive, caption = model.losses(*inputs)
        found |= {"image_tokens": model.visual(inputs[0])[1]}
        found |= {"contrastive_loss": contrastive[None], "caption_loss_x2": 2 * caption[None]}
    return {name: float((value - tensors[f"io.{name}"]).abs().max()) for name, value in found.items()}


class ReferenceStep:
    """One optimizer step as its training script takes it: AdamW without decay of norms and biases, clip at 1."""

    def __init__(self, model: ReferenceMammut):
        self.model = model.train()
        named = list(model.named_parameters())
        plain = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
        decayed = [p for name, p in named if not (p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)

    def __call__(self, images_BCHW: Tensor, tokens_BT: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.model.loss(images_BCHW, tokens_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        return float(loss.detach())
