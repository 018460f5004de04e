"""Named sizes: the openMaMMUT shapes are what the importer makes of the layout, and have the known parameters."""

import json
from typing import get_args

import pytest
import torch
from safetensors import safe_open

from rsplatform.model.mammut import Mammut, MammutConfig, mammut_config
from rsplatform.model.openmammut import load_openmammut
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.model.openmammut_export import layout_config
from rsplatform.model.sizes import ModelSize, OpenMammutSize

PUBLISHED_PARAMETERS_OF_L14 = 508_294_913


def names_of(literal) -> list[str]:
    return [name for part in get_args(literal) for name in (get_args(part) or [part])]


def counted(config: MammutConfig) -> int:
    """Parameters of the layout from its shapes alone."""

    def block(width: int, mlp: bool, norms: int) -> int:
        attention = 4 * width * width + 4 * width
        return attention + norms * 2 * width + (2 * 4 * width * width + 5 * width if mlp else 0)

    vision, text = config.vision, config.text
    num_positions = (vision.image_size // vision.patch_size) ** 2 + 1
    total = vision.width * (3 * vision.patch_size**2 + num_positions + 1 + text.width + 2 * 2)
    total += vision.num_layers * block(vision.width, True, 2)
    total += text.width * (2 * text.vocab_size + text.context_length + 2) + vision.width * text.width + 1
    for layer in range(text.num_layers):
        is_followed = layer % text.cross_attention_every == 0
        has_mlp = text.self_mlp_before_cross or not is_followed
        total += block(text.width, has_mlp, 2 if has_mlp else 1)
        total += block(text.width, True, 3) if is_followed else 0
    return total


@pytest.mark.parametrize("size", names_of(OpenMammutSize))
def test_an_openmammut_size_has_the_parameters_of_its_shape(size):
    config = mammut_config(size)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Mammut(config).parameters())
    assert parameters == counted(config)
    if size == "openmammut_L":
        assert parameters == PUBLISHED_PARAMETERS_OF_L14


@pytest.mark.parametrize("size", names_of(OpenMammutSize))
def test_the_layout_holds_an_openmammut_size(size):
    config = mammut_config(size)
    assert config_of_layout(layout_config(config), "test") == config


@pytest.mark.parametrize(("size", "name"), [("openmammut_B", "with_mlp"), ("openmammut_S", "without_mlp")])
def test_a_conformance_file_is_a_small_one_of_these(data_root, size, name):
    """Everything but numbers: poolings, norms, the MLPs of either variant, the projection, pixel statistics."""
    path = data_root / "conformance" / f"openmammut_{name}.safetensors"
    assert path.is_file(), f"the real data lack {path}"
    with safe_open(path, framework="pt") as file:
        layout = json.loads(file.metadata()["config"])
    settings = {"image_size": layout["vision"]["image_size"], "patch_size": layout["vision"]["patch_size"]}
    settings |= {key: layout["text"][key] for key in ("vocab_size", "context_length")}
    heads = {"vision": layout["vision"]["width"] // layout["vision"]["head_width"], "text": layout["text"]["heads"]}
    for part in ("vision", "text"):
        width = layout[part]["width"]
        settings |= {f"{part}_width": width, f"{part}_mlp_width": 4 * width, f"{part}_num_heads": heads[part]}
        settings[f"{part}_num_layers"] = layout[part]["layers"]
    assert load_openmammut(path)[1] == mammut_config(size, **settings)


def test_the_names_that_a_recipe_may_use_are_those_that_there_are():
    for size in names_of(ModelSize):
        assert isinstance(mammut_config(size), MammutConfig)
    with pytest.raises(ValueError, match="huge.*mini, tiny, small, so400m, openmammut_S"):
        mammut_config("huge")
