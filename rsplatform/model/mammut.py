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

from rsplatform.model.frozen_config import config_from_mapping
from rsplatform.model.text_decoder import TextConfig, TextDecoder
from rsplatform.model.vision_encoder import PatchFeatures, VisionConfig, VisionEncoder
from rsplatform.model.vocabulary_loss import vocabulary_loss

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


class _Size(NamedTuple):
    vision_width: int
    vision_layers: int
    vision_mlp: int
    text_width: int
    text_layers: int
    head_width: int
    pooling: str
    patch_size: int
    image_size: int
    vocab_size: int
    context_length: int


_SIZES = {
    "mini": _Size(128, 4, 512, 128, 3, 64, "mean", 8, 64, 2048, 32),
    "tiny": _Size(192, 6, 768, 192, 4, 64, "mean", 8, 64, 4096, 32),
    "small": _Size(384, 12, 1536, 384, 6, 64, "mean", 16, 224, 16384, 64),
    # SoViT-400m at 224 px [F]; its decoder is unpublished: width 1024, 24 layers [D]
    "so400m": _Size(1152, 27, 4304, 1024, 24, 0, "map", 14, 224, 32768, 77),
}


def mammut_config(size: str, **overrides: Any) -> MammutConfig:
    """A named size: "mini", "tiny", "small" [D] or "so400m" (the paper's 400 M + 400 M).

    `overrides` are fields of VisionConfig or TextConfig (image_size, patch_size, vocab_size, context_length, …),
    or `vision_pooling` / `text_pooling` for the field that both have; an unknown one raises ConfigKeyError.
    """
    if size not in _SIZES:
        raise ValueError(f"model size '{size}' is unknown: choose one of {', '.join(_SIZES)}")
    chosen = _SIZES[size]
    heads = {"vision": chosen.vision_width // 64, "text": chosen.text_width // 64}
    vision: dict[str, Any] = {
        "width": chosen.vision_width,
        "num_layers": chosen.vision_layers,
        "num_heads": 16 if size == "so400m" else heads["vision"],
        "mlp_width": chosen.vision_mlp,
        "patch_size": chosen.patch_size,
        "image_size": chosen.image_size,
        "pooling": chosen.pooling,
    }
    text: dict[str, Any] = {
        "width": chosen.text_width,
        "num_layers": chosen.text_layers,
        "num_heads": heads["text"],
        "mlp_width": 4 * chosen.text_width,
        "context_length": chosen.context_length,
        "vocab_size": chosen.vocab_size,
    }
    return _with_overrides(vision, text, chosen.text_width, overrides)
