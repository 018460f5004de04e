"""Names and shapes of weights in the openMaMMUT key layout, to ours. Torch alone, no files.

In: tensors by the layout's names and their config. Out: tensors by our names; openmammut_export.py is the way back.
Shapes: V vocabulary, D vision width, N positions.
"""

import math

from torch import Tensor

from rsplatform.model.mammut import MammutConfig

# our name of a linear map or norm inside a block <- its name in the layout
BLOCK_PARTS = {
    "ln_1": "norm_attention",
    "attn.out_proj": "attention.out",
    "ln_2": "norm_mlp",
    "mlp.c_fc": "mlp.expand",
    "mlp.c_proj": "mlp.contract",
}


def tensors_of_layout(tensors: dict[str, Tensor], config: MammutConfig) -> dict[str, Tensor]:
    """Our tensors by our names; takes what it uses out of `tensors`, so that what remains is unknown.

    Raises:
        KeyError: a tensor that the config has a place for is missing.
        ValueError: positions that are not those of the class token and a square.
    """
    take = tensors.pop
    # current open_clip's name of the vocabulary head; the fork's means something else there: the text's projection
    head_key = "text.lm_head" if "text.lm_head" in tensors or config.text.projection else "text.text_projection"
    positions_ND = take("visual.positional_embedding")
    grid = _grid(len(positions_ND))
    ours = {
        "vision.class_token_D": take("visual.class_embedding"),
        "vision.class_position_D": positions_ND[0],
        "vision.position_HWD": positions_ND[1:].unflatten(0, (grid, -1)),
        "vision.patch_embedding.weight": take("visual.conv1.weight").flatten(1),
        "vision.projection.weight": take("visual.proj").T,
        "text.token_embedding_VD": take("text.token_embedding.weight"),
        "text.position_TD": take("text.positional_embedding"),
        "text.vocabulary_VD": take(head_key).T,
        "image_to_text.weight": take("map_viz2txt_kv").T,
        "log_logit_scale": take("logit_scale").reshape(1),
    }
    if config.logit_bias:
        ours["logit_bias"] = take("logit_bias").reshape(1)
    if config.text.projection:
        ours["text.projection.weight"] = take("text.text_projection").T
    norms = {"visual.ln_pre": "vision.norm_input", "visual.ln_post": "vision.norm_output"}
    for theirs, our in (norms | {"text.ln_final": "text.norm_output"}).items():
        ours |= _take_affine(tensors, theirs, our)
    for index in range(config.vision.num_layers):
        ours |= _take_block(tensors, f"visual.transformer.resblocks.{index}", f"vision.blocks.{index}")
    for index in range(config.text.num_layers):
        ours |= _take_block(tensors, f"text.resblocks.{index}", f"text.blocks.{index}")
    for index in range(len(range(0, config.text.num_layers, config.text.cross_attention_every))):
        ours |= _take_cross_block(tensors, f"text.cross_attn.{index}", f"text.cross_blocks.{index}")
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def _grid(num_positions: int) -> int:
    """Patches on a side of the square whose positions come with a class token's."""
    grid = math.isqrt(max(0, num_positions - 1))
    if num_positions != 1 + grid**2:
        raise ValueError(
            f"visual.positional_embedding has {num_positions} positions, which are not a class token's and those of a "
            "square grid; models of pictures that are not square are not supported"
        )
    return grid


def _take_affine(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": tensors.pop(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def _take_block(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A self-attention block; small variants have no ln_2 and MLP where a cross block follows."""
    taken = {
        f"{ours}.attention.qkv.weight": tensors.pop(f"{theirs}.attn.in_proj_weight"),
        f"{ours}.attention.qkv.bias": tensors.pop(f"{theirs}.attn.in_proj_bias"),
    }
    for their_part, our_part in BLOCK_PARTS.items():
        if f"{theirs}.{their_part}.weight" in tensors:
            taken |= _take_affine(tensors, f"{theirs}.{their_part}", f"{ours}.{our_part}")
    return taken


def _take_cross_block(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A cross block: its packed projection is the query's (text) over the key's and value's (image)."""
    taken: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        packed = tensors.pop(f"{theirs}.attn.in_proj_{kind}")
        width = len(packed) // 3
        taken[f"{ours}.attention.query.{kind}"] = packed[:width]
        taken[f"{ours}.attention.key_value.{kind}"] = packed[width:]
    parts = BLOCK_PARTS | {"ln_1": "norm_text", "ln_1_kv": "norm_image"}
    for their_part, our_part in parts.items():
        taken |= _take_affine(tensors, f"{theirs}.{their_part}", f"{ours}.{our_part}")
    return taken
