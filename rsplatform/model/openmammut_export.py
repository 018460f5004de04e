"""Writes a model in the openMaMMUT key layout, the way back of openmammut.py: what came from it goes out bit-equal.

In: a Mammut whose architecture that layout can hold. Out: tensors by its names, its config, or a .safetensors file with
the config in its metadata. Brings no tokenizer.
Shapes: D vision width, N positions, P patch size.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rsplatform.model.mammut import Mammut, MammutConfig
from rsplatform.model.openmammut import BLOCK_PARTS, config_of_layout
from rsplatform.model.weights import WeightsError


def save_openmammut(path: Path, model: Mammut) -> None:
    """Write `model` as one safetensors file in the fork's layout, whole or not at all.

    Raises:
        WeightsError: the layout has no place for this architecture; the message names what differs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_to_layout(model).items()}
    save_file(tensors, unfinished, metadata={"config": json.dumps(layout_config(model.config))})
    os.replace(unfinished, path)


def layout_config(config: MammutConfig) -> dict[str, dict[str, Any]]:
    """The layout's config, {"vision": {…}, "text": {…}}; WeightsError if `config` is more than it can say."""
    vision, text = config.vision, config.text
    layout: dict[str, dict[str, Any]] = {
        "vision": {
            "width": vision.width,
            "layers": vision.num_layers,
            "heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "mlp_ratio": vision.mlp_width / vision.width,
        },
        "text": {
            "width": text.width,
            "layers": text.num_layers,
            "heads": text.num_heads,
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "cross_attn_ratio": text.cross_attention_every,
            "has_mlp": text.self_mlp_before_cross,
            "mlp_ratio": text.mlp_width / text.width,
        },
    }
    back = config_of_layout(layout, "export").to_dict()
    ours = config.to_dict()
    free = {("vision", name) for name in ("pixel_mean", "pixel_std", "patch_dropout", "cropped_positions")}
    free |= {("vision", "cropped_position_grid"), ("vision", "position_interpolation")}  # weights do not depend on them
    parts = [("vision", vision_key) for vision_key in ours["vision"]] + [
        ("text", text_key) for text_key in ours["text"]
    ]
    for part, key in parts:
        if (part, key) not in free and ours[part][key] != back[part][key]:
            raise WeightsError(
                f"the openMaMMUT layout cannot hold {part}.{key} = {ours[part][key]!r}; it means {back[part][key]!r}"
            )
    if config.embedding_width != text.width:
        raise WeightsError(
            f"the openMaMMUT layout cannot hold embedding_width {config.embedding_width} beside text.width {text.width}"
        )
    return layout


def tensors_to_layout(model: Mammut) -> dict[str, Tensor]:
    """The weights by the layout's names; the inverse of `openmammut.tensors_of_layout`."""
    layout_config(model.config)
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
        "text.text_projection": take("text.vocabulary_VD").T,
        "map_viz2txt_kv": take("image_to_text.weight").T,
        "logit_scale": take("log_logit_scale").squeeze(0),
    }
    if "logit_bias" in ours:
        theirs["logit_bias"] = take("logit_bias").squeeze(0)
    names = {"vision.norm_input": "visual.ln_pre", "vision.norm_output": "visual.ln_post"}
    names |= {"text.norm_output": "text.ln_final"}
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
