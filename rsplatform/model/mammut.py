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
from rsplatform.model.sizes import size_settings
from rsplatform.model.text_decoder import TextConfig, TextDecoder
from rsplatform.model.transformer import fill_normal
from rsplatform.model.vision_encoder import PatchFeatures, VisionConfig, VisionEncoder

MAX_LOG_LOGIT_SCALE = math.log(100.0)
INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)
# SigLIP's start (arXiv 2303.15343, section 3.2 and its published code) [F]: at -10, the many negative pairs of the
# first steps cost nothing yet
SIGLIP_LOG_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = math.log(10.0), -10.0


@dataclass(frozen=True)
class MammutConfig:
    """A whole model: what config.json beside the weights holds.

    `logit_bias`: a learned bias of the logits beside their scale, for the SigLIP loss and only for it.
    """

    vision: VisionConfig
    text: TextConfig
    embedding_width: int
    logit_bias: bool = False

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


def mammut_config(size: str, **overrides: Any) -> MammutConfig:
    """A named size: "mini", "tiny", "small" (all [D]), "so400m" (400 M + 400 M parameters), "openmammut_S" … "_H".

    `overrides` are fields of the two configs: image_size=, vocab_size=, … by name, and with `vision_` or `text_`
    before it where both have the field (vision_pooling=, text_width=), embedding_width= or logit_bias=. Mean pooling
    is MaMMUT's [F]; "so400m" takes its tower's attention pooling, and what is known of the others is in sizes.py.

    Raises:
        ValueError: on an unknown size; ConfigKeyError (a ValueError) on an unknown override.
    """
    parts: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    settings = size_settings(size) | overrides
    whole = {"embedding_width": settings.pop("embedding_width", settings["text_width"])}
    whole["logit_bias"] = settings.pop("logit_bias", False)
    owners = _field_owners()
    for name, value in settings.items():
        if name not in owners:
            raise ConfigKeyError(f"model size '{size}': {unknown_key_message(name, [*owners, *whole])}")
        part, field = owners[name]
        parts[part][field] = value
    return MammutConfig.from_dict({**parts, **whole})


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
    there in one piece only then (ZeRO-3 and FSDP2 split it again afterwards). `caption_z_loss_sum` is the detached
    sum of log² Z over the same tokens where forward was given a z-loss weight; `caption_loss_sum` then has weight
    times it in it.
    """

    image_embeddings_BE: Tensor
    text_embeddings_BE: Tensor
    caption_hidden_BTD: Tensor
    logit_scale: Tensor
    caption_loss_sum: Tensor
    caption_token_count: Tensor
    logit_bias: Tensor | None = None
    caption_z_loss_sum: Tensor | None = None


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
        first_scale = SIGLIP_LOG_LOGIT_SCALE if config.logit_bias else INITIAL_LOG_LOGIT_SCALE
        self.log_logit_scale = nn.Parameter(torch.full((1,), first_scale))
        self.logit_bias = nn.Parameter(torch.full((1,), SIGLIP_LOGIT_BIAS)) if config.logit_bias else None

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        z_loss_weight: float = 0.0,
        sample_keys_B: Tensor | None = None,
    ) -> MammutOutput:
        """Both passes over normalised images and token ids (0 = pad), the image tokens computed once.

        The ground sample distance is that of the pixels given here, NaN where unknown; only a model with
        `vision.ground_sample_distance_encoding` or `…_positions` reads it. `z_loss_weight` is LossConfig's. What is
        drawn at random in training follows from the samples' keys (draws.py), None: from torch's generator.
        """
        image_tokens_BND = self.vision(images_BCHW, ground_sample_distance_m_B, sample_keys_B)
        decoded = self.text(tokens_BT, self.image_to_text(image_tokens_BND), z_loss_weight)
        return MammutOutput(
            image_embeddings_BE=unit_length(self.vision.embed_tokens(image_tokens_BND)),
            text_embeddings_BE=unit_length(decoded.pooled_BE),
            caption_hidden_BTD=decoded.hidden_BTD,
            logit_scale=self.logit_scale(),
            caption_loss_sum=decoded.caption.sum,
            caption_token_count=decoded.caption.count,
            # a copy: engines free the parameter's own memory after the forward
            logit_bias=None if self.logit_bias is None else self.logit_bias.clone().squeeze(0),
            caption_z_loss_sum=decoded.caption.z_loss_sum,
        )

    def logit_scale(self) -> Tensor:
        """exp of the learned log-scale, at most 100 (a scalar)."""
        clamped = _ClampAbove.apply(self.log_logit_scale, MAX_LOG_LOGIT_SCALE)
        assert isinstance(clamped, Tensor)
        return clamped.exp().squeeze(0)

    def encode_image(self, images_BCHW: Tensor, ground_sample_distance_m_B: Tensor | None = None) -> Tensor:
        """Unit image embeddings (B, E)."""
        return unit_length(self.vision.embed_tokens(self.vision(images_BCHW, ground_sample_distance_m_B)))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Unit text embeddings (B, E)."""
        return unit_length(self.text.contrastive(tokens_BT))

    def image_tokens(self, images_BCHW: Tensor, ground_sample_distance_m_B: Tensor | None = None) -> Tensor:
        """What cross-attention reads (B, N, D): tokens before the encoder's last norm, class token
        first where the pooling has one."""
        return self.vision(images_BCHW, ground_sample_distance_m_B)

    def caption_logits(
        self, images_BCHW: Tensor, tokens_BT: Tensor, ground_sample_distance_m_B: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T-1, V) of tokens 1 … T-1, each given the image and the tokens before it."""
        image_BSD = self.image_to_text(self.vision(images_BCHW, ground_sample_distance_m_B))
        return F.linear(self.text.generative(tokens_BT[:, :-1], image_BSD), self.text.vocabulary_weight_VD)

    def patch_features(
        self,
        images_BCHW: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        sample_keys_B: Tensor | None = None,
    ) -> PatchFeatures:
        """Values and pooling scores per patch, on the picture's own grid: what smooth attention pools again."""
        return self.vision.patch_features(images_BCHW, ground_sample_distance_m_B, sample_keys_B)

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
