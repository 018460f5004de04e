"""Every ratio, with and without the MLP before cross-attention, against the reference; widths of MLPs stay exact."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.reference_mammut import ReferenceMammut, ReferenceShape
from rsplatform.model.mammut import MammutConfig, mammut_config
from rsplatform.model.openmammut import load_openmammut
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.model.openmammut_export import exact_ratio, layout_config, tensors_to_layout
from rsplatform.model.state import WeightsError

VARIANTS = [(ratio, has_mlp, layers) for ratio in (1, 2, 3, 4) for has_mlp in (True, False) for layers in (3, 4, 5)]


def reference(ratio: int, has_mlp: bool, layers: int) -> tuple[ReferenceMammut, dict]:
    torch.manual_seed(0)
    shape = ReferenceShape(16, 1, 2, 8, 16, 12, layers, 2, 8, 30, cross_attn_ratio=ratio, has_mlp=has_mlp)
    return ReferenceMammut(shape).eval(), shape.layout_config()


@torch.no_grad()
@pytest.mark.parametrize(("ratio", "has_mlp", "layers"), VARIANTS)
def test_a_variant_comes_in_computes_the_same_and_goes_out(tmp_path, ratio, has_mlp, layers):
    original, layout = reference(ratio, has_mlp, layers)
    weights = {name: value.contiguous() for name, value in original.state_dict().items()}
    save_file(weights, tmp_path / "m.safetensors")
    ours, config = load_openmammut(tmp_path / "m.safetensors", layout)
    images_BCHW, tokens_BT = torch.randn(3, 3, 16, 16), torch.randint(1, 30, (3, 8))
    tokens_BT[0, 5:] = 0
    found = (ours.encode_image(images_BCHW), ours.encode_text(tokens_BT), ours.caption_logits(images_BCHW, tokens_BT))
    for mine, their in zip(found, original(images_BCHW, tokens_BT), strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-4)
    exported = tensors_to_layout(ours)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], value) for name, value in weights.items())
    assert config_of_layout(layout_config(config), "test") == config


def test_pictures_that_are_not_square_are_refused_by_name(tmp_path):
    original, layout = reference(1, True, 4)
    weights = {name: value.contiguous() for name, value in original.state_dict().items()}
    positions_ND = weights["visual.positional_embedding"]
    for num_positions in (0, 1 + 2 * 3, 1 + 3 * 4):  # four rows of 2, of a picture of 16 by 16, and a class token's
        weights["visual.positional_embedding"] = positions_ND[:1].repeat(num_positions, 1)
        save_file(weights, tmp_path / "m.safetensors")
        with pytest.raises(WeightsError, match=rf"m.safetensors: .*positional_embedding has {num_positions} positions"):
            load_openmammut(tmp_path / "m.safetensors", layout)


@pytest.mark.parametrize(("ratio", "layers", "is_told"), [(1, 4, True), (2, 12, True), (3, 4, False), (2, 4, False)])
def test_a_missing_ratio_follows_from_the_blocks_or_is_an_error(tmp_path, ratio, layers, is_told):
    """4 layers have 2 cross-attention blocks with a ratio of 2 and of 3, which compute different logits."""
    original, layout = reference(ratio, True, layers)
    save_file({name: value.contiguous() for name, value in original.state_dict().items()}, tmp_path / "m.safetensors")
    del layout["text"]["cross_attn_ratio"]
    if is_told:
        assert load_openmammut(tmp_path / "m.safetensors", layout)[1].text.cross_attention_every == ratio
        return
    with pytest.raises(WeightsError, match=r"'cross_attn_ratio' is missing.*2 .* of 4 layers fit each of \[2, 3\]"):
        load_openmammut(tmp_path / "m.safetensors", layout)


def test_without_weights_a_missing_ratio_is_an_error():
    _, layout = reference(2, True, 4)
    del layout["text"]["cross_attn_ratio"]
    with pytest.raises(WeightsError, match="'cross_attn_ratio' is missing"):
        config_of_layout(layout, "test")


def test_the_width_of_an_mlp_survives_being_a_ratio():
    """int(width × (mlp / width)) is one short for hundreds of these pairs, 176 and 240 among them."""
    pairs = [(width, mlp) for width in range(16, 1700, 16) for mlp in range(16, 4 * width + 1, 16)]
    assert (176, 240) in pairs and sum(int(width * (mlp / width)) != mlp for width, mlp in pairs) > 700
    assert all(int(width * exact_ratio(mlp, width)) == mlp for width, mlp in pairs)
    for width, mlp in ((176, 240), (1152, 4304)):
        config = small_config(width, mlp)
        assert config_of_layout(layout_config(config), "test") == config


def small_config(width: int, mlp_width: int) -> MammutConfig:
    widths = {f"{part}_{name}": value for part in ("vision", "text") for name, value in
              (("width", width), ("mlp_width", mlp_width), ("num_layers", 2), ("num_heads", 2))}  # fmt: skip
    return mammut_config("openmammut_B", embedding_width=width, vocab_size=64, **widths)
