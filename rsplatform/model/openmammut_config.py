"""Reads the configs that stand beside MaMMUT weights: openMaMMUT's and mainstream open_clip's, into our one config.

In: a mapping as JSON gives it, and how many cross-attention blocks the weights have. Out: MammutConfig.
Three spellings are known: {"vision", "text"} and the fork's {"vision_cfg", "text_cfg"} mean openMaMMUT, where every
position is averaged; {"vision_cfg", "multimodal_cfg"} is current open_clip, with its own defaults. Either may lie in
"model_cfg" beside "preprocess_cfg". Nothing that changes results is guessed, and a field that asks for what our model
does not have is an error that names it. Reads no files.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rsplatform.model.frozen_config import unknown_key_message
from rsplatform.model.mammut import MammutConfig
from rsplatform.model.sizes import OPENMAMMUT_TEXT, OPENMAMMUT_VISION
from rsplatform.model.state import WeightsError
from rsplatform.model.text_decoder import TextConfig
from rsplatform.model.vision_encoder import VisionConfig

VISION_POOLING = {"avg_all": "mean_all", "avg": "mean"}  # with the class token, without it
TEXT_POOLING = {"avg_all": "mean_all", "avg": "masked_mean"}

_VISION_NEEDED = ("width", "layers", "patch_size", "image_size")
_TEXT_NEEDED = ("width", "layers", "heads", "context_length", "vocab_size")
_READ = {
    "vision": {*_VISION_NEEDED, "heads", "head_width", "mlp_ratio", "pool_type", "final_ln_after_pool"},
    "text": {*_TEXT_NEEDED, "cross_attn_ratio", "has_mlp", "mlp_ratio", "pool_type", "use_pad_mask"} | {"proj_type"},
}
# Change neither weights nor outputs: what is returned, what only trains, tokenizers, and what other models read.
_WITHOUT_EFFECT = {
    "vision": {"output_tokens", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"}
    | {"timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"},
    "text": {"output_tokens", "does_full_decoding", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
    | {"bos_id", "eos_id", "dim_head", "n_queries", "attn_pooler_heads", "variable_text"}
    | {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}
_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# Each has one value that our model is made for.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision": {name: (False,) for name in (*_CUSTOM_BLOCKS, "attentional_pool", "no_ln_pre")}
    | {"global_average_pool": (True,), "pos_embed_type": ("learnable", "sin_cos_2d"), "timm_model_name": (None,)}
    | {name: (None,) for name in ("ls_init_value", "act_kwargs", "norm_kwargs")}
    | {"block_type": (None, "default")},
    "text": {name: (False,) for name in (*_CUSTOM_BLOCKS, "embed_cls", "proj_bias", "tie_lm_head")}
    | {name: (None,) for name in ("ls_init_value", "act_kwargs", "norm_kwargs", "hf_model_name")}
    | {"pad_id": (0,), "text_arch": ("classic", None), "block_type": (None, "default")},
}


class _Layout(NamedTuple):
    """The two sections of a config, what surrounds them, and whether current open_clip's defaults hold."""

    whole: Mapping[str, Any]
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    is_mainstream: bool
    origin: str


def config_of_layout(config: Mapping[str, Any], origin: str, num_cross_blocks: int | None = None) -> MammutConfig:
    """Our config for one that stands beside the weights.

    `num_cross_blocks`: how many the weights have; a missing cross_attn_ratio follows from it, or is an error.

    Raises:
        WeightsError: a section, a head count or another number is missing, a key is unknown, or a field has a value
            that our model does not have; the message names the field.
    """
    layout = _layout(config, origin)
    vision = _vision_config(layout)
    text, projects = layout.text, _has_projection(layout)
    shared: dict[str, Any] = {**OPENMAMMUT_TEXT, "pooling": _text_pooling(layout), "projection": projects}
    embedding_width = layout.whole.get("embed_dim", text["width"] if not projects else None)
    if embedding_width is None:
        raise WeightsError(f"{origin}: embed_dim is missing; proj_type 'linear' needs it")
    if not projects and embedding_width != text["width"]:
        raise WeightsError(
            f"{origin}: embed_dim {embedding_width} differs from the text width {text['width']}, which needs "
            "proj_type 'linear'"
        )
    return MammutConfig(
        vision=vision,
        text=TextConfig(
            width=text["width"],
            num_layers=text["layers"],
            num_heads=text["heads"],
            mlp_width=int(text["width"] * text.get("mlp_ratio", 4)),
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            cross_attention_every=_cross_attention_every(layout, num_cross_blocks),
            self_mlp_before_cross=text.get("has_mlp", True),
            **shared,
        ),
        embedding_width=embedding_width,
    )


def states_text_pooling(config: Mapping[str, Any]) -> bool:
    """Whether the config says how texts are pooled, or follows a layout whose default is known."""
    layout = _layout(config, "config")
    return layout.is_mainstream or "pool_type" in layout.text or "does_full_decoding" in layout.text


def _layout(config: Mapping[str, Any], origin: str) -> _Layout:
    outer, config = config, config.get("model_cfg", config)
    whole = {**config, "preprocess_cfg": outer.get("preprocess_cfg") or {}}
    if "multimodal_cfg" in config and "text_cfg" in config:
        raise WeightsError(f"{origin}: text_cfg beside multimodal_cfg makes it a CoCa; MaMMUT has multimodal_cfg only")
    if whole.get("quick_gelu"):
        raise WeightsError(f"{origin}: quick_gelu true is not supported; MaMMUT's blocks here have GELU")
    is_mainstream = "multimodal_cfg" in config
    text_names = ("multimodal_cfg",) if is_mainstream else ("text", "text_cfg")
    vision = _checked(config, "vision", ("vision", "vision_cfg"), origin)
    text = _checked(config, "text", text_names, origin)
    return _Layout(whole, vision, text, is_mainstream, origin)


def _checked(config: Mapping[str, Any], part: str, names: tuple[str, ...], origin: str) -> Mapping[str, Any]:
    name = next((name for name in names if name in config), part)
    found = config.get(name)
    if not isinstance(found, Mapping):
        other = " (or multimodal_cfg)" if part == "text" else ""
        raise WeightsError(f"{origin}: has no '{part}' section{other}")
    valid = _READ[part] | _WITHOUT_EFFECT[part] | _ONLY[part].keys()
    for key, value in found.items():
        if key not in valid:
            raise WeightsError(f"{origin}, {name}: {unknown_key_message(key, sorted(valid))}")
        allowed = _ONLY[part].get(key)
        if allowed is not None and value not in allowed:
            raise WeightsError(f"{origin}, {name}: {key} {value!r} is not supported, only {_listed(allowed)}")
    for key in _VISION_NEEDED if part == "vision" else _TEXT_NEEDED:
        if key not in found:
            raise WeightsError(f"{origin}, {name}: '{key}' is missing; the weights do not tell it")
    return found


def _vision_config(layout: _Layout) -> VisionConfig:
    vision, preprocess = layout.vision, layout.whole["preprocess_cfg"]
    shared: dict[str, Any] = {**OPENMAMMUT_VISION, "pooling": _vision_pooling(layout)}
    for ours, theirs in (("pixel_mean", "mean"), ("pixel_std", "std")):
        if theirs in preprocess:
            shared[ours] = tuple(float(value) for value in preprocess[theirs])
    return VisionConfig(
        width=vision["width"],
        num_layers=vision["layers"],
        num_heads=_vision_heads(layout),
        mlp_width=int(vision["width"] * vision.get("mlp_ratio", 4)),
        patch_size=vision["patch_size"],
        image_size=vision["image_size"],
        **shared,
    )


def _vision_heads(layout: _Layout) -> int:
    vision = layout.vision
    if "heads" in vision:
        return vision["heads"]
    if "head_width" not in vision:
        raise WeightsError(
            f"{layout.origin}: vision needs 'heads' or 'head_width'; the weights do not tell it (write head_width: 64 "
            "if open_clip's own default was meant)"
        )
    if vision["width"] % vision["head_width"]:
        raise WeightsError(
            f"{layout.origin}: vision width {vision['width']} is not a multiple of head_width {vision['head_width']}"
        )
    return vision["width"] // vision["head_width"]


def _vision_pooling(layout: _Layout) -> str:
    """openMaMMUT averages all tokens before the last norm; what is stated, or is current open_clip, must say so."""
    vision, origin = layout.vision, layout.origin
    if "pool_type" not in vision and not layout.is_mainstream:
        return VISION_POOLING["avg_all"]
    pool_type = vision.get("pool_type", "tok")
    if pool_type not in VISION_POOLING:
        raise WeightsError(f"{origin}: vision pool_type {pool_type!r} is not supported, only {_listed(VISION_POOLING)}")
    if not vision.get("final_ln_after_pool", False):
        raise WeightsError(f"{origin}: vision final_ln_after_pool false is not supported, only true")
    return VISION_POOLING[pool_type]


def _text_pooling(layout: _Layout) -> str:
    """Pads are left out of attention and mean (open_clip's default), or take part in both (openMaMMUT)."""
    text, origin = layout.text, layout.origin
    pool_type = text.get("pool_type", "avg" if layout.is_mainstream else "avg_all")
    if pool_type not in TEXT_POOLING:
        raise WeightsError(f"{origin}: text pool_type {pool_type!r} is not supported, only {_listed(TEXT_POOLING)}")
    masks = text.get("use_pad_mask", layout.is_mainstream or pool_type == "avg")
    if masks != (pool_type == "avg"):
        raise WeightsError(
            f"{origin}: text use_pad_mask {str(masks).lower()} with pool_type {pool_type!r} is not supported: 'avg' "
            "goes with true, 'avg_all' with false"
        )
    return TEXT_POOLING[pool_type]


def _has_projection(layout: _Layout) -> bool:
    proj_type = layout.text.get("proj_type", "none")
    if proj_type not in ("none", "linear"):
        raise WeightsError(f"{layout.origin}: text proj_type {proj_type!r} is not supported, only 'none' and 'linear'")
    return proj_type == "linear"


def _cross_attention_every(layout: _Layout, num_cross_blocks: int | None) -> int:
    """The ratio: stated, or the only one that gives as many cross-attention blocks as the weights have."""
    num_layers = layout.text["layers"]
    if "cross_attn_ratio" in layout.text:
        return layout.text["cross_attn_ratio"]
    fitting = [every for every in range(1, num_layers + 1) if len(range(0, num_layers, every)) == num_cross_blocks]
    if len(fitting) != 1:
        known = f"the {num_cross_blocks} cross-attention blocks of {num_layers} layers fit "
        told = known + (f"each of {fitting}" if fitting else "none") if num_cross_blocks is not None else "needed here"
        raise WeightsError(f"{layout.origin}: text 'cross_attn_ratio' is missing: {told}; state it")
    return fitting[0]


def _listed(values: Any) -> str:
    return " or ".join(repr(value) for value in values)
