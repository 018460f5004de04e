"""The model's named sizes: settings of `mammut.mammut_config`, by name.

In: nothing. Out: tables of numbers and words; a field that both parts have is given as (vision, text). Builds nothing.
"""

from typing import Any, Literal, get_args

OwnSize = Literal["mini", "tiny", "small", "so400m"]
OpenMammutSize = Literal["openmammut_S", "openmammut_M", "openmammut_B", "openmammut_L", "openmammut_H"]
ModelSize = Literal[OwnSize, OpenMammutSize]

CLIP_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_OWN: dict[str, dict[str, Any]] = {
    "mini": {"width": (128, 128), "num_layers": (4, 3), "num_heads": (2, 2), "mlp_width": (512, 512)}
    | {"patch_size": 8, "image_size": 64, "vocab_size": 2048, "context_length": 32},
    "tiny": {"width": (192, 192), "num_layers": (6, 4), "num_heads": (3, 3), "mlp_width": (768, 768)}
    | {"patch_size": 8, "image_size": 64, "vocab_size": 4096, "context_length": 32},
    "small": {"width": (384, 384), "num_layers": (12, 6), "num_heads": (6, 6), "mlp_width": (1536, 1536)}
    | {"patch_size": 16, "image_size": 224, "vocab_size": 16384, "context_length": 64},
    # the tower is SoViT-400m at 224 px [F]; the decoder is unpublished, so its numbers are our default [D]
    "so400m": {"width": (1152, 1024), "num_layers": (27, 24), "num_heads": (16, 16), "mlp_width": (4304, 4096)}
    | {"patch_size": 14, "image_size": 224, "vocab_size": 32768, "context_length": 77, "vision_pooling": "map"},
}

# What every model of the openMaMMUT layout shares [F, RECIPE.md]: the importer reads into the same settings.
OPENMAMMUT_VISION: dict[str, Any] = {"pooling": "mean_all", "class_token": True, "input_norm": True} | {
    "pixel_mean": CLIP_PIXEL_MEAN,
    "pixel_std": CLIP_PIXEL_STD,
}
OPENMAMMUT_TEXT: dict[str, Any] = {"pooling": "mean_all", "cross_mlp": True, "projection": False} | {
    "tied_vocabulary": False
}


def _openmammut(width: tuple[int, int], layers: tuple[int, int], heads: tuple[int, int], patch: int) -> dict[str, Any]:
    shared = {f"vision_{name}" if name == "pooling" else name: value for name, value in OPENMAMMUT_VISION.items()}
    shared |= {f"text_{name}" if name == "pooling" else name: value for name, value in OPENMAMMUT_TEXT.items()}
    mlp_width = tuple(4 * side for side in width)
    shapes = {"width": width, "num_layers": layers, "num_heads": heads, "mlp_width": mlp_width, "patch_size": patch}
    return shared | shapes | {"image_size": 224, "vocab_size": 49408, "context_length": 77}


def _tables() -> dict[str, dict[str, Any]]:
    """Widths, layers and heads of S, M, B, L and H are those of the fork's model files [F], as is that S and M leave
    out the MLP before a cross-attention. Each comes there with patches of 14, 16 and 32 px: which one stands here is
    our default [D]; `patch_size` chooses another."""
    without_mlp = {"self_mlp_before_cross": False}
    return _OWN | {
        "openmammut_S": _openmammut((384, 384), (12, 12), (6, 6), 16) | without_mlp,
        "openmammut_M": _openmammut((512, 512), (12, 12), (8, 8), 16) | without_mlp,
        "openmammut_B": _openmammut((768, 768), (12, 12), (12, 12), 16),
        "openmammut_L": _openmammut((1024, 768), (24, 12), (16, 12), 14),
        "openmammut_H": _openmammut((1280, 1024), (32, 24), (16, 16), 14),
    }


def size_settings(size: str) -> dict[str, Any]:
    """The settings of a named size, each with the part in its name where both parts have it.

    Raises:
        ValueError: on an unknown size.
    """
    tables = _tables()
    if size not in tables:
        names = (*get_args(OwnSize), *get_args(OpenMammutSize))
        raise ValueError(f"model size '{size}' is unknown: choose one of {', '.join(names)}")
    settings: dict[str, Any] = {}
    for name, value in tables[size].items():
        pairs = isinstance(value, tuple) and len(value) == 2
        settings |= {f"vision_{name}": value[0], f"text_{name}": value[1]} if pairs else {name: value}
    return settings
