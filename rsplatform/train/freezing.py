"""Parts of a model that a phase may leave as they are: their names, and the parameters behind each name.

In: names of parts from a recipe, a module. Out: names of parameters. How an engine keeps their updates away is its own
matter (engine.py, deepspeed.py, fsdp.py). Which parts there are is our default; the papers freeze nothing.
"""

import difflib
from collections.abc import Collection, Mapping

from torch import nn

# What the names of a part's parameters begin with. A parameter may belong to several parts.
PARTS: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision.",),
    "vision_trunk": (
        "vision.patch_embedding.",
        "vision.position_HWD",
        "vision.class_",
        "vision.norm_input.",
        "vision.scale_",
        "vision.blocks.",
    ),
    "vision_pooling": ("vision.pool.", "vision.norm_output.", "vision.projection."),
    "text": ("text.",),
    "token_embedding": ("text.token_embedding_VD", "text.vocabulary_VD"),
    "cross_attention": ("text.cross_blocks.",),
    "image_to_text": ("image_to_text.",),
    "logit_scale": ("log_logit_scale", "logit_bias"),
}


def check_parts(parts: Collection[str], where: str) -> None:
    """ValueError for a part that no model has; it names the nearest one that there is."""
    for part in parts:
        if part not in PARTS:
            nearest = difflib.get_close_matches(part, PARTS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: no part {part!r}; did you mean {nearest!r}? (valid: {', '.join(PARTS)})")


def covers_all(parts: Collection[str]) -> bool:
    """Whether nothing of a model lies outside of `parts`."""
    frozen = set(parts)
    vision_is_whole = "vision" in frozen or {"vision_trunk", "vision_pooling"} <= frozen
    return vision_is_whole and {"text", "image_to_text", "logit_scale"} <= frozen


def is_in_parts(parameter_name: str, parts: Collection[str]) -> bool:
    """Whether a parameter belongs to one of `parts`."""
    return any(parameter_name.startswith(PARTS[part]) for part in parts)


def names_of_parts(model: nn.Module, parts: Collection[str]) -> frozenset[str]:
    """Names of the parameters of all `parts` together."""
    return frozenset(name for name, _ in model.named_parameters() if is_in_parts(name, parts))
