"""MaMMUT: one ViT and one text decoder that runs twice (arXiv 2303.16839, RECIPE.md "Model").

In: normalised pixels and token ids. Out: unit embeddings, caption hidden states and the caption loss's sums.
Hosts our own sizes and the openMaMMUT layout by configuration. Does not tokenise, decode pictures or weigh losses.
Shapes: B batch, C channels, H W pixels, T tokens, N image tokens, D width, E embedding, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsplatform.model.frozen_config import ConfigKeyError, config_from_mapping, unknown_key_message
from rsplatform.model.text_decoder import TextConfig, TextDecoder
from rsplatform.model.transformer import fill_normal
from rsplatform.model.vision_encoder import PatchFeatures, VisionConfig, VisionEncoder

MAX_LOG_LOGIT_SCALE = math.log(100.0)
INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class MammutConfig:
    """A whole model: what config.json beside the weights holds."""

    vision: VisionConfig
    text: TextConfig
    embedding_width: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "MammutConfig":
        """The inverse of `to_dict`; an unknown key raises ConfigKeyError, which names the nearest valid one."""
        parts = dict(mapping)
        for name, part_class in (("vision", VisionConfig), ("text", TextConfig)):
            if name in parts and not isinstance(parts[name], part_class):
                parts[name] = config_from_mapping(part_class, parts[name], f"model config, {name}")
        return config_from_mapping(cls, parts, "model config")


# the fields that VisionConfig and TextConfig share are given as (vision, text) here
_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"width": (128, 128), "num_layers": (4, 3), "num_heads": (2, 2), "mlp_width": (512, 512)}
    | {"patch_size": 8, "image_size": 64, "vocab_size": 2048, "context_length": 32},
    "tiny": {"width": (192, 192), "num_layers": (6, 4), "num_heads": (3, 3), "mlp_width": (768, 768)}
    | {"patch_size": 8, "image_size": 64, "vocab_size": 4096, "context_length": 32},
    "small": {"width": (384, 384), "num_layers": (12, 6), "num_heads": (6, 6), "mlp_width": (1536, 1536)}
    | {"patch_size": 16, "image_size": 224, "vocab_size": 16384, "context_length": 64},
    # the tower is SoViT-400m at 224 px [F]; the decoder is unpublished, so its numbers are our default [D]
    "so400m": {
        "width": (1152, 1024),
        "num_layers": (27, 24),
        "num_heads": (16, 16),
        "mlp_width": (4304, 4096),
    }
    | {
        "patch_size": 14,
        "image_size": 224,
        "vocab_size": 32768,
        "context_length": 77,
        "vision_pooling": "map",
    },
}


def mammut_config(size: str, **overrides: Any) -> MammutConfig:
    """A named size: "mini", "tiny", "small" (all [D]) or "so400m" (about 400 M + 400 M parameters).

    `overrides` are fields of the two configs: image_size=, vocab_size=, … by name, and with `vision_` or `text_`
    before it where both have the field (vision_pooling=, text_width=), or embedding_width=. Mean pooling is
    MaMMUT's [F]; "so400m" takes its tower's attention pooling.

    Raises:
        ValueError: on an unknown size; ConfigKeyError (a ValueError) on an unknown override.
    """
    if size not in _SIZES:
        raise ValueError(f"model size '{size}' is unknown: choose one of {', '.join(_SIZES)}")
    parts: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    settings: dict[str, Any] = {}
    for name, value in _SIZES[size].items():
        pair = value if isinstance(value, tuple) else None
        settings |= {name: value} if pair is None else {f"vision_{name}": pair[0], f"text_{name}": pair[1]}
    settings |= overrides
    embedding_width = settings.pop("embedding_width", settings["text_width"])
    owners = _field_owners()
    for name, value in settings.items():
        if name not in owners:
            raise ConfigKeyError(f"model size '{size}': {unknown_key_message(name, [*owners, 'embedding_width'])}")
        part, field = owners[name]
        parts[part][field] = value
    return MammutConfig.from_dict({**parts, "embedding_width": embedding_width})


def _field_owners() -> dict[str, tuple[str, str]]:
    """Setting name -> (part, field); a field of both parts is reached only with its part before it."""
    fields = {
        "vision": {field.name for field in dataclasses.fields(VisionConfig)},
        "text": {field.name for field in dataclasses.fields(TextConfig)},
    }
    shared = fields["vision"] & fields["text"]
    return {
        f"{part}_{name}" if name in shared else name: (part, name)
        for part, names in fields.items()
        for name in sorted(names)
    }


class MammutOutput(NamedTuple):
    """What one forward gives a loss. A tuple of tensors, so that DDP, FSDP2 and DeepSpeed all see inside it.

    `caption_loss_sum` and `caption_token_count` are made inside the forward because the vocabulary matrix is
    there in one piece only then (ZeRO-3 and FSDP2 split it again afterwards).
    """

    image_embeddings_BE: Tensor
    text_embeddings_BE: Tensor
    caption_hidden_BTD: Tensor
    logit_scale: Tensor
    caption_loss_sum: Tensor
    caption_token_count: Tensor


class Mammut(nn.Module):
    """The model. `forward` is the one entry for every training engine; the other methods are for inference."""

    def __init__(self, config: MammutConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision, config.embedding_width)
        self.text = TextDecoder(config.text, config.embedding_width)
        self.image_to_text = nn.Linear(config.vision.width, config.text.width, bias=False)
        fill_normal(self.image_to_text.weight, std=config.vision.width**-0.5)
        # one number, but not a scalar: FSDP2 refuses to shard 0-dimensional parameters
        self.log_logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOG_LOGIT_SCALE))

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> MammutOutput:
        """Both passes over normalised images and token ids (0 = pad), the image tokens computed once."""
        image_tokens_BND = self.vision(images_BCHW)
        decoded = self.text(tokens_BT, self.image_to_text(image_tokens_BND))
        return MammutOutput(
            image_embeddings_BE=unit_length(self.vision.embed_tokens(image_tokens_BND)),
            text_embeddings_BE=unit_length(decoded.pooled_BE),
            caption_hidden_BTD=decoded.hidden_BTD,
            logit_scale=self.logit_scale(),
            caption_loss_sum=decoded.caption_loss_sum,
            caption_token_count=decoded.caption_token_count,
        )

    def logit_scale(self) -> Tensor:
        """exp of the learned log-scale, at most 100 (a scalar)."""
        clamped = _ClampAbove.apply(self.log_logit_scale, MAX_LOG_LOGIT_SCALE)
        assert isinstance(clamped, Tensor)
        return clamped.exp().squeeze(0)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Unit image embeddings (B, E)."""
        return unit_length(self.vision.embed_tokens(self.vision(images_BCHW)))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Unit text embeddings (B, E)."""
        return unit_length(self.text.contrastive(tokens_BT))

    def image_tokens(self, images_BCHW: Tensor) -> Tensor:
        """What cross-attention reads (B, N, D): all tokens (class token first) before the encoder's last norm."""
        return self.vision(images_BCHW)

    def caption_logits(self, images_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T-1, V) of tokens 1 … T-1, each given the image and the tokens before it."""
        image_BSD = self.image_to_text(self.vision(images_BCHW))
        return F.linear(self.text.generative(tokens_BT[:, :-1], image_BSD), self.text.vocabulary_weight_VD)

    def patch_features(self, images_BCHW: Tensor) -> PatchFeatures:
        """Values and pooling scores per patch, on the picture's own grid: what smooth attention pools again."""
        return self.vision.patch_features(images_BCHW)

    def head(self, pooled_D: Tensor) -> Tensor:
        """Map pooled values (..., D) to unit embeddings (..., E), as `encode_image` does after its pooling."""
        return unit_length(self.vision.head(pooled_D))


def unit_length(embeddings_E: Tensor) -> Tensor:
    """L2-normalise the last axis in at least float32 (bfloat16 norms cost recall)."""
    return F.normalize(embeddings_E.to(torch.promote_types(embeddings_E.dtype, torch.float32)), dim=-1)


class _ClampAbove(torch.autograd.Function):
    """min(value, limit), but above the limit a gradient that leads back down still passes.

    A plain clamp has no gradient there: a parameter that momentum once carried over would stay for ever.
    """

    @staticmethod
    def forward(ctx, value: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.limit = limit
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (value,) = ctx.saved_tensors
        passes = (value <= ctx.limit) | (gradients[0] > 0)
        return gradients[0] * passes, None
