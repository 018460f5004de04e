"""Writes a model in the openMaMMUT key layout, the way back of openmammut.py: what came from it goes out bit-equal.

In: a Mammut whose architecture that layout can hold. Out: tensors by its names, its config, or a .safetensors file with
the config in its metadata. Brings no tokenizer.
Shapes: D vision width, N positions, P patch size.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rsplatform.model.mammut import Mammut, MammutConfig
from rsplatform.model.openmammut_config import TEXT_POOLING, VISION_POOLING, config_of_layout
from rsplatform.model.openmammut_tensors import BLOCK_PARTS
from rsplatform.model.state import WeightsError

_POOLINGS = (VISION_POOLING, TEXT_POOLING)
_NORMS = {
    "vision.norm_input": "visual.ln_pre",
    "vision.norm_output": "visual.ln_post",
    "text.norm_output": "text.ln_final",
}


def save_openmammut(path: Path, model: Mammut) -> None:
    """Write `model` as one safetensors file in the fork's layout or current open_clip's, whole or not at all.

    Raises:
        WeightsError: the layout has no place for this architecture; the message names what differs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_to_layout(model).items()}
    save_file(tensors, unfinished, metadata={"config": json.dumps(layout_config(model.config))})
    os.replace(unfinished, path)


def layout_config(config: MammutConfig) -> dict[str, Any]:
    """The layout's config; WeightsError if `config` is more than it can say.

    {"vision": {…}, "text": {…}} for openMaMMUT's architecture; with pads or the class token left out of the means, or a
    projection of texts, current open_clip's {"embed_dim", "vision_cfg", "multimodal_cfg", …}, which has those.
    """
    layout = _layout_sections(config)
    back = config_of_layout(layout, "export").to_dict()
    ours = config.to_dict()
    free = {("vision", name) for name in ("pixel_mean", "pixel_std", "patch_dropout", "cropped_positions")}
    free |= {("vision", "cropped_position_grid"), ("vision", "position_interpolation")}  # weights do not depend on them
    for part in ("vision", "text"):
        for key in ours[part]:
            if (part, key) not in free and ours[part][key] != back[part][key]:
                raise WeightsError(
                    f"the openMaMMUT layout cannot hold {part}.{key} = {ours[part][key]!r}; "
                    f"it means {back[part][key]!r}"
                )
    return layout


def _layout_sections(config: MammutConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    if not text.projection and config.embedding_width != text.width:
        raise WeightsError(
            f"the openMaMMUT layout cannot hold embedding_width {config.embedding_width} beside text.width {text.width}"
        )
    vision_section: dict[str, Any] = {
        "width": vision.width,
        "layers": vision.num_layers,
        "heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "mlp_ratio": exact_ratio(vision.mlp_width, vision.width),
    }
    text_section: dict[str, Any] = {
        "width": text.width,
        "layers": text.num_layers,
        "heads": text.num_heads,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "cross_attn_ratio": text.cross_attention_every,
        "has_mlp": text.self_mlp_before_cross,
        "mlp_ratio": exact_ratio(text.mlp_width, text.width),
    }
    if _is_openmammut(config):
        return {"vision": vision_section, "text": text_section}
    return _mainstream_sections(config, vision_section, text_section)


def _is_openmammut(config: MammutConfig) -> bool:
    """Whether the fork can run it; what neither can is found later, by reading the config back."""
    pools = (config.vision.pooling, config.text.pooling)
    return "mean" not in pools and "masked_mean" not in pools and not config.text.projection


def _mainstream_sections(
    config: MammutConfig, vision_section: dict[str, Any], text_section: dict[str, Any]
) -> dict[str, Any]:
    """As current open_clip writes them: it has a head's width in the place of heads, and no has_mlp."""
    if config.vision.pooling == "map" or not text_section.pop("has_mlp"):
        field = "vision.pooling = 'map'" if config.vision.pooling == "map" else "text.self_mlp_before_cross = False"
        raise WeightsError(f"open_clip's layout cannot hold {field}")
    vision_types, text_types = ({ours: theirs for theirs, ours in known.items()} for known in _POOLINGS)
    vision_section["head_width"] = config.vision.width // vision_section.pop("heads")
    vision_section |= {"pool_type": vision_types[config.vision.pooling], "final_ln_after_pool": True}
    text_section |= {
        "pool_type": text_types[config.text.pooling],
        "use_pad_mask": config.text.pooling == "masked_mean",
        "proj_type": "linear" if config.text.projection else "none",
    }
    return {
        "model_cfg": {
            "embed_dim": config.embedding_width,
            "vision_cfg": vision_section | {"output_tokens": True},
            "multimodal_cfg": text_section,
        },
        "preprocess_cfg": {"mean": list(config.vision.pixel_mean), "std": list(config.vision.pixel_std)},
    }


def exact_ratio(mlp_width: int, width: int) -> float:
    """The smallest ratio at or above mlp_width / width that the layout's int(width × ratio) makes `mlp_width` of."""
    ratio = mlp_width / width
    while int(width * ratio) < mlp_width:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def tensors_to_layout(model: Mammut) -> dict[str, Tensor]:
    """The weights by the layout's names; the inverse of `openmammut.tensors_of_layout`."""
    layout_config(model.config)
    head_key = "text.text_projection" if _is_openmammut(model.config) else "text.lm_head"
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    take = ours.pop
    patch = model.config.vision.patch_size
    positions_ND = torch.cat([take("vision.class_position_D")[None], take("vision.position_HWD").flatten(0, 1)])
    theirs = {
        "visual.class_embedding": take("vision.class_token_D"),
        "visual.positional_embedding": positions_ND,
        "visual.conv1.weight": take("vision.patch_embedding.weight").unflatten(1, (3, patch, patch)),
        "visual.proj": take("vision.projection.weight").T,
        "text.token_embedding.weight": take("text.token_embedding_VD"),
        "text.positional_embedding": take("text.position_TD"),
        head_key: take("text.vocabulary_VD").T,
        "map_viz2txt_kv": take("image_to_text.weight").T,
        "logit_scale": take("log_logit_scale").squeeze(0),
    }
    if model.config.text.projection:
        theirs["text.text_projection"] = take("text.projection.weight").T
    if "logit_bias" in ours:
        theirs["logit_bias"] = take("logit_bias").squeeze(0)
    names = dict(_NORMS)
    for index in range(model.config.vision.num_layers):
        names |= _block_names(f"vision.blocks.{index}", f"visual.transformer.resblocks.{index}")
    for index in range(model.config.text.num_layers):
        names |= _block_names(f"text.blocks.{index}", f"text.resblocks.{index}")
    for index in range(len(model.text.cross_blocks)):
        block, target = f"text.cross_blocks.{index}", f"text.cross_attn.{index}"
        for kind in ("weight", "bias"):
            packed = [take(f"{block}.attention.{part}.{kind}") for part in ("query", "key_value")]
            theirs[f"{target}.attn.in_proj_{kind}"] = torch.cat(packed)
        names |= _block_names(block, target) | {f"{block}.norm_text": f"{target}.ln_1"}
        names |= {f"{block}.norm_image": f"{target}.ln_1_kv"}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        is_packed = module.endswith("attention.qkv")
        theirs[f"{names[module]}_{kind}" if is_packed else f"{names[module]}.{kind}"] = tensor
    return theirs


def _block_names(ours: str, theirs: str) -> dict[str, str]:
    parts = {f"{ours}.{our_part}": f"{theirs}.{their_part}" for their_part, our_part in BLOCK_PARTS.items()}
    return parts | {f"{ours}.attention.qkv": f"{theirs}.attn.in_proj"}
